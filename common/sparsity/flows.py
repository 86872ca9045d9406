r"""Recipes that grow sparse while they train: the progressive gradient flows and gradual pruning.

Of `total` steps the first `dense` are dense and the last `fine_tune` use the hard mask n:m. With s counted from the end
of the dense phase over S = total - dense - fine_tune steps (arXiv 2402.04744, section 3):

    MDGFLinear        f = E + beta(s) (1 - E),   beta(s) = max(0, 1 - c s)
    MDGFExponential   f = E + beta(s) (1 - E),   beta(s) = exp(-c s)
    SDGFStepwise      f = E of (m-1):m -> (m/2):m -> ... -> n:m, equal stages
    SDGFGeometric     f = E of kn:km for k = 8, 4, 2, 1, equal stages: one density, ever smaller blocks

After `total` steps every recipe uses the hard mask. Which gradient a pruned weight gets is an option, because plain
differentiation of f W would scale it by beta (`scaled`) and the authors' code does not (`ste`).
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

from torch import Tensor

from common.sparsity.rules import Axis, GradMode, Masks, Recipe, Rule, largest

DECAYED = 11.0  # c S of the authors' exponential runs: 1e-4 a step over 350 epochs of ImageNet at batch 4096


@dataclass(frozen=True)
class Progressive(Recipe):
    """The phases that the flows share. Steps are optimiser steps.

    Raises ValueError where the phases do not fit into `total`, or for an unknown `grad_mode`.
    """

    total: int
    dense: int = 0
    fine_tune: int = 0
    grad_mode: GradMode = "ste"

    def __post_init__(self) -> None:
        if min(self.total - 1, self.dense, self.fine_tune, self.decaying - 1) < 0:
            raise ValueError(
                f"{type(self).__name__}: got {self.dense} dense and {self.fine_tune} fine-tuning of {self.total} "
                "steps; expected both >= 0 and at least one step between them"
            )
        if self.grad_mode not in ("ste", "scaled"):
            raise ValueError(f"{type(self).__name__}: got grad_mode {self.grad_mode!r}; expected 'ste' or 'scaled'")

    @property
    def decaying(self) -> int:
        """S: the steps between the dense phase and the fine-tuning."""
        return self.total - self.dense - self.fine_tune

    def rule(self, step: int, n: int, m: int) -> Rule:
        if step < self.dense:
            return Rule(m, m)
        if step >= self.total - self.fine_tune:
            return Rule(n, m, grad_mode=self.grad_mode)
        return self.flow(step - self.dense, n, m)

    @abc.abstractmethod
    def flow(self, s: int, n: int, m: int) -> Rule:
        """The rule of the s-th step after the dense phase, 0 <= s < S."""


@dataclass(frozen=True)
class MDGFLinear(Progressive):
    """beta(s) = max(0, 1 - c s); c a step, default 1/S: zero when the fine-tuning begins."""

    c: float | None = None

    def flow(self, s: int, n: int, m: int) -> Rule:
        c = 1 / self.decaying if self.c is None else self.c
        return Rule(n, m, beta=max(0.0, 1 - c * s), grad_mode=self.grad_mode)


@dataclass(frozen=True)
class MDGFExponential(Progressive):
    """beta(s) = exp(-c s); c a step, default 11/S, the authors' decay over their whole run."""

    c: float | None = None

    def flow(self, s: int, n: int, m: int) -> Rule:
        c = DECAYED / self.decaying if self.c is None else self.c
        return Rule(n, m, beta=math.exp(-c * s), grad_mode=self.grad_mode)


@dataclass(frozen=True)
class SDGFStepwise(Progressive):
    """(m-1):m -> (m/2):m -> (m/4):m -> ... -> n:m in equal stages; log2(m/n) + 1 of them for powers of two."""

    def stages(self, n: int, m: int) -> list[tuple[int, int]]:
        """The patterns in their order; for 1:16: 15:16, 8:16, 4:16, 2:16, 1:16."""
        halves = [m // 2**k for k in range(1, m.bit_length()) if m // 2**k > n]
        return [(kept, m) for kept in dict.fromkeys([max(m - 1, n), *halves, n])]

    def flow(self, s: int, n: int, m: int) -> Rule:
        return _stage(self.stages(n, m), s / self.decaying, self.grad_mode)


@dataclass(frozen=True)
class SDGFGeometric(Progressive):
    """kn:km for each k of `blocks`, the last of which is 1: the density stays, the freedom shrinks.

    The largest block must divide every axis: blocks (8, 4, 2, 1) of 1:16 need channels in multiples of 128.
    """

    blocks: tuple[int, ...] = (8, 4, 2, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if list(self.blocks) != sorted(set(self.blocks), reverse=True) or self.blocks[-1:] != (1,):
            raise ValueError(f"SDGFGeometric: got blocks {self.blocks}; expected falling numbers that end in 1")

    def widest(self, m: int) -> int:
        return self.blocks[0] * m

    def flow(self, s: int, n: int, m: int) -> Rule:
        return _stage([(k * n, k * m) for k in self.blocks], s / self.decaying, self.grad_mode)


@dataclass(frozen=True)
class Gradual(Recipe):
    """Gradual magnitude pruning (Zhu and Gupta, arXiv 1710.01878, equation 1) with ceil(m (1 - s_t)) kept of every m.

    s_t = s_f (1 - (1 - (t - start) / (end - start))^3), s_f = 1 - n/m, taken every `every` steps. A weight that is
    pruned stays pruned and gets no gradient. Raises ValueError for start >= end or every < 1.
    """

    end: int
    start: int = 0
    every: int = 1

    def __post_init__(self) -> None:
        if not (0 <= self.start < self.end and self.every >= 1):
            raise ValueError(
                f"Gradual: got steps {self.start} to {self.end}, every {self.every}; expected 0 <= start < end and "
                "every >= 1"
            )

    def sparsity(self, step: int, n: int, m: int) -> float:
        """s_t, from 0 to 1 - n/m."""
        if step >= self.end:
            return 1 - n / m
        passed = max(0, step - self.start) // self.every * self.every / (self.end - self.start)
        return (1 - n / m) * (1 - (1 - passed) ** 3)

    def rule(self, step: int, n: int, m: int) -> Rule:
        # rounding errors of s_t must not push a whole number over its ceiling
        kept = n if step >= self.end else max(n, math.ceil(m * (1 - self.sparsity(step, n, m)) - 1e-9))
        return Rule(kept, m, grad_mode="scaled")

    def masks(self, weight: Tensor, rule: Rule, axis: Axis, step: int, previous: Masks | None) -> Masks:
        alive = weight.detach() if previous is None else weight.detach() * previous.kept
        return Masks(largest(alive, rule.n, rule.m, axis, rule.vector))


def _stage(stages: list[tuple[int, int]], share: float, grad_mode: GradMode) -> Rule:
    n, m = stages[min(int(share * len(stages)), len(stages) - 1)]
    return Rule(n, m, grad_mode=grad_mode)
