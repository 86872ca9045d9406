"""The arms, and one generation of each: what is computed, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from common import seeds
from common.attention import AdaSpa, Policy, video_attention
from common.models.video import sample
from kernels import attention
from kernels.attention import BlockMask
from papers.adaspa import baselines, data, network, patterns, pretrained
from papers.adaspa.settings import Params

__all__ = ["ARMS", "KEPT", "batched", "captions", "generate", "policy", "seed_values", "study"]

HELD_OUT = 10**9  # captions from here on are in no training
KEPT = 5  # steps between two states of a generation that are kept
TRACED = ("dense", "kernel", "bfloat16", "adaspa", "window", "minference", "svg", "fixed")

ARMS = {
    "dense": "dense",
    "kernel": "all tiles, our kernel",
    "bfloat16": "dense in bfloat16",
    "adaspa": "AdaSpa",
    "no_tiers": "no head tiers",
    "no_cache": "no LSE cache",
    "search_10": "searched at {10}",
    "search_10_20_30": "at {10, 20, 30}",
    "search_10_20_30_40": "at {10, 20, 30, 40}",
    "warmup_0": "no warm-up",
    "warmup_2": "2 dense steps",
    "warmup_5": "5 dense steps",
    "keep_0.1": "keep 0.1",
    "keep_0.3": "keep 0.3",
    "block_32": "tiles of 32",
    "block_64": "tiles of 64",
    "global_rule": "tiles by head, not row",
    "no_sink": "no text sink",
    "sink_counts": "text in the budget",
    "window": "window",
    "minference": "MInference-like",
    "svg": "Sparse VideoGen-like",
    "fixed": "another prompt's tiles",
}


def captions(params: Params) -> list[data.Caption]:
    """What is sampled."""
    generated = [data.sprites(2, params.side, params.model_seed, HELD_OUT + i)[1] for i in range(params.sprite_prompts)]
    return generated + [((name,),) for name in params.clip_prompts]


def policy(params: Params, arm: str, masks: Mapping[str, BlockMask] | None = None) -> Policy | None:
    """What computes the attention of an arm; None: the model's own. `masks` are for `fixed`."""
    first = params.search_steps[0]
    shared: dict[str, Any] = {"keep_ratio": params.keep_ratio, "block_size": params.block_size}
    own = shared | {"search_steps": tuple(params.search_steps)}
    if arm in ("dense", "bfloat16"):
        return None
    if arm == "kernel":
        return baselines.Window(keep_ratio=1.0, warmup=0, block_size=params.block_size)
    if arm in _BASELINES:
        return _BASELINES[arm](**shared, warmup=first)
    if arm == "fixed":
        return baselines.Fixed(**shared, warmup=first, found=masks)
    return AdaSpa(**own | _changes(arm, params))


_BASELINES: dict[str, Callable[..., Policy]] = {
    "window": baselines.Window,
    "minference": baselines.MInference,
    "svg": baselines.SparseVideoGen,
}


def _changes(arm: str, params: Params) -> dict[str, Any]:
    """How an arm of AdaSpa differs from the paper's setting."""
    kind, _, value = arm.partition("_")
    later = tuple(params.search_steps[1:])
    if kind == "search":
        return {"search_steps": tuple(int(step) for step in value.split("_"))}
    if kind == "warmup":  # the step of the search is dense itself
        return {"search_steps": (max(1, int(value)), *later)}
    if kind == "keep":
        return {"keep_ratio": float(value)}
    if kind == "block":
        return {"block_size": int(value)}
    return {
        "adaspa": {},
        "no_tiers": {"head_adaptive": False},
        "no_cache": {"refresh_lse": "search"},
        "global_rule": {"rule": "global"},
        "no_sink": {"text_sink": False},
        "sink_counts": {"text_counts": True},
    }[arm]


def generate(
    params: Params,
    arm: str,
    seed: int,
    state: Mapping[str, Tensor] | None,
    masks: Mapping[str, BlockMask] | None = None,
) -> dict[str, Any]:
    """Videos of all captions from the noise of a seed, by one arm.

    Returns `videos` float32 [P, 3, F, S, S] in about -1..1, `trajectory` [K, P, ...] float16 (the states after every
    `KEPT` steps; None where it is not looked at), and of the run `density`, `recall` (of the searches), `calls` and
    `seconds` by phase.
    """
    if params.model:
        return pretrained.generate(params, policy(params, arm, masks), seed)
    assert state is not None
    net = network.load(params, dict(state))
    dtype = torch.bfloat16 if arm == "bfloat16" else torch.float32
    text, present = data.embed(captions(params))
    shape = (len(text), 3, params.frames, params.side, params.side)
    noise = torch.randn(shape, generator=seeds.generator(seed, "noise"))
    states: list[Tensor] = []

    def keep(done: int, x: Tensor) -> None:
        if arm in TRACED and done % KEPT == 0:
            states.append(x.half())

    def sampled() -> Tensor:
        velocity = _in(dtype, net)
        return sample(velocity, noise, text, present, steps=params.steps, shift=params.shift, after_step=keep)

    found: dict[str, Any] = {"density": 1.0, "recall": None, "calls": {}, "seconds": {}}
    how = policy(params, arm, masks)
    if how is None:
        videos = sampled()
    else:
        with video_attention(net.core, how) as run:
            videos = sampled()
        found = summary(run.report())
    return {"videos": videos, "trajectory": torch.stack(states) if states else None, **found}


def summary(report: Any) -> dict[str, Any]:
    """What is kept of a run's report."""
    recalls = torch.cat([entry.recall.flatten() for entry in report.recalls]) if report.recalls else None
    return {
        "density": report.density if report.density is not None else 1.0,
        "recall": None if recalls is None else recalls.mean().item(),
        "calls": dict(report.calls),
        "seconds": dict(report.seconds),
    }


def study(params: Params, prompt: int, seed: int, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """A dense generation looked at: `looks` by step, `families` by step and name [heads], `masks` of the first look."""
    net = network.load(params, dict(state))
    tap = patterns.Tap(params.look_at, params.block_size, params.families_at, params.densities, params.sizes)
    with video_attention(net.core, tap):
        network.generate(net, params, captions(params)[prompt], seed)
    first = params.look_at[0]
    length = tap.looks[first][next(iter(tap.looks[first]))].lse.shape[-1]
    sink = attention.text_blocks(length, length, range(length - data.TEXT, length), block_size=params.block_size)
    return {
        "looks": {step: tap.look(step) for step in sorted(params.look_at)},
        "families": {
            step: {name: torch.cat(values) for name, values in row.items()} for step, row in tap.families.items()
        },
        "masks": tap.masks(first, params.keep_ratio, sink),
    }


def _in(dtype: torch.dtype, net: Any) -> Any:
    """The network's weights and activations in another dtype, its inputs and output in float32."""
    if dtype == torch.float32:
        return net
    net = net.to(dtype)

    def velocity(x: Tensor, s: Tensor, text: Tensor, present: Tensor) -> Tensor:
        return net(x.to(dtype), s, text.to(dtype), present).float()

    return velocity


def batched(masks: Sequence[Mapping[str, BlockMask]]) -> dict[str, BlockMask]:
    """The masks of several generations by layer, as those of one batch."""
    return {layer: BlockMask.of(torch.cat([found[layer].dense() for found in masks])) for layer in masks[0]}


def seed_values(values: Sequence[float]) -> float:
    """The mean over prompts: the unit of every comparison is a seed."""
    return sum(values) / len(values)
