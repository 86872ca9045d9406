"""The two small masked-diffusion models that are trained here, for tasks and for text, or one of transformers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import data as datasets
from common import seeds
from common.data import tasks, text
from common.data.tasks import TaskBatch
from common.data.text import Corpus
from common.models.rotary_lm import RotaryLM
from common.training.supervised import Schedule, fit
from papers.sparsed import diffusion, pretrained
from papers.sparsed.pretrained import DiffusionLM
from papers.sparsed.settings import Params

__all__ = [
    "KINDS",
    "Stage",
    "build",
    "corpus",
    "identity",
    "mask_of",
    "question",
    "settings_of",
    "stages",
    "test_text",
    "train",
]

KINDS = ("tasks", "text")
NO_BAR = partial(tqdm, disable=True)
WARMUP = 50  # steps
NEAR = 2  # tokens before each that it starts with
BETAS, DECAY = (0.9, 0.98), 0.01
GENERATED_LENGTH, GENERATED_TOKENS = 20_000, 12  # of the text at smoke


@dataclass(frozen=True)
class Stage:
    """A part of the training on tasks."""

    length: int
    queries: int
    steps: int
    batch: int
    tasks: tuple[str, ...]


def stages(params: Params) -> list[Stage]:
    """Those of `params.stages`. Raises ValueError for what is none."""
    found = []
    for entry in params.stages:
        numbers = entry.removesuffix("r").split("x")
        if len(numbers) != 4 or not all(number.isdigit() for number in numbers):
            raise ValueError(f"stages: got {entry!r}; expected length x questions x steps x batch, such as 64x8x500x32")
        names = ("retrieve",) if entry.endswith("r") else tuple(params.tasks)
        length, queries, steps, batch = map(int, numbers)
        found.append(Stage(length, queries, steps, batch, names))
    return found


def corpus(params: Params) -> Corpus:
    """The text: tiny Shakespeare, or a generated language. Raises as `data.path`."""
    if params.dataset == "shakespeare":
        return text.shakespeare()
    return text.markov(GENERATED_LENGTH, vocabulary=GENERATED_TOKENS)


def test_text(params: Params) -> Tensor:
    """The tokens that losses are taken of [T]."""
    if params.model:
        return pretrained.text_tokens(params, _pretrained(params.model, params.device))
    return corpus(params).test


def mask_of(params: Params, kind: str) -> int:
    """The number of MASK; the last of the small text model's."""
    if params.model:
        return _pretrained(params.model, params.device).mask
    return tasks.MASK if kind == "tasks" else _vocabulary(params, kind) - 1


def build(params: Params, kind: str, state: Mapping[str, Tensor] | None = None) -> nn.Module:
    """The model for "tasks" or "text", with `state` or fresh from torch's global generator; or that of transformers.

    Raises as `DiffusionLM.from_pretrained`.
    """
    if params.model:
        return _pretrained(params.model, params.device)
    network = RotaryLM(
        vocabulary=_vocabulary(params, kind),
        causal=False,
        width=params.width,
        depth=params.depth,
        heads=params.heads,
        ratio=params.ratio,
        near=NEAR,
    )
    if state is not None:
        network.load_state_dict(state)
    return network.to(params.device).eval()


def identity(params: Params) -> dict[str, str]:
    """Name and sha256 of the text, or of the model of transformers, for `Record.data`."""
    if params.model:
        return dict([_pretrained(params.model, params.device).identity()])
    found, known = corpus(params), datasets.registry()
    content = torch.cat([found.train, found.validation, found.test]).numpy().tobytes()
    return {found.name: known[found.name].sha256 if found.name in known else hashlib.sha256(content).hexdigest()}


def settings_of(params: Params, kind: str) -> dict[str, Any]:
    """All that decides what `train` gives, for `checkpoint`."""
    names = ["width", "depth", "heads", "ratio", "rate", "clip", "dataset"]
    names += ["stages", "tasks", "hops", "gap"] if kind == "tasks" else ["text_steps", "text_batch", "text_length"]
    return {"kind": kind, "seed": 0} | {name: getattr(params, name) for name in names}


@seeds.one_thread()
def train(
    params: Params, kind: str, keep: Path | None = None, *, progress: Callable = NO_BAR
) -> tuple[dict[str, Tensor], list[float]]:
    """State dict and losses of the model for "tasks" or "text"; for `keep` see `fit`."""
    seeds.everything(0, deterministic=False)
    network = build(params, kind)
    decayed = [parameter for parameter in network.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in network.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=params.rate, betas=BETAS)
    steps = params.text_steps if kind == "text" else sum(stage.steps for stage in stages(params))
    schedule = Schedule(steps, min(WARMUP, steps // 10))
    batches = text_batches(params) if kind == "text" else task_batches(params)
    loss = partial(_loss, mask=mask_of(params, kind), device=params.device)
    losses = fit(network, batches, loss, optimizer, schedule, clip=params.clip, progress=progress, keep=keep)
    return network.state_dict(), losses


def task_batches(params: Params) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and which are hidden [B, L], stage after stage; tasks in equal parts of a batch."""
    draw = seeds.generator(0, "training on tasks")
    for stage in stages(params):
        share = max(1, stage.batch // len(stage.tasks))
        for _ in range(stage.steps):
            parts = [
                question(params, task, length=stage.length, batch=share, queries=stage.queries, generator=draw)
                for task in stage.tasks
            ]
            answers = torch.cat([part.answers for part in parts])
            yield torch.cat([part.tokens for part in parts]), diffusion.hide(answers, draw)


def question(
    params: Params, task: str, *, length: int, batch: int, queries: int, generator: torch.Generator
) -> TaskBatch:
    """A batch of a task, with fewer questions where it has no more."""
    return tasks.draw(
        task,
        length=length,
        batch=batch,
        generator=generator,
        queries=min(queries, len(tasks.GROUPS)) if task == "common" else queries,
        hops=params.hops,
        gap=params.gap,
    )


def text_batches(params: Params) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows of the training text; every token may be masked."""
    draw, masking = (seeds.generator(0, "training on text", purpose) for purpose in ("windows", "masking"))
    windows = text.random_windows(
        corpus(params).train,
        length=params.text_length,
        batch=params.text_batch,
        steps=params.text_steps,
        generator=draw,
    )
    for window in windows:
        yield window, diffusion.hide(torch.ones_like(window, dtype=torch.bool), masking)


@cache
def _pretrained(name: str, device: str) -> DiffusionLM:
    return DiffusionLM.from_pretrained(name, device=device)


def _vocabulary(params: Params, kind: str) -> int:
    """Kinds of tokens, MASK among them."""
    return tasks.VOCABULARY if kind == "tasks" else len(corpus(params).vocabulary) + 1


def _loss(network: nn.Module, batch: tuple[Tensor, Tensor], *, mask: int, device: str) -> Tensor:
    tokens, hidden = (part.to(device) for part in batch)
    return diffusion.masked_loss(network, tokens, hidden, mask=mask)
