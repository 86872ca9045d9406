"""AdaSpa in plain torch, as the paper tells it (Xia et al., ICCV 2025, arXiv 2502.21079).

One attention of one layer, over text and video in one sequence: query, key, value [B, H, L, D]. Everything is spelled
out on whole L x L matrices, to be read. What runs in the experiments is `common.attention.AdaSpa` on
`kernels.attention`, which never makes such a matrix; the tests hold one against the other.

    steps 1 .. t1-1   dense
    step  t1          dense; keeps the row LSE and the tiles            (fused search, Algorithm 1)
    between           the kept tiles alone
    steps t2, t3 ..   tiles sought again with the LSE of t1             (LSE-cached search, Algorithm 2)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Memory", "attend", "dense_attention", "kept_by_head", "recall", "select", "sparse_attention", "text_tiles",
    "tile_weights",
]  # fmt: skip


@dataclass
class Memory:
    """What a layer carries from step to step: LSE [B, H, L] of the first search, and tiles bool [B, H, n, n]."""

    lse: Tensor | None = None
    tiles: Tensor | None = None


def attend(
    memory: Memory,
    step: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    search_steps: Sequence[int] = (10, 30),
    keep_ratio: float = 0.2,
    block: int = 64,
    text: Iterable[int] = (),
    threshold: float = 0.8,
    head_adaptive: bool = True,
    cached_lse: bool = True,
) -> Tensor:
    """The output [B, H, L, D] at a denoising step, counted from 1; `memory` is brought up to date.

    Args:
        search_steps: T_s, ascending.
        keep_ratio: 1 - s, with s the paper's sparsity.
        block: tokens a side of a tile.
        text: places of text tokens.
        threshold: recall above which a head counts as easy.
        head_adaptive, cached_lse: the paper's two ablations.
    """
    if step < search_steps[0]:
        return dense_attention(query, key, value)[0]
    again = step in search_steps[1:]
    if step == search_steps[0] or (again and not cached_lse):
        out, lse = dense_attention(query, key, value)  # pass 1
        memory.lse = lse if memory.lse is None else memory.lse
        memory.tiles = _search(query, key, lse, keep_ratio, block, text, threshold, head_adaptive)  # pass 2
        return out
    if memory.lse is None:
        raise ValueError(f"attend: got step {step} with nothing kept; expected the steps in order, from the first")
    if again:
        memory.tiles = _search(query, key, memory.lse, keep_ratio, block, text, threshold, head_adaptive)
    assert memory.tiles is not None
    return sparse_attention(query, key, value, memory.tiles, block)


def dense_attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k / sqrt(D)) v, and LSE_i = log sum_j exp(q_i k_j / sqrt(D)) [B, H, L]."""
    logits = _logits(query, key)
    return logits.softmax(-1) @ value, logits.logsumexp(-1)


def tile_weights(query: Tensor, key: Tensor, lse: Tensor, block: int) -> Tensor:
    """S [B, H, n, n], the attention weight in each tile: sum over it of exp(q_i k_j / sqrt(D) - LSE_i) (section 4.1).

    With the LSE of the same queries and keys a row of tiles sums to its number of tokens; with an old one it does not,
    but the order within a row changes only through what differs *inside* a block of rows.
    """
    weights = (_logits(query, key) - lse[..., None]).exp()
    short = -weights.shape[-1] % block  # the last block may be cut off
    padded = F.pad(weights, (0, short, 0, short))
    return padded.unflatten(-1, (-1, block)).unflatten(-3, (-1, block)).sum((-1, -3))


def text_tiles(length: int, text: Iterable[int], block: int) -> Tensor:
    """bool [n, n], the text sink: video to text, text to video and text to text (section 4.2)."""
    holds = torch.zeros(math.ceil(length / block), dtype=torch.bool)
    for place in text:
        holds[place // block] = True
    return holds[:, None] | holds[None, :]


def select(weights: Tensor, keep: Tensor, sink: Tensor) -> Tensor:
    """Tiles bool [B, H, n, n]: in every row the same number k = round(keep n) of the heaviest (section 4.3), and the
    sink on top. keep [B, H]. Row by row, so that no query is starved: a global choice makes those regions flicker."""
    n = weights.shape[-1]
    count = (keep * n + 0.5).floor().clamp(min=1)[..., None, None]
    heaviest_first = weights.argsort(dim=-1, descending=True, stable=True)
    rank = heaviest_first.argsort(dim=-1)
    return (rank < count) | sink


def recall(weights: Tensor, tiles: Tensor) -> Tensor:
    """[B, H]: the share of the weight in the tiles kept (equation 12)."""
    return (weights * tiles).sum((-2, -1)) / weights.sum((-2, -1))


def kept_by_head(recalls: Tensor, keep_ratio: float, threshold: float) -> Tensor:
    """keep [B, H] by head-adaptive sparsity (section 4.4).

    n heads have a recall above the threshold. The n of highest recall are given sparsity (1 + s)/2, the n of lowest
    (3 s - 1)/2, all others s, so that the mean stays s. Open in the paper: n above half of the heads (capped here) and
    s below 1/3 (the step is what the full head can take).
    """
    s, heads = 1 - keep_ratio, recalls.shape[-1]
    n = (recalls > threshold).sum(-1, keepdim=True).clamp(max=heads // 2)
    step = min((1 - s) / 2, s)
    from_best = recalls.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return keep_ratio - step * (from_best < n) + step * (from_best >= heads - n)


def sparse_attention(query: Tensor, key: Tensor, value: Tensor, tiles: Tensor, block: int) -> Tensor:
    """Attention over the kept tiles alone; the softmax is over what is left."""
    length = query.shape[2]
    kept = tiles.repeat_interleave(block, -1).repeat_interleave(block, -2)[..., :length, :length]
    return _logits(query, key).masked_fill(~kept, -math.inf).softmax(-1) @ value


def _search(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    keep_ratio: float,
    block: int,
    text: Iterable[int],
    threshold: float,
    head_adaptive: bool,
) -> Tensor:
    weights = tile_weights(query, key, lse, block)
    sink = text_tiles(query.shape[2], text, block)
    keep = torch.full(weights.shape[:2], keep_ratio)
    if head_adaptive:
        keep = kept_by_head(recall(weights, select(weights, keep, sink)), keep_ratio, threshold)
    return select(weights, keep, sink)


def _logits(query: Tensor, key: Tensor) -> Tensor:
    return query @ key.mT / math.sqrt(query.shape[-1])
