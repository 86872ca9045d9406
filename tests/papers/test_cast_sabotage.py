"""Every claim of CAST can be turned by a one-line change of the method or the data.

What is exact is run as it is, and what a short training shows is trained: a small GPT on a generated language, led to
2:4 with and without the pull. Claims that compare long trainings go through the same scoring and judging with models of
a known quality: an arm is a trained model with some noise in its weights, and the sabotage takes away what names it.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import nn

from common import claims
from common import params as parameters
from common.data.text import Corpus
from common.models.gpt import GPT, perplexity
from common.paths import root
from common.testing import assert_sabotage_turns
from papers.cast import data, evaluation, experiment, method
from papers.cast.settings import Params

CLAIMS = {claim.id: claim for claim in claims.load(root() / "papers/cast/claims.yaml")}
SEEDS = (0, 1, 2)
FINALIZE = method.finalize_
# Noise in each arm's weights, as a share of their spread; an order that suits the claims' honest side, no measurement.
NOISE = {
    "pretrained": 0.0,
    "dense": 0.05,
    "cast": 0.1,
    "ast_slorb": 0.2,
    "no_kd": 0.3,
    "no_scaling": 0.3,
    "no_decay": 0.4,
    "uniform": 0.3,
    "gradient_moment": 0.3,
    "srste": 0.3,
    "ast": 0.3,
    "ast_released": 0.5,
    "gmp_kd": 0.35,
    "gmp": 0.4,
    "sparsegpt": 0.5,
    "wanda": 0.6,
    "magnitude": 0.8,
}


def everywhere(metric: str, **variants: float) -> dict:
    return {metric: {name: {"all": value} for name, value in variants.items()}}


def seeded(values: list[float]) -> dict[str, float]:
    return {str(seed): value for seed, value in zip(SEEDS, values, strict=True)}


# ------------------------------------------------------------------------------------------------- run as they are


class Polluted(method.AdamS):
    """SR-STE's way: the pull enters the running mean."""

    def direction(self, weight, mean, kept, step):
        return mean.copy_(super().direction(weight, mean, kept, step))


def pollution(optimizer: type[method.AdamS]) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method, "AdamS", optimizer)
        return {"pollution": {"": {"all": evaluation.pollution()}}}


def folding(patched: Callable | None = None) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        if patched:
            patch.setattr(method, "finalize_", patched)
        change, revived = evaluation.fold_error()
    return {"fold_change": {"": {"all": change}}, "revived": {"": {"all": revived}}}


def without_the_factors(layers: dict, n: int, m: int) -> dict:
    """Prunes, and forgets to fold."""
    masks = {name: method.mask(method.raw(layer), n, m) for name, layer in layers.items()}
    for layer in layers.values():
        nn.utils.parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    return masks


def folded_by_adding(layers: dict, n: int, m: int) -> dict:
    """Adds the factors instead of multiplying."""
    masks = FINALIZE(layers, n, m)
    for layer in layers.values():
        layer.weight.data += 0.1
    return masks


def floors(cosine: str) -> dict:
    """Where pruned weights end; the sabotage swaps the schedules."""
    other = {"cosine": "constant", "constant": "cosine"}[cosine]
    found = {}
    for name, share in (("cosine", cosine), ("constant", other)):
        path, rate = evaluation.descent(share, steps=200)
        found[name] = path[-1] / rate
    return everywhere("floor", **found)


def steps_of(kind: str, count: int) -> dict:
    found = {
        name: evaluation.step_length(optimizer, steps=count) for name, optimizer in (("adam", "adam"), ("adams", kind))
    }
    return everywhere("first_step" if count == 1 else "noise_step", **found)


def lost(kind: str, dtype: torch.dtype) -> dict:
    found = {name: evaluation.swallowed(dtype, amount) for name, amount in evaluation.LLAMA_STEPS.items()}
    return everywhere("swallowed", **{f"{kind}/{name}": share for name, share in found.items()})


def full_groups(name: str, ties: method.Ties) -> dict:
    weight = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    return everywhere("overfull", **{name: evaluation.overfull([weight], 2, 4, ties)})


def grown(name: str, *, released: bool) -> dict:
    return everywhere("growth", **{name: evaluation.growth(released=released)})


# ------------------------------------------------------------------------------------------------- small trainings


def tiny() -> Params:
    small = {"width": 16, "depth": 1, "context": 8, "pretrain_steps": 250, "pretrain_rate": 1e-2, "batch": 8}
    small |= {"steps": 80, "warmup": 8, "calibration": 8}
    return dataclasses.replace(parameters.load(Params, "cast", "smoke"), **small)


def counting(params: Params) -> Corpus:
    """A language that is learned in seconds: two counters in turn, 0 5 1 6 2 7 ..., one in ten jumps anywhere.

    What follows depends on the token before the last one, which the embedding of the last one does not know: without
    its blocks a model can only guess.
    """
    draw = torch.Generator().manual_seed(0)
    ordinary = torch.rand(1000, 2, generator=draw) < 0.95
    tokens = torch.where(ordinary, 1, torch.randint(10, (1000, 2), generator=draw)).cumsum(0).flatten() % 10
    return Corpus("counting", tokens[:1400], tokens[1400:1600], tokens[1600:], tuple("0123456789"))


def run(function: Callable, *arguments) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "corpus", counting)
        return function(tiny(), *arguments)


@cache
def start(seed: int) -> dict:
    return run(experiment.pretrain, seed)


@cache
def led(arm: str) -> list[dict]:
    return [run(experiment.make, arm, "2:4", 1.0, start(seed), seed) for seed in SEEDS]


def what_is_left(arm: str) -> dict:
    """What is left to cut after a short training of `arm`, and what cutting it changes."""
    found = led(arm)
    return {
        "remaining": {"cast/2:4": seeded([run["remaining"][-1][1] for run in found])},
        "pruning_change": {"cast/2:4": seeded([run["perplexity"] / run["before"] - 1 for run in found])},
    }


# ------------------------------------------------------------------------------------------------- at a known quality


@cache
def model() -> GPT:
    network = experiment.build(tiny(), 10, start(0)["state"])
    assert isinstance(network, GPT)
    return network


def noisy(noise: float, seed: int) -> GPT:
    """The trained model with noise in its weights, a little more of the same with every seed."""
    draw, network = torch.Generator().manual_seed(0), copy.deepcopy(model())
    for weight in (parameter for parameter in network.parameters() if parameter.ndim == 2):
        weight.data += noise * (1 + 0.01 * seed) * weight.std() * torch.randn(weight.shape, generator=draw)
    return network


def score(network: GPT) -> float:
    return perplexity(network, counting(tiny()).test, context=tiny().context)


@cache
def quality(noise: float) -> list[float]:
    return [score(noisy(noise, seed)) for seed in SEEDS]


def pruned_at_the_end(*, emptied: bool) -> dict:
    """What exact pruning changes, of a model as it is and of one whose smaller half is at zero already."""
    found = []
    for seed in SEEDS:
        network = noisy(0.1, seed)
        layers = method.in_blocks(network)
        if emptied:
            method.finalize_(layers, 2, 4)
        before = score(network)
        method.finalize_(layers, 2, 4)
        found.append(score(network) / before - 1)
    return {"pruning_change": {"no_decay/2:4": seeded(found)}}


def arms(pattern: str = "2:4", metric: str = "perplexity", **sabotaged: float) -> dict:
    values = {name: seeded(quality(noise)) for name, noise in (NOISE | sabotaged).items()}
    return {
        metric: {f"{name}/{pattern}": row for name, row in values.items()},
        "pretrained_perplexity": {"": values["pretrained"]},
    }


def two_patterns(easier: float) -> dict:
    rows = {"cast/1:4": seeded(quality(0.3)), "cast/2:8": seeded(quality(easier))}
    return {"perplexity": rows}


def tokens(exponents: tuple[float, float]) -> dict:
    """Gaps that fall by these exponents from each budget to its double, with a little of the seed in them."""
    gaps = {0: [], 1: [], 2: []}
    laws = []
    for seed in SEEDS:
        row = [0.4 * (1 + 0.01 * seed)]
        for exponent in exponents:
            row.append(row[-1] * 2**-exponent * (1 + 0.002 * seed))
        for place, gap in enumerate(row):
            gaps[place].append(gap)
        laws.append(evaluation.power_law(row))
    rows = {name: seeded(gaps[place]) for place, name in enumerate(("0.25", "0.5", "1"))}
    return {"gap": rows, "power_law": {"": seeded(laws)}}


def published(metric: str, wanted: float, *, tokens_scored: float = 1.0) -> dict:
    """Seeds around the published value, as far apart as those of the noisy models.

    The sabotage divides by more tokens than were scored, which is what a window's unscored first token amounts to.
    """
    spread = [value / sum(quality(0.02)) * len(SEEDS) for value in quality(0.02)]
    row = seeded([math.exp(math.log(wanted * (1 + 0.01 * (part - 1))) * tokens_scored) for part in spread])
    if metric == "pretrained_perplexity":
        return {metric: {"": row}}
    return {"perplexity": {metric: row}, "pretrained_perplexity": {"": seeded([29.95] * 3)}}


def headline(above: float) -> dict:
    row = seeded([5.12 + above + 0.001 * seed for seed in SEEDS])
    return {"perplexity": {"cast/2:4": row}, "pretrained_perplexity": {"": seeded([5.12] * 3)}}


Pair = Callable[[], tuple[dict, dict]]


def against(arm: str, other: str, pattern: str = "2:4", metric: str = "perplexity") -> Pair:
    """`arm` is claimed to be better than `other`; the sabotage makes it what it would be without its own part."""
    return lambda: (arms(pattern, metric), arms(pattern, metric, **{arm: NOISE[other] + 0.1}))


def both(name: str, pair: Pair) -> dict[str, Pair]:
    """A claim at full scale and its stand-in."""
    return {name: pair, f"{name}-small": pair}


def gpt2(name: str, metric: str, wanted: float) -> dict[str, Pair]:
    return {f"gpt2-{name}": lambda: (published(metric, wanted), published(metric, wanted, tokens_scored=1.02))}


SABOTAGE: dict[str, Pair] = {
    # exact
    "the-pull-stays-out-of-the-mean": lambda: (pollution(method.AdamS), pollution(Polluted)),
    "folding-changes-nothing": lambda: (folding(), folding(without_the_factors)),
    "folding-revives-no-zero": lambda: (folding(), folding(folded_by_adding)),
    "the-last-learning-rate-is-the-floor": lambda: (floors("cosine"), floors("constant")),
    "a-falling-rate-reaches-zero": lambda: (floors("cosine"), floors("constant")),
    "first-step-is-ten-rates-long": lambda: (steps_of("adams", 1), steps_of("adam", 1)),
    "longer-steps-under-noise": lambda: (steps_of("adams", 200), steps_of("adam", 200)),
    "bfloat16-swallows-lambda": lambda: (lost("bfloat16", torch.bfloat16), lost("bfloat16", torch.float32)),
    "bfloat16-swallows-whole-steps": lambda: (lost("bfloat16", torch.bfloat16), lost("bfloat16", torch.float32)),
    "float32-loses-nothing": lambda: (lost("float32", torch.float32), lost("float32", torch.bfloat16)),
    "the-printed-threshold-is-not-n-of-m": lambda: (
        full_groups("threshold", "threshold"),
        full_groups("threshold", "exact"),
    ),
    "counting-is-n-of-m": lambda: (full_groups("exact", "exact"), full_groups("exact", "threshold")),
    "ast-as-described-shrinks": lambda: (grown("described", released=False), grown("described", released=True)),
    "ast-as-released-grows": lambda: (grown("released", released=True), grown("released", released=False)),
    # small trainings
    **both("pruned-weights-vanish", lambda: (what_is_left("cast"), what_is_left("no_decay"))),
    **both("the-final-pruning-is-free", lambda: (what_is_left("cast"), what_is_left("no_decay"))),
    "without-the-pull-it-is-not-free": lambda: (pruned_at_the_end(emptied=False), pruned_at_the_end(emptied=True)),
    # at a known quality
    "the-sign-matters": against("ast", "ast_released"),
    **both("cast-beats-ast", against("cast", "ast")),
    **both("ast-beats-gmp", against("ast", "gmp")),
    **both("gmp-beats-one-shot", against("gmp", "sparsegpt")),
    **both("sparsegpt-beats-wanda", against("sparsegpt", "wanda")),
    **both("slorb-helps", against("ast_slorb", "ast")),
    "cast-beats-gmp-with-the-same-loss": against("cast", "gmp_kd"),
    "cast-costs-little": lambda: (arms(), arms(cast=0.4)),
    **both("distillation-helps", against("cast", "no_kd")),
    **both("scaling-helps", against("cast", "no_scaling")),
    **both("decay-helps", against("cast", "no_decay")),
    **both("adams-beats-srste", against("cast", "srste")),
    "selective-beats-uniform": against("cast", "uniform"),
    "modified-moment-helps": against("cast", "gradient_moment"),
    **both("more-tokens-help", lambda: (tokens((0.5, 0.5)), tokens((0.5, -0.1)))),
    **both("power-law", lambda: (tokens((0.5, 0.5)), tokens((0.2, 1.0)))),
    "cast-beats-ast-at-1of4": against("cast", "ast", "1:4"),
    "cast-beats-ast-at-2of8": against("cast", "ast", "2:8"),
    "freedom-helps": lambda: (two_patterns(0.1), two_patterns(0.5)),
    "cast-beats-ast-elsewhere": against("cast", "ast", metric="second_perplexity"),
    # the published numbers
    "llama2-7b-headline": lambda: (headline(5.58 - 5.12), headline(6.14 - 5.12)),
    "llama2-7b-rerun": lambda: (headline(6.14 - 5.12), headline(5.58 - 5.12)),
    "llama2-7b-gap": lambda: (headline(0.09), headline(0.46)),
    **gpt2("dense", "pretrained_perplexity", 29.95),
    **gpt2("sparsegpt", "sparsegpt/2:4", 50.09),
    **gpt2("wanda", "wanda/2:4", 115.64),
    **gpt2("gmp", "gmp/2:4", 33.48),
    **gpt2("ast", "ast/2:4", 32.23),
    **gpt2("ast-slorb", "ast_slorb/2:4", 31.13),
}


def test_every_claim_has_a_sabotage():
    assert set(SABOTAGE) == set(CLAIMS)


@pytest.mark.parametrize("name", SABOTAGE)
def test_sabotage_turns_the_verdict(name):
    assert_sabotage_turns(CLAIMS[name], *SABOTAGE[name]())
