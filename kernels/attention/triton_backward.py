"""Gradients of attention over chosen tiles on the GPU, in Triton: what `triton.py` says holds here too.

With P the weights, dO and dLSE the gradients of the output and the LSE, and shift = sum(dO O) - dLSE of each query,

    dV = P' dO,   dS = P (dO V' - shift),   dQ = scale dS K,   dK = scale dS' Q.

One kernel owns queries and makes dQ along the lists of key blocks; the other owns keys and makes dK and dV along the
transposed lists, over all the query heads that share them. So nothing is added to by two programs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention.masks import Lists
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

__all__ = ["gradients"]


def gradients(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lists: Lists,
    sizes: tuple[int, int],
    block: int,
    scale: float,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of q, k and v, contiguous and of their dtypes, from those of the output and the LSE."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    batch, heads, q_length, _ = q.shape
    key_heads, k_length = k.shape[1:3]
    if not lse.numel() or not k.numel():
        return dq.zero_(), dk.zero_(), dv.zero_()
    shift = (d_out.float() * out.float()).sum(-1) - d_lse
    q, k, v, d_out = (rows_apart(x) for x in (q, k, v, d_out.to(q.dtype)))
    rows, columns = triton.cdiv(q_length, block), triton.cdiv(k_length, block)
    turned = transposed(lists, rows, columns)
    size, options = _sizes(q, block)
    common = (q, k, v, d_out, lse.contiguous(), shift, flags(key_mask, q))
    numbers = (
        *strides(q, k, v, d_out), heads, heads // key_heads, q_length, k_length, *list_strides(sizes), scale * LOG2_E,
        scale,
    )  # fmt: skip
    constants = constants_of(q, k, block, key_mask) | {"BLOCK": block, "SIZE": size, **options}
    with on(q.device):
        order, tiles = heads_in_order(lists, sizes, batch, heads, rows), triton.cdiv(q_length, size)
        _queries_kernel[(tiles * batch * heads,)](*common, dq, order, *lists, tiles, rows, *numbers, **constants)
        tiles = triton.cdiv(k_length, size)
        _keys_kernel[(tiles * batch * key_heads,)](*common, dk, dv, *turned, tiles, columns, *numbers, **constants)
    return dq, dk, dv


def transposed(lists: Lists, rows: int, columns: int) -> Lists:
    """For each column of tiles the rows that keep it, int32 and ascending: the lists of a mask of `rows` x `columns` a
    head, turned round, without waiting for the GPU."""
    starts, kept = lists
    count = starts.numel() - 1
    row = torch.arange(count, device=starts.device).repeat_interleave(starts.diff(), output_size=kept.numel())
    column = row // rows * columns + kept.long()
    column, order = column.sort(stable=True)
    bounds = torch.arange(count // rows * columns + 1, device=starts.device)
    return Lists(torch.searchsorted(column, bounds).to(torch.int32), (row % rows)[order].to(torch.int32))


def _sizes(q: Tensor, block: int) -> tuple[int, dict[str, int]]:
    """Queries, and keys, of a step, and Triton's options: what fits into shared memory and registers."""
    width = max(16, triton.next_power_of_2(q.shape[-1]))
    if q.dtype == torch.float32:
        return min(block, 32 if width <= 64 else 16), {"num_warps": 4, "num_stages": 1}
    return min(block, 64 if width <= 128 else 32), {"num_warps": 8 if width == 128 else 4, "num_stages": 2}


@jit
def _queries_kernel(
    q, k, v, d_out, lse, shift, key_mask, dq, order, starts, columns, tiles, lists, q_batch, q_head, q_row, k_batch,
    k_head, k_row, v_batch, v_head, v_row, d_batch, d_head, d_row, heads, sharing, q_length, k_length, list_batch,
    list_head, scale, slope, BLOCK: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    WHOLE: tl.constexpr, MASKED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % tiles
    both = tl.load(order + tl.program_id(0) // tiles).to(tl.int64)
    batch, head = both // heads, both % heads
    at_list = (batch * list_batch + head * list_head) * lists + tile // (BLOCK // SIZE)
    first = tl.load(starts + at_list)
    count = tl.load(starts + at_list + 1) - first
    row = tile * SIZE + tl.arange(0, SIZE)
    there = row < q_length
    own = load_rows(q + batch * q_batch + head * q_head, tile * SIZE, q_row, there, SIZE, DIM, WIDTH, False)
    d_own = load_rows(d_out + batch * d_batch + head * d_head, tile * SIZE, d_row, there, SIZE, DIM, WIDTH, False)
    log = tl.load(lse + both * q_length + row, mask=there, other=float("-inf")) * 1.4426950408889634
    attends = log != float("-inf")
    log = tl.where(attends, log, 0.0)
    less = tl.load(shift + both * q_length + row, mask=there, other=0.0)
    from_k = k + batch * k_batch + head // sharing * k_head
    from_v = v + batch * v_batch + head // sharing * v_head
    total = tl.zeros([SIZE, WIDTH], dtype=tl.float32)
    for step in range(0, count * (BLOCK // SIZE)):
        key = tl.load(columns + first + step // (BLOCK // SIZE)).to(tl.int32) * BLOCK + step % (BLOCK // SIZE) * SIZE
        live = live_keys(key_mask + batch * k_length, key, k_length, SIZE, MASKED)
        keys = load_rows(from_k, key, k_row, live, SIZE, DIM, WIDTH, WHOLE)
        values = load_rows(from_v, key, v_row, live, SIZE, DIM, WIDTH, WHOLE)
        nothing = tl.zeros([SIZE, SIZE], dtype=tl.float32)
        weight = tl.exp2(dot(own, tl.trans(keys), nothing, INTERPRETED) * scale - log[:, None])
        d_weight = dot(d_own, tl.trans(values), nothing, INTERPRETED)
        meets = attends[:, None] if WHOLE else attends[:, None] & live[None, :]
        d_score = tl.where(meets, weight * (d_weight - less[:, None]), 0.0)
        total = dot(d_score.to(keys.dtype), keys, total, INTERPRETED)
    store_rows(dq + both * q_length * DIM, total * slope, tile * SIZE, DIM, there, SIZE, DIM, WIDTH)


@jit
def _keys_kernel(
    q, k, v, d_out, lse, shift, key_mask, dk, dv, starts, rows, tiles, lists, q_batch, q_head, q_row, k_batch,
    k_head, k_row, v_batch, v_head, v_row, d_batch, d_head, d_row, heads, sharing, q_length, k_length, list_batch,
    list_head, scale, slope, BLOCK: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    WHOLE: tl.constexpr, MASKED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % tiles
    both = (tl.program_id(0) // tiles).to(tl.int64)
    key_heads = heads // sharing
    batch, key_head = both // key_heads, both % key_heads
    key = tile * SIZE
    there = key + tl.arange(0, SIZE) < k_length
    live = live_keys(key_mask + batch * k_length, key, k_length, SIZE, MASKED)
    keys = load_rows(k + batch * k_batch + key_head * k_head, key, k_row, live, SIZE, DIM, WIDTH, False)
    values = load_rows(v + batch * v_batch + key_head * v_head, key, v_row, live, SIZE, DIM, WIDTH, False)
    d_keys = tl.zeros([SIZE, WIDTH], dtype=tl.float32)
    d_values = tl.zeros([SIZE, WIDTH], dtype=tl.float32)
    for member in range(0, sharing):
        head = key_head * sharing + member
        at_list = (batch * list_batch + head * list_head) * lists + tile // (BLOCK // SIZE)
        first = tl.load(starts + at_list)
        count = tl.load(starts + at_list + 1) - first
        from_q = q + batch * q_batch + head * q_head
        from_d = d_out + batch * d_batch + head * d_head
        from_row = (batch * heads + head) * q_length
        for step in range(0, count * (BLOCK // SIZE)):
            row = tl.load(rows + first + step // (BLOCK // SIZE)) * BLOCK + step % (BLOCK // SIZE) * SIZE
            at = row + tl.arange(0, SIZE)
            query = load_rows(from_q, row, q_row, at < q_length, SIZE, DIM, WIDTH, False)
            d_own = load_rows(from_d, row, d_row, at < q_length, SIZE, DIM, WIDTH, False)
            log = tl.load(lse + from_row + at, mask=at < q_length, other=float("-inf")) * 1.4426950408889634
            less = tl.load(shift + from_row + at, mask=at < q_length, other=0.0)
            meets = (log != float("-inf"))[None, :] & live[:, None]
            nothing = tl.zeros([SIZE, SIZE], dtype=tl.float32)
            power = dot(keys, tl.trans(query), nothing, INTERPRETED) * scale - log[None, :]
            weight = tl.where(meets, tl.exp2(power), 0.0)
            d_weight = dot(values, tl.trans(d_own), nothing, INTERPRETED)
            d_score = tl.where(meets, weight * (d_weight - less[None, :]), 0.0)
            d_values = dot(weight.to(d_own.dtype), d_own, d_values, INTERPRETED)
            d_keys = dot(d_score.to(query.dtype), query, d_keys, INTERPRETED)
    offset = both * k_length * DIM
    store_rows(dk + offset, d_keys * slope, key, DIM, there, SIZE, DIM, WIDTH)
    store_rows(dv + offset, d_values, key, DIM, there, SIZE, DIM, WIDTH)
