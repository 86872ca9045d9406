"""Gradients of chosen entries and their update on the GPU, in Triton: float32 sums, no atomics, the same bits again.

Tensor cores make the dense product of a tile in registers; then its chosen entries are picked out and stored, and the
tile is forgotten. A linear layer is the convolution of images of one pixel: Triton compiles a size of 1 as a constant.

float32 is multiplied as three tf32 products, about as exact as float32. Written for Triton 3.6 and later, CUDA; checked
there by `make gpu-check`, and on the CPU in Triton's interpreter (TRITON_INTERPRET=1) by the tests. Sizes of tiles are
reasoned, and not yet tuned on a GPU.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.masked_grad.selection import TILE, matrix, tiles

if TYPE_CHECKING:
    from kernels.masked_grad.ops import Hyper, Window

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ModuleNotFoundError:  # the module can still be imported and read; `kernels._dispatch` refuses to run it

    def jit(function):
        return function


ROWS, FEW_ROWS = 64, 16  # of the part of a tile that a program makes; few where groups have few
TOKENS = 32  # summed at once
ENTRIES = 256  # picked at once
UPDATED = 128  # entries that a program of the update takes at once

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def linear_gradient(dy: Tensor, x: Tensor, offsets: Tensor, starts: Tensor) -> Tensor:
    """Chosen entries [k], float32, of dy^T x; dy [T, O] and x [T, I] of one dtype."""
    image = (1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1)
    return _gradient(dy, x, offsets, starts, (dy.shape[1], x.shape[1]), len(dy), 1, image)


def conv2d_gradient(dy: Tensor, x: Tensor, offsets: Tensor, starts: Tensor, window: Window) -> Tensor:
    """Chosen entries [k], float32, of the gradient of a convolution's weight; dy and x of one dtype."""
    shape = matrix((dy.shape[1], x.shape[1] // window.groups, *window.size))
    image = (*x.shape[2:], *dy.shape[2:], *window.size, *window.stride, *window.padding, *window.dilation)
    length = dy.shape[0] * dy.shape[2] * dy.shape[3]
    return _gradient(dy, x, offsets, starts, shape, length, window.groups, image)


def adamw_(
    weight: Tensor,
    grad: Tensor,
    offsets: Tensor,
    starts: Tensor,
    first: Tensor,
    second: Tensor,
    master: Tensor | None,
    scale: Tensor,
    hyper: Hyper,
) -> None:
    """One step in place; weight contiguous."""
    if not len(offsets):
        return
    down, across = tiles(weight.shape)
    with _on(weight.device):
        _adamw_kernel[(down * across,)](
            weight, grad.contiguous(), offsets, starts, first, second, first if master is None else master, scale,
            matrix(weight.shape)[1], across, 1 - hyper.beta1, hyper.beta2, 1 - hyper.beta2, hyper.keep, hyper.rate,
            hyper.root, hyper.eps, MASTER=master is not None, TILE=TILE, ENTRIES=UPDATED,
        )  # fmt: skip


def _gradient(
    dy: Tensor,
    x: Tensor,
    offsets: Tensor,
    starts: Tensor,
    shape: tuple[int, int],
    length: int,
    groups: int,
    image: tuple[int, ...],
) -> Tensor:
    out = torch.zeros(len(offsets), dtype=torch.float32, device=dy.device)
    if not out.numel() or not length:
        return out
    rows, columns = shape
    size = rows // groups
    part = ROWS if size > FEW_ROWS else FEW_ROWS
    # a group that begins within a part reaches into one more
    parts = triton.cdiv(size, part) + (groups > 1)
    across = tiles(shape)[1]
    with _on(dy.device):
        _gradient_kernel[(across, parts, groups)](
            dy.contiguous(), x.contiguous(), offsets, starts, out, length, rows, columns, size, *image,
            ROWS=part, TILE=TILE, TOKENS=TOKENS, ENTRIES=ENTRIES,
            PRECISION="tf32x3" if dy.dtype == torch.float32 else "tf32", INTERPRETED=INTERPRETED,
        )  # fmt: skip
    return out


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Inside, Triton launches on this device; nothing on the CPU, where it is interpreted."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@jit
def _gradient_kernel(
    dy,  # [images, rows, out_height, out_width]
    x,  # [images, groups * columns / (kernel_height kernel_width), height, width]
    offsets,  # [k]
    starts,  # [tiles + 1]
    out,  # [k]
    length,  # images * out_height * out_width
    rows,
    columns,
    size,  # rows of a group
    height,
    width,
    out_height,
    out_width,
    kernel_height,
    kernel_width,
    stride_y,
    stride_x,
    padding_y,
    padding_x,
    dilation_y,
    dilation_x,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    ENTRIES: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    begin = tl.program_id(2) * size
    top = (begin // ROWS + tl.program_id(1)) * ROWS
    if top >= begin + size:
        return
    tile = top // TILE * tl.cdiv(columns, TILE) + tl.program_id(0)
    first, last = tl.load(starts + tile), tl.load(starts + tile + 1)
    if first == last:
        return
    row, column = top + tl.arange(0, ROWS), tl.program_id(0) * TILE + tl.arange(0, TILE)
    area, window = out_height * out_width, kernel_height * kernel_width
    channel, place = column // window, column % window
    total = tl.zeros((ROWS, TILE), tl.float32)
    for start in range(0, length, TOKENS):
        token = start + tl.arange(0, TOKENS)
        image, at = (token // area).to(tl.int64), token % area
        mine = ((row >= begin) & (row < begin + size))[:, None] & (token < length)[None, :]
        a = tl.load(dy + (image[None, :] * rows + row[:, None]) * area + at[None, :], mask=mine, other=0.0)
        y = (at // out_width * stride_y - padding_y)[:, None] + (place // kernel_width * dilation_y)[None, :]
        z = (at % out_width * stride_x - padding_x)[:, None] + (place % kernel_width * dilation_x)[None, :]
        plane = (image * (rows // size) + tl.program_id(2))[:, None] * (columns // window) + channel[None, :]
        seen = (token < length)[:, None] & (column < columns)[None, :]
        seen &= (y >= 0) & (y < height) & (z >= 0) & (z < width)
        b = tl.load(x + (plane * height + y) * width + z, mask=seen, other=0.0)
        total = _dot(a, b, total, PRECISION, INTERPRETED)
    _store_chosen(total, offsets, out, first, last, top, begin, size, ROWS, TILE, ENTRIES)


@jit
def _dot(a, b, total, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # the interpreter multiplies the bits of bfloat16 as whole numbers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@jit
def _store_chosen(
    total,  # [ROWS, TILE], rows from `top` on
    offsets,
    out,
    first,
    last,
    top,
    begin,
    size,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Entries first .. last - 1 of the tile, those of them that are in this part and group."""
    flat = tl.reshape(total, (ROWS * TILE,))
    for entry in range(first, last, ENTRIES):
        e = entry + tl.arange(0, ENTRIES)
        place = tl.load(offsets + e, mask=e < last, other=0).to(tl.int32) - top % TILE * TILE
        row = top + place // TILE
        wanted = (e < last) & (place >= 0) & (place < ROWS * TILE) & (row >= begin) & (row < begin + size)
        tl.store(out + e, tl.gather(flat, tl.where(wanted, place, 0), 0), mask=wanted)


@jit
def _adamw_kernel(
    weight,  # [rows, columns]
    grad,  # [k]
    offsets,  # [k]
    starts,  # [tiles + 1]
    first,  # [k]
    second,  # [k]
    master,  # [k]
    scale,  # one number
    columns,
    across,
    take1,
    keep2,
    take2,
    keep,
    rate,
    root,
    eps,
    MASTER: tl.constexpr,
    TILE: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    tile = tl.program_id(0)
    corner = (tile // across * TILE).to(tl.int64) * columns + tile % across * TILE
    last = tl.load(starts + tile + 1)
    factor = tl.load(scale)
    for entry in range(tl.load(starts + tile), last, ENTRIES):
        e = entry + tl.arange(0, ENTRIES)
        there = e < last
        offset = tl.load(offsets + e, mask=there, other=0).to(tl.int64)
        at = weight + corner + offset // TILE * columns + offset % TILE
        g = tl.load(grad + e, mask=there, other=0.0).to(tl.float32) * factor
        m = tl.load(first + e, mask=there, other=0.0)
        v = tl.load(second + e, mask=there, other=0.0)
        m += (g - m) * take1
        v = v * keep2 + g * g * take2
        value = (
            tl.load(master + e, mask=there, other=0.0) if MASTER else tl.load(at, mask=there, other=0.0).to(tl.float32)
        )
        value = value * keep - rate * (m / (tl.sqrt(v) * root + eps))
        tl.store(first + e, m, mask=there)
        tl.store(second + e, v, mask=there)
        if MASTER:
            tl.store(master + e, value, mask=there)
        tl.store(at, value.to(weight.dtype.element_ty), mask=there)
