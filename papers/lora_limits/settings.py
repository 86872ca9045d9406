"""What can be set in the paper on LoRA's limits: sizes of the numerical study, and the model that is looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Params:
    """One run. `params.yaml` gives the values of each profile.

    Numerical study
        seeds            each draws problems, passages and the adapters' initial values of its own
        length           tokens of a problem
        head             channels of a problem; the number of features grows fast with them
        rank             of the adapters, here and in the model
        norms            Gamma, the largest entry of Q and K, rising
        degrees          of the polynomial, rising
        lengths          at which the rank that is needed is counted, rising; its matrices are lengths x lengths
        accuracy         relative error of the gradient that a degree has to reach

    Model
        dataset          generated (a made-up language), shakespeare, or folder (train.txt and test.txt in `data_dir`,
                         for a `model` of transformers)
        data_dir         that folder; empty for the others
        model            a name of common.training.long_context.RECIPES, or of a model of transformers
        retrain          train the model anew where its checkpoint is here
        adapted          ends of the names of the layers that get an adapter
        adapter_steps    steps of fine-tuning them, on the text
        adapter_rate     peak learning rate, AdamW with a cosine to zero
        context          tokens of a passage, in training and when norms are read
        passages         in a batch of the training, and that norms are read on

    Machine
        device           cpu or cuda, of the model
        workers          seeds at once, each with one thread; 0: one for each core
    """

    seeds: list[int]
    length: int
    head: int
    rank: int
    norms: list[float]
    degrees: list[int]
    lengths: list[int]
    accuracy: float
    dataset: Literal["generated", "shakespeare", "folder"]
    data_dir: str
    model: str
    retrain: bool
    adapted: list[str]
    adapter_steps: int
    adapter_rate: float
    context: int
    passages: int
    device: Literal["cpu", "cuda"]
    workers: int

    def __post_init__(self) -> None:
        for name in ("norms", "degrees", "lengths"):
            values = getattr(self, name)
            if len(values) < 2 or sorted(set(values)) != values or values[0] <= 0:
                raise ValueError(f"{name}: got {values}, expected two or more rising numbers above 0")
