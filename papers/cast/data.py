"""The texts: what is trained on, what is scored, and a second text that nobody trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from common import data as datasets
from common import seeds
from common.data import text
from common.data.text import Corpus
from common.models.causal_lm import CausalLM
from papers.cast.settings import Params

__all__ = ["corpus", "hashes", "second_text", "test_text", "windows"]

GENERATED, GENERATED_TOKENS = "markov", 10  # few enough that a minute of training learns them


def corpus(params: Params) -> Corpus:
    """The text as tokens. Raises as `data.path`, FileNotFoundError for a folder without its two files."""
    if params.dataset == GENERATED:
        return text.markov(params.length, vocabulary=GENERATED_TOKENS)
    if params.dataset == "shakespeare":
        return text.shakespeare()
    return _folder(params)


def test_text(params: Params, texts: Corpus) -> Tensor:
    """The tokens that perplexities are measured on [T]."""
    return texts.test[: params.test_tokens or None]


def second_text(params: Params, texts: Corpus) -> Tensor | None:
    """WikiText-2's test text in the characters that the corpus has; all others are left out. None if not asked for."""
    if not params.second:
        return None
    number = {character: index for index, character in enumerate(texts.vocabulary)}
    wikipedia = text.wikitext2()
    known = torch.tensor([number.get(character, -1) for character in wikipedia.vocabulary])[wikipedia.test]
    return known[known >= 0][: params.test_tokens or None]


def windows(params: Params, tokens: Tensor, steps: int, seed: int, purpose: str) -> Iterator[Tensor]:
    """`steps` batches [batch, context + 1] int64 at random places; the same for every arm of a seed."""
    draw = seeds.generator(seed, "windows", purpose)
    return text.random_windows(tokens, length=params.context + 1, batch=params.batch, steps=steps, generator=draw)


def hashes(params: Params, texts: Corpus) -> dict[str, str]:
    """Name and sha256 of each text that is used, for `Record.data`."""
    names = [texts.name, *([text.WIKITEXT2] if params.second else [])]
    known = datasets.registry()
    content = torch.cat([texts.train, texts.validation, texts.test]).numpy().tobytes()
    return {name: known[name].sha256 if name in known else hashlib.sha256(content).hexdigest() for name in names}


def _folder(params: Params) -> Corpus:
    if not params.data_dir:
        raise FileNotFoundError(
            "data_dir is empty; expected a folder with train.txt and test.txt: --set data_dir=FOLDER"
        )
    folder = Path(params.data_dir).expanduser()
    parts = []
    coder = CausalLM.from_pretrained(params.model)
    for name in ("train.txt", "test.txt"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} does not exist; expected the text to train on in train.txt and the one to score, for "
                "instance the test split of WikiText-2 (raw), in test.txt"
            )
        parts.append(coder.encode((folder / name).read_text(encoding="utf-8")))
    train, test = parts
    cut = round(0.99 * len(train))
    return Corpus("own_text", train[:cut], train[cut:], test, ())
