"""What can be set in the AdaSpa paper: the model and its videos, the arms compared, what is looked at and timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ArmName = Literal[
    "dense", "kernel", "bfloat16", "adaspa", "no_tiers", "no_cache", "search_10", "search_10_20_30",
    "search_10_20_30_40", "warmup_0", "warmup_2", "warmup_5", "keep_0.1", "keep_0.3", "block_32", "block_64",
    "global_rule", "no_sink", "sink_counts", "window", "minference", "svg", "fixed",
]  # fmt: skip


@dataclass(frozen=True)
class Params:
    """One run. `params.yaml` gives the values of each profile.

    Videos
        dataset          sprites (generated), sprites_and_clips (real clips among them), or prompts (texts, for `model`)
        frames, side     of a video, in pixels; sides in multiples of `patch`
        sprite_prompts   captions of generated scenes that are sampled, none of them trained on
        clip_prompts     names of real clips that are sampled
        texts            prompts for `model`

    Model
        model            a video pipeline of diffusers by name or folder; empty: a small one trained here
        patch, heads, head_dim, double, single   of the small one: see `common.models.video`
        real_share       share of real clips in its training
        train_steps, train_batch, train_rate, train_warmup   its training; a batch is of videos
        image_share      share of the steps, the first ones, on single frames, in batches of as many frames in all
        model_seed       of its weights and batches
        retrain          train it although `checkpoints/` has it
        keep_model       whether it is read from and put into `checkpoints/`, or trained within the run

    Experiment
        seeds            of the noise that videos start from; all arms share it
        steps, shift     of sampling: Euler steps, and how much more densely they lie near the noise
        arms             compared; see `experiment.ARMS`
        keep_ratio, search_steps, block_size   of AdaSpa and of all that it is compared with

    Patterns
        look_at          steps of a dense generation at which attention is looked at; the first is where masks come from
        families_at      steps at which families of patterns are compared
        densities, sizes   shares of entries, and sides of tiles, at which they are

    Cost
        lengths          tokens of one planted head that is timed; rounds of each, and how many for the longest
        rounds, long_rounds
        timing_dim       its head dim
        timing_block     its tiles
        timing_keep      keep ratios that are timed
        planted_grid, planted_text   frames, rows, columns and text of the planted heads whose truth is known

    Machine
        device           cpu or cuda
        workers          generations at once, each with one thread; 0: one for each core; 1 shows every step
    """

    seeds: list[int]
    dataset: Literal["sprites", "sprites_and_clips", "prompts"]
    frames: int
    side: int
    sprite_prompts: int
    clip_prompts: list[str]
    texts: list[str]
    model: str
    patch: int
    heads: int
    head_dim: int
    double: int
    single: int
    real_share: float
    train_steps: int
    train_batch: int
    train_rate: float
    train_warmup: int
    image_share: float
    model_seed: int
    retrain: bool
    keep_model: bool
    steps: int
    shift: float
    arms: list[ArmName]
    keep_ratio: float
    search_steps: list[int]
    block_size: Literal[16, 32, 64, 128]
    look_at: list[int]
    families_at: list[int]
    densities: list[float]
    sizes: list[int]
    lengths: list[int]
    rounds: int
    long_rounds: int
    timing_dim: int
    timing_block: int
    timing_keep: list[float]
    planted_grid: list[int]
    planted_text: int
    device: Literal["cpu", "cuda"]
    workers: int
