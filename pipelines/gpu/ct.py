"""Checks and timings of kernels.ct on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from kernels import ct
from kernels.ct import FanBeam, ParallelBeam, backproject, project, reference
from pipelines.gpu.report import Check, Timing, call_times, error, measured, quartiles

Scan = ParallelBeam | FanBeam

# float32 sums of some thousand terms, one after the other; positions are good to 1e-7 pixel
WORST_ERROR = 2e-6
WORST_DEFECT = 1e-6

MIXED = (0.0, 0.3, math.pi / 4, -2.2)

TINY_SCANS: dict[str, Scan] = {
    "parallel 7x9": ParallelBeam(MIXED, 12, (7, 9), pitch=0.9, pixel=1.1, offset=0.3, axis=-0.7),
    "fan 8x5": FanBeam(
        MIXED, 11, (8, 5), source_axis=22.0, axis_detector=9.0, pitch=1.4, pixel=0.9, offset=0.4, axis=0.8
    ),
    "one pixel": ParallelBeam(MIXED, 1, (1, 1)),
}

P512 = ParallelBeam.uniform(720, 736, (512, 512))
F512 = FanBeam.uniform(720, 736, (512, 512), source_axis=1024.0, axis_detector=512.0, pitch=1.5)
P256 = ParallelBeam.uniform(180, 368, (256, 256))
F256 = FanBeam.uniform(180, 368, (256, 256), source_axis=512.0, axis_detector=256.0, pitch=1.5)
LENGTHS = {"pixel": 0.8, "offset": 0.21, "axis": -0.4}

SCANS: dict[str, Scan] = {
    "parallel 512^2/720": P512,
    "fan 512^2/720": F512,
    "parallel 131x257, moved": ParallelBeam.uniform(61, 391, (131, 257), pitch=0.7, **LENGTHS),
    "fan 257x131, moved": FanBeam.uniform(
        61, 391, (257, 131), source_axis=170.0, axis_detector=90.0, pitch=1.3, **LENGTHS
    ),
    "fan, source beside the image": FanBeam.uniform(13, 200, (64, 64), source_axis=45.6, axis_detector=20.0),
    "parallel, fine cells": ParallelBeam.uniform(13, 700, (64, 64), pitch=0.15),
    "parallel, coarse cells": ParallelBeam.uniform(13, 30, (64, 64), pitch=4.0),
}


def checks(device: torch.device, tiny: bool) -> Iterator[Check]:
    """Each projector against its float64 reference and its other promises, on scans of every kind."""
    scans = TINY_SCANS if tiny else {**TINY_SCANS, **SCANS}
    for case, scan in scans.items():
        for batch in (3,) if tiny else (1, 3, 9):  # 9: a whole block of images and a ragged one
            if batch == 9 and scan.shape[0] > 256:
                continue  # the reference would take minutes
            yield from _of_scan(device, f"{case}, batch {batch}", scan, batch)


def timings(device: torch.device, repeats: int) -> Iterator[Timing]:
    """Both projectors, parallel and fan, of 1, 8 and 32 images."""
    cases: dict[str, Scan] = {
        "parallel 512^2/720": P512,
        "parallel 256^2/180": P256,
        "fan 512^2/720": F512,
        "fan 256^2/180": F256,
    }
    for case, scan in cases.items():
        for batch in (1, 8, 32):
            image = torch.randn(batch, *scan.shape, device=device)
            sinogram = torch.randn(batch, *scan.sinogram_shape, device=device)
            rays = batch * scan.views * scan.cells
            for call, data in (("project", image), ("backproject", sinogram)):
                torch.cuda.reset_peak_memory_stats(device)
                times = call_times(partial(getattr(ct, call), data, scan), repeats)
                low, median, high = quartiles(times)
                peak = torch.cuda.max_memory_allocated(device) / 2**20
                yield Timing("ct", case, call, batch, median, low, high, rays / median / 1e3, "Mrays/s", peak_mib=peak)


def _of_scan(device: torch.device, case: str, scan: Scan, batch: int) -> Iterator[Check]:
    # white noise: smooth images hide errors of position
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(batch, *scan.shape, generator=generator).to(device)
    sinogram = torch.randn(batch, *scan.sinogram_shape, generator=generator).to(device)
    measures: dict[str, tuple[Callable[[Scan, Tensor, Tensor], float], float]] = {
        "project against float64": (_projection_error, WORST_ERROR),
        "backproject against float64": (_backprojection_error, WORST_ERROR),
        "adjoint": (_adjoint_defect, WORST_DEFECT),
        "gradients": (_gradient_error, 0.0),
        "not the same again": (_unrepeated, 0.0),
        "strides": (_stride_error, 0.0),
        "NaN that spreads or vanishes": (_nan_leaks, 0.0),
    }
    for name, (measure, limit) in measures.items():
        yield measured("ct", case, name, partial(measure, scan, image, sinogram), limit)


def _projection_error(scan: Scan, image: Tensor, sinogram: Tensor) -> float:
    return error(project(image, scan), reference.project(image.double(), scan))


def _backprojection_error(scan: Scan, image: Tensor, sinogram: Tensor) -> float:
    return error(backproject(sinogram, scan), reference.backproject(sinogram.double(), scan))


def _adjoint_defect(scan: Scan, image: Tensor, sinogram: Tensor) -> float:
    ax, aty = project(image, scan).double(), backproject(sinogram, scan).double()
    difference = (ax * sinogram.double()).sum() - (image.double() * aty).sum()
    return float(difference.abs() / (ax.norm() * sinogram.double().norm()))


def _gradient_error(scan: Scan, image: Tensor, sinogram: Tensor) -> float:
    """Autograd, once and twice, gives what the two functions give."""
    x, y = image.clone().requires_grad_(), sinogram.clone().requires_grad_()
    (first,) = torch.autograd.grad((project(x, scan) * y).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((first * image).sum(), y)
    once, twice = first.detach() - backproject(sinogram, scan), second - project(image, scan)
    return float(torch.maximum(once.abs().max(), twice.abs().max()))


def _unrepeated(scan: Scan, image: Tensor, sinogram: Tensor) -> float:
    """How many values differ when the same calls run again."""
    forward = project(image, scan) != project(image, scan)
    back = backproject(sinogram, scan) != backproject(sinogram, scan)
    return float(forward.sum() + back.sum())


def _stride_error(scan: Scan, image: Tensor, sinogram: Tensor) -> float:
    forward = project(image.mT.contiguous().mT, scan) - project(image, scan)
    back = backproject(sinogram.mT.contiguous().mT, scan) - backproject(sinogram, scan)
    return float(torch.maximum(forward.abs().max(), back.abs().max()))


def _nan_leaks(scan: Scan, image: Tensor, sinogram: Tensor) -> float:
    """Cells that see a NaN pixel and are not NaN, and cells far from it, or of other images, that are."""
    row, column = scan.shape[0] // 2, scan.shape[1] // 3
    pixel, around = torch.zeros_like(image[:1]), torch.zeros_like(image[:1])
    pixel[0, row, column] = 1
    around[0, max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3] = 1
    image = image.clone()
    image[0, row, column] = math.nan
    found = project(image, scan).isnan()
    lost = (project(pixel, scan) > 1e-3 * scan.pixel) & ~found[:1]
    spread = (project(around, scan) == 0) & found[:1]
    return float(lost.sum() + spread.sum() + found[1:].sum())
