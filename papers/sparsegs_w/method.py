"""SparseGS-W: sparse-view 3D Gaussian splatting in the wild with generative priors (Li et al., arXiv 2503.19452).

Five photographs of a place by five strangers: other light, other cameras, people in front. Gaussians fitted to them
learn the people as ghosts and the light as fog. The method (1) starts from dense stereo points with the transient
pixels masked; (2) paints over the transients with a diffusion model (occlusion handling, OH); (3) brings all pictures
to the appearance of one reference photograph by AdaIN; (4) repairs renders of views that nobody photographed by
constrained diffusion and fits to them too (constrained novel-view enhancement, CNVE); (5) moves these views away from
the photographs round by round, while the diffusion is allowed less and less.

The abstract says so much. Its text was not at hand: the equations below are our reading, every number is ours.

symbol    name here        shape        meaning
I, M      photo, mask      [C, h, w], [h, w]  photograph; True where something transient stands
I_clean   `inpainted`                   the photograph without it
z, mu, sigma   z, Style    [C, h, w], [C, 1, 1]  a picture in the diffusion model's space; its means and deviations
x, x*     render, target   [C, h, w]    render of a virtual view, its repaired version
s         strength         0..1         the share of the noise schedule that a repair goes back
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.models.diffusion import Predictor, Schedule, sdedit
from common.splatting import Camera, PointCloud, View, interpolate
from common.splatting.extensions import Extension, Shot
from common.splatting.losses import Target, photometric
from common.splatting.model import render
from common.splatting.training import Trainer

CONFIDENCE = 3.0  # points below it are left out; DUSt3R's scale, its tools' default threshold
SMALLEST_SPREAD = 1e-3  # deviations below it are not divided by
FARTHEST = 0.5  # the middle between two photographs: virtual views never go further from the closer one
NEIGHBOURS = 2  # a virtual view lies on the way from a photograph to one of so many closest others


# ------------------------------------------------------------------------------------- 1. points, transients left out


def fused(
    views: Sequence[View], depths: Sequence[Tensor], confidences: Sequence[Tensor], masks: Sequence[Tensor | None]
) -> PointCloud:
    """The points of all pixels that stereo is sure of and where nothing transient stands, in the photographs' colours.

    depths, confidences  [H, W] of each view, along its optical axis; masks [H, W] bool, None: nothing is masked
    """
    positions, colors = [], []
    for view, depth, confidence, mask in zip(views, depths, confidences, masks, strict=True):
        keep = (confidence > CONFIDENCE) & (depth > 0)
        keep = keep if mask is None else keep & ~mask
        positions.append(view.camera.backproject(depth)[keep])
        colors.append(view.image[keep])
    return PointCloud(torch.cat(positions), torch.cat(colors))


# ------------------------------------------------------------------------------------------------ 2. occlusion handling


def inpainted(
    predict: Predictor,
    photo: Tensor,
    start: Tensor,
    mask: Tensor,
    schedule: Schedule,
    *,
    strength: float,
    steps: int,
    generator: torch.Generator,
    limit: float | None = None,
) -> Tensor:
    """I_clean = M Inpaint(I, M) + (1 - M) I by masked SDEdit; photo, start [B, C, h, w], mask [B, 1, h, w] bool.

    start    the photograph with its holes `filled`; `predict` is controlled by it

    After every step the pixels outside of the holes are set back to the photograph, noised to the time of that step; at
    time 0 that is the photograph itself, exactly.
    """

    def keep(x: Tensor, time: int) -> Tensor:
        noise = torch.randn(photo.shape, generator=generator, device=photo.device, dtype=photo.dtype)
        return torch.where(mask, x, schedule.noised(photo, noise, time))

    options = {"strength": strength, "steps": steps, "generator": generator, "limit": limit}
    return torch.where(mask, sdedit(predict, start, schedule, **options, after_step=keep), photo)


def filled(photo: Tensor, mask: Tensor) -> Tensor:
    """Holes [B, 1, h, w] of pictures [B, C, h, w] take the mean of the pixels around them that are known.

    Around means the smallest of the windows of 3, 5, 9, ... pixels in which there are any; a picture that is all hole
    stays as it is.
    """
    known = (~mask).to(photo)
    found, missing, reach = photo.clone(), mask.clone(), 1
    while bool(missing.any()) and reach < 2 * max(photo.shape[-2:]):
        window = {"kernel_size": 2 * reach + 1, "stride": 1, "padding": reach, "count_include_pad": True}
        share = F.avg_pool2d(known, **window)
        fill = missing & (share > 0)
        found = torch.where(fill, F.avg_pool2d(photo * known, **window) / share.clamp_min(1e-12), found)
        missing, reach = missing & ~fill, 2 * reach
    return found


# ------------------------------------------------------------------------------------------------------- 3. appearance


class Style(NamedTuple):
    """Mean and standard deviation of each channel, [..., C, 1, 1]."""

    mean: Tensor
    spread: Tensor


def style(z: Tensor, mask: Tensor | None = None) -> Style:
    """mu(z) and sigma(z) over the pixels of z [..., C, h, w] outside of the mask [h, w]."""
    weight = torch.ones_like(z[..., :1, :, :]) if mask is None else (~mask).to(z).expand_as(z[..., :1, :, :])
    total = weight.sum(dim=(-2, -1), keepdim=True).clamp_min(1)
    mean = (weight * z).sum(dim=(-2, -1), keepdim=True) / total
    variance = (weight * (z - mean).square()).sum(dim=(-2, -1), keepdim=True) / total
    return Style(mean, variance.sqrt().clamp_min(SMALLEST_SPREAD))


def adain(z: Tensor, of: Style, to: Style) -> Tensor:
    """z' = sigma_ref (z - mu) / sigma + mu_ref, channel by channel (Huang and Belongie 2017)."""
    return to.spread * (z - of.mean) / of.spread + to.mean


def at_noise(clean: Style, signal: Tensor) -> Style:
    """The style of x_t = sqrt(a) x_0 + sqrt(1 - a) noise when x_0 has the style `clean`; signal a."""
    return Style(signal.sqrt() * clean.mean, (signal * clean.spread.square() + 1 - signal).sqrt())


# ------------------------------------------------------------------------------ 4. constrained novel-view enhancement


def enhanced(
    predict: Predictor,
    z: Tensor,
    schedule: Schedule,
    *,
    strength: float,
    steps: int,
    generator: torch.Generator,
    reference: Style | None = None,
    limit: float | None = None,
) -> Tensor:
    """Renders z [B, C, h, w], noised to `strength` and denoised under their own control, in the style of a reference.

    AdaIN follows every step: the state then has the style of the reference at its own noise. None: no AdaIN.
    """

    def restyled(x: Tensor, time: int) -> Tensor:
        return x if reference is None else adain(x, style(x), at_noise(reference, schedule.at(time)))

    options = {"strength": strength, "steps": steps, "generator": generator, "limit": limit}
    return sdedit(predict, z, schedule, **options, after_step=restyled)


def constrained(target: Tensor, drawn: Tensor, factor: int) -> Tensor:
    """x* <- x* + Down^T (Down(x) - Down(x*)): means over blocks of pixels are those of the render, exactly.

    Down takes means over blocks of factor x factor pixels of [B, C, H, W], Down^T repeats them, so that Down Down^T is
    the identity and the step a projection. What photographs say in the coarse stays; diffusion may draw detail alone.

    Raises ValueError for sides that are no multiples of the factor.
    """
    if drawn.shape[-2] % factor or drawn.shape[-1] % factor:
        raise ValueError(
            f"constrained: blocks of {factor} pixels do not fit {drawn.shape[-1]} x {drawn.shape[-2]}; expected sides "
            "in multiples of it: change `down`, width or height."
        )
    left = F.avg_pool2d(drawn, factor) - F.avg_pool2d(target, factor)
    return target + left.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)


# --------------------------------------------------------------------------------- 5. progressive sampling and training


@dataclass(frozen=True)
class Rounds:
    """When virtual views are drawn and repaired, how far from the photographs, and how strongly.

    warm, every   the first round begins after `warm` steps, then one every so many
    count, views  rounds, and virtual views in each
    first, last   strength of the first and of the last round
    progressive   False: all views of all rounds at once after `warm`, anywhere, at the mean strength
    """

    warm: int
    every: int
    count: int
    views: int
    first: float
    last: float
    progressive: bool = True

    def turn(self, step: int) -> int | None:
        """The round that begins before this step (steps count from 1), counted from 0."""
        turn, place = divmod(step - 1 - self.warm, self.every)
        begins = step > self.warm and place == 0 and turn < (self.count if self.progressive else 1)
        return turn if begins else None

    def reach(self, turn: int) -> float:
        """How far from the closer photograph its views lie at most, as a share of the way to another."""
        return FARTHEST * (turn + 1) / self.count if self.progressive else FARTHEST

    def strength(self, turn: int) -> float:
        """The noise strength of a round."""
        if not self.progressive:
            return (self.first + self.last) / 2
        return self.first + (self.last - self.first) * turn / max(1, self.count - 1)

    def size(self) -> int:
        """Virtual views of a round."""
        return self.views if self.progressive else self.views * self.count


def virtual_cameras(views: Sequence[View], reach: float, count: int, generator: torch.Generator) -> list[Camera]:
    """`count` cameras at random on the ways from a photograph to one of its closest others, at most `reach` 0..1 along.

    Rotations by slerp, positions on a line; image size and focal length are those of the photograph they begin at.
    """
    centers = torch.stack([view.camera.center for view in views])
    order = torch.cdist(centers, centers).argsort(dim=1)[:, 1 : NEIGHBOURS + 1]  # the first is the view itself
    found = []
    for _ in range(count):
        start, neighbour, place = torch.rand(3, generator=generator, device=generator.device).tolist()
        first = int(start * len(views))
        a, b = views[first].camera, views[int(order[first, int(neighbour * order.shape[1])])].camera
        found.append(interpolate(a, replace(b, K=a.K, width=a.width, height=a.height), reach * place))
    return found


class NovelViews(Extension):
    """lam_v(t) [(1 - d) L1 + d D-SSIM](render, x*) at a random virtual view of the round, from the first round on.

    enhance  (renders [V, H, W, 3] in 0..1, their cameras, round) -> x* of the same shape
    weight   lam_v; it grows linearly over the first `ramp` steps after the warm-up
    dssim    the share d of D-SSIM, here in place of LPIPS
    on_round called with (round, cameras, renders, x*), for instance to keep them
    """

    def __init__(
        self,
        rounds: Rounds,
        enhance: Callable[[Tensor, list[Camera], int], Tensor],
        *,
        weight: float,
        ramp: int,
        dssim: float,
        on_round: Callable[[int, list[Camera], Tensor, Tensor], None] | None = None,
    ):
        self.rounds, self.enhance, self.on_round = rounds, enhance, on_round
        self.weight, self.ramp, self.dssim = weight, ramp, dssim
        self.cameras: list[Camera] = []
        self.targets: list[Target] = []

    def before_step(self, trainer: Trainer) -> None:
        turn = self.rounds.turn(trainer.step)
        if turn is None:
            return
        draw = trainer.generator("virtual cameras")
        self.cameras = virtual_cameras(trainer.scene.train, self.rounds.reach(turn), self.rounds.size(), draw)
        with torch.no_grad():
            options = {"background": trainer.background, "sh_degree": trainer.sh_degree}
            drawn = torch.stack([trainer.model.render(c, **options).image.clamp(0, 1) for c in self.cameras])
        targets = self.enhance(drawn, self.cameras, turn)
        self.targets = [Target(target) for target in targets]
        if self.on_round is not None:
            self.on_round(turn, self.cameras, drawn, targets)

    def loss(self, trainer: Trainer, shot: Shot) -> Tensor | None:
        if not self.targets:
            return None
        draw = trainer.generator("virtual")
        chosen = int(torch.randint(len(self.targets), (1,), generator=draw, device=draw.device))
        drawn = render(shot.splats, self.cameras[chosen], background=shot.background).image
        grown = min(1.0, (trainer.step - self.rounds.warm) / max(1, self.ramp))
        return self.weight * grown * photometric(drawn, self.targets[chosen], dssim=self.dssim)


class Uncovered(Extension):
    """The masked pixels of a photograph are compared with I_clean: weight * mean of M |render - I_clean|.

    clean, masks  by view name: [H, W, 3] in 0..1, [H, W] bool. The other pixels are the photometric loss's, (1 - M).
    """

    def __init__(self, clean: Mapping[str, Tensor], masks: Mapping[str, Tensor], weight: float):
        self.clean, self.masks, self.weight = dict(clean), dict(masks), weight

    def loss(self, trainer: Trainer, shot: Shot) -> Tensor:
        name = shot.view.name
        error = (shot.image - self.clean[name]).abs() * self.masks[name][..., None]
        return self.weight * error.mean()
