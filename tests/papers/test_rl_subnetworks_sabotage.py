"""Every claim on RL's subnetworks can be turned by a one-line change of the method or the data.

What is exact is run as it is. Counts of changed weights go through the true counting, on updates that are made up to
suit the claim's honest side; they are no measurement. So do accuracies and published pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from common import claims, seeds
from common import params as parameters
from common.paths import root
from common.testing import assert_sabotage_turns
from papers.rl_subnetworks import evaluation, experiment, method
from papers.rl_subnetworks.experiment import Run
from papers.rl_subnetworks.settings import Params

CLAIMS = {claim.id: claim for claim in claims.load(root() / "papers/rl_subnetworks/claims.yaml")}
PARAMS = parameters.load(Params, "rl_subnetworks", "laptop")
SEEDS = (0, 1, 2)
LABELS = [arm.label(PARAMS) for arm in experiment.arms(PARAMS)]
# Made-up shares of weights that each training moves: values that suit the claims, no measurement.
MOVES = dict.fromkeys(LABELS, 0.2) | {"rl/float32": 1.0, "sft/float32": 1.0, "rl/master": 0.9, "sft/master": 0.95}
MOVES |= {"rl_kl/master": 0.9, "rl_unclipped/master": 0.9, "sft_near/master": 0.2, "sft_far/master": 0.6}
MOVES |= {"sft/bfloat16": 0.9, "rl/master/3e-05": 0.85, "rl/master/0.0003": 0.95}

Rows = Iterable[tuple[str, str, float]]
Pair = Callable[[], tuple[dict, dict]]


def told(rows: Callable[[int], Rows]) -> dict:
    found: dict = {}
    for seed in SEEDS:
        for name, variant, value in rows(seed):
            found.setdefault(name, {}).setdefault(variant, {})[str(seed)] = float(value)
    return found


# ---------------------------------------------------------------------------------------------------- run as they are


def checks(name: str = "", other: Any = None) -> dict:
    """With a part of the method replaced, where one is named."""
    with pytest.MonkeyPatch.context() as patch:
        if name:
            patch.setattr(method, name, other)
        return told(evaluation.checks)


def as_it_is(x: Tensor) -> Tensor:
    """Does not round."""
    return x


def coarser(x: Tensor) -> Tensor:
    """To multiples of 1/8."""
    return (8 * x).round() / 8


def of_all(new: Tensor, old: Tensor, gain: Tensor, *, loss: Callable = method.policy_loss, **options: Any) -> Tensor:
    """Every answer gets the same advantage."""
    return loss(new, old, torch.ones_like(gain), **options)


# ----------------------------------------------------------------------------------------------------- made-up updates


def before() -> dict[str, Tensor]:
    """Weights of a model of four matrices."""
    draw = seeds.generator(0, "sabotage")
    return {f"{name}.weight": method.rounded(0.1 * torch.randn(32, 32, generator=draw)) for name in "abcd"}


def moved(share: float, seed: int, *, smallest: bool = False, left_out: bool = False, low_rank: bool = False) -> dict:
    """A share of the weights of every matrix, moved by far more than rounding could hide."""
    state = before()
    for place, (name, weight) in enumerate(state.items()):
        draw = seeds.generator(seed, "moved", name)
        score = weight.abs() if smallest else torch.rand(weight.shape, generator=draw)
        chosen = score <= score.flatten().kthvalue(max(1, round(share * weight.numel()))).values
        step = 0.01 * torch.randn(weight.shape, generator=draw)
        step = step + (0.002 + 0.05 * weight.abs()) * step.sign()
        if low_rank:
            step, chosen = torch.full_like(step, 0.02), torch.ones_like(chosen)
        if not (left_out and place == 0):
            state[name] = torch.where(chosen, weight + step, weight)
    return state


def everywhere(share: float, seed: int) -> dict[str, Tensor]:
    """All weights move, but for this share by too little for bfloat16."""
    state = moved(share, seed)
    return {
        name: torch.where(state[name] == weight, weight + 2e-5 * weight.sign(), state[name])
        for name, weight in before().items()
    }


def run(state: Mapping[str, Tensor], accuracy: float = 0.7, *, reached: bool = True) -> Run:
    return Run(dict(state), 100, {0: 0.3, 100: accuracy}, reached, 1.0)


def counts(
    moves: Mapping[str, float] | None = None,
    accuracy: Mapping[str, float] | None = None,
    failed: str = "",
    **kind: bool,
) -> dict:
    """All trainings as `evaluation.of_run` tells them; `kind` of the main one's update."""
    shares = MOVES | (moves or {})

    def rows(seed: int) -> Rows:
        for label in LABELS:
            share = shares[label] - 0.01 * seed
            state = moved(share, seed, **(kind if label == evaluation.MAIN else {}))
            if shares[label] == 1:
                state = everywhere(MOVES["rl/master"] - 0.01 * seed, seed)
            ends = (accuracy or {}).get(label, 0.7) + 0.001 * seed
            yield from evaluation.of_run(PARAMS, before(), label, run(state, ends, reached=label != failed))

    return told(rows)


honest = cache(counts)


def changed(**sabotage: Any) -> Pair:
    return lambda: (honest(), counts(**sabotage))


def moves(**labels: float) -> Pair:
    """Other shares of moved weights; `rl__bfloat16` is rl/bfloat16."""
    return changed(moves={name.replace("__", "/"): share for name, share in labels.items()})


def carried(rl: float, sft: float = 0.5) -> dict:
    """Float32 updates that these shares of the weights carry."""

    def rows(seed: int) -> Rows:
        for label, share in (("rl/float32", rl), ("sft/float32", sft)):
            yield from evaluation.of_run(PARAMS, before(), label, run(moved(share - 0.01 * seed, seed)))

    return told(rows)


def overlaps(kind: str) -> dict:
    """Which weights two seeds move: the `smallest`, a `common` set beside their own, or their `own` alone."""

    def state(seed: int) -> dict[str, Tensor]:
        if kind == "smallest":
            return moved(0.3 - 0.02 * seed, seed, smallest=True)
        first, second = moved(0.2, 7 if kind == "common" else seed + 10), moved(0.1, seed)
        return {name: torch.where(first[name] != w, first[name], second[name]) for name, w in before().items()}

    def runs(seed: int) -> dict[str, Run]:
        return {f"{name}/{kept}": run(state(seed)) for name in ("rl", "sft") for kept in ("bfloat16", "master")}

    return told(lambda seed: evaluation.of_overlaps(before(), runs(seed), runs(seed + 1)))


def subnetworks(*, sub: float = 0.7, random: float = 0.5, apart: float = 0.0, outside: float = 0.0) -> dict:
    """Accuracies, and how far from the full run's the subnetwork's weights end, and all others from the base's."""

    def rows(seed: int) -> Rows:
        full = run(moved(0.3, seed), 0.7 + 0.001 * seed)
        mask = method.changed(before(), full.state)
        ends = {name: torch.where(mask[name], w + apart, w + outside) for name, w in full.state.items()}
        pair = {"sub": run(ends, sub + 0.001 * seed), "random": run(moved(0.3, seed + 50), random)}
        yield from evaluation.of_subnetworks(before(), full, pair)
        yield from evaluation.of_run(PARAMS, before(), evaluation.MAIN, full)

    return told(rows)


def alone(**sabotage: float) -> Pair:
    return lambda: (subnetworks(), subnetworks(**sabotage))


def published(math: float = 0.685, dpo: float = 0.9, sft: float = 0.1) -> dict:
    found = {"deepseek-math-7b-rl": math, "Llama-3.1-Tulu-3-8B-DPO": dpo, "Llama-3.1-Tulu-3-8B-SFT": sft}
    return {"pair_sparsity": {name: {"all": value} for name, value in found.items()}}


SABOTAGE: dict[str, Pair] = {
    "grpo-begins-as-reinforce": lambda: (checks(), checks("policy_loss", of_all)),
    "bfloat16-loses-small-steps": lambda: (checks(), checks("rounded", as_it_is)),
    "a-master-copy-keeps-them": lambda: (checks(), checks("rounded", coarser)),
    "a-frozen-weight-stays": alone(outside=0.001),
    "rl-changes-few-weights": lambda: (published(), published(math=0.4)),
    "rl-changes-few-weights-small": moves(rl__bfloat16=0.6),
    "preference-learning-changes-few-weights": lambda: (published(), published(dpo=0.4)),
    "sft-changes-most-weights": lambda: (published(), published(sft=0.4)),
    "sft-changes-most-weights-small": moves(sft__bfloat16=0.4),
    "rl-is-sparser-than-sft": moves(rl__bfloat16=0.9, sft__bfloat16=0.2),
    "rl-is-sparser-with-a-master-copy": moves(rl__master=0.95, sft__master=0.9),
    "the-update-has-full-rank": changed(low_rank=True),
    "no-matrix-is-left-out": changed(left_out=True),
    "matrices-are-similarly-sparse": changed(left_out=True, moves={"rl/bfloat16": 0.9}),
    "seeds-overlap-more-than-by-chance": lambda: (overlaps("common"), overlaps("own")),
    "the-subnetwork-recovers-the-accuracy": alone(sub=0.5),
    "the-subnetwork-recovers-the-weights": alone(apart=0.001),
    "near-policy-data-make-it": moves(sft_near__master=0.6, sft_far__master=0.2),
    "kl-has-little-impact": moves(rl_kl__master=0.4),
    "clipping-has-little-impact": moves(rl_unclipped__master=0.4),
    "in-float32-nearly-all-weights-move": moves(rl__float32=0.5),
    "float32-at-their-tolerance": moves(rl__float32=0.5),
    "at-equal-accuracy": changed(accuracy={"rl/bfloat16": 0.5}),
    "all-reach-the-accuracy": changed(failed="sft/master"),
    "rounding-the-float32-model-makes-it-sparse": moves(rl__float32=0.5),
    "lost-steps-make-most-of-it": moves(rl__bfloat16=0.9),
    "the-learning-rate-decides": changed(moves={"rl/master/0.0003": 0.5}),
    "small-weights-are-the-subnetwork": lambda: (overlaps("common"), overlaps("smallest")),
    "the-update-is-spread-out": lambda: (carried(0.95), carried(0.1)),
    "it-is-narrower-than-that-of-sft": lambda: (carried(0.2), carried(0.95)),
    "a-random-subnetwork-does-worse": alone(random=0.9),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_sabotage_turns_the_verdict(name: str) -> None:
    assert_sabotage_turns(CLAIMS[name], *SABOTAGE[name]())
