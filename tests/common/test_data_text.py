"""Texts: splits that do not meet, tokens that decode, windows at fair places, and a generated language to learn."""

from __future__ import annotations

import collections

import pytest
import torch

from common.data import text


def test_shakespeare_is_whole_and_cut_by_position(real_data):
    folder, corpus = real_data(text.SHAKESPEARE), text.shakespeare()
    sizes = [len(part) for part in (corpus.train, corpus.validation, corpus.test)]
    assert sizes == [1_003_855, 55_770, 55_769]
    assert len(corpus.vocabulary) == 65
    assert corpus.decode(corpus.train[:13]) == "First Citizen"
    whole = (folder / "input.txt").read_text()
    assert "".join(map(corpus.decode, (corpus.train, corpus.validation, corpus.test))) == whole


def test_wikitext_tests_on_the_published_test_split(real_data):
    folder, corpus = real_data(text.WIKITEXT2), text.wikitext2()
    assert corpus.decode(corpus.test) == (folder / "test.txt").read_text(encoding="utf-8")
    known = corpus.decode(corpus.train) + corpus.decode(corpus.validation)
    assert known == (folder / "valid.txt").read_text(encoding="utf-8")
    assert len(corpus.train) / len(known) == pytest.approx(0.9, abs=1e-4)
    assert corpus.train.dtype == torch.int64


def test_the_generated_language_follows_its_likely_successors():
    corpus = text.markov(40_000, vocabulary=5, seed=3, followers=2)
    followed = collections.defaultdict(collections.Counter)
    for a, b, c in corpus.train.unfold(0, 3, 1).tolist():
        followed[a, b][c] += 1
    shares = [sum(n for _, n in seen.most_common(2)) / seen.total() for seen in followed.values()]
    assert len(followed) == 25
    # 0.9 by rule and 2 of 5 of the other 0.1; about 1,400 triples a pair, four standard errors: 0.03
    assert shares == pytest.approx([0.94] * 25, abs=0.03)


def test_the_generated_language_is_fixed_by_its_seed_and_split_in_order():
    first, again, other = text.markov(1000), text.markov(1000), text.markov(1000, seed=1)
    assert torch.equal(first.train, again.train)
    assert not torch.equal(first.train, other.train)
    assert [len(part) for part in (first.train, first.validation, first.test)] == [900, 50, 50]
    assert len(first.decode(first.test)) == 50
    with pytest.raises(ValueError, match="at least 100"):
        text.markov(10)


def test_windows_are_consecutive_and_reach_both_ends():
    drawn = list(
        text.random_windows(torch.arange(10), length=4, batch=50, steps=3, generator=torch.Generator().manual_seed(0))
    )
    windows = torch.cat(drawn)
    assert windows.shape == (150, 4)
    assert torch.equal(windows, windows[:, :1] + torch.arange(4))
    assert set(windows[:, 0].tolist()) == set(range(7))


def test_windows_follow_their_generator():
    def first(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return next(text.random_windows(torch.arange(99), length=4, batch=5, steps=1, generator=generator))

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))
    with pytest.raises(ValueError, match="hold a window"):
        next(text.random_windows(torch.arange(3), length=4, batch=1, steps=1, generator=torch.Generator()))
