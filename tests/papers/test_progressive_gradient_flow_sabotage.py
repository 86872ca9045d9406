"""Every claim on progressive gradient flow can be turned by a one-line change of the method or the data.

What can be run exactly or in seconds is run. Claims about long trainings go through the same scoring and judging with
networks of a known quality: an arm's network is right on a given share of the images, or gives the next character a
given probability, and the sabotage takes away what names the arm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from common import claims
from common import params as parameters
from common.models.gpt import perplexity
from common.paths import root
from common.sparsity import GradientVariance, NMConfig, Sparsity, sparsify_
from common.testing import assert_sabotage_turns
from common.training import accuracy
from papers.progressive_gradient_flow import data, evaluation, experiment, method
from papers.progressive_gradient_flow.settings import Params

CLAIMS = {claim.id: claim for claim in claims.load(root() / "papers/progressive_gradient_flow/claims.yaml")}
SEEDS, STEPS = (0, 1, 2, 3, 4), 1000
# Share of the images that each arm gets right; values that suit the claims' honest side, not measurements.
RIGHT = {"sr_ste": 0.40, "linear": 0.41, "exponential": 0.43, "stepwise": 0.43, "geometric": 0.41}
RIGHT |= {"exponential_scaled": 0.40, "stepwise_scaled": 0.40, "stepwise_released": 0.35, "sr_ste_long": 0.41}


def seeded(values: list[float]) -> dict[str, float]:
    return {str(seed): value for seed, value in zip(SEEDS, values, strict=True)}


# ---------------------------------------------------------------------------------------------------- run as they are


def stages(patterns: list[tuple[int, int]]) -> dict:
    return {"stages": {"stepwise": {"all": len(patterns)}}}


def final_share(name: str, arm: str) -> dict:
    recipe = method.recipes(method.Schedule(STEPS))[arm]
    rules = [recipe.rule(step, 1, 16) for step in range(STEPS)]
    return {"final_share": {name: {"all": sum((rule.n, rule.m) == (1, 16) for rule in rules) / STEPS}}}


def half_life(c: float) -> dict:
    return {"half_life_steps": {"": {"all": evaluation.half_life(c)}}}


def pruned_gradients(scaled: str) -> dict:
    modes = {"ste": "ste", "scaled": scaled}
    return {"pruned_gradient": {k: {"all": evaluation.pruned_gradient(0.05, mode)} for k, mode in modes.items()}}


def differences() -> dict:
    return {"difference": {mode: {"all": evaluation.difference_to_layers(mode)} for mode in ("ste", "scaled")}}


def differences_without_scaling() -> dict:
    def unscaled(weight: Tensor, kept: Tensor, gradient: Tensor, *, rate: float, beta: float, grad_mode: str) -> Tensor:
        return weight - rate * gradient

    with mock.patch.object(method, "update", unscaled):
        return differences()


def exact() -> dict:
    small = parameters.load(Params, "progressive_gradient_flow", "smoke")
    params = dataclasses.replace(small, steps=4, batch=8)
    return {
        "exact": {"": {"all": experiment.train(params, data.image_task(params), "exponential", "1:16", 0)["exact"]}}
    }


def exact_without_pruning() -> dict:
    remove = Sparsity.remove
    with mock.patch.object(Sparsity, "remove", lambda self, keep: remove(self, keep="dense")):
        return exact()


def share(name: str, arm: str, **schedule: int) -> dict:
    recipe = method.recipes(method.Schedule(STEPS, **schedule))[arm]
    return {"share_of_dense": {f"{name}/1:16": {"all": method.share_of_dense(recipe, 1, 16, STEPS)}}}


def noise(exponential: float) -> dict:
    """Gradient variance as the probe measures it, of gradients with a given noise at pruned places."""
    found: dict[str, list[float]] = {"sr_ste/1:16": [], "exponential/1:16": []}
    for name, level in zip(found, (1.0, exponential), strict=True):
        for seed in SEEDS:
            torch.manual_seed(seed)
            layer = nn.Linear(64, 64)
            handle = sparsify_(layer, NMConfig(1, 16, where=lambda name, module: True))
            probe = GradientVariance(handle)
            layer.weight.grad = level * torch.randn(64, 64)
            handle.step()
            found[name].append(probe.average("pruned", rate=0.0)[0])
    return {"gradient_variance": {name: seeded(values) for name, values in found.items()}}


# ------------------------------------------------------------------------------------------------ at a known quality


class Known(nn.Module):
    """Right on a share of its inputs, which are the labels themselves; a class beside it otherwise."""

    def __init__(self, right: float, seed: int):
        super().__init__()
        self.right, self.seed = nn.Parameter(torch.tensor(right)), seed

    def forward(self, labels: Tensor) -> Tensor:
        draw = torch.Generator().manual_seed(self.seed)  # which images: the same for all arms of a seed
        wrong = torch.rand(len(labels), generator=draw) >= self.right
        return nn.functional.one_hot((labels + wrong) % 10, 10).float()


def top1(right: float) -> dict[str, float]:
    labels = torch.arange(20_000) % 10
    return seeded([accuracy(Known(right, seed), [(labels, labels)]) for seed in SEEDS])


def arms(pattern: str = "1:16", **sabotaged: float) -> dict:
    return {"top1": {f"{arm}/{pattern}": top1(right) for arm, right in (RIGHT | sabotaged).items()}}


def dense(right: float, sparse: float = 0.4) -> dict:
    return {"top1": {"dense": top1(right), "exponential/1:32": top1(sparse)}}


def by_pattern(leads: list[float]) -> dict:
    found = {}
    for pattern, lead in zip(("1:4", "1:8", "1:16", "1:32"), leads, strict=True):
        found |= {f"sr_ste/{pattern}": top1(0.4), f"exponential/{pattern}": top1(0.4 + lead)}
    return {"top1": found}


def close(pattern: str, apart: float) -> dict:
    return arms(pattern, exponential=RIGHT["sr_ste"] + apart)


class Speaker(nn.Module):
    """Gives the token that comes, one more than the last, a given probability, and the others the same share."""

    def __init__(self, probability: float):
        super().__init__()
        self.probability = nn.Parameter(torch.tensor(probability))

    def forward(self, tokens: Tensor) -> Tensor:
        right = nn.functional.one_hot((tokens + 1) % 10, 10)
        return torch.where(right > 0, self.probability, (1 - self.probability) / 9).log()


def perplexities(**probabilities: float) -> dict:
    found = {}
    for arm, probability in probabilities.items():
        values = [
            perplexity(Speaker(probability - 0.01 * seed), torch.arange(seed, 500) % 10, context=20) for seed in SEEDS
        ]
        found[f"{arm}/1:16"] = seeded(values)
    return {"perplexity": found}


def turned(arm: str, rival: str, pattern: str = "1:16") -> Callable[[], tuple[dict, dict]]:
    """The sabotage makes an arm what it would be without the part it is named for: no better than its rival."""
    return lambda: (arms(pattern), arms(pattern, **{arm: RIGHT[rival]}))


SABOTAGE: dict[str, Callable[[], tuple[dict, dict]]] = {
    # exact
    "stepwise-has-five-stages": lambda: (stages(method.stepwise(1, 16)), stages(method.geometric(1, 16))),
    "described-last-stage": lambda: (final_share("stepwise", "stepwise"), final_share("stepwise", "stepwise_released")),
    "released-last-stage-never-comes": lambda: (
        final_share("stepwise_released", "stepwise_released"),
        final_share("stepwise_released", "stepwise"),
    ),
    "half-life": lambda: (half_life(1e-4), half_life(2e-4)),
    "scaled-gradient-is-beta-times": lambda: (pruned_gradients("scaled"), pruned_gradients("ste")),
    "layers-follow-the-equations": lambda: (differences(), differences_without_scaling()),
    "every-group-keeps-n": lambda: (exact(), exact_without_pruning()),
    "mask-decay-saves-nothing": lambda: (share("exponential", "exponential"), share("exponential", "linear")),
    "stepwise-saves": lambda: (share("stepwise", "stepwise"), share("stepwise", "stepwise", dense=STEPS // 2)),
    "less-gradient-noise": lambda: (noise(exponential=0.8), noise(exponential=1.0)),
    "less-gradient-noise-small": lambda: (noise(exponential=0.8), noise(exponential=1.0)),
    # at a known quality
    "learned": lambda: (dense(0.4), dense(0.1)),
    "sparsity-costs-accuracy": lambda: (dense(0.45), dense(0.45, sparse=0.45)),
    "exponential-over-srste-1-16": turned("exponential", "sr_ste"),
    "exponential-over-srste-1-16-small": turned("exponential", "sr_ste"),
    "exponential-over-srste-1-32": turned("exponential", "sr_ste", "1:32"),
    "exponential-over-srste-1-32-small": turned("exponential", "sr_ste", "1:32"),
    "stepwise-over-srste-1-16": turned("stepwise", "sr_ste"),
    "advantage-grows-with-sparsity": lambda: (by_pattern([0, 0.01, 0.02, 0.03]), by_pattern([0.02] * 4)),
    "parity-2-4": lambda: (close("2:4", 0.002), close("2:4", 0.02)),
    "parity-2-4-small": lambda: (close("2:4", 0.002), close("2:4", 0.02)),
    "parity-1-4-small": lambda: (close("1:4", 0.002), close("1:4", 0.02)),
    "exponential-at-equal-products": turned("exponential", "sr_ste_long"),
    "exponential-over-linear": lambda: (arms(), arms(exponential=RIGHT["linear"] - 0.01)),
    "stepwise-over-geometric": turned("stepwise", "geometric"),
    "described-beats-released": turned("stepwise", "stepwise_released"),
    "ste-over-scaled-exponential": turned("exponential", "exponential_scaled"),
    "ste-over-scaled-stepwise": turned("stepwise", "stepwise_scaled"),
    "language-gain": lambda: (perplexities(sr_ste=0.5, exponential=0.6), perplexities(sr_ste=0.5, exponential=0.5)),
    "language-gain-small": lambda: (
        perplexities(sr_ste=0.5, exponential=0.6),
        perplexities(sr_ste=0.5, exponential=0.5),
    ),
}


def test_every_claim_has_a_sabotage():
    assert set(SABOTAGE) == set(CLAIMS)


@pytest.mark.parametrize("name", SABOTAGE)
def test_sabotage_turns_the_verdict(name):
    assert_sabotage_turns(CLAIMS[name], *SABOTAGE[name]())
