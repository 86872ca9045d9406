"""Fréchet distance, KID, their intervals, VLHI and drift, against other formulas and published values."""

from __future__ import annotations

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import Tensor

from common.metrics.distribution import KID, bootstrap, drift, frechet, frechet_gaussians, kid, mmd2, vlhi


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixed(count: int, width: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    """Correlated features whose variances span four orders of magnitude."""
    mixing = torch.randn(width, width, generator=draw(99)) * torch.logspace(-2, 0, width)
    return scale * torch.randn(count, width, generator=draw(seed)) @ mixing + shift


def by_scipy(first: Tensor, second: Tensor) -> float:
    """The same by the root of the unsymmetric product, as the published implementation takes it."""
    a, b = first.double().numpy(), second.double().numpy()
    root = linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False))
    apart = np.sum((a.mean(0) - b.mean(0)) ** 2)
    return float(apart + np.trace(np.cov(a, rowvar=False) + np.cov(b, rowvar=False)) - 2 * np.trace(root.real))


# ---------------------------------------------------------------------------------------------------- Fréchet distance


@pytest.mark.parametrize(("width", "shift", "scale"), [(2, 0.0, 1.0), (8, 0.3, 1.5), (64, 0.1, 0.7)])
def test_frechet_is_that_of_the_matrix_root(width: int, shift: float, scale: float):
    first, second = mixed(700, width, 1), mixed(600, width, 2, shift, scale)
    assert frechet(first, second) == pytest.approx(by_scipy(first, second), rel=1e-6)
    assert frechet(first, second) == pytest.approx(frechet(second, first), rel=1e-9)


def test_frechet_of_known_gaussians():
    """For commuting covariances it is the squared distance of the standard deviations."""
    zero, eye = torch.zeros(3), torch.eye(3)
    assert frechet_gaussians(zero, eye, torch.tensor([1.0, 2.0, 2.0]), eye) == pytest.approx(9)
    stretched = torch.diag(torch.tensor([4.0, 9.0, 0.0]))
    assert frechet_gaussians(zero, eye, zero, stretched) == pytest.approx(1 + 4 + 1)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=draw()).double()).Q
    assert frechet_gaussians(zero, eye, zero, turn @ stretched.double() @ turn.T) == pytest.approx(6)


def test_frechet_of_gaussians_that_do_not_commute():
    """Two by two: tr (C1 C2)^(1/2) = sqrt(tr(C1 C2) + 2 sqrt(det C1 C2))."""
    first, second = torch.tensor([[2.0, 0.6], [0.6, 1.0]]), torch.tensor([[0.5, -0.2], [-0.2, 3.0]])
    product = (first @ second).double()
    root = math.sqrt(product.trace() + 2 * math.sqrt(product.det()))
    expected = float(first.trace() + second.trace()) - 2 * root
    assert frechet_gaussians(torch.zeros(2), first, torch.zeros(2), second) == pytest.approx(expected, rel=1e-6)


def test_frechet_of_equal_sets_is_nothing_also_where_covariances_are_singular():
    for count, width in ((500, 8), (5, 40)):
        features = mixed(count, width, 3)
        assert frechet(features, features) < 1e-9 * features.square().sum(1).mean()
    few, others = mixed(5, 40, 3), mixed(6, 40, 4)  # fewer images than features, where the matrix root goes astray
    padded = [torch.cat([x, torch.zeros(len(x), 10)], 1) for x in (few, others)]
    assert frechet(*padded) == pytest.approx(frechet(few, others), rel=1e-9)  # constant features change nothing


def test_frechet_does_not_change_with_a_rotation_and_grows_with_the_square_of_the_scale():
    first, second = mixed(200, 6, 1).double(), mixed(200, 6, 2, 0.5).double()
    turn = torch.linalg.qr(torch.randn(6, 6, generator=draw()).double()).Q
    assert frechet(first @ turn + 3, second @ turn + 3) == pytest.approx(frechet(first, second), rel=1e-9)
    assert frechet(5 * first, 5 * second) == pytest.approx(25 * frechet(first, second), rel=1e-9)


def test_frechet_is_biased_upwards_by_one_over_n():
    """Two sets of one distribution: half the images, twice the distance. So arms are compared at equal numbers."""
    means = []
    for count in (200, 400):
        pairs = torch.randn(60, 2, count, 8, generator=draw())
        means.append(np.mean([frechet(*pair) for pair in pairs]))
    assert means[0] / means[1] == pytest.approx(2, rel=0.15)  # the mean of 60 has an error of about 3 %


# ----------------------------------------------------------------------------------------------------------------- KID


def test_mmd2_is_the_sum_over_pairs():
    first, second = mixed(7, 3, 1).double(), mixed(5, 3, 2, 0.4).double()

    def k(x: Tensor, y: Tensor) -> float:
        return float((x @ y / 3 + 1) ** 3)

    def within(x: Tensor) -> float:
        return sum(k(a, b) for a, b in itertools.permutations(x, 2)) / (len(x) * (len(x) - 1))

    across = sum(k(a, b) for a, b in itertools.product(first, second)) / 35
    assert mmd2(first, second) == pytest.approx(within(first) + within(second) - 2 * across, rel=1e-9)


def test_mmd2_is_unbiased():
    """Over many pairs from one distribution the mean is 0, with values on both sides."""
    found = torch.tensor([mmd2(*pair) for pair in torch.randn(400, 2, 20, 4, generator=draw())])
    assert abs(found.mean()) < 3 * found.std() / 400**0.5
    assert (found < 0).any() and (found > 0).any()


def test_kid_agrees_with_torchmetrics():
    kernels = pytest.importorskip("torchmetrics.image.kid")
    first, second = mixed(40, 8, 1), mixed(40, 8, 2, 0.3)
    assert mmd2(first, second) == pytest.approx(float(kernels.poly_mmd(first, second)), rel=1e-3)  # float32 there


def test_kid_draws_subsets():
    first, second = mixed(100, 8, 1), mixed(80, 8, 2, 0.3)
    found = kid(first, second, generator=draw(), subsets=60)
    assert (found.subsets, found.size) == (60, 40) and found.deviation > 0
    error = found.deviation / 60**0.5
    assert found.mean == pytest.approx(mmd2(first, second), abs=4 * error)
    whole = kid(first, second, generator=draw(), subsets=3, size=80)
    assert whole.size == 80
    assert kid(first, second, generator=draw(), subsets=60) == found
    assert isinstance(found, KID)
    for bad in ({"size": 1}, {"size": 81}, {"subsets": 0}):
        with pytest.raises(ValueError, match="expected 2 to 80"):
            kid(first, second, generator=draw(), **bad)


@pytest.mark.parametrize("distance", [frechet, mmd2, partial(kid, generator=draw()), partial(bootstrap, frechet)])
def test_features_that_cannot_be_compared(distance):
    if getattr(distance, "func", None) is bootstrap:
        distance = partial(distance, generator=draw())
    good = mixed(10, 3, 0)
    broken = good.clone()
    broken[4, 1] = math.nan
    for bad, error, message in (
        (good[:1], ValueError, "at least two rows"),
        (good[:, :2], ValueError, "of one d"),
        (good[0], ValueError, "expected"),
        (good.long(), TypeError, "int64"),
        (broken, ValueError, "1 of 10 rows"),
    ):
        with pytest.raises(error, match=message):
            distance(good, bad)


# ------------------------------------------------------------------------------------------------------------ intervals


def test_bootstrap_covers_the_mean_of_other_draws():
    """Of 60 pairs of sets, the interval of most holds the mean distance over all: 95 % are promised."""
    pairs = torch.randn(60, 2, 100, 4, generator=draw())
    pairs[:, 1] += 0.5
    aim = np.mean([frechet(*pair) for pair in torch.cat([pairs, _more()])])
    found = [bootstrap(frechet, *pair, generator=draw(i), resamples=60) for i, pair in enumerate(pairs)]
    covered = sum(e.low <= aim <= e.high for e in found)
    assert covered >= 51  # 85 %: a binomial of 60 and 0.95 is below that in one of 900 cases
    assert np.mean([e.high < aim for e in found]) < 0.15 and np.mean([e.low > aim for e in found]) < 0.15
    assert all(e.low < e.value < e.high for e in found)


def _more() -> Tensor:
    pairs = torch.randn(200, 2, 100, 4, generator=draw(7))
    pairs[:, 1] += 0.5
    return pairs


def test_bootstrap_repeats_and_refuses_too_few():
    first, second = mixed(30, 3, 0), mixed(30, 3, 1)
    twice = [bootstrap(frechet, first, second, generator=draw(1), resamples=20) for _ in range(2)]
    assert twice[0] == twice[1]
    with pytest.raises(ValueError, match="at least 20"):
        bootstrap(frechet, first, second, generator=draw(), resamples=5)


# --------------------------------------------------------------------------------------------------------------- VLHI


def test_vlhi_of_a_published_group():
    """SaRA, table 1, the means on SD1.5 of five styles: the group that gives 1.55, 1.69 and 1.30 there."""
    rows = {
        "LoRA": ((150.74, 27.96, 1.45), (148.77, 27.97, 1.52), (151.58, 28.00, 1.44)),
        "DoRA": ((146.22, 27.82, 1.53), (145.55, 27.73, 1.51), (149.07, 27.70, 1.38)),
        "Adaptformer": ((146.62, 27.06, 1.18), (150.24, 27.39, 1.21), (156.88, 27.67, 1.13)),
        "LT-SFT": ((150.18, 25.76, 0.49), (155.48, 25.99, 0.42), (165.72, 26.37, 0.27)),
        "SaRA": ((134.96, 27.08, 1.55), (136.92, 27.53, 1.69), (147.80, 27.73, 1.44)),
        "full": ((133.69, 26.42, 1.30),),
    }
    table = [cells for group in rows.values() for cells in group]
    found = vlhi([row[0] for row in table], [row[1] for row in table])
    assert found == pytest.approx([row[2] for row in table], abs=0.011)  # two digits each


def test_vlhi_ends_at_nothing_and_two():
    assert vlhi([1.0, 3.0, 2.0], [9.0, 5.0, 7.0]) == [2.0, 0.0, 1.0]
    assert vlhi([10.0, 30.0], [0.0, 1.0]) == [1.0, 1.0]


def test_vlhi_refuses_groups_that_rank_nobody():
    for distances, scores, message in (
        ([2.0, 2.0], [1.0, 3.0], "all 2 distances are 2"),
        ([1.0, 2.0], [3.0, 3.0], "all 2 scores are 3"),
        ([1.0, math.nan], [1.0, 2.0], "finite"),
        ([1.0, 2.0, 3.0], [1.0, 2.0], "3 distances and 2 scores"),
        ([1.0], [2.0], "at least two members"),
    ):
        with pytest.raises(ValueError, match=message):
            vlhi(distances, scores)


# -------------------------------------------------------------------------------------------------------------- drift


def test_drift_is_the_mean_squared_difference_of_each_image():
    base = torch.rand(3, 3, 4, 4, generator=draw())
    moved = base.clone()
    moved[1] += 0.5
    moved[2, 0, 0, 0] += 2
    assert drift(moved, base).tolist() == pytest.approx([0, 0.25, 4 / 48], abs=1e-6)
    with pytest.raises(ValueError, match="two equal"):
        drift(base, base[:2])
