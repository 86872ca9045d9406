"""N:M sparsity in plain torch: the specification of what the kernels compute. Slow and obviously right.

Of every M neighbours along an axis at most N are kept. A packed weight holds the kept values and their places within
their group; `linear` is then x W^T with the weight that has zeros elsewhere.
"""

from __future__ import annotations

from itertools import combinations, pairwise, product

import numpy as np
import torch
from torch import Tensor

__all__ = ["linear", "mask", "pack"]


def mask(score: Tensor, n: int, m: int) -> Tensor:
    """The n largest |score| of every m along the last axis: bool, same shape. score [..., K], real floating point.

    Of equals the first is kept; NaN counts as larger than everything, so that it is not hidden. A last group of r < m
    keeps min(n, r).
    """
    groups = torch.nn.functional.pad(score.abs(), (0, -score.shape[-1] % m), value=-1.0).unflatten(-1, (-1, m))
    order = groups.sort(dim=-1, descending=True, stable=True).indices
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :n], True)
    return kept.flatten(-2)[..., : score.shape[-1]]


def transposable_mask(score: Tensor, n: int, m: int) -> Tensor:
    """n in every row and column of each m x m tile of the last two axes, with the largest sum of |score|: bool.

    score [..., R, C], real floating point; m divides R and C. Sums are of |score| rounded to 45 bits below the largest
    of the tile; a tile keeps as many NaN as it can, then as many infinities. Of several best tiles, for m <= 4 the
    first in the order of their rows is taken, for larger m the one that `_by_flow` comes to.
    """
    tiles = score.unflatten(-1, (-1, m)).unflatten(-3, (-1, m)).transpose(-3, -2)  # [..., R/m, C/m, m, m]
    score = tiles.reshape(-1, m, m)  # [T, m, m]
    kept = _by_trying(_whole(score), n) if m <= 4 else _by_flow(score, n)
    return kept.to(score.device).view(tiles.shape).transpose(-3, -2).flatten(-2).flatten(-3, -2)


def _whole(score: Tensor) -> Tensor:
    """|score| [T, m, m] as whole numbers below 2^45, so that sums are exact: float64 on the CPU.

    One infinity outweighs all that is finite in its tile, one NaN all infinities.
    """
    values = score.detach().abs().double().cpu().numpy()
    tile, more = (-2, -1), 2.0 * values.shape[-1] ** 2
    infinite, unknown = np.isinf(values), np.isnan(values)
    usual = np.where(infinite | unknown, 0, values)
    _, exponent = np.frexp(usual.max(axis=tile, keepdims=True))
    top = np.where(unknown.any(axis=tile, keepdims=True), more**2, more)
    top = np.where((infinite | unknown).any(axis=tile, keepdims=True), np.frexp(top)[1], 0)
    usual, others = np.ldexp(usual, 45 - top - exponent).round(), np.ldexp(np.where(unknown, more**2, more), 45 - top)
    return torch.from_numpy(np.where(infinite | unknown, others, usual))


def _by_trying(values: Tensor, n: int) -> Tensor:
    """The best of all legal tiles, the first of equals: bool [T, m, m] of whole values [T, m, m]."""
    m = values.shape[-1]
    patterns = [[column in pattern for column in range(m)] for pattern in combinations(range(m), n)]  # of a row
    tiles = torch.tensor(list(product(patterns, repeat=m))).view(-1, m, m)
    tiles = tiles[(tiles.sum(dim=1) == n).all(dim=-1)]
    return tiles[(values.flatten(1) @ tiles.flatten(1).double().T).argmax(dim=1)]


def _by_flow(score: Tensor, n: int) -> Tensor:
    """A best tile by passing columns on in circles: bool [T, m, m] of score [T, m, m]."""
    values, tiles = _whole(score), []
    orders = score.abs().flatten(1).argsort(dim=1, descending=True, stable=True)
    for value, order in zip(values.tolist(), orders.tolist(), strict=True):
        kept = _greedy(value, [divmod(place, len(value)) for place in order], n)
        while _pass_on(value, kept):
            pass
        tiles.append(kept)
    return torch.tensor(tiles, dtype=torch.bool).view(values.shape)


def _greedy(value: list[list[float]], order: list[tuple[int, int]], n: int) -> list[list[bool]]:
    """The places in this order as long as their row and column have room; then what is left short is filled.

    A row r and a column c that are short then hold each other's place. They get (r, d) and (s, c), and (s, d) is given
    up, with the s and d that lose least; the first short row and column come first.
    """
    m = len(value)
    kept = [[False] * m for _ in range(m)]
    in_row, in_column = [0] * m, [0] * m
    for r, c in order:
        if in_row[r] < n and in_column[c] < n:
            kept[r][c] = True
            in_row[r] += 1
            in_column[c] += 1
    while min(in_row) < n:
        r, c = (next(i for i, count in enumerate(counts) if count < n) for counts in (in_row, in_column))
        movable = [(s, d) for s, d in product(range(m), repeat=2) if kept[s][d] and not kept[s][c] and not kept[r][d]]
        s, d = max(movable, key=lambda place: value[r][place[1]] + value[place[0]][c] - value[place[0]][place[1]])
        kept[s][d], kept[s][c], kept[r][d] = False, True, True
        in_row[r] += 1
        in_column[c] += 1
    return kept


def _pass_on(value: list[list[float]], kept: list[list[bool]]) -> bool:
    """Lets rows pass a column each on to the next, in a circle that gains by it; whether there was one.

    Rows and columns of the tile stay full, and a tile that no such circle improves is a best one: cycle cancelling for
    minimum-cost flow (Klein 1967). The circle is found as Bellman and Ford do, rows in their order.
    """
    rows = range(len(value))
    gains = {}  # (from, to): what passing on the best column gains, and that column
    for r, s in product(rows, repeat=2):
        able = [c for c in rows if kept[r][c] and not kept[s][c]]
        if able:
            column = max(able, key=lambda c: value[s][c] - value[r][c])
            gains[r, s] = value[s][column] - value[r][column], column
    reach: list[float] = [0 for _ in rows]  # the gain of the best way found to here, from anywhere
    before: dict[int, int] = {}
    changed = True
    while changed:
        changed = False
        for (r, s), (gain, _) in gains.items():
            if reach[r] + gain > reach[s]:
                reach[s], before[s], changed = reach[r] + gain, r, True
        for start in rows:
            way = [start]
            while way[-1] in before and way[-1] not in way[:-1]:
                way.append(before[way[-1]])
            if way[-1] not in way[:-1]:
                continue
            for to, giver in pairwise(way[way.index(way[-1]) :]):
                column = gains[giver, to][1]
                kept[giver][column], kept[to][column] = False, True
            return True
    return False


def pack(weight: Tensor, kept: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Kept values and their places within their group, each [O, K/m, n], in the order of the columns.

    weight [O, K]; kept [O, K] bool, at most n of every m. A group that keeps fewer is filled up with zeros,
    placed where the last one kept is (or 0).
    """
    groups, chosen = (tensor.unflatten(1, (-1, m)) for tensor in (weight, kept))
    places = torch.arange(m, device=weight.device).expand(groups.shape)
    first = places.where(chosen, m).sort(dim=-1).values[..., :n]  # m where nothing is left
    values = torch.nn.functional.pad(groups, (0, 1)).gather(-1, first)
    last = torch.where(chosen, places, 0).amax(dim=-1, keepdim=True)
    return values, torch.where(first < m, first, last)


def unpack(values: Tensor, places: Tensor, m: int) -> Tensor:
    """The dense weight [O, K] of `pack`'s [O, K/m, n]."""
    dense = values.new_zeros(*values.shape[:2], m)
    return dense.scatter_add(-1, places, values).flatten(1)


def linear(x: Tensor, values: Tensor, places: Tensor, m: int, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times the packed weight, transposed, plus bias [O]: [..., O]."""
    return torch.nn.functional.linear(x, unpack(values, places, m).to(x.dtype), bias)
