"""What is measured beside the scores of test views: inputs against the truth, repairs, appearance, exact checks."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.metrics.image import psnr
from common.models.corrector import Corrector
from common.models.diffusion import Schedule
from common.record import Record
from common.splatting.model import Gaussians
from papers.sparsegs_w import experiment, method, photos
from papers.sparsegs_w.data import Case
from papers.sparsegs_w.experiment import ARMS
from papers.sparsegs_w.settings import Params

WRONG = 0.1  # a depth this share off the truth makes a wrong point
Results = Mapping[tuple[str, int], Mapping[str, Any]]  # by arm and seed


def report(record: Record, results: Results, prefix: str = "") -> dict[str, dict[str, list[float]]]:
    """Record scores, `ghost` and `seconds` of every arm, one a seed; returns them by metric and arm."""
    found: dict[str, dict[str, list[float]]] = {}
    for (arm, seed), result in results.items():
        values = {**result["scores"], "ghost": result["ghost"], "seconds": result["seconds"]}
        for name, value in values.items():
            if value is not None:
                record.metric(f"{prefix}{name}", value, variant=arm, seed=seed)
                found.setdefault(name, {}).setdefault(arm, []).append(value)
    return found


def input_quality(case: Case) -> dict[str, dict[str, float]]:
    """Of a scene whose truth is known, before any training.

    mask          iou and recall of the detected masks
    photo_error   mean |photograph - clean view| of all but the reference, where nobody stands: raw, and after adain
    wrong_points  share of the points whose depth is more than 10 % off: with people (unmasked), without (masked)
    """
    true_masks, clean = _known(case.true_masks), _known(case.clean)
    names = [view.name for view in case.scene.train]
    both = (torch.stack([masks[name] for name in names]) for masks in (case.masks, true_masks))
    found: dict[str, dict[str, float]] = {"mask": photos.overlap(*both), "photo_error": {}}
    for name in ("raw", "adain"):
        arm = replace(ARMS["full"], inpaint=False, appearance="none" if name == "raw" else "adain")
        views = experiment.inputs(case, arm, None).views[1:]
        errors = [(view.image - clean[view.name]).abs()[~true_masks[view.name]] for view in views]
        found["photo_error"][name] = float(torch.cat(errors).mean())
    if case.world is not None:
        truths = {view.name: case.world.render(view.camera, view.name, samples=1).depth for view in case.scene.train}
        wrong: dict[str, list[Tensor]] = {"unmasked": [], "masked": []}
        for name in names:
            found_map, truth = case.maps[name], _known(truths[name])
            kept = (found_map.confidence > method.CONFIDENCE) & (truth > 0)
            off = (found_map.depth / truth - 1).abs() > WRONG
            wrong["unmasked"].append(off[kept])
            wrong["masked"].append(off[kept & ~case.masks[name]])
        found["wrong_points"] = {name: float(torch.cat(parts).float().mean()) for name, parts in wrong.items()}
    return found


def hole_error(case: Case, clean: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean |picture - clean view| where a person is found and stands, in the photographs after AdaIN.

    photo: as they are; filled: holes filled smoothly, the classic way; painted: I_clean.
    """
    true_masks, truth = _known(case.true_masks), _known(case.clean)
    views = experiment.inputs(case, replace(ARMS["full"], inpaint=False), None).views
    errors: dict[str, list[Tensor]] = {"photo": [], "filled": [], "painted": []}
    for view in views:
        hole = case.masks[view.name]
        smooth = method.filled(view.image.movedim(-1, 0)[None], hole[None, None])[0].movedim(0, -1)
        inside = hole & true_masks[view.name]
        for name, image in (("photo", view.image), ("filled", smooth), ("painted", clean[view.name])):
            errors[name].append((image - truth[view.name]).abs()[inside])
    return {name: float(torch.cat(parts).mean()) for name, parts in errors.items()}


@torch.no_grad()
def lent(case: Case, model: Gaussians, index: int, view: int) -> dict[str, Tensor]:
    """A test view in the appearance of photograph `index`, [3, H, W] by the way it is brought to it.

    none: the render as it is. adain: the render's own style becomes the photograph's. matched: what AdaIN makes of the
    render *from the photograph's own camera* is done to this one; so both styles are of the same things.
    """
    photo = case.scene.train[index]
    mask = case.masks[photo.name]
    to = method.style(photo.image.movedim(-1, 0), mask)
    ours, there = (
        experiment.picture(model, camera).movedim(-1, 0) for camera in (case.scene.test[view].camera, photo.camera)
    )
    restyled = {"adain": method.style(ours), "matched": method.style(there, mask)}
    return {"none": ours} | {name: method.adain(ours, of, to).clamp(0, 1) for name, of in restyled.items()}


def appearance_control(case: Case, model: Gaussians) -> dict[str, float]:
    """Mean PSNR of test views in the appearance of each photograph but the reference, against the truth in that."""
    lights = _known(case.lights)
    found: dict[str, list[float]] = {}
    for index, photo in enumerate(case.scene.train[1:], start=1):
        for number, view in enumerate(case.scene.test):
            truth = lights[photo.name](view.image).movedim(-1, 0)
            for name, ours in lent(case, model, index, number).items():
                value = float(psnr(ours.flatten()[None], truth.flatten()[None], data_range=1.0))
                found.setdefault(name, []).append(value)
    return {name: statistics.fmean(values) for name, values in found.items()}


def round_quality(pages: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean PSNR over all rounds of the virtual views, `drawn` and `repaired`, and of both in the first and last one."""
    found = {}
    for name in ("drawn", "repaired"):
        values = [page[f"{name}_psnr"] for page in pages]
        found |= {name: statistics.fmean(values), f"{name}_first": values[0], f"{name}_last": values[-1]}
    return found


@torch.no_grad()
def exact_checks() -> dict[str, float]:
    """Largest errors of what must hold exactly, up to rounding.

    constraint  block means of a constrained picture against those of the render
    adain       a picture whose channels were scaled and shifted, brought back to its own style
    outside     an inpainted photograph outside of its holes
    untrained   a repair by a small model that has learnt nothing
    """
    draw = torch.Generator().manual_seed(0)
    image, other = torch.rand(2, 1, 3, 16, 24, generator=draw)
    down = [F.avg_pool2d(picture, 4) for picture in (image, method.constrained(other, image, 4))]
    gain, offset = torch.rand(2, 3, 1, 1, generator=draw) + 0.2
    changed = gain * image + offset
    back = method.adain(changed, method.style(changed), method.style(image))
    torch.manual_seed(0)
    model = Corrector(Schedule.cosine(), width=8, depth=2)
    hole = torch.zeros(1, 1, 16, 24, dtype=torch.bool)
    hole[..., 4:10, 5:15] = True
    predict = partial(model, condition=image)
    options = {"strength": 0.6, "steps": 5, "generator": draw}
    painted = method.inpainted(predict, image, method.filled(image, hole), hole, model.schedule, **options)
    repaired = method.enhanced(predict, image, model.schedule, **options)
    return {
        "constraint": float((down[0] - down[1]).abs().max()),
        "adain": float((back - image).abs().max()),
        "outside": float((painted - image).abs()[~hole.expand_as(image)].max()),
        "untrained": float((repaired - image).abs().max()),
    }


def schedule(params: Params) -> dict[str, dict[str, float]]:
    """Reach and strength of the first and the last round of the whole method, and how many views it repairs in all."""
    plan = experiment.rounds(params, ARMS["full"])
    one = experiment.rounds(params, ARMS["one_shot"])
    ends = {"first": 0, "last": plan.count - 1}
    return {
        "reach": {name: plan.reach(turn) for name, turn in ends.items()},
        "strength": {name: plan.strength(turn) for name, turn in ends.items()},
        "repaired_views": {"full": plan.count * plan.size(), "one_shot": one.size()},
    }


def _known(value: Any) -> Any:
    if value is None:
        raise ValueError("the truth of this scene is not known, so there is nothing to compare with.")
    return value
