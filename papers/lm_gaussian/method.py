"""LM-Gaussian: boost sparse-view 3D Gaussian splatting with large-model priors (Yu et al., arXiv 2409.03456).

A handful of photographs leaves much of a scene open, and Gaussians fitted to them alone fill the gaps with floaters.
The method asks models that have seen millions of images: (1) a stereo network for dense points to start from, cleaned
so that far background survives; (2) monocular depth and normals, and the points seen from virtual cameras, as further
losses; (3) an image diffusion model, adapted to this scene, that repairs renders of the virtual cameras, which the
Gaussians are then fitted to as well, round after round.

Sources: [code] read in the released code (non-commercial licence; nothing of it is copied); [guess] ours. The paper's
full text was not at hand.

symbol     name here         shape        meaning
D_i, C_i   depth, confidence [H, W]       of training view i by stereo; C >= 1, as DUSt3R's 1 + exp(.)
D^m, N^m   Mono              [H, W] (, 3) monocular depth (scale and shift unknown) and normals (world axes)
v          cameras           V of them    virtual cameras between neighbouring training views
P_v        PointImage        [H, W, 3]    the cleaned points drawn from v
R_v        targets           [H, W, 3]    the repaired render of v
w_v        distance_weights  [V]          how much R_v counts, 0..1
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.splatting import Camera, PointCloud, View
from common.splatting.extensions import Extension, Shot
from common.splatting.losses import edge_aware_smoothness, pearson, pearson_patches
from common.splatting.model import Rendering, Splats, render
from common.splatting.training import Trainer
from common.splatting.virtual import PointImage, point_image_loss

CONFIDENCE = 5.0  # points below it are left out [code]
BACKGROUND_DEPTH, BACKGROUND_BONUS = 1.5, 5.0  # times the median depth; added to the confidence [code]
IN_FRONT = 1e-3  # a point counts as in front if it is closer by this share [DUSt3R's code]
REWIND = 100  # every round starts at the learning rate of this step of `Plan.steps` [code]
NEAR, FAR = 16.0, 1.2  # of the distance weight [code]


@dataclass(frozen=True)
class Variant:
    """The places where the released code does less than it has code for. Each field is one of them.

    `densify`          the growth of 3DGS; its first and last step are the same in the released settings: it never runs
    `guided_alignment` monocular depth guides the global alignment of the stereo maps; switched off in the script
    `depth_normal`     the consistency of depth and normals starts at step 30,000 of 30,000 (forward-facing: 6,000, but
                       stage 1, to which the other depth and normal losses belong, has ended at 3,000)
    """

    densify: bool = False
    guided_alignment: bool = False
    depth_normal: bool = False


AS_RELEASED = Variant()
AS_DESCRIBED = Variant(densify=True, guided_alignment=True, depth_normal=True)


@dataclass(frozen=True)
class Plan:
    """Steps of the whole training: stage 1 ends at `stage1`, then a round begins every `every` steps until `steps`.

    late: the step after which depth and normals have to agree
    """

    stage1: int
    steps: int
    every: int
    late: int

    @property
    def rounds(self) -> list[int]:
        """The steps at which the virtual views are repaired."""
        return list(range(self.stage1, self.steps, self.every))

    @property
    def depth_normal_steps(self) -> int:
        """In how many steps of stage 1 depth and normals have to agree."""
        return max(0, self.stage1 - self.late)


AUTHORS_360 = Plan(stage1=12_000, steps=30_000, every=6_000, late=30_000)  # [code]
AUTHORS_FORWARD = Plan(stage1=3_000, steps=12_000, every=6_000, late=6_000)  # [code]


@dataclass(frozen=True)
class Weights:
    """Of the losses of stage 1; 0 leaves one out. For 360-degree scenes [code]; forward-facing: virtual 0.3."""

    virtual: float = 0.6
    depth: float = 0.1
    normal: float = 0.01
    depth_normal: float = 0.05


@dataclass(frozen=True, eq=False)
class Mono:
    """What a monocular network says of a view.

    depth    [H, W], true depth up to an unknown scale > 0 and shift
    normals  [H, W, 3] unit vectors in world axes, 0 where nothing is known
    """

    depth: Tensor
    normals: Tensor


# --------------------------------------------------------------------------------------- 1. points from stereo, cleaned


def cleaned(views: Sequence[View], depths: Sequence[Tensor], confidences: Sequence[Tensor]) -> list[Tensor]:
    """Confidence 0 for points that hang in front of what another view sees there with more confidence.

    A point of view i that falls on pixel q of view j in front of D_j(q) would hide what j sees at q. One of them is
    wrong; the less confident one goes.
    """
    kept = [confidence.clone() for confidence in confidences]
    for i, view in enumerate(views):
        points = view.camera.backproject(depths[i])
        for j, other in enumerate(views):
            if i == j:
                continue
            pixels, z = other.camera.project(points)
            column, row = pixels.floor().long().unbind(dim=-1)
            inside = (z > 0) & (column >= 0) & (row >= 0)
            inside &= (column < other.camera.width) & (row < other.camera.height)
            row, column = torch.where(inside, row, 0), torch.where(inside, column, 0)
            hides = inside & (z < (1 - IN_FRONT) * depths[j][row, column])
            kept[i][hides & (confidences[i] < confidences[j][row, column])] = 0
    return kept


def background_aware(depth: Tensor, confidence: Tensor) -> Tensor:
    """More confidence for far pixels: stereo is unsure of them, so a threshold alone would cut the background away."""
    return confidence + BACKGROUND_BONUS * (depth > BACKGROUND_DEPTH * depth.median())


def fused(views: Sequence[View], depths: Sequence[Tensor], confidences: Sequence[Tensor]) -> PointCloud:
    """The points of all views whose confidence is above the threshold, with the photographs' colours."""
    positions, colors, seen = [], [], []
    for index, view in enumerate(views):
        keep = confidences[index] > CONFIDENCE
        positions.append(view.camera.backproject(depths[index])[keep])
        colors.append(view.image[keep])
        seen.append(F.one_hot(torch.tensor(index), len(views)).bool().expand(int(keep.sum()), -1).to(keep.device))
    names = tuple(view.name for view in views)
    return PointCloud(torch.cat(positions), torch.cat(colors), None, names, torch.cat(seen))


def guided_alignment(
    view: View, depth: Tensor, confidence: Tensor, mono: Tensor, *, steps: int, box: int, generator: torch.Generator
) -> Tensor:
    """A depth [H, W] that stays near the stereo depth where that is sure, and takes its shape from the monocular one.

    Minimises  mean log(C) |D - D0| / D0 + (1 - corr(D, D^m)) + 5 (the same in boxes), and after 100 steps edge-aware
    smoothness, by Adam with a cosine from 0.01 to 1e-6 [code]. With known poses the first term is what is left of
    DUSt3R's global alignment.
    """
    change = torch.zeros_like(depth, requires_grad=True)
    optimizer = torch.optim.Adam([change], lr=0.01, betas=(0.9, 0.9))
    trust = confidence.clamp_min(1).log()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-6 + 0.5 * (0.01 - 1e-6) * (1 + math.cos(math.pi * step / steps))
        refined = depth * change.exp()
        local = pearson_patches(refined, mono, size=box, generator=generator)
        loss = (trust * change.expm1().abs()).mean() + pearson(refined, mono) + 5 * local
        if step >= 100:
            loss = loss + edge_aware_smoothness(refined / depth.median(), view.image)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (depth * change.exp()).detach()


# ------------------------------------------------------------------------------------------ 2. the losses of stage 1


def depth_loss(depth: Tensor, mono: Tensor, *, box: int, generator: torch.Generator) -> Tensor:
    """P_g + P_l: 1 - corr(D, D^m) over the whole image, and its mean over boxes at random places."""
    return pearson(depth, mono) + pearson_patches(depth, mono, size=box, generator=generator)


def normal_loss(normals: Tensor, wanted: Tensor) -> Tensor:
    """L_n1 + L_cos: mean |N - N^m|_1 and mean 1 - N.N^m, where N^m is known."""
    known = wanted.square().sum(dim=-1) > 0
    ours, theirs = normals[known], wanted[known]
    return (ours - theirs).abs().mean() + (1 - (ours * theirs).sum(dim=-1)).mean()


def splat_normals(splats: Splats, camera: Camera) -> Tensor:
    """[N, 3] the shortest axis of each Gaussian, towards the camera, in world axes."""
    w, x, y, z = F.normalize(splats.quats, dim=-1).unbind(dim=-1)
    columns = torch.stack(
        [
            torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)], dim=-1),
            torch.stack([2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)], dim=-1),
            torch.stack([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)], dim=-1),
        ],
        dim=1,
    )  # [N, axis, 3]
    shortest = splats.scales.argmin(dim=-1)
    axis = columns[torch.arange(len(columns), device=columns.device), shortest]
    towards = ((camera.center - splats.means) * axis).sum(dim=-1, keepdim=True)
    return torch.where(towards < 0, -axis, axis)


def normal_image(splats: Splats, camera: Camera) -> Tensor:
    """[H, W, 3] unit normals: those of the Gaussians drawn in place of colours; 0 where there is nothing."""
    drawn = render(splats._replace(colors=splat_normals(splats, camera)), camera).image
    return F.normalize(drawn, dim=-1, eps=1e-6)


def normals_from_depth(camera: Camera, depth: Tensor) -> Tensor:
    """[H, W, 3] unit normals, towards the camera, of the surface that a depth map describes (central differences)."""
    points = camera.backproject(depth)
    wide = F.pad(points.movedim(-1, 0)[None], (1, 1, 1, 1), mode="replicate")[0].movedim(0, -1)
    across, down = wide[1:-1, 2:] - wide[1:-1, :-2], wide[2:, 1:-1] - wide[:-2, 1:-1]
    return F.normalize(torch.linalg.cross(down, across, dim=-1), dim=-1, eps=1e-12)


class MultiModal(Extension):
    """The losses of stage 1 beside the photometric one. Needs renders with depth (mode "RGB+ED").

    mono     by view name
    virtual  the points from every virtual camera
    box      side of the Pearson boxes, pixels
    late     the step after which depth and normals have to agree
    covered  compare with the points only where there are some; the released code also wants white where there are none
    """

    def __init__(
        self,
        mono: Mapping[str, Mono],
        virtual: Sequence[PointImage],
        weights: Weights,
        *,
        box: int,
        late: int,
        covered: bool = False,
    ):
        self.mono, self.virtual, self.weights = dict(mono), list(virtual), weights
        self.box, self.late, self.covered = box, late, covered

    def loss(self, trainer: Trainer, shot: Shot) -> Tensor | None:
        weights, mono = self.weights, self.mono[shot.view.name]
        agree = weights.depth_normal > 0 and trainer.step > self.late
        total = shot.image.new_zeros(())
        if weights.depth:
            patches = {"box": self.box, "generator": trainer.generator("boxes")}
            total = total + weights.depth * depth_loss(shot.depth, mono.depth, **patches)
        if weights.normal or agree:
            normals = normal_image(shot.splats, shot.view.camera)
            total = total + weights.normal * normal_loss(normals, mono.normals)
            if agree:
                surface = normals_from_depth(shot.view.camera, shot.depth)
                total = total + weights.depth_normal * (1 - (normals * surface).sum(dim=-1)).mean()
        if weights.virtual:
            points = self.virtual[_any(len(self.virtual), trainer.generator("virtual"))]
            total = total + weights.virtual * point_image_loss(shot.splats, points, covered=self.covered)  # L_pr
        return total


# ---------------------------------------------------------------------------------- 3. repaired views, round by round


class EarlyRenders(Extension):
    """Keeps the first `most` renders of every training view among the first `until` steps: bad pictures of known views.

    `renders` [view name] is a list of [H, W, 3] in 0..1; beside their photographs they teach the repair model.
    """

    def __init__(self, until: int, most: int):
        self.until, self.most = until, most
        self.renders: dict[str, list[Tensor]] = {}

    def loss(self, trainer: Trainer, shot: Shot) -> None:
        kept = self.renders.setdefault(shot.view.name, [])
        if trainer.step <= self.until and len(kept) < self.most:
            kept.append(shot.image.detach().clamp(0, 1))

    def state(self) -> dict[str, Any]:
        return {"renders": self.renders}

    def restore(self, state: dict[str, Any]) -> None:
        self.renders = state["renders"]


def distance_weights(cameras: Sequence[Camera], views: Sequence[View]) -> Tensor:
    """w_v = min(1, 16 d_near / d_max) [V]: a virtual view next to a photograph has nothing to add.

    d_near is the distance to the closest photograph's camera; d_max is 1.2 times the largest, over the photographs, of
    the distance to the second-farthest other one (of two photographs: to the other).
    """
    inputs = torch.stack([view.camera.center for view in views])
    others = torch.cdist(inputs, inputs).sort(dim=1, descending=True).values
    far = FAR * others[:, min(1, len(views) - 2)].max()
    near = torch.cdist(torch.stack([camera.center for camera in cameras]), inputs).amin(dim=1)
    return (NEAR * near / far).clamp_max(1)


class Refinement(Extension):
    """Stage 2: in every round all virtual views are drawn and repaired; each step then fits to one of them too.

    repair   (renders [V, H, W, 3] in 0..1, round from 0) -> their repaired versions
    every    steps a round
    rewind   every round starts at the learning rate of this step
    targets  [V, H, W, 3] the repaired views of the current round; `drawn` what they were repaired from
    """

    def __init__(
        self,
        cameras: Sequence[Camera],
        weights: Tensor,
        repair: Callable[[Tensor, int], Tensor],
        *,
        every: int,
        rewind: int = REWIND,
    ):
        self.cameras, self.weights, self.repair, self.every, self.rewind = list(cameras), weights, repair, every, rewind
        self.drawn = self.targets = torch.empty(0)

    def before_step(self, trainer: Trainer) -> None:
        turn, place = divmod(trainer.step - 1, self.every)
        trainer.set_learning_rates(self.rewind + place)
        if place == 0:
            with torch.no_grad():
                pictures: list[Rendering] = [self._draw(trainer, camera) for camera in self.cameras]
            self.drawn = torch.stack([picture.image.clamp(0, 1) for picture in pictures])
            self.targets = self.repair(self.drawn, turn)

    def loss(self, trainer: Trainer, shot: Shot) -> Tensor:
        chosen = _any(len(self.cameras), trainer.generator("virtual"))
        drawn = render(shot.splats, self.cameras[chosen], background=shot.background).image
        return self.weights[chosen] * (drawn - self.targets[chosen]).abs().mean()  # plain L1, no score distillation

    def state(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "targets": self.targets}

    def restore(self, state: dict[str, Any]) -> None:
        self.drawn, self.targets = state["drawn"], state["targets"]

    @staticmethod
    def _draw(trainer: Trainer, camera: Camera) -> Rendering:
        return trainer.model.render(camera, background=trainer.background, sh_degree=trainer.sh_degree)


def _any(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (1,), generator=generator, device=generator.device))
