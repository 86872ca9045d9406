r"""Progressive gradient flow (Bambhaniya et al., CPAL 2025, arXiv 2402.04744).

An N:M network keeps N of every M weights. SR-STE decides anew in every step which ones, and passes the gradient of the
sparse network on to all weights. At high sparsity most of the weights are pruned, and what they are told is mostly
noise: the gradient at a place that the forward pass did not use. The remedy: let them take part at first, and less and
less, until the hard mask is all that is left.

symbol  name here  shape     meaning
W       weight     [O, I]    dense weights, all of them trained
E       kept       [O, I]    1 for the n largest |W| of every m along I, sought again in every step
W~      sparse     [O, I]    what the forward pass uses
n, d, f total, dense, fine_tune   steps: all, the first ones with W~ = W, the last ones with W~ = E W
s       s          0..S-1    steps since the dense phase ended; S = n - d - f
beta    beta       0..1      what a pruned weight still counts
c       c          1/step    how fast beta falls

    W~ = [E + beta(s) (1 - E)] W                                              (1) mask decay, MDGF
    beta(s) = max(0, 1 - c s)                                                 (2) linear
    beta(s) = exp(-c s)                                                       (3) exponential
    W~ = E_{n_k:m_k} W in stage k of equal length                             (4) structure decay, SDGF
    (n_k:m_k) = (m-1):m, (m/2):m, (m/4):m, ..., n:m                           (5) stepwise
    (n_k:m_k) = 8n:8m, 4n:4m, 2n:2m, n:m                                      (6) geometric
    W <- W - gamma g * dL/dW~,   g = 1, or g = E + beta (1 - E)               (7) `ste`, or `scaled`

The paper's text was not at hand: (1)-(6) are as its authors' code and documentation have them [code], the equation
numbers are ours. In (7) the code has g = 1 and asks itself in a comment whether that is right; differentiating (1)
gives the other. The schedules themselves are in `common/sparsity/flows.py`, because other papers use them too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from common.sparsity import (
    SRSTE,
    Dense,
    MDGFExponential,
    MDGFLinear,
    Recipe,
    Rule,
    SDGFGeometric,
    SDGFStepwise,
)
from kernels import nm

DECAYED = 11.0  # c S of the published exponential run: 1e-4 a step for 350 epochs of ImageNet at batch 4096 [code]
SR_STE_DECAY = 2e-4  # lambda of the baseline [code]

# ------------------------------------------------------------------------------------------------------ the equations


def sparse(weight: Tensor, kept: Tensor, beta: float) -> Tensor:
    """(1) W~: kept weights as they are, the others times beta."""
    return torch.where(kept, weight, beta * weight)


def linear(s: int, c: float) -> float:
    """(2) beta of the linear flow."""
    return max(0.0, 1 - c * s)


def exponential(s: int, c: float) -> float:
    """(3) beta of the exponential flow."""
    return math.exp(-c * s)


def stepwise(n: int, m: int) -> list[tuple[int, int]]:
    """(5) The patterns of the stepwise flow; log2(m/n) + 1 of them where m/n is a power of two."""
    halves = [m // 2**k for k in range(1, m.bit_length())]
    return [(kept, m) for kept in (m - 1, *halves) if kept > n] + [(n, m)]


def geometric(n: int, m: int, blocks: Iterable[int] = (8, 4, 2, 1)) -> list[tuple[int, int]]:
    """(6) The patterns of the geometric flow."""
    return [(k * n, k * m) for k in blocks]


def stage(patterns: list[tuple[int, int]], s: int, steps: int) -> tuple[int, int]:
    """(4) The pattern of step s of S: stages of equal length."""
    return patterns[s * len(patterns) // steps]


def update(weight: Tensor, kept: Tensor, gradient: Tensor, *, rate: float, beta: float, grad_mode: str) -> Tensor:
    """(7) The next W, for the gradient dL/dW~."""
    if grad_mode == "scaled":
        gradient = torch.where(kept, gradient, beta * gradient)
    return weight - rate * gradient


# ---------------------------------------------------------------------------------------------------- what is compared


@dataclass(frozen=True)
class ReleasedStepwise(SDGFStepwise):
    """The stepwise flow as the released code places its stages, which is not as its comments describe.

    Described: (n - d - f) steps in log2(m/n) + 1 equal frames, 15:16, 8:16, 4:16, 2:16 and 1:16. Released: their length
    is (n - d - f) / log2(m/n), so the last frame, the only one at n:m, begins when the training is over [code].
    """

    def flow(self, s: int, n: int, m: int) -> Rule:
        patterns = self.stages(n, m)
        n_k, m_k = patterns[s * (len(patterns) - 1) // self.decaying]
        return Rule(n_k, m_k, grad_mode=self.grad_mode)


class Schedule(NamedTuple):
    """The phases of a training and its hyper-parameters.

    exponent  c S of the exponential flow; the linear one falls at c S = exponent / 2, so that both let as much of the
              pruned weights pass: the areas under (2) and (3) are 1 / (2c) and (1 - exp(-c S)) / c
    """

    total: int
    dense: int = 0
    fine_tune: int = 0
    exponent: float = DECAYED
    blocks: tuple[int, ...] = (8, 4, 2, 1)


def recipes(schedule: Schedule) -> dict[str, Recipe]:
    """Every way of training that is compared, by name."""
    phases = {"total": schedule.total, "dense": schedule.dense, "fine_tune": schedule.fine_tune}
    steps = schedule.total - schedule.dense - schedule.fine_tune
    exponential = MDGFExponential(**phases, c=schedule.exponent / steps)
    stepwise = SDGFStepwise(**phases)
    return {
        "dense": Dense(),
        "sr_ste": SRSTE(SR_STE_DECAY),
        "linear": MDGFLinear(**phases, c=schedule.exponent / 2 / steps),
        "exponential": exponential,
        "stepwise": stepwise,
        "geometric": SDGFGeometric(**phases, blocks=schedule.blocks),
        "exponential_scaled": replace(exponential, grad_mode="scaled"),
        "stepwise_scaled": replace(stepwise, grad_mode="scaled"),
        "stepwise_released": ReleasedStepwise(**phases),
    }


def share_of_dense(recipe: Recipe, n: int, m: int, steps: int) -> float:
    """The products that a training of sparse layers takes, over those of dense ones: mean of (2 rho_s + 1) / 3.

    rho_s = n_s/m_s is the density of step s. Forward pass and input gradient skip what is zero; the gradient of the
    weights is dense, because pruned ones need it too. While beta > 0 nothing is zero and nothing is saved.
    """
    rules = [recipe.rule(step, n, m) for step in range(steps)]
    densities = [1.0 if rule.beta > 0 else rule.n / rule.m for rule in rules]
    return (2 * sum(densities) / steps + 1) / 3


# --------------------------------------------------------------------------------------------------- the plainest use


class Fitted(NamedTuple):
    """What `fit_linear` leaves: the dense weights [O, K], the last mask n:m, and after each step the mask n:m."""

    weight: Tensor
    kept: Tensor
    choices: list[Tensor]


def fit_linear(
    batches: Iterable[tuple[Tensor, Tensor]],
    weight: Tensor,
    beta: Callable[[int], float],
    *,
    n: int,
    m: int,
    rate: float,
    decay: float = 0.0,
    grad_mode: str = "ste",
) -> Fitted:
    """Mask decay on one linear layer, from nothing but the equations: y = x W~^T with the mean squared error.

    batches: inputs [B, K] and targets [B, O]; weight [O, K] to start from; beta by step, where 0 gives STE and, with
    decay > 0, SR-STE. One batch a step, plain gradient descent at the given rate.
    """
    choices = []
    for step, (x, y) in enumerate(batches):
        kept = nm.mask(weight, n, m)
        gradient = 2 * (x @ sparse(weight, kept, beta(step)).T - y).T @ x / y.numel()
        gradient = gradient + decay * ~kept * weight
        weight = update(weight, kept, gradient, rate=rate, beta=beta(step), grad_mode=grad_mode)
        choices.append(nm.mask(weight, n, m))
    return Fitted(weight, nm.mask(weight, n, m), choices)
