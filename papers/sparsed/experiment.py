"""The arms that are compared, what they are asked, and what is seen of a model's patterns on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common import seeds
from common.attention import Dense, Policy, Run, Site, language_attention
from common.data import tasks, text
from kernels import attention
from papers.sparsed import diffusion, models, pretrained
from papers.sparsed.baselines import Fixed, sink_and_window, window
from papers.sparsed.method import RELEASED, SparseD
from papers.sparsed.pretrained import DiffusionLM
from papers.sparsed.settings import Params

if TYPE_CHECKING:
    from common.attention.meter import Meter

__all__ = ["ARMS", "Arm", "answer", "observe", "policy", "text_batch", "text_losses"]


State = Mapping[str, Tensor] | None  # of the small models; None for one of transformers


@dataclass(frozen=True)
class Arm:
    """One bar of the comparison: `changes` of SparseD, or a policy of another kind."""

    label: str
    changes: tuple[tuple[str, Any], ...] = ()


ARMS = {
    "dense": Arm("dense"),
    "sparsed": Arm("SparseD"),
    "no_skip": Arm("SparseD - skip", (("skip", 0.0),)),
    "no_reuse": Arm("SparseD - reuse", (("reuse", False),)),
    "no_isolation": Arm("SparseD - isolation", (("isolated", False),)),
    "own": Arm("each step's own pattern", (("skip", 0.0), ("reuse", False))),
    "released": Arm("SparseD as released", (("compat", RELEASED),)),
    "window": Arm("sliding window"),
    "streaming": Arm("sink and window"),
}


def policy(params: Params, arm: str, *, steps: int, prompt: int, keep_ratio: float | None = None) -> Policy:
    """A fresh policy of the arm for generations of so many steps behind a prompt of so many tokens."""
    ratio = params.keep_ratio if keep_ratio is None else keep_ratio
    if arm == "dense":
        return Dense()
    if arm == "window":
        return Fixed(partial(window, keep_ratio=ratio), params.block_size)
    if arm == "streaming":
        return Fixed(partial(sink_and_window, keep_ratio=ratio, sink=params.sink), params.block_size)
    options: dict[str, Any] = {"keep_ratio": ratio, "skip": params.skip, "block_size": params.block_size}
    return SparseD(steps=steps, prompt=prompt, **options | dict(ARMS[arm].changes))


@seeds.one_thread()
def answer(params: Params, state: State, arm: str, keep_ratio: float | None, seed: int) -> dict[str, dict[str, float]]:
    """Accuracy in percent of an arm on the tasks: by task `token`, `exact`, and `density` of its sparse attentions.

    A generated task of n questions takes n steps. The prompts of a seed are the same for all arms.
    """
    network, found = models.build(params, "tasks", state), {}
    if isinstance(network, DiffusionLM):
        return {task: _ask(params, network, task, arm, keep_ratio, seed) for task in params.tasks}
    for task in params.tasks:
        draw = seeds.generator(seed, "prompts", task)
        batch = models.question(
            params, task, length=params.length, batch=params.prompts, queries=params.queries, generator=draw
        )
        steps, masked = int(batch.answers[0].sum()), batch.masked().to(params.device)
        way = policy(params, arm, steps=steps, prompt=batch.prompt, keep_ratio=keep_ratio)
        with language_attention(network, way) as run:
            made = diffusion.generate(network, masked, mask=tasks.MASK, steps=steps)
        scored = tasks.score(batch, made)
        found[task] = {"token": 100 * scored.token, "exact": 100 * scored.exact, "density": _density(run)}
    return found


@seeds.one_thread()
def text_losses(params: Params, state: State, arm: str, keep_ratio: float | None, seed: int) -> dict[str, Any]:
    """`losses` of an arm on unseen text, in nats a token, in each of the T steps; and `density`."""
    network, windows = models.build(params, "text", state), text_batch(params, seed)
    prompt = params.length - params.generated
    way = policy(params, arm, steps=params.steps, prompt=prompt, keep_ratio=keep_ratio)
    with language_attention(network, way) as run:
        losses = _trajectory(params, network, windows, seed)
    return {"losses": losses, "density": _density(run)}


@seeds.one_thread()
def observe(params: Params, state: State, seed: int) -> dict[str, Any]:
    """Where the text model looks, step by step, under dense attention.

    `scores` [steps, layers, heads, n, n]: weights in tiles of the first window, each row summing to 1; `similar`
    [steps - 1, layers, heads]: cosine of a head's scores in a step and the next, mean over windows; `kept` [steps,
    layers, heads]: share of the tiles SparseD would choose in a step that it chose in its search step, `held` the share
    of that step's attention weight in them, and `best` the share in its own tiles.
    """
    network, windows = models.build(params, "text", state), text_batch(params, seed)
    watch = Observer(params.block_size)
    with language_attention(network, watch):
        _trajectory(params, network, windows, seed)
    scores = torch.stack([torch.stack(layers) for layers in watch.steps]).movedim(2, 0)  # [B, T, layers, heads, n, n]
    flat = scores.flatten(-2)
    way = policy(params, "sparsed", steps=params.steps, prompt=params.length - params.generated)
    assert isinstance(way, SparseD)
    own = torch.stack([torch.stack([way.select(layer).dense() for layer in step]) for step in watch.steps])
    own = own.movedim(2, 0)  # as the scores
    first = own[:, max(way.dense_steps, 1) - 1, None]
    return {
        "scores": scores[0] / scores[0].sum(-1, keepdim=True),
        "similar": torch.cosine_similarity(flat[:, :-1], flat[:, 1:], dim=-1).mean(0),
        "kept": ((own & first).sum((-2, -1)) / own.sum((-2, -1))).mean(0),
        "held": _share(scores, first.expand_as(own)),
        "best": _share(scores, own),
    }


class Observer(Policy):
    """Dense attention that keeps the weights in tiles: `steps`, by step a list of [B, H, n, n] by layer."""

    def __init__(self, block_size: int):
        self.block_size = block_size
        self.steps: list[list[Tensor]] = []

    def attend(self, query: Tensor, key: Tensor, value: Tensor, site: Site, meter: Meter) -> Tensor:
        with meter.phase("search"):
            found = attention.search(query, key, value, block_size=self.block_size, scale=site.scale)
        if site.step > len(self.steps):
            self.steps.append([])
        self.steps[-1].append(found.scores.cpu())
        return found.out.to(query.dtype)


def text_batch(params: Params, seed: int) -> Tensor:
    """Windows [windows, length] of the test text."""
    draw = seeds.generator(seed, "windows of text")
    [batch] = text.random_windows(
        models.test_text(params), length=params.length, batch=params.windows, steps=1, generator=draw
    )
    return batch.to(params.device)


def _ask(
    params: Params, network: DiffusionLM, task: str, arm: str, keep_ratio: float | None, seed: int
) -> dict[str, float]:
    """RULER's score of a task in percent: `token` its mean, `exact` the share of prompts with nothing left out."""
    scores, densities = [], []
    for told, outputs in pretrained.prompts(params, task, seed):
        prompt = network.chat(told)
        if len(prompt) + params.generated > params.length:
            raise ValueError(
                f"{task}: got a prompt of {len(prompt)} tokens; expected at most {params.length - params.generated}, "
                "the length without what is generated; make RULER's prompts shorter, or raise length"
            )
        start = torch.cat([prompt, torch.full((params.generated,), network.mask)])[None].to(params.device)
        way = policy(params, arm, steps=params.steps, prompt=len(prompt), keep_ratio=keep_ratio)
        with language_attention(network, way) as run:
            made = diffusion.generate(
                network,
                start,
                mask=network.mask,
                steps=params.steps,
                prompt=len(prompt),
                block_length=params.block_length,
            )
        scores.append(pretrained.contained(network.decode(made[0, len(prompt) :]), outputs))
        densities.append(_density(run))
    exact = sum(score == 1 for score in scores)
    count = len(scores)
    return {"token": 100 * sum(scores) / count, "exact": 100 * exact / count, "density": sum(densities) / count}


def _trajectory(params: Params, network: Any, windows: Tensor, seed: int) -> list[float]:
    return diffusion.trajectory(
        network,
        windows,
        mask=models.mask_of(params, "text"),
        steps=params.steps,
        prompt=params.length - params.generated,
        generator=seeds.generator(seed, "order of unmasking"),
    )


def _share(scores: Tensor, kept: Tensor) -> Tensor:
    return ((scores * kept).sum((-2, -1)) / scores.sum((-2, -1))).mean(0)


def _density(run: Run) -> float:
    found = run.report().density
    return 1.0 if found is None else found
