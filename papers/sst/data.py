"""The texts: generated, tiny Shakespeare, or a folder of yours in the tokens of a model of transformers."""

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
from common.models.stable_diffusion import MissingWeights
from papers.sst.settings import Params

__all__ = ["corpus", "provenance", "tokenizer", "windows"]

GENERATED_TOKENS = 10  # few enough that seconds of training learn something
HELD_BACK = 0.01  # of the folder's training text, for the choice of learning rates


def corpus(params: Params) -> Corpus:
    """The text as tokens. Raises as `data.path`, FileNotFoundError for a folder without its two files."""
    if params.dataset == "markov":
        return text.markov(params.length, vocabulary=GENERATED_TOKENS)
    if params.dataset == "shakespeare":
        return text.shakespeare()
    return _folder(params)


def windows(params: Params, tokens: Tensor, seed: int) -> Iterator[Tensor]:
    """The batches [batch, context + 1] of a training, at random places; the same for every arm of a seed."""
    draw = seeds.generator(seed, "windows")
    length = params.context + 1
    return text.random_windows(tokens, length=length, batch=params.batch, steps=params.steps, generator=draw)


def provenance(texts: Corpus) -> tuple[str, str]:
    """Name and sha256 for `Record.data`."""
    known = datasets.registry()
    if texts.name in known:
        return texts.name, known[texts.name].sha256
    content = torch.cat([texts.train, texts.validation, texts.test]).numpy().tobytes()
    return texts.name, hashlib.sha256(content).hexdigest()


def tokenizer(name: str):
    """The tokenizer of a model of transformers. Raises MissingWeights where it is neither here nor to be downloaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise MissingWeights(
            f"the tokenizer of {name} cannot be loaded ({str(error).splitlines()[0]}). Download it once on a machine "
            "with a connection, or name a folder that holds it in the layout of transformers."
        ) from error


def _folder(params: Params) -> Corpus:
    folder = Path(params.data_dir).expanduser()
    if not params.data_dir or not all((folder / name).is_file() for name in ("train.txt", "test.txt")):
        raise FileNotFoundError(
            f"data_dir is {params.data_dir!r}; expected a folder with train.txt and test.txt, the text to train on "
            "(the authors' is OpenWebText) and the one to score: --set data_dir=FOLDER"
        )
    coder = tokenizer(params.model)
    train, test = (
        torch.tensor(coder((folder / name).read_text(encoding="utf-8"), verbose=False).input_ids)
        for name in ("train.txt", "test.txt")
    )
    cut = round((1 - HELD_BACK) * len(train))
    return Corpus("own_text", train[:cut], train[cut:], test, tuple(map(str, range(len(coder)))))
