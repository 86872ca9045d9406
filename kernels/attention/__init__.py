"""Attention over chosen tiles of the score matrix, with log-sum-exp; the exact search for the tiles worth choosing.

    q k [L x L] -> tiles of block x block tokens, kept or not

A diffusion transformer attends from every token of a video to every other one, step after step. Most of that weight
lies in few tiles, and they hardly change from step to step (AdaSpa, arXiv 2502.21079). So: measure the weight of every
tile once (`search`), choose (`select_blocks`), attend to the chosen ones (`block_sparse_attention`), and where the
choice has aged measure again with the log-sum-exp of before, at the price of half an attention (`block_scores`).

Tensors are [batch, heads, length, head dim]; keys and values may have fewer heads that query heads share (grouped
queries). float32 and bfloat16 on the CPU, float16 too on CUDA, float64 through the reference. On CPUs with AMX bfloat16
runs in tiles: weights are rounded to bfloat16 before they meet the values, sums are float32; gradients as elsewhere.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from kernels.attention import ops
from kernels.attention.masks import BlockMask
from kernels.attention.select import head_tiers, recall, select_blocks, text_blocks

__all__ = [
    "BLOCK_SIZES",
    "BlockMask",
    "Search",
    "block_scores",
    "block_sparse_attention",
    "head_tiers",
    "recall",
    "search",
    "select_blocks",
    "text_blocks",
]

BLOCK_SIZES = ops.BLOCK_SIZES
HEAD_DIMS = (1, 256)


class Search(NamedTuple):
    """Dense attention and what was learned on the way: `out` [B, H, Lq, D], `lse` float32 [B, H, Lq] (natural log),
    `scores` float32 [B, H, nq, nk], the attention weight in each tile; a row of tiles sums to its number of tokens."""

    out: Tensor
    lse: Tensor
    scores: Tensor


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Tensor | BlockMask,
    *,
    block_size: int = 64,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Tensor | BlockMask,
    *,
    block_size: int = 64,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Tensor | BlockMask,
    *,
    block_size: int = 64,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k) v over the kept tiles; differentiable in query, key and value, through the LSE too.

    Args:
        query: [B, H, Lq, D], D up to 256.
        key, value: [B, G, Lk, D], G a divisor of H.
        block_mask: bool [B or 1, H or 1, ceil(Lq / block), ceil(Lk / block)], True for tiles to attend to; or a
            `BlockMask`, which is quicker if used again. The last row and column of tiles may be cut off.
        block_size: tokens a side of a tile, one of `BLOCK_SIZES`.
        scale: of the scores; 1/sqrt(D) if None.
        key_mask: bool [B, Lk], False for keys that are padding: never attended to, whatever they hold.
        return_lse: whether to return (out, lse) instead of out.

    Returns:
        out [B, H, Lq, D] of the query's dtype; lse float32 [B, H, Lq], the natural logarithm of the sum of
        exp(scale q k) over what is attended to (float64 of float64). A query with nothing to attend to gets 0 and -inf.

    Raises:
        TypeError: for a dtype that is not served, or tensors of different ones.
        ValueError: for shapes that do not fit, a block size that is not served, or a mask of another number of tiles.
        KernelUnavailable: where no backend serves the device.
    """
    _check("block_sparse_attention", query, key, value, block_size, key_mask)
    mask = block_mask if isinstance(block_mask, BlockMask) else BlockMask.of(block_mask)
    _check_mask(mask, query, key, block_size)
    out, lse = ops.attention(query, key, value, mask, block_size, _scale(scale, query), key_mask)
    return (out, lse) if return_lse else out


def search(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: int = 64,
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> Search:
    """Dense attention, its LSE, and the weight of every tile: AdaSpa's fused search.

    The paper takes two passes over the keys, for a tile's weight needs the LSE that is known at the end. On the CPU
    each row keeps its sum in every tile together with the maximum it was taken at, and all are rescaled at the end:
    exact, without the second pass. On CUDA, where that would fill the memory, two are taken. Not differentiable.

    Args:
        query, key, value, block_size, scale, key_mask: as in `block_sparse_attention`.

    Returns:
        A `Search`: out, lse, scores.

    Raises:
        TypeError, ValueError, KernelUnavailable: as `block_sparse_attention` does.
    """
    _check("search", query, key, value, block_size, key_mask)
    with torch.no_grad():
        return Search(*ops.search(query, key, value, block_size, _scale(scale, query), key_mask))


def block_scores(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    block_size: int = 64,
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """The weight of every tile, sums of exp(scale q k - LSE): AdaSpa's search with a cached LSE (equation 11).

    Args:
        query: [B, H, Lq, D]; key: [B, G, Lk, D].
        lse: [B, H, Lq], natural log. That of this query and key gives weights, `search(...).scores`; an older one gives
            what the paper ranks by in later steps. Tokens whose LSE is -inf count nothing.

    Returns:
        float32 [B, H, ceil(Lq / block), ceil(Lk / block)] (float64 of float64). Not differentiable.

    Raises:
        TypeError, KernelUnavailable: as `block_sparse_attention` does.
        ValueError: for shapes that do not fit, the LSE's among them.
    """
    _check("block_scores", query, key, None, block_size, key_mask)
    if lse.shape != query.shape[:3]:
        raise ValueError(
            f"block_scores: got lse {list(lse.shape)}; expected {list(query.shape[:3])}, one a query token"
        )
    with torch.no_grad():
        return ops.block_scores(query, key, lse, block_size, _scale(scale, query), key_mask)


def _scale(scale: float | None, query: Tensor) -> float:
    return query.shape[-1] ** -0.5 if scale is None else float(scale)


def _check(
    name: str, query: Tensor, key: Tensor, value: Tensor | None, block_size: int, key_mask: Tensor | None
) -> None:
    """Raises for what no backend serves."""
    others = {"key": key} if value is None else {"key": key, "value": value}
    if query.ndim != 4:
        raise ValueError(f"{name}: got query {list(query.shape)}; expected [batch, heads, length, head dim]")
    batch, heads, _, dim = query.shape
    for label, tensor in others.items():
        shape = tensor.shape
        if tensor.ndim != 4 or shape[0] != batch or shape[-1] != dim or not shape[1] or heads % shape[1]:
            raise ValueError(
                f"{name}: got query {list(query.shape)} and {label} {list(shape)}; expected {label} [{batch}, a "
                f"divisor of {heads}, length, {dim}]"
            )
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise TypeError(
                f"{name}: got query of {query.dtype} on {query.device} and {label} of {tensor.dtype} on "
                f"{tensor.device}; expected one dtype and device; convert with {label}.to(query)"
            )
    if value is not None and value.shape != key.shape:
        raise ValueError(f"{name}: got key {list(key.shape)} and value {list(value.shape)}; expected the same shape")
    if not HEAD_DIMS[0] <= dim <= HEAD_DIMS[1]:
        raise ValueError(f"{name}: got a head dim of {dim}; expected {HEAD_DIMS[0]} to {HEAD_DIMS[1]}")
    if block_size not in BLOCK_SIZES:
        raise ValueError(
            f"{name}: got block_size {block_size}; expected one of {', '.join(map(str, BLOCK_SIZES))}; coarser tiles "
            "can be written as several of these"
        )
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (batch, key.shape[2])):
        raise ValueError(
            f"{name}: got key_mask {key_mask.dtype} {list(key_mask.shape)}; expected bool {[batch, key.shape[2]]}, "
            "True for the keys that are there"
        )


def _check_mask(mask: BlockMask, query: Tensor, key: Tensor, block_size: int) -> None:
    """Raises ValueError unless the mask has a place for every tile."""
    rows, columns = (-(-length // block_size) for length in (query.shape[2], key.shape[2]))
    batch, heads = query.shape[:2]
    if mask.shape[0] not in (1, batch) or mask.shape[1] not in (1, heads) or mask.shape[2:] != (rows, columns):
        raise ValueError(
            f"block_sparse_attention: got a block mask of {list(mask.shape)}; expected [{batch} or 1, {heads} or 1, "
            f"{rows}, {columns}] for {query.shape[2]} queries and {key.shape[2]} keys in blocks of {block_size}"
        )
    if mask.bits.device != query.device:
        raise ValueError(
            f"block_sparse_attention: got a block mask on {mask.bits.device} and a query on {query.device}; move it "
            "with block_mask.to(query.device)"
        )
