"""What a training step does with an N:M weight, and who decides it.

    forward   W~ = f * W,  f = E + beta (1 - E)            E: the mask, 1 where a weight is kept
    backward  dW = g * dL/dW~ + lambda (1 - E) W           g = 1 (`ste`) or f (`scaled`)

A `Recipe` gives for every step the `Rule` (N:M, beta, lambda, g) and finds the masks. The recipes themselves are in
`recipes.py` and `flows.py`.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor

from kernels import nm

Axis = Literal["in", "out"]
GradMode = Literal["ste", "scaled"]
DIMENSION: dict[Axis, int] = {"out": 0, "in": 1}  # of a Linear's weight [O, I] and of a Conv2d's [O, I, kh, kw]


@dataclass(frozen=True)
class Rule:
    """One step's numbers: n of every m are kept (n = m: a dense layer), `beta`, `decay` (lambda) and g.

    `both_axes`: the weight of the input gradient is n:m along the axis that this product contracts.
    `vector`: rows that keep the same columns; the handle sets it.
    """

    n: int
    m: int
    beta: float = 0.0
    decay: float = 0.0
    grad_mode: GradMode = "ste"
    both_axes: bool = False
    vector: int = 1

    @property
    def dense(self) -> bool:
        """Whether there is no mask at all."""
        return self.n == self.m


class Masks(NamedTuple):
    """The masks of one weight, of its shape: `kept` (E) of the forward pass; `back` of the input gradient where that
    differs; `order` a permutation of the output channels that `back` was found in (Bi-Mask)."""

    kept: Tensor
    back: Tensor | None = None
    order: Tensor | None = None


class Recipe(abc.ABC):
    """How a sparse layer is trained. Subclasses are frozen dataclasses, so that a recipe can be printed and compared.

    `both_axes`: it groups the weights along both axes, so m must divide both.
    """

    both_axes: ClassVar[bool] = False

    @abc.abstractmethod
    def rule(self, step: int, n: int, m: int) -> Rule:
        """What step `step` (from 0) does on the way to n:m."""

    def widest(self, m: int) -> int:
        """The longest group it ever uses, which has to divide the axis: m, unless a schedule begins with longer."""
        return m

    def masks(self, weight: Tensor, rule: Rule, axis: Axis, step: int, previous: Masks | None) -> Masks:
        """The masks of a weight [O, I] or [O, I, kh, kw]: here the n largest magnitudes of every m along the axis."""
        return Masks(largest(weight, rule.n, rule.m, axis, rule.vector))


def largest(weight: Tensor, n: int, m: int, axis: Axis, vector: int = 1) -> Tensor:
    """The mask that keeps the n largest magnitudes of every m channels along an axis, at each kernel position; or their
    largest sums over vectors of rows."""
    return nm.mask(weight.detach(), n, m, DIMENSION[axis], vector=vector)


def other(axis: Axis) -> Axis:
    """The other of the two axes."""
    return "out" if axis == "in" else "in"
