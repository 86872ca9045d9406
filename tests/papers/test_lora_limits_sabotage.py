"""Every claim on LoRA's limits can be turned by a one-line change of the method or the data.

What is numerical is run as it is, at small sizes. Claims about a trained model go through the same judging with known
values that suit their honest side and are no measurement.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from common import claims
from common import params as parameters
from common.paths import root
from common.testing import assert_sabotage_turns
from papers.lora_limits import data, evaluation, experiment, method
from papers.lora_limits.settings import Params

CLAIMS = {claim.id: claim for claim in claims.load(root() / "papers/lora_limits/claims.yaml")}
PARAMS = dataclasses.replace(
    parameters.load(Params, "lora_limits", "laptop"), degrees=[1, 2, 4, 6, 8], lengths=[64, 128, 256]
)
SEEDS = (0, 1, 2)

Pair = Callable[[], tuple[dict, dict]]


def told(rows: Callable[[int], Iterable[tuple[str, str, float]]]) -> dict:
    found: dict = {}
    for seed in SEEDS:
        for name, variant, value in rows(seed):
            found.setdefault(name, {}).setdefault(variant, {})[str(seed)] = value
    return found


def patched(where: Any, name: str, other: Any, measure: Callable[[], dict]) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, name, other)
        return measure()


# ---------------------------------------------------------------------------------------------------- run as they are


def checks() -> dict:
    return told(lambda seed: [("check", name, value) for name, value in experiment.checks(PARAMS, seed).items()])


def growth() -> dict:
    return {"growth": {name: {"all": value} for name, value in experiment.growth(PARAMS).items()}}


def errors(params: Params = PARAMS) -> dict:
    return told(lambda seed: evaluation.of_norms(params, experiment.errors(params, seed)))


def ranks() -> dict:
    return told(lambda seed: evaluation.of_ranks(PARAMS, experiment.ranks(PARAMS, seed)))


def without_row_sums(query, key, value, p, upstream, scale):
    """Forgets that the weights of a row add up to 1."""
    change = p * (upstream @ value.mT)
    return scale * change @ key, scale * change.mT @ query, p.mT @ upstream


def one_degree_less(x, degree, *, features=method.features):
    return features(x, degree - 1)


def as_the_others(query, key, value, *, y, degree):
    """The chained gradients by the polynomial of an L x L matrix."""
    return method.polynomial(degree)(query, key, value, y=y)


def never_formed(query, key, value, *, y):
    """The exact gradient by chains."""
    return method.chained(query, key, value, y=y, degree=2)


def same_degree(query, key, value, *, y, degree, chained=method.chained):
    """Whatever degree is asked for, 2 is what one gets."""
    return chained(query, key, value, y=y, degree=2)


def one_norm(seed, *, problem=data.problem, **sizes):
    """All problems have the same norm."""
    return problem(seed, **(sizes | {"norm": 1.0}))


def large_norms(seed, *, problem=data.problem, **sizes):
    return problem(seed, **(sizes | {"norm": 3 * sizes["norm"]}))


def regimes(**changes: str) -> dict[str, Callable[[int], float]]:
    """Some regimes have the norms of others."""
    return data.REGIMES | {name: data.REGIMES[other] for name, other in changes.items()}


def swapped(**changes: str) -> Pair:
    return lambda: (ranks(), patched(data, "REGIMES", regimes(**changes), ranks))


# -------------------------------------------------------------------------------------------------- with known values


def exponents(below: float, constant: float) -> dict:
    """Ranks that grow by known exponents, a little else with every seed."""

    def rows(seed: int) -> Iterable[tuple[str, str, float]]:
        slopes = {"constant": constant, "below": below, "at": 0.98, "above": 0.99}
        counted: Any = {
            (regime, tolerance, length): 4 * length ** (slope + 0.01 * seed)
            for regime, slope in slopes.items()
            for tolerance in experiment.TOLERANCES
            for length in PARAMS.lengths
        }
        return evaluation.of_ranks(PARAMS, counted)

    return told(rows)


def heads(norm: float = 12.0, adapter: float = 0.5, rank: float = 0.75, error: float = 0.3) -> dict:
    """Heads as `experiment.heads` tells them, of known values."""

    def rows(seed: int) -> Iterable[tuple[str, str, float]]:
        more = 1 + 0.01 * seed
        found = {
            "adapter": {"frozen": [5.0, 7.0], "adapter": [adapter * more, adapter / 2]},
            "norm": [norm * more, norm],
            "score": [norm, norm],
            "rank": [rank * more, rank],
            "error": [{degree: error * more / degree for degree in experiment.REAL_DEGREES}],
        }
        return evaluation.of_heads(PARAMS, found)

    return told(rows)


def other_heads(**changes: float) -> Pair:
    return lambda: (heads(), heads(**changes))


def both(name: str, pair: Pair) -> dict[str, Pair]:
    """A claim at full scale and its stand-in."""
    return {name: pair, f"{name}-small": pair}


SABOTAGE: dict[str, Pair] = {
    "the-gradient-is-the-gradient": lambda: (
        checks(),
        patched(method, "attention_gradients", without_row_sums, checks),
    ),
    "chained-products-are-the-polynomial": lambda: (checks(), patched(method, "features", one_degree_less, checks)),
    "chained-products-are-linear-in-the-length": lambda: (growth(), patched(method, "chained", as_the_others, growth)),
    "the-exact-gradient-is-quadratic": lambda: (growth(), patched(method, "dense", never_formed, growth)),
    "error-falls-with-the-degree": lambda: (errors(), patched(method, "chained", same_degree, errors)),
    "degree-grows-with-the-norm": lambda: (errors(), patched(data, "problem", one_norm, errors)),
    "small-norms-need-small-degrees": lambda: (errors(), patched(data, "problem", large_norms, errors)),
    "below-the-threshold-the-rank-grows-slower": swapped(below="above"),
    "above-the-threshold-the-rank-grows-as-fast": swapped(above="constant"),
    "the-transition-is-ordered": swapped(at="below"),
    "almost-linear-at-these-lengths": lambda: (exponents(0.9, 0.6), exponents(0.3, 0.6)),
    "constant-norms-are-almost-linear-here": lambda: (exponents(0.9, 0.6), exponents(0.9, 0.3)),
    **both("real-norms-are-below-the-threshold", other_heads(norm=1.0)),
    "adapters-add-little-to-the-norms": other_heads(adapter=7.0),
    "real-heads-have-a-low-rank": other_heads(rank=0.2),
    "degree-four-serves-real-gradients": other_heads(error=1e-4),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_sabotage_turns_the_verdict(name: str) -> None:
    assert_sabotage_turns(CLAIMS[name], *SABOTAGE[name]())
