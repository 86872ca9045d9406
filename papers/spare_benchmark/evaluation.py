"""What is concluded from many runs: exact checks of the protocol, spreads over seeds, and rankings."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from common.metrics.image import psnr
from common.splatting import splits
from papers.spare_benchmark import data, method

SINGLE_RUNS = 1.96 * math.sqrt(2)  # standard deviations between two single runs that 95 % of pairs stay within


def protocol_numbers(folder: Path, scenes: Sequence[str]) -> dict[str, int]:
    """Exact facts of the protocol, through the split files: written into `folder` and read back.

    Returns `inputs_track1`, `inputs_track2`, `tests`, `outside` (views of Track 1 that Track 2 lacks), and
    `llff_mismatch`, `dtu_mismatch`: ids that differ from those in the papers' code. Raises ValueError for a file in
    which a view is both input and test.
    """
    read = {}
    for track, views in method.TRACKS.items():
        read[track] = splits.spare(data.write_split(folder / f"Track{track}_split_test.json", views, scenes))
    first, second = (list(read[track].values()) for track in (1, 2))
    fern = splits.hold_out(20, 3)  # fern has 20 photographs
    dtu = splits.dtu(9)
    return {
        "inputs_track1": max(len(scene.train) for scene in first),
        "inputs_track2": max(len(scene.train) for scene in second),
        "tests": max(len(scene.test) for scene in (*first, *second)),
        "outside": sum(len({*a.train} - {*b.train}) for a, b in zip(first, second, strict=True)),
        "llff_mismatch": len({*fern.train} ^ {1, 10, 19}) + len({*fern.test} ^ {0, 8, 16}),
        "dtu_mismatch": sum(a != b for a, b in zip(dtu.train, (25, 22, 28, 40, 44, 48, 0, 8, 13), strict=True))
        + abs(len(dtu.test) - 25),
    }


def pooled_deviation(runs: Mapping[str, Sequence[float]]) -> float:
    """The standard deviation over seeds that several arms share: the root of the mean variance.

    runs: a metric's values of each seed, by arm. Raises ValueError where no arm has two seeds.
    """
    variances = [statistics.variance(values) for values in runs.values() if len(values) > 1]
    if not variances:
        raise ValueError("pooled_deviation: no arm has two seeds, so there is no spread; run more seeds.")
    return math.sqrt(statistics.fmean(variances))


def resolvable(runs: Mapping[str, Sequence[float]]) -> float:
    """The smallest gap between two single runs that says something: 95 % of equal methods' runs differ by less."""
    return SINGLE_RUNS * pooled_deviation(runs)


def rank_swaps(first: Mapping[str, float], second: Mapping[str, float]) -> int:
    """Pairs of arms that two scores, both better when higher, put in opposite orders."""
    return sum((first[a] - first[b]) * (second[a] - second[b]) < 0 for a, b in itertools.combinations(first, 2))


def psnr_of(image: Tensor, photograph: Tensor) -> float:
    """PSNR in dB of a render [H, W, 3] in 0..1, for titles."""
    return float(psnr(image.reshape(1, -1), photograph.reshape(1, -1), data_range=1.0))


def hardest(renders: Tensor, photographs: Sequence[Tensor]) -> int:
    """The number of the view with the lowest PSNR, renders [T, H, W, 3]."""
    quality = [psnr_of(image, photograph) for image, photograph in zip(renders, photographs, strict=True)]
    return quality.index(min(quality))
