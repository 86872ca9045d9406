"""Sparse3D: Distilling multiview-consistent diffusion for object reconstruction from sparse views (Zou et al., AAAI
2024, arXiv 2308.14078).

Two or three posed photographs of an object leave most of it unseen. A diffusion model that knows the object's category
knows how such objects go on, but not this one. (1) An epipolar feature transformer collects what the photographs say
along the rays of a new camera (`epipolar.py`). (2) A controller, a trainable copy of the diffusion model's encoder,
shows it that; the diffusion model itself stays frozen. (3) The scene is fitted to the photographs, at first also to the
transformer's own pictures, then to what the controlled model thinks of the scene's renders: score distillation (SDS),
or category-score distillation (C-SDS), which is to be less blurred.

Sources: [SF] from the code of SparseFusion, the paper's open relative; [guess] ours. The paper's full text was not at
hand, no code of it was found, and the form of C-SDS is read from its name and the abstract.

symbol       name here            shape          meaning
x            x                    [1, C, H, W]   a render of the scene, as the diffusion model takes pictures
x_t, a_t     schedule.noised, at  as x, [1,...]  sqrt(a_t) x + sqrt(1 - a_t) noise; the share of signal at time t
f            condition            [1, F, h, w]   the transformer's map at that render's camera
eps(x_t; f)  Prior.controlled     as x           the noise that the controlled model sees, knowing category and f
eps(x_t)     Prior.base           as x           the noise that the frozen model sees, knowing the category alone
w(t)         1 - a_t              [1,...]        weight of DreamFusion [guess]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models.denoiser import ControlBranch, Controlled, Denoiser
from common.models.diffusion import Schedule
from common.splatting import Camera, View, orbit
from common.splatting.extensions import Extension, Shot
from common.splatting.model import render
from common.splatting.training import Trainer

Rule = Literal["sds", "csds"]

EARLIEST, LATEST = 0.02, 0.99  # times as shares of the schedule; the later one [SF], the earlier one of DreamFusion
HUBER = 0.1  # where the Huber losses turn linear; colours and opacities are 0..1 [guess]


# ------------------------------------------------------------------------------ 1. a diffusion model and its controller


class Prior(Protocol):
    """A diffusion model that distillation can ask."""

    schedule: Schedule

    def encode(self, image: Tensor) -> Tensor:
        """Renders [1, 3, H, W] in 0..1 as x; gradients pass."""
        ...

    def base(self, x: Tensor, t: Tensor) -> Tensor:
        """eps(x_t): the frozen model, which knows the category."""
        ...

    def controlled(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """eps(x_t; f): the same model with its controller."""
        ...


class EpipolarHint(nn.Sequential):
    """Brings the transformer's map [B, F, h, w] to the first features of the encoder's copy [B, width, H', W']."""

    def __init__(self, channels: int, width: int, enlarge: float):
        super().__init__(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Upsample(scale_factor=enlarge) if enlarge != 1 else nn.Identity(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
        )


def controlled(denoiser: Denoiser, channels: int, pixels: int) -> Controlled:
    """The denoiser, frozen, with a controller that changes nothing yet: its output convolutions are zero.

    channels  of the transformer's map;  pixels  a side of the square that one ray of the map stands for
    """
    hint = EpipolarHint(channels, denoiser.encoder.stem.out_channels, pixels / denoiser.patch)
    branch = ControlBranch(denoiser, hint).requires_grad_(True)
    return Controlled(denoiser.requires_grad_(False), branch)


class NetworkPrior:
    """A network eps(x_t; f) whose frozen half is its `denoiser`, in pixels. Without control it is that half alone."""

    def __init__(self, network: Any, schedule: Schedule, *, control: bool = True):
        self.network, self.schedule, self.control = network, schedule, control

    def encode(self, image: Tensor) -> Tensor:
        return 2 * image - 1

    def base(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network.denoiser(x, t)

    def controlled(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return self.network(x, t, condition) if self.control else self.base(x, t)


class OraclePrior(NetworkPrior):
    """A prior that knows the answer: its condition is the true picture [1, 3, H, W] in 0..1. What control could be."""

    def controlled(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        a = self.schedule.at(t)
        return (x - a.sqrt() * self.encode(condition)) / (1 - a).sqrt()


# ------------------------------------------------------------------------------------------- 2. what the prior asks for


def distilled(prior: Prior, x: Tensor, condition: Tensor, t: Tensor, noise: Tensor, rule: Rule) -> Tensor:
    """dL/dx of score distillation at one time and one noise, as x.

    SDS    w(t) (eps(x_t; f) - noise)      towards pictures that the controlled model finds likely
    C-SDS  w(t) (eps(x_t; f) - eps(x_t))   away from what all of the category share, towards what f adds; zero where the
                                           controller adds nothing
    """
    a = prior.schedule.at(t)
    x_t = prior.schedule.noised(x, noise, t)
    against = noise if rule == "sds" else prior.base(x_t, t)
    return (1 - a) * (prior.controlled(x_t, t, condition) - against)


def distillation_loss(prior: Prior, image: Tensor, condition: Tensor, rule: Rule, draw: torch.Generator) -> Tensor:
    """A scalar whose gradient is `distilled` times dx/dtheta, averaged over the numbers in x.

    image  [H, W, 3] a render;  condition  [F, h, w]
    """
    x = prior.encode(image.movedim(-1, 0)[None])
    steps = prior.schedule.steps
    t = torch.randint(round(EARLIEST * steps), round(LATEST * steps) + 1, (1,), generator=draw, device=x.device)
    noise = torch.randn(x.shape, generator=draw, device=x.device)
    with torch.no_grad():
        gradient = distilled(prior, x, condition[None], t, noise, rule)
    return (gradient * x).mean()


# ----------------------------------------------------------------------------------------------- 3. fitting the scene


def circle(views: Sequence[View], count: int) -> list[Camera]:
    """`count` cameras once around the object, at the mean distance and height of the photographs' [SF]."""
    return orbit([view.camera for view in views], count)


class Silhouette(Extension):
    """Huber loss between what the Gaussians cover and the photograph's mask [SF]."""

    def __init__(self, weight: float):
        self.weight = weight

    def loss(self, trainer: Trainer, shot: Shot) -> Tensor:
        assert shot.view.mask is not None, "the photographs have masks"
        return self.weight * F.huber_loss(shot.rendering.alpha, shot.view.mask, delta=HUBER)


class Bootstrap(Extension):
    """Until step `until`: one camera a step has to look as the transformer says it does.

    pictures  [N, h, w, 3] the transformer's RGB; renders are averaged down to its size
    """

    def __init__(self, cameras: Sequence[Camera], pictures: Tensor, weight: float, until: int):
        self.cameras, self.pictures, self.weight, self.until = list(cameras), pictures, weight, until

    def loss(self, trainer: Trainer, shot: Shot) -> Tensor | None:
        if trainer.step > self.until:
            return None
        chosen = _any(len(self.cameras), trainer.generator("bootstrap"))
        image = _drawn(shot, self.cameras[chosen]).movedim(-1, 0)
        small = F.avg_pool2d(image, image.shape[1] // self.pictures.shape[1]).movedim(0, -1)
        return self.weight * F.huber_loss(small, self.pictures[chosen], delta=HUBER)


class Distillation(Extension):
    """After step `after`: one camera a step is judged by the prior.

    conditions  [N, F, h, w], one a camera
    stream      the name of the random numbers; another name draws others
    """

    def __init__(
        self,
        prior: Prior,
        cameras: Sequence[Camera],
        conditions: Tensor,
        rule: Rule,
        weight: float,
        after: int,
        stream: str = "distillation",
    ):
        self.prior, self.cameras, self.conditions = prior, list(cameras), conditions
        self.rule: Rule = rule
        self.weight, self.after, self.stream = weight, after, stream

    def loss(self, trainer: Trainer, shot: Shot) -> Tensor | None:
        if trainer.step <= self.after:
            return None
        draw = trainer.generator(self.stream)
        chosen = _any(len(self.cameras), draw)
        image = _drawn(shot, self.cameras[chosen])
        return self.weight * distillation_loss(self.prior, image, self.conditions[chosen], self.rule, draw)


def _drawn(shot: Shot, camera: Camera) -> Tensor:
    """[H, W, 3] the Gaussians of this step from another camera."""
    return render(shot.splats, camera, background=shot.background).image


def _any(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (1,), generator=generator, device=generator.device))
