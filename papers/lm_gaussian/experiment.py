"""The arms that are compared, and how one of them is trained. The idea itself is in `method.py`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from common import seeds
from common.metrics.perceptual import gmsd, load_lpips
from common.splatting import PointCloud, View
from common.splatting.evaluation import evaluate
from common.splatting.model import Gaussians
from common.splatting.settings import TrainSettings
from common.splatting.strategies import DefaultStrategy
from common.splatting.training import fit
from common.splatting.virtual import point_image
from papers.lm_gaussian import data, method, priors, repair
from papers.lm_gaussian.data import Case
from papers.lm_gaussian.settings import Params

Start = Literal["sfm", "raw", "no_background", "cleaned"]
Priors = Literal["standin", "perfect", "shuffled"]
Mender = Literal["none", "diffusion", "no_lora", "oracle", "shuffled"]


@dataclass(frozen=True)
class Stage1:
    """How an arm begins.

    losses   those of method.Weights that it has
    covered  the virtual views are compared with the points only where there are some
    """

    label: str
    start: Start = "cleaned"
    losses: tuple[str, ...] = ()
    priors: Priors = "standin"
    covered: bool = False
    variant: method.Variant = method.AS_RELEASED


@dataclass(frozen=True)
class Stage2:
    """How an arm goes on: from which stage 1, and who repairs the virtual views (none: photographs alone)."""

    label: str
    after: str = "regularised"
    mender: Mender = "diffusion"


ALL = ("depth", "normal", "virtual")
LOSSES = (*ALL, "depth_normal")
PRIOR_SEED = 0  # one diffusion model serves all seeds, as there is one Stable Diffusion

# LM-5, LM-6 and LM-7 are the first lines; the others are controls and what the released script leaves out
STAGE1 = {
    "sfm": Stage1("SfM points", start="sfm", variant=method.Variant(densify=True)),
    "raw": Stage1("raw stereo", start="raw"),
    "init": Stage1("cleaned init"),
    "depth": Stage1("+ depth", losses=("depth",)),
    "normal": Stage1("+ normals", losses=("depth", "normal")),
    "regularised": Stage1("+ virtual views", losses=ALL),
    "no_background": Stage1("no background rule", start="no_background"),
    "covered": Stage1("virtual where covered", losses=ALL, covered=True),
    "perfect_priors": Stage1("perfect priors", losses=ALL, priors="perfect"),
    "shuffled_priors": Stage1("shuffled priors", losses=ALL, priors="shuffled"),
    "densified": Stage1("with densification", losses=ALL, variant=method.Variant(densify=True)),
    "depth_normal": Stage1("with depth-normal", losses=ALL, variant=method.Variant(depth_normal=True)),
    "aligned": Stage1("with alignment", losses=ALL, variant=method.Variant(guided_alignment=True)),
    "as_described": Stage1("with all three", losses=ALL, variant=method.AS_DESCRIBED),
}
STAGE2 = {
    "full": Stage2("+ repair"),
    "longer": Stage2("no repair, as long", mender="none"),
    "full_covered": Stage2("+ repair, covered", after="covered"),
    "longer_covered": Stage2("no repair, covered", after="covered", mender="none"),
    "no_lora": Stage2("repair without LoRA", mender="no_lora"),
    "oracle": Stage2("repaired by the truth", mender="oracle"),
    "shuffled_repair": Stage2("shuffled repair", mender="shuffled"),
}
ARMS: dict[str, Stage1 | Stage2] = {**STAGE1, **STAGE2}
Run = tuple[str, str, int, int]  # arm, scene, views, seed


def plan(params: Params) -> method.Plan:
    """The schedule of a run; where depth and normals have to agree, they do from the middle of stage 1 on."""
    return method.Plan(params.stage1, params.steps, params.every, params.stage1 // 2)


def first_stages(runs: Iterable[Run]) -> list[Run]:
    """The first stages that some runs need, each once: their own, or the one that their second stage goes on from."""
    needed = {(after(run[0]), *run[1:]) for run in runs}
    return sorted(needed, key=lambda run: (list(STAGE1).index(run[0]), *run[1:]))


def after(arm: str) -> str:
    """The first stage of an arm."""
    return STAGE2[arm].after if arm in STAGE2 else arm


def cloud(params: Params, case: Case, arm: Stage1, seed: int) -> PointCloud:
    """All points that an arm starts from, before they are thinned."""
    views = case.scene.train
    if arm.start == "sfm":
        if case.scene.points is None:
            raise ValueError(f"scene {case.scene.name} has no sparse points, so the arm sfm cannot start.")
        return case.scene.points
    stereo = _perfect(case.perfect_stereo) if arm.priors == "perfect" else case.stereo
    depths = [stereo[view.name].depth for view in views]
    confidences = [stereo[view.name].confidence for view in views]
    if arm.start == "raw":
        return method.fused(views, depths, [torch.full_like(c, torch.inf) for c in confidences])
    if arm.variant.guided_alignment:
        depths = [
            aligned(params, case, view, depth, confidence, seed)
            for view, depth, confidence in zip(views, depths, confidences, strict=True)
        ]
    kept = method.cleaned(views, depths, confidences)
    if arm.start != "no_background":
        kept = [method.background_aware(depth, c) for depth, c in zip(depths, kept, strict=True)]
    return method.fused(views, depths, kept)


def aligned(params: Params, case: Case, view: View, depth: Tensor, confidence: Tensor, seed: int) -> Tensor:
    """The depth of a view after the alignment that the released script switches off."""
    return method.guided_alignment(
        view,
        depth,
        confidence,
        case.mono[view.name].depth,
        steps=params.align_steps,
        box=params.align_box,
        generator=seeds.generator(seed, "alignment", view.name, device=depth.device),
    )


@seeds.one_thread()
def stage1(params: Params, case: Case, name: str, seed: int, *, progress: bool = False) -> dict[str, Any]:
    """Train the first stage of an arm.

    Returns `model` (parameters by name), `early` renders by view, `loss` by step, `count` of Gaussians at the start and
    the end, `seconds`, `points` of the whole cloud, and `scores`.
    """
    arm, began = STAGE1[name], time.perf_counter()
    points = cloud(params, case, arm, seed)
    chosen = points
    if params.points and len(points) > params.points:
        some = torch.randperm(len(points), generator=seeds.generator(seed, "thinned"))[: params.points]
        chosen = points.select(some.to(points.positions.device))
    model = Gaussians.from_points(chosen, sh_degree=params.sh_degree, initial_opacity=0.1)
    start, early = len(model), method.EarlyRenders(params.early_until, params.early_most)
    extensions: list[Any] = [early]
    if arm.losses:
        virtual = [point_image(points, camera) for camera in case.virtual]
        given = (*arm.losses, "depth_normal")
        weights = method.Weights(**{name: getattr(params, f"w_{name}") * (name in given) for name in LOSSES})
        late = plan(params).late if arm.variant.depth_normal else params.stage1
        options = {"box": params.box, "late": late, "covered": arm.covered}
        extensions.append(method.MultiModal(_mono(case, arm), virtual, weights, **options))
    settings = _settings(
        params, params.stage1, seed, mode="RGB+ED", strategy=_growth(params) if arm.variant.densify else None
    )
    result = fit(case.scene, settings, model=model, extensions=extensions, progress=progress)
    return {
        "model": result.model.values(),
        "early": early.renders,
        "loss": result.losses,
        "count": (start, len(result.model)),
        "points": len(points),
        "seconds": time.perf_counter() - began,
        "scores": scores(params, case, result.model, result.background),
    }


@seeds.one_thread()
def stage2(
    params: Params, case: Case, name: str, first: Mapping[str, Any], prior: Any, seed: int, *, progress: bool = False
) -> dict[str, Any]:
    """Go on from a result of `stage1`; `prior` is what `prior` returned (None where the authors' models are used).

    Returns what stage1 does (without early renders) and the virtual views `drawn` and `repaired` of the last round.
    """
    arm, began = STAGE2[name], time.perf_counter()
    model = Gaussians(**first["model"]).to(params.device)
    extensions = []
    mend = mender(params, case, arm.mender, first["early"], prior, seed)
    if mend is not None:
        weights = method.distance_weights(case.virtual, case.scene.train)
        extensions.append(method.Refinement(case.virtual, weights, mend, every=params.every, rewind=params.rewind))
    settings = replace(_settings(params, params.steps - params.stage1, seed), sh_every=0, sh_degree=params.sh_degree)
    result = fit(case.scene, settings, model=model, extensions=extensions, progress=progress)
    found = {
        "model": result.model.values(),
        "loss": result.losses,
        "count": (len(first["model"]["means"]), len(result.model)),
        "seconds": time.perf_counter() - began,
        "scores": scores(params, case, result.model, result.background),
    }
    if extensions:
        found |= {"drawn": extensions[0].drawn.cpu(), "repaired": extensions[0].targets.cpu()}
    return found


def mender(
    params: Params, case: Case, kind: Mender, early: Mapping[str, list[Tensor]], prior: Any, seed: int
) -> Callable[[Tensor, int], Tensor] | None:
    """Who repairs: the diffusion model, the truth, or the model's work shown at the wrong cameras; None: nobody."""
    if kind == "none":
        return None
    if kind == "oracle":
        truth = _perfect(case.truth)
        return lambda drawn, turn: truth
    pairs = None if kind == "no_lora" else repair.early_pairs(early, case.scene.train)
    found = repair.repairer(params, prior, pairs, seed)
    if kind == "shuffled":
        return lambda drawn, turn: found(drawn, turn).roll(len(drawn) // 2, dims=0)
    return found


@seeds.one_thread()
def prior(params: Params) -> dict[str, Any]:
    """The small diffusion model's training, `repair.train_prior`, and its `error` on pictures of the last scene."""
    pairs = repair.bad_pictures(data.prior_scenes(params), PRIOR_SEED)
    kept = len(pairs) // params.prior_scenes
    found = repair.train_prior(params, pairs[:-kept], PRIOR_SEED)
    network = repair.small_network(params, found["state"])
    return found | {"error": repair.held_out_error(network, pairs[-kept:], params)}


@torch.no_grad()
def scores(params: Params, case: Case, model: Gaussians, background: Tensor) -> dict[str, float]:
    """Means over the test views: `psnr` (dB), `ssim`, `gmsd`, and `lpips` where the parameters name its network."""
    found = evaluate(model, case.scene.test, background=background)
    means = {name: found.mean(name) for name in ("psnr", "ssim")}
    perceptual: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"gmsd": gmsd}
    if params.lpips:
        perceptual["lpips"] = load_lpips(params.lpips).to(background.device)
    shown = [picture(model, view, background).movedim(-1, 0) for view in case.scene.test]
    for name, distance in perceptual.items():
        values = [
            float(distance(ours, view.image.movedim(-1, 0))) for ours, view in zip(shown, case.scene.test, strict=True)
        ]
        means[name] = statistics.fmean(values)
    return {name: value for name, value in means.items() if value is not None}


@torch.no_grad()
def picture(model: Gaussians, view: View, background: Tensor) -> Tensor:
    """[H, W, 3] the render of a view, limited to 0..1."""
    return model.render(view.camera, background=background).image.clamp(0, 1)


def _mono(case: Case, arm: Stage1) -> dict[str, method.Mono]:
    if arm.priors == "perfect":
        return _perfect(case.perfect_mono)
    return priors.shuffled(case.mono) if arm.priors == "shuffled" else case.mono


def _perfect(value: Any) -> Any:
    if value is None:
        raise ValueError("real photographs have no truth: leave perfect_priors and oracle out of the arms.")
    return value


def _growth(params: Params) -> DefaultStrategy:
    """3DGS's growth, its steps in the same relation to stage 1 as 500, 15,000, 100 and 3,000 are to 30,000."""
    of = params.stage1 / 30_000
    return DefaultStrategy(
        first=round(500 * of),
        until=round(15_000 * of),
        every=max(10, round(100 * of)),
        reset_every=params.stage1,  # a reset costs more steps than so short a training has
        most=4 * params.points or None,
    )


def _settings(params: Params, iterations: int, seed: int, **more: Any) -> TrainSettings:
    return TrainSettings(
        iterations=iterations,
        seed=seed,
        lr_means=params.lr_means,
        lr_means_final=params.lr_means_final,
        lr_means_until=params.steps,
        lr_scales=params.lr_scales,
        lr_quats=params.lr_quats,
        lr_opacities=params.lr_opacities,
        lr_sh0=params.lr_sh0,
        lr_shN=params.lr_sh0 / 20,
        sh_degree=params.sh_degree,
        sh_every=params.sh_every,
        background="black",
        **{"strategy": None, **more},
    )
