"""Every claim of LM-Gaussian can be turned by a one-line change of the method or the data.

What is exact or takes seconds is run: schedules, cleaning, alignment, new branches, densification, repairs. Claims
about long trainings and about data that are not here go through the same scoring and judging with pictures of known
quality: an arm's picture is the truth plus a share of noise, and the sabotage takes away what names the arm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from unittest import mock

import pytest
import torch
from known_quality import bad, random_lpips
from torch import Tensor, nn

from common import claims
from common import params as parameters
from common.metrics.image import psnr
from common.metrics.perceptual import gmsd
from common.models.diffusion import Schedule, sdedit
from common.paths import root
from common.testing import assert_sabotage_turns
from papers.lm_gaussian import data, evaluation, experiment, method, repair
from papers.lm_gaussian.settings import Params

CLAIMS = {claim.id: claim for claim in claims.load(root() / "papers/lm_gaussian/claims.yaml")}
SEEDS = (0, 1, 2)
# How noisy each arm's picture is; an order that suits the claims, not a measurement.
LEFT = {"sfm": 1.0, "raw": 0.8, "no_background": 0.85, "init": 0.7, "depth": 0.6, "normal": 0.5, "regularised": 0.4}
LEFT |= {"shuffled_priors": 0.55, "perfect_priors": 0.3, "densified": 0.35, "depth_normal": 0.35, "aligned": 0.35}
LEFT |= {"covered": 0.35, "longer": 0.4, "no_lora": 0.35, "shuffled_repair": 0.45, "full": 0.3, "oracle": 0.2}
LEFT |= {"as_described": 0.3, "longer_covered": 0.35, "full_covered": 0.25}


def tiny(**changes) -> Params:
    small = {"width": 32, "height": 24, "tests": 1, "points": 200, "stage1": 12, "steps": 16, "every": 2, "box": 8}
    return dataclasses.replace(parameters.load(Params, "lm_gaussian", "smoke"), **(small | changes))


@cache
def yard(seed: int) -> data.Case:
    return data.courtyard(tiny(), 4, seed)


def seeded(values: list[float], seeds: tuple[int, ...] = SEEDS) -> dict[str, float]:
    return {str(seed): value for seed, value in zip(seeds, values, strict=False)}


# ------------------------------------------------------------------------------------------------- run as they are


def grown(arm: str) -> dict:
    params = tiny()
    with mock.patch.object(
        experiment, "_growth", lambda p: experiment.DefaultStrategy(first=0, every=5, grow_grad2d=0)
    ):
        found = [experiment.stage1(params, yard(seed), arm, seed)["count"] for seed in SEEDS[:2]]
    return {"grown": {"regularised/4": seeded([float(end - start) for start, end in found])}}


def plans(**changes: int) -> dict:
    plan, forward = (dataclasses.replace(p, **changes) for p in (method.AUTHORS_360, method.AUTHORS_FORWARD))
    with mock.patch.multiple(method, AUTHORS_360=plan, AUTHORS_FORWARD=forward):
        found = evaluation.plans()
    return {name: {variant: {"all": value} for variant, value in row.items()} for name, row in found.items()}


def init_quality(confidence: float = method.CONFIDENCE, bonus: float = method.BACKGROUND_BONUS) -> dict:
    with mock.patch.multiple(method, CONFIDENCE=confidence, BACKGROUND_BONUS=bonus):
        found = [evaluation.init_quality(tiny(), yard(seed), seed) for seed in SEEDS]
    names = {name: list(row) for name, row in found[0].items()}
    return {name: {v: seeded([one[name][v] for one in found]) for v in row} for name, row in names.items()}


def alignment(steps: int) -> dict:
    """A stereo depth with unsure wrong patches, and a monocular one that is right up to scale and shift."""
    before, after = [], []
    for seed in SEEDS:
        view = yard(seed).scene.train[0]
        draw = torch.Generator().manual_seed(seed)
        wrong = torch.zeros_like(view.depth)
        wrong[8:16, 8:16] = 1
        depth = view.depth * (1 - 0.3 * wrong)
        confidence = torch.where(wrong > 0, 1.0, 20.0)
        found = method.guided_alignment(
            view, depth, confidence, 3 * view.depth + 1, steps=steps, box=12, generator=draw
        )
        before.append(float((depth / view.depth - 1).abs().mean()))
        after.append(float((found / view.depth - 1).abs().mean()))
    return {"depth_error": {"stereo": seeded(before), "aligned": seeded(after)}}


def change(sabotaged: bool, sdedit_strength: float = 0.0) -> dict:
    def strong(predict, image, schedule, **options):
        return sdedit(predict, image, schedule, **(options | {"strength": sdedit_strength}))

    zeros = nn.init.ones_ if sabotaged else nn.init.zeros_
    with mock.patch.object(nn.init, "zeros_", zeros), mock.patch.object(evaluation, "sdedit", strong):
        return {"change": {name: {"all": value} for name, value in evaluation.exact_checks().items()}}


class Knows(nn.Module):
    """A denoiser that always sees the same picture."""

    def __init__(self, picture: Tensor):
        super().__init__()
        self.picture = picture

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, strength: float = 1.0) -> Tensor:
        a = Schedule.cosine().at(t)
        return (x - a.sqrt() * (2 * self.picture - 1)) / (1 - a).sqrt()


def prior_error(known: Callable[[Tensor], Tensor]) -> dict:
    good = yard(0).scene.train[0].image.movedim(-1, 0)
    found = repair.held_out_error(Knows(known(good)), [(bad(good, 0.3, 0), good)], tiny())
    return {"prior_error": {name: {"all": value} for name, value in found.items()}}


def virtual(left: float) -> dict:
    found = []
    for seed in SEEDS:
        truth = yard(seed).truth.movedim(-1, 1)
        images = {name: bad(truth, share, seed).movedim(1, -1) for name, share in (("drawn", 0.3), ("repaired", left))}
        found.append(evaluation.virtual_quality(yard(seed), images))
    rows = {f"full/{name}": seeded([one[name] for one in found]) for name in ("drawn", "repaired")}
    return {"virtual_psnr": rows}


# --------------------------------------------------------------------------- scored and judged at a known quality


@cache
def picture() -> Tensor:
    return data.courtyard(tiny(width=64, height=48), 4, 5).scene.test[0].image.movedim(-1, 0)


def arms(where: str = "4", metric: str = "psnr", **sabotaged: float) -> dict:
    """The metric of every arm at the shares `LEFT`, some of them replaced."""
    truth = picture()
    measure = {
        "psnr": lambda a, b: psnr(a.flatten()[None], b.flatten()[None], data_range=1.0),
        "gmsd": gmsd,
        "lpips": lambda a, b: random_lpips()(a, b),
    }[metric.removeprefix("fern_")]
    rows = {
        f"{arm}/{where}" if where else arm: seeded([float(measure(bad(truth, left, s), truth)) for s in SEEDS])
        for arm, left in (LEFT | sabotaged).items()
    }
    return {metric: rows}


def by_views(left: Callable[[int], float]) -> dict:
    return {"psnr": {f"full/{v}": arms(full=left(v))["psnr"]["full/4"] for v in (4, 8)}}


def at_psnr(wanted: float, where: str, louder: float = 1.0) -> dict:
    """Pictures of that PSNR, as the published ones are, with a few hundredths of a dB between seeds."""
    truth, found = torch.full((3, 64, 64), 0.5), []
    for seed in SEEDS:
        noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(seed))
        ours = truth + noise * louder * 10 ** (-wanted / 20) / noise.square().mean().sqrt() * (1 + 0.002 * seed)
        found.append(float(psnr(ours.flatten()[None], truth.flatten()[None], data_range=1.0)))
    return {"psnr": {f"full/{where}": seeded(found)}}


def turned(metric: str = "psnr", **sabotaged: str) -> Callable[[], tuple[dict, dict]]:
    """Claims at 4 views: an arm's picture becomes that of another arm."""
    return lambda: (arms("4", metric), arms("4", metric, **{a: LEFT[b] for a, b in sabotaged.items()}))


def horse(metric: str = "psnr", **sabotaged: str) -> Callable[[], tuple[dict, dict]]:
    where = "16/Horse"
    return lambda: (arms(where, metric), arms(where, metric, **{a: LEFT[b] for a, b in sabotaged.items()}))


def fern(**sabotaged: str) -> Callable[[], tuple[dict, dict]]:
    return lambda: (arms("", "fern_psnr"), arms("", "fern_psnr", **{a: LEFT[b] for a, b in sabotaged.items()}))


STEPS = {
    "stereo-over-sfm": {"raw": "sfm"},
    "cleaning-over-raw": {"init": "raw"},
    "regularisers-help": {"regularised": "init"},
    "depth-helps": {"depth": "init"},
    "normals-help": {"normal": "depth"},
    "virtual-views-help": {"regularised": "normal"},
    "refinement-helps": {"full": "regularised"},
}

SABOTAGE: dict[str, Callable[[], tuple[dict, dict]]] = {
    # the authors' numbers
    "tt-16-psnr": lambda: (at_psnr(20.54, "16"), at_psnr(20.54, "16", louder=1.5)),
    "tt-16-over-instantsplat": lambda: (at_psnr(20.54, "16"), at_psnr(20.54, "16", louder=1.5)),
    "tt-8-over-instantsplat": lambda: (at_psnr(18.40, "8"), at_psnr(18.40, "8", louder=1.5)),
    "360-8-over-instantsplat": lambda: (at_psnr(17.49, "8"), at_psnr(17.49, "8", louder=1.5)),
    "llff-3-over-instantsplat": lambda: (at_psnr(19.63, "3"), at_psnr(19.63, "3", louder=1.5)),
    # the ablations: the sabotage makes an arm what it would be without the part it is named for
    **{name: horse(**step) for name, step in STEPS.items()},
    **{f"{name}-small": turned(**step) for name, step in STEPS.items()},
    "refinement-helps-lpips": horse("lpips", full="regularised"),
    "refinement-helps-lpips-small": turned("gmsd", full="regularised"),
    "repair-over-training-on": turned(full="longer"),
    "repair-over-training-on-covered": turned(full_covered="longer_covered"),
    "repair-improves-virtual-views": lambda: (virtual(0.1), virtual(0.4)),
    "lora-helps": turned(full="no_lora"),
    "background-rule-helps": turned(init="no_background"),
    "more-views": lambda: (by_views(lambda views: 2 / views), by_views(lambda views: 0.5)),
    # controls: a leak would make the stand-in as good as the truth, or the right answer as good as a wrong one
    "standins-are-not-the-truth": turned(regularised="perfect_priors"),
    "shuffled-priors-lose": turned(regularised="shuffled_priors"),
    "repair-is-not-the-truth": turned(full="oracle"),
    "shuffled-repair-loses": turned(full="shuffled_repair"),
    # the released code
    "no-densification": lambda: (grown("regularised"), grown("densified")),
    "depth-normal-never-runs": lambda: (plans(), plans(late=6_000)),
    "depth-normal-never-runs-forward": lambda: (plans(), plans(late=1_000)),
    "three-rounds": lambda: (plans(), plans(every=3_000)),
    "two-rounds-forward": lambda: (plans(), plans(every=3_000)),
    "densification-helps": turned(densified="regularised"),
    "depth-normal-helps": turned(depth_normal="regularised"),
    "alignment-lowers-depth-error": lambda: (alignment(200), alignment(0)),
    "alignment-helps": turned(aligned="regularised"),
    "described-over-released": turned(as_described="regularised"),
    "virtual-views-want-cover": turned(covered="regularised"),
    # the parts
    "cleaning-removes-wrong-points": lambda: (init_quality(), init_quality(confidence=-1.0)),
    "background-rule-keeps-background": lambda: (init_quality(), init_quality(bonus=0.0)),
    "control-starts-at-zero": lambda: (change(sabotaged=False), change(sabotaged=True)),
    "lora-starts-at-zero": lambda: (change(sabotaged=False), change(sabotaged=True)),
    "sdedit-at-zero-is-identity": lambda: (change(sabotaged=False), change(sabotaged=False, sdedit_strength=0.1)),
    "prior-repairs-other-scenes": lambda: (prior_error(lambda good: good), prior_error(torch.zeros_like)),
    # real photographs
    "fern-stereo-over-sfm": fern(raw="sfm"),
    "fern-regularisers-help": fern(regularised="init"),
    "fern-repair-helps": fern(full="longer"),
}


def test_every_claim_has_a_sabotage():
    assert set(SABOTAGE) == set(CLAIMS)


@pytest.mark.parametrize("name", SABOTAGE)
def test_sabotage_turns_the_verdict(name):
    assert_sabotage_turns(CLAIMS[name], *SABOTAGE[name]())
