"""The arms that are compared, and how one of them is trained. The idea itself is in `method.py`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from common import seeds
from common.metrics.image import psnr, ssim
from common.metrics.perceptual import gmsd, load_lpips
from common.splatting import Camera, PointCloud, View
from common.splatting.extensions import Extension, PerViewColour
from common.splatting.model import Gaussians
from common.splatting.settings import TrainSettings
from common.splatting.training import fit
from papers.sparsegs_w import method
from papers.sparsegs_w.data import Case
from papers.sparsegs_w.prior import Mender, mender
from papers.sparsegs_w.settings import Params

Masks = Literal["none", "detected", "perfect"]
Appearance = Literal["none", "adain", "affine"]
Novel = Literal["none", "cnve", "unconstrained", "oracle", "shuffled"]
Enhance = Callable[[Tensor, list[Camera], int], Tensor]


@dataclass(frozen=True)
class Arm:
    """What an arm has of the method.

    masks        which pixels are left out of points, AdaIN and the photographs' loss
    inpaint      masked pixels are painted over and compared too; without it they are free
    appearance   AdaIN towards the reference, an affine map of colours learnt for each photograph, or nothing
    novel        who repairs virtual views; none: there are none
    restyle      AdaIN towards the reference also while they are repaired
    progressive  near views first, with falling strength; False: all at once
    """

    label: str
    masks: Masks = "detected"
    inpaint: bool = True
    appearance: Appearance = "adain"
    novel: Novel = "cnve"
    restyle: bool = True
    progressive: bool = True


ARMS = {
    "raw": Arm("3DGS as it is", "none", False, "none", "none"),
    "no_oh": Arm("no OH", masks="none", inpaint=False),
    "no_adain": Arm("no appearance", appearance="none"),
    "no_cnve": Arm("no CNVE", novel="none"),
    "one_shot": Arm("one-shot sampling", progressive=False),
    "full": Arm("whole method"),
    "affine": Arm("affine, not AdaIN", appearance="affine"),
    "affine_alone": Arm("affine + masks alone", inpaint=False, appearance="affine", novel="none"),
    "no_inpaint": Arm("masks alone", inpaint=False),
    "plain_repair": Arm("repair without AdaIN", restyle=False),
    "unconstrained": Arm("no constraint", novel="unconstrained"),
    "perfect_masks": Arm("perfect masks", masks="perfect"),
    "shuffled": Arm("shuffled repair", novel="shuffled"),
    "oracle": Arm("repaired by the truth", novel="oracle"),
}


@dataclass(frozen=True, eq=False)
class Inputs:
    """What an arm makes of the photographs.

    views  in the arm's appearance;  masks [H, W] bool by name, empty: nothing is masked
    clean  [H, W, 3] the same without transients, by name; empty: not painted over
    """

    views: tuple[View, ...]
    masks: dict[str, Tensor]
    clean: dict[str, Tensor]


def rounds(params: Params, arm: Arm) -> method.Rounds:
    """The schedule of an arm's virtual views."""
    return method.Rounds(
        params.warm,
        params.every,
        params.rounds,
        params.round_views,
        params.strength_first,
        params.strength_last,
        arm.progressive,
    )


def inputs(case: Case, arm: Arm, model: Mender | None) -> Inputs:
    """The photographs after AdaIN and OH, as far as the arm has them; `model` is None for arms without both."""
    masks = {"none": {}, "detected": case.masks, "perfect": case.true_masks}[arm.masks]
    if masks is None:
        raise ValueError("nobody knows the perfect masks of real collections: leave the arm perfect_masks out.")
    views = list(case.scene.train)
    if arm.appearance == "adain":
        to = _style(case.reference, masks)
        views = [replace(view, image=_restyled(view.image, _style(view, masks), to)) for view in views]
    clean = {}
    if arm.inpaint:
        assert model is not None
        clean = {view.name: model.clean(view.name, view.image, masks[view.name]) for view in views}
    return Inputs(tuple(views), dict(masks), clean)


def start(params: Params, case: Case, given: Inputs, seed: int) -> PointCloud:
    """The points that an arm starts from."""
    maps = [case.maps[view.name] for view in given.views]
    masks = [given.masks.get(view.name) for view in given.views]
    points = method.fused(given.views, [m.depth for m in maps], [m.confidence for m in maps], masks)
    if params.points and len(points) > params.points:
        some = torch.randperm(len(points), generator=seeds.generator(seed, "thinned"))[: params.points]
        points = points.select(some.to(points.positions.device))
    return points


@seeds.one_thread()
def train(params: Params, case: Case, name: str, prior: Any, seed: int, *, progress: bool = False) -> dict[str, Any]:
    """Train an arm; `prior` is what `prior.train` returned (None where the authors' model is used).

    Returns `model` (parameters by name), `colour` (the reference's [3, 4] map of the affine arms, else None), `scores`,
    `ghost` where the clean views are known, `clean` photographs, `rounds` (see `_Diary`), `loss` by step, `seconds`.
    """
    arm, began = ARMS[name], time.perf_counter()
    model = mender(params, prior, seed) if arm.inpaint or arm.novel not in ("none", "oracle") else None
    given, diary = inputs(case, arm, model), _Diary(case, arm)
    extensions: list[Extension] = []
    colour = PerViewColour() if arm.appearance == "affine" else None
    if colour is not None:
        extensions.append(colour)
    if given.clean:
        extensions.append(method.Uncovered(given.clean, given.masks, params.w_clean))
    if arm.novel != "none":
        plan, options = rounds(params, arm), {"dssim": params.dssim_virtual, "ramp": params.ramp}
        repair = enhancer(case, arm, plan, given, model)
        extensions.append(method.NovelViews(plan, repair, weight=params.w_virtual, on_round=diary.note, **options))
    result = fit(
        replace(case.scene, train=given.views),
        settings(params, seed),
        model=Gaussians.from_points(start(params, case, given, seed), sh_degree=params.sh_degree),
        extensions=extensions,
        weights={photo: (~mask).float() for photo, mask in given.masks.items()},
        progress=progress,
    )
    mapped = None if colour is None else colour.maps[0].detach()
    seconds = time.perf_counter() - began
    return {
        "model": result.model.values(),
        "colour": mapped,
        "scores": scores(params, case, result.model, mapped),
        "ghost": ghost(case, result.model, mapped),
        "clean": given.clean,
        "rounds": diary.pages,
        "loss": result.losses,
        "seconds": seconds,
    }


def enhancer(case: Case, arm: Arm, plan: method.Rounds, given: Inputs, model: Mender | None) -> Enhance:
    """Who repairs virtual views: the diffusion model, the truth, or the model's work at the wrong cameras."""
    if arm.novel == "oracle":
        return lambda drawn, cameras, turn: case.truth(cameras)
    assert model is not None
    name = case.reference.name
    reference = given.clean.get(name, given.views[0].image) if arm.appearance == "adain" and arm.restyle else None

    def repair(drawn: Tensor, cameras: list[Camera], turn: int) -> Tensor:
        options = {"strength": plan.strength(turn), "constrained": arm.novel != "unconstrained"}
        target = model.enhance(drawn, turn, reference=reference, **options)
        return target.roll(len(target) // 2, dims=0) if arm.novel == "shuffled" else target

    return repair


@torch.no_grad()
def scores(params: Params, case: Case, model: Gaussians, colour: Tensor | None) -> dict[str, float]:
    """Means over the test views: `psnr` (dB), `ssim`, `gmsd`, and `lpips` where the parameters name its network.

    Test views with an appearance of their own (real collections) lend it to the render from their left half, and are
    compared on the right, as NeRF in the wild does.
    """
    measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "psnr": lambda a, b: psnr(a.flatten()[None], b.flatten()[None], data_range=1.0),
        "ssim": lambda a, b: ssim(a, b, data_range=1.0, border="zero").mean(),
        "gmsd": gmsd,
    }
    if params.lpips:
        measures["lpips"] = load_lpips(params.lpips).to(model.means.device)
    found: dict[str, list[float]] = {name: [] for name in measures}
    for view in case.scene.test:
        ours, photo = picture(model, view.camera, colour).movedim(-1, 0), view.image.movedim(-1, 0)
        if not case.reference_tests:
            middle = photo.shape[-1] // 2
            left = (method.style(half[..., :middle]) for half in (ours, photo))
            ours, photo = method.adain(ours, *left).clamp(0, 1)[..., middle:], photo[..., middle:]
        for name, measure in measures.items():
            found[name].append(float(measure(ours, photo)))
    return {name: statistics.fmean(values) for name, values in found.items()}


@torch.no_grad()
def ghost(case: Case, model: Gaussians, colour: Tensor | None) -> float | None:
    """What is left of the people: mean |render - clean view| over the pixels they touch in the photographs."""
    if case.true_masks is None or case.clean is None:
        return None
    errors = []
    for view in case.scene.train:
        error = (picture(model, view.camera, colour) - case.clean[view.name]).abs().mean(dim=-1)
        errors.append(error[case.true_masks[view.name]])
    return float(torch.cat(errors).mean())


@torch.no_grad()
def picture(model: Gaussians, camera: Camera, colour: Tensor | None = None) -> Tensor:
    """[H, W, 3] the render in 0..1, through the reference's map of colours where there is one."""
    image = model.render(camera, background=model.means.new_zeros(3)).image
    return (image if colour is None else image @ colour[:, :3].T + colour[:, 3]).clamp(0, 1)


def settings(params: Params, seed: int) -> TrainSettings:
    """The training of every arm."""
    return TrainSettings(
        iterations=params.steps,
        seed=seed,
        lr_means=params.lr_means,
        lr_means_final=params.lr_means_final,
        lr_scales=params.lr_scales,
        lr_quats=params.lr_quats,
        lr_opacities=params.lr_opacities,
        lr_sh0=params.lr_sh0,
        lr_shN=params.lr_sh0 / 20,
        sh_degree=params.sh_degree,
        sh_every=params.sh_every,
        background="black",
        strategy=None,
    )


class _Diary:
    """Of every round: `turn`, and one view `drawn`, `repaired` and, where it is known, its `truth`.

    For the whole method with and without AdaIN in repair, in a generated scene, also the mean PSNR of the round's
    views, `drawn_psnr` and `repaired_psnr`.
    """

    def __init__(self, case: Case, arm: Arm):
        self.case, self.pages = case, []
        self.measured = case.world is not None and arm in (ARMS["full"], ARMS["plain_repair"])

    def note(self, turn: int, cameras: list[Camera], drawn: Tensor, repaired: Tensor) -> None:
        page: dict[str, Any] = {"turn": turn, "drawn": drawn[0].cpu(), "repaired": repaired[0].cpu()}
        if self.measured:
            truth = self.case.truth(cameras)
            page["truth"] = truth[0]
            for name, images in (("drawn", drawn), ("repaired", repaired)):
                values = psnr(images.cpu().flatten(1)[:, None], truth.flatten(1)[:, None], data_range=1.0)
                page[f"{name}_psnr"] = float(values.mean())
        self.pages.append(page)


def _style(view: View, masks: Mapping[str, Tensor]) -> method.Style:
    return method.style(view.image.movedim(-1, 0), masks.get(view.name))


def _restyled(image: Tensor, of: method.Style, to: method.Style) -> Tensor:
    return method.adain(image.movedim(-1, 0), of, to).clamp(0, 1).movedim(0, -1).contiguous()
