"""What can be set in the SR-STE paper: data, network, patterns, training."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

NETWORKS = ("resnet_cifar", "resnet20", "resnet18", "resnet50")


@dataclass(frozen=True)
class Params:
    """One run. `params.yaml` gives the values of each profile. A pattern is written "2:4".

    Data
        seeds            one training each, for every arm: initial weights, order of images, augmentation
        dataset          digits (comes with scikit-learn), cifar10 (registered, a subset), imagenet (a folder of yours)
        data_dir         ImageNet's folder with train/ and val/; empty for the others
        size             pixels a side; cifar10 is averaged down to it
        validation       images held out of training, balanced; the decay was chosen on them. 0: none (imagenet)
        augment          random crops and mirrors in training

    Network
        networks         resnet_cifar, resnet20, resnet18, resnet50; the first is trained in every arm
        other_arms       arms of the networks after the first
        depth, width     of resnet_cifar: 6n + 2, and channels of its first stage; resnet20 is the published one

    Patterns
        sr_ste, ste      patterns trained with SR-STE and with STE
        by_position      patterns trained with SR-STE in groups along kernel positions
        sweep            multiples of `decay` that are tried as well, at sweep_pattern; 0 (STE) and 1 are arms anyway
        sweep_pattern    one of both `sr_ste` and `ste`

    Training
        epochs, steps    passes over the data; steps, if not 0, instead
        warmup           share of the steps in which the learning rate rises
        batch            images in a step
        learning_rate, momentum, weight_decay   of SGD; the rate falls to zero along a cosine
        decay            lambda_W, the pull on weights that are left out
        device           cpu or cuda
        workers          trainings at once, each with one thread; 0: one for each core; 1 shows every step
        loaders          processes that read a folder's images

    Timing
        repeats          timings of one step, each a seed of the speed claims
    """

    seeds: list[int]
    dataset: Literal["digits", "cifar10", "imagenet"]
    data_dir: str
    size: int
    validation: int
    augment: bool
    networks: list[str]
    other_arms: list[str]
    depth: int
    width: int
    sr_ste: list[str]
    ste: list[str]
    by_position: list[str]
    sweep: list[float]
    sweep_pattern: str
    epochs: int
    steps: int
    warmup: float
    batch: int
    learning_rate: float
    momentum: float
    weight_decay: float
    decay: float
    device: Literal["cpu", "cuda"]
    workers: int
    loaders: int
    repeats: int

    def __post_init__(self) -> None:
        for pattern in (*self.sr_ste, *self.ste, *self.by_position, self.sweep_pattern):
            parse(pattern)
        if self.sweep_pattern not in self.sr_ste or self.sweep_pattern not in self.ste:
            raise ValueError(
                f"sweep_pattern is {self.sweep_pattern!r}, expected one of both sr_ste {self.sr_ste} and ste {self.ste}"
            )
        unknown = set(self.networks) - set(NETWORKS)
        if unknown or not self.networks:
            raise ValueError(f"networks are {self.networks}, expected some of {', '.join(NETWORKS)}")


def parse(pattern: str) -> tuple[int, int]:
    """ "2:4" -> (2, 4). Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"got the pattern {pattern!r}, expected n:m with 1 <= n <= m, such as 2:4")
    return int(match[1]), int(match[2])
