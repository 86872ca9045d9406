"""What is measured beside the scores of test views: points right and wrong, repairs against the truth, exact checks."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from common.metrics.image import psnr
from common.models import lora
from common.models.denoiser import ControlBranch, Controlled, Denoiser
from common.models.diffusion import Schedule, sdedit
from common.record import Record
from papers.lm_gaussian import experiment, method, repair
from papers.lm_gaussian.data import Case
from papers.lm_gaussian.settings import Params

WRONG = 0.1  # a depth this share off the truth makes a wrong point


def report(record: Record, results: Mapping[experiment.Run, Mapping[str, Any]]) -> dict[tuple[str, int], list[float]]:
    """Record every score of every arm, means over scenes and, where there are several, each scene's own.

    Beside the scores: `grown`, by how many Gaussians, and `seconds`. Returns the PSNR by arm and views, one a seed.
    """
    scenes = list(dict.fromkeys(run[1] for run in results))
    psnr: dict[tuple[str, int], list[float]] = {}
    for arm, views, seed in dict.fromkeys((run[0], run[2], run[3]) for run in results):
        rows = {}
        for scene in scenes:
            result = results[arm, scene, views, seed]
            start, end = result["count"]
            rows[scene] = {**result["scores"], "grown": end - start, "seconds": result["seconds"]}
        for name in rows[scenes[0]]:
            mean = statistics.fmean(row[name] for row in rows.values())
            record.metric(name, mean, variant=f"{arm}/{views}", seed=seed)
            for scene, row in rows.items() if len(scenes) > 1 else ():
                record.metric(name, row[name], variant=f"{arm}/{views}/{scene}", seed=seed)
            if name == "psnr":
                psnr.setdefault((arm, views), []).append(mean)
    return psnr


def init_quality(params: Params, case: Case, seed: int) -> dict[str, dict[str, float]]:
    """Of the points of a generated scene before and after cleaning, and of the aligned depth.

    wrong_points     share of the kept points whose depth is more than 10 % off: raw, no_background, cleaned
    background_kept  share of the right points deeper than 1.5 x the median that are kept: the same three
    depth_error      mean relative error of the depth: stereo, aligned
    """
    views = case.scene.train
    depths = [case.stereo[view.name].depth for view in views]
    confidences = [case.stereo[view.name].confidence for view in views]
    cleaned = method.cleaned(views, depths, confidences)
    aware = [method.background_aware(depth, c) for depth, c in zip(depths, cleaned, strict=True)]
    aligned = [
        experiment.aligned(params, case, view, depth, confidence, seed)
        for view, depth, confidence in zip(views, depths, confidences, strict=True)
    ]
    truths = torch.stack([_truth(view.depth) for view in views])
    off = (torch.stack(depths) / truths - 1).abs()
    far = truths > method.BACKGROUND_DEPTH * truths.flatten(1).median(dim=1).values[:, None, None]
    found: dict[str, dict[str, float]] = {"wrong_points": {}, "background_kept": {}}
    for name, values in (("raw", None), ("no_background", cleaned), ("cleaned", aware)):
        kept = torch.ones_like(far) if values is None else torch.stack(values) > method.CONFIDENCE
        found["wrong_points"][name] = float((off[kept] > WRONG).float().mean())
        found["background_kept"][name] = float(kept[far & (off <= WRONG)].float().mean())
    errors = {"stereo": off, "aligned": (torch.stack(aligned) / truths - 1).abs()}
    return found | {"depth_error": {name: float(error.mean()) for name, error in errors.items()}}


def virtual_quality(case: Case, result: dict[str, Any]) -> dict[str, float]:
    """PSNR of the virtual views of the last round against the truth, `drawn` and `repaired` (generated scenes)."""
    truth = _truth(case.truth).flatten(1)
    return {
        name: float(psnr(result[name].to(truth).flatten(1), truth, data_range=1.0).mean())
        for name in ("drawn", "repaired")
    }


@torch.no_grad()
def exact_checks() -> dict[str, float]:
    """How much a new control branch, a new low-rank change and SDEdit at strength 0 alter an output; all must be 0."""
    torch.manual_seed(0)
    denoiser = Denoiser(width=8, depth=2)
    for parameter in denoiser.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    x, t = torch.rand(1, 3, 16, 16), torch.tensor([300])
    alone = denoiser(x, t)
    control = float((Controlled(denoiser, ControlBranch(denoiser))(x, t, x) - alone).abs().max())
    lora.add(denoiser, repair.adapted_layer, rank=2)
    low_rank = float((denoiser(x, t) - alone).abs().max())
    still = sdedit(denoiser, x, Schedule.cosine(), strength=0.0, steps=50, generator=torch.Generator().manual_seed(0))
    return {"control": control, "lora": low_rank, "sdedit_0": float((still - x).abs().max())}


def plans() -> dict[str, dict[str, float]]:
    """Of the authors' two schedules: `rounds` of repair, and `depth_normal_steps`."""
    both = {"360": method.AUTHORS_360, "forward": method.AUTHORS_FORWARD}
    return {
        "rounds": {name: len(plan.rounds) for name, plan in both.items()},
        "depth_normal_steps": {name: plan.depth_normal_steps for name, plan in both.items()},
    }


def _truth(value: Tensor | None) -> Tensor:
    if value is None:
        raise ValueError("real photographs have no truth to compare with.")
    return value
