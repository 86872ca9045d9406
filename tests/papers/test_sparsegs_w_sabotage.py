"""Every claim of SparseGS-W can be turned by a one-line change of the method or the data.

What is exact or takes seconds is run: checks, schedules, masks, points, AdaIN, painting, appearance, repair by models
of known quality. Claims about long trainings and about data that are not here go through the same scoring and judging
with pictures of known quality: an arm's picture is the truth plus a share of noise, and the sabotage takes away what
names the arm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from known_quality import bad, random_lpips
from torch import Tensor, nn

from common import claims
from common import params as parameters
from common.metrics.image import psnr
from common.metrics.perceptual import gmsd
from common.models.corrector import Corrector
from common.models.diffusion import Schedule
from common.models.pairs import held_out_error
from common.paths import root
from common.splatting.model import Gaussians
from common.testing import assert_sabotage_turns
from papers.sparsegs_w import data, evaluation, experiment, method, photos, prior
from papers.sparsegs_w.settings import Params

CLAIMS = {claim.id: claim for claim in claims.load(root() / "papers/sparsegs_w/claims.yaml")}
SEEDS = (0, 1, 2)
# How noisy each arm's picture is; an order that suits the claims, not a measurement.
LEFT = {"raw": 1.0, "no_oh": 0.9, "no_adain": 0.8, "affine_alone": 0.7, "affine": 0.6, "shuffled": 0.65, "no_cnve": 0.6}
LEFT |= {"no_inpaint": 0.5, "unconstrained": 0.5, "plain_repair": 0.5, "one_shot": 0.5, "full": 0.4}
LEFT |= {"perfect_masks": 0.3, "oracle": 0.2}
SMALL = {"width": 48, "height": 40, "tests": 3, "points": 200, "steps": 12, "warm": 4, "every": 2, "rounds": 2}


def tiny(**changes) -> Params:
    return dataclasses.replace(parameters.load(Params, "sparsegs_w", "smoke"), **(SMALL | changes))


@cache
def case(seed: int) -> data.Case:
    return data.facade(tiny(), seed)


def seeded(values: list[float]) -> dict[str, float]:
    return {str(seed): value for seed, value in zip(SEEDS, values, strict=False)}


def by_seed(rows: list[dict[str, float]], metric: str) -> dict:
    """Rows of variants, one a seed, as recorded metrics."""
    return {metric: {variant: seeded([row[variant] for row in rows]) for variant in rows[0]}}


def unseeded(values: dict[str, float], metric: str) -> dict:
    return {metric: {variant: {"all": value} for variant, value in values.items()}}


# ------------------------------------------------------------------------------------------------- run as they are


def exact(**replaced: Any) -> dict:
    with mock.patch.dict(vars(method), replaced):
        return unseeded(evaluation.exact_checks(), "error")


def loosely(target: Tensor, drawn: Tensor, factor: int) -> Tensor:
    """The constraint forgotten."""
    return target


def shifted(z: Tensor, of: method.Style, to: method.Style) -> Tensor:
    """AdaIN of the means alone."""
    return z - of.mean + to.mean


def everywhere(predict, photo, start, mask, schedule, **options) -> Tensor:
    """Inpainting that forgets to keep what is known."""
    return method.enhanced(predict, start, schedule, **options) + 1e-3


def redrawn() -> dict:
    """A small model whose last layer does not begin at zero."""
    with mock.patch.object(nn.init, "zeros_", lambda values: nn.init.constant_(values, 0.05)):
        return unseeded(evaluation.exact_checks(), "error")


def schedule(**changes) -> dict:
    """The whole method's rounds; `progressive`, or the parameters that set them, changed."""
    arm = dataclasses.replace(experiment.ARMS["full"], progressive=changes.pop("progressive", True))
    with mock.patch.dict(experiment.ARMS, {"full": arm}):
        found = evaluation.schedule(tiny(rounds=3, **changes))
    return {name: {variant: {"all": value} for variant, value in row.items()} for name, row in found.items()}


def one_shot_without_the_rounds() -> dict:
    with mock.patch.object(method.Rounds, "size", lambda plan: plan.views):
        return schedule()


def weak(least: int) -> dict:
    with mock.patch.object(data, "WEAK", least):
        found = [data.facade(tiny(tests=2), seed).weak for seed in SEEDS]
    assert all(share is not None for share in found)
    return {"weak": {"": seeded(found)}}  # pyright: ignore[reportArgumentType]


@cache
def quality(metric: str, change: Callable[[data.Case], data.Case] = lambda one: one) -> dict:
    return by_seed([evaluation.input_quality(change(case(seed)))[metric] for seed in SEEDS], metric)


def with_perfect_masks(one: data.Case) -> data.Case:
    assert one.true_masks is not None
    return dataclasses.replace(one, masks=one.true_masks)


def with_empty_masks(one: data.Case) -> data.Case:
    return dataclasses.replace(one, masks={name: torch.zeros_like(mask) for name, mask in one.masks.items()})


def with_sure_points(one: data.Case) -> data.Case:
    """Stereo that doubts every wrong patch: only what is right passes the threshold."""
    sure = {}
    for view in one.scene.train:
        assert one.world is not None
        depth = one.world.render(view.camera, "", samples=1).depth
        assert depth is not None
        right = (one.maps[view.name].depth / depth - 1).abs() < evaluation.WRONG
        sure[view.name] = data.Pointmap(one.maps[view.name].depth, torch.where(right, 9.0, 1.0))
    return dataclasses.replace(one, maps=sure)


def without_light(one: data.Case) -> data.Case:
    """All photographs in the reference's light: then AdaIN has nothing to bring closer."""
    assert one.clean is not None and one.true_masks is not None
    views = tuple(dataclasses.replace(view, image=one.clean[view.name]) for view in one.scene.train)
    return dataclasses.replace(one, scene=dataclasses.replace(one.scene, train=views))


def painted(left: float) -> dict:
    """Photographs painted over by a model that leaves that share of the error of a smoothly filled hole."""
    rows = []
    for seed in SEEDS:
        one, clean = case(seed), {}
        assert one.clean is not None
        for view in experiment.inputs(one, dataclasses.replace(experiment.ARMS["full"], inpaint=False), None).views:
            hole = one.masks[view.name]
            smooth = method.filled(view.image.movedim(-1, 0)[None], hole[None, None])[0].movedim(0, -1)
            clean[view.name] = torch.lerp(one.clean[view.name], smooth, left)
        rows.append(evaluation.hole_error(one, clean))
    return by_seed(rows, "hole_error")


def not_painted() -> dict:
    """The photographs themselves, people and all."""
    rows = []
    for seed in SEEDS:
        views = experiment.inputs(case(seed), dataclasses.replace(experiment.ARMS["full"], inpaint=False), None).views
        rows.append(evaluation.hole_error(case(seed), {view.name: view.image for view in views}))
    return by_seed(rows, "hole_error")


def control(style: Callable | None = None, *, flat: bool = False) -> dict:
    """Appearance of renders that are the truth itself.

    style  in place of the method's;  flat  from the photographs' cameras there is nothing to see
    """
    found = []
    for seed in SEEDS:
        one = case(seed)
        shown = {view.camera: view.image for view in one.scene.test}
        assert one.clean is not None
        shown |= {view.camera: one.clean[view.name] * (not flat) for view in one.scene.train}
        points = method.fused(one.scene.train, *_maps(one), [None] * len(one.scene.train))
        model = Gaussians.from_points(points, sh_degree=0)
        with (
            mock.patch.object(experiment, "picture", lambda m, camera, colour=None, shown=shown: shown[camera]),
            mock.patch.object(method, "style", style or method.style),
        ):
            found.append(evaluation.appearance_control(one, model))
    return by_seed(found, "control_psnr")


def _maps(one: data.Case) -> tuple[list[Tensor], list[Tensor]]:
    maps = [one.maps[view.name] for view in one.scene.train]
    return [m.depth for m in maps], [m.confidence for m in maps]


def no_style(z: Tensor, mask: Tensor | None = None) -> method.Style:
    """One style for all pictures."""
    flat = torch.zeros_like(z[..., :1, :1])
    return method.Style(flat, flat + 1)


class Knows(Corrector):
    """A small model whose corrections lead to a share of the way to a picture it knows."""

    def __init__(self, known: Tensor, share: float):
        super().__init__(Schedule.cosine(), width=8, depth=1)
        self.known, self.share = known, share

    def picture(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return torch.lerp(condition, 2 * self.known - 1, self.share)


def repaired(share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Bad pictures [V, H, W, 3], the truth, and what the repair of CNVE makes of them."""
    good = torch.stack([view.image for view in case(0).scene.test])
    worse = bad(good, 0.4, 0)
    mender = prior.Mender(tiny(), prior.Pixels(Knows(good.movedim(-1, 1), share)), 0)
    return worse, good, mender.enhance(worse, 0, strength=0.6, reference=None, constrained=False)


def prior_error(share: float) -> dict:
    worse, good, better = repaired(share)
    pairs = list(zip(worse.movedim(-1, 1), good.movedim(-1, 1), strict=True))
    found = held_out_error(lambda _: better, pairs)
    return unseeded(found | {"after_last": found["after"]}, "prior_error")


def virtual(share: float, arm: str = "full") -> dict:
    worse, good, better = repaired(share)
    values = {}
    for name, images in (("drawn", worse), ("repaired", better)):
        values[name] = [float(psnr(images[i].flatten()[None], good[i].flatten()[None], data_range=1.0)) for i in SEEDS]
    pages = [[{f"{name}_psnr": values[name][i] for name in values}] for i in SEEDS]
    rows = [evaluation.round_quality(page) for page in pages]
    return {"virtual_psnr": {f"{arm}/{name}": seeded([row[name] for row in rows]) for name in rows[0]}}


# --------------------------------------------------------------------------- scored and judged at a known quality


@cache
def value(metric: str, left: float, seed: int) -> float:
    """The metric of a picture that is the truth plus a share of noise."""
    truth = case(0).scene.test[0].image.movedim(-1, 0)
    measure = {
        "psnr": lambda a, b: psnr(a.flatten()[None], b.flatten()[None], data_range=1.0),
        "gmsd": gmsd,
        "lpips": lambda a, b: random_lpips()(a, b),
        "ghost": F.l1_loss,
    }[metric]
    return float(measure(bad(truth, left, seed), truth))


def turned(other: str, metric: str = "psnr", prefix: str = "", arm: str = "full") -> Callable[[], tuple[dict, dict]]:
    """The claim compares an arm, mostly the whole method, with another; the sabotage makes it that other."""

    def arms(left: float) -> dict:
        rows = {arm: left, other: LEFT[other]}
        found = {name: seeded([value(metric, share, seed) for seed in SEEDS]) for name, share in rows.items()}
        return {f"{prefix}{metric}": found}

    return lambda: (arms(LEFT[arm]), arms(LEFT[other]))


WITHOUT = {
    "in-the-wild-over-learnt-colours": "affine_alone",
    "over-raw": "raw",
    "cnve-helps": "no_cnve",
    "oh-helps": "no_oh",
    "progressive-over-one-shot": "one_shot",
    "adain-helps": "no_adain",
}

SABOTAGE: dict[str, Callable[[], tuple[dict, dict]]] = {
    # the authors' claims: the sabotage makes the whole method what it would be without the part
    **{name: turned(arm) for name, arm in WITHOUT.items()},
    **{f"{name}-small": turned(arm) for name, arm in WITHOUT.items()},
    "cnve-helps-lpips": turned("no_cnve", "lpips"),
    "cnve-helps-gmsd-small": turned("no_cnve", "gmsd"),
    "oh-removes-transients": turned("no_oh", "ghost"),
    # where the gain comes from
    "adain-over-affine": turned("affine"),
    "painting-helps": turned("no_inpaint"),
    "adain-in-repair-helps": turned("plain_repair"),
    "plain-repair-over-no-cnve": turned("no_cnve", arm="plain_repair"),
    "plain-repair-improves-virtual-views": lambda: (virtual(0.5, "plain_repair"), virtual(-0.3, "plain_repair")),
    "constraint-helps": turned("unconstrained"),
    "painted-over-smoothly-filled": lambda: (painted(0.3), painted(1.2)),
    "painted-over-photograph": lambda: (painted(0.3), not_painted()),
    "repair-improves-virtual-views": lambda: (virtual(0.5), virtual(-0.3)),
    "appearance-control": lambda: (control(), control(no_style)),
    "appearance-control-matched": lambda: (control(), control(flat=True)),
    # controls: a leak would make the stand-in as good as the truth, or the right answer as good as a wrong one
    "repair-is-not-the-truth": turned("oracle"),
    "shuffled-repair-loses": turned("shuffled"),
    "perfect-masks-help": turned("perfect_masks"),
    "prior-repairs-other-scenes": lambda: (prior_error(0.5), prior_error(-0.3)),
    "prior-repairs-other-scenes-gently": lambda: (prior_error(0.5), prior_error(-0.3)),
    # the parts
    "much-is-weakly-observed": lambda: (weak(data.WEAK), weak(0)),
    "detected-masks-err": lambda: (quality("mask"), quality("mask", with_perfect_masks)),
    "masking-removes-wrong-points": lambda: (quality("wrong_points"), quality("wrong_points", with_empty_masks)),
    "the-start-has-outliers": lambda: (quality("wrong_points"), quality("wrong_points", with_sure_points)),
    "adain-brings-photographs-closer": lambda: (quality("photo_error"), quality("photo_error", without_light)),
    "constraint-is-exact": lambda: (exact(), exact(constrained=loosely)),
    "adain-undoes-gain-and-offset": lambda: (exact(), exact(adain=shifted)),
    "inpainting-leaves-the-rest": lambda: (exact(), exact(inpainted=everywhere)),
    "untrained-repair-is-identity": lambda: (exact(), redrawn()),
    "near-views-first": lambda: (schedule(), schedule(progressive=False)),
    "the-last-round-reaches-the-middle": lambda: (schedule(), _cut_short()),
    "strength-falls": lambda: (schedule(), schedule(strength_last=0.6)),
    "one-shot-repairs-as-many": lambda: (schedule(), one_shot_without_the_rounds()),
    # real photographs
    "fern-over-raw": turned("raw", "psnr", "fern_"),
    "fern-cnve-helps": turned("no_cnve", "psnr", "fern_"),
    "fern-oh-removes-transients": turned("no_oh", "ghost", "fern_"),
    "fern-adain-helps": turned("no_adain", "psnr", "fern_"),
}


def _cut_short() -> dict:
    with mock.patch.object(method, "FARTHEST", 0.4):
        return schedule()


def test_every_claim_has_a_sabotage():
    assert set(SABOTAGE) == set(CLAIMS)


@pytest.mark.parametrize("name", SABOTAGE)
def test_sabotage_turns_the_verdict(name):
    assert_sabotage_turns(CLAIMS[name], *SABOTAGE[name]())


def test_the_made_up_people_are_where_the_masks_say():
    """What the sabotages of masks rely on: photographs differ from the clean views there and in the light alone."""
    one = case(1)
    assert one.true_masks is not None and one.clean is not None and one.lights is not None
    for view in one.scene.train:
        free = ~one.true_masks[view.name]
        lit = one.lights[view.name](one.clean[view.name])
        # a pixel that counts as free may still hold up to TOUCHED of a person
        assert float((view.image - lit)[free].abs().max()) < 2 * photos.TOUCHED
        assert float((view.image - lit)[~free].abs().mean()) > 0.05
