"""N:M sparsity in plain torch: the specification of what the kernels compute. Slow and obviously right.

Of every M neighbours along an axis at most N are kept. A packed weight holds the kept values and their places within
their group; `linear` is then x W^T with the weight that has zeros elsewhere.
"""

from __future__ import annotations

from itertools import combinations, product

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
    """n in every row and column of each m x m tile of the last two axes, with a large sum of |score|: bool, same shape.

    score [..., R, C], real floating point; m divides R and C. For m <= 4 the sum is the largest there is, by trying all
    tiles; of equals the first in the order of their rows is taken. For larger m it is what greed and exchange find, see
    `_exchange`. A tile keeps as many NaN as it can, then as many infinities as it can.
    """
    tiles = score.abs().double().unflatten(-1, (-1, m)).unflatten(-3, (-1, m)).transpose(-3, -2)  # [..., R/m, C/m, m, m]
    solve = _best_tiles if m <= 4 else _exchange
    kept = solve(_finite(tiles.reshape(-1, m, m)), n)
    return kept.view(tiles.shape).transpose(-3, -2).flatten(-2).flatten(-3, -2)


def _finite(values: Tensor) -> Tensor:
    """values [T, m, m] >= 0: one infinity is made to outweigh all finite ones of its tile, one NaN all infinities."""
    finite = values.isfinite()
    more = 2.0 * values.shape[-1] ** 2
    largest = values.where(finite, 0).amax(dim=(-2, -1), keepdim=True)
    infinity = (more * largest).where(largest > 0, 1.0)
    return values.where(finite, (more * infinity).where(values.isnan(), infinity))


def _best_tiles(values: Tensor, n: int) -> Tensor:
    """The legal tile with the largest sum, by trying all: bool [T, m, m] of values [T, m, m]."""
    m = values.shape[-1]
    patterns = list(combinations(range(m), n))  # of a row: the columns that it keeps
    legal = [
        rows
        for rows in product(range(len(patterns)), repeat=m)
        if all(sum(c in patterns[p] for p in rows) == n for c in range(m))
    ]
    nothing = torch.zeros_like(values[..., 0])
    sums = [sum((values[..., c] for c in pattern), start=nothing) for pattern in patterns]  # each [T, m]
    totals = [sum((sums[p][:, r] for r, p in enumerate(rows)), start=nothing[:, 0]) for rows in legal]  # each [T]
    best = torch.stack(totals).argmax(dim=0)
    tiles = torch.tensor([[[c in patterns[p] for c in range(m)] for p in rows] for rows in legal])
    return tiles.to(values.device)[best]


def _exchange(values: Tensor, n: int) -> Tensor:
    """Greed, repair and exchange, tile by tile: bool [T, m, m] of values [T, m, m]."""
    tiles = [_exchanged(tile, n) for tile in values.tolist()]
    return torch.tensor(tiles, dtype=torch.bool, device=values.device).view(values.shape)


def _exchanged(value: list[list[float]], n: int) -> list[list[bool]]:
    """One tile. First the largest values are taken, of equals the first, as long as their row and column have room.

    That may leave a row and a column short, but never empty at each other's place. So the first such row r and column c
    get (r, d) and (s, c) while (s, d) is given up, with the s and d that gain most. Last, pairs of rows r < s exchange two
    columns, the best two each time, until no pair has any to gain by: no exchange of two kept for two others, the tile
    staying legal, then makes the sum larger.
    """
    m = len(value)
    places = list(product(range(m), repeat=2))
    kept = [[False] * m for _ in range(m)]
    in_row, in_column = [0] * m, [0] * m
    for r, c in sorted(places, key=lambda place: -value[place[0]][place[1]]):
        if in_row[r] < n and in_column[c] < n:
            kept[r][c] = True
            in_row[r] += 1
            in_column[c] += 1
    while min(in_row) < n:
        r, c = (next(i for i, count in enumerate(counts) if count < n) for counts in (in_row, in_column))
        movable = [(s, d) for s, d in places if kept[s][d] and not kept[s][c] and not kept[r][d]]
        s, d = max(movable, key=lambda place: value[r][place[1]] + value[place[0]][c] - value[place[0]][place[1]])
        kept[s][d], kept[s][c], kept[r][d] = False, True, True
        in_row[r] += 1
        in_column[c] += 1
    while any([_exchange_rows(value, kept, r, s) for r, s in combinations(range(m), 2)]):
        pass
    return kept


def _exchange_rows(value: list[list[float]], kept: list[list[bool]], r: int, s: int) -> bool:
    """Exchanges columns of `kept` between two rows while that gains something; whether it did."""
    gained = False
    more = [of_r - of_s for of_r, of_s in zip(value[r], value[s], strict=True)]
    while True:
        out = [c for c in range(len(more)) if kept[r][c] and not kept[s][c]]
        into = [c for c in range(len(more)) if kept[s][c] and not kept[r][c]]
        least, most = min(out, key=more.__getitem__, default=0), max(into, key=more.__getitem__, default=0)
        if not more[most] > more[least]:  # also where the rows keep the same columns
            return gained
        for c, row in ((least, s), (most, r)):
            kept[r][c], kept[s][c] = row == r, row == s
        gained = True


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
