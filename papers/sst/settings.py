"""What can be set in the SST paper: text, model, rank, training, and which arms are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ArmName = Literal[
    "full", "lora", "relora", "sst", "true_gradient", "random_start", "chosen_sigma", "never_again", "uniform", "top"
]  # fmt: skip


@dataclass(frozen=True)
class Params:
    """One run. `params.yaml` gives the values of each profile.

    Text
        dataset          markov (generated), shakespeare, or folder (train.txt and test.txt in `data_dir`, for `model`)
        data_dir         that folder; empty for the others
        length           tokens of the generated text
        test_tokens      at most so many tokens of a text are scored; 0: all

    Model, trained from scratch
        model            an architecture of transformers, by name or folder, of which only the configuration and the
                         tokenizer are used; empty: a small GPT of the sizes below
        width, depth, heads, context   of the small GPT; context is the length of all windows
        rank             of all arms but `full`

    Experiment
        seeds            initial weights and order of windows; all arms of a seed share both
        arms             see `experiment.ARMS`; full, lora, relora and sst among them
        rates            peak learning rates that each arm tries on `tuning_seed`; the best by validation counts
        tuning_seed      no measured seed
        cuts             shares of the singular values that are cut off trained weights

    Training
        steps, batch     steps of Adam and windows in each
        warmup           share of the steps with a rising learning rate; then a cosine to zero
        interval         steps until SST chooses other vectors and ReLoRA* merges

    Machine
        device           cpu or cuda
        autocast         bfloat16 activations; weights stay float32
        workers          trainings at once, each with one thread; 0: one for each core; 1 shows every step
    """

    seeds: list[int]
    dataset: Literal["markov", "shakespeare", "folder"]
    data_dir: str
    length: int
    test_tokens: int
    model: str
    width: int
    depth: int
    heads: int
    context: int
    rank: int
    arms: list[ArmName]
    rates: list[float]
    tuning_seed: int
    cuts: list[float]
    steps: int
    batch: int
    warmup: float
    interval: int
    device: Literal["cpu", "cuda"]
    autocast: bool
    workers: int

    def __post_init__(self) -> None:
        if missing := {"full", "lora", "relora", "sst"} - set(self.arms):
            raise ValueError(f"arms: got {self.arms}, expected {', '.join(sorted(missing))} among them too")
        if self.tuning_seed in self.seeds:
            raise ValueError(f"tuning_seed: got {self.tuning_seed}, which is one of the seeds; expected another")
        if not self.rates:
            raise ValueError("rates: got none, expected at least one learning rate")
        if (self.dataset == "folder") != bool(self.model):
            raise ValueError(
                f"got dataset {self.dataset!r} and model {self.model!r}; expected an architecture of transformers "
                "together with dataset folder, whose text its tokenizer reads, or neither"
            )
