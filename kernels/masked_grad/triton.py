"""Gradients of chosen entries and their update on the GPU, in Triton: float32 sums, no atomics, the same bits again.

Tensor cores make the dense product of a tile in registers; then its chosen entries are picked out and stored, and the
tile is forgotten. A linear layer is the convolution of images of one pixel.

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
    return _gradient(dy, x, offsets, starts, (dy.shape[1], x.shape[1]), len(dy), 1, image, pointwise=True)


def conv2d_gradient(dy: Tensor, x: Tensor, offsets: Tensor, starts: Tensor, window: Window) -> Tensor:
    """Chosen entries [k], float32, of the gradient of a convolution's weight; dy and x of one dtype."""
    shape = matrix((dy.shape[1], x.shape[1] // window.groups, *window.size))
    image = (*x.shape[2:], *dy.shape[2:], *window.size, *window.stride, *window.padding, *window.dilation)
    length = dy.shape[0] * dy.shape[2] * dy.shape[3]
    return _gradient(dy, x, offsets, starts, shape, length, window.groups, image, pointwise=False)


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
    *,
    pointwise: bool,
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
            dy.contiguous(), x.contiguous(), offsets, starts, out, length, rows, columns, across, size, *image,
            POINTWISE=pointwise, ROWS=part, TILE=TILE, TOKENS=TOKENS, ENTRIES=ENTRIES,
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
    across,  # tiles beside each other
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
    POINTWISE: tl.constexpr,  # all of image sizes 1: tokens are images
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    ENTRIES: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    group = tl.program_id(2)
    begin = group * size
    top = (begin // ROWS + tl.program_id(1)) * ROWS
    tile = top // TILE * across + tl.program_id(0)
    if top >= begin + size:
        return
    first = tl.load(starts + tile)
    last = tl.load(starts + tile + 1)
    if first == last:
        return
    row = top + tl.arange(0, ROWS)
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mine = (row >= begin) & (row < begin + size)
    window, area = kernel_height * kernel_width, out_height * out_width
    channel, place = column // window, column % window
    u, v = place // kernel_width * dilation_y - padding_y, place % kernel_width * dilation_x - padding_x
    channels = columns // window
    total = tl.zeros((ROWS, TILE), tl.float32)
    for start in range(0, length, TOKENS):
        token = start + tl.arange(0, TOKENS)
        there = token < length
        if POINTWISE:
            a_at = token.to(tl.int64)[None, :] * rows + row[:, None]
            b_at = token.to(tl.int64)[:, None] * columns + column[None, :]
            seen = there[:, None] & (column < columns)[None, :]
        else:
            image, at = token // area, token % area
            a_at = (image.to(tl.int64)[None, :] * rows + row[:, None]) * area + at[None, :]
            y = (at // out_width * stride_y)[:, None] + u[None, :]
            z = (at % out_width * stride_x)[:, None] + v[None, :]
            plane = (image.to(tl.int64) * (rows // size) + group)[:, None] * channels + channel[None, :]
            b_at = (plane * height + y) * width + z
            seen = there[:, None] & (column < columns)[None, :] & (y >= 0) & (y < height) & (z >= 0) & (z < width)
        a = tl.load(dy + a_at, mask=mine[:, None] & there[None, :], other=0.0)
        b = tl.load(x + b_at, mask=seen, other=0.0)
        if INTERPRETED:  # the interpreter multiplies the bits of bfloat16 as whole numbers
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    flat = tl.reshape(total, (ROWS * TILE,))
    for entry in range(first, last, ENTRIES):
        e = entry + tl.arange(0, ENTRIES)
        offset = tl.load(offsets + e, mask=e < last, other=0).to(tl.int32)
        of_part = offset - top % TILE * TILE
        at_row = top + of_part // TILE
        wanted = (e < last) & (of_part >= 0) & (of_part < ROWS * TILE) & (at_row >= begin) & (at_row < begin + size)
        tl.store(out + e, tl.gather(flat, tl.where(wanted, of_part, 0), 0), mask=wanted)


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
