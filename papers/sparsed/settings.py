"""What can be set in the SparseD paper: the models and their training, what they are asked, and the arms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ArmName = Literal[
    "dense", "sparsed", "no_skip", "no_reuse", "no_isolation", "own", "released", "window", "streaming"
]  # fmt: skip
TaskName = Literal["retrieve", "track", "common", "filter"]


@dataclass(frozen=True)
class Params:
    """One run. `params.yaml` gives the values of each profile.

    What is asked
        dataset          generated (tasks, and a generated language as text), shakespeare (tasks, and characters of tiny
                         Shakespeare as text), or folder (`data_dir`, for `model`: see `pretrained.py`)
        data_dir         that folder; empty for the others
        seeds            each draws prompts, windows and the order of unmasking anew; the models stay the same
        tasks            of common.data.tasks, or the folder's names; the accuracy is the mean over them
        prompts          sequences of each task and seed
        queries          questions of a sequence; `common` has at most 8
        hops, gap        of the tasks, see there
        windows          windows of text of each seed
        length           tokens of a sequence, prompt and generation
        generated        tokens of the generation of text, and of the folder's tasks

    Method
        steps            T of text and of the folder's tasks; a generated task takes one step for each question
        block_length     of the folder's tasks: parts generated one after the other; 0: all at once
        block_size       tokens a side of a tile
        keep_ratio       rho
        skip             share of dense steps
        ratios           other rho that accuracy is measured at
        sink             share of blocks that `streaming` keeps at the start
        arms             compared with each other; see `experiment.ARMS`

    Models
        model            a masked diffusion model of transformers, by name or folder; empty: two small ones of ours
        width, depth, heads, ratio     of both
        rate             peak of the learning rate, AdamW with a cosine to zero
        clip             largest norm of the gradient
        stages           of the training on tasks, one after the other: "length x questions x steps x batch", where
                         tasks share the batch; `retrieve` alone in stages marked by "r" at the end
        text_steps, text_batch, text_length   of the training on text
        retrain          train even where a checkpoint is there

    Times
        timing_lengths   tokens of one attention whose times are taken; the last is the headline's
        timing_block     tokens a side of a tile there
        repeats          medians that are taken; the "seeds" of times

    Machine
        device           cpu or cuda
        workers          evaluations at once, each with one thread; 0: one for each core
    """

    seeds: list[int]
    dataset: Literal["generated", "shakespeare", "folder"]
    data_dir: str
    tasks: list[str]
    prompts: int
    queries: int
    hops: int
    gap: int
    windows: int
    length: int
    generated: int
    steps: int
    block_length: int
    block_size: int
    keep_ratio: float
    skip: float
    ratios: list[float]
    sink: float
    arms: list[ArmName]
    model: str
    width: int
    depth: int
    heads: int
    ratio: int
    rate: float
    clip: float
    stages: list[str]
    text_steps: int
    text_batch: int
    text_length: int
    retrain: bool
    timing_lengths: list[int]
    timing_block: int
    repeats: int
    device: Literal["cpu", "cuda"]
    workers: int
