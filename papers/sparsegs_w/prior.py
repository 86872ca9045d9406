"""The diffusion model of OH and CNVE: what it does, and the small one that is trained here on other scenes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from common import seeds
from common.models.corrector import Corrector, train_corrector
from common.models.diffusion import Predictor, Schedule
from common.models.pairs import Pairs, held_out_error
from common.splatting.model import Gaussians
from common.splatting.settings import TrainSettings
from common.splatting.training import fit
from papers.sparsegs_w import data, method, photos
from papers.sparsegs_w.settings import Params

PRIOR_SEED = 0  # one diffusion model serves all seeds, as there is one Stable Diffusion
FITTED = (0.2, 1.0)  # of a run's steps: how long the bad pictures' Gaussians are fitted
MARGIN = 1.1  # times the first round's strength: the latest time the small model is trained for
TRUST = 0.0  # see `corrector.correction_loss`: at 0.25 repair raised the error of pictures kept aside
TOGETHER = 8  # pictures repaired at once
HOLES, HOLE = 0.3, (0.15, 0.4)  # share of training crops with a hole, its half axes as shares of the crop


class Space(Protocol):
    """Where a diffusion model works: pictures [B, 3, H, W] in 0..1 go in and come out, z [B, C, h, w] in between.

    limit   of the predicted z; None: none
    factor  how much smaller z is than the picture
    """

    schedule: Schedule
    limit: float | None
    factor: int

    def encode(self, pictures: Tensor) -> Tensor: ...

    def decode(self, z: Tensor) -> Tensor: ...

    def predictor(self, pictures: Tensor) -> Predictor:
        """Predicts the noise under the control of these pictures."""
        ...


class Pixels:
    """The small model: z are the pictures in -1..1."""

    limit: float | None = 1.0
    factor: int = 1

    def __init__(self, network: Corrector):
        self.network, self.schedule = network.eval(), network.schedule

    def encode(self, pictures: Tensor) -> Tensor:
        return 2 * pictures - 1

    def decode(self, z: Tensor) -> Tensor:
        return (z + 1) / 2

    def predictor(self, pictures: Tensor) -> Predictor:
        return partial(self.network, condition=self.encode(pictures))


class Mender:
    """Paints over what is transient (OH) and repairs renders (CNVE) with one diffusion model."""

    def __init__(self, params: Params, space: Space, seed: int):
        self.params, self.space, self.seed = params, space, seed

    @torch.no_grad()
    def clean(self, name: str, image: Tensor, mask: Tensor) -> Tensor:
        """I_clean [H, W, 3] in 0..1 of the photograph of that name; mask [H, W] bool."""
        space, params = self.space, self.params
        photo, hole = image.movedim(-1, 0)[None], mask[None, None]
        start = method.filled(photo, hole)
        small = F.max_pool2d(hole.float(), space.factor) > 0
        options = {"strength": params.clean_strength, "steps": params.ddim_steps, "limit": space.limit}
        draw = seeds.generator(self.seed, "clean", name, device=image.device)
        z = method.inpainted(
            space.predictor(start),
            space.encode(photo),
            space.encode(start),
            small,
            space.schedule,
            generator=draw,
            **options,
        )
        painted = torch.where(hole, space.decode(z).clamp(0, 1), photo)
        return painted[0].movedim(0, -1).contiguous()

    @torch.no_grad()
    def enhance(
        self, renders: Tensor, turn: int, *, strength: float, reference: Tensor | None, constrained: bool = True
    ) -> Tensor:
        """Renders [V, H, W, 3] in 0..1 -> their repaired versions.

        turn       the round, for its own random numbers
        reference  [H, W, 3] whose style AdaIN brings them to; None: no AdaIN
        """
        space, params = self.space, self.params
        style = None if reference is None else method.style(space.encode(reference.movedim(-1, 0)[None]))
        draw = seeds.generator(self.seed, "enhance", turn, device=renders.device)
        options = {"strength": strength, "steps": params.ddim_steps, "limit": space.limit, "reference": style}
        repaired = []
        for part in renders.movedim(-1, 1).split(TOGETHER):
            predict = space.predictor(part)
            z = method.enhanced(predict, space.encode(part), space.schedule, generator=draw, **options)
            target = space.decode(z)
            repaired.append(method.constrained(target, part, params.down) if constrained else target)
        return torch.cat(repaired).clamp(0, 1).movedim(1, -1).contiguous()


def mender(params: Params, prior: Mapping[str, Any] | None, seed: int) -> Mender:
    """The diffusion model of a run; `prior` is what `train` returned, None where the authors' model is used."""
    if params.priors == "pretrained":
        from papers.sparsegs_w import pretrained

        return Mender(params, pretrained.Latents(params), seed)
    assert prior is not None, "train comes first"
    network = Corrector(Schedule.cosine(), width=params.prior_width)
    network.load_state_dict(prior["state"])
    return Mender(params, Pixels(network.to(params.device)), seed)


# ------------------------------------------------------------------------------------ training the small model


@seeds.one_thread()
def bad_pictures(params: Params, number: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs of a bad and a good picture [3, H, W] of one practice scene, seen by virtual cameras as CNVE's are.

    Bad is the render of Gaussians fitted for a while to five photographs with people masked, from points with errors.
    Both are brought to another light, for each scene a new one.
    """
    case, draw = data.practice(params, number), seeds.generator(PRIOR_SEED, "bad pictures", number)
    views, masks = case.scene.train, case.true_masks or {}
    maps = [case.maps[view.name] for view in views]
    points = method.fused(
        views, [m.depth for m in maps], [m.confidence for m in maps], [masks[view.name] for view in views]
    )
    if params.points and len(points) > params.points:
        points = points.select(torch.randperm(len(points), generator=draw)[: params.points])
    share = FITTED[0] + (FITTED[1] - FITTED[0]) * float(torch.rand((), generator=draw))
    settings = TrainSettings(
        iterations=max(1, round(share * params.steps)),
        seed=number,
        lr_means=params.lr_means,
        sh_degree=0,
        background="black",
        strategy=None,
    )
    weights = {name: (~mask).float() for name, mask in masks.items()}
    result = fit(
        case.scene, settings, model=Gaussians.from_points(points, sh_degree=0), weights=weights, progress=False
    )
    cameras = method.virtual_cameras(views, method.FARTHEST, params.tests, draw)
    light, pairs = photos.light(draw), []
    for camera, truth in zip(cameras, case.truth(cameras), strict=True):
        with torch.no_grad():
            drawn = result.model.render(camera, background=result.background).image.clamp(0, 1)
        pairs.append((light(drawn).movedim(-1, 0), light(truth).movedim(-1, 0)))
    return pairs


@seeds.one_thread()
def train(
    params: Params, scenes: Sequence[Pairs], aside: Pairs, *, progress: Callable[..., Any] | None = None
) -> dict[str, Any]:
    """The small model, trained on the pairs of all scenes.

    Returns its `state` on the CPU, the `losses`, and the `error` of the pairs kept aside: `before`, and `after` repair
    at the strengths of the first and the last round, without AdaIN; `constrained` at the first with the constraint.
    """
    trained = train_corrector(
        [pair for pairs in scenes for pair in pairs],
        width=params.prior_width,
        steps=params.prior_steps,
        batch=params.prior_batch,
        size=params.prior_crop,
        learning_rate=params.prior_rate,
        seed=PRIOR_SEED,
        latest=min(1000, round(1000 * MARGIN * max(params.strength_first, params.clean_strength))),
        trust=TRUST,
        spoil=holes,
        device=params.device,
        progress=progress,
    )
    found = {"state": {name: value.cpu() for name, value in trained.network.state_dict().items()}}
    model = mender(params, found, PRIOR_SEED)

    def error(strength: float, constrained: bool) -> dict[str, float]:
        options = {"strength": strength, "reference": None, "constrained": constrained}
        return held_out_error(lambda bad: model.enhance(bad.to(params.device), 0, **options), aside)

    first, last = error(params.strength_first, False), error(params.strength_last, False)
    errors = {"before": first["before"], "after": first["after"], "after_last": last["after"]}
    errors["constrained"] = error(params.strength_first, True)["after"]
    return found | {"losses": trained.losses, "error": errors}


def holes(bad: Tensor, draw: torch.Generator) -> Tensor:
    """Some of the crops [B, C, s, s] get an elliptic hole that is filled from around it, as OH will show them."""
    side = bad.shape[-1]
    rows, columns = (axis.to(bad) for axis in torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"))
    chance, row, column, high, wide = torch.rand(5, len(bad), 1, 1, generator=draw, device=draw.device).to(bad)
    high, wide = ((HOLE[0] + (HOLE[1] - HOLE[0]) * half) * side for half in (high, wide))
    inside = ((rows - row * side) / high).square() + ((columns - column * side) / wide).square() < 1
    mask = (inside & (chance < HOLES))[:, None]
    return method.filled(bad, mask)
