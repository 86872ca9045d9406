"""Which tiles to keep, given the weight in each: what AdaSpa (arXiv 2502.21079) leaves open is an argument."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from kernels.attention.masks import BlockMask

__all__ = ["head_tiers", "recall", "select_blocks", "text_blocks"]


def select_blocks(
    scores: Tensor,
    keep_ratio: float | Tensor,
    *,
    rule: Literal["row", "global"] = "row",
    forced: Tensor | None = None,
    forced_count: bool = False,
) -> BlockMask:
    """The tiles of largest score.

    Args:
        scores: [B, H, nq, nk], larger is kept first; of equals the one with the lower index.
        keep_ratio: share of tiles to keep, in (0, 1]; one number, or one a head, [B, H] or [H]: see `head_tiers`.
        rule: "row" keeps round(keep_ratio nk) in every row of tiles, at least one (section 4.3: no query block is
            starved); "global" as many as that in a head altogether, wherever they lie (equation 14).
        forced: bool, broadcastable to the scores: kept in any case, such as `text_blocks`.
        forced_count: whether forced tiles use up the budget (those beyond it are kept nevertheless) or come on top.

    Returns:
        A mask of the scores' shape.

    Raises:
        ValueError: for a keep_ratio outside (0, 1], scores that are not [B, H, nq, nk], or an unknown rule.
    """
    if scores.ndim != 4:
        raise ValueError(f"select_blocks: got scores {list(scores.shape)}; expected [batch, heads, query, key blocks]")
    if rule not in ("row", "global"):
        raise ValueError(f"select_blocks: got rule {rule!r}; expected 'row' or 'global'")
    ratio = torch.as_tensor(keep_ratio, dtype=torch.float64, device=scores.device)
    if not bool(((ratio > 0) & (ratio <= 1)).all()):
        raise ValueError(
            f"select_blocks: got keep_ratio {keep_ratio}; expected shares in (0, 1]. It is what is kept: a sparsity of "
            "0.8 is a keep_ratio of 0.2"
        )
    wanted = torch.broadcast_to(forced, scores.shape) if forced is not None else None
    ranked = scores.masked_fill(wanted, torch.inf) if forced_count and wanted is not None else scores
    rows = ranked if rule == "row" else ranked.flatten(-2)[..., None, :]
    size = rows.shape[-1]
    count = (ratio.expand(scores.shape[:2]) * size + 0.5).floor().clamp(min=min(1, size))
    rank = _rank(rows)
    kept = (rank < count[..., None, None]).reshape(scores.shape)
    return BlockMask.of(kept if wanted is None else kept | wanted)


def recall(scores: Tensor, mask: BlockMask) -> Tensor:
    """Share of the attention weight that lies in kept tiles.

    Args:
        scores: [B, H, nq, nk], weights of tiles; see `kernels.attention.search`.
        mask: of that shape.

    Returns:
        [B, H]: the sum of kept scores over the sum of all, which makes it a share under an old LSE too.

    Raises:
        ValueError: for a mask of another shape.
    """
    if mask.shape != scores.shape:
        raise ValueError(
            f"recall: got scores {list(scores.shape)} and a mask of {list(mask.shape)}; expected one shape"
        )
    return (scores * mask.dense()).sum((-2, -1)) / scores.sum((-2, -1))


def head_tiers(recalls: Tensor, keep_ratio: float, *, threshold: float = 0.8) -> Tensor:
    """keep_ratio of every head, three values with the same mean: AdaSpa's head-adaptive sparsity (section 4.4).

    With n heads of a recall above the threshold at a uniform keep_ratio r = 1 - s, the n heads of highest recall get
    half of it (sparsity (1 + s)/2) and the n of lowest half as much more (sparsity (3 s - 1)/2). At most half of the
    heads are moved either way, and nothing is kept beyond 1; the paper leaves both cases open.

    Args:
        recalls: [B, H] or [H]; see `recall`.

    Returns:
        float32 of that shape.

    Raises:
        ValueError: for a keep_ratio outside (0, 1].
    """
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"head_tiers: got keep_ratio {keep_ratio}; expected a share in (0, 1]")
    heads = recalls.shape[-1]
    moved = (recalls > threshold).sum(-1, keepdim=True).clamp(max=heads // 2)
    rank = _rank(recalls)
    step = min(keep_ratio / 2, 1 - keep_ratio)  # what is taken is what can be given
    return keep_ratio - step * (rank < moved).float() + step * (rank >= heads - moved).float()


def text_blocks(
    queries: int, keys: int, text: range, *, block_size: int = 64, device: torch.device | str = "cpu"
) -> Tensor:
    """Tiles that hold a text token among their queries or keys: AdaSpa's text sink (section 4.2).

    Args:
        queries, keys: tokens, of one joint sequence of text and video if equal.
        text: places of the text among them, of both queries and keys.

    Returns:
        bool [ceil(queries / block), ceil(keys / block)].

    Raises:
        ValueError: for text that reaches beyond the sequence.
    """
    if len(text) and (text.start < 0 or text[-1] >= min(queries, keys)):
        raise ValueError(
            f"text_blocks: got text at {text.start} to {text[-1]} in a sequence of {min(queries, keys)} tokens; "
            "expected it to lie within"
        )
    row, column = (
        torch.zeros(math.ceil(length / block_size), dtype=torch.bool, device=device) for length in (queries, keys)
    )
    if len(text):
        row[text.start // block_size : text[-1] // block_size + 1] = True
        column[text.start // block_size : text[-1] // block_size + 1] = True
    return row[:, None] | column


def _rank(values: Tensor) -> Tensor:
    """Place of each value along the last axis, 0 for the largest; of equals the first comes first."""
    order = torch.sort(values, dim=-1, descending=True, stable=True).indices
    return torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
