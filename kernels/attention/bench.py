"""What `kernels.bench` times for attention: one head of 16,384 tokens, tiles of 64, against torch's dense attention.

Torch's attention reads and multiplies all tiles: at a density of 0.2 a ratio of 5 would be proportional to the work.
FlexAttention, compiled, is what else skips tiles on a CPU; it gives no log-sum-exp there. `scores` is the search pass
with a known log-sum-exp, `search` dense attention that finds the tiles' weights on its way. Masks are random, with as
many tiles in every row, as after a choice by rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import attention
from kernels.attention import reference
from kernels.bench import CORES, Case, Contender, other_isas, with_isa

PEERS: tuple[str, ...] = ()
BLOCK = 64
TOKENS = 16_384
DENSITIES = (1.0, 0.2, 0.1)
PIECE = 16  # query blocks at a time of the float64 result


def cases(quick: bool) -> Iterator[Case]:
    """Attention by dtype, head dim, density and threads, then the searches; with `quick` a small head."""
    tokens = 256 if quick else TOKENS
    for dtype in (torch.float32, torch.bfloat16):
        for dim in (64, 128):
            for density in DENSITIES[1:2] if quick else DENSITIES:
                yield _attention(tokens, dim, density, dtype, 1)
            if CORES > 1:
                yield _attention(tokens, dim, 0.2, dtype, 2)
            yield _search(tokens, dim, dtype)
        _flex.cache_clear()


def _head(tokens: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, tokens, dim, generator=draw).to(dtype) for _ in range(3))
    return q, k, v


def _attention(tokens: int, dim: int, density: float, dtype: torch.dtype, threads: int) -> Case:
    inputs, blocks = _head(tokens, dim, dtype), tokens // BLOCK
    order = torch.rand(1, 1, blocks, blocks, generator=torch.Generator().manual_seed(1)).argsort(-1)
    dense = order < round(density * blocks)
    mask = attention.BlockMask.of(dense)
    mask.lists()
    run = partial(attention.block_sparse_attention, *inputs, mask)
    contenders = [
        Contender("torch SDPA", partial(F.scaled_dot_product_attention, *inputs), threads=threads, note="dense"),
        Contender("ours", run, _same, threads, ours=True),
    ]
    if threads == 1 and density < 1:
        contenders += [Contender(f"ours {isa}", partial(with_isa, isa, run), _same, ours=True) for isa in other_isas()]
    if tokens == TOKENS:  # compiling takes longer than anything else with --quick
        contenders.append(Contender("FlexAttention", _flex_run(inputs, dense), _same, threads, note="compiled"))
    return Case(
        name=f"{tokens} x {dim} {_short(dtype)}, density {density:g}" + (", 2 threads" if threads == 2 else ""),
        call="attention",
        contenders=contenders,
        baseline="torch SDPA",
        exact=partial(_exact, inputs, dense),
        data_bytes=4 * inputs[0].nbytes,
        work=4 * dim * BLOCK * BLOCK * int(dense.sum()),
    )


def _search(tokens: int, dim: int, dtype: torch.dtype) -> Case:
    inputs = _head(tokens, dim, dtype)
    q, k = inputs[:2]
    lse = attention.search(*inputs).lse
    contenders = [
        Contender("torch SDPA", partial(F.scaled_dot_product_attention, *inputs), note="dense, no scores"),
        Contender("ours scores", partial(attention.block_scores, q, k, lse), _same, ours=True),
        Contender("ours search", partial(attention.search, *inputs), lambda found: found.scores, ours=True),
    ]
    return Case(
        name=f"{tokens} x {dim} {_short(dtype)}, all tiles",
        call="search",
        contenders=contenders,
        baseline="torch SDPA",
        exact=partial(_exact_scores, q, k),
        data_bytes=3 * q.nbytes,
        work=2 * dim * tokens * tokens,
    )


def _exact(inputs: tuple[Tensor, Tensor, Tensor], dense: Tensor) -> Tensor:
    q, k, v = (x.double() for x in inputs)
    found = []
    for rows, tiles in zip(q.split(PIECE * BLOCK, 2), dense.split(PIECE, 2), strict=True):
        keep = reference.token_mask(tiles, None, (rows.shape[2], k.shape[2]), BLOCK)
        found.append(reference.block_sparse_attention(rows, k, v, keep, q.shape[-1] ** -0.5)[0])
    return torch.cat(found, 2)


def _exact_scores(q: Tensor, k: Tensor) -> Tensor:
    keys, scale, found = k.double(), q.shape[-1] ** -0.5, []
    for rows in q.double().split(PIECE * BLOCK, 2):
        lse = reference.logits(rows, keys, scale).logsumexp(-1)
        found.append(reference.block_scores(rows, keys, lse, None, scale, BLOCK))
    return torch.cat(found, 2)


@cache
def _flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex_run(inputs: tuple[Tensor, Tensor, Tensor], dense: Tensor) -> Callable[[], Tensor]:
    """Kept tiles as full blocks: as partial ones with a function of the mask it is slower by far."""
    from torch.nn.attention.flex_attention import BlockMask

    count = dense.sum(-1, dtype=torch.int32)
    columns = torch.sort(dense.to(torch.int8), dim=-1, descending=True, stable=True).indices.to(torch.int32)
    none = torch.zeros_like(count), torch.zeros_like(columns)  # the compiler fails on one tensor given twice
    mask = BlockMask.from_kv_blocks(*none, count, columns, BLOCK_SIZE=BLOCK)
    return lambda: _flex()(*inputs, block_mask=mask)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _same(out: Tensor) -> Tensor:
    return out
