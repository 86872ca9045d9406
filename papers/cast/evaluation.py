"""What can be checked of CAST without a training of any length, and what is computed from the trained arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.record import Record
from common.training.supervised import Schedule
from papers.cast import experiment, method
from papers.cast.baselines import AST

__all__ = [
    "descent",
    "fold_error",
    "growth",
    "overfull",
    "pollution",
    "power_law",
    "report",
    "shares_of_sizes",
    "step_length",
    "swallowed",
]

# of LLaMA2-7B: its in-block weights have a mean magnitude of 0.0067 (counted by an independent rerun of CAST)
LLAMA_MAGNITUDE = 0.0067
LLAMA_STEPS = {"decay": 4e-7, "rate": 2e-5}  # lambda and the learning rate


def report(record: Record, arm: str, pattern: str, seed: int, found: Mapping[str, Any]) -> None:
    """Record what `experiment.make` measured of an arm at a pattern."""
    where = {"variant": f"{arm}/{pattern}", "seed": seed}
    record.metric("perplexity", found["perplexity"], **where)
    if found["second"] is not None:
        record.metric("second_perplexity", found["second"], **where)
    if found.get("remaining"):
        record.metric("remaining", found["remaining"][-1][1], **where)
    if "before" in found:
        record.metric("pruning_change", found["perplexity"] / found["before"] - 1, **where)


def power_law(gaps: Sequence[float]) -> float:
    """Of gaps at budgets in geometric steps: g_2^2 / (g_1 g_3), which is 1 on every power law, for the last three."""
    first, middle, last = gaps[-3:]
    return middle * middle / (first * last)


def llama_like(count: int = 1 << 14) -> Tensor:
    """Normal weights [count / 4, 4] of LLaMA2-7B's mean magnitude."""
    weight = torch.randn(count // 4, 4, generator=torch.Generator().manual_seed(0))
    return weight * LLAMA_MAGNITUDE / weight.abs().mean()


def swallowed(dtype: torch.dtype, amount: float) -> float:
    """Share of LLaMA-like weights that stay what they are when `amount` is taken off their magnitude in `dtype`."""
    weight = llama_like().to(dtype)
    return (weight - amount * weight.sign() == weight).double().mean().item()


def step_length(optimizer: str, *, steps: int) -> float:
    """Root mean square of the last of `steps` updates under a gradient of pure noise, in learning rates; no pull."""
    draw = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(64, 64, generator=draw))
    kinds = {
        "adam": lambda: torch.optim.Adam([weight], lr=1e-3, betas=(0.9, 0.999)),
        "adams": lambda: method.AdamS([weight], lr=1e-3, decay=0.0, steps=10**9, n=2, m=4),
    }
    made, before = kinds[optimizer](), weight.detach().clone()
    for _ in range(steps):
        weight.grad = torch.randn(weight.shape, generator=draw)
        before = weight.detach().clone()
        made.step()
    return ((weight.detach() - before).square().mean().sqrt() / 1e-3).item()


def overfull(weights: Sequence[Tensor], n: int, m: int, ties: method.Ties) -> float:
    """Share of groups that keep more than n, of weights [O, K] in bfloat16, where equal magnitudes are common."""
    kept = [method.mask(w.bfloat16(), n, m, ties=ties).unflatten(-1, (-1, m)).sum(-1) for w in weights]
    return torch.cat([part.flatten() for part in kept]).gt(n).double().mean().item()


def growth(*, released: bool) -> float:
    """Mean change of |theta| of pruned weights in one AST update at full pull without a gradient, in learning rates."""
    weight = nn.Parameter(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)))
    before = weight.detach().clone()
    optimizer = AST([weight], lr=1e-3, decay=1e-4, steps=1, n=2, m=4, released=released)
    optimizer.state[weight].update(
        step=1, mean=torch.zeros_like(before), square=torch.zeros_like(before), kept=method.mask(before, 2, 4)
    )
    weight.grad = torch.zeros_like(before)
    optimizer.step()
    change = weight.detach().abs() - before.abs()
    return (change[~optimizer.kept(weight)].mean() / 1e-3).item()


def pollution() -> float:
    """Largest entry of AdamS's running mean after 50 steps without gradient, while the pull moves the weights."""
    weight = nn.Parameter(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))
    optimizer = method.AdamS([weight], lr=1e-3, decay=1.0, steps=50, n=2, m=4)
    for _ in range(50):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    return optimizer.state[weight]["mean"].abs().max().item()


def fold_error(pattern: tuple[int, int] = (2, 4), *, groups: int = 2) -> tuple[float, float]:
    """Fold random factors into a pruned layer: the largest change of its output, and the zeros that came back."""
    n, m = pattern
    torch.manual_seed(0)
    layers = {"layer": nn.Linear(32, 24)}
    method.scale_(layers, m, groups)
    layer, x = layers["layer"], torch.randn(64, 32)
    with torch.no_grad():
        layer.parametrizations.weight[0].scale.uniform_(0.5, 2.0)  # type: ignore[union-attr]
        raw = method.raw(layer)
        raw.mul_(method.mask(raw, n, m))
        before = layer(x)
        masks = method.finalize_(layers, n, m)
        revived = (layer.weight[~masks["layer"]] != 0).double().mean().item()
        return (layer(x) - before).abs().max().item(), revived


def descent(share: str, *, steps: int = 400, headroom: float = 4.0) -> tuple[list[float], float]:
    """AdamS on weights whose gradient is noise of lambda's size: mean |theta| of the pruned after each step, and lr.

    share    `constant` or `cosine` learning rate; in both the rate is such that pruned weights can move by `headroom`
             times the mean magnitude
    """
    draw = torch.Generator().manual_seed(0)
    weight, decay = nn.Parameter(torch.randn(32, 64, generator=draw)), 1e-3
    shares = {"constant": lambda step: 1.0, "cosine": Schedule(steps).share}[share]
    rate = headroom * weight.detach().abs().mean().item() / method.reach(shares, steps)
    optimizer = method.AdamS([weight], lr=rate, decay=decay, steps=steps, n=2, m=4, betas=(0.9, 0.99))
    path = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * shares(step)
        weight.grad = decay * torch.randn(weight.shape, generator=draw)
        optimizer.step()
        path.append(weight.detach()[~method.mask(weight, 2, 4)].abs().mean().item())
    return path, rate


def shares_of_sizes(counts: Sequence[int]) -> tuple[list[float], list[float]]:
    """Centres of `experiment.BINS` and the share of weights in each."""
    centres = (experiment.BINS[1:] + experiment.BINS[:-1]) / 2
    total = sum(counts)
    return centres.tolist(), [count / total for count in counts]
