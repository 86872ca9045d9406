"""The arms that are compared, what each costs, and how one of them is trained. The idea itself is in `method.py`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from tqdm import tqdm

from common import seeds
from common.sparsity import (
    FlopMeter,
    GradientVariance,
    MaskMeter,
    NMConfig,
    NMLayer,
    Recipe,
    Sparsity,
    sparsify_,
)
from common.training import Schedule, fit
from papers.progressive_gradient_flow import method
from papers.progressive_gradient_flow.data import Task
from papers.progressive_gradient_flow.settings import Params

NO_BAR = partial(tqdm, disable=True)
DENSE = "dense"
LONG = "sr_ste_long"  # SR-STE for as many products as the exponential flow takes
LABELS = {
    "dense": "dense",
    "sr_ste": "SR-STE",
    "linear": "MDGF linear",
    "exponential": "MDGF exponential",
    "stepwise": "SDGF stepwise",
    "geometric": "SDGF geometric",
    "exponential_scaled": "exponential, scaled gradient",
    "stepwise_scaled": "stepwise, scaled gradient",
    "stepwise_released": "stepwise as released",
    LONG: "SR-STE, equal products",
}


def pattern_of(text: str) -> tuple[int, int]:
    """ "1:16" as (1, 16)."""
    n, m = map(int, text.split(":"))
    return n, m


def runs(params: Params) -> list[tuple[str, str, str]]:
    """What is trained with every seed: (task, arm, pattern)."""
    main = params.main_pattern
    found = [("images", DENSE, main)]
    for pattern in params.patterns:
        extra = params.main_arms if pattern == main else []
        found += [("images", arm, pattern) for arm in (*params.arms, *extra)]
    if params.text != "none":
        found += [("text", arm, main) for arm in params.text_arms]
    return found


def name_of(arm: str, pattern: str) -> str:
    """How a run is called in the record: `exponential/1:16`, or `dense`."""
    return DENSE if arm == DENSE else f"{arm}/{pattern}"


def recipe_of(params: Params, arm: str, steps: int) -> Recipe:
    """An arm's recipe for a training of so many steps."""
    dense, fine_tune = (round(share * steps) for share in (params.dense, params.fine_tune))
    schedule = method.Schedule(steps, dense, fine_tune, params.exponent, tuple(params.blocks))
    return method.recipes(schedule)["sr_ste" if arm == LONG else arm]


def steps_of(params: Params, task: Task, arm: str, pattern: str) -> int:
    """Optimiser steps of a training: the same for all arms, but for the one that is given equal products instead."""
    steps = params.steps or math.ceil(params.epochs * len(task.train) / params.batch)
    if arm != LONG:
        return steps
    wanted = products(params, task, "exponential", pattern, steps)
    return round(steps * wanted / products(params, task, "sr_ste", pattern, steps))


def products(params: Params, task: Task, arm: str, pattern: str, steps: int) -> float:
    """Multiply-accumulates, for each example of a batch, that all weights of the network take in a whole training.

    The sparse layers at `method.share_of_dense`, all other layers dense; forward pass and both gradients.
    """
    with torch.random.fork_rng(devices=[]):
        network = task.network()
    chosen = sparsify_(network, NMConfig(1, 1, where=task.sparse)).layers
    with FlopMeter(network, "nonzeros") as meter:
        network(task.example()).sum().backward()
    n, m = pattern_of(pattern)
    share = method.share_of_dense(recipe_of(params, arm, steps), n, m, steps)
    counts = {name: count.dense.total for name, count in meter.layers.items()}
    return steps * sum(count * (share if name in chosen else 1.0) for name, count in counts.items())


@seeds.one_thread()  # networks as small as ours only lose by a second one, and a GPU has no use for it
def train(params: Params, task: Task, arm: str, pattern: str, seed: int, *, progress: Callable = NO_BAR) -> dict:
    """Train one arm with one seed, prune it to its final pattern and score it.

    Returns `score`, `curves` {name: (steps, values)}, the means `variance_pruned`, `variance_kept` and `flip_rate` over
    the probes, `exact` (1 where every group of every sparse layer keeps exactly n non-zeros), `steps` and `seconds`.
    Arms of one seed start from the same weights and see the same batches.
    """
    n, m = pattern_of(pattern)
    steps = steps_of(params, task, arm, pattern)
    seeds.everything(seed, deterministic=False)
    network = task.network().to(params.device)
    recipe = recipe_of(params, arm, steps)
    handle = sparsify_(network, NMConfig(n, m, where=task.sparse, recipe=recipe, refresh=params.refresh))
    variance, moved = GradientVariance(handle, every=params.probe), MaskMeter(handle, every=params.probe)
    optimizer = torch.optim.AdamW(network.parameters(), task.learning_rate, weight_decay=params.weight_decay)
    started = time.perf_counter()
    losses = fit(
        network,
        task.batches(seed, steps),
        task.loss,
        optimizer,
        Schedule(steps, round(params.warmup * steps)),
        clip=params.clip,
        after_step=lambda _: handle.step(),
        progress=lambda bar, _, total: progress(bar, f"{LABELS[arm]} {pattern}, seed {seed}", total=total),
    )
    seconds = time.perf_counter() - started
    pruned, kept = variance.average("pruned", rate=0.0), variance.average("kept", rate=0.0)
    exact = _finish(handle, n, m, dense=arm == DENSE)
    every = max(1, steps // 100)
    return {
        "score": task.score(network),
        "curves": {
            "loss": (list(range(0, steps, every)), losses[::every]),
            "variance_pruned": (variance.steps, variance.average("pruned")),
            "flip_rate": (moved.steps, moved.flip_rate()),
        },
        "variance_pruned": _mean(pruned),
        "variance_kept": _mean(kept),
        "flip_rate": _mean(moved.flip_rate()),
        "exact": exact,
        "steps": steps,
        "seconds": seconds,
    }


def _finish(handle: Sparsity, n: int, m: int, *, dense: bool) -> float:
    """Give the plain model back, pruned; whether every group is exactly n:m."""
    if dense:
        handle.remove()
        return 1.0
    layers: list[NMLayer] = list(handle.layers.values())
    handle.remove(keep="zeros")
    return float(all(bool((_nonzeros(layer, m) == n).all()) for layer in layers))


def _nonzeros(layer: nn.Module, m: int) -> torch.Tensor:
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach().unflatten(1, (-1, m)).count_nonzero(2)


def _mean(values: list[float]) -> float:
    """Of what was measured; nan where nothing was."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
