"""What attention looks like along a dense generation, and how well a choice of tiles keeps.

Layers and heads are stacked into one axis of `heads` (layers times heads a layer), in the order of the layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from common.attention import Meter, Policy, Site, dense
from kernels import attention
from kernels.attention import BlockMask

__all__ = ["Look", "Tap", "agreement", "best_recalls", "choose", "held", "lse_drift"]


@dataclass(frozen=True)
class Look:
    """At one step: scores float32 [heads, n, n], lse float32 [heads, L], and `stale`, the scores under the LSE that was
    kept at the step of the search (before it: under their own)."""

    scores: Tensor
    lse: Tensor
    stale: Tensor


@dataclass
class Tap(Policy):
    """Leaves the generation as it is and looks at the attention at some steps.

    steps      in any order; the LSE of the first named is kept for later ones, as a search's is
    looks      by step and layer, of the first entry of a batch
    families   by step and name (see `best_recalls`): recall of the best pattern of each family, a tensor a layer
    """

    steps: Sequence[int]
    block_size: int
    families_at: Sequence[int] = ()
    densities: Sequence[float] = ()
    sizes: Sequence[int] = ()
    looks: dict[int, dict[str, Look]] = field(default_factory=dict)
    families: dict[int, dict[str, list[Tensor]]] = field(default_factory=dict)
    _lse: dict[str, Tensor] = field(default_factory=dict)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, site: Site, meter: Meter) -> Tensor:
        if site.step in self.steps:
            options = {"block_size": self.block_size, "scale": site.scale, "key_mask": site.key_mask}
            found = attention.search(query, key, value, **options)
            if site.step == self.steps[0]:
                self._lse[site.layer] = found.lse
            old = self._lse.get(site.layer)
            stale = found.scores if old is None else attention.block_scores(query, key, old, **options)
            self.looks.setdefault(site.step, {})[site.layer] = Look(found.scores[0], found.lse[0], stale[0])
        if site.step in self.families_at:
            video = query.shape[2] - len(site.text)
            recalls = best_recalls(query[:1, :, :video], key[:1, :, :video], self.densities, self.sizes)
            row = self.families.setdefault(site.step, {})
            for name, values in recalls.items():
                row.setdefault(name, []).append(values)
        with meter.phase("dense"):
            return dense(query, key, value, site)

    def look(self, step: int) -> Look:
        """All layers of a step in one."""
        found = self.looks[step].values()
        return Look(*(torch.cat([getattr(x, name) for x in found]) for name in ("scores", "lse", "stale")))

    def masks(self, step: int, keep_ratio: float, sink: Tensor | None) -> dict[str, BlockMask]:
        """The tiles of each layer at that step, for another generation."""
        return {
            layer: attention.select_blocks(found.scores[None], keep_ratio, forced=sink)
            for layer, found in self.looks[step].items()
        }


def choose(scores: Tensor, keep_ratio: float) -> Tensor:
    """bool [heads, n, n]: the tiles of largest score in each row."""
    return attention.select_blocks(scores[None], keep_ratio).dense()[0]


def held(tiles: Tensor, scores: Tensor) -> Tensor:
    """[heads]: the share of the weight that lies in these tiles."""
    return (scores * tiles).sum((-2, -1)) / scores.sum((-2, -1))


def lse_drift(before: Tensor, after: Tensor, block: int) -> dict[str, Tensor]:
    """How the rows' LSE [heads, L] moves from one step to another, each [heads].

    correlation   of the two over the rows
    within        standard deviation of the change inside a block of rows, averaged over blocks: all that can change the
                  order of tiles within a row
    """
    change = after - before
    whole = change[:, : change.shape[-1] // block * block].unflatten(-1, (-1, block))
    centred = [x - x.mean(-1, keepdim=True) for x in (before, after)]
    covariance = (centred[0] * centred[1]).mean(-1)
    spread = math.prod(x.square().mean(-1).sqrt() for x in centred)
    return {"correlation": covariance / spread, "within": whole.std(-1, correction=0).mean(-1)}


def agreement(chosen: Tensor, other: Tensor) -> Tensor:
    """[heads]: the share of these tiles that are among the others."""
    return (chosen & other).sum((-2, -1)) / chosen.sum((-2, -1))


@torch.no_grad()
def best_recalls(query: Tensor, key: Tensor, densities: Sequence[float], sizes: Sequence[int]) -> Mapping[str, Tensor]:
    """Recall [heads] of the best pattern of each family at equal numbers of entries, query and key [1, heads, L, D].

    Keys `tiles<size>/<density>`, `columns/..`, `diagonals/..`, `both/..`: the best of its kind that there is, found on
    the whole matrix. Tiles are chosen row by row, columns and diagonals for the head; a column or diagonal is one
    token wide.
    """
    weights = (query[0] @ key[0].mT * query.shape[-1] ** -0.5).softmax(-1)  # [heads, L, L]
    heads, length, _ = weights.shape
    total = weights.sum((-2, -1))
    column = weights.sum(-2)
    place = torch.arange(length)
    offset = (place - place[:, None] + length - 1).flatten()  # of each entry's diagonal
    diagonal = torch.zeros(heads, 2 * length - 1).index_add_(1, offset, weights.flatten(1))
    long = (length - (torch.arange(2 * length - 1) - length + 1).abs()).float()  # entries on each diagonal
    found = {}
    for density in densities:
        budget = density * length * length
        by_column = column.sort(descending=True).values.cumsum(-1)
        columns = round(density * length)
        found[f"columns/{density:g}"] = by_column[:, columns - 1] / total
        found[f"diagonals/{density:g}"] = _best_lines(diagonal, long, budget) / total
        both = torch.stack([_both(w, c, d, long, budget) for w, c, d in zip(weights, column, diagonal, strict=True)])
        found[f"both/{density:g}"] = both / total
        for size in sizes:
            tiles = F.pad(weights, (0, -length % size, 0, -length % size))
            tiles = tiles.unflatten(-1, (-1, size)).unflatten(-3, (-1, size)).sum((-1, -3))
            found[f"tiles{size}/{density:g}"] = held(choose(tiles, density), tiles)
    return found


def _best_lines(weight: Tensor, cost: Tensor, budget: float) -> Tensor:
    """[heads]: the weight of the lines with the most weight an entry, as many as the budget of entries holds."""
    order = (weight / cost).argsort(dim=-1, descending=True)
    spent, gained = cost[order].cumsum(-1), weight.gather(-1, order).cumsum(-1)
    last = (spent <= budget).sum(-1, keepdim=True) - 1
    return torch.where(last >= 0, gained.gather(-1, last.clamp(min=0)), 0.0)[..., 0]


def _both(weights: Tensor, column: Tensor, diagonal: Tensor, long: Tensor, budget: float) -> Tensor:
    """The weight in the best columns and diagonals of one head, half of the budget each, common entries once."""
    length = len(weights)
    columns = column.argsort(descending=True)[: round(budget / 2 / length)]
    order = (diagonal / long).argsort(descending=True)
    kept = order[long[order].cumsum(0) <= budget / 2]
    chosen = torch.zeros(len(diagonal), dtype=torch.bool)
    chosen[kept] = True
    place = torch.arange(length)
    mask = chosen[place - place[:, None] + length - 1]
    mask[:, columns] = True
    return weights[mask].sum()
