"""Transposable N:M masks: legal along both axes, and the best there are, says the specification and a solver."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import info, nm
from kernels.bench import other_isas
from kernels.nm import reference

ISAS = [info()["isa"], *other_isas(), "emulated512"]
PATTERNS = [(n, m) for m in (1, 2, 3, 4) for n in range(m + 1)]
PATTERNS += [(1, 8), (2, 8), (4, 8), (7, 8), (8, 8), (2, 5), (1, 16), (8, 16)]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("KERNELS_ISA", request.param)
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ties(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def awkward(*shape: int, seed: int = 0) -> Tensor:
    """Ties, zeros, infinities, NaN and forty orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.cat([torch.tensor([0.0, -1.0, 1.0, torch.inf, -torch.inf, torch.nan, 1e-44]), 10 ** (noise(20) * 15)])
    return pool[torch.randint(len(pool), shape, generator=generator)]


def transposable(weight: Tensor, n: int, m: int) -> Tensor:
    return nm.mask(weight, n, m, transposable=True)


def tiles(weight: Tensor, m: int) -> Tensor:
    """[T, m, m] of [..., R, C], in rows of tiles."""
    return weight.unflatten(-1, (-1, m)).unflatten(-3, (-1, m)).transpose(-3, -2).reshape(-1, m, m)


def assert_legal(kept: Tensor, n: int, m: int) -> None:
    """n of every m along the rows, and of the transpose along its rows, as kernels for N:M weights take them."""
    for side in (kept, kept.mT):
        assert bool((side.unflatten(-1, (-1, m)).sum(dim=-1) == n).all())


def best_sum(tile: np.ndarray, n: int) -> float:
    """By linear programming: the polytope of tiles with these sums of rows and columns has whole corners."""
    from scipy.optimize import linprog

    m = len(tile)
    of_rows, of_columns = np.kron(np.eye(m), np.ones(m)), np.kron(np.ones(m), np.eye(m))
    sums = np.concatenate([of_rows, of_columns])
    found = linprog(-tile.ravel(), A_eq=sums, b_eq=np.full(2 * m, n), bounds=(0, 1), method="highs")
    assert found.status == 0
    return -found.fun


@pytest.mark.parametrize("values", [noise, ties, awkward])
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_it_is_the_specification(n: int, m: int, values, isa: str) -> None:
    for shape in ((m, m), (2, 3 * m, m), (2 * m, 5 * m)):
        weight = values(*shape, seed=n + m)
        kept = transposable(weight, n, m)
        assert kept.dtype == torch.bool and kept.shape == weight.shape
        assert torch.equal(kept, reference.transposable_mask(weight, n, m)), shape
        assert_legal(kept, n, m)


@pytest.mark.parametrize("values", [noise, ties])
@pytest.mark.parametrize(("n", "m", "count"), [(2, 4, 40), (1, 4, 20), (3, 4, 20), (2, 3, 20), (1, 8, 20), (2, 8, 20)])
def test_no_legal_mask_keeps_more(n: int, m: int, count: int, values) -> None:
    check_optimal(values(count * m, m, seed=m), n, m)


@pytest.mark.parametrize(("n", "m", "count"), [(4, 8, 20), (6, 8, 20), (3, 7, 20), (1, 16, 5), (8, 16, 5), (16, 32, 2)])
def test_no_legal_mask_of_a_larger_tile_keeps_more(n: int, m: int, count: int) -> None:
    check_optimal(noise(count * m, m, seed=m), n, m)


def check_optimal(weight: Tensor, n: int, m: int) -> None:
    kept = transposable(weight, n, m)
    assert_legal(kept, n, m)
    for tile, choice in zip(tiles(weight, m).abs().double().numpy(), tiles(kept, m).numpy(), strict=True):
        # the solver stops within 1e-7 of the best
        assert tile[choice].sum() == pytest.approx(best_sum(tile, n), rel=1e-6)


def test_one_of_four_is_the_best_of_all_permutations() -> None:
    for tile in tiles(noise(80, 4), 4):
        kept = transposable(tile, 1, 4)
        sums = {columns: float(tile[range(4), columns].abs().double().sum()) for columns in permutations(range(4))}
        assert tuple(kept.int().argmax(dim=1).tolist()) == max(sums, key=sums.__getitem__)


@settings(max_examples=60, deadline=None)
@given(st.integers(5, 12), st.data())
def test_planted_and_adversarial_tiles(m: int, data: st.DataObject) -> None:
    """Small whole numbers, where greed goes wrong most: legal, and the best."""
    n = data.draw(st.integers(1, m - 1))
    flat = data.draw(st.lists(st.integers(0, 4), min_size=m * m, max_size=m * m))
    weight = torch.tensor(flat, dtype=torch.float32).view(m, m)
    kept = transposable(weight, n, m)
    assert_legal(kept, n, m)
    assert float(weight[kept].sum()) == pytest.approx(best_sum(weight.double().numpy(), n), abs=1e-6)
    assert torch.equal(kept, reference.transposable_mask(weight, n, m))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (2, 8), (4, 8), (8, 16), (5, 20)])
def test_where_the_best_is_unique_symmetries_hold(n: int, m: int) -> None:
    weight = noise(2 * m, 3 * m, seed=5)
    kept = transposable(weight, n, m)
    assert torch.equal(transposable(weight.T, n, m), kept.T)
    assert torch.equal(transposable(-8 * weight, n, m), kept)
    order = torch.arange(2 * m).view(2, m).flip(1).flatten()  # the rows of each tile backwards
    assert torch.equal(transposable(weight[order], n, m), kept[order])


def test_a_tile_is_a_square_of_the_matrix_and_not_a_run_of_memory() -> None:
    """Masks of m * m consecutive weights, cut into m rows, would be n:m along the rows only."""
    weight = noise(8, 64, seed=1)
    kept = transposable(weight, 2, 4)
    assert_legal(kept, 2, 4)
    square = weight[4:8, 12:16]
    assert torch.equal(kept[4:8, 12:16], transposable(square, 2, 4))
    runs = transposable(weight.reshape(-1, 4), 2, 4).view(8, 64)
    assert bool((runs.T.unflatten(-1, (-1, 4)).sum(dim=-1) != 2).any()), "the check could not see the difference"


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 8), (1, 8), (20, 64)])
def test_nan_and_infinity_are_kept_as_far_as_they_fit(n: int, m: int, isa: str) -> None:
    weight = noise(m, m)
    diagonal = torch.arange(m)
    weight[diagonal, (diagonal + 1) % m] = torch.inf
    weight[diagonal, diagonal] = torch.nan
    weight[0, 0] = 1e30
    kept = transposable(weight, n, m)
    assert_legal(kept, n, m)
    # n = 1: a circle through all rows has either all of the one diagonal or all of the other
    assert bool(kept[weight.isnan()].all())
    assert n == 1 or bool(kept[weight.isinf()].all())
    for value in (torch.nan, torch.inf, 0.0, 3e38):
        assert_legal(transposable(torch.full((m, m), value), n, m), n, m)
    single = torch.zeros(m, m)
    single[2, 3] = torch.nan
    single[2, 1] = torch.inf
    assert bool(transposable(single, n, m)[2, 3])


def test_huge_ranges_keep_the_order_of_what_can_be_told_apart(isa: str) -> None:
    weight = torch.full((4, 4), 1e-3)
    weight[0, 0] = 1e8
    weight[1, 1] = 1e-2  # 33 bits below the largest
    assert bool(transposable(weight, 1, 4)[1, 1])
    weight = torch.full((8, 8), 1e-45)
    weight[3, 5] = 3e-45
    assert bool(transposable(weight, 1, 8)[3, 5])


def test_leading_axes_are_a_batch_and_strides_do_not_matter() -> None:
    weight = noise(16, 24, 3, 3)
    moved = weight.permute(2, 3, 0, 1)
    kept = transposable(moved, 2, 8)
    assert kept.shape == moved.shape and kept.stride() == moved.stride()
    for i in range(3):
        for j in range(3):
            assert torch.equal(kept[i, j], transposable(weight[:, :, i, j], 2, 8))
    assert torch.equal(transposable(moved[:, :, ::2], 2, 8), transposable(moved[:, :, ::2].contiguous(), 2, 8))


def test_the_same_bits_on_any_number_of_threads(threads: None, isa: str) -> None:
    for n, m in ((2, 4), (3, 8)):
        weight = ties(3, 96, 120)
        found = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(transposable(weight, n, m))
        assert all(torch.equal(found[0], other) for other in found[1:])


def test_empty_weights_other_dtypes_and_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in ((0, 8), (8, 0), (0, 8, 8)):
        assert transposable(torch.zeros(shape), 2, 4).shape == shape
        assert reference.transposable_mask(torch.zeros(shape), 2, 8).shape == shape
    weight = noise(16, 16)
    for n, m in ((2, 4), (3, 8)):
        expected = transposable(weight, n, m)
        assert torch.equal(transposable(weight.double(), n, m), expected)
        assert torch.equal(transposable(weight.bfloat16(), n, m), transposable(weight.bfloat16().float(), n, m))
        with monkeypatch.context() as forced:
            forced.setenv("KERNELS_BACKEND", "reference")
            assert torch.equal(transposable(weight, n, m), expected)


@pytest.mark.parametrize(
    ("shape", "m", "ragged", "message"),
    [
        (
            (8, 6),
            4,
            False,
            r"got a weight \[8, 6\] for transposable tiles of 4 x 4; expected \[\.\.\., rows, columns\]",
        ),
        ((6, 8), 4, False, r"that 4 divides; choose another m, leave this layer out, or move the axes to the end"),
        ((8,), 4, False, r"got a weight \[8\] for transposable tiles of 4 x 4"),
        ((8, 8), 4, True, r"got transposable=True with ragged=True; a tile has no last group to shorten"),
        ((130, 130), 65, False, r"got transposable tiles of m = 65; expected m <= 64"),
    ],
)
def test_wrong_input_is_refused(shape: tuple[int, ...], m: int, ragged: bool, message: str) -> None:
    with pytest.raises(ValueError, match=rf"kernels\.nm\.mask: .*{message}"):
        nm.mask(torch.zeros(shape), 2, m, transposable=True, ragged=ragged)
