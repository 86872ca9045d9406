"""What can be set in the paper on progressive gradient flow: data, network, schedule, and which arms are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Params:
    """One run. `params.yaml` gives the values of each profile.

    Data
        dataset          digits (scikit-learn's), cifar10, or imagenet (a folder of yours)
        data_dir         imagenet's folder: train/<class>/*.JPEG and val/<class>/*.JPEG; empty for the others
        text             none, markov (a generated language) or shakespeare: the second task, next-token prediction

    Experiment
        seeds            one training each, for every arm
        patterns         n:m of the feed-forward layers, all compared by `arms`
        main_pattern     one of them, at which `main_arms` are compared too
        arms, main_arms  see `method.recipes`; `sr_ste_long` is SR-STE trained for as many products as `exponential`
        text_arms        compared on the text at main_pattern

    Network
        network          tiny (common.models, sizes below) or vit_b_16 (torchvision, 224 pixels)
        patch, width, depth, heads   of the tiny vision transformer and of the GPT
        context          positions of the GPT

    Training
        steps, batch     optimiser steps, and images (or windows of text) in each; epochs, if not 0, takes steps' place
        learning_rate, text_learning_rate, weight_decay   of AdamW; warm-up over the share `warmup`, then a cosine
        clip             largest norm of the gradient
        mixup            alpha of mixup; 0: off (imagenet alone)

    Sparsity
        exponent         c S of the exponential flow
        dense, fine_tune shares of the steps before and after the decay
        blocks           of the geometric flow, falling to 1; the first times m divides the width
        refresh          steps between two searches of the masks
        probe            every so many steps gradient variance and mask flips are measured

        device           cpu or cuda
        workers          trainings at once, each with one thread; 0: one for each core; 1 shows every step
    """

    seeds: list[int]
    dataset: Literal["digits", "cifar10", "imagenet"]
    data_dir: str
    text: Literal["none", "markov", "shakespeare"]
    patterns: list[str]
    main_pattern: str
    arms: list[str]
    main_arms: list[str]
    text_arms: list[str]
    network: Literal["tiny", "vit_b_16"]
    patch: int
    width: int
    depth: int
    heads: int
    context: int
    steps: int
    epochs: int
    batch: int
    learning_rate: float
    text_learning_rate: float
    weight_decay: float
    warmup: float
    clip: float
    mixup: float
    exponent: float
    dense: float
    fine_tune: float
    blocks: list[int]
    refresh: int
    probe: int
    device: Literal["cpu", "cuda"]
    workers: int
