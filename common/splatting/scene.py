"""What a splatting run is given: posed views for training and for testing, and coloured points to start from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from common.splatting.cameras import Camera
from common.splatting.errors import SceneError

__all__ = ["PointCloud", "Scene", "View"]

EXTENT_MARGIN = 1.1  # of 3DGS


@dataclass(frozen=True, eq=False)
class View:
    """One photograph with its camera.

    name     unique within a scene; the file's name where it comes from a file
    image    [H, W, 3] float32, 0..1
    mask     [H, W] float32, 0..1: how much of the pixel is the object (alpha), or None
    depth    [H, W] float32, along the optical axis in world units, 0 where there is no surface, or None
    normals  [H, W, 3] float32 in world axes, unit length and towards the camera, 0 where no surface, or None

    Raises SceneError where a shape or dtype does not fit.
    """

    name: str
    camera: Camera
    image: Tensor
    mask: Tensor | None = None
    depth: Tensor | None = None
    normals: Tensor | None = None

    def __post_init__(self) -> None:
        size = (self.camera.height, self.camera.width)
        for field, shape in (("image", (*size, 3)), ("mask", size), ("depth", size), ("normals", (*size, 3))):
            value = getattr(self, field)
            if value is not None and (tuple(value.shape) != shape or value.dtype != torch.float32):
                raise SceneError(
                    f"view {self.name}: {field} is float32 {list(shape)} for its camera; got {value.dtype} "
                    f"{list(value.shape)}. Resize the image, or the camera by Camera.resized."
                )

    def to(self, device: torch.device | str) -> View:
        """The same view with its tensors on `device`."""
        moved = {name: value.to(device) for name, value in self._tensors().items()}
        return replace(self, camera=self.camera.to(device), **moved)

    def resized(self, width: int, height: int) -> View:
        """The view at another size: image and mask by area means, depth and normals by the nearest pixel.

        Area means fit shrinking; enlarging repeats pixels.
        """
        changed = {}
        for name, value in self._tensors().items():
            planes = value.reshape(*value.shape[:2], -1).movedim(-1, 0)[None]  # [1, C, H, W]
            mode = "area" if name in ("image", "mask") else "nearest-exact"
            small = F.interpolate(planes, size=(height, width), mode=mode)
            changed[name] = small[0].movedim(0, -1).reshape(height, width, *value.shape[2:]).contiguous()
        return replace(self, camera=self.camera.resized(width, height), **changed)

    def _tensors(self) -> dict[str, Tensor]:
        named = {name: getattr(self, name) for name in ("image", "mask", "depth", "normals")}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True, eq=False)
class PointCloud:
    """Coloured points, and, where it is known, which views saw them.

    positions   [P, 3] float32, world
    colors      [P, 3] float32, 0..1
    normals     [P, 3] float32, unit length, or None
    view_names  the V views of `seen`
    seen        [P, V] bool: whether view v saw point p (its track), or None
    """

    positions: Tensor
    colors: Tensor
    normals: Tensor | None = None
    view_names: tuple[str, ...] = ()
    seen: Tensor | None = None

    def __post_init__(self) -> None:
        points = len(self.positions)
        for name in ("positions", "colors", "normals"):
            value = getattr(self, name)
            if value is not None and (tuple(value.shape) != (points, 3) or value.dtype != torch.float32):
                raise SceneError(
                    f"PointCloud: {name} is float32 [P, 3], P = {points}; got {value.dtype} {list(value.shape)}."
                )
        if not torch.isfinite(self.positions).all():
            raise SceneError("PointCloud: positions hold NaN or Inf; leave these points out.")
        if self.seen is not None and (
            tuple(self.seen.shape) != (points, len(self.view_names)) or self.seen.dtype != torch.bool
        ):
            raise SceneError(
                f"PointCloud: seen is bool [{points}, {len(self.view_names)}] (points, view_names); got "
                f"{self.seen.dtype} {list(self.seen.shape)}."
            )

    def __len__(self) -> int:
        return len(self.positions)

    def select(self, which: Tensor) -> PointCloud:
        """The points of a bool mask [P], or at some indices."""
        taken = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "view_names"}
        return replace(self, **{name: value[which] for name, value in taken.items() if value is not None})

    def seen_by(self, views: Iterable[str], *, at_least: int = 2) -> PointCloud:
        """The points that `at_least` of the named views saw; of their tracks, only these views are kept.

        With two, no other view was needed to find the point.

        Raises SceneError where the tracks are not known or a name is not among view_names.
        """
        if self.seen is None:
            raise SceneError("PointCloud.seen_by: these points have no tracks, so who saw them is not known.")
        wanted = list(dict.fromkeys(views))
        unknown = [name for name in wanted if name not in self.view_names]
        if unknown:
            raise SceneError(f"PointCloud.seen_by: no view {unknown[0]!r}; the points know {list(self.view_names)}.")
        columns = [self.view_names.index(name) for name in wanted]
        known = replace(self, view_names=tuple(wanted), seen=self.seen[:, columns])
        return known.select(self.seen[:, columns].sum(dim=1) >= at_least)

    def to(self, device: torch.device | str) -> PointCloud:
        """The same points on `device`."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "view_names"}
        return replace(self, **{name: value.to(device) for name, value in tensors.items() if value is not None})


@dataclass(frozen=True, eq=False)
class Scene:
    """Training and test views of one place, with points to start from.

    name          for records and error messages
    train, test   views; no name is in both
    points        what the training views alone say about the geometry, or None
    background    [3] float32, 0..1: the colour behind the scene, or None where the views show none
    allow_single  a single training view is accepted

    Raises SceneError for fewer than two training views (one with allow_single), a name that occurs twice, and an empty
    point cloud.
    """

    name: str
    train: tuple[View, ...]
    test: tuple[View, ...] = ()
    points: PointCloud | None = None
    background: Tensor | None = None
    allow_single: bool = False

    def __post_init__(self) -> None:
        if len(self.train) < (1 if self.allow_single else 2):
            raise SceneError(
                f"scene {self.name}: {len(self.train)} training views, expected 2 or more: one view does not show depth"
                f"{'.' if not self.train else '. To load it all the same, pass allow_single=True.'}"
            )
        names = [view.name for view in (*self.train, *self.test)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise SceneError(
                f"scene {self.name}: view {twice[0]!r} occurs twice ({len(twice)} such names); training and test views "
                "must not share one."
            )
        if self.points is not None and len(self.points) == 0:
            raise SceneError(f"scene {self.name}: the point cloud is empty; expected points, or None.")
        if self.background is not None and tuple(self.background.shape) != (3,):
            raise SceneError(f"scene {self.name}: background is [3]; got {list(self.background.shape)}.")

    @cached_property
    def extent(self) -> float:
        """1.1 times the largest distance of a training camera from their mean (3DGS): the scene's unit of length.

        0 for a single view.
        """
        centers = torch.stack([view.camera.center for view in self.train])
        return EXTENT_MARGIN * float((centers - centers.mean(dim=0)).norm(dim=1).max())

    def to(self, device: torch.device | str) -> Scene:
        """The same scene on `device`."""
        return replace(
            self,
            train=tuple(view.to(device) for view in self.train),
            test=tuple(view.to(device) for view in self.test),
            points=None if self.points is None else self.points.to(device),
            background=None if self.background is None else self.background.to(device),
        )

    def shrunk(self, factor: float) -> Scene:
        """The scene with all images smaller by `factor` >= 1 (sizes are rounded)."""
        if not factor >= 1:
            raise SceneError(f"scene {self.name}: shrunk takes a factor >= 1; got {factor}.")
        if factor == 1:
            return self
        train, test = (
            tuple(view.resized(round(view.camera.width / factor), round(view.camera.height / factor)) for view in views)
            for views in (self.train, self.test)
        )
        return replace(self, train=train, test=test)
