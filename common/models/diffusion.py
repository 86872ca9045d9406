"""Denoising diffusion: noise schedule, training loss, weight averaging, DDIM, and SDEdit; training that can be resumed.

A *predictor* is any function (x_t [B, C, H, W], t [B]) -> predicted noise [B, C, H, W]; conditions are bound to it
beforehand (`functools.partial`). So the same sampler serves a small network in pixels and a large one in latents. Times
run from 0 (the image) to `schedule.steps` (noise):

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise,    a_t = schedule.signal[t]
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["EMA", "Predictor", "Schedule", "Trained", "ddim", "epsilon_loss", "sdedit", "times", "train"]

Predictor = Callable[[Tensor, Tensor], Tensor]
Hook = Callable[[Tensor, int], Tensor]

LEAST_SIGNAL = 1e-5  # a_T; 0 would leave x_0 undefined
GRADIENT_NORM = 1.0  # gradients are clipped to it


@dataclass(frozen=True, eq=False)
class Schedule:
    """How much of the image is left at each time: `signal` [T + 1], from signal[0] = 1 down to nearly 0."""

    signal: Tensor

    @classmethod
    def cosine(cls, steps: int = 1000, offset: float = 0.008) -> Schedule:
        """a_t = f(t) / f(0), f(t) = cos^2(pi/2 (t/T + s) / (1 + s)) (Nichol and Dhariwal 2021)."""
        place = (torch.arange(steps + 1, dtype=torch.float64) / steps + offset) / (1 + offset)
        signal = torch.cos(0.5 * math.pi * place).square()
        return cls((signal / signal[0]).clamp_min(LEAST_SIGNAL).float())

    @property
    def steps(self) -> int:
        """T, the time of pure noise."""
        return len(self.signal) - 1

    def at(self, t: Tensor | int) -> Tensor:
        """a_t for times [B] or one, shaped [B, 1, 1, 1]."""
        return self.signal[torch.as_tensor(t, device=self.signal.device)].reshape(-1, 1, 1, 1)

    def noised(self, image: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """x_t of images [B, C, H, W] with that noise, at times [B] or one for all."""
        a = self.at(t)
        return a.sqrt() * image + (1 - a).sqrt() * noise

    def to(self, device: torch.device | str) -> Schedule:
        """The same on `device`."""
        return Schedule(self.signal.to(device))


def epsilon_loss(
    predict: Predictor, image: Tensor, schedule: Schedule, generator: torch.Generator, *, latest: int | None = None
) -> Tensor:
    """Mean squared error of the predicted noise (Ho et al. 2020), images [B, C, H, W], a uniform time for each.

    latest  times are drawn from 1 to it (None: to the last): a network that only serves SDEdit never sees later ones
    """
    last = schedule.steps if latest is None else latest
    t = torch.randint(1, last + 1, (len(image),), generator=generator, device=image.device)
    noise = torch.randn(image.shape, generator=generator, device=image.device)
    return F.mse_loss(predict(schedule.noised(image, noise, t), t), noise)


def times(schedule: Schedule, steps: int, strength: float = 1.0) -> list[int]:
    """The times of a sampler with `steps` steps in all, of which the last round(strength * steps) are made; ends at 0.

    Strength 0 gives [0]: nothing to do. Raises ValueError for values out of range.
    """
    if not 0 <= strength <= 1 or not 1 <= steps <= schedule.steps:
        raise ValueError(
            f"times: got strength {strength} and {steps} steps; expected 0..1 and 1 to {schedule.steps} steps."
        )
    first = round(strength * steps)
    return [round(schedule.steps * index / steps) for index in range(first, -1, -1)]


@torch.no_grad()
def ddim(
    predict: Predictor,
    x: Tensor,
    schedule: Schedule,
    at: Sequence[int],
    *,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    limit: float | None = None,
    after_step: Hook | None = None,
) -> Tensor:
    """Denoise x [B, C, H, W] from time at[0] over the times `at` to the last one (Song et al. 2021).

    eta         0: deterministic; 1: as much fresh noise a step as DDPM, then `generator` is needed
    limit       the predicted image is kept within -limit..limit; for pixels 1, for latents None
    after_step  (x, time) -> x, called after each step: masks, statistics

    Raises ValueError for times that do not fall, or eta without a generator.
    """
    if list(at) != sorted(set(at), reverse=True) or not at:
        raise ValueError(f"ddim: the times must fall from step to step; got {list(at)[:10]}.")
    if eta and generator is None:
        raise ValueError(f"ddim: eta is {eta}, so fresh noise is drawn; give a generator.")
    for now, then in itertools.pairwise(at):
        a, a_next = schedule.at(now), schedule.at(then)
        noise = predict(x, torch.full((len(x),), now, device=x.device))
        image = (x - (1 - a).sqrt() * noise) / a.sqrt()
        if limit is not None:
            image = image.clamp(-limit, limit)
            noise = (x - a.sqrt() * image) / (1 - a).sqrt()
        spread = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)).sqrt()
        x = a_next.sqrt() * image + (1 - a_next - spread.square()).clamp_min(0).sqrt() * noise
        if eta:
            x = x + spread * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        if after_step is not None:
            x = after_step(x, then)
    return x


def sdedit(
    predict: Predictor,
    image: Tensor,
    schedule: Schedule,
    *,
    strength: float,
    steps: int,
    generator: torch.Generator,
    eta: float = 0.0,
    limit: float | None = None,
    after_step: Hook | None = None,
) -> Tensor:
    """Noise images [B, C, H, W] up to a share `strength` of the schedule and denoise them (Meng et al. 2022).

    Coarse structure stays, detail is drawn anew. Strength 0 returns the images as they are; other arguments as of
    `times` and `ddim`.
    """
    at = times(schedule, steps, strength)
    noise = torch.randn(image.shape, generator=generator, device=image.device, dtype=image.dtype)
    x = schedule.noised(image, noise, at[0])
    return ddim(predict, x, schedule, at, eta=eta, generator=generator, limit=limit, after_step=after_step)


class EMA:
    """A running mean of a network's weights; `network` holds it.

    The decay grows from 2/11 to `decay` over the first steps, so that the beginning is soon forgotten.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.source, self.decay, self.count = network, decay, 0
        self.network = copy.deepcopy(network).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the source's weights."""
        self.count += 1
        share = 1 - min(self.decay, (1 + self.count) / (10 + self.count))
        for mean, value in zip(self.network.parameters(), self.source.parameters(), strict=True):
            mean.lerp_(value.detach(), share)


@dataclass(frozen=True, eq=False)
class Trained:
    """What `train` returns: the network with averaged weights (without EMA: the trained one), and a loss a step."""

    network: nn.Module
    losses: list[float]


def train(
    network: nn.Module,
    loss: Callable[[nn.Module, torch.Generator], Tensor],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    parameters: Iterable[nn.Parameter] | None = None,
    ema: float = 0.0,
    checkpoint: Path | None = None,
    checkpoint_every: int = 500,
    progress: Callable[..., Any] | None = None,
) -> Trained:
    """Minimise `loss(network, generator)` by AdamW; all randomness of the loss comes from that generator.

    parameters  to train; None: those that require a gradient
    ema         decay of the weights' running mean; 0: none
    checkpoint  a file to save to and, if it is there already, to go on from: the same bits as without a stop
    progress    progress(iterable, description) draws a bar, as tqdm and `Record.progress` do; None: no bar

    Interrupting it saves the checkpoint. Raises FloatingPointError with the step where the loss is not finite.
    """
    from common.splatting import checkpoints  # the same files, with the same errors

    trained = [p for p in network.parameters() if p.requires_grad] if parameters is None else list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=learning_rate)
    generator = torch.Generator(device=trained[0].device).manual_seed(seed)
    mean = EMA(network, ema) if ema else None
    losses: list[float] = []
    if checkpoint is not None and checkpoint.exists():
        state = checkpoints.read(checkpoint)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        losses = list(state["losses"])
        if mean is not None:
            mean.network.load_state_dict(state["mean"])
            mean.count = len(losses)

    def save() -> None:
        if checkpoint is not None:
            parts = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
            averaged = {} if mean is None else mean.network.state_dict()
            checkpoints.write(
                checkpoint, {**parts, "mean": averaged, "generator": generator.get_state(), "losses": losses}
            )

    network.train()
    left = range(len(losses), steps)
    bar: Any = left if progress is None else progress(left, "training the network")
    try:
        for step in bar:
            with checkpoints.uninterrupted():
                value = loss(network, generator)
                if not math.isfinite(value.item()):
                    raise FloatingPointError(
                        f"diffusion.train: the loss of step {step + 1} is {value.item()}; lower the learning rate, or "
                        "look for values that are not finite in the images."
                    )
                optimizer.zero_grad()
                value.backward()
                torch.nn.utils.clip_grad_norm_(trained, GRADIENT_NORM)
                optimizer.step()
                if mean is not None:
                    mean.update()
                losses.append(value.item())
            if progress is not None and step % 10 == 0:
                bar.set_postfix(loss=losses[-1])
            if (step + 1) % checkpoint_every == 0:
                save()
    except KeyboardInterrupt:
        save()
        raise
    save()
    return Trained((network if mean is None else mean.network).eval(), losses)
