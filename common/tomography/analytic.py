"""Filtered back-projection (FBP) of 2-D parallel and flat-detector fan beams.

    weight rays -> ramp-filter each view -> smear the filtered views back over the image, view by view

Legend: b view angle; (X, Y) pixel centre; R source to axis; D axis to detector; u detector coordinate, from the
central ray; s = u R/(R+D) the same on the virtual detector through the axis; U depth of a pixel, from the source.
Lengths in mm, angles in rad, line integrals without unit, images in 1/mm. Axes and signs as in kernels.ct.

Everything is plain torch operations on [..., V, K], differentiable, on the sinogram's device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from common.tomography._checks import Geometry, check_sinogram
from common.tomography.filters import filter_views
from kernels.ct import FanBeam, ParallelBeam

__all__ = ["fbp", "fbp_gloredi", "view_weights"]


def fbp(
    sinogram: Tensor,
    geometry: Geometry,
    *,
    window: str = "ram-lak",
    view_weights_rad: Sequence[float] | None = None,
) -> Tensor:
    """Textbook FBP (Kak and Slaney 1988, sections 3.3 and 3.4.2).

        parallel   f(X, Y) = sum_v w_v q_v(t),                  q = g * ramp in t
        fan        f(X, Y) = 1/2 sum_v w_v (R/U)^2 q_v(s),      q = [g R/sqrt(R^2+s^2) (1 + a s/R^2)] * ramp in s

    Assumed coverage: views on all sides. Parallel beam: angles count modulo pi, so that 180 degrees, 360 degrees and
    repeated views all come out right. Fan beam: the full turn, each ray measured from both ends; a short scan (180
    degrees plus fan) would need ray weights of its own and is refused. No view may truncate the object.

    sinogram          [..., V, K] float32 or float64, line integrals
    geometry          kernels.ct.ParallelBeam or FanBeam; detector offset and axis offset a are honoured
    window            ram-lak, shepp-logan, cosine, hamming or hann
    view_weights_rad  w_v, V angles in rad that sum to pi (parallel) or 2 pi (fan); by default each view stands for the
                      angles nearest to it, see `view_weights`

    Returns [..., H, W] in 1/mm, in the sinogram's type. NaN in a view gives NaN in the image.
    Raises TypeError and ValueError for a sinogram that does not fit, an unknown window, a missing wedge of views.
    Cost: 2 V H W interpolations an image; memory of a few images (with autograd, about 24 bytes more for each view
    and pixel).
    """
    check_sinogram(sinogram, geometry)
    period = math.pi if isinstance(geometry, ParallelBeam) else 2 * math.pi
    if view_weights_rad is None:
        weights = view_weights(geometry.angles_rad, period)
        _refuse_missing_wedge(geometry.angles_rad, period)
    else:
        weights = _given_weights(view_weights_rad, geometry.views)
    weights = weights.to(sinogram)[:, None]
    if isinstance(geometry, ParallelBeam):
        return _smear(filter_views(weights * sinogram, geometry.pitch, window), geometry, power=0)
    radius = geometry.source_axis
    s = geometry.cell_centres_mm * (radius / (radius + geometry.axis_detector))
    # the second factor is the Jacobian of an axis beside the central ray (after Gullberg et al. 1986); 1 for a = 0
    rays = radius / torch.sqrt(radius**2 + s**2) * (1 + geometry.axis * s / radius**2)
    weighted = weights / 2 * rays.to(sinogram) * sinogram
    return _smear(filter_views(weighted, _virtual_pitch(geometry), window), geometry, power=2)


def fbp_gloredi(sinogram: Tensor, geometry: FanBeam, *, window: str = "ram-lak") -> Tensor:
    """The approximate fan FBP that GloReDi, FreeSeed and ProCT call FBP (torch-radon's filter and back-projection).

        f(X, Y) = pi/V sum_v (R/U) q_v(s),      q = g * ramp in s

    Against the textbook: no cosine weight before the filter, and R/U in place of (R/U)^2 after it. The two errors
    partly cancel; what is left falls with the square of the fan angle (their released factors pi/(2V), a doubled ramp
    and (R+D)/(U pitch) multiply to the above). Use it to reproduce that family's inputs and targets, and `fbp` for
    anything else.

    Arguments and result as `fbp`. Raises TypeError for another geometry, and ValueError where views are not evenly
    spaced over the full turn, which the one factor pi/V takes for granted.
    """
    check_sinogram(sinogram, geometry)
    if not isinstance(geometry, FanBeam):
        raise TypeError(
            f"fbp_gloredi: got {type(geometry).__name__}, expected kernels.ct.FanBeam. Use fbp for a parallel beam."
        )
    even = 2 * math.pi / geometry.views
    gaps = _sorted_gaps(geometry.angles_rad, 2 * math.pi)
    if (gaps - even).abs().max() > 1e-3 * even:
        raise ValueError(
            f"fbp_gloredi: got gaps of {gaps.min():.5f} to {gaps.max():.5f} rad between views, expected {even:.5f} rad "
            "everywhere (evenly spaced over 360 degrees). Use fbp, which weights each view by its gaps."
        )
    filtered = filter_views(math.pi / geometry.views * sinogram, _virtual_pitch(geometry), window)
    return _smear(filtered, geometry, power=1)


def view_weights(angles_rad: Sequence[float], period_rad: float) -> Tensor:
    """The angle each view stands for: half the gap to either neighbour on a circle of `period_rad`.

    This is the trapezoidal rule for the integral over views. pi for parallel beams, where b and b + pi see the same
    rays; 2 pi for fan beams. Any order; views that coincide share their angle. Returns [V] float64, sum = period.
    """
    angles = _angles(angles_rad)
    order = torch.argsort(angles % period_rad, stable=True)
    gaps = _sorted_gaps(angles_rad, period_rad)
    weights = torch.empty_like(angles)
    weights[order] = (gaps + gaps.roll(1)) / 2
    return weights


def _smear(views: Tensor, geometry: Geometry, power: int) -> Tensor:
    """sum_v (R/U)^power views[v] at each pixel's place on the detector, linearly interpolated: [..., H, W].

    Beyond the detector's ends the views fall to zero within one cell. Positions are computed in float64: in float32
    they would be off by 1e-4 cells at common sizes.
    """
    *batch, count, cells = views.shape
    height, width = geometry.shape
    columns = torch.nn.functional.pad(views, (1, 1)).reshape(-1, count, cells + 2)
    columns = columns.permute(1, 2, 0).contiguous()  # [V, K+2, B]: one look-up serves the whole batch
    image = views.new_zeros(height * width, columns.shape[-1])
    x, y = _pixel_centres(geometry, views.device)
    for view, angle in enumerate(geometry.angles_rad):
        u = x * math.cos(angle) + y * math.sin(angle) + geometry.axis
        closeness = None
        if isinstance(geometry, FanBeam):
            depth = geometry.source_axis - (x * math.sin(angle) - y * math.cos(angle))  # > 0: checked by FanBeam
            closeness = geometry.source_axis / depth
            u *= closeness * ((geometry.source_axis + geometry.axis_detector) / geometry.source_axis)
        position = ((u - geometry.offset) / geometry.pitch + (cells + 1) / 2).clamp_(0, cells + 1).flatten()
        left = position.long().clamp_(max=cells)
        right_share = position - left
        left_share = 1 - right_share
        if closeness is not None:
            scale = closeness.flatten() ** power
            left_share, right_share = left_share * scale, right_share * scale
        image.addcmul_(columns[view].index_select(0, left), left_share.to(views)[:, None])
        image.addcmul_(columns[view].index_select(0, left + 1), right_share.to(views)[:, None])
    return image.T.reshape(*batch, height, width)


def _pixel_centres(geometry: Geometry, device: torch.device) -> tuple[Tensor, Tensor]:
    """X [1, W] and Y [H, 1] in mm, float64; Y upwards."""
    height, width = geometry.shape
    x = (torch.arange(width, dtype=torch.float64, device=device) - (width - 1) / 2) * geometry.pixel
    y = ((height - 1) / 2 - torch.arange(height, dtype=torch.float64, device=device)) * geometry.pixel
    return x[None, :], y[:, None]


def _virtual_pitch(geometry: FanBeam) -> float:
    return geometry.pitch * geometry.source_axis / (geometry.source_axis + geometry.axis_detector)


def _angles(angles_rad: Sequence[float]) -> Tensor:
    return torch.tensor(tuple(angles_rad), dtype=torch.float64)


def _sorted_gaps(angles_rad: Sequence[float], period: float) -> Tensor:
    """From each view to the next on the circle, in rising order of the angle: [V], sum = period."""
    angles = torch.sort(_angles(angles_rad) % period).values
    return torch.diff(angles, append=angles[:1] + period)


def _refuse_missing_wedge(angles_rad: Sequence[float], period: float) -> None:
    """Raise for a gap over a quarter of the circle that is also four times the usual one.

    Its angle would be given to the two views beside it: a loud, silent error. Few, evenly spaced views pass.
    """
    gaps = _sorted_gaps(angles_rad, period)
    gaps = gaps[gaps > 1e-6 * period]  # coinciding views say nothing about the usual gap
    if len(gaps) < 2:
        return
    largest = float(gaps.max())
    usual = (period - largest) / (len(gaps) - 1)
    if largest > period / 4 and largest > 4 * usual:
        raise ValueError(
            f"fbp: got no view over {math.degrees(largest):.1f} degrees (other gaps: {math.degrees(usual):.2f}), "
            f"expected views all round the {math.degrees(period):.0f} degrees. Limited angles and short scans need an "
            "iterative method (sirt, cgls, tv), or view_weights_rad of your own."
        )


def _given_weights(view_weights_rad: Sequence[float], views: int) -> Tensor:
    weights = _angles(view_weights_rad)
    if weights.shape != (views,) or not torch.isfinite(weights).all():
        raise ValueError(
            f"view_weights_rad: got {len(weights)} values, expected {views} finite ones, an angle in rad a view. "
            "Start from view_weights(angles, period)."
        )
    return weights
