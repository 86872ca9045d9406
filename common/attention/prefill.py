"""Training-free selectors for the prefill: vertical and slash lines, and blocks.

Vertical-Slash is MInference's (Jiang et al. 2024, arXiv 2407.02490), the choice by coverage FlexPrefill's (Lai et al.
2025, arXiv 2502.20766), blocks of mean-pooled queries and keys as in both; how each is set up follows The Sparse
Frontier (Nawrot et al. 2025, arXiv 2504.17768).

In a *vertical* line every query reads one key, in a *slash* line every query reads the key at one distance. Scores of
lines come from the attention of the prompt's last `window` queries, summed along the line.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.attention.causal import CausalSite, Rows, Selector, attention_rows

__all__ = ["BlockSparse", "FlexPrefill", "VerticalSlash", "line_scores", "lines_kept"]


class VerticalSlash(Selector):
    """The same number of the best vertical and of the best slash lines in every head, as many as `keep` allows.

    keep      share of the causal pairs of the prompt that may be read, in (0, 1]
    window    last queries that lines are judged by
    first     keys that are always vertical lines
    last      distances 0..last-1 that are always slash lines

    What is always read counts. Where it is more than `keep` it is read all the same.
    """

    phase = "prefill"

    def __init__(self, *, keep: float, window: int, first: int, last: int):
        if not 0 < keep <= 1 or min(window, first, last) < 1:
            raise ValueError(
                f"VerticalSlash: got keep={keep}, window={window}, first={first}, last={last}; expected keep in (0, 1] "
                "and the others to be at least 1"
            )
        self.keep, self.window, self.first, self.last = keep, window, first, last

    def plan(self, query: Tensor, key: Tensor, site: CausalSite) -> Rows:
        length = site.prompt
        vertical, slash = line_scores(query, key, site.scale, length, self.window)
        ranks = _ranks(_forced(vertical, self.first)), _ranks(_forced(slash, self.last))
        wanted = self.keep * length * (length + 1) / 2
        low, high = 1, length  # most lines of each kind such that the mean head reads no more than wanted
        while low < high:
            middle = (low + high + 1) // 2
            kept = lines_kept(ranks[0] < max(middle, self.first), ranks[1] < max(middle, self.last))
            low, high = (middle, high) if kept.double().mean() <= wanted else (low, middle - 1)
        return _line_rows(ranks[0] < max(low, self.first), ranks[1] < max(low, self.last))


class FlexPrefill(Selector):
    """As many lines as it takes to cover a share of the scores, in each head on its own.

    coverage   share of the vertical scores, and of the slash scores, that the chosen lines hold, in (0, 1]
    least      lines of each kind that every head reads at least
    window, first, last   as for `VerticalSlash`

    Its choice between two patterns by the query (query-aware heads) is left out, as in The Sparse Frontier.
    """

    phase = "prefill"

    def __init__(self, *, coverage: float, least: int, window: int, first: int, last: int):
        if not 0 < coverage <= 1 or min(least, window, first, last) < 1:
            raise ValueError(
                f"FlexPrefill: got coverage={coverage}, least={least}, window={window}, first={first}, last={last}; "
                "expected coverage in (0, 1] and the others to be at least 1"
            )
        self.coverage, self.least, self.window, self.first, self.last = coverage, least, window, first, last

    def plan(self, query: Tensor, key: Tensor, site: CausalSite) -> Rows:
        vertical, slash = line_scores(query, key, site.scale, site.prompt, self.window)
        chosen = (self._covering(vertical, self.first), self._covering(slash, self.last))
        return _line_rows(*chosen)

    def _covering(self, scores: Tensor, always: int) -> Tensor:
        """The fewest lines that hold the coverage, and those that are always read: bool as scores [B, H, P]."""
        order = scores.argsort(dim=-1, descending=True, stable=True)
        held = scores.gather(-1, order).cumsum(-1) / scores.sum(-1, keepdim=True)
        # a line is needed while those before it hold less than the coverage
        count = ((held < self.coverage).sum(-1, keepdim=True) + 1).clamp(min=self.least)
        chosen = _ranks(scores) < count
        chosen[..., :always] = True
        return chosen


class BlockSparse(Selector):
    """The same number of the best key blocks for every block of queries, judged by mean-pooled queries and keys.

    keep     share of the causal blocks of the prompt that may be read, in (0, 1]
    block    queries, and keys, of a block; the last one may be shorter

    The first block of keys and the block on the diagonal are always read, and count.
    """

    phase = "prefill"

    def __init__(self, *, keep: float, block: int):
        if not 0 < keep <= 1 or block < 1:
            raise ValueError(f"BlockSparse: got keep={keep}, block={block}; expected keep in (0, 1] and block >= 1")
        self.keep, self.block = keep, block

    def plan(self, query: Tensor, key: Tensor, site: CausalSite) -> Rows:
        pooled = (_pooled(part[:, :, : site.prompt].float(), self.block) for part in (query, key))
        scores = site.scale * next(pooled) @ next(pooled).mT  # [B, H, n, n]
        count = scores.shape[-1]
        place = torch.arange(count, device=query.device)
        scores = scores.masked_fill(place > place[:, None], -torch.inf)
        scores[..., 0] = torch.inf
        scores.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
        chosen = _ranks(scores) < self._budget(count)
        starts = torch.arange(query.shape[2], device=query.device) // self.block

        def rows(start: int, stop: int) -> Tensor:
            wide = chosen[:, :, starts[start:stop]]  # [B, H, rows, n]
            return wide[..., starts[: site.prompt]]

        return rows

    def _budget(self, count: int) -> int:
        """Most blocks a row of queries such that all rows read no more than `keep` of the causal blocks; at least 2,
        which the first block and the diagonal take."""
        causal = torch.arange(1, count + 1)
        fits = [n for n in range(2, count + 1) if causal.clamp(max=n).sum() <= self.keep * causal.sum()]
        return max(fits, default=2)


def line_scores(query: Tensor, key: Tensor, scale: float, length: int, window: int) -> tuple[Tensor, Tensor]:
    """Scores of the vertical lines (by key) and slash lines (by distance), each [B, H, length].

    The attention of the last `window` of the first `length` queries, summed over the queries of a line.
    """
    window = min(window, length)
    weights = attention_rows(query, key, scale, length - window, length)  # [B, H, w, length]
    places = torch.arange(length, device=query.device)
    key_at = places[length - window :, None] - places  # [w, length]: the key that a query has at a distance
    along = weights.gather(-1, key_at.clamp(min=0).expand(weights.shape))
    return weights.sum(-2), (along * (key_at >= 0)).sum(-2)


def lines_kept(vertical: Tensor, slash: Tensor) -> Tensor:
    """Causal pairs on the chosen lines, bool [..., P] each: int64 [...], pairs on two lines counted once."""
    length = vertical.shape[-1]
    reach = torch.arange(length, 0, -1, device=vertical.device)  # queries on a line
    seen = slash.long().cumsum(-1).flip(-1)  # chosen distances that the queries on vertical line j have to it
    return (vertical * reach).sum(-1) + (slash * reach).sum(-1) - (vertical * seen).sum(-1)


def _line_rows(vertical: Tensor, slash: Tensor) -> Rows:
    """The rows of a plan whose chosen lines are bool [B, H, P]."""
    prompt, device = vertical.shape[-1], vertical.device

    def rows(start: int, stop: int) -> Tensor:
        distance = torch.arange(start, stop, device=device)[:, None] - torch.arange(prompt, device=device)
        return vertical[:, :, None] | slash[..., distance.clamp(min=0)]

    return rows


def _ranks(scores: Tensor) -> Tensor:
    """The place of each entry in its row, the largest at 0; of equals the first comes first."""
    return scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def _forced(scores: Tensor, always: int) -> Tensor:
    scores = scores.clone()
    scores[..., :always] = torch.inf
    return scores


def _pooled(x: Tensor, block: int) -> Tensor:
    """Means over blocks of the third axis, [B, H, L, D] -> [B, H, ceil(L / block), D]; the last may be shorter."""
    return torch.stack([part.mean(2) for part in x.split(block, dim=2)], dim=2)
