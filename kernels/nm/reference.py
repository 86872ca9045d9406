"""N:M sparsity in plain torch: the specification of what the kernels compute. Slow and obviously right.

Of every M neighbours along an axis at most N are kept. A packed weight holds the kept values and their places within
their group; `linear` is then x W^T with the weight that has zeros elsewhere.
"""

from __future__ import annotations

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
