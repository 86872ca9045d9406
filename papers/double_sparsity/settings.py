"""What can be set in the Double Sparsity paper: model, texts, calibration, methods and what they read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TaskName = Literal["retrieve", "track", "common", "filter"]
ArmName = Literal[
    "ds", "ds_4bit", "ds_128", "ds_q", "ds_k", "ds_random", "ds_released", "ds_dense_first", "exact", "quest", "h2o",
    "streaming",
]  # fmt: skip


@dataclass(frozen=True)
class Params:
    """One run. `params.yaml` gives the values of each profile.

    Data and model
        dataset          what perplexity is measured on: generated (a made-up language), shakespeare, or folder
                         (calibration.txt and test.txt in `data_dir`, for a `model` of transformers)
        data_dir         that folder; empty for the others
        model            a name of common.training.long_context.RECIPES, or of a model of transformers
        retrain          train the model anew where its checkpoint is here

    Experiment
        seeds            each draws calibration texts, passages and prompts of its own
        arms             compared at every ratio, `ds` among them; see `experiment.ARMS`
        ratios           1/ratio of the tokens and 1/ratio of the channels are read; 16 among them
        tasks            of common.data.tasks; none for a model of transformers
        context          tokens of a passage, and of a task's sequence; the first half of a passage is its prompt
        passages         whose second halves perplexity is measured on
        prompts          of each task
        rows             sequences in one forward pass
        calibration      passages that channels are ranked by, in batches of `rows`
        dense_layers     layers that the arm ds_dense_first leaves dense
        page             of Quest
        first            tokens that StreamingLLM always reads

    Speed
        contexts         lengths of the cache, rising
        batches          sequences decoded at once, rising; the last one is the main one
        heads, head      heads and their size
        repeats          timings of each

    Machine
        device           cpu or cuda
        workers          evaluations at once, each with one thread; 0: one for each core
    """

    seeds: list[int]
    dataset: Literal["generated", "shakespeare", "folder"]
    data_dir: str
    model: str
    retrain: bool
    arms: list[ArmName]
    ratios: list[int]
    tasks: list[TaskName]
    context: int
    passages: int
    prompts: int
    rows: int
    calibration: int
    dense_layers: int
    page: int
    first: int
    contexts: list[int]
    batches: list[int]
    heads: int
    head: int
    repeats: int
    device: Literal["cpu", "cuda"]
    workers: int

    def __post_init__(self) -> None:
        if sorted(set(self.ratios)) != self.ratios or 16 not in self.ratios or min(self.ratios) < 1:
            raise ValueError(f"ratios: got {self.ratios}, expected rising whole numbers, 16 among them")
        if "ds" not in self.arms:
            raise ValueError(f"arms: got {self.arms}, expected ds among them")
        for name in ("contexts", "batches"):
            if sorted(set(getattr(self, name))) != getattr(self, name) or not getattr(self, name):
                raise ValueError(f"{name}: got {getattr(self, name)}, expected rising numbers")
        if self.dataset == "folder" and self.tasks:
            raise ValueError(
                f"tasks: got {self.tasks}, expected none with dataset folder; the tasks have no English here"
            )
