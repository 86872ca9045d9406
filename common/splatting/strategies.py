"""When Gaussians are added, moved and removed: the rules of 3DGS (as in gsplat) and of 3DGS-MCMC.

A strategy is a frozen record of settings; what it has counted so far lives in the population's statistics, where it
follows the Gaussians and is part of a checkpoint. Steps count from 1: step s is the s-th update of the parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from common.splatting.population import Population

__all__ = ["DefaultStrategy", "MCMCStrategy", "Strategy"]

SPLIT_SHRINK = 1.6  # a split Gaussian's two parts are smaller by this (3DGS)
MOST_COPIES = 51  # gsplat's limit of the binomial sum in the relocation


@runtime_checkable
class Strategy(Protocol):
    """What the training loop asks of a strategy."""

    @property
    def absgrad(self) -> bool:
        """Whether renders have to collect absolute gradients."""
        ...

    def after_backward(self, step: int, population: Population, meta: dict[str, Any]) -> None:
        """Called after each backward pass of a training view, with the rasterizer's meta."""
        ...

    def after_update(self, step: int, population: Population, generator: torch.Generator) -> None:
        """Called after each update of the parameters; Gaussians come and go here."""
        ...


@dataclass(frozen=True)
class DefaultStrategy:
    """3DGS: Gaussians whose image position is pulled hard are duplicated (small) or split (large), faint ones removed.

    prune_opacity     remove below this opacity
    grow_grad2d       grow above this mean gradient of the image position, in units of half the image (NDC); with
                      absgrad take 4e-4 to 8e-4
    grow_scale3d      up to this share of the extent duplicate, above split
    grow_scale2d      split above this radius, as a share of the image; only before `scale2d_until`
    prune_scale3d     remove above this share of the extent, once opacities have been reset
    prune_scale2d     remove above this radius; only before `scale2d_until`, and after the first reset
    scale2d_until     0: the two rules on radii are off, as in 3DGS, where a bug disables them
    first, until, every   growing and pruning happen at multiples of `every` with first < step < until
    reset_every       set all opacities to at most twice prune_opacity at its multiples before `until`
    pause_after_reset no growing and pruning in so many steps after a reset
    absgrad           use sums of absolute gradients (AbsGS)
    revised_opacity   a split Gaussian's parts get 1 - sqrt(1 - opacity) (Bulo et al. 2024)
    most              no growth beyond so many Gaussians; those with the largest gradient go first. None: no limit
    """

    prune_opacity: float = 0.005
    grow_grad2d: float = 2e-4
    grow_scale3d: float = 0.01
    grow_scale2d: float = 0.05
    prune_scale3d: float = 0.1
    prune_scale2d: float = 0.15
    scale2d_until: int = 0
    first: int = 500
    until: int = 15_000
    every: int = 100
    reset_every: int = 3_000
    pause_after_reset: int = 0
    absgrad: bool = False
    revised_opacity: bool = False
    most: int | None = None

    @torch.no_grad()
    def after_backward(self, step: int, population: Population, meta: dict[str, Any]) -> None:
        """Add this view's gradients to the running means."""
        if step >= self.until:
            return
        gradients = meta["means2d"].absgrad if self.absgrad else meta["means2d"].grad  # [C, N, 2] or [nnz, 2]
        radii = meta["radii"].amax(dim=-1)  # pixels; 0 where the Gaussian is not seen
        half_image = gradients.new_tensor([meta["width"] / 2, meta["height"] / 2]) * meta["n_cameras"]
        sizes = (gradients * half_image).norm(dim=-1)
        if meta.get("gaussian_ids") is not None:
            ids = meta["gaussian_ids"]
        else:
            seen = radii > 0
            ids, sizes, radii = seen.nonzero()[:, 1], sizes[seen], radii[seen]
        population.statistic("gradient").index_add_(0, ids, sizes)
        population.statistic("seen").index_add_(0, ids, torch.ones_like(sizes))
        if self.scale2d_until:
            share = radii / max(meta["width"], meta["height"])
            population.statistic("radius").scatter_reduce_(0, ids, share, "amax")

    @torch.no_grad()
    def after_update(self, step: int, population: Population, generator: torch.Generator) -> None:
        """Grow, prune and reset, each when it is due."""
        if step >= self.until:
            return
        paused = step % self.reset_every < self.pause_after_reset
        if step > self.first and step % self.every == 0 and not paused:
            self._grow(step, population, generator)
            self._prune(step, population)
            for name in ("gradient", "seen", "radius"):
                population.statistic(name).zero_()
        if step % self.reset_every == 0:
            ceiling = _logit(torch.tensor(2 * self.prune_opacity))
            logits = population.model.opacity_logits.detach()
            population.assign("opacity_logits", logits.clamp_max(float(ceiling)))

    def _grow(self, step: int, population: Population, generator: torch.Generator) -> None:
        model, count = population.model, len(population)
        gradient = population.statistic("gradient") / population.statistic("seen").clamp_min(1)
        small = _largest_scale(population) <= self.grow_scale3d * population.extent
        grow = gradient > self.grow_grad2d
        split = grow & ~small
        if step < self.scale2d_until:
            split |= population.statistic("radius") > self.grow_scale2d
        duplicate = grow & small  # one with a large radius may be duplicated and split, as in gsplat
        if self.most is not None:
            duplicate &= ~split  # so that each grows the number by one
            chosen = _largest(gradient, duplicate | split, self.most - count)
            duplicate, split = duplicate & chosen, split & chosen
        if not bool((duplicate | split).any()):
            return

        numbers = torch.arange(count, device=gradient.device)
        parts, copies = numbers[split].repeat(2), numbers[duplicate]  # the split ones themselves go
        source = torch.cat([numbers[~split], copies, parts])
        fresh = torch.arange(len(source), device=source.device) >= count - int(split.sum())
        offsets = _sample(population, parts, generator)
        values = {
            "means": torch.cat([model.means[copies], model.means[parts] + offsets]),
            "log_scales": torch.cat([model.log_scales[copies], model.log_scales[parts] - math.log(SPLIT_SHRINK)]),
        }
        if self.revised_opacity:
            revised = _logit(1 - torch.sqrt(1 - model.opacity_logits[parts].sigmoid()))
            values["opacity_logits"] = torch.cat([model.opacity_logits[copies], revised])
        population.change(source, fresh, **values)

    def _prune(self, step: int, population: Population) -> None:
        remove = population.model.opacity_logits.detach().sigmoid() < self.prune_opacity
        if step > self.reset_every:
            remove |= _largest_scale(population) > self.prune_scale3d * population.extent
            if step < self.scale2d_until:
                remove |= population.statistic("radius") > self.prune_scale2d
        if bool(remove.any()):
            population.change(~remove)


@dataclass(frozen=True)
class MCMCStrategy:
    """3DGS-MCMC (Kheradmand et al. 2024): faint Gaussians move onto others, the number grows to a cap, noise explores.

    most         the cap on the number of Gaussians
    min_opacity  at or below it a Gaussian is moved
    growth       share of new Gaussians at each refinement
    noise        the noise's standard deviation is this times the learning rate of the means, in units of the Gaussian's
                 covariance; it fades as opacity rises above min_opacity
    first, until, every   refinement happens at multiples of `every` with first < step < until; the noise never stops

    Meant with TrainSettings(opacity_penalty=0.01, scale_penalty=0.01) and an initial opacity of 0.5.
    Both the Gaussian that moves and the one it joins start with new Adam moments; gsplat renews those of the latter.
    """

    most: int = 1_000_000
    min_opacity: float = 0.005
    growth: float = 0.05
    noise: float = 5e5
    first: int = 500
    until: int = 25_000
    every: int = 100

    @property
    def absgrad(self) -> bool:
        """Gradients of the image position are not used."""
        return False

    def after_backward(self, step: int, population: Population, meta: dict[str, Any]) -> None:
        """Nothing: this strategy looks at opacities alone."""

    @torch.no_grad()
    def after_update(self, step: int, population: Population, generator: torch.Generator) -> None:
        """Move, add, and shake."""
        if self.first < step < self.until and step % self.every == 0:
            self._relocate(population, generator)
            self._add(population, generator)
        self._shake(population, generator)

    def _relocate(self, population: Population, generator: torch.Generator) -> None:
        opacities = population.model.opacity_logits.detach().sigmoid()
        dead = opacities <= self.min_opacity
        if bool(dead.any()) and not bool(dead.all()):
            joined = _draw(opacities * ~dead, int(dead.sum()), generator)
            source = torch.arange(len(population), device=dead.device)
            source[dead] = joined
            self._share(population, source, joined)

    def _add(self, population: Population, generator: torch.Generator) -> None:
        count = len(population)
        wanted = min(self.most, int((1 + self.growth) * count)) - count
        if wanted > 0:
            joined = _draw(population.model.opacity_logits.detach().sigmoid(), wanted, generator)
            self._share(population, torch.cat([torch.arange(count, device=joined.device), joined]), joined)

    def _share(self, population: Population, source: Tensor, joined: Tensor) -> None:
        """Give each Gaussian's contribution in equal parts to all that now sit in its place.

        source [M] as in Population.change; joined: the Gaussians that got company, as often as they did.
        """
        from kernels import splat

        model = population.model
        ratios = torch.bincount(joined, minlength=len(population)) + 1
        hit = ratios > 1
        opacities, scales = model.opacity_logits.detach().sigmoid()[hit], model.log_scales.detach().exp()[hit]
        opacities, scales = splat.relocation(opacities, scales, ratios[hit].clamp_max(MOST_COPIES))
        opacities = opacities.clamp(self.min_opacity, 1 - torch.finfo(torch.float32).eps)
        place = torch.full_like(ratios, -1)  # of a Gaussian among the `hit` ones
        place[hit] = torch.arange(len(opacities), device=place.device)
        fresh = hit[source]
        which = place[source[fresh]]
        population.change(source, fresh, opacity_logits=_logit(opacities)[which], log_scales=scales.log()[which])

    def _shake(self, population: Population, generator: torch.Generator) -> None:
        from kernels import splat

        model = population.model
        noise = torch.randn(model.means.shape, generator=generator, device=generator.device)
        strength = self.noise * population.group("means")["lr"]
        opacities = model.opacity_logits.detach().sigmoid()
        scales = model.log_scales.detach().exp()
        model.means.add_(splat.position_noise(model.quats.detach(), scales, opacities, noise.mul_(strength)))


def _largest_scale(population: Population) -> Tensor:
    return population.model.log_scales.detach().amax(dim=-1).exp()


def _largest(values: Tensor, among: Tensor, most: int) -> Tensor:
    """[N] bool: `among`, or the `most` of them with the largest values where there are more."""
    if int(among.sum()) <= most:
        return among
    chosen = torch.zeros_like(among)
    chosen[torch.where(among, values, -torch.inf).topk(max(most, 0)).indices] = True
    return chosen


def _sample(population: Population, which: Tensor, generator: torch.Generator) -> Tensor:
    """[M, 3] offsets drawn from the Gaussians `which` [M]."""
    model = population.model
    w, x, y, z = torch.nn.functional.normalize(model.quats[which], dim=-1).unbind(-1)
    noise = torch.randn(len(which), 3, generator=generator, device=generator.device).to(w)
    v = model.log_scales[which].exp() * noise
    axis = torch.stack([x, y, z], dim=-1)
    twice = 2 * torch.linalg.cross(axis, v, dim=-1)
    return v + w[:, None] * twice + torch.linalg.cross(axis, twice, dim=-1)  # q v q*, the rotation by a unit quaternion


def _draw(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` indices with probabilities in proportion to `weights` [N], with replacement.

    Through the cumulative sum in float64: torch.multinomial takes at most 2^24 of them.
    """
    total = weights.double().cumsum(dim=0)
    places = torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64).to(total.device)
    return torch.searchsorted(total, places * total[-1], right=True).clamp_max(len(weights) - 1)


def _logit(probability: Tensor) -> Tensor:
    return torch.log(probability) - torch.log1p(-probability)
