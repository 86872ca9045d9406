"""Seeds: the same numbers again, independent streams, and work that leaves no trace."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from common import seeds


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


@pytest.fixture(autouse=True)
def keep_determinism_setting():
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def test_everything_repeats_and_differs_between_seeds() -> None:
    first, again, other = ((seeds.everything(s), draws())[1] for s in (3, 3, 4))
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_everything_returns_a_generator_of_its_own() -> None:
    generator = seeds.everything(3)
    torch.rand(100)
    assert torch.equal(torch.rand(5, generator=generator), torch.rand(5, generator=torch.Generator().manual_seed(3)))


def test_streams_are_told_apart_by_seed_and_labels() -> None:
    first = [torch.rand(8, generator=seeds.generator(*key)) for key in [(0, "a"), (0, "b"), (1, "a"), (0, "a", 1)]]
    assert torch.equal(first[0], torch.rand(8, generator=seeds.generator(0, "a")))
    assert not any(torch.equal(first[0], other) for other in first[1:])
    assert seeds.derived(0, 1) != seeds.derived(0, "1"), "labels of different types are different labels"


def test_isolated_work_neither_sees_nor_moves_what_is_outside() -> None:
    seeds.everything(1)
    expected = draws()
    seeds.everything(1)
    with seeds.isolated("work"):
        inside = draws()
    assert draws() == expected
    with seeds.isolated("work"):
        assert draws() == inside
    with seeds.isolated("other work"):
        assert draws() != inside


def test_isolated_restores_after_an_error() -> None:
    seeds.everything(1)
    expected = draws()
    seeds.everything(1)
    with pytest.raises(KeyError), seeds.isolated("work"):
        raise KeyError(draws())
    assert draws() == expected


@pytest.mark.parametrize(
    ("seed", "error"), [(-1, ValueError), (2**32, ValueError), (1.0, TypeError), (True, TypeError)]
)
def test_a_bad_seed_is_refused(seed, error) -> None:
    with pytest.raises(error, match="expected"):
        seeds.everything(seed)
