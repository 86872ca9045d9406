"""Measurements beside the trainings: one linear layer whose right mask is known, and exact properties of recipes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from common import seeds
from common.data.images import shuffled_batches
from common.data.planted import Planted, planted
from common.sparsity import MDGFExponential, NMConfig, sparsify_
from papers.progressive_gradient_flow import method

TEACHER = {"inputs": 64, "outputs": 32, "samples": 2000, "noise": 0.3, "correlation": 0.5}
PATTERN, STEPS, BATCH, RATE = (1, 16), 200, 32, 0.5
ONE_LAYER = ("ste", "linear", "exponential")


def teacher(seed: int) -> Planted:
    """A linear layer [32, 64] that is exactly 1:16, seen through 2000 noisy examples."""
    return planted(*PATTERN, **TEACHER, seed=seed)


def one_layer(problem: Planted, seed: int, flow: str) -> list[float]:
    """The share of the teacher's places that the mask has found after each step, by `method.fit_linear`."""
    c = method.DECAYED / STEPS
    beta = {
        "ste": lambda s: 0.0,
        "linear": lambda s: method.linear(s, c / 2),
        "exponential": lambda s: method.exponential(s, c),
    }[flow]
    n, m = PATTERN
    fitted = method.fit_linear(_batches(problem, seed), _start(seed), beta, n=n, m=m, rate=RATE)
    return [problem.recovered(kept) for kept in fitted.choices]


def difference_to_layers(grad_mode: str, seed: int = 0) -> float:
    """The largest difference of any weight between the equations and the sparse layers, after the same training.

    In float64, so that the order of sums does not decide between two weights.
    """
    problem, c = teacher(seed), method.DECAYED / STEPS
    n, m = PATTERN
    layer = nn.Linear(64, 32, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(_start(seed))
    recipe = MDGFExponential(STEPS, c=c, grad_mode=grad_mode)  # pyright: ignore[reportArgumentType]
    handle = sparsify_(layer, NMConfig(n, m, where=lambda name, module: True, recipe=recipe))
    optimizer = torch.optim.SGD(layer.parameters(), RATE)
    wide = [(x.double(), y.double()) for x, y in _batches(problem, seed)]
    for x, y in wide:
        optimizer.zero_grad()
        nn.functional.mse_loss(layer(x), y).backward()
        optimizer.step()
        handle.step()
    found = method.fit_linear(
        wide, _start(seed).double(), lambda s: method.exponential(s, c), n=n, m=m, rate=RATE, grad_mode=grad_mode
    )
    return float((layer.weight.detach() - found.weight).abs().max())


def pruned_gradient(beta: float, grad_mode: str) -> float:
    """The norm of the gradient that the pruned weights of one small layer get at this beta."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    recipe = MDGFExponential(100, c=-math.log(beta), grad_mode=grad_mode)  # pyright: ignore[reportArgumentType]
    handle = sparsify_(layer, NMConfig(*PATTERN, where=lambda name, module: True, recipe=recipe))
    handle.step()  # s = 1, at which the flow has the beta that is asked for
    layer(torch.randn(16, 64)).square().mean().backward()
    assert layer.weight.grad is not None
    return float(layer.weight.grad[~handle.masks()[""]].norm())


def half_life(c: float) -> int:
    """The first step at which the exponential flow lets less than half of a pruned weight pass."""
    return math.floor(math.log(2) / c) + 1


def _batches(problem: Planted, seed: int) -> list[tuple[Tensor, Tensor]]:
    draw = seeds.generator(seed, "planted batches")
    chosen = shuffled_batches(len(problem.inputs), BATCH, STEPS, draw)
    return [(problem.inputs[index], problem.targets[index]) for index in chosen]


def _start(seed: int) -> Tensor:
    return torch.randn(32, 64, generator=seeds.generator(seed, "start")) / 8
