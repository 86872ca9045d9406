"""The paper's low-rank term: the nuclear norm of a weight of which only the chosen entries are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.masked_grad import Selection

__all__ = ["nuclear_norm", "subgradient"]


def nuclear_norm(weight: Tensor, selection: Selection) -> float:
    """||P_M||_*, the sum of the singular values of the weight [O, ...] as a matrix, zero where nothing is chosen."""
    return float(torch.linalg.svdvals(_kept(weight, selection)).sum())


def subgradient(weight: Tensor, selection: Selection) -> Tensor:
    """The chosen entries [k] of U V^T, where P_M = U S V^T with S > 0 (Watson 1992, with W = 0).

    Returns float32 (float64 of a float64 weight), in the selection's order. For its time it takes dense matrices of the
    weight's size.
    """
    left, sizes, right = torch.linalg.svd(_kept(weight, selection), full_matrices=False)
    # directions of no size are arbitrary: they belong to W
    real = sizes > sizes.amax() * max(left.shape[0], right.shape[1]) * torch.finfo(sizes.dtype).eps
    return selection.gather((left * real @ right).view(selection.shape))


def _kept(weight: Tensor, selection: Selection) -> Tensor:
    """[O, everything else] in float32 or float64."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    kept = torch.zeros(selection.shape, dtype=wide, device=weight.device)
    return selection.scatter_(kept, selection.gather(weight.detach()).to(wide)).flatten(1)
