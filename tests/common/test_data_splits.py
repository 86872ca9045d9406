"""No leakage: blocks are contiguous, disjoint and apart."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.data.splits import split_by_position


@given(
    count=st.integers(20, 200),
    gap_mm=st.floats(0, 4),
    first=st.floats(0.2, 0.6),
    step_mm=st.floats(0.3, 3),
    seed=st.integers(0, 1000),
)
def test_blocks_are_apart_whatever_the_order(count, gap_mm, first, step_mm, seed):
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    z = 100.0 + step_mm * order.double()
    fractions = (first, 0.8 - first, 0.2)
    try:
        blocks = split_by_position(z, fractions, gap_mm)
    except ValueError as error:
        assert "empty" in str(error)
        return
    for one, other in itertools.combinations(blocks, 2):
        assert (z[one][:, None] - z[other][None, :]).abs().min() >= max(gap_mm, step_mm) - 1e-9
    for block, share in zip(blocks, fractions, strict=True):
        assert (torch.diff(z[block]) > 0).all()
        assert torch.allclose(torch.diff(z[block]), torch.tensor(step_mm, dtype=torch.float64))  # contiguous
        lost = 2 * (gap_mm / step_mm / 2 + 1)
        assert share * count - lost - 1 <= len(block) <= share * count + 1


def test_no_gap_loses_nothing():
    blocks = split_by_position(range(10), (0.5, 0.3, 0.2), 0.0)
    assert [block.tolist() for block in blocks] == [[0, 1, 2, 3, 4], [5, 6, 7], [8, 9]]


def test_a_gap_drops_slices_on_both_sides_of_a_cut():
    blocks = split_by_position(range(10), (0.5, 0.5), 3.0)
    assert [block.tolist() for block in blocks] == [[0, 1, 2, 3], [6, 7, 8, 9]]  # 3 mm apart at least


@pytest.mark.parametrize(
    "z, fractions, gap_mm, message",
    [
        (range(10), (0.5, 0.6), 0.0, "sum to 1"),
        (range(10), (1.2, -0.2), 0.0, "positive"),
        (range(10), (0.5, 0.5), -1.0, "gap_mm"),
        (range(10), (0.5, 0.5), float("nan"), "gap_mm"),
        ([0.0, 1.0, 1.0, 2.0], (0.5, 0.5), 0.0, "one position"),
        (range(10), (0.8, 0.1, 0.1), 4.0, "block 1.*smaller gap"),
        (range(2), (0.4, 0.3, 0.3), 0.0, "too few"),
        ([[0.0]], (1.0,), 0.0, "one finite position"),
    ],
)
def test_errors(z, fractions, gap_mm, message):
    with pytest.raises(ValueError, match=message):
        split_by_position(z, fractions, gap_mm)
