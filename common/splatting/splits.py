"""Which views train and which test: the protocols of the sparse-view papers, by index into the sorted views.

Sources: RegNeRF and the splatting papers after it (FSGS, CoR-GS, DropGaussian) for LLFF, MipNeRF-360, DTU and Blender;
the AIM 2024 challenge (SpaRe) publishes its splits as JSON.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.splatting.errors import SceneError

__all__ = ["DTU_SCANS", "SpareSplit", "Split", "blender", "choose", "dtu", "hold_out", "spare"]

DTU_SCANS = (8, 21, 30, 31, 34, 38, 40, 41, 45, 55, 63, 82, 103, 110, 114)
_DTU_TRAIN = (25, 22, 28, 40, 44, 48, 0, 8, 13)
_DTU_LEFT_OUT = (*range(3, 8), *range(16, 22), *range(36, 40))  # overexposed or turned away: PixelNeRF's list
_DTU_VIEWS = 49
_BLENDER_TRAIN = (26, 86, 2, 55, 75, 93, 16, 73, 8)
_EVERY = 8


@dataclass(frozen=True)
class Split:
    """Indices of training and test views, 0-based, none in both.

    Raises SceneError where an index occurs twice or is negative.
    """

    train: tuple[int, ...]
    test: tuple[int, ...]

    def __post_init__(self) -> None:
        both = [*self.train, *self.test]
        twice = sorted({index for index in both if both.count(index) > 1})
        if twice or min(both, default=0) < 0:
            raise SceneError(
                f"Split: indices are >= 0, each once in train or test; got train {list(self.train)}, test "
                f"{list(self.test)}{f', {twice} more than once' if twice else ''}."
            )


@dataclass(frozen=True)
class SpareSplit(Split):
    """A scene of the SpaRe benchmark: index i is camera i + 1 in file names, `dataset` is what its entry says."""

    dataset: str


def hold_out(count: int, views: int | None = None, *, every: int = _EVERY) -> Split:
    """LLFF and MipNeRF-360: every eighth view is for testing, `views` evenly spaced ones of the rest for training.

    views  None: all of the rest

    Raises SceneError where fewer views are left than asked for.
    """
    if every < 2:
        raise SceneError(f"hold_out: every {every}th view for testing leaves none for training; expected 2 or more.")
    rest = [index for index in range(count) if index % every]
    return Split(_spaced(rest, views), tuple(range(0, count, every)))


def dtu(views: int) -> Split:
    """DTU (49 views a scan): the first 1 to 9 of nine fixed views train, 25 of the others test."""
    if not 1 <= views <= len(_DTU_TRAIN):
        raise SceneError(f"dtu: {views} views; the protocol has 1 to {len(_DTU_TRAIN)} (published: 3, 6, 9).")
    taken = {*_DTU_TRAIN, *_DTU_LEFT_OUT}
    return Split(_DTU_TRAIN[:views], tuple(index for index in range(_DTU_VIEWS) if index not in taken))


def blender(views: int = 8) -> tuple[int, ...]:
    """Blender (NeRF-synthetic): ids of the training views, of 100. The test views are a file of their own."""
    if not 1 <= views <= len(_BLENDER_TRAIN):
        raise SceneError(f"blender: {views} views; the protocol lists {len(_BLENDER_TRAIN)} (published: 8).")
    return _BLENDER_TRAIN[:views]


def spare(path: str | Path) -> dict[str, SpareSplit]:
    """The splits of all scenes in a SpaRe/AIM 2024 file such as `Track1_split_test.json`, by scene name.

    Raises FileNotFoundError, and SceneError where the file is no such split.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such split file; the benchmark's are named Track1_split_test.json or alike."
        )
    try:
        scenes = json.loads(path.read_text(encoding="utf-8"))
        return {
            name: SpareSplit(
                tuple(map(int, entry["input_views"])), tuple(map(int, entry["test_views"])), entry["dataset"]
            )
            for name, entry in scenes.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SceneError(
            f"{path}: not a SpaRe split ({type(error).__name__}: {error}); expected a JSON object of scenes, each with "
            "input_views, test_views and dataset."
        ) from error


def choose(
    names: Sequence[str],
    *,
    views: int | None = None,
    train: Sequence[int | str] | None = None,
    test: Sequence[int | str] | None = None,
) -> Split:
    """Training and test views among `names`, by index or by name (with or without folder and suffix).

    Neither given: `hold_out`. Only one given: the other is the rest. `views` thins the training views to so many
    evenly spaced ones, if they were not given themselves.

    Raises SceneError for an unknown or repeated view, or both `views` and `train`.
    """
    if train is not None and views is not None:
        raise SceneError(f"train names {len(train)} views and views asks for {views}; give one of them.")
    if train is None and test is None:
        return hold_out(len(names), views)
    chosen_test = None if test is None else [_index(names, which) for which in test]
    if train is not None:
        chosen = [_index(names, which) for which in train]
        rest = [index for index in range(len(names)) if index not in chosen]
        return Split(tuple(chosen), tuple(rest if chosen_test is None else chosen_test))
    held = chosen_test or []
    return Split(_spaced([index for index in range(len(names)) if index not in held], views), tuple(held))


def _spaced(rest: list[int], views: int | None) -> tuple[int, ...]:
    if views is None:
        return tuple(rest)
    if not 1 <= views <= len(rest):
        raise SceneError(f"{views} training views asked for, but {len(rest)} are there besides the test views.")
    return tuple(rest[int(place)] for place in np.round(np.linspace(0, len(rest) - 1, views)))


def _index(names: Sequence[str], which: int | str) -> int:
    if isinstance(which, int):
        if 0 <= which < len(names):
            return which
        raise SceneError(f"view {which}: there are {len(names)} views, 0 to {len(names) - 1}.")
    found = [i for i, name in enumerate(names) if which in _spellings(name)]
    if len(found) == 1:
        return found[0]
    near = difflib.get_close_matches(which, names, n=1, cutoff=0) or [""]
    story = f"{len(found)} views are called so, say which with its folder" if found else f"did you mean {near[0]!r}?"
    raise SceneError(f"view {which!r}: {story} ({len(names)} views, sorted by name)")


def _spellings(name: str) -> set[str]:
    path = Path(name)
    return {name, path.with_suffix("").as_posix(), path.name, path.stem}
