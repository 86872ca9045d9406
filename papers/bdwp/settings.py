"""What can be set in the BDWP paper: data, networks, arms, training, kernels."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

NETWORKS = ("resnet_cifar", "resnet20", "vit", "resnet9", "vgg19", "resnet18", "resnet50")


@dataclass(frozen=True)
class Params:
    """One run. `params.yaml` gives the values of each profile. An arm is written "bdwp/2:8", see `method.recipe`.

    Data
        seeds            one training each, for every arm: initial weights, order of images, augmentation
        dataset          digits (comes with scikit-learn), cifar10 (registered, a subset), published (folders of yours:
                         each of the published networks on its own set, see `data.SET_OF`)
        data_dir         the folder that holds the published sets' folders; empty for the others
        size             pixels a side of digits and cifar10, averaged down to it
        augment          random crops and mirrors in training

    Networks
        networks         some of `NETWORKS`; the first is trained in every arm
        other_arms       arms of the networks after the first
        depth, width     of resnet_cifar: 6n + 2, and channels of its first stage; resnet20 is the published one
        patch, vit_width, vit_depth, vit_heads   of the vision transformer

    Arms
        arms             of the first network, beside `dense`
        pattern          that of the comparison of gradients and of the headline

    Training
        epochs, steps    passes over the data; steps, if not 0, instead
        vit_epochs       of the vision transformer
        warmup           share of the steps in which the learning rate rises
        batch            images in a step
        learning_rate, momentum, weight_decay   of SGD; the rate falls to zero along a cosine
        decay            lambda_W, the pull on weights that the forward view leaves out
        vit_learning_rate, vit_decay   of AdamW, and its lambda_W
        device           cpu or cuda
        workers          trainings at once, each with one thread; 0: one for each core; 1 shows every step
        loaders          processes that read a folder's images

    Counting and timing
        counted          patterns whose multiply-accumulates are counted
        layers           timed layers, "1024x256": a weight of 1024 x 1024 and 256 tokens
        timed            patterns that are timed
        repeats          timings, each a seed of the speed claims
    """

    seeds: list[int]
    dataset: Literal["digits", "cifar10", "published"]
    data_dir: str
    size: int
    augment: bool
    networks: list[str]
    other_arms: list[str]
    depth: int
    width: int
    patch: int
    vit_width: int
    vit_depth: int
    vit_heads: int
    arms: list[str]
    pattern: str
    epochs: int
    steps: int
    vit_epochs: int
    warmup: float
    batch: int
    learning_rate: float
    momentum: float
    weight_decay: float
    decay: float
    vit_learning_rate: float
    vit_decay: float
    device: Literal["cpu", "cuda"]
    workers: int
    loaders: int
    counted: list[str]
    layers: list[str]
    timed: list[str]
    repeats: int

    def __post_init__(self) -> None:
        for pattern in (self.pattern, *self.counted, *self.timed, *(arm_pattern(arm) for arm in self.arms)):
            parse(pattern)
        for layer in self.layers:
            parse_layer(layer)
        unknown = set(self.networks) - set(NETWORKS)
        if unknown or not self.networks:
            raise ValueError(f"networks are {self.networks}, expected some of {', '.join(NETWORKS)}")
        missing = set(self.other_arms) - {"dense", *self.arms}
        if missing:
            raise ValueError(f"other_arms has {sorted(missing)}, expected some of {['dense', *self.arms]}")


def parse(pattern: str) -> tuple[int, int]:
    """ "2:4" -> (2, 4). Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"got the pattern {pattern!r}, expected n:m with 1 <= n <= m, such as 2:4")
    return int(match[1]), int(match[2])


def arm_pattern(arm: str) -> str:
    """ "bdwp/2:8" -> "2:8". Raises ValueError for anything else."""
    if arm.count("/") != 1:
        raise ValueError(f"got the arm {arm!r}, expected a recipe and a pattern, such as bdwp/2:8")
    return arm.split("/")[1]


def parse_layer(layer: str) -> tuple[int, int]:
    """ "1024x256" -> (1024, 256). Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+)x(\d+)", layer)
    if not match or not int(match[1]) * int(match[2]):
        raise ValueError(f"got the layer {layer!r}, expected channels and tokens, such as 1024x256")
    return int(match[1]), int(match[2])
