"""SR-STE: learning N:M fine-grained structured sparse networks from scratch (Zhou et al., ICLR 2021, arXiv 2102.04010).

Of every M neighbouring weights only the N largest are used. Which ones is decided anew in every step, so that a weight
that was left out can come back; for that, all weights must go on being trained. The straight-through estimator (STE)
does so by giving every weight the gradient of the *sparse* network. For weights that are left out this is a wrong
gradient, and the choice flickers. SR-STE adds one term that pulls the left-out weights, and them alone, towards zero.

Sources: the abstract, the authors' code (no licence, read and not copied) and their answers in its issues. The paper's
full text was not at hand, so equations are numbered here and not as there.

symbol    name here   shape                  meaning
W         weight      [O, K] [O, I, kh, kw]  dense weights, all of them trained
E         kept        as W, bool             1 for the n largest |W| of every group of m
W~        sparse      as W                   E * W, what the forward and the backward pass use
g         gradient    as W                   dL/dW~
gamma     rate                               learning rate
lambda_W  decay                              pull on the weights that are left out; 0 is STE, 2e-4 as published

    W~ = E(W) * W                                          (1) forward
    W <- W - gamma g                                       (2) STE
    W <- W - gamma (g + lambda_W (1 - E) * W)              (3) SR-STE
    SAD(i, j) = |E_j - E_i|_1                              (4) sparse architecture divergence: places that differ
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.sparsity import SRSTE, STE, Masks, Recipe, Rule
from common.sparsity.rules import Axis
from kernels import nm

PUBLISHED_DECAY = 2e-4  # lambda_W of all published runs: SGD, 120 epochs of ImageNet, learning rate 0.1 [code]

# ------------------------------------------------------------------------------------------------ the four equations


def choose(weight: Tensor, n: int, m: int) -> Tensor:
    """E: of every m neighbours along the input channels the n largest magnitudes; bool of the weight's shape."""
    return nm.mask(weight, n, m, dim=1)


def sparse(weight: Tensor, kept: Tensor) -> Tensor:
    """(1) W~."""
    return weight * kept


def ste(weight: Tensor, gradient: Tensor, *, rate: float) -> Tensor:
    """(2) The next W: every weight follows the gradient of the sparse network, also those it does not use."""
    return weight - rate * gradient


def sr_ste(weight: Tensor, kept: Tensor, gradient: Tensor, *, rate: float, decay: float) -> Tensor:
    """(3) The next W: as (2), and what is left out shrinks by the factor 1 - gamma lambda_W.

    A weight that shrinks has to earn its way back against a growing distance, so the choice settles. The term belongs
    to the gradient: momentum and weight decay come after it [code].
    """
    return weight - rate * (gradient + decay * (~kept * weight))


def sad(before: Tensor, after: Tensor) -> int:
    """(4) The number of places that two choices of one shape do not share."""
    return int((before ^ after).sum())


# --------------------------------------------------------------------------------------------------- the plainest use


@dataclass(frozen=True)
class LinearRun:
    """What a training of `fit_linear` leaves behind: the dense weight [O, K], the last E, and E after every step."""

    weight: Tensor
    kept: Tensor
    choices: list[Tensor]

    @property
    def flips(self) -> float:
        """Changes of the choice from step to step, all steps together, for each weight."""
        steps = zip(self.choices, self.choices[1:], strict=False)
        return sum(sad(before, after) for before, after in steps) / self.weight.numel()


def fit_linear(
    weight: Tensor, batches: Iterable[tuple[Tensor, Tensor]], n: int, m: int, *, rate: float, decay: float
) -> LinearRun:
    """Least squares with an N:M weight, y = W~ x, by (1) and (3) with nothing between the reader and them.

    weight: the start [O, K]; batches of inputs [B, K] and targets [B, O]. L is half the squared error a sample, so
    g = (W~ x - y) x^T / B. decay = 0 is (2).
    """
    choices = [choose(weight, n, m)]
    for inputs, targets in batches:
        kept = choices[-1]
        error = inputs @ sparse(weight, kept).T - targets  # [B, O]
        gradient = error.T @ inputs / len(inputs)  # [O, K]
        weight = sr_ste(weight, kept, gradient, rate=rate, decay=decay)
        choices.append(choose(weight, n, m))
    return LinearRun(weight, choices[-1], choices)


# ------------------------------------------------------------------------------------------------ recipes for networks
# In networks autograd carries g. `common.sparsity` has (1) and (3) as layers, because other papers build on them too;
# that those are the equations above is a claim of this paper (`layers-follow-the-equations`).


@dataclass(frozen=True)
class ByPosition(SRSTE):
    """SR-STE with groups along kernel positions: m neighbours of a filter as it lies in memory, which is in the order
    (input channel, row, column), the column running fastest. Linear layers and 1 x 1 kernels are not affected.

    The authors began with these and released groups over channels at one position, our default, which the hardware can
    use. Where m does not divide the kernel's positions, a group reaches into the next input channel.
    """

    def masks(self, weight: Tensor, rule: Rule, axis: Axis, step: int, previous: Masks | None) -> Masks:
        return Masks(nm.mask(weight.detach().flatten(1), rule.n, rule.m).view_as(weight))


@dataclass(frozen=True)
class Watched(Recipe):
    """Dense training that only *notes* the choice: what the mask of an ordinary network would do by itself.

    f = E + beta (1 - E) with beta = 1 is 1 everywhere, so forward pass and gradient are dense.
    """

    def rule(self, step: int, n: int, m: int) -> Rule:
        return Rule(n, m, beta=1.0)


def recipe(name: str, decay: float = PUBLISHED_DECAY) -> Recipe:
    """`dense`, `ste`, `sr_ste` or `by_position`; raises ValueError for another name."""
    known = {"dense": Watched(), "ste": STE(), "sr_ste": SRSTE(decay), "by_position": ByPosition(decay)}
    if name not in known:
        raise ValueError(f"recipe: got {name!r}, expected one of {', '.join(known)}.")
    return known[name]


# ------------------------------------------------------------------------------------------ what the released code does


@dataclass(frozen=True)
class Straddling:
    """Shares of groups that reach over more than one kernel position, and over more than one filter."""

    positions: float
    filters: float


def released_groups(shape: tuple[int, int, int, int], m: int) -> Straddling:
    """How the released code groups a convolution's weight [O, I, kh, kw].

    It takes m neighbours of the whole weight in the order (O, kh, kw, I), whether or not m divides the channels. It
    prunes the stem too, with three input channels: no group of four can lie at one position there.
    Raises ValueError where m does not divide the number of weights.
    """
    out, channels, height, width = shape
    number = torch.arange(out * channels * height * width)
    if len(number) % m:
        raise ValueError(f"released_groups: got {len(number)} weights, expected a multiple of m = {m}.")
    groups = number.view(-1, m)

    def crossing(size: int) -> float:
        block = groups // size
        return (block != block[:, :1]).any(dim=1).float().mean().item()

    return Straddling(crossing(channels), crossing(channels * height * width))
