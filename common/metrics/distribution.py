"""How far two sets of images are apart: Fréchet distance and KID of their features; VLHI; drift from a base model.

Features are [N, d], one row an image, of any network; all sums are in float64. Both distances depend on the number of
images, so compared arms need equal numbers.

FID proper takes features of an Inception network trained on ImageNet. With other features the same formula is another
metric: `common.metrics.judge` has a local one, under its own name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

__all__ = ["KID", "Estimate", "bootstrap", "drift", "frechet", "frechet_gaussians", "kid", "mmd2", "vlhi"]

LARGEST_SUBSET = 1000  # of KID (Binkowski et al. 2018)


@dataclass(frozen=True)
class Estimate:
    """A value and its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class KID:
    """Mean and standard deviation over subsets of `size` images; `mean` may be below zero where nothing differs."""

    mean: float
    deviation: float
    subsets: int
    size: int


def frechet(first: Tensor, second: Tensor) -> float:
    """`frechet_gaussians` of the means and covariances (N - 1) of features [N, d] and [M, d] (Heusel et al. 2017).

    With fewer images than d + 1 a covariance is singular, which the formula stands and the estimate suffers from: take
    N >= 10 d. It is biased upwards by about 1 / N, so compare arms at equal N.

    Raises TypeError and ValueError for features that are not finite floats [N >= 2, d] of one d.
    """
    first, second = _features(first, second)
    return frechet_gaussians(first.mean(0), _covariance(first), second.mean(0), _covariance(second))


def frechet_gaussians(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Dowson and Landau 1982); means [d], covariances [d, d].

    The eigenvalues of C1 C2 are those of the symmetric R C2 R with R = C1^(1/2), which are the squared singular values
    of R C2^(1/2). So the trace of the root is the sum of these: no root of a product that is not symmetric, and no
    complex rest to drop, also where a covariance is singular.
    """
    mean1, covariance1, mean2, covariance2 = (x.double() for x in (mean1, covariance1, mean2, covariance2))
    shared = torch.linalg.svdvals(_root(covariance1) @ _root(covariance2)).sum()
    apart = (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * shared
    return max(0.0, float(apart))  # rounding may leave -1e-15 where the two are equal


def mmd2(first: Tensor, second: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / d + 1)^3, of features [N, d] and [M, d].

    The estimate of Gretton et al. 2012, equation 3: pairs of an image with itself are left out, so its mean is 0 for
    two sets from one distribution, and it may be below. Raises as `frechet`.
    """
    first, second = _features(first, second)
    within = sum(_off_diagonal_mean(_kernel(x, x)) for x in (first, second))
    return float(within - 2 * _kernel(first, second).mean())


def kid(first: Tensor, second: Tensor, *, generator: Generator, subsets: int = 100, size: int | None = None) -> KID:
    """Kernel Inception distance (Binkowski et al. 2018), on whatever features: `mmd2` of random subsets.

    size  images of each set in a subset, without repetition; None: half of the smaller set and at most 1,000, since
          subsets that hold everything are all the same and their deviation says nothing

    Raises as `frechet`, and ValueError for a size below 2 or above a set's, or no subset.
    """
    first, second = _features(first, second)
    smaller = min(len(first), len(second))
    size = min(LARGEST_SUBSET, max(2, smaller // 2)) if size is None else size
    if not 2 <= size <= smaller or subsets < 1:
        raise ValueError(
            f"kid: got size={size} and subsets={subsets} of {smaller} images; expected 2 to {smaller}, and at least 1"
        )
    found = torch.tensor([mmd2(*(_drawn(x, size, generator) for x in (first, second))) for _ in range(subsets)])
    return KID(float(found.mean()), float(found.std(correction=0)), subsets, size)


def bootstrap(
    distance: Callable[[Tensor, Tensor], float],
    first: Tensor,
    second: Tensor,
    *,
    generator: Generator,
    resamples: int = 200,
    level: float = 0.95,
) -> Estimate:
    """Interval of a distance between two sets of features [N, d], [M, d], for the images that happened to be drawn.

    Both sets are drawn anew with repetition. That adds the distance's bias of 1 / N a second time, so the interval is
    the spread of the resampled distances around *their* mean, put around the value: it covers what other draws of
    equally many images would give on average, which is what arms of equal N are compared by. It says nothing of other
    seeds of the training: those go to `common.stats.interval`.

    Raises as `frechet`, and ValueError for fewer than 20 resamples or a level outside (0, 1).
    """
    first, second = _features(first, second)
    if resamples < 20 or not 0 < level < 1:
        raise ValueError(f"bootstrap: got resamples={resamples}, level={level}; expected at least 20, and within 0..1")
    value, found = distance(first, second), []
    for _ in range(resamples):
        again = [x[torch.randint(len(x), (len(x),), generator=generator)] for x in (first, second)]
        found.append(distance(*again))
    spread = torch.tensor(found, dtype=torch.float64)
    spread = spread - spread.mean()
    low, high = (float(spread.quantile(q)) for q in ((1 - level) / 2, (1 + level) / 2))
    return Estimate(value, value + low, value + high)


def vlhi(distances: Sequence[float], scores: Sequence[float]) -> list[float]:
    """Visual-linguistic harmony index of each member of a group, 0..2 (SaRA, section 4):

    (max d - d_i) / (max d - min d) + (s_i - min s) / (max s - min s), for distances d (lower is better; FID there) and
    scores s (higher is better; CLIP there).

    A group is one base model on one data set, with all methods at all budgets and full fine-tuning. Every member moves
    every value, so publish the pairs beside it and compare no values of different groups.

    Raises ValueError for groups of different lengths or fewer than two, values that are not finite, or all equal.
    """
    if len(distances) != len(scores) or len(scores) < 2:
        raise ValueError(
            f"vlhi: got {len(distances)} distances and {len(scores)} scores; expected one of each a member, and at "
            "least two members"
        )
    for name, values in (("distances", distances), ("scores", scores)):
        if not all(map(math.isfinite, values)):
            raise ValueError(f"vlhi: got {name} {list(values)}; expected finite numbers; leave the broken arm out")
        if max(values) == min(values):
            raise ValueError(
                f"vlhi: all {len(values)} {name} are {values[0]:g}, so they rank nobody; expected at least two "
                "different ones; look whether the arms differ at all"
            )
    near = [(max(distances) - d) / (max(distances) - min(distances)) for d in distances]
    told = [(s - min(scores)) / (max(scores) - min(scores)) for s in scores]
    return [a + b for a, b in zip(near, told, strict=True)]


def drift(images: Tensor, base: Tensor) -> Tensor:
    """Mean squared difference of each image [N, C, H, W] from the base model's, [N] float64, in squared units of both.

    For a model that was fine-tuned: sample both for prompts that have nothing to do with the fine-tuning, from equal
    noise (equal generators). 0 where nothing of the base was lost. Raises ValueError for different shapes.
    """
    if images.shape != base.shape or images.ndim != 4 or not len(images):
        raise ValueError(
            f"drift: got images {list(images.shape)} and {list(base.shape)}; expected two equal [N, C, H, W], N >= 1"
        )
    return (images.double() - base.double()).square().mean((1, 2, 3))


def _features(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float64, after the checks."""
    for x in (first, second):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"got features of {getattr(x, 'dtype', type(x).__name__)}; expected a float torch.Tensor")
        if x.ndim != 2 or len(x) < 2 or x.shape[1] != first.shape[1] or not x.shape[1]:
            raise ValueError(
                f"got features {list(first.shape)} and {list(second.shape)}; expected [N, d] and [M, d] of one d, with "
                "at least two rows each"
            )
        if not x.isfinite().all():
            rows = int((~x.isfinite()).any(1).sum())
            raise ValueError(f"{rows} of {len(x)} rows of features are not finite; look at the images they are of")
    return first.double(), second.double()


def _covariance(features: Tensor) -> Tensor:
    centred = features - features.mean(0)
    return centred.T @ centred / (len(features) - 1)


def _root(symmetric: Tensor) -> Tensor:
    """Square root of a matrix that is positive semidefinite but for rounding."""
    values, vectors = torch.linalg.eigh(symmetric)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _off_diagonal_mean(square: Tensor) -> Tensor:
    count = len(square)
    return (square.sum() - square.trace()) / (count * (count - 1))


def _drawn(features: Tensor, size: int, generator: Generator) -> Tensor:
    return features[torch.randperm(len(features), generator=generator)[:size]]
