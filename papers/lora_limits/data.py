"""Problems whose norms are known, queries and keys of the hard kind, and the text that a model reads."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from common import seeds
from common.data import text
from common.training.long_context import corpus, text_tokens
from papers.lora_limits.method import Adapter, Problem, threshold
from papers.lora_limits.settings import Params

__all__ = ["REGIMES", "problem", "signs", "windows"]

# Gamma of a length; the first two are below the threshold, the last one is above it
REGIMES: dict[str, Callable[[int], float]] = {
    "constant": lambda length: 1.0,
    "below": lambda length: math.sqrt(threshold(length)),
    "at": threshold,
    "above": lambda length: threshold(length) ** 2,
}


def problem(seed: int, *, length: int, head: int, rank: int, norm: float) -> Problem:
    """Normal entries everywhere, float64; queries and keys are scaled so that their largest entry is `norm`.

    The frozen weights and the adapters have an equal share in them.
    """
    draw = partial(torch.randn, generator=seeds.generator(seed, "problem", length, head), dtype=torch.float64)
    x = draw(length, head)

    def adapter(largest: float | None) -> Adapter:
        made = Adapter(draw(head, head), draw(head, rank), draw(rank, head), 2.0 / rank)
        ratio = 1.0 if largest is None else largest / made(x).abs().max().item()
        return Adapter(ratio * made.frozen, made.b, ratio * made.a, made.scale)

    return Problem(x, adapter(norm), adapter(norm), adapter(None), draw(length, head))


def signs(seed: int, length: int, norm: float) -> tuple[Tensor, Tensor]:
    """Queries and keys [length, d] whose every entry is norm or -norm, float64, d = 2 log2 of the length.

    What is hard about attention is hard for these: all entries are as large as they may be, and d = O(log L).
    """
    size = round(2 * math.log2(length))
    draw = seeds.generator(seed, "signs", length)
    query, key = (torch.randint(2, (length, size), generator=draw).double() * 2 - 1 for _ in range(2))
    return norm * query, norm * key


def windows(params: Params, lm: nn.Module, split: str, steps: int, seed: int) -> list[Tensor]:
    """`steps` batches [passages, context] at random places of a split, train or test, as the model's tokens."""
    if params.dataset == "folder":
        tokens = _folder(params.data_dir, f"{split}.txt", lm)
    else:
        texts = corpus(params.dataset)
        tokens = text_tokens(texts.train if split == "train" else texts.test)
    draw = seeds.generator(seed, "windows", split)
    return list(text.random_windows(tokens, length=params.context, batch=params.passages, steps=steps, generator=draw))


def _folder(folder: str, name: str, lm: nn.Module) -> Tensor:
    path = Path(folder) / name
    if not folder or not path.is_file():
        what = f"{path} does not exist" if folder else "data_dir is empty"
        raise FileNotFoundError(f"dataset folder: {what}; expected a folder with train.txt and test.txt")
    return lm.encode(path.read_text(encoding="utf-8"))
