"""A small conditional diffusion model in pixels that predicts a picture as its condition plus a correction.

Its answer to a bad picture c at a noisy state x_t is x_0 = c + f(x_t, t, c), and f begins at zero: an untrained model
returns what it was given, so training can only help it on what it is trained on. A small network that predicts the
noise instead has to redraw the whole picture, and at a few million weights does more harm than good.

As a predictor (`common.models.diffusion`) it answers with the noise that this x_0 leaves in x_t.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models.denoiser import Denoiser
from common.models.diffusion import Schedule, Trained, train
from common.models.pairs import Pairs, crop

__all__ = ["Corrector", "correction_loss", "train_corrector"]

CHANNELS = 3
AVERAGE = 0.99  # decay of the weights' running mean


class Corrector(nn.Module):
    """eps(x_t, t, condition) of pictures [B, 3, H, W] in -1..1; sides in multiples of `multiple`.

    width, depth  of the `Denoiser` inside, which sees state and condition side by side
    """

    signal: Tensor

    def __init__(self, schedule: Schedule, *, width: int = 32, depth: int = 3):
        super().__init__()
        self.network = Denoiser(channels=2 * CHANNELS, width=width, depth=depth)
        self.multiple = self.network.multiple
        self.register_buffer("signal", schedule.signal)

    @property
    def schedule(self) -> Schedule:
        """The noise schedule that its times are of."""
        return Schedule(self.signal)

    def picture(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """x_0, the predicted picture; t [B] from 1 on."""
        return condition + self.network(torch.cat([x, condition], dim=1), t)[:, :CHANNELS]

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        a = self.schedule.at(t)
        return (x - a.sqrt() * self.picture(x, t, condition)) / (1 - a).sqrt()


def correction_loss(
    model: Corrector,
    bad: Tensor,
    good: Tensor,
    generator: torch.Generator,
    *,
    latest: int | None = None,
    trust: float = 1.0,
) -> Tensor:
    """Mean (x_0 - good)^2 of pictures [B, 3, H, W], at a uniform time from 1 to `latest` (None: the last) for each.

    What is noised lies on the way from bad to good, anywhere up to a share `trust` of it. SDEdit begins with the bad
    picture, and what its later states hold beyond that is the model's own guess, not the truth. A model that has been
    shown the truth (trust 1, plain diffusion) takes its guesses for it and draws ever sharper ones; at 0 it looks at
    its condition alone and stays at the mean of what could be there.
    """
    schedule, at = model.schedule, {"generator": generator, "device": good.device}
    t = torch.randint(1, (latest or schedule.steps) + 1, (len(good),), **at)
    way = trust * torch.rand(len(good), 1, 1, 1, **at)
    state = schedule.noised(torch.lerp(bad, good, way), torch.randn(good.shape, **at), t)
    return F.mse_loss(model.picture(state, t, bad), good)


def train_corrector(
    pairs: Pairs,
    *,
    width: int,
    steps: int,
    batch: int,
    size: int,
    learning_rate: float,
    seed: int,
    latest: int | None = None,
    trust: float = 1.0,
    spoil: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    device: str = "cpu",
    progress: Callable[..., Any] | None = None,
) -> Trained:
    """A `Corrector` trained on random crops of pairs, with averaged weights.

    batch, size  crops a step and their side, a multiple of the network's
    latest, trust   see `correction_loss`
    spoil        (bad pictures [B, 3, H, W] in -1..1, generator) -> worse ones, for instance with holes
    progress     see `diffusion.train`
    """
    torch.manual_seed(seed)
    crops = partial(crop, pairs, count=batch, size=size, device=device)

    def loss(network: nn.Module, draw: torch.Generator) -> Tensor:
        assert isinstance(network, Corrector)
        bad, good = crops(draw)
        worse = bad if spoil is None else spoil(bad, draw)
        return correction_loss(network, worse, good, draw, latest=latest, trust=trust)

    model = Corrector(Schedule.cosine(), width=width).to(device)
    return train(model, loss, steps=steps, learning_rate=learning_rate, seed=seed, ema=AVERAGE, progress=progress)
