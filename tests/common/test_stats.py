"""Intervals and equivalence: against scipy, by their laws, and by the coverage they promise."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from common import stats

SKEWED = np.array([0.1, 0.2, 0.15, 0.3, 0.22, 0.18, 0.9, 2.5, 0.4, 0.35, 0.12, 1.1])


def test_t_interval_is_scipys():
    values = [1.0, 1.4, 0.7, 2.2]
    expected = scipy_stats.t.interval(0.9, 3, loc=np.mean(values), scale=scipy_stats.sem(values))
    assert stats.t_interval(values, 0.9) == pytest.approx(expected, rel=1e-12)


def test_bca_is_scipys_up_to_resampling_noise():
    ours = stats.bca_interval(SKEWED, resamples=60000)
    theirs = scipy_stats.bootstrap(
        (SKEWED,), np.mean, n_resamples=60000, method="BCa", rng=np.random.default_rng(1)
    ).confidence_interval
    # A quantile estimate from 60000 draws has a standard error near 0.005 here; a percentile interval is 0.1 away.
    assert ours == pytest.approx(tuple(theirs), abs=0.02)
    percentile = scipy_stats.bootstrap((SKEWED,), np.mean, method="percentile", rng=np.random.default_rng(1))
    assert abs(ours[1] - percentile.confidence_interval.high) > 0.05


def test_equivalence_is_two_one_sided_t_tests_of_scipy():
    values = [0.3, 0.9, 0.5, 0.7, 0.1]
    above = scipy_stats.ttest_1samp(values, 0.0, alternative="greater").pvalue
    below = scipy_stats.ttest_1samp(values, 1.2, alternative="less").pvalue
    assert stats.equivalence(values, 0.0, 1.2) == pytest.approx(max(above, below), rel=1e-10)
    assert stats.equivalence(values, 0.0, np.inf) == pytest.approx(above, rel=1e-10)


@pytest.mark.parametrize("high", [0.9, 1.0, 1.5])
def test_equivalence_agrees_with_the_interval_lying_inside(high):
    values = [0.3, 0.9, 0.5, 0.7, 0.1]
    low, top = stats.t_interval(values, 0.95)
    assert (stats.equivalence(values, -1.0, high) < 0.025) == (low > -1.0 and top < high)


# Expected shares follow from the level; the slack is three standard errors of a share over the trials.
@pytest.mark.parametrize(("seeds", "trials"), [(2, 2000), (3, 2000), (5, 2000), (8, 400), (12, 400)])
def test_intervals_of_normal_seeds_cover_at_their_level(seeds, trials):
    generator = np.random.default_rng(seeds)
    draws = generator.normal(5.0, 2.0, size=(trials, seeds))
    covered = np.mean([(i := stats.interval(row)).low <= 5.0 <= i.high for row in draws])
    slack = 3 * np.sqrt(0.95 * 0.05 / trials)
    assert covered >= 0.95 - slack
    if seeds < stats.BOOTSTRAP_FROM:
        assert covered <= 0.95 + slack


def test_a_bare_bootstrap_of_three_seeds_would_not_cover():
    draws = np.random.default_rng(3).normal(5.0, 2.0, size=(300, 3))
    covered = np.mean([low <= 5.0 <= high for low, high in map(stats.bca_interval, draws)])
    assert covered < 0.85


def test_skew_widens_the_interval_beyond_t():
    interval = stats.interval(SKEWED)
    assert interval.method == "t and BCa"
    assert interval.high > stats.t_interval(SKEWED)[1]
    assert interval.low <= stats.t_interval(SKEWED)[0]


def test_interval_moves_and_scales_with_its_values_and_forgets_their_order():
    base = stats.interval(SKEWED)
    moved = stats.interval(3.0 * SKEWED + 10.0)
    assert (moved.low, moved.high) == pytest.approx((3 * base.low + 10, 3 * base.high + 10), rel=1e-9)
    assert stats.interval(SKEWED[::-1]) == base


def test_few_values_are_treated_as_few():
    assert stats.interval([2.0]) == stats.Interval(2.0, -np.inf, np.inf, 1, "one value")
    assert stats.interval([1.0, 2.0, 3.0]).method == "t"
    same = stats.interval([4.0] * 9)
    assert (same.low, same.high) == (4.0, 4.0)


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [1.0, np.inf], [[1.0, 2.0]]])
def test_values_that_have_no_mean_are_refused(values):
    with pytest.raises(ValueError, match="expected"):
        stats.interval(values)


def test_senseless_levels_and_bands_are_refused():
    with pytest.raises(ValueError, match="level"):
        stats.interval([1.0, 2.0], level=95)
    with pytest.raises(ValueError, match="band"):
        stats.equivalence([1.0, 2.0], 1.0, 0.0)
    with pytest.raises(ValueError, match="at least 2"):
        stats.t_interval([1.0])
