"""Text as sequences of tokens: characters of tiny Shakespeare, WikiText-2, and a generated language.

A corpus is three one-dimensional tensors of token numbers (int64 [T]) that share no position, and the vocabulary that
turns them back into text. Windows are drawn at random places by a generator of the caller's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from common import seeds
from common.data import _registry, _store

__all__ = ["Corpus", "hashes", "markov", "random_windows", "shakespeare", "wikitext2"]

SHAKESPEARE, WIKITEXT2 = "text_tinyshakespeare", "text_wikitext2"  # as registered
SHARES = (0.90, 0.05, 0.05)  # train, validation and test, by position in the text


@dataclass(frozen=True)
class Corpus:
    """train, validation, test: int64 [T], numbers of entries of `vocabulary`."""

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor
    vocabulary: tuple[str, ...]

    def decode(self, tokens: Tensor) -> str:
        """Token numbers [T] as text."""
        return "".join(self.vocabulary[token] for token in tokens.tolist())


def shakespeare() -> Corpus:
    """Tiny Shakespeare, 1,115,394 characters of 65 kinds; the first 90 % train, the next 5 % validation, the rest test.

    Raises as `data.path` where the text is neither here nor to be had.
    """
    text = (_store.path(SHAKESPEARE, only="input.txt") / "input.txt").read_text(encoding="ascii")
    return _by_position(SHAKESPEARE, text)


def wikitext2() -> Corpus:
    """WikiText-2 by characters, in its tokenised form. Its training split is not in the registered set.

    The published validation split is cut by position into train (first 90 %) and validation (the rest); the published
    test split is the test. Characters that occur in the test split alone are numbered too, after all others, so that
    nothing is dropped. Perplexities a character are not those a word that are published.

    Raises as `data.path` where the text is neither here nor to be had.
    """
    folder = _store.path(WIKITEXT2)
    known, held_out = ((folder / f"{name}.txt").read_text(encoding="utf-8") for name in ("valid", "test"))
    first = sorted(set(known))
    vocabulary = (*first, *sorted(set(held_out) - set(first)))
    tokens, cut = _encode(known, vocabulary), round(SHARES[0] * len(known))
    return Corpus(WIKITEXT2, tokens[:cut], tokens[cut:], _encode(held_out, vocabulary), vocabulary)


def markov(length: int, *, vocabulary: int = 27, seed: int = 0, followers: int = 3) -> Corpus:
    """A generated language: each pair of tokens has `followers` likely successors, drawn once by the seed.

    After the pair (a, b) one of its likely successors comes with probability 0.9, each with the same share, and any
    token of the vocabulary with the other 0.1. What there is to learn needs a look at two tokens; the best perplexity
    is far below the vocabulary's size. `length` tokens in all, split as Shakespeare's are.

    Raises ValueError for sizes that make no language.
    """
    if not (2 <= followers <= vocabulary <= 62 and length >= 100):
        raise ValueError(
            f"markov: got length={length}, vocabulary={vocabulary}, followers={followers}; expected a length of at "
            "least 100 and 2 <= followers <= vocabulary <= 62."
        )
    draw = seeds.generator(seed, "markov")
    likely = torch.rand(vocabulary, vocabulary, vocabulary, generator=draw).argsort(dim=-1)[..., :followers].tolist()
    ordinary = (torch.rand(length, generator=draw) < 0.9).tolist()
    which = torch.randint(followers, (length,), generator=draw).tolist()
    tokens = torch.randint(vocabulary, (length,), generator=draw).tolist()
    for i in range(2, length):
        if ordinary[i]:
            tokens[i] = likely[tokens[i - 2]][tokens[i - 1]][which[i]]
    names = tuple("abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ012345678"[:vocabulary])
    return _cut("markov", torch.tensor(tokens), names)


def hashes(corpus: Corpus) -> dict[str, str]:
    """Its name and sha256, for `Record.data`: that of the registered set, or of the tokens."""
    known = _registry.registry()
    if corpus.name in known:
        return {corpus.name: known[corpus.name].sha256}
    content = torch.cat([corpus.train, corpus.validation, corpus.test]).numpy().tobytes()
    return {corpus.name: hashlib.sha256(content).hexdigest()}


def random_windows(tokens: Tensor, *, length: int, batch: int, steps: int, generator: Generator) -> Iterator[Tensor]:
    """`steps` batches of windows [batch, length] int64 of consecutive tokens, at uniformly drawn places of tokens [T].

    For next-token training take length = context + 1. Raises ValueError where the text is shorter than a window.
    """
    if len(tokens) < length or min(length, batch) < 1:
        raise ValueError(
            f"random_windows: got length={length}, batch={batch} for a text of {len(tokens)} tokens; expected both to "
            "be at least 1 and the text to hold a window."
        )
    offsets = torch.arange(length)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - length + 1, (batch,), generator=generator)
        yield tokens[starts[:, None] + offsets]


def _by_position(name: str, text: str) -> Corpus:
    vocabulary = tuple(sorted(set(text)))
    return _cut(name, _encode(text, vocabulary), vocabulary)


def _cut(name: str, tokens: Tensor, vocabulary: tuple[str, ...]) -> Corpus:
    first = round(SHARES[0] * len(tokens))
    second = first + round(SHARES[1] * len(tokens))
    return Corpus(name, tokens[:first], tokens[first:second], tokens[second:], vocabulary)


def _encode(text: str, vocabulary: tuple[str, ...]) -> Tensor:
    number = {character: index for index, character in enumerate(vocabulary)}
    return torch.tensor([number[character] for character in text])
