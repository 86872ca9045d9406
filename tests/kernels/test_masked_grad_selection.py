"""Which entries are chosen: the index of two bytes an entry."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.masked_grad import Selection


def mask_of(shape: tuple[int, ...], density: float, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


SHAPES = [(), (300,), (1, 1), (128, 128), (129, 257), (5, 1000), (1000, 5), (130, 4, 3, 3), (0, 7), (7, 0)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.1])
def test_a_mask_comes_back(shape: tuple[int, ...], density: float) -> None:
    mask = mask_of(shape, density)
    selection = Selection.from_mask(mask)
    assert torch.equal(selection.mask(), mask)
    assert selection.count == int(mask.sum()) and selection.shape == shape
    assert selection.density == (float(mask.double().mean()) if mask.numel() else 0)
    assert torch.equal(selection.positions().sort().values, mask.flatten().nonzero()[:, 0])
    assert Selection.from_positions(selection.positions(), shape) == selection
    assert selection.to("cpu") == selection


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 300), st.integers(0, 400), st.floats(0, 1), st.integers(0, 99))
def test_entries_come_tile_by_tile(rows: int, columns: int, density: float, seed: int) -> None:
    mask = mask_of((rows, columns), density, seed)
    expected = [
        (row, column)
        for top in range(0, rows, 128)
        for left in range(0, columns, 128)
        for row, column in (mask[top : top + 128, left : left + 128].nonzero() + torch.tensor([top, left])).tolist()
    ]
    found = Selection.from_mask(mask).positions()
    assert found.tolist() == [row * columns + column for row, column in expected]


def test_two_bytes_an_entry_and_four_a_tile() -> None:
    selection = Selection.from_mask(mask_of((1280, 640), 0.006))
    assert selection.nbytes == 2 * selection.count + 4 * (10 * 5 + 1)


def test_gather_and_scatter() -> None:
    mask, weight = mask_of((150, 3, 50), 0.2), torch.randn(150, 3, 50)
    selection = Selection.from_mask(mask)
    values = selection.gather(weight)
    assert torch.equal(values.sort().values, weight[mask].sort().values)
    blank = torch.zeros(150, 3, 50)
    assert selection.scatter_(blank, values) is blank
    assert torch.equal(blank, weight.where(mask, 0))
    strided = torch.zeros(50, 3, 150).permute(2, 1, 0)
    assert torch.equal(selection.scatter_(strided, values), blank)
    half = selection.scatter_(torch.zeros(150, 3, 50, dtype=torch.bfloat16), values)
    assert torch.equal(half, blank.bfloat16())
    leaf = weight.requires_grad_()
    selection.gather(leaf).sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, mask.float())


def test_equality() -> None:
    mask = mask_of((40, 50), 0.3)
    one, other = Selection.from_mask(mask), mask.clone()
    other[3, 4] = ~other[3, 4]
    assert one == Selection.from_mask(mask)
    assert one != Selection.from_mask(other)
    assert one != Selection.from_mask(mask.view(50, 40))
    assert one != "a selection"
    assert "of [40, 50]" in repr(one)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(TypeError, match=r"got torch\.float32; expected torch\.bool"):
        Selection.from_mask(torch.ones(3, 3))
    with pytest.raises(TypeError, match=r"expected int64 \[k\]"):
        Selection.from_positions(torch.ones(3), (3, 3))
    with pytest.raises(ValueError, match=r"got 2 \.\. 9; expected 0 \.\. 8 for a weight of \[3, 3\]"):
        Selection.from_positions(torch.tensor([9, 2]), (3, 3))
    with pytest.raises(ValueError, match=r"got -1 \.\. 2"):
        Selection.from_positions(torch.tensor([-1, 2]), (3, 3))
    with pytest.raises(ValueError, match="a position twice"):
        Selection.from_positions(torch.tensor([2, 5, 2]), (3, 3))
    selection = Selection.from_mask(mask_of((3, 3), 0.5))
    with pytest.raises(ValueError, match=r"got \[9\] on cpu; expected \[3, 3\]"):
        selection.gather(torch.zeros(9))
    with pytest.raises(ValueError, match=r"got values \[1\] on cpu"):
        selection.scatter_(torch.zeros(3, 3), torch.zeros(1))


@pytest.mark.parametrize(
    ("offsets", "starts"),
    [([0, 1], [0, 1]), ([0, 1], [1, 2]), ([1, 0], [0, 2]), ([0, 0], [0, 2]), ([-1, 1], [0, 2]), ([0, 3], [0, 2])],
)
def test_an_index_that_would_lead_elsewhere_is_refused(offsets: list[int], starts: list[int]) -> None:
    index = torch.tensor(offsets, dtype=torch.int16), torch.tensor(starts, dtype=torch.int32)
    with pytest.raises(ValueError, match="do not fit a weight"):
        Selection((3, 3), *index)
    with pytest.raises(ValueError, match=r"expected int16 \[k\] and int32 \[2\]"):
        Selection((3, 3), index[0].long(), index[1])
