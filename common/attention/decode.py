"""Selectors for the decoding steps: which of the cached keys a new token reads.

    SnapKV       prompt keys that the prompt's end attends to, chosen once (Li et al. 2024, arXiv 2404.14469)
    AdaSnapKV    the same, with the budget of a layer shared out among its heads (Feng et al. 2024, arXiv 2407.11550)
    Quest        pages of keys by an upper bound of their scores, at each step (Tang et al. 2024, arXiv 2406.10774)
    H2O          keys that were attended to most so far, and the last ones (Zhang et al. 2023, arXiv 2306.14048)
    Streaming    the first keys and the last ones (Xiao et al. 2023, arXiv 2309.17453)

SnapKV thins out the prompt's keys alone, whatever is decoded is read; the others have a budget over all keys so far.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from common.attention.causal import CHUNK, CausalSite, Rows, Selector, attention_rows

__all__ = ["H2O", "AdaSnapKV", "Quest", "SnapKV", "Streaming", "budgets", "top"]


class SnapKV(Selector):
    """The prompt keys with the most attention from the prompt's last queries, pooled over neighbours, in each head.

    keep     share of the prompt's keys, in (0, 1]
    window   last queries of the prompt that keys are judged by
    pool     keys over which scores are max-pooled, odd
    first, last   keys at the prompt's ends that are always kept, and count
    """

    phase = "decode"

    def __init__(self, *, keep: float, window: int, pool: int, first: int, last: int):
        _require_share("SnapKV", keep)
        if min(window, pool, first, last) < 1 or pool % 2 == 0:
            raise ValueError(
                f"SnapKV: got window={window}, pool={pool}, first={first}, last={last}; expected each to be at least 1 "
                "and an odd pool"
            )
        self.keep, self.window, self.pool, self.first, self.last = keep, window, pool, first, last

    def plan(self, query: Tensor, key: Tensor, site: CausalSite) -> Rows:
        start = max(0, site.prompt - self.window)
        scores = attention_rows(query, key, site.scale, start, site.prompt).mean(-2)  # [B, H, P]
        scores = F.max_pool1d(scores, self.pool, stride=1, padding=self.pool // 2)
        scores[..., : self.first] = scores[..., site.prompt - min(self.last, site.prompt) :] = torch.inf
        kept = self._choose(scores, max(1, round(self.keep * site.prompt)))
        decoded = kept.new_ones(*kept.shape[:2], query.shape[2] - site.prompt)
        return lambda start, stop: torch.cat([kept, decoded], -1)[:, :, None].expand(-1, -1, stop - start, -1)

    def _choose(self, scores: Tensor, count: int) -> Tensor:
        """bool [B, H, P]: the best `count` keys of every head."""
        return top(scores, torch.tensor(count, device=scores.device))


class AdaSnapKV(SnapKV):
    """SnapKV whose heads compete for the keys of their layer.

    floor    share of an even budget that every head keeps for sure, in [0, 1]
    """

    def __init__(self, *, keep: float, window: int, pool: int, first: int, last: int, floor: float):
        super().__init__(keep=keep, window=window, pool=pool, first=first, last=last)
        if not 0 <= floor <= 1:
            raise ValueError(f"AdaSnapKV: got floor={floor}; expected a share in [0, 1]")
        self.floor = floor

    def _choose(self, scores: Tensor, count: int) -> Tensor:
        sure = top(scores, torch.tensor(round(self.floor * count), device=scores.device))
        heads = scores.shape[1]
        wanted = scores.masked_fill(sure, torch.inf).flatten(1)  # one contest a layer; what is sure comes first
        return top(wanted, torch.tensor(heads * count, device=scores.device)).unflatten(1, (heads, -1))


class Quest(Selector):
    """The pages of keys that could hold the largest score, at each decoding step; the current page is always read.

    keep   share of the keys so far, in (0, 1], rounded up to whole pages
    page   keys of a page
    """

    phase = "decode"

    def __init__(self, *, keep: float, page: int):
        _require_share("Quest", keep)
        if page < 1:
            raise ValueError(f"Quest: got page={page}; expected at least 1")
        self.keep, self.page = keep, page

    def plan(self, query: Tensor, key: Tensor, site: CausalSite) -> Rows:
        length, page = query.shape[2], self.page
        pages = F.pad(key.float(), (0, 0, 0, -length % page), mode="replicate").unflatten(2, (-1, page))
        low, high = pages.amin(3), pages.amax(3)  # [B, H, n, D]
        of_key = torch.arange(length, device=key.device) // page

        def rows(start: int, stop: int) -> Tensor:
            q = query[:, :, start:stop].float()
            # sum over channels of max(q low, q high): positive channels meet the high end, negative ones the low end
            bound = q.clamp(min=0) @ high.mT + q.clamp(max=0) @ low.mT  # [B, H, rows, n]
            place, current = torch.arange(high.shape[2], device=q.device), of_key[start:stop, None]
            bound = bound.masked_fill(place > current, -torch.inf).masked_fill(place == current, torch.inf)
            return top(bound, budgets(self.keep / page, start, stop, q.device))[..., of_key]

        return rows


class H2O(Selector):
    """Half of the budget for the keys with the most attention from all queries before, half for the last keys.

    Attention is that of the dense model: the effect of evicted keys on later scores is left out.

    keep   share of the keys so far, in (0, 1]
    """

    phase = "decode"

    def __init__(self, *, keep: float):
        _require_share("H2O", keep)
        self.keep = keep

    def plan(self, query: Tensor, key: Tensor, site: CausalSite) -> Rows:
        length = query.shape[2]
        heavy = torch.zeros(*query.shape[:2], length, device=query.device)  # attention from all queries before `start`
        for begin in range(0, site.prompt, CHUNK):
            end = min(begin + CHUNK, site.prompt)
            heavy[..., :end] += attention_rows(query, key, site.scale, begin, end).sum(-2)

        def rows(start: int, stop: int) -> Tensor:
            weights = attention_rows(query, key, site.scale, start, stop)
            before = weights.cumsum(-2) - weights + heavy[:, :, None, :stop]
            heavy[..., :stop] += weights.sum(-2)
            total = budgets(self.keep, start, stop, query.device)
            recent = _recent(total - total // 2, start, stop, query.device)
            return recent | top(before.masked_fill(recent, -torch.inf), total // 2)

        return rows


class Streaming(Selector):
    """The first `first` keys, and the last ones to make up the budget.

    keep   share of the keys so far, in (0, 1]
    """

    phase = "decode"

    def __init__(self, *, keep: float, first: int):
        _require_share("Streaming", keep)
        if first < 0:
            raise ValueError(f"Streaming: got first={first}; expected 0 or more")
        self.keep, self.first = keep, first

    def plan(self, query: Tensor, key: Tensor, site: CausalSite) -> Rows:
        def rows(start: int, stop: int) -> Tensor:
            total = budgets(self.keep, start, stop, query.device)
            first = torch.arange(stop, device=query.device) < total[:, None].clamp(max=self.first)
            recent = _recent((total - self.first).clamp(min=0), start, stop, query.device)
            return (first | recent).expand(*query.shape[:2], -1, -1)

        return rows


def budgets(keep: float, start: int, stop: int, device: torch.device) -> Tensor:
    """Keys that the queries start..stop-1 may read, of the i + 1 up to query i: ceil(keep (i + 1)), int64 [n]."""
    return torch.tensor([math.ceil(keep * i - 1e-9) for i in range(start + 1, stop + 1)], device=device)


def top(scores: Tensor, count: Tensor) -> Tensor:
    """bool [..., n, K] or [..., K]: the `count` (int64 [n] or a scalar) largest of each row; of equals the first."""
    ranks = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return ranks < count[..., None]


def _recent(count: Tensor, start: int, stop: int, device: torch.device) -> Tensor:
    """bool [n, stop]: the last `count` [n] keys up to each of the queries start..stop-1, itself included."""
    distance = torch.arange(start, stop, device=device)[:, None] - torch.arange(stop, device=device)
    return (distance >= 0) & (distance < count[:, None])


def _require_share(who: str, keep: float) -> None:
    if not 0 < keep <= 1:
        raise ValueError(f"{who}: got keep={keep}; expected a share in (0, 1]")
