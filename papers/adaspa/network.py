"""The video model that everything is measured on: built, trained, kept, and sampled."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import seeds
from common.models.video import VideoTransformer, sample, velocity_loss
from common.training.checkpoints import Checkpoint, checkpoint, rounded
from common.training.supervised import Schedule, fit, no_bar
from papers.adaspa import data
from papers.adaspa.settings import Params

# Fields of Params that decide what the trained model is.
TRAINING = (
    "frames", "side", "patch", "heads", "head_dim", "double", "single", "real_share",
    "train_steps", "image_share", "train_batch", "train_rate", "train_warmup", "model_seed",
)  # fmt: skip
VIDEOS = 10**6  # number of the first generated scene that is trained on as a video


def build(params: Params) -> VideoTransformer:
    """With random weights, the same for a model_seed."""
    with seeds.isolated(f"network {params.model_seed}"):
        return VideoTransformer(
            heads=params.heads,
            double=params.double,
            single=params.single,
            head_dim=params.head_dim,
            channels=3,
            patch=params.patch,
            text_width=data.WIDTH,
        )


def train(params: Params, *, keep: Path | None = None, progress: Callable = no_bar) -> dict[str, Any]:
    """`state` (a state dict) and `losses`: single frames first, in batches of as many tokens, then videos."""
    network = build(params)
    draw = seeds.generator(params.model_seed, "training")
    optimizer = torch.optim.AdamW(network.parameters(), lr=params.train_rate, betas=(0.9, 0.99), weight_decay=0.0)
    steps, images = params.train_steps, round(params.train_steps * params.image_share)
    options = {"side": params.side, "real_share": params.real_share, "seed": params.model_seed}
    single = data.batches(frames=1, batch=params.train_batch * params.frames, **options)
    videos = data.batches(frames=params.frames, batch=params.train_batch, first=VIDEOS, **options)
    losses = fit(
        network,
        itertools.chain(itertools.islice(single, images), videos),
        lambda net, batch: velocity_loss(net, *batch, draw),
        optimizer,
        Schedule(steps, params.train_warmup),
        clip=1.0,
        keep=keep,
        progress=progress,
    )
    return {"state": rounded(network.state_dict()), "losses": losses}


def trained(params: Params, *, progress: Callable = no_bar) -> Checkpoint:
    """The model of these parameters from `checkpoints/`, or trained and put there."""
    settings = {name: value for name, value in dataclasses.asdict(params).items() if name in TRAINING}
    return checkpoint(
        "video-sprites",
        settings,
        lambda keep: train(params, keep=keep, progress=progress)["state"],
        retrain=params.retrain,
    )


def load(params: Params, state: dict[str, Tensor]) -> VideoTransformer:
    """The network with these weights, ready to sample."""
    network = build(params)
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


def generate(network: VideoTransformer, params: Params, prompt: data.Caption, seed: int, **options: Any) -> Tensor:
    """Video [3, F, S, S] for a caption from the noise of a seed; `options` as of `sample`."""
    noise = torch.randn(1, 3, params.frames, params.side, params.side, generator=seeds.generator(seed, "noise"))
    return sample(network, noise, *data.embed([prompt]), steps=params.steps, shift=params.shift, **options)[0]
