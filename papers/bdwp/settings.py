"""What can be set; `params.yaml` gives the values of each profile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Params:
    """One run.

    seeds            one measurement each, for every arm
    dataset          sparse_signal: generated
    length, nonzeros samples of the signal, and how many of them differ from zero
    noise            standard deviation of the noise; the signal's entries are 0 and 1
    """

    seeds: list[int]
    dataset: Literal["sparse_signal"]
    length: int
    nonzeros: int
    noise: float
