"""Scans that several papers share: GloReDi's fan beam, sparse subsets of views, photon noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from common.tomography._checks import check_number, check_sinogram
from kernels.ct import FanBeam, ParallelBeam

__all__ = ["add_photon_noise", "gloredi_geometry", "keep_views"]

GeometryT = TypeVar("GeometryT", ParallelBeam, FanBeam)

# GloReDi, FreeSeed and ProCT at 256 x 256 [released code]: distances from the axis and cell pitch in pixels
_SIZE, _SOURCE_AXIS, _AXIS_DETECTOR, _CELLS, _PITCH = 256, 1075, 1075, 672, 2


def gloredi_geometry(size: int, views: int, *, pixel_mm: float = 1.0) -> FanBeam:
    """GloReDi's fan beam: `views` evenly spaced over 360 degrees, the first at 0.

    At size 256: source and detector 1075 pixels from the axis, 672 cells 2 pixels apart, thus one pixel at the axis.
    Other sizes keep the field of view: distances and the number of cells grow with the size.

    size      pixels a side, >= 1
    views     V >= 1
    pixel_mm  length of a pixel; the released code counts in pixels, which is 1.0
    """
    if size < 1 or views < 1:
        raise ValueError(f"gloredi_geometry: got size {size} and {views} views, expected 1 or more of both.")
    check_number("pixel_mm", pixel_mm, low=0, inclusive=False)
    scale = size / _SIZE
    return FanBeam.uniform(
        views,
        max(1, round(_CELLS * scale)),
        (size, size),
        source_axis=_SOURCE_AXIS * scale * pixel_mm,
        axis_detector=_AXIS_DETECTOR * scale * pixel_mm,
        pitch=_PITCH * pixel_mm,
        pixel=pixel_mm,
    )


def keep_views(sinogram: Tensor, geometry: GeometryT, views: Sequence[int]) -> tuple[Tensor, GeometryT]:
    """The sinogram [..., len(views), K] and geometry of some views, by index, in the order given.

    Raises IndexError for a view that is not there, and as `fbp` where sinogram and geometry do not fit.
    """
    check_sinogram(sinogram, geometry)
    return sinogram[..., list(views), :], geometry.subset(views)


def add_photon_noise(sinogram: Tensor, photons: float, generator: torch.Generator) -> Tensor:
    """Poisson noise as in GloReDi's released code: s' = -m ln(Poisson(I0 exp(-s/m)) / I0), m = max of each sinogram.

    Dividing by m makes the strongest attenuation 1/e whatever the object: far milder than a clinical scan with as many
    photons.

    sinogram   [..., V, K] line integrals >= 0 (each of the leading dimensions has its own m)
    photons    I0 > 0, expected counts of an unattenuated ray; no count is taken as 1, to keep the logarithm finite
    generator  on the CPU, so that all devices see the same noise
    """
    check_number("photons", photons, low=0, inclusive=False)
    if sinogram.numel() == 0:
        return sinogram
    clean = sinogram.detach().double().cpu()
    peak = clean.amax(dim=(-2, -1), keepdim=True)
    if not (peak >= 0).all():
        raise ValueError(
            f"add_photon_noise: got a sinogram with maximum {peak.min():.4g}, expected line integrals >= 0. Check its "
            "sign: transmissions need -log first."
        )
    peak = peak.clamp_min(torch.finfo(torch.float32).tiny)  # an empty scan stays (nearly) empty
    counts = torch.poisson(photons * torch.exp(-clean / peak), generator=generator).clamp_min(1)
    return (-peak * torch.log(counts / photons)).to(sinogram)
