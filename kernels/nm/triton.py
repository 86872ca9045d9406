"""Packed products on the GPU, in Triton: float32 sums, no atomics, the same bits again.

A few tokens: a program reads its share of sixteen rows once, as it lies in memory, and gathers x through the cache.
More tokens: a program spreads a tile of the weight out in registers, by comparing places with the tile's columns, and
multiplies it on the tensor cores, which saves reading zeros and none of the arithmetic (`vectors_triton.py` does).

float32 weights are multiplied as three tf32 products (Ootomo and Yokota 2022), about as exact as float32 ones;
bfloat16 weights with a bfloat16 x, or with a float32 x cut into three bfloat16 parts that hold all its bits. Zeros meet
all of x: with more than a few tokens a NaN or an infinity in x makes its whole token NaN.

Written for Triton 3.6 and later, CUDA; checked there by `make gpu-check`, and on the CPU in Triton's interpreter
(TRITON_INTERPRET=1) by the tests. Sizes of tiles are reasoned, and not yet tuned on a GPU.
"""

from __future__ import annotations

import contextlib
import os

import torch
from torch import Tensor

from kernels.nm.tensor import NIBBLES

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ModuleNotFoundError:  # the module can still be imported and read; `kernels._dispatch` refuses to run it

    def jit(function):
        return function


__all__ = ["added_up", "dot", "input_gradient", "linear", "on", "partial_sums", "product", "shares", "weight_gradient"]

FEW = 4  # tokens that `_few_kernel` takes
SLOTS = 128  # kept values of each row that it reads at once
ROWS, COLUMNS = 64, 64  # of a spread-out tile
MOST_TOKENS = 64  # that meet a tile at once
PROGRAMS = 512  # enough for a large GPU; fixed, so that sums are the same on all of them
LEAST_SHARE = 4  # steps of a loop, below which it is not cut

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def linear(x: Tensor, values: Tensor, places: Tensor, m: int, rows: int, bias: Tensor | None) -> Tensor:
    """y [T, rows] of x [T, K], both float32 or (with bfloat16 values) bfloat16; bias [rows] float32. All contiguous.

    Values and places as in `NMTensor`, float32 or bfloat16; any m up to 256.
    """
    tokens, columns = x.shape
    blocks, groups, n, _ = values.shape
    out = x.new_empty(tokens, rows)
    if not out.numel():
        return out
    if tokens <= FEW:
        share, splits = shares(triton.cdiv(groups * n, SLOTS), blocks)
        partial, biased = partial_sums(out, splits), splits == 1 and bias is not None
        with on(x.device):
            _few_kernel[(blocks, splits)](
                x,
                values,
                places,
                bias if biased else out,
                partial,
                tokens,
                rows,
                columns,
                groups * n,
                share * SLOTS,
                N=n,
                M=m,
                NIBBLES=m <= NIBBLES,
                BIASED=biased,
                TOKENS=triton.next_power_of_2(tokens),
                SLOTS=SLOTS,
            )
        return added_up(partial, bias, out)
    at_once = _tokens_at_once(tokens)
    across, along = triton.cdiv(rows, ROWS), triton.cdiv(tokens, at_once)
    share, splits = shares(_chunks(groups, m), across * along)
    partial, biased = partial_sums(out, splits), splits == 1 and bias is not None
    with on(x.device):
        _many_kernel[(across, along, splits)](
            x,
            values,
            places,
            bias if biased else out,
            partial,
            tokens,
            rows,
            groups,
            share,
            N=n,
            BIASED=biased,
            TOKENS=at_once,
            **_tile_of(m),
        )
    return added_up(partial, bias, out)


def input_gradient(dy: Tensor, values: Tensor, places: Tensor, m: int) -> Tensor:
    """dx = dy W [T, K] of dy [T, rows]; types as in `linear`. A program owns the columns it writes."""
    tokens, rows = dy.shape
    _, groups, n, _ = values.shape
    out = dy.new_empty(tokens, groups * m)
    if not out.numel():
        return out
    at_once = _tokens_at_once(tokens)
    across, along = _chunks(groups, m), triton.cdiv(tokens, at_once)
    share, splits = shares(triton.cdiv(rows, ROWS), across * along)
    partial = partial_sums(out, splits)
    with on(dy.device):
        _input_gradient_kernel[(across, along, splits)](
            dy, values, places, partial, tokens, rows, groups, share, N=n, TOKENS=at_once, **_tile_of(m)
        )
    return added_up(partial, None, out)


def weight_gradient(dy: Tensor, x: Tensor, values: Tensor, places: Tensor, m: int) -> Tensor:
    """dy^T x at the kept entries, laid out and typed as values; dy [T, rows] and x [T, K] of one dtype.

    The dense product is made tile by tile, and what is kept is taken from each.
    """
    tokens, rows = dy.shape
    _, groups, n, _ = values.shape
    out = torch.zeros_like(values)
    grid = (triton.cdiv(rows, ROWS), _chunks(groups, m))
    with on(dy.device):
        _weight_gradient_kernel[grid](
            dy, x, values, places, out, tokens, rows, groups, N=n, TOKENS=_tokens_at_once(tokens), **_tile_of(m)
        )
    return out


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Inside, Triton launches on this device; nothing on the CPU, where it is interpreted."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def partial_sums(out: Tensor, splits: int) -> Tensor:
    """Where the splits of a product leave their sums."""
    return out if splits == 1 else out.new_empty(splits, *out.shape, dtype=torch.float32)


def added_up(partial: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """The splits' sums added in their order; and the bias, unless a single split has."""
    if partial is not out:
        size, at_once = out.numel(), 1024
        with on(out.device):
            _sum_kernel[(triton.cdiv(size, at_once),)](
                partial,
                out if bias is None else bias,
                out,
                size,
                out.shape[1],
                len(partial),
                BIASED=bias is not None,
                SIZE=at_once,
            )
    return out


def shares(steps: int, programs: int) -> tuple[int, int]:
    """How a loop of so many steps is cut if there are so many programs without: steps of a split, and splits."""
    splits = min(triton.cdiv(PROGRAMS, programs), triton.cdiv(steps, LEAST_SHARE))
    share = triton.cdiv(steps, splits)
    return share, triton.cdiv(steps, share)


def _tile_of(m: int) -> dict[str, int | bool]:
    """The constants of a tile of ROWS x COLUMNS: groups of m in WIDTH columns each, larger ones in several pieces."""
    width = min(triton.next_power_of_2(m), COLUMNS)
    return {
        "M": m,
        "WIDTH": width,
        "GROUPS": COLUMNS // width,
        "ROWS": ROWS,
        "NIBBLES": m <= NIBBLES,
        "INTERPRETED": INTERPRETED,
    }


def _chunks(groups: int, m: int) -> int:
    """How many tiles cover the columns."""
    width = min(triton.next_power_of_2(m), COLUMNS)
    return triton.cdiv(groups, COLUMNS // width) * triton.cdiv(m, width)


def _tokens_at_once(tokens: int) -> int:
    return min(max(16, triton.next_power_of_2(tokens)), MOST_TOKENS)  # 16: the least that tensor cores take


@jit
def _few_kernel(
    x,  # [tokens, columns]
    values,  # [blocks, slots, 16]
    places,  # [blocks, slots, 8 or 16]
    bias,
    out,  # [splits, tokens, rows]
    tokens,
    rows,
    columns,
    slots,
    share,
    N: tl.constexpr,
    M: tl.constexpr,
    NIBBLES: tl.constexpr,
    BIASED: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    block = tl.program_id(0)
    split = tl.program_id(1)
    token = tl.arange(0, TOKENS)
    row = tl.arange(0, 8)  # as places lie in nibbles: the low eight rows, and the high eight
    first_slot = block.to(tl.int64) * slots
    low = tl.zeros([TOKENS, SLOTS, 8], dtype=tl.float32)
    high = tl.zeros([TOKENS, SLOTS, 8], dtype=tl.float32)
    for first in range(split * share, tl.minimum((split + 1) * share, slots), SLOTS):
        slot = first + tl.arange(0, SLOTS)
        live = (slot < slots)[:, None] & (row >= 0)[None, :]
        at = (first_slot + slot)[:, None]
        low_value = tl.load(values + at * 16 + row[None, :], mask=live, other=0.0).to(tl.float32)
        high_value = tl.load(values + at * 16 + 8 + row[None, :], mask=live, other=0.0).to(tl.float32)
        if NIBBLES:
            both = tl.load(places + at * 8 + row[None, :], mask=live, other=0).to(tl.int32)
            low_place = both & 15
            high_place = both >> 4
        else:
            low_place = tl.load(places + at * 16 + row[None, :], mask=live, other=0).to(tl.int32)
            high_place = tl.load(places + at * 16 + 8 + row[None, :], mask=live, other=0).to(tl.int32)
        group = (slot // N * M)[:, None]
        wanted = (token < tokens)[:, None, None] & live[None, :, :]
        from_x = x + token[:, None, None] * columns
        low_x = tl.load(from_x + (group + low_place)[None, :, :], mask=wanted, other=0.0).to(tl.float32)
        high_x = tl.load(from_x + (group + high_place)[None, :, :], mask=wanted, other=0.0).to(tl.float32)
        low += low_value[None, :, :] * low_x
        high += high_value[None, :, :] * high_x
    low_sum = tl.sum(low, axis=1)
    high_sum = tl.sum(high, axis=1)
    at_row = block * 16 + row
    if BIASED:
        low_sum += tl.load(bias + at_row, mask=at_row < rows, other=0.0)[None, :]
        high_sum += tl.load(bias + at_row + 8, mask=at_row + 8 < rows, other=0.0)[None, :]
    to = out + (split * tokens + token)[:, None] * rows + at_row[None, :]
    stored = (token < tokens)[:, None] & (at_row < rows)[None, :]
    tl.store(to, low_sum, mask=stored)
    tl.store(to + 8, high_sum, mask=stored & (at_row + 8 < rows)[None, :])


@jit
def _sum_kernel(partial, bias, out, size, rows, splits, BIASED: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    live = at < size
    total = tl.zeros([SIZE], dtype=tl.float32)
    for split in range(splits):
        total += tl.load(partial + split * size + at, mask=live, other=0.0)
    if BIASED:
        total += tl.load(bias + at % rows, mask=live, other=0.0)
    tl.store(out + at, total, mask=live)


@jit
def _many_kernel(
    x,  # [tokens, columns]
    values,  # [blocks, groups, N, 16]
    places,
    bias,
    out,  # [splits, tokens, rows]
    tokens,
    rows,
    groups,
    share,
    N: tl.constexpr,
    M: tl.constexpr,
    WIDTH: tl.constexpr,
    NIBBLES: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    split = tl.program_id(2)
    chunks = tl.cdiv(groups, GROUPS) * ((M + WIDTH - 1) // WIDTH)
    from_x = x + token.to(tl.int64)[None, :] * (groups * M)
    total = tl.zeros([ROWS, TOKENS], dtype=tl.float32)
    for chunk in range(split * share, tl.minimum((split + 1) * share, chunks)):
        tile = _tile(values, places, row, rows, chunk, groups, N, M, WIDTH, NIBBLES, ROWS, GROUPS)
        column, inside = _columns(chunk, groups, M, WIDTH, GROUPS)
        data = tl.load(from_x + column[:, None], mask=inside[:, None] & (token < tokens)[None, :], other=0.0)
        total = dot(tile, data, total, INTERPRETED)
    if BIASED:
        total += tl.load(bias + row, mask=row < rows, other=0.0)[:, None]
    to = out + (split.to(tl.int64) * tokens + token)[None, :] * rows + row[:, None]
    tl.store(to, total, mask=(row < rows)[:, None] & (token < tokens)[None, :])


@jit
def _input_gradient_kernel(
    dy,  # [tokens, rows]
    values,
    places,
    out,  # [splits, tokens, columns]
    tokens,
    rows,
    groups,
    share,
    N: tl.constexpr,
    M: tl.constexpr,
    WIDTH: tl.constexpr,
    NIBBLES: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    chunk = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    split = tl.program_id(2)
    column, inside = _columns(chunk, groups, M, WIDTH, GROUPS)
    from_dy = dy + token.to(tl.int64)[None, :] * rows
    total = tl.zeros([GROUPS * WIDTH, TOKENS], dtype=tl.float32)
    for step in range(split * share, tl.minimum((split + 1) * share, tl.cdiv(rows, ROWS))):
        row = step * ROWS + tl.arange(0, ROWS)
        tile = _tile(values, places, row, rows, chunk, groups, N, M, WIDTH, NIBBLES, ROWS, GROUPS)
        data = tl.load(from_dy + row[:, None], mask=(row < rows)[:, None] & (token < tokens)[None, :], other=0.0)
        total = dot(tl.trans(tile), data, total, INTERPRETED)
    to = out + (split.to(tl.int64) * tokens + token)[None, :] * (groups * M) + column[:, None]
    tl.store(to, total, mask=inside[:, None] & (token < tokens)[None, :])


@jit
def _weight_gradient_kernel(
    dy,  # [tokens, rows]
    x,  # [tokens, columns]
    values,
    places,
    out,  # as values
    tokens,
    rows,
    groups,
    N: tl.constexpr,
    M: tl.constexpr,
    WIDTH: tl.constexpr,
    NIBBLES: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    chunk = tl.program_id(1)
    column, inside = _columns(chunk, groups, M, WIDTH, GROUPS)
    total = tl.zeros([ROWS, GROUPS * WIDTH], dtype=tl.float32)
    for first in range(0, tokens, TOKENS):
        token = first + tl.arange(0, TOKENS)
        at = token.to(tl.int64)
        live = token < tokens
        left = tl.load(dy + at[None, :] * rows + row[:, None], mask=(row < rows)[:, None] & live[None, :], other=0.0)
        right = tl.load(
            x + at[:, None] * (groups * M) + column[None, :], mask=live[:, None] & inside[None, :], other=0.0
        )
        total = dot(left, right, total, INTERPRETED)

    dense = tl.reshape(total, [ROWS, GROUPS, WIDTH])
    at, live, lane = _slots(row, rows, chunk, groups, N, M, WIDTH, GROUPS)
    piece = chunk % ((M + WIDTH - 1) // WIDTH)
    for slot in range(N):
        _, place = _kept(values, places, at + slot, row, live, NIBBLES)
        taken = tl.sum(tl.where(place[:, :, None] == lane, dense, 0.0), axis=2)
        mine = (place >= 0) & (place // WIDTH == piece)
        tl.store(out + (at + slot) * 16 + (row % 16)[:, None], taken, mask=mine)


@jit
def _tile(
    values,
    places,
    row,
    rows,
    chunk,
    groups,
    N: tl.constexpr,
    M: tl.constexpr,
    WIDTH: tl.constexpr,
    NIBBLES: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """A tile of the weight with its zeros, [ROWS, GROUPS * WIDTH], in the dtype of the values."""
    at, live, lane = _slots(row, rows, chunk, groups, N, M, WIDTH, GROUPS)
    tile = tl.zeros([ROWS, GROUPS, WIDTH], dtype=values.dtype.element_ty)
    if N <= 4:  # in line, so that loads of the next tile can begin early
        for slot in tl.static_range(N):
            value, place = _kept(values, places, at + slot, row, live, NIBBLES)
            tile = tl.where(place[:, :, None] == lane, value[:, :, None], tile)
    else:
        for slot in range(N):
            value, place = _kept(values, places, at + slot, row, live, NIBBLES)
            tile = tl.where(place[:, :, None] == lane, value[:, :, None], tile)
    return tl.reshape(tile, [ROWS, GROUPS * WIDTH])


@jit
def _slots(row, rows, chunk, groups, N: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """Of a tile: its groups' first slots and which there are, [ROWS, GROUPS], and its places [1, 1, WIDTH]."""
    pieces: tl.constexpr = (M + WIDTH - 1) // WIDTH
    group = chunk // pieces * GROUPS + tl.arange(0, GROUPS)
    at = ((row // 16).to(tl.int64)[:, None] * groups + group[None, :]) * N
    live = (row < rows)[:, None] & (group < groups)[None, :]
    lane = chunk % pieces * WIDTH + tl.arange(0, WIDTH)
    return at, live, lane[None, None, :]


@jit
def _kept(values, places, at, row, live, NIBBLES: tl.constexpr):
    """Value and place of slots [ROWS, GROUPS]; the place is -1 where nothing is kept."""
    within = (row % 16)[:, None]
    value = tl.load(values + at * 16 + within, mask=live, other=0.0)
    if NIBBLES:
        place = tl.load(places + at * 8 + within % 8, mask=live, other=0).to(tl.int32)
        place = (place >> (within // 8 * 4)) & 15
    else:
        place = tl.load(places + at * 16 + within, mask=live, other=0).to(tl.int32)
    return value, tl.where(value.to(tl.float32) != 0.0, place, -1)


@jit
def _columns(chunk, groups, M: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """The columns of a tile in the weight, [GROUPS * WIDTH], and which of them there are."""
    pieces: tl.constexpr = (M + WIDTH - 1) // WIDTH
    lane = tl.arange(0, GROUPS * WIDTH)
    if pieces * WIDTH == M:  # none is left out: they are neighbours, which the compiler should see
        column = chunk * (GROUPS * WIDTH) + lane
        inside = column < groups * M
    else:
        group = chunk // pieces * GROUPS + lane // WIDTH
        place = chunk % pieces * WIDTH + lane % WIDTH
        column = group * M + place
        inside = (group < groups) & (place < M)
    return column, inside


@jit
def dot(left, right, total, INTERPRETED: tl.constexpr):
    """total + left right; left may be bfloat16 where right is float32.

    Tensor cores cut sums off instead of rounding them, so that long ones drift (Ootomo and Yokota 2022): tiles are
    added outside, and not by a plain +, which the compiler would move inside.
    """
    part = tl.zeros(total.shape, dtype=tl.float32)
    if left.dtype == right.dtype:
        part = product(left, right, part, INTERPRETED)
    else:
        high = right.to(tl.bfloat16)
        rest = right - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        part = product(left, low, part, INTERPRETED)
        part = product(left, middle, part, INTERPRETED)
        part = product(left, high, part, INTERPRETED)
    return tl.fma(part, 1.0, total)


@jit
def product(left, right, total, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # Triton's interpreter would multiply the bits of bfloat16
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="tf32x3")
