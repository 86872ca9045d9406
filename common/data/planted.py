"""Regression from a teacher whose weights are exactly N:M: the only data where the right mask is known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from common import seeds

__all__ = ["Planted", "planted"]


@dataclass(frozen=True)
class Planted:
    """inputs [S, K], targets [S, O] = inputs weight^T + noise; weight [O, K] with exactly n of every m where `mask`."""

    inputs: Tensor
    targets: Tensor
    weight: Tensor
    mask: Tensor

    def recovered(self, mask: Tensor) -> float:
        """Share of the teacher's kept places that `mask` [O, K] bool keeps too: 1 all, n/m by chance."""
        return (mask & self.mask).sum().item() / self.mask.sum().item()


def planted(
    n: int, m: int, *, inputs: int, outputs: int, samples: int, seed: int, noise: float = 0.1, correlation: float = 0.0
) -> Planted:
    """A linear teacher [outputs, inputs] with n non-zeros at random places of every m neighbours along its inputs.

    Non-zeros have random signs and sizes uniform in 0.5..1.5, times 1 / sqrt(inputs n / m), so that targets have
    variance near 1; `noise` is the standard deviation added to them. Inputs are normal with variance 1; `correlation`
    of any two within a group of m makes the places harder to tell apart.

    Raises ValueError for a pattern that does not fit.
    """
    if not 1 <= n <= m or inputs % m or min(outputs, samples) < 1 or not 0 <= correlation < 1:
        raise ValueError(
            f"planted: got {n}:{m}, inputs={inputs}, outputs={outputs}, samples={samples}, correlation={correlation}; "
            "expected 1 <= n <= m, inputs in multiples of m, at least one output and sample, 0 <= correlation < 1."
        )
    draw = seeds.generator(seed, "planted")
    order = torch.rand(outputs, inputs // m, m, generator=draw).argsort(dim=-1)
    mask = (order < n).flatten(1)
    size = 0.5 + torch.rand(outputs, inputs, generator=draw)
    sign = torch.where(torch.rand(outputs, inputs, generator=draw) < 0.5, -1.0, 1.0)
    weight = torch.where(mask, sign * size, 0.0) / (inputs * n / m) ** 0.5
    own, shared = torch.randn(samples, inputs, generator=draw), torch.randn(samples, inputs // m, generator=draw)
    x = (1 - correlation) ** 0.5 * own + correlation**0.5 * shared.repeat_interleave(m, dim=1)
    y = x @ weight.T + noise * torch.randn(samples, outputs, generator=draw)
    return Planted(x, y, weight, mask)
