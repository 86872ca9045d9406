"""Joseph's projector pair on the GPU, in Triton: float32 data, float64 and fixed-point positions, no atomics.

`project` is driven by rays: a program follows a block of neighbouring rays of one view from line to line. `backproject`
is driven by pixels: a program owns a run of pixels and gathers, for every view, the few cells whose rays pass within
reach. Both use the weights of `reference.py`, so they are exact transposes, and repeat bit for bit.

Difference from the reference: a position is rounded to 2^-32 pixel in `project` (drift over 8192 lines: 1e-6 pixel),
and weights and sums are float32. Written for Triton 3.6 and later, CUDA; checked there by `make gpu-check`, and on the
CPU in Triton's interpreter (TRITON_INTERPRET=1) by the tests. Doubt: `backproject` of a fan spends about 30 float64
operations on a pixel and view, which GPUs without fast float64 (gaming cards) will feel.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ModuleNotFoundError:  # the module can still be imported and read; `kernels._dispatch` refuses to run it

    def jit(function):
        return function


__all__ = ["backproject", "project"]

BLOCK = 128  # neighbouring cells or pixels of a program: four warps, each reading whole cache lines
SLACK = 1.0001  # on the reach of a fan's pixel, which is found in float32: more cells are looked at, not less
MOST_IMAGES = 8  # of a batch, that share positions and weights in one program; more would not fit the registers


def project(image: Tensor, angles: Tensor, out: Tensor, lengths: Sequence[float]) -> Tensor:
    """image [B, H, W] -> out [B, V, K], both contiguous float32 on one device; angles [V] float64 on the CPU.

    `lengths` as `geometry.lengths_mm`. Returns `out`.
    """
    (batch, views, cells), (height, width) = out.shape, image.shape[1:]
    _check_size(height * width, views * cells)
    # the rows and, transposed, the columns: so that neighbouring rays of either kind read neighbouring addresses
    planes = torch.stack([image.flatten(1), image.mT.flatten(1)])  # [2, B, H*W]
    images = _images_at_once(batch)
    grid = (views * triton.cdiv(cells, BLOCK), triton.cdiv(batch, images))
    with _on(image.device):
        scan = _scan(angles, lengths, height, width, cells).to(image.device)
        _project_kernel[grid](
            planes,
            scan,
            out,
            batch,
            views,
            cells,
            height,
            width,
            max(height, width),
            lengths[-3],
            FAN=len(lengths) == 6,
            IMAGES=images,
            CELLS=BLOCK,
        )
    return out


def backproject(sinogram: Tensor, angles: Tensor, out: Tensor, lengths: Sequence[float]) -> Tensor:
    """The exact adjoint: sinogram [B, V, K] -> out [B, H, W]; otherwise as `project`."""
    (batch, views, cells), (height, width) = sinogram.shape, out.shape[1:]
    _check_size(height * width, views * cells)
    images = _images_at_once(batch)
    grid = (height * triton.cdiv(width, BLOCK), triton.cdiv(batch, images))
    with _on(out.device):
        scan = _scan(angles, lengths, height, width, cells).to(out.device)
        _backproject_kernel[grid](
            sinogram,
            scan,
            out,
            batch,
            views,
            cells,
            height,
            width,
            lengths[-3],
            FAN=len(lengths) == 6,
            REACH=cells_in_reach(lengths, height, width, cells),
            IMAGES=images,
            PIXELS=BLOCK,
        )
    return out


def cells_in_reach(lengths: Sequence[float], height: int, width: int, cells: int) -> int:
    """How many neighbouring cells can have rays within reach of one pixel, at most, in any view.

    Lengths in pixels: a ray reaches a pixel over at most 1 pixel across, which is 2 / pitch cells of a parallel beam.
    In a fan, at depth U and lateral p, it is (see `_backproject_kernel`) less than 2 S hypot(p, U) / (U (U - 1) pitch).
    """
    *distances, pitch, pixel, _, axis = lengths
    if not distances:
        return min(cells, math.ceil(2 * pixel / pitch))
    source, detector, radius = distances[0] / pixel, distances[1] / pixel, math.hypot(height - 1, width - 1) / 2
    depth, lateral = source - radius, radius + abs(axis) / pixel
    if depth <= 1.01:  # a pixel close to the source can be within reach of any ray
        return cells
    reach = (source + detector) * math.hypot(lateral, depth) / (depth * (depth - 1)) * pixel / pitch
    return min(cells, math.ceil(2 * reach * SLACK))


def _scan(angles: Tensor, lengths: Sequence[float], height: int, width: int, cells: int) -> Tensor:
    """What the kernels know of the scan, lengths in pixels: [8 + 2V] float64, read by number in the kernels.

    A tensor, because Triton passes Python floats as float32.
    """
    *distances, pitch, pixel, offset, axis = lengths
    source, span = (distances[0], sum(distances)) if distances else (pixel, pixel)
    mm = torch.tensor([source, span, pitch, offset, axis], dtype=torch.float64)
    middle = torch.tensor([width - 1, height - 1, cells - 1], dtype=torch.float64) / 2
    return torch.cat([mm / pixel, middle, angles.cos(), angles.sin()])


def _images_at_once(batch: int) -> int:
    return min(MOST_IMAGES, triton.next_power_of_2(batch))


def _check_size(pixels: int, rays: int) -> None:
    if max(pixels, rays) >= 2**31:
        raise ValueError(
            f"kernels.ct on the GPU: got {pixels} pixels and {rays} rays an image; expected fewer than 2^31 of each, "
            "as the kernels count them in 32 bits; split the views"
        )


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    # Triton launches on the current device, whatever the tensors say
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@jit
def _project_kernel(
    planes,  # [2, B, H*W]
    scan,
    out,  # [B, V, K]
    batch,
    views,
    cells,
    height,
    width,
    lines_most,
    pixel,
    FAN: tl.constexpr,
    IMAGES: tl.constexpr,
    CELLS: tl.constexpr,
):
    blocks = tl.cdiv(cells, CELLS)
    view = tl.program_id(0) // blocks
    cell = tl.program_id(0) % blocks * CELLS + tl.arange(0, CELLS)
    image = tl.program_id(1) * IMAGES + tl.arange(0, IMAGES)

    by_rows, position, slope, step = _path(scan, view, views, cell, FAN)
    lines, across = tl.where(by_rows, height, width), tl.where(by_rows, width, height)
    size = (image * 0 + height * width).to(tl.int64)  # pixels an image
    live = (image < batch)[:, None] & (cell < cells)[None, :]
    base = (image.to(tl.int64) * size)[:, None] + tl.where(by_rows, 0, 1).to(tl.int64)[None, :] * size[:, None] * batch
    base = planes + base
    total = tl.zeros([IMAGES, CELLS], dtype=tl.float32)
    for line in range(lines_most):
        low = (position >> 32).to(tl.int32)
        fraction = ((position >> 8) & 16777215).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # 24 bits, 2^-24
        on = line < lines
        at = base + (line * across + low)[None, :]
        left = tl.load(at, mask=live & (on & (low >= 0) & (low < across))[None, :], other=0.0)
        right = tl.load(at + 1, mask=live & (on & (low >= -1) & (low < across - 1))[None, :], other=0.0)
        total += left + fraction[None, :] * (right - left)
        position += slope
    ray = (image.to(tl.int64) * views)[:, None] * cells + (view * cells + cell)[None, :]
    tl.store(out + ray, total * (step * pixel)[None, :], mask=live)


@jit
def _path(scan, view, views, cell, FAN: tl.constexpr):
    """The way of rays along their lines, the image's rows or, where these are too oblique, its columns, [CELLS] each.

    Returns (by_rows, position on line 0, slope from line to line, step in pixels from line to line); the position and
    the slope are int64 in units of 2^-32 pixel: adding the slope is exact, where float32 would drift.
    """
    # the ray X a + Y b = p, and its length for each unit of a and b
    cosine, sine = tl.load(scan + 8 + view), tl.load(scan + 8 + views + view)
    span, axis, middle_x, middle_y = tl.load(scan + 1), tl.load(scan + 4), tl.load(scan + 5), tl.load(scan + 6)
    u = (cell - tl.load(scan + 7)) * tl.load(scan + 2) + tl.load(scan + 3)
    if FAN:
        a, b = span * cosine + u * sine, span * sine - u * cosine
        p = tl.load(scan) * u - axis * span
        norm = tl.sqrt(u * u + span * span)
    else:
        a, b = cosine + 0 * u, sine + 0 * u
        p = u - axis
        norm = 1 + 0 * u

    # on line l the ray is at pixel start + l * slope
    by_rows = tl.abs(a) >= tl.abs(b) * (1 - 1e-12)  # as in the reference
    major, minor = tl.where(by_rows, a, b), tl.where(by_rows, b, a)
    middle_line, middle_across = tl.where(by_rows, middle_y, middle_x), tl.where(by_rows, middle_x, middle_y)
    start = (tl.where(by_rows, p, -p) - middle_line * minor) / major + middle_across
    start = tl.minimum(tl.maximum(start, -1073741824.0), 1073741824.0)  # 2^30: outside is outside
    position = tl.floor(start * 4294967296.0 + 0.5).to(tl.int64)
    slope = tl.floor(minor / major * 4294967296.0 + 0.5).to(tl.int64)
    return by_rows, position, slope, (norm / tl.abs(major)).to(tl.float32)


@jit
def _backproject_kernel(
    sinogram,  # [B, V, K]
    scan,
    out,  # [B, H, W]
    batch,
    views,
    cells,
    height,
    width,
    pixel,
    FAN: tl.constexpr,
    REACH: tl.constexpr,
    IMAGES: tl.constexpr,
    PIXELS: tl.constexpr,
):
    blocks = tl.cdiv(width, PIXELS)
    row = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * PIXELS + tl.arange(0, PIXELS)
    image = tl.program_id(1) * IMAGES + tl.arange(0, IMAGES)

    source, span, pitch, offset = tl.load(scan), tl.load(scan + 1), tl.load(scan + 2), tl.load(scan + 3)
    axis, middle_cell, cells_per_pixel = tl.load(scan + 4), tl.load(scan + 7), 1 / pitch
    x, y = column - tl.load(scan + 5), tl.load(scan + 6) - row
    live = (image < batch)[:, None] & (column < width)[None, :]
    rays = sinogram + (image.to(tl.int64) * views)[:, None] * cells
    total = tl.zeros([IMAGES, PIXELS], dtype=tl.float32)
    for view in range(views):
        cosine, sine = tl.load(scan + 8 + view), tl.load(scan + 8 + views + view)
        p = x * cosine + y * sine + axis
        # A ray reaches the pixel if its distance across the lines is below 1: |p S - U u| < M(u), in the terms of
        # `_path` M = max(|a|, |b|). M changes at most as fast as u, so |u - p S / U| < M(p S / U) / (U - 1).
        if FAN:
            depth = source - (x * sine - y * cosine)
            u = p * span / depth
            most = tl.maximum(tl.abs(span * cosine + u * sine), tl.abs(span * sine - u * cosine))
            reach = most.to(tl.float32) / (depth - 1).to(tl.float32)
            reach = tl.where(depth > 1.01, reach, float("inf")) * 1.00005  # half of SLACK
        else:
            depth = 1 + 0 * p
            u = p
            reach = tl.maximum(tl.abs(cosine), tl.abs(sine)) + 0 * p
        first = tl.floor((u - reach - offset) * cells_per_pixel + middle_cell) + 1
        first = tl.minimum(tl.maximum(first, 0.0), cells * 1.0).to(tl.int32)
        for n in range(REACH):
            cell = first + n
            u = (cell - middle_cell) * pitch + offset
            weight = _weight(p, u, depth, reach, cosine, sine, span, FAN)
            hit = (weight > 0) & (cell < cells)
            value = tl.load(rays + (view * cells + cell)[None, :], mask=live & hit[None, :], other=0.0)
            total += tl.where(hit, weight, 0.0)[None, :] * value
    size = (image * 0 + height * width).to(tl.int64)
    at = out + (image.to(tl.int64) * size)[:, None] + (row * width + column)[None, :]
    tl.store(at, total * pixel, mask=live)


@jit
def _weight(p, u, depth, reach, cosine, sine, span, FAN: tl.constexpr):
    """What the ray to a cell at u, [PIXELS] float64, gives to a pixel, in steps; 0 or less out of reach."""
    if FAN:
        away = tl.abs(p * span - depth * u).to(tl.float32)
        u32 = u.to(tl.float32)
        s32 = span.to(tl.float32)
        c32 = cosine.to(tl.float32)
        d32 = sine.to(tl.float32)
        major = tl.maximum(tl.abs(s32 * c32 + u32 * d32), tl.abs(s32 * d32 - u32 * c32))
        step = tl.sqrt(u32 * u32 + s32 * s32) / major
    else:
        away = tl.abs(p - u).to(tl.float32)
        major = reach.to(tl.float32)
        step = 1 / major
    return step * (1 - away / major)
