"""What can be set in the paper on RL's small subnetworks: the task, the base model, and how it is fine-tuned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ArmName = Literal["rl", "rl_kl", "rl_unclipped", "sft", "sft_near", "sft_far"]


@dataclass(frozen=True)
class Params:
    """One run. `params.yaml` gives the values of each profile.

    Task and base model
        dataset        sorting: digits to be sorted, generated; the only one there is
        seeds          each draws prompts, answers and initial noise of its own; the base model is the same for all
        digits         of a prompt
        width, depth, heads   of the base model, a RotaryLM
        base_steps     of its training, which ends before it can do the task
        base_rate      peak learning rate there, AdamW with a cosine to zero
        base_batch     sequences a step there
        retrain        train the base anew where its checkpoint is here

    Fine-tuning
        arms           compared with each other, `rl` and `sft` among them; see `experiment.ARMS`. These two are trained
                       in every precision, the others with a master copy
        rate           learning rate, constant, the same for all arms: AdamW without weight decay
        other_rates    at which `rl` is trained too, with a master copy
        steps          the most optimizer steps
        target         accuracy at which a training ends, so that arms are compared at equal accuracy
        check          steps between two looks at the accuracy
        prompts        a step
        answers        to each prompt, of RL
        updates        optimizer steps on the same answers, of RL
        clip           of the ratio of probabilities, of RL
        gradient_clip  largest norm of the gradient
        kl             weight of the divergence from the base, of `rl_kl`
        questions      that the accuracy is measured on

    What is measured
        tolerances     a weight counts as changed when it moved by more than this; rising, 0 and 1e-5 among them
        pairs          published models to compare, "before > after" by names of transformers; none below `paper`

    Machine
        device         cpu or cuda
        workers        trainings at once, each with one thread; 0: one for each core
    """

    dataset: Literal["sorting"]
    seeds: list[int]
    digits: int
    width: int
    depth: int
    heads: int
    base_steps: int
    base_rate: float
    base_batch: int
    retrain: bool
    arms: list[ArmName]
    rate: float
    other_rates: list[float]
    steps: int
    target: float
    check: int
    prompts: int
    answers: int
    updates: int
    clip: float
    gradient_clip: float
    kl: float
    questions: int
    tolerances: list[float]
    pairs: list[str]
    device: Literal["cpu", "cuda"]
    workers: int

    def __post_init__(self) -> None:
        if not {"rl", "sft"} <= set(self.arms):
            raise ValueError(f"arms: got {self.arms}, expected rl and sft among them")
        if sorted(set(self.tolerances)) != self.tolerances or not {0.0, 1e-5} <= set(self.tolerances):
            raise ValueError(f"tolerances: got {self.tolerances}, expected rising numbers, 0 and 1e-5 among them")
        if len(self.seeds) < 2:
            raise ValueError(f"seeds: got {self.seeds}, expected two or more; the overlap is between two of them")
        if any(pair.count(" > ") != 1 for pair in self.pairs):
            raise ValueError(f"pairs: got {self.pairs}, expected entries such as 'name/before > name/after'")
