"""The registered real scenes by name, with the split of the papers that use them. Data: `common.data`."""

from __future__ import annotations

from collections.abc import Sequence

from common import data
from common.splatting.colmap import load_colmap
from common.splatting.llff import load_llff
from common.splatting.scene import Scene
from common.splatting.transforms import WHITE, load_blender

__all__ = ["brighton", "chair", "fern"]


def fern(*, views: int | None = 3, factor: float = 8) -> Scene:
    """LLFF's fern, forward-facing: 3 test views, `views` of the other 17 for training (published: 3, 6, 9).

    factor  8: 504 x 378, 4: 1008 x 756 as published; others >= 4 are resampled from these

    The points are those of a model of all views whose track has two training views: 1256 of 6271 at three views.
    Raises common.data.MissingData where the set cannot be had.
    """
    stored = 8 if factor >= 8 else 4
    return load_llff(data.path("scene_fern_llff"), factor=stored, views=views).shrunk(factor / stored)


def chair(*, views: int | None = 8, factor: float = 2, background: Sequence[float] = WHITE) -> Scene:
    """The chair of NeRF-synthetic: 25 test views, `views` training views of the published ids (None: all 100).

    factor  of the rendered 800 x 800; the set here is stored at 2, 400 x 400

    Raises common.data.MissingData where the set cannot be had.
    """
    return load_blender(data.path("scene_chair_blender"), views=views, background=background, factor=factor / 2)


def brighton(*, views: int | None = None, factor: float = 1) -> Scene:
    """Brighton Beach from a drone, looking down: every eighth of 18 photographs tests, 993 x 558 at factor 1.

    Raises common.data.MissingData where the set cannot be had.
    """
    return load_colmap(data.path("scene_brighton_drone"), views=views, factor=factor)
