"""Every claim of Sparse3D can be turned by a one-line change of the method or the data.

What is exact or takes seconds is run: gradients of known models, new controllers, the turned world, errors of priors
that know a picture. Claims about long fits go through the same scoring and judging with pictures and surfaces of known
quality: an arm's picture is the truth, blurred or noisy by its share; the sabotage takes away what names the arm.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cache
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
from common.models.diffusion import Schedule
from common.paths import root
from common.splatting.model import Rendering
from common.testing import assert_sabotage_turns
from papers.sparse3d import chairs, data, evaluation
from papers.sparse3d.settings import Params

CLAIMS = {claim.id: claim for claim in claims.load(root() / "papers/sparse3d/claims.yaml")}
SEEDS = (0, 1, 2)
# How far each arm is from the truth; an order that suits the claims, not a measurement.
LEFT = {"photo": 0.9, "no_control": 0.7, "eft": 0.6, "sds": 0.5, "no_bootstrap": 0.45, "shuffled": 0.8, "csds": 0.3}
LEFT |= {"again": 0.3, "oracle": 0.1}


def tiny() -> Params:
    small = {"size": 32, "tests": 2, "circle": 4, "points": 100}
    return dataclasses.replace(parameters.load(Params, "sparse3d", "smoke"), **small)


@cache
def case(seed: int) -> data.Case:
    return data.case(tiny(), 2, seed)


def seeded(values: list[float]) -> dict[str, float]:
    return {str(seed): value for seed, value in zip(SEEDS, values, strict=True)}


# ------------------------------------------------------------------------------------------------- run as they are


def change(sabotaged: bool) -> dict:
    zeros = nn.init.ones_ if sabotaged else nn.init.zeros_
    with mock.patch.object(nn.init, "zeros_", zeros):
        return {"change": {name: {"all": value} for name, value in evaluation.exact_checks().items()}}


def change_of_a_world_that_is_seen() -> dict:
    """The sabotage: the query camera's place is not taken out of the photographs' cameras."""
    inverse = torch.linalg.inv

    def seen(matrix: Tensor) -> Tensor:
        return torch.eye(4).expand_as(matrix) if matrix.shape[-1] == 4 else inverse(matrix)

    with mock.patch.object(torch.linalg, "inv", seen):
        return change(sabotaged=False)


def fixed_points(**rules: str) -> dict:
    return {"fixed_point": {name: {"all": evaluation.fixed_point(rule)} for name, rule in rules.items()}}


class Knows:
    """A prior that sees certain pictures, whatever it is shown: of the base one, of the controller its condition."""

    def __init__(self, guess: Tensor | None):
        self.schedule, self.guess = Schedule.cosine(), guess

    def encode(self, image: Tensor) -> Tensor:
        return 2 * image - 1

    def base(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(x) if self.guess is None else self._noise(x, t, self.guess)

    def controlled(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return self._noise(x, t, condition)

    def _noise(self, x: Tensor, t: Tensor, picture: Tensor) -> Tensor:
        a = self.schedule.at(t)
        return (x - a.sqrt() * self.encode(picture)) / (1 - a).sqrt()


def prior_errors(*, base: bool = True, heeds: bool = True, learnt: bool = True) -> dict:
    """The base sees a noisy picture; the controller sees what it is shown, the truth up to little noise."""
    found = []
    for seed in SEEDS:
        truth = case(seed).truth.movedim(-1, 1)
        known, right, wrong = (bad(truth, left, seed) for left in (0.2, 0.1, 0.3))
        maps, others = (right if learnt else known), (wrong if heeds else right)
        found.append(evaluation.prior_quality(Knows(known if base else None), case(seed), maps, others, seed))
    return {"prior_error": {name: seeded([one[name] for one in found]) for name in found[0]}}


def transformer(left: float) -> dict:
    found = []
    for seed in SEEDS:
        small = F.avg_pool2d(bad(case(seed).truth.movedim(-1, 1), left, seed), 2).movedim(1, -1)
        found.append(evaluation.transformer_quality(case(seed), small))
    return {"eft_psnr": {f"{name}/2": seeded([one[name] for one in found]) for name in found[0]}}


# --------------------------------------------------------------------------- scored and judged at a known quality


@cache
def picture() -> Tensor:
    return chairs.chair(0).render(chairs.camera(0.5, 0.4, 64), "a").image.movedim(-1, 0)


def arms(metric: str, **sabotaged: float) -> dict:
    """The metric of every arm at the shares `LEFT`, some of them replaced; two photographs, and three for some."""
    truth = picture()
    measure = {
        "psnr": lambda a, b: psnr(a.flatten()[None], b.flatten()[None], data_range=1.0),
        "gmsd": gmsd,
        "lpips": lambda a, b: random_lpips()(a, b),
    }[metric]
    lefts = {f"{arm}/2": left for arm, left in (LEFT | sabotaged).items() if "/" not in arm}
    lefts |= {"csds/3": sabotaged.get("csds/3", 0.2), "photo/3": sabotaged.get("photo/3", 0.7)}
    return {
        metric: {
            name: seeded([float(measure(bad(truth, left, s), truth)) for s in SEEDS]) for name, left in lefts.items()
        }
    }


def turned(metric: str, **sabotaged: str) -> Callable[[], tuple[dict, dict]]:
    """An arm's picture becomes that of another arm."""
    return lambda: (arms(metric), arms(metric, **{a: LEFT[b] for a, b in sabotaged.items()}))


def blurred(**sabotaged: str) -> dict:
    """Gradient energy of every arm, whose picture is the truth mixed with a blurred copy by its share."""
    truth, rows = picture(), {}
    soft = F.avg_pool2d(truth[None], 5, stride=1, padding=2, count_include_pad=False)[0]
    for arm, left in (LEFT | {a: LEFT[b] for a, b in sabotaged.items()}).items():
        shares = [min(1.0, left + 0.005 * s) for s in SEEDS]
        found = [evaluation.gradient_energy(torch.lerp(truth, soft, share).movedim(0, -1)) for share in shares]
        rows[f"{arm}/2"] = [energy / evaluation.gradient_energy(truth.movedim(0, -1)) for energy in found]
    return {
        "sharpness": {name: seeded(found) for name, found in rows.items()},
        "unsharpness": {name: seeded([abs(math.log2(x)) for x in found]) for name, found in rows.items()},
    }


class Off:
    """A model that renders the true surface, moved backwards."""

    def __init__(self, view, by: float):
        self.rendering = Rendering(torch.zeros(32, 32, 0), view.mask, view.depth + by * (view.depth > 0), {})

    def render(self, camera, *, mode: str) -> Rendering:
        return self.rendering


def surfaces(**sabotaged: str) -> dict:
    """Chamfer distance and error of depth of every arm, whose surface lies behind the true one by its share."""
    rows: dict[str, dict[str, dict[str, float]]] = {"chamfer": {}, "depth_error": {}}
    for arm, left in (LEFT | {a: LEFT[b] for a, b in sabotaged.items()}).items():
        near, deep = [], []
        for seed in SEEDS:
            view = case(seed).scene.test[0]
            model = Off(view, 0.3 * left + 0.002 * seed)
            near.append(evaluation.chamfer(evaluation.rendered_surface(model, [view]), evaluation.true_surface([view])))
            deep.append(evaluation.depth_error(model, view))
        rows["chamfer"][f"{arm}/2"], rows["depth_error"][f"{arm}/2"] = seeded(near), seeded(deep)
    return rows


def both(name: str, honest_and_sabotaged: Callable[[], tuple[dict, dict]]) -> dict[str, Callable]:
    """A claim of the authors and its small stand-in."""
    return dict.fromkeys((name, f"{name}-small"), honest_and_sabotaged)


SABOTAGE: dict[str, Callable[[], tuple[dict, dict]]] = {
    # the authors' claims: the sabotage makes an arm what it would be without the part it is named for
    **both("csds-sharper", lambda: (blurred(), blurred(csds="sds"))),
    **both("csds-right-sharpness", lambda: (blurred(), blurred(csds="sds"))),
    "csds-perceptual": turned("lpips", csds="sds"),
    "csds-perceptual-small": turned("gmsd", csds="sds"),
    **both("csds-psnr", turned("psnr", csds="sds")),
    **both("control-helps", turned("psnr", sds="no_control")),
    **both("prior-helps", turned("psnr", csds="photo")),
    "geometry-chamfer": lambda: (surfaces(), surfaces(csds="photo")),
    "geometry-depth": lambda: (surfaces(), surfaces(csds="photo")),
    "geometry-csds-over-sds": lambda: (surfaces(), surfaces(csds="sds")),
    # where the gain comes from
    "transformer-over-photographs": turned("psnr", eft="photo"),
    "prior-over-transformer": turned("psnr", csds="eft"),
    "prior-over-transformer-perceptual": turned("gmsd", csds="eft"),
    "bootstrap-helps": turned("psnr", csds="no_bootstrap"),
    "more-views": lambda: (arms("psnr"), arms("psnr", **{"csds/3": LEFT["csds"]})),
    "more-views-photo": lambda: (arms("psnr"), arms("psnr", **{"photo/3": LEFT["photo"]})),
    # controls: a leak would make the model as good as the truth, or the right answer as good as a wrong one
    "shuffled-control-loses": turned("psnr", csds="shuffled"),
    "prior-is-not-the-truth": turned("psnr", oracle="sds"),
    "noise-matters-little": turned("psnr", again="sds"),
    # the networks
    "transformer-over-nearest": lambda: (transformer(0.1), transformer(3.0)),
    "base-learnt": lambda: (prior_errors(), prior_errors(base=False)),
    "controller-learnt": lambda: (prior_errors(), prior_errors(learnt=False)),
    "controller-heeds-the-object": lambda: (prior_errors(), prior_errors(heeds=False)),
    # the parts
    "control-starts-at-zero": lambda: (change(sabotaged=False), change(sabotaged=True)),
    "csds-zero-without-control": lambda: (change(sabotaged=False), change(sabotaged=True)),
    "transformer-knows-no-world": lambda: (change(sabotaged=False), change_of_a_world_that_is_seen()),
    "sds-settles-at-the-mean": lambda: (fixed_points(sds="sds"), fixed_points(sds="csds")),
    "csds-overshoots": lambda: (fixed_points(csds="csds"), fixed_points(csds="sds")),
}


def test_every_claim_has_a_sabotage():
    assert set(SABOTAGE) == set(CLAIMS)


@pytest.mark.parametrize("name", SABOTAGE)
def test_sabotage_turns_the_verdict(name):
    assert_sabotage_turns(CLAIMS[name], *SABOTAGE[name]())
