"""Texts and prompts, and attention with channels of known importance."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from common import seeds
from common.data import text
from common.data.tasks import TaskBatch
from common.models.causal_lm import CausalLM
from common.training.long_context import corpus, questions, text_tokens
from papers.double_sparsity.settings import Params

__all__ = ["CHANCE", "calibration", "passages", "planted", "prompts", "skill"]

# What guessing gets: 24 values, eight words of a group, yes or no.
CHANCE = {"retrieve": 1 / 24, "track": 1 / 24, "common": 1 / 8, "filter": 1 / 2}


def passages(params: Params, lm: nn.Module, split: str, count: int, seed: int) -> list[Tensor]:
    """Passages [rows, context] at random places of the text, `count` in all. split: train or test."""
    if params.dataset == "folder":
        tokens = _folder(params, lm, {"train": "calibration.txt", "test": "test.txt"}[split])
    else:
        texts = corpus(params.dataset)
        tokens = text_tokens(texts.train if split == "train" else texts.test)
    draw = seeds.generator(seed, "passages", split)
    steps = -(-count // params.rows)
    return list(text.random_windows(tokens, length=params.context, batch=params.rows, steps=steps, generator=draw))


def prompts(params: Params, task: str, seed: int) -> list[TaskBatch]:
    """The test prompts of a task in batches of `params.rows`."""
    drawn = questions(task, params.context, params.prompts, seed)
    parts = zip(drawn.tokens.split(params.rows), drawn.answers.split(params.rows), strict=True)
    return [TaskBatch(task, tokens, answers, drawn.prompt) for tokens, answers in parts]


def calibration(params: Params, lm: nn.Module, kind: str, seed: int) -> list[Tensor]:
    """Batches [rows, context] that channels are ranked by.

    kind: `text` (its training part), `tasks` (all of them in turn), or `both`, half of each, the text first.
    """
    count = params.calibration if kind != "both" else params.calibration // 2
    found: list[Tensor] = []
    if kind in ("text", "both"):
        found += passages(params, lm, "train", count, seed)
    if kind in ("tasks", "both"):
        for index in range(-(-count // params.rows)):
            task = params.tasks[index % len(params.tasks)]
            found.append(questions(task, params.context, params.rows, seeds.derived(seed, "calibration", index)).tokens)
    return found


def skill(task: str, accuracy: float) -> float:
    """Accuracy with guessing taken off: 0 by chance, 1 if all is right."""
    return (accuracy - CHANCE[task]) / (1 - CHANCE[task])


def planted(
    seed: int, *, heads: int = 8, length: int = 512, size: int = 64, outliers: int = 4, strength: float = 6.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys [1, heads, length, size] in which a few channels of each head carry most of the scores.

    Entries are normal; those of `outliers` channels of each head, of queries and keys alike, are `strength` times as
    large. As many other channels are as large in the queries alone and so matter little more than the rest, and as many
    in the keys alone: rankings by |q| or by |k| cannot tell them apart from the outliers, that by |q * k| can.

    Returns query, key, and the outliers int64 [heads, outliers].
    """
    draw = seeds.generator(seed, "planted channels")
    query, key = (torch.randn(1, heads, length, size, generator=draw) for _ in range(2))
    order = torch.rand(heads, size, generator=draw).argsort(-1)
    both, of_query, of_key = order[:, : 3 * outliers].split(outliers, dim=1)
    for x, places in ((query, (both, of_query)), (key, (both, of_key))):
        scale = torch.ones(heads, size).scatter(1, torch.cat(places, dim=1), strength)
        x *= scale[None, :, None]
    return query, key, both


def _folder(params: Params, lm: nn.Module, name: str) -> Tensor:
    if not params.data_dir:
        raise FileNotFoundError(
            "data_dir is empty; expected a folder with calibration.txt and test.txt: --set data_dir=FOLDER"
        )
    path = Path(params.data_dir).expanduser() / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; expected calibration.txt (the authors use a part of the Pile) and test.txt (the "
            "test split of WikiText-2)"
        )
    assert isinstance(lm, CausalLM)
    return lm.encode(path.read_text(encoding="utf-8"))
