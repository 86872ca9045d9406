"""Training recipes whose pattern stays the same from the first step to the last.

    recipe        mask                         backward of x         dW                              source
    Dense         none                         W                     g
    STE           largest, sought again        E * W                 g                               Zhou et al. 2021
    SRSTE         largest, sought again        E * W                 g + lambda (1 - E) W            Zhou et al. 2021
    Fixed         of the first step, or given  E * W                 E * g                           Mishra et al. 2021
    BDWP          largest, along each axis     E_out * W             g + lambda (1 - E) W            Fang et al. 2023
    Transposable  one for both axes            E * W                 g + lambda (1 - E) W            Hubara et al. 2021
    BiMask        largest, and part of it      E_back * W            g + lambda (1 - E) W            Zhang et al. 2023

with g = dL/dW~. The regulariser is added to the gradient, before momentum and weight decay, as the authors' code does:
under Adam it is divided by the root of the second moment like all the rest. It is added in every backward pass, so
gradients that are accumulated over k passes hold it k times, and a loss that is scaled (float16) shrinks it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from common.sparsity.rules import Axis, Masks, Recipe, Rule, largest, other
from kernels import nm

DECAY = 2e-4  # lambda_W of SR-STE and Bi-Mask (both authors' code)


@dataclass(frozen=True)
class Dense(Recipe):
    """No sparsity: the arm that the others are compared with."""

    def rule(self, step: int, n: int, m: int) -> Rule:
        return Rule(m, m)


@dataclass(frozen=True)
class STE(Recipe):
    """Straight-through estimator: the mask is sought in every step, all weights get the gradient of the kept ones'
    product. Weights that are pruned may come back."""

    def rule(self, step: int, n: int, m: int) -> Rule:
        return Rule(n, m)


@dataclass(frozen=True)
class SRSTE(Recipe):
    """Sparse-refined STE (arXiv 2102.04010, section 4): pruned weights shrink, so the mask flickers less."""

    decay: float = DECAY

    def rule(self, step: int, n: int, m: int) -> Rule:
        return Rule(n, m, decay=self.decay)


@dataclass(frozen=True)
class Fixed(Recipe):
    """The mask of the first step (or one given to `Sparsity.set_masks`) for good; pruned weights get no gradient.

    An optimiser's own weight decay still moves them; they are out of the forward pass all the same.
    """

    def rule(self, step: int, n: int, m: int) -> Rule:
        return Rule(n, m, grad_mode="scaled")

    def masks(self, weight: Tensor, rule: Rule, axis: Axis, step: int, previous: Masks | None) -> Masks:
        return previous or super().masks(weight, rule, axis, step, previous)


@dataclass(frozen=True)
class BDWP(Recipe):
    """Bidirectional weight pruning (arXiv 2309.13015): two masks of the same dense weights, so that forward pass and
    input gradient are both N:M along the axis they contract."""

    decay: float = DECAY
    both_axes: ClassVar[bool] = True

    def rule(self, step: int, n: int, m: int) -> Rule:
        return Rule(n, m, decay=self.decay, both_axes=True)

    def masks(self, weight: Tensor, rule: Rule, axis: Axis, step: int, previous: Masks | None) -> Masks:
        return Masks(largest(weight, rule.n, rule.m, axis), largest(weight, rule.n, rule.m, other(axis)))


@dataclass(frozen=True)
class Transposable(Recipe):
    """One mask that is n:m along both axes (arXiv 2102.08124), in tiles of m x m over input and output channels."""

    decay: float = DECAY
    both_axes: ClassVar[bool] = True

    def rule(self, step: int, n: int, m: int) -> Rule:
        return Rule(n, m, decay=self.decay, both_axes=True)

    def masks(self, weight: Tensor, rule: Rule, axis: Axis, step: int, previous: Masks | None) -> Masks:
        tiled = weight.detach().movedim((0, 1), (-2, -1))  # [kh, kw, O, I]
        return Masks(nm.mask(tiled, rule.n, rule.m, transposable=True).movedim((-2, -1), (0, 1)))


@dataclass(frozen=True)
class BiMask(Recipe):
    """Bi-Mask (arXiv 2302.06058): the backward mask is a part of the forward mask, at most n:m along the other axis
    after the channels along that axis were put in the best of `candidates` random orders.

    The order is sought again every `every` steps; the best one loses the least magnitude.
    """

    decay: float = DECAY
    candidates: int = 100
    every: int = 100
    seed: int = 0
    both_axes: ClassVar[bool] = True

    def rule(self, step: int, n: int, m: int) -> Rule:
        return Rule(n, m, decay=self.decay, both_axes=True)

    def masks(self, weight: Tensor, rule: Rule, axis: Axis, step: int, previous: Masks | None) -> Masks:
        kept = largest(weight, rule.n, rule.m, axis)
        masked = weight.detach() * kept
        order = previous.order if previous else None
        if order is None or step % self.every == 0:
            order = self._best_order(masked, rule, axis, step)
        return Masks(kept, kept & in_order(masked, order, rule.n, rule.m, other(axis)), order)

    def _best_order(self, masked: Tensor, rule: Rule, axis: Axis, step: int) -> Tensor:
        channels = masked.shape[0 if axis == "in" else 1]
        generator = torch.Generator().manual_seed(self.seed + step)
        best, most = torch.arange(channels), -1.0
        for order in [best, *(torch.randperm(channels, generator=generator) for _ in range(self.candidates))]:
            found = (masked * in_order(masked, order, rule.n, rule.m, other(axis))).abs().sum().item()
            best, most = (order, found) if found > most else (best, most)
        return best


def in_order(weight: Tensor, order: Tensor, n: int, m: int, axis: Axis) -> Tensor:
    """The mask of the n largest of every m channels along the axis, these being taken in the given order."""
    dim = 0 if axis == "out" else 1
    found = largest(weight.index_select(dim, order.to(weight.device)), n, m, axis)
    return found.index_select(dim, order.argsort().to(weight.device))
