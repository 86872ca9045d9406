"""Attention over chosen tiles on the GPU, in Triton: float32 sums, no atomics, the same bits again.

A program owns the queries of a tile, and walks along the list of the key blocks they attend to (FlashAttention's
running maximum and sum, arXiv 2205.14135). Heads with the longest lists start first. With blocks of 64 a program that
owns 64 queries waits for memory more than it computes; where two rows of tiles keep nearly the same blocks, one program
takes both, walks along the union of their lists, and a bit a half says which half skips a block. Which rows are paired
is found on the GPU, so that nothing waits for it.

`search` takes two passes, as AdaSpa does (arXiv 2502.21079): attention, then a pass over queries and keys. One pass, as
on the CPU, would have to keep a sum and a maximum of each query in each block, and rescale them at the end: 43 GB for
24 heads of 119,056 tokens, written and read for what half an attention computes again.

A NaN in a query stays in its row. One in the values of a kept block also reaches the rows paired with those that keep
it, as 0 * NaN.

Written for Triton 3.6 and later, CUDA; checked there by `make gpu-check`, and on the CPU in Triton's interpreter
(TRITON_INTERPRET=1) by the tests. Sizes of tiles are reasoned, and not yet tuned on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.attention.masks import Lists
from kernels.attention.triton_backward import gradients
from kernels.attention.triton_common import (
    LOG2_E,
    constants_of,
    dot,
    flags,
    heads_in_order,
    jit,
    list_strides,
    live_keys,
    load_rows,
    on,
    rows_apart,
    store_rows,
    strides,
)

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # as in `triton_common`
    pass

__all__ = ["attention", "block_scores", "gradients", "search"]

PAIRED_BLOCK = 64  # size of blocks of which two rows may share a program
LEAST_PAIRED = 64  # rows of tiles: below, finding pairs takes longer than it saves
DENSE_KEYS = 64  # keys at once where all blocks are kept


class _Walk(NamedTuple):
    """What programs walk along: of each list its first place and length in `columns`; a length below zero says that
    other programs see to these queries. A column's bits above the lowest 16 say which halves of a pair keep it."""

    firsts: Tensor
    counts: Tensor
    columns: Tensor
    span: int  # queries that share a list


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Lists,
    sizes: tuple[int, int],
    block: int,
    scale: float,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and LSE of q [B, H, Lq, D] with k and v [B, G, Lk, D] over the tiles of a mask whose `lists` serve `sizes`
    (batch entries or 1, heads or 1); float32, float16 or bfloat16, D up to 256."""
    out, lse = _empty(q)
    if not lse.numel():
        return out, lse
    rows = triton.cdiv(q.shape[2], block)
    order = heads_in_order(lists, sizes, q.shape[0], q.shape[1], rows)
    single = _Walk(lists.starts, lists.starts.diff(), lists.columns, block)
    walks = [single]
    if block == PAIRED_BLOCK and rows >= LEAST_PAIRED and q.dtype != torch.float32 and q.shape[-1] <= 128:
        walks = _paired(lists, sizes[0] * sizes[1], rows, triton.cdiv(k.shape[2], block))
    for walk in walks:
        _attend(q, k, v, out, lse, order, walk, list_strides(sizes), block, scale, key_mask)
    return out, lse


def search(
    q: Tensor, k: Tensor, v: Tensor, block: int, scale: float, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense attention, LSE, and scores [B, H, nq, nk] as in `block_scores`."""
    out, lse = _empty(q)
    if lse.numel():
        order = torch.arange(q.shape[0] * q.shape[1], dtype=torch.int32, device=q.device)
        _attend(q, k, v, out, lse, order, None, (0, 0), DENSE_KEYS, scale, key_mask)
    return out, lse, block_scores(q, k, lse, block, scale, key_mask)


def block_scores(q: Tensor, k: Tensor, lse: Tensor, block: int, scale: float, key_mask: Tensor | None) -> Tensor:
    """float32 [B, H, nq, nk], the sums of exp(scale q k - LSE) over each tile. A summand is at most 2^112, so that no
    LSE, however old, makes the sum of a tile infinite."""
    batch, heads, length, _ = q.shape
    size, keys, options = _score_sizes(q)
    # a program leaves sums of tiles, or of pieces of tiles
    height, width = min(block, size), min(block, keys)
    rows, columns = (triton.cdiv(n, block) for n in (length, k.shape[2]))
    parts = q.new_empty(batch, heads, rows * (block // height), columns * (block // width), dtype=torch.float32)
    if parts.numel():
        q, k = rows_apart(q), rows_apart(k)
        tiles = triton.cdiv(length, size) if height == block else parts.shape[2]
        with on(q.device):
            _scores_kernel[(tiles * batch * heads,)](
                q, k, lse.contiguous(), parts, flags(key_mask, q), *strides(q, k), heads, heads // k.shape[1], length,
                k.shape[2], tiles, parts.shape[2], parts.shape[3], scale * LOG2_E, ROWS=size, KEYS=keys, HEIGHT=height,
                SHARE=width, **options, **constants_of(q, k, max(keys, block), key_mask),
            )  # fmt: skip
    if parts.shape[2:] == (rows, columns):
        return parts
    return parts.unflatten(3, (columns, -1)).sum(4).unflatten(2, (rows, -1)).sum(3)


def _empty(q: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3], dtype=torch.float32)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, order: Tensor, walk: _Walk | None,
    steps: tuple[int, int], block: int, scale: float, key_mask: Tensor | None,
) -> None:  # fmt: skip
    """The attention of the queries that the walk sees to; of all, to all keys, without one."""
    q, k, v = rows_apart(q), rows_apart(k), rows_apart(v)
    batch, heads, length, _ = q.shape
    span = 128 if walk is None else walk.span
    rows, keys, options = _sizes(q, span, block)
    tiles = triton.cdiv(length, rows)
    lists = (order, order, order) if walk is None else walk[:3]
    with on(q.device):
        _attention_kernel[(tiles * batch * heads,)](
            q, k, v, out, lse, flags(key_mask, q), order, *lists, *strides(q, k, v), heads, heads // k.shape[1],
            length, k.shape[2], tiles, triton.cdiv(length, span), *steps, scale * LOG2_E, BLOCK=block, SPAN=span,
            ROWS=rows, KEYS=keys, DENSE=walk is None, **options, **constants_of(q, k, block, key_mask),
        )  # fmt: skip


def _sizes(q: Tensor, span: int, block: int) -> tuple[int, int, dict[str, int]]:
    """Queries of a program, keys it takes at once, and Triton's options: what fits into shared memory and registers."""
    width = max(16, triton.next_power_of_2(q.shape[-1]))
    if q.dtype == torch.float32:
        return (
            min(span, 32),
            min(block, 32 if width <= 128 else 16),
            {"num_warps": 4 if width <= 64 else 8, "num_stages": 1},
        )
    rows, keys = min(span, 128 if width <= 128 else 64), min(block, 64 if width <= 128 else 32)
    return rows, keys, {"num_warps": 8 if rows * width > 8192 else 4, "num_stages": 3 if width <= 64 else 2}


def _score_sizes(q: Tensor) -> tuple[int, int, dict[str, int]]:
    """The same for a pass over queries and keys alone."""
    width = max(16, triton.next_power_of_2(q.shape[-1]))
    if q.dtype == torch.float32:
        return 64 if width <= 64 else 32, 32, {"num_warps": 4, "num_stages": 1 if width > 128 else 2}
    return 128 if width <= 128 else 64, 64, {"num_warps": 8 if width == 128 else 4, "num_stages": 2}


def _paired(lists: Lists, heads: int, rows: int, key_blocks: int) -> list[_Walk]:
    """The walks of pairs of rows of tiles, and of the rows that go alone; `rows` of each of the mask's `heads`."""
    starts, columns = lists
    pairs = triton.cdiv(rows, 2)
    firsts, counts = (starts.new_empty(heads * pairs) for _ in range(2))
    alone = starts.new_empty(heads * rows)
    union = torch.empty_like(columns, dtype=torch.int32)
    with on(starts.device):
        _pairs_kernel[(heads * pairs,)](
            starts, columns, firsts, counts, alone, union, rows, pairs, key_blocks, STEPS=key_blocks.bit_length(),
            SIZE=512,
        )  # fmt: skip
    return [_Walk(firsts, counts, union, 2 * PAIRED_BLOCK), _Walk(starts, alone, columns, PAIRED_BLOCK)]


@jit
def _attention_kernel(
    q, k, v, out, lse, key_mask, order, firsts, counts, columns, q_batch, q_head, q_row, k_batch, k_head, k_row,
    v_batch, v_head, v_row, heads, sharing, q_length, k_length, tiles, lists, list_batch, list_head, scale,
    BLOCK: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DENSE: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr, MASKED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % tiles
    both = tl.load(order + tl.program_id(0) // tiles)
    batch, head = (both // heads).to(tl.int64), (both % heads).to(tl.int64)
    if DENSE:
        list_first = 0
        count = tl.cdiv(k_length, BLOCK)
    else:
        at_list = (batch * list_batch + head * list_head) * lists + tile // (SPAN // ROWS)
        list_first = tl.load(firsts + at_list)
        count = tl.load(counts + at_list)
    if count >= 0:
        row = tile * ROWS + tl.arange(0, ROWS)
        own = load_rows(
            q + batch * q_batch + head * q_head, tile * ROWS, q_row, row < q_length, ROWS, DIM, WIDTH, False
        )
        from_k = k + batch * k_batch + head // sharing * k_head
        from_v = v + batch * v_batch + head // sharing * v_head
        top = tl.full([ROWS], float("-inf"), dtype=tl.float32)  # of the scores so far, in powers of two
        total = tl.zeros([ROWS], dtype=tl.float32)
        mean = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
        for step in range(0, count * (BLOCK // KEYS)):
            if DENSE:
                key = step * KEYS
            else:
                entry = tl.load(columns + list_first + step // (BLOCK // KEYS)).to(tl.int32)
                key = (entry & 0xFFFF) * BLOCK + step % (BLOCK // KEYS) * KEYS
            live = live_keys(key_mask + batch * k_length, key, k_length, KEYS, MASKED)
            keys = load_rows(from_k, key, k_row, live, KEYS, DIM, WIDTH, WHOLE)
            values = load_rows(from_v, key, v_row, live, KEYS, DIM, WIDTH, WHOLE)
            score = dot(own, tl.trans(keys), tl.zeros([ROWS, KEYS], dtype=tl.float32), INTERPRETED) * scale
            if not WHOLE:
                score = tl.where(live[None, :], score, float("-inf"))
            if SPAN > BLOCK and not DENSE:  # a pair
                keeps = (entry >> (16 + tl.arange(0, ROWS) // BLOCK)) & 1
                score = tl.where(keeps[:, None] != 0, score, float("-inf"))
            higher = tl.maximum(top, tl.max(score, axis=1))
            base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing to attend to so far
            weight = tl.exp2(score - base[:, None])
            shrink = tl.exp2(top - base)
            total = total * shrink + tl.sum(weight, axis=1)
            mean = dot(weight.to(values.dtype), values, mean * shrink[:, None], INTERPRETED)
            top = higher
        head_of_out = batch * heads + head
        nothing = total == 0.0
        total = tl.where(nothing, 1.0, total)
        mean = mean / total[:, None]
        to = out + head_of_out * q_length * DIM
        store_rows(to, mean, tile * ROWS, DIM, row < q_length, ROWS, DIM, WIDTH)
        log = tl.where(nothing, float("-inf"), (top + tl.log2(total)) * 0.6931471805599453)
        tl.store(lse + head_of_out * q_length + row, log, mask=row < q_length)


@jit
def _scores_kernel(
    q, k, lse, out, key_mask, q_batch, q_head, q_row, k_batch, k_head, k_row, heads, sharing, q_length, k_length,
    tiles, out_rows, out_columns, scale, ROWS: tl.constexpr, KEYS: tl.constexpr, HEIGHT: tl.constexpr,
    SHARE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr, MASKED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % tiles
    both = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = both // heads, both % heads
    row = tile * ROWS + tl.arange(0, ROWS)
    own = load_rows(q + batch * q_batch + head * q_head, tile * ROWS, q_row, row < q_length, ROWS, DIM, WIDTH, False)
    before = tl.load(lse + both * q_length + row, mask=row < q_length, other=float("-inf")) * 1.4426950408889634
    counts = before != float("-inf")
    before = tl.where(counts, before, 0.0)
    from_k = k + batch * k_batch + head // sharing * k_head
    at_row = tile * (ROWS // HEIGHT) + tl.arange(0, ROWS // HEIGHT)
    to = out + (both * out_rows + at_row)[:, None] * out_columns
    for step in range(0, tl.cdiv(out_columns * SHARE, KEYS)):
        key = step * KEYS
        live = live_keys(key_mask + batch * k_length, key, k_length, KEYS, MASKED)
        keys = load_rows(from_k, key, k_row, live, KEYS, DIM, WIDTH, WHOLE)
        score = dot(own, tl.trans(keys), tl.zeros([ROWS, KEYS], dtype=tl.float32), INTERPRETED) * scale
        power = score - before[:, None]
        weight = tl.exp2(tl.where(power > 112.0, 112.0, power))  # not `minimum`, which would drop a NaN
        weight = tl.where(counts[:, None], weight, 0.0)
        if not WHOLE:
            weight = tl.where(live[None, :], weight, 0.0)
        weight = tl.reshape(weight, [ROWS // HEIGHT, HEIGHT, KEYS // SHARE, SHARE])
        sums = tl.sum(tl.sum(weight, axis=3), axis=1)
        column = step * (KEYS // SHARE) + tl.arange(0, KEYS // SHARE)
        tl.store(to + column[None, :], sums, mask=(at_row < out_rows)[:, None] & (column < out_columns)[None, :])


@jit
def _pairs_kernel(
    starts, columns, firsts, counts, alone, union, rows, pairs, key_blocks, STEPS: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """Of two rows of tiles the union of their lists, and whether it is short enough to walk along it together."""
    pair = tl.program_id(0)
    upper = pair // pairs * rows + pair % pairs * 2
    paired = pair % pairs * 2 + 1 < rows
    first = tl.load(starts + upper)
    middle = tl.load(starts + upper + 1)
    last = tl.load(starts + upper + 2, mask=paired, other=0)
    last = tl.where(paired, last, middle)
    found = 0
    for low in range(0, key_blocks, SIZE):
        column = low + tl.arange(0, SIZE)
        halves = _holds(columns, first, middle, column, STEPS) + _holds(columns, middle, last, column, STEPS) * 2
        held = (halves > 0) & (column < key_blocks)
        place = found + tl.cumsum(held.to(tl.int32), 0) - 1
        tl.store(union + first + place, column + (halves << 16), mask=held)
        found += tl.sum(held.to(tl.int32))
    # twice the arithmetic for each block of the union, and half the reading for those that both keep
    together = paired & (found * 4 <= (last - first) * 3)
    tl.store(firsts + pair, first)
    tl.store(counts + pair, tl.where(together, found, -1))
    tl.store(alone + upper, tl.where(together, -1, middle - first))
    tl.store(alone + upper + 1, tl.where(together, -1, last - middle), mask=paired)


@jit
def _holds(columns, first, last, column, STEPS: tl.constexpr):
    """1 where `column` is among columns[first : last], which ascend, else 0: a bisection for each."""
    low = tl.zeros(column.shape, dtype=tl.int32) + first
    high = tl.zeros(column.shape, dtype=tl.int32) + last
    for _ in range(STEPS):
        middle = (low + high) // 2
        less = tl.load(columns + middle, mask=low < high, other=0).to(tl.int32) < column
        less = less & (low < high)
        high = tl.where(less, high, middle)
        low = tl.where(less, middle + 1, low)
    inside = low < last
    return ((tl.load(columns + low, mask=inside, other=0).to(tl.int32) == column) & inside).to(tl.int32)
