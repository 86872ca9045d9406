"""Every claim of SR-STE can be turned by a one-line change of the method or the data.

What can be run exactly or in seconds is run: the equations, groups, the planted teacher, how the choice moves in small
trainings. Claims about long trainings go through the same scoring and judging with classifiers of known accuracy; the
sabotage gives an arm what it would reach without the part it is named for.
"""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from common import claims, training
from common import params as parameters
from common.data import images
from common.data.images import ImageSet
from common.paths import root
from common.testing import assert_sabotage_turns
from papers.sr_ste import data, experiment, method
from papers.sr_ste.settings import Params

CLAIMS = {claim.id: claim for claim in claims.load(root() / "papers/sr_ste/claims.yaml")}
SEEDS = range(5)
# Percent right of each arm; an order that suits the claims' honest side, not a measurement.
RIGHT = {
    "dense": 77.2,
    "sr_ste/2:4": 77.0,
    "sr_ste/4:8": 77.4,
    "sr_ste/2:8": 76.4,
    "sr_ste/1:4": 75.9,
    "sr_ste/1:8": 71.5,
    "sr_ste/1:16": 70.0,
    "ste/2:4": 76.0,
    "ste/1:8": 71.0,
    "ste/1:16": 67.0,
    "by_position/2:4": 77.1,
    "sr_ste/1:8x10": 74.0,
    "sr_ste/1:8x1000": 70.0,
    "resnet20/dense": 77.2,
    "resnet20/sr_ste/2:4": 77.0,
    "resnet20/ste/2:4": 76.0,
    "resnet18/sr_ste/2:4": 71.2,
    "resnet18/ste/2:4": 69.9,
}


def seeded(values: list[float]) -> dict[str, float]:
    return {str(seed): value for seed, value in zip(SEEDS, values, strict=False)}


# ------------------------------------------------------------------------------------------------- run as they are


def distance(name: str, found: Tensor, expected: Tensor) -> dict:
    return {"distance": {name: {"all": (found - expected).abs().max().item()}}}


def followed(decay: float) -> dict:
    return distance("sr_ste", experiment.ten_steps("sr_ste", 0.3), experiment.ten_steps_written_out(decay))


def without_pull(decay: float) -> dict:
    return distance("zero_decay", experiment.ten_steps("sr_ste", decay), experiment.ten_steps("ste", 0.0))


def hyper_parameters(name: str) -> dict:
    counts = {"sr_ste": name, "ste": "ste"}
    fields = {arm: dataclasses.fields(method.recipe(recipe)) for arm, recipe in counts.items()}
    return {"hyper_parameters": {arm: {"all": len(found)} for arm, found in fields.items()}}


def straddling(name: str, channels: int) -> dict:
    found = method.released_groups((64, channels, 7, 7), 4)
    return {"straddling": {f"{name}/positions": {"all": found.positions}, f"{name}/filters": {"all": found.filters}}}


@cache
def search(decay: float, seed: int) -> experiment.Search:
    return experiment.search_planted(decay, seed)


def planted(**changes: float) -> dict:
    """All measures of the planted teacher by decay; `moderate=0.0` leaves the pull out of that arm."""
    decays = experiment.PLANTED_DECAYS | changes
    names = {"recovered": "recovered", "planted_error": "error", "planted_flips": "flips"}
    return {
        metric: {
            arm: seeded([getattr(search(decay, seed), name) for seed in SEEDS[:3]]) for arm, decay in decays.items()
        }
        for metric, name in names.items()
    }


@cache
def trained(recipe: str, decay: float, seed: int) -> dict:
    """A training of thirty steps on noise with a bright half, which of the two being the class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(256) % 2
    pixels = torch.randint(100, (256, 1, 8, 8), generator=generator, dtype=torch.uint8)
    pixels[:, :, :4] += (100 * labels).to(torch.uint8)[:, None, None, None]
    halves = ImageSet("halves", pixels, labels, ("dark", "bright"))
    params = dataclasses.replace(parameters.load(Params, "sr_ste", "smoke"), steps=30, batch=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "digits", lambda split: halves)
        return experiment.fit(params, experiment.Arm("resnet_cifar", recipe, "1:8", decay), data.load(params), seed)


def moved(metric: str, **changes: tuple[str, float]) -> dict:
    """How far the choice moved in the arms of the sweep; a change gives an arm another recipe and decay."""
    arms = {"dense": ("dense", 0.0), "ste": ("ste", 0.0), "once": ("sr_ste", 0.005)}
    arms |= {"tenfold": ("sr_ste", 0.05), "hundredfold": ("sr_ste", 0.5)} | changes
    names = {"dense": "dense", "ste": "ste/1:8", "once": "sr_ste/1:8"}
    names |= {"tenfold": "sr_ste/1:8x10", "hundredfold": "sr_ste/1:8x100"}
    found = {names[arm]: [trained(*how, seed)[metric] for seed in SEEDS] for arm, how in arms.items()}
    return {metric: {name: seeded(row) for name, row in found.items()}}


def kept(spoilt: bool) -> dict:
    params = parameters.load(Params, "sr_ste", "smoke")
    _, handle = experiment.build(params, experiment.arms(params)["sr_ste/1:8"], classes=10, channels=1)
    if spoilt:
        for layer in handle.layers.values():
            layer.kept.logical_not_()
    return {"violations": {"sr_ste/1:8": seeded([experiment.violations(handle)] * 3)}}


# ------------------------------------------------------------------------------------------- known accuracy and cost


class Known(nn.Module):
    """Says the class that its input holds."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, guess: Tensor) -> Tensor:
        return nn.functional.one_hot(guess, 10).float()


def graded(**changes: str) -> dict:
    """Top-1 of every arm by `training.accuracy`; `sr_ste="ste"` gives the first what the second has.

    A seed moves every arm by the same amount and each by a little more, as seeds do.
    """
    right = RIGHT | {name: RIGHT[other] for name, other in changes.items()}
    labels = torch.arange(10_000) % 10
    found: dict[str, list[float]] = {name: [] for name in right}
    for seed in SEEDS:
        for index, (name, percent) in enumerate(right.items()):
            share = percent / 100 + 0.002 * (seed - 2) + 0.0002 * (seed * (1 + index % 4) % 5 - 2)
            guesses = torch.where(torch.arange(10_000) < round(10_000 * share), labels, (labels + 1) % 10)
            found[name].append(training.accuracy(Known(), [(guesses, labels)]))
    return {"top1": {name: seeded(row) for name, row in found.items()}}


def spoilt(arm: str, like: str) -> tuple[dict, dict]:
    """Honest accuracies, and those where one arm is no better than another."""
    return graded(), graded(**{arm: like})


def off_by(arm: str, points: float) -> tuple[dict, dict]:
    """The sabotage is a test on other images, which this arm finds easier or harder."""
    changed = graded()
    changed["top1"][arm] = {seed: value + points for seed, value in changed["top1"][arm].items()}
    return graded(), changed


def cost(*, search: float = 0.1, pull: float = 0.01) -> dict:
    """Timings of a step that takes 1 with all weights, plus the search, plus the pull; five repeats."""
    total = {"plain": 1.0, "ste": 1.0 + search, "sr_ste": 1.0 + search + pull}
    return {
        "seconds": {
            name: seeded([value * (1 + 0.005 * ((3 * seed + index) % 5)) for seed in SEEDS])
            for index, (name, value) in enumerate(total.items())
        }
    }


SABOTAGE = {
    # run as they are
    "layers-follow-the-equations": lambda: (followed(0.3), followed(0.31)),
    "without-the-pull-it-is-ste": lambda: (without_pull(0.0), without_pull(1e-6)),
    "one-more-hyper-parameter": lambda: (hyper_parameters("sr_ste"), hyper_parameters("ste")),
    "every-group-keeps-n": lambda: (kept(spoilt=False), kept(spoilt=True)),
    "released-stem-groups-straddle-positions": lambda: (straddling("stem", 3), straddling("stem", 4)),
    "released-stem-groups-straddle-filters": lambda: (straddling("stem", 3), straddling("stem", 4)),
    "other-layers-do-not-straddle": lambda: (straddling("layer", 64), straddling("layer", 66)),
    "planted-mask-is-found": lambda: (planted(), planted(moderate=0.0)),
    "planted-error-falls": lambda: (planted(), planted(moderate=0.0)),
    "planted-flips-fall-with-lambda": lambda: (planted(), planted(large=0.0)),
    "planted-too-much-freezes": lambda: (planted(), planted(large=0.3)),
    # small trainings
    "sad-falls-with-lambda": lambda: (moved("sad"), moved("sad", hundredfold=("ste", 0.0))),
    "flips-fall-with-lambda": lambda: (moved("flips"), moved("flips", hundredfold=("ste", 0.0))),
    "ste-flickers-more-than-dense": lambda: (moved("flips"), moved("flips", ste=("dense", 0.0))),
    # at a known accuracy
    "two-four-loses-nothing": lambda: spoilt("sr_ste/2:4", "ste/2:4"),
    "two-four-loses-nothing-small": lambda: spoilt("sr_ste/2:4", "sr_ste/1:4"),
    "two-four-loses-nothing-resnet20": lambda: spoilt("resnet20/sr_ste/2:4", "sr_ste/1:4"),
    "over-ste-2-4-resnet20": lambda: spoilt("resnet20/sr_ste/2:4", "resnet20/ste/2:4"),
    "over-ste-r18": lambda: spoilt("resnet18/sr_ste/2:4", "resnet18/ste/2:4"),
    "over-ste-2-4-small": lambda: spoilt("sr_ste/2:4", "ste/2:4"),
    "over-ste-1-8-small": lambda: spoilt("sr_ste/1:8", "ste/1:8"),
    "over-ste-1-16-small": lambda: spoilt("sr_ste/1:16", "ste/1:16"),
    "moderate-lambda-is-best": lambda: spoilt("sr_ste/1:8x10", "ste/1:8"),
    "published-lambda-needs-the-published-length": lambda: spoilt("sr_ste/1:8", "sr_ste/1:8x10"),
    "four-eight-over-two-four": lambda: spoilt("sr_ste/4:8", "sr_ste/2:4"),
    "four-eight-over-two-four-small": lambda: spoilt("sr_ste/4:8", "sr_ste/2:4"),
    "two-eight-over-one-four": lambda: spoilt("sr_ste/2:8", "sr_ste/1:4"),
    "two-eight-over-one-four-small": lambda: spoilt("sr_ste/2:8", "sr_ste/1:4"),
    "falls-with-sparsity": lambda: spoilt("sr_ste/1:16", "sr_ste/1:4"),
    "channels-are-as-good-as-positions": lambda: spoilt("by_position/2:4", "sr_ste/1:4"),
    "no-extra-cost-over-ste": lambda: (cost(), cost(pull=0.3)),
    "the-search-is-cheap": lambda: (cost(), cost(search=0.5)),
    "imagenet-r50-2-4": lambda: off_by("sr_ste/2:4", 1.0),
    "imagenet-r50-4-8": lambda: off_by("sr_ste/4:8", 1.0),
    "imagenet-r50-2-8": lambda: off_by("sr_ste/2:8", 1.0),
    "imagenet-r50-1-4": lambda: off_by("sr_ste/1:4", 1.0),
    "imagenet-r18-2-4": lambda: off_by("resnet18/sr_ste/2:4", -0.7),
}


def test_every_claim_has_a_sabotage():
    assert set(SABOTAGE) == set(CLAIMS)


@pytest.mark.parametrize("name", SABOTAGE)
def test_sabotage_turns_the_verdict(name):
    assert_sabotage_turns(CLAIMS[name], *SABOTAGE[name]())
