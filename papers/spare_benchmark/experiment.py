"""The arms that are compared, and how one of them is trained and scored. The protocol is in `method.py`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from common import seeds
from common.metrics.perceptual import gmsd, load_lpips
from common.splatting import Scene
from common.splatting.extensions import Extension
from common.splatting.model import Gaussians
from common.splatting.priors import DepthPrior, NetworkPrior
from common.splatting.training import FitResult, TrainSettings, fit
from papers.spare_benchmark import data, method
from papers.spare_benchmark.corgs import CoRGS
from papers.spare_benchmark.entrants import FSGS, DNGaussian, DropGaussian
from papers.spare_benchmark.lmgaussian import LMGaussian, released
from papers.spare_benchmark.settings import Params

CURVE_POINTS = 100
TIMED_POINTS, TIMED_MOST = 10_000, 20_000  # Gaussians of the timed run, at the start and at most
TIMED_THREADS = 2

Extend = Callable[[DepthPrior, data.Prepared], list[Extension]]
Change = Callable[[TrainSettings, bool], TrainSettings]  # settings, and whether the cameras face forward


@dataclass(frozen=True)
class Arm:
    """A row of the table.

    add       the extensions
    depth     it looks at rendered depth
    random_background   as the authors train, on sets where that is possible
    iterations, grow_grad2d   the authors'
    change    of the common settings, where the authors' differ in more
    sparse    starts from structure from motion instead of dense stereo
    prior     honest, or one of the controls
    """

    label: str
    add: Extend
    depth: bool = False
    random_background: bool = False
    iterations: int = method.AUTHORS_ITERATIONS
    grow_grad2d: float = 5e-4
    sparse: bool = False
    change: Change = lambda settings, _: settings
    prior: Literal["honest", "exact", "shuffled"] = "honest"


ARMS: dict[str, Arm] = {
    "3dgs": Arm("3DGS", lambda *_: []),
    "fsgs": Arm("FSGS", lambda prior, given: [FSGS(prior, forward=given.forward)], depth=True),
    "dngaussian": Arm(
        "DNGaussian",
        lambda prior, _: [DNGaussian(prior)],
        depth=True,
        iterations=DNGaussian.ITERATIONS,
        grow_grad2d=DNGaussian.GROW_GRAD2D,
    ),
    "corgs": Arm("CoR-GS", lambda *_: [CoRGS()], random_background=True),
    "dropgaussian": Arm("DropGaussian", lambda *_: [DropGaussian()]),
    "lm_gaussian": Arm(
        "LM-Gaussian-like",
        lambda prior, given: [LMGaussian(prior, given.cloud, forward=given.forward)],
        change=released,
    ),
    # parts of them
    "dropgaussian_fixed": Arm("DropGaussian, fixed rate", lambda *_: [DropGaussian(progressive=False)]),
    "corgs_prune": Arm("CoR-GS, co-pruning alone", lambda *_: [CoRGS(agree=False)], random_background=True),
    "corgs_agree": Arm("CoR-GS, co-regularisation alone", lambda *_: [CoRGS(prune=False)], random_background=True),
    "corgs_neither": Arm("CoR-GS, neither", lambda *_: [], random_background=True),
    "3dgs_sfm": Arm("3DGS from sparse points", lambda *_: [], sparse=True),
    "fsgs_sfm_unpool": Arm("+ unpooling", lambda *_: [FSGS(None)], sparse=True),
    "fsgs_sfm_depth": Arm(
        "+ depth", lambda prior, given: [FSGS(prior, forward=given.forward, pseudo=False)], depth=True, sparse=True
    ),
    "fsgs_sfm": Arm(
        "+ pseudo views (FSGS)", lambda prior, given: [FSGS(prior, forward=given.forward)], depth=True, sparse=True
    ),
    "lm_gaussian_neither": Arm("LM-Gaussian-like, no losses", lambda *_: [], change=released),
    "lm_gaussian_depth": Arm(
        "LM-Gaussian-like, depth alone",
        lambda prior, given: [LMGaussian(prior, given.cloud, forward=given.forward, virtual=False)],
        change=released,
    ),
    # what the depth prior is worth
    "fsgs_exact": Arm(
        "FSGS, perfect prior", lambda prior, given: [FSGS(prior, forward=given.forward)], depth=True, prior="exact"
    ),
    "fsgs_shuffled": Arm(
        "FSGS, shuffled prior", lambda prior, given: [FSGS(prior, forward=given.forward)], depth=True, prior="shuffled"
    ),
}


@seeds.one_thread()  # as the workers have; two runs side by side beat one on two threads
def run(params: Params, arm: str, prepared: data.Prepared, seed: int) -> dict[str, Any]:
    """Train one arm with one seed and score it on the test views.

    Returns `scores` {metric: mean over the test views}, `renders` [T, H, W, 3] of the test views in uint8, `depth`
    [H, W] of the first of them, `losses` [(step, loss)], `gaussians` and `seconds` of training.
    """
    result = train(params, arm, prepared, seed)
    scene = prepared.scene.to(params.device)
    scores, renders = score(params, result, scene)
    with torch.no_grad():
        depth = result.model.render(scene.test[0].camera, mode="ED").depth
    assert depth is not None
    every = max(1, len(result.losses) // CURVE_POINTS)
    return {
        "scores": scores,
        "renders": (255 * renders).round().to(torch.uint8).cpu(),
        "depth": depth.cpu(),
        "losses": list(enumerate(result.losses, start=1))[::every],
        "gaussians": len(result.model),
        "seconds": result.seconds,
    }


def timing(params: Params) -> dict[str, Any]:
    """Plain 3DGS on fern from three views at the protocol's 504 x 378, on TIMED_THREADS threads; run nothing beside it.

    The authors' 3DGS but for the number of Gaussians: opacity resets, SH degree 3. Returns `scores`, `gaussians` at the
    end, and `seconds` on the clock and `cpu_seconds` of all threads, from the photographs to the scores: points by
    stereo, training with densification, evaluation.
    """
    full = replace(params, factor_fern=8, points=TIMED_POINTS, most=TIMED_MOST, iterations=params.timing_iterations)
    full = replace(full, reset=True, sh_degree=3)
    before = torch.get_num_threads()
    torch.set_num_threads(TIMED_THREADS)
    try:
        clock, cpu = time.perf_counter(), time.process_time()
        prepared = data.prepare(full, "fern", 3, "fern")
        result = train(full, "3dgs", prepared, params.seeds[0])
        scores, _ = score(full, result, prepared.scene.to(full.device))
        seconds, cpu_seconds = time.perf_counter() - clock, time.process_time() - cpu
    finally:
        torch.set_num_threads(before)
    return {"scores": scores, "gaussians": len(result.model), "seconds": seconds, "cpu_seconds": cpu_seconds}


def train(params: Params, arm: str, prepared: data.Prepared, seed: int) -> FitResult:
    """One training. Runs of one seed start from the same points and see the views in the same order."""
    about = ARMS[arm]
    scene = data.start(params, prepared, seed, sparse=about.sparse)
    random_background = about.random_background and prepared.random_background
    settings = method.settings(
        max(1, round(params.iterations * about.iterations / method.AUTHORS_ITERATIONS)),
        seed,
        most=params.most,
        reset=params.reset,
        grow_grad2d=about.grow_grad2d,
        sh_degree=params.sh_degree,
        depth=about.depth,
        random_background=random_background,
        alpha_masks=random_background and scene.background is not None,
    )
    assert scene.points is not None
    model = Gaussians.from_points(scene.points, sh_degree=params.sh_degree)
    extensions = about.add(_prior(params, about, prepared, scene), prepared)
    return fit(scene, about.change(settings, prepared.forward), model=model, extensions=extensions, progress=False)


@torch.no_grad()
def score(params: Params, result: FitResult, scene: Scene) -> tuple[dict[str, float], Tensor]:
    """The six metrics, each the mean over the test views that have it, and the renders [T, H, W, 3]."""
    measure, name = perceptual(params)
    views, renders = [], []
    for view in scene.test:
        image = result.model.render(view.camera, background=result.background).image.clamp(0, 1)
        views.append(method.six_metrics(view, image, measure, name))
        renders.append(image)
    names = dict.fromkeys(metric for found in views for metric in found)
    means = {metric: statistics.fmean(found[metric] for found in views if metric in found) for metric in names}
    return means, torch.stack(renders)


def perceptual(params: Params) -> tuple[Callable[[Tensor, Tensor], Tensor], str]:
    """The perceptual metric of the run, and the name it is recorded by.

    Raises common.metrics.perceptual.MissingWeights where LPIPS is asked for and its weights are not there.
    """
    if params.perceptual == "gmsd":
        return gmsd, "gmsd"
    return load_lpips(params.lpips_net, params.lpips_weights or None).to(params.device), "lpips"


def plan(params: Params) -> list[tuple[str, str, int]]:
    """(arm, set, views) of everything that is trained, without repetitions."""
    runs = [(arm, set_, views) for set_ in params.dataset for views in method.VIEW_COUNTS[set_] for arm in params.arms]
    runs += [(arm, set_, method.VIEW_COUNTS[set_][0]) for set_ in params.main_sets for arm in params.ablations]
    for set_ in params.dataset:
        known = params.controls if set_ == "generated" else [a for a in params.controls if ARMS[a].prior != "exact"]
        runs += [(arm, set_, method.VIEW_COUNTS[set_][0]) for arm in known]
    if "fern" in params.dataset:
        runs.append(("3dgs", "fern_coarse", 3))
    return list(dict.fromkeys(runs))


def sets(params: Params) -> list[str]:
    """The sets that are needed."""
    return list(dict.fromkeys(set_ for _, set_, _ in plan(params)))


def jobs(params: Params, prepared: dict[tuple[str, int, str], data.Prepared]) -> dict[str, Callable[[], dict]]:
    """The trainings by key `arm/set/views/scene/seed`, seeds outermost: an interrupted run has whole seeds."""
    return {
        f"{arm}/{set_}/{views}/{scene}/{seed}": partial(run, params, arm, prepared[set_, views, scene], seed)
        for seed in params.seeds
        for arm, set_, views in plan(params)
        for scene in data.scene_names(params, set_)
    }


def _prior(params: Params, arm: Arm, prepared: data.Prepared, scene: Scene) -> DepthPrior:
    if arm.prior == "exact":
        if prepared.exact is None:
            raise ValueError(f"{arm.label}: the true depth of {prepared.scene.name} is not known.")
        return prepared.exact
    if arm.prior == "shuffled":
        return prepared.prior.shuffled()
    if params.prior == "network":
        from common.models.depth import load_depth_network

        return NetworkPrior(params.depth_model, load_depth_network(params.depth_model, params.device), scene.train)
    return prepared.prior
