"""What can be set in the CAST paper: text, model, training, patterns, and which arms are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Params:
    """One run. `params.yaml` gives the values of each profile.

    Text
        dataset          markov (generated), shakespeare, or folder (train.txt and test.txt in `data_dir`, for `model`)
        data_dir         that folder; empty for the others
        length           tokens of the generated text
        second           whether to score on WikiText-2 too, which nothing was trained on (shakespeare only)
        test_tokens      at most so many tokens of a test text are scored; 0: all

    Model
        model            a causal language model of transformers, by name or folder; empty: a small GPT trained here
        width, depth, heads, context   of the small GPT; context is the length of all windows
        pretrain_steps, pretrain_rate  its training before anything is pruned, Adam with a cosine to zero

    Experiment
        seeds            a model and its order of windows each; all arms of a seed share both
        arms             compared at main_pattern; see `experiment.ARMS`
        patterns         n:m of the comparison; the first is the main one
        pattern_arms     compared at the other patterns
        budgets          shares of `steps`, rising to 1, at which `cast` and `dense` are trained for the law in tokens
        calibration      windows that Wanda and SparseGPT look at

    Training after pretraining
        steps, batch     steps and windows in each
        learning_rate    peak; 0: such that AdamS can move a pruned weight by `headroom` times the mean magnitude
        headroom         see learning_rate
        adam_factor, ast_factor   learning rate of the arms by plain Adam (dense, GMP) and by AST, over CAST's
        warmup           steps of linear warm-up, of a full training
        beta1, beta2     of Adam and AdamS (AST has its own)
        clip             largest norm of the gradient
        decay            lambda of AdamS; 0: the root mean square of the gradient's entries at the start
        ast_decay        lambda of AST's pull, times the weight; 0: such that it equals `decay` at the mean magnitude
        refresh          steps between two searches of the masks
        groups           of weight scaling, a row
        eta              share of the distillation loss
        gmp_end          share of the steps after which gradual pruning has reached n:m

    Machine
        device           cpu or cuda
        autocast         bfloat16 activations; weights stay float32
        workers          trainings at once, each with one thread; 0: one for each core; 1 shows every step
    """

    seeds: list[int]
    dataset: Literal["markov", "shakespeare", "folder"]
    data_dir: str
    length: int
    second: bool
    test_tokens: int
    model: str
    width: int
    depth: int
    heads: int
    context: int
    pretrain_steps: int
    pretrain_rate: float
    arms: list[str]
    patterns: list[str]
    pattern_arms: list[str]
    budgets: list[float]
    calibration: int
    steps: int
    batch: int
    learning_rate: float
    headroom: float
    adam_factor: float
    ast_factor: float
    warmup: int
    beta1: float
    beta2: float
    clip: float
    decay: float
    ast_decay: float
    refresh: int
    groups: int
    eta: float
    gmp_end: float
    device: Literal["cpu", "cuda"]
    autocast: bool
    workers: int

    def __post_init__(self) -> None:
        for pattern in self.patterns:
            n, _, m = pattern.partition(":")
            if not (n.isdigit() and m.isdigit() and 1 <= int(n) < int(m)):
                raise ValueError(f"patterns: got {pattern!r}, expected n:m with 1 <= n < m, such as 2:4")
        if sorted(set(self.budgets)) != self.budgets or self.budgets[-1:] != [1.0] or self.budgets[0] <= 0:
            raise ValueError(f"budgets: got {self.budgets}, expected rising shares that end in 1")
        if (self.dataset == "folder") != bool(self.model):
            raise ValueError(
                f"got dataset {self.dataset!r} and model {self.model!r}; expected a model of transformers together "
                "with dataset folder, whose text it reads by its own tokenizer, or neither"
            )

    @property
    def main_pattern(self) -> str:
        """The pattern at which all arms are compared."""
        return self.patterns[0]
