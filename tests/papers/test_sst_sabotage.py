"""Every claim of SST can be turned by a one-line change of the method or the data.

What is exact is run as it is. Claims that compare long trainings go through the same scoring and judging with models of
a known quality: an arm is a model that gives the next token a given probability, and the sabotage takes away what names
the arm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from common import claims, seeds
from common.models.gpt import perplexity
from common.paths import root
from common.testing import assert_sabotage_turns
from papers.sst import evaluation, experiment, method
from papers.sst.baselines import LowRankLinear

CLAIMS = {claim.id: claim for claim in claims.load(root() / "papers/sst/claims.yaml")}
SEEDS = (0, 1, 2)
ADAM = "adam_difference"
# Probability that each arm gives the token that comes; an order that suits the claims' honest side, no measurement.
RIGHT = {"full": 0.6, "sst": 0.55, "lora": 0.4, "relora": 0.35, "random_start": 0.42, "chosen_sigma": 0.5}
RIGHT |= {"never_again": 0.5, "top": 0.5, "uniform": 0.55, "true_gradient": 0.55}


def everywhere(metric: str, **variants: float) -> dict:
    return {metric: {name: {"all": value} for name, value in variants.items()}}


def seeded(values: list[float]) -> dict[str, float]:
    return {str(seed): value for seed, value in zip(SEEDS, values, strict=True)}


def patched(target: object, name: str, other: object, compute: Callable[[], dict]) -> dict:
    with mock.patch.object(target, name, other):
        return compute()


# ------------------------------------------------------------------------------------------------- run as they are


def distortions() -> dict:
    return everywhere("distortion", **evaluation.distortion())


def without_the_smallest(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """LoRA's way: a decomposition of too low a rank."""
    left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
    sigma[-1] = 0
    return left, sigma, right.mT


def forgetful_swap(self: method.SpectralLinear, *rest: object) -> None:
    """Chooses others and does not put the trained ones back."""
    with torch.no_grad():
        self.chosen.add_(1)
        self.chosen_left.copy_(self.left[:, self.chosen])
        self.chosen_right.copy_(self.right[:, self.chosen])


def orthogonality() -> dict:
    return everywhere("orthogonality_error", **evaluation.orthogonality())


def number(metric: str, value: float) -> dict:
    return everywhere(metric, **{"": value})


class Unenhanced(method.SpectralLinear):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs | {"enhanced": False})


def by_descent() -> dict:
    return patched(
        torch.optim, "Adam", torch.optim.SGD, lambda: number("adam_difference", evaluation.adam_difference())
    )


def dead(kind: str) -> dict:
    return everywhere("dead_share", **{kind: evaluation.dead_share(kind)})  # type: ignore[arg-type]


def both_from_zero(layer: LowRankLinear) -> None:
    """PiSSA's remedy in small: B begins at something."""
    with torch.no_grad():
        layer.base.copy_(layer.weight)
        layer.up.fill_(0.1)


def with_dead_vectors(self: method.SpectralLinear, *rest: object) -> None:
    """Zeros in place of the singular vectors, as ReLoRA* begins."""
    with torch.no_grad():
        self.left.zero_()
        self.chosen_left.zero_()
    self.sigma.data.zero_()


def visited(sampling: str) -> dict:
    sigma, draw = 1 / torch.arange(1.0, 49), seeds.generator(0, "picture")
    rows = {"mixed": sampling, "top": "top"}
    found = {
        name: len({i for turn in range(60) for i in method.choose(sigma, 4, how, turn, draw).tolist()}) / 48  # type: ignore[arg-type]
        for name, how in rows.items()
    }
    return everywhere("visited", **found)


# ------------------------------------------------------------------------------------------------------- counted


def shares(rank: int) -> dict:
    shape = replace(evaluation.LLAMA_1B, rank=rank)
    parts = {"all": evaluation.trained_share(shape), "linear": evaluation.trained_share(shape, linear_only=True)}
    return everywhere("trained_share", **{name: 100 * value for name, value in parts.items()})


def entries(extra: int) -> dict:
    count = {"lora": 128, "sst": 128 + extra, "lora_next": 129}
    kind = {"lora": "lora", "sst": "sst", "lora_next": "lora"}
    found = {name: method.trained(2048, 2048, rank, kind[name]) for name, rank in count.items()}  # type: ignore[arg-type]
    return everywhere("entries", **found)


def gigabytes(sst: str = "sst", lora: str = "lora") -> dict:
    ledgers = {
        name: evaluation.ledger(evaluation.OPT_1B, how)  # type: ignore[arg-type]
        for name, how in {"full": "full", "sst": sst, "lora": lora}.items()
    }
    total = {name: sum(parts.values()) for name, parts in ledgers.items()}
    weights = {name: parts["weights"] for name, parts in ledgers.items()}
    return everywhere("gigabytes", **total) | everywhere("weight_gigabytes", **weights)


def moments(*, of_all: bool) -> dict:
    """What Adam holds after one step; the sabotage trains every vector and counts the chosen ones."""
    layer = method.SpectralLinear(nn.Linear(12, 8), 8 if of_all else 2)
    optimizer = torch.optim.Adam([layer.sigma, layer.chosen_left, layer.chosen_right])
    layer.weight.sum().backward()
    optimizer.step()
    held = sum(v.numel() for state in optimizer.state.values() for v in state.values() if v.ndim)
    return everywhere("moments", sst=held) | everywhere("trained", sst=method.trained(8, 12, 2, "sst"))


def headlines(**changed: dict[str, float]) -> dict:
    table = {name: row for name, row in (evaluation.PRINTED | changed).items() if "lora" in row}
    return everywhere("printed_gap_closed", **{name: 100 * evaluation.gap_closed(row) for name, row in table.items()})


# ------------------------------------------------------------------------------------------------ at a known quality


class Speaker(nn.Module):
    """Gives the token that comes, one more than the last, a given probability, and the others the same share."""

    def __init__(self, probability: float):
        super().__init__()
        self.probability = nn.Parameter(torch.tensor(probability))

    def forward(self, tokens: Tensor) -> Tensor:
        right = nn.functional.one_hot((tokens + 1) % 20, 20)
        return torch.where(right > 0, self.probability, (1 - self.probability) / 19).log()


def scores(right: float) -> list[float]:
    """Perplexities of three seeds on a text in which nine of ten tokens are the ones to expect."""
    found = []
    for seed in SEEDS:
        draw = torch.Generator().manual_seed(seed)
        ordinary = torch.rand(2000, generator=draw) < 0.9
        text = torch.where(ordinary, 1, torch.randint(20, (2000,), generator=draw)).cumsum(0) % 20
        found.append(perplexity(Speaker(right), text, context=20))
    return found


def arms(**sabotaged: float) -> dict:
    return {"perplexity": {name: seeded(scores(right)) for name, right in (RIGHT | sabotaged).items()}}


def better(than: str, arm: str = "sst") -> Callable[[], tuple[dict, dict]]:
    """`arm` is claimed to be better; the sabotage makes it what it would be without its own part."""
    return lambda: (arms(), arms(**{arm: RIGHT[than] - 0.05}))


def close(arm: str) -> Callable[[], tuple[dict, dict]]:
    return lambda: (arms(), arms(**{arm: RIGHT["sst"] - 0.1}))


def published(scored_twice: bool) -> dict:
    """The printed value as the loss gives it; the sabotage averages over tokens that were not scored."""
    row = [math.exp(math.log(26.98 * (1 + 0.002 * seed)) * (0.9 if scored_twice else 1)) for seed in SEEDS]
    return {"perplexity": {"sst": seeded(row)}}


def gradients(sst: float) -> dict:
    """Norms that follow full rank's up to noise of a given size."""
    found: dict[str, list[float]] = {"sst": [], "relora": []}
    for seed in SEEDS:
        draw = torch.Generator().manual_seed(seed)
        full = torch.randn(300, generator=draw)
        for name, noise in (("sst", sst), ("relora", 1.5)):
            other = full + noise * torch.randn(300, generator=draw)
            found[name].append(evaluation.correlation(full.tolist(), other.tolist()))
    return {"gradient_correlation": {name: seeded(values) for name, values in found.items()}}


def rises(sst_rank: int) -> dict:
    """The loss that cutting adds, as the error of cut matrices: full rank against a spectrum of a given rank."""
    found: dict[str, list[float]] = {"full/0.5": [], "sst/0.5": []}
    for seed in SEEDS:
        draw = torch.Generator().manual_seed(seed)
        for name, rank in (("full/0.5", 16), ("sst/0.5", sst_rank)):
            weight = torch.randn(16, rank, generator=draw) @ torch.randn(rank, 16, generator=draw)
            error = (weight - method.truncated(weight, 0.5)).norm() / weight.norm()
            found[name].append(error.item())
    return {"rise": {name: seeded(values) for name, values in found.items()}}


Pair = Callable[[], tuple[dict, dict]]


def both(name: str, pair: Pair) -> dict[str, Pair]:
    """A claim at full scale and its stand-in."""
    return {name: pair, f"{name}-small": pair}


SABOTAGE: dict[str, Pair] = {
    # exact
    "svd-start-distorts-nothing": lambda: (
        distortions(),
        patched(method, "decompose", without_the_smallest, distortions),
    ),
    "changing-vectors-distorts-nothing": lambda: (
        distortions(),
        patched(method.SpectralLinear, "swap_", forgetful_swap, distortions),
    ),
    "vectors-lose-their-right-angles": lambda: (
        orthogonality(),
        patched(evaluation, "_train", lambda *rest, **options: None, orthogonality),
    ),
    "decomposing-again-restores-them": lambda: (
        orthogonality(),
        patched(method.SpectralLinear, "decompose_", lambda self: None, orthogonality),
    ),
    "enhanced-gradient-is-the-true-one-over-sigma": lambda: (
        number("gradient_error", evaluation.gradient_error()),
        patched(method, "SpectralLinear", Unenhanced, lambda: number("gradient_error", evaluation.gradient_error())),
    ),
    "enhanced-descent-steps-are-longer": lambda: (
        number("sgd_ratio", evaluation.sgd_ratio()),
        patched(method, "SpectralLinear", Unenhanced, lambda: number("sgd_ratio", evaluation.sgd_ratio())),
    ),
    "adam-cancels-the-enhancement": lambda: (number(ADAM, evaluation.adam_difference()), by_descent()),
    "relora-restarts-dead": lambda: (
        dead("relora"),
        patched(LowRankLinear, "merge_", both_from_zero, lambda: dead("relora")),
    ),
    "sst-restarts-alive": lambda: (
        dead("sst"),
        patched(method.SpectralLinear, "swap_", with_dead_vectors, lambda: dead("sst")),
    ),
    "only-the-largest-never-explores": lambda: (visited("mixed"), visited("top")),
    # counted
    "share-of-llama": lambda: (shares(128), shares(64)),
    "mostly-embeddings": lambda: (shares(128), shares(256)),
    "between-two-ranks-of-lora": lambda: (entries(0), entries(1)),
    "memory-of-opt": lambda: (gigabytes(), gigabytes(sst="full")),
    "weights-grow": lambda: (gigabytes(), gigabytes(sst="lora")),
    "lora-keeps-less": lambda: (gigabytes(), gigabytes(lora="full")),
    "moments-of-the-trained-only": lambda: (moments(of_all=False), moments(of_all=True)),
    "headline-arithmetic": lambda: (
        headlines(),
        headlines(**{"LLaMA-1.3B": {"full": 14.54, "lora": 17.32, "relora": 17.32, "sst": 14.59}}),
    ),
    "headline-is-the-best-case": lambda: (
        headlines(),
        headlines(**{"OPT-125M": evaluation.PRINTED["LLaMA-1.3B"]}),
    ),
    # at a known quality
    "opt-perplexity": lambda: (published(False), published(True)),
    **both("sst-beats-lora", better("lora")),
    **both("sst-beats-relora", better("relora")),
    **both("lora-beats-relora", better("relora", "lora")),
    **both("half-of-the-gap", lambda: (arms(), arms(sst=0.42))),
    "full-rank-is-better": better("sst", "full"),
    "learned": lambda: (arms(), arms(full=0.05)),
    "svd-start-matters": better("random_start"),
    "all-sigma-matter": better("chosen_sigma"),
    "decomposing-again-matters": better("never_again"),
    "drawing-beats-the-largest": better("top"),
    "how-to-draw-hardly-matters": close("uniform"),
    "enhancement-changes-nothing-under-adam": close("true_gradient"),
    "gradients-follow-full-rank": lambda: (gradients(0.2), gradients(1.5)),
    "pruned-spectra": lambda: (rises(4), rises(16)),
}


def test_every_claim_has_a_sabotage():
    assert set(SABOTAGE) == set(CLAIMS)


def test_the_known_arms_are_those_of_the_paper():
    assert set(RIGHT) <= set(experiment.ARMS)


@pytest.mark.parametrize("name", SABOTAGE)
def test_sabotage_turns_the_verdict(name):
    assert_sabotage_turns(CLAIMS[name], *SABOTAGE[name]())
