"""What can be set in the Sparse Frontier paper: models, tasks, lengths, methods and how much they leave out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from papers.sparse_frontier.method import DECODE, PREFILL, Settings

TaskName = Literal["retrieve_one", "retrieve", "track", "common", "filter"]
MethodName = Literal["vertical_slash", "flex_prefill", "block", "snapkv", "ada_snapkv", "quest"]


@dataclass(frozen=True)
class Params:
    """One run. `params.yaml` gives the values of each profile.

    Data and models
        dataset          what the models read besides the tasks: generated (a made-up language), shakespeare, or words
                         (the tasks in English, for `models` of transformers)
        models           smaller first; names of common.training.long_context.RECIPES, or of models of transformers
        retrain          train the models anew where their checkpoints are here

    Experiment
        seeds            each draws prompts of its own; all models and methods of a seed see the same
        tasks            retrieve_one asks one question a prompt, all others eight
        lengths          three lengths of a sequence in tokens of the tasks, rising: short, middle, long
        prompts          of each task, length and seed
        rows             sequences in one forward pass
        methods          of method.PREFILL and method.DECODE
        sparsities       shares of the attention that are left out, rising
        coverages        of FlexPrefill, which has no set sparsity, falling
        blocks           sizes of blocks that are compared at the long length
        limit            relative error that counts as no loss
        decode_batch     sequences decoded at once, in the costs of decoding

    Settings of the methods, see `method.Settings`
        window, window_retrieval (of the tasks that retrieve), first, last_lines, last_keys, least, block, page, pool,
        floor

    Machine
        device           cpu or cuda
        workers          evaluations at once, each with one thread; 0: one for each core
    """

    seeds: list[int]
    dataset: Literal["generated", "shakespeare", "words"]
    models: list[str]
    retrain: bool
    tasks: list[TaskName]
    lengths: list[int]
    prompts: int
    rows: int
    methods: list[MethodName]
    sparsities: list[float]
    coverages: list[float]
    blocks: list[int]
    limit: float
    decode_batch: int
    window: int
    window_retrieval: int
    first: int
    last_lines: int
    last_keys: int
    least: int
    block: int
    page: int
    pool: int
    floor: float
    device: Literal["cpu", "cuda"]
    workers: int

    def __post_init__(self) -> None:
        if len(self.lengths) != 3 or sorted(set(self.lengths)) != self.lengths:
            raise ValueError(f"lengths: got {self.lengths}, expected three rising ones")
        if sorted(set(self.sparsities)) != self.sparsities or not all(0 < s < 1 for s in self.sparsities):
            raise ValueError(f"sparsities: got {self.sparsities}, expected rising shares between 0 and 1")
        if not {"vertical_slash", "block", "quest"} <= set(self.methods):
            raise ValueError(f"methods: got {self.methods}, expected vertical_slash, block and quest among them")
        if len(self.models) != 2:
            raise ValueError(f"models: got {self.models}, expected two, the smaller first")

    def of_methods(self, task: str) -> Settings:
        """The settings of the methods for a task."""
        window = self.window_retrieval if task.startswith("retrieve") else self.window
        names = ("first", "last_lines", "last_keys", "least", "block", "page", "pool", "floor")
        return Settings(window=window, **{name: getattr(self, name) for name in names})

    @property
    def prefill(self) -> list[str]:
        return [name for name in self.methods if name in PREFILL]

    @property
    def decode(self) -> list[str]:
        return [name for name in self.methods if name in DECODE]
