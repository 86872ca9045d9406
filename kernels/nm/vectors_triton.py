"""Products on the GPU of weights whose rows share their places, in vectors: for many tokens, on the tensor cores.

A program owns rows of one vector. The inputs that they keep are gathered from x, turned over before so that each is one
piece of memory, and meet the kept values as in a dense product: n/m of the arithmetic. What is gathered is used
`vector` times, so small vectors wait for memory: 64 rows and more are for compute, 16 and 32 for high sparsity.

NM-SpMM (Ma et al. 2025) and nmSPARSE (Lin et al. 2023) describe the format, and kernels for it on float32 units. For
which Triton this is and where it is checked, see `triton.py`. Sizes of tiles are reasoned, not yet tuned on a GPU.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.nm.triton import INTERPRETED, added_up, dot, jit, on, partial_sums, product, shares

with contextlib.suppress(ModuleNotFoundError):  # see triton.py
    import triton
    import triton.language as tl

__all__ = ["linear"]

MOST_ROWS = 128  # of a vector that a program owns
MOST_TOKENS = 128  # that it meets at once
ALIGNED = 16  # a gathered column begins at a multiple of so many tokens, so that it is read in whole pieces


def linear(x: Tensor, values: Tensor, places: Tensor, m: int, vector: int, bias: Tensor | None) -> Tensor:
    """y [T, O] of x [T, K], both float32 or (with bfloat16 values) bfloat16; bias [O] float32. All contiguous.

    values [O, K/m, n] float32 or bfloat16 and places [ceil(O/vector), K/m, n] as in `NMTensor`; any m up to 256.
    """
    tokens, (rows, groups, n) = len(x), values.shape
    out = x.new_empty(tokens, rows)
    if not out.numel():
        return out
    inputs = F.pad(x, (0, 0, 0, -tokens % ALIGNED)).mT.contiguous()
    tile = tile_of(vector, tokens, x.dtype == values.dtype == torch.bfloat16)
    across, along = triton.cdiv(rows, tile["ROWS"]), triton.cdiv(tokens, tile["TOKENS"])
    share, splits = shares(triton.cdiv(groups * n, tile["SLOTS"]), across * along)
    partial, biased = partial_sums(out, splits), splits == 1 and bias is not None
    with on(x.device):
        _kernel[(across, along, splits)](
            inputs,
            values,
            places,
            bias if biased else out,
            partial,
            tokens,
            inputs.shape[1],
            rows,
            groups * n,
            share * tile["SLOTS"],
            N=n,
            M=m,
            BIASED=biased,
            INTERPRETED=INTERPRETED,
            **tile,
        )
    return added_up(partial, bias, out)


def tile_of(vector: int, tokens: int, narrow: bool) -> dict[str, int]:
    """The constants of a program's tile; `narrow` where x and values are bfloat16, of which more fit."""
    return {
        "VECTOR": vector,
        "ROWS": min(vector, MOST_ROWS),
        "TOKENS": min(max(16, triton.next_power_of_2(tokens)), MOST_TOKENS),
        "SLOTS": 64 if narrow else 32,
        "num_warps": 8 if vector >= MOST_ROWS else 4,
        "num_stages": 3,
    }


@jit
def _kernel(
    inputs,  # [columns, padded]: x turned over, with zeros behind its tokens
    values,  # [rows, slots]
    places,  # [vectors, slots]
    bias,
    out,  # [splits, tokens, rows]
    tokens,
    padded,
    rows,
    slots,
    share,
    N: tl.constexpr,
    M: tl.constexpr,
    BIASED: tl.constexpr,
    INTERPRETED: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    first_row = tl.program_id(0) * ROWS
    row = first_row + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    split = tl.program_id(2)
    from_places = places + (first_row // VECTOR).to(tl.int64) * slots
    from_values = values + row.to(tl.int64)[:, None] * slots
    total = tl.zeros([ROWS, TOKENS], dtype=tl.float32)
    for first in range(split * share, tl.minimum((split + 1) * share, slots), SLOTS):
        slot = first + tl.arange(0, SLOTS)
        live = slot < slots
        column = slot // N * M + tl.load(from_places + slot, mask=live, other=0).to(tl.int32)
        tile = tl.load(from_values + slot[None, :], mask=(row < rows)[:, None] & live[None, :], other=0.0)
        gathered = inputs + column.to(tl.int64)[:, None] * padded + token[None, :]
        data = tl.load(gathered, mask=live[:, None] & (token < padded)[None, :], other=0.0)
        if inputs.dtype.element_ty == tl.bfloat16:  # as is the result, which does not show what `dot` would save
            total = product(tile, data, total, INTERPRETED)
        else:
            total = dot(tile, data, total, INTERPRETED)
    if BIASED:
        total += tl.load(bias + row, mask=row < rows, other=0.0)[:, None]
    to = out + (split.to(tl.int64) * tokens + token)[None, :] * rows + row[:, None]
    tl.store(to, total, mask=(row < rows)[:, None] & (token < tokens)[None, :])
