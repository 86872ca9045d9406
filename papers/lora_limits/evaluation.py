"""From what a seed measured to the numbers that claims read: (metric, variant, value)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from papers.lora_limits import data, experiment
from papers.lora_limits.method import threshold
from papers.lora_limits.settings import Params

__all__ = ["of_heads", "of_norms", "of_ranks"]

Rows = Iterator[tuple[str, str, float]]


def of_norms(params: Params, found: Mapping[tuple[float, int], float]) -> Rows:
    """`error` by norm and degree; `degree`, the least that is accurate enough, by norm."""
    for (norm, degree), value in found.items():
        yield "error", f"{norm:g}/{degree}", value
    for norm in params.norms:
        yield "degree", f"{norm:g}", experiment.degree_needed(found, norm, params.accuracy)


def of_ranks(params: Params, found: Mapping[tuple[str, str, int], int]) -> Rows:
    """`rank_share` of the shortest and the longest length, and the `exponent` of the growth between them."""
    for regime in data.REGIMES:
        for tolerance in experiment.TOLERANCES:
            values = [found[regime, tolerance, length] for length in params.lengths]
            shares = [value / length for value, length in zip(values, params.lengths, strict=True)]
            yield "rank_share", f"{regime}/{tolerance}/shortest", shares[0]
            yield "rank_share", f"{regime}/{tolerance}/longest", shares[-1]
            yield "exponent", f"{regime}/{tolerance}", experiment.exponent(params.lengths, values)


def of_heads(params: Params, found: Mapping[str, Any]) -> Rows:
    """A trained model's norms over the threshold of its length, the rank its heads need, and the gradients' error."""
    bound = threshold(params.context)
    norms: Sequence[float] = found["norm"]
    yield "norm_over_threshold", "smallest", min(norms) / bound
    yield "norm_over_threshold", "median", float(np.median(norms)) / bound
    yield "norm_over_threshold", "largest", max(norms) / bound
    yield "score_over_bound", "median", float(np.median(found["score"])) / bound**2
    yield "adapter_share", "", max(found["adapter"]["adapter"]) / max(found["adapter"]["frozen"])
    yield "head_rank", "", float(np.mean(found["rank"]))
    for degree in experiment.REAL_DEGREES:
        yield "head_error", str(degree), float(np.median([error[degree] for error in found["error"]]))
