"""Intervals for the mean over seeds, and equivalence to a band.

Seeds are few. A bootstrap of three numbers can only return combinations of those three and covers far less than it
promises, so below `BOOTSTRAP_FROM` seeds the interval is Student's t. From there on it is the hull of t and a BCa
bootstrap: t holds the level for near-normal seeds, where BCa is still a little short at ten; BCa follows skew (a run
that diverged), where t does not. Compared arms share their seeds, so callers pass the differences (or ratios) of pairs.

Every function is deterministic: the bootstrap's generator is seeded, and values are sorted first, so that the order in
which seeds finished changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

LEVEL = 0.95
BOOTSTRAP_FROM = 8
RESAMPLES = 9999


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval; `n` values, `method` one of `exact`, `one value`, `t`, `t and BCa`."""

    mean: float
    low: float
    high: float
    n: int
    method: str


def interval(values: Sequence[float] | np.ndarray, level: float = LEVEL) -> Interval:
    """Confidence interval of the mean of `values` `[n]` (one value a seed, already paired).

    One value says nothing about its own spread: its interval is the whole line. Equal values give an interval of zero
    width: to the observer, what varies with the seed is then nothing.

    Raises:
        ValueError: no values, values that are not finite, a level outside (0, 1).
    """
    sample = _sample(values)
    if not 0 < level < 1:
        raise ValueError(f"got level {level}, expected a number between 0 and 1; 0.95 is the default.")
    mean, n = float(sample.mean()), len(sample)
    if n == 1:
        return Interval(mean, -np.inf, np.inf, n, "one value")
    low, high = t_interval(sample, level)
    if n < BOOTSTRAP_FROM:
        return Interval(mean, low, high, n, "t")
    bca_low, bca_high = bca_interval(sample, level)
    return Interval(mean, min(low, bca_low), max(high, bca_high), n, "t and BCa")


def t_interval(values: Sequence[float] | np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Student's t interval of the mean: mean ± t_{n-1} s / sqrt(n); needs two values."""
    from scipy.special import stdtrit

    sample = _sample(values, least=2)
    half = float(stdtrit(len(sample) - 1, (1 + level) / 2)) * _standard_error(sample)
    mean = float(sample.mean())
    return mean - half, mean + half


def bca_interval(
    values: Sequence[float] | np.ndarray, level: float = LEVEL, *, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Bias-corrected and accelerated bootstrap interval of the mean (Efron 1987); needs two values.

    z0 = Phi^-1(share of resampled means below the mean), a = sum d^3 / (6 (sum d^2)^1.5) with d the jackknife's
    deviations; the limits are the resampled means' quantiles at Phi(z0 + (z0 + z)/(1 - a (z0 + z))).
    """
    sample = _sample(values, least=2)
    if np.ptp(sample) == 0:
        return float(sample[0]), float(sample[0])
    draws = np.random.default_rng(0).integers(0, len(sample), size=(resamples, len(sample)))
    means = sample[draws].mean(axis=1)
    normal = NormalDist()
    # Ties count half, and the share is kept off 0 and 1: both have infinite quantiles.
    share = (np.sum(means < sample.mean()) + 0.5 * np.sum(means == sample.mean())) / resamples
    bias = normal.inv_cdf(float(np.clip(share, 1 / (resamples + 1), resamples / (resamples + 1))))
    deviations = sample - sample.mean()  # the jackknife's, up to the factor 1/(n-1) that cancels
    acceleration = float(np.sum(deviations**3) / (6 * np.sum(deviations**2) ** 1.5))
    limits = []
    for z in (normal.inv_cdf((1 - level) / 2), normal.inv_cdf((1 + level) / 2)):
        shifted = bias + (bias + z) / (1 - acceleration * (bias + z))
        limits.append(float(np.quantile(means, normal.cdf(shifted))))
    return limits[0], limits[1]


def equivalence(values: Sequence[float] | np.ndarray, low: float, high: float) -> float:
    """p of two one-sided t tests (TOST) that the mean lies outside `low..high`; small means inside.

    p < alpha is the same as the t interval of level 1 - 2 alpha lying within the band, so judging by a 95 % interval is
    TOST at alpha = 0.025. An infinite limit makes its test vacuous: a one-sided claim is a one-sided test.

    Raises:
        ValueError: fewer than two values, or a band with low > high.
    """
    from scipy.special import stdtr

    sample = _sample(values, least=2)
    if low > high:
        raise ValueError(f"got the band {low}..{high}, expected low <= high; swap its ends.")
    mean, error, freedom = float(sample.mean()), _standard_error(sample), len(sample) - 1
    if error == 0:
        return 0.0 if low <= mean <= high else 1.0
    return float(max(stdtr(freedom, -(mean - low) / error), stdtr(freedom, -(high - mean) / error)))


def _standard_error(sample: np.ndarray) -> float:
    return float(sample.std(ddof=1) / np.sqrt(len(sample))) if np.ptp(sample) > 0 else 0.0


def _sample(values: Sequence[float] | np.ndarray, least: int = 1) -> np.ndarray:
    sample = np.asarray(values, dtype=float)
    if sample.ndim != 1 or len(sample) < least:
        raise ValueError(
            f"got values of shape {sample.shape}, expected a flat list of at least {least}; measure more seeds."
        )
    if not np.all(np.isfinite(sample)):
        raise ValueError(
            f"got values that are not finite: {sample[~np.isfinite(sample)].tolist()}, expected numbers; look at the "
            "seeds that diverged before taking a mean over them."
        )
    return np.sort(sample)
