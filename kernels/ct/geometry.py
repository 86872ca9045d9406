"""Scan geometries of 2-D tomography: which line each cell of each view measures.

Lengths are in mm, angles in radians. The image has its middle at the rotation axis, X to the right and Y upwards; pixel
(row r, column c) of an image [H, W] is centred at

    X = (c - (W-1)/2) pixel,    Y = ((H-1)/2 - r) pixel.

At angle b the detector's axis u points along (cos b, sin b). A point has the lateral coordinate t and, in a fan, the
depth U, its distance from the source along the central ray:

    t = X cos b + Y sin b + axis,          U = R - (X sin b - Y cos b),
    parallel beam:  u = t,                 fan beam:  u = t (R + D) / U,

with R = source_axis and D = axis_detector; for axis = 0 the source stands at R (sin b, -cos b). Cell k of K is centred
at u_k = (k - (K-1)/2) pitch + offset.

                  b = 0                      `offset` moves the detector, `axis` the rotation axis: where
     -------[ detector ]-------> u           they are zero, the central ray runs through the middle of both.
                  |                          In a parallel beam, axis = a does the same as offset = -a.
                  | D
              +---|---+                      The sketch is a fan; in a parallel beam all rays run upwards.
              | image |
              +---|---+
                  | R
                  * source
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

__all__ = ["FanBeam", "ParallelBeam"]


@dataclass(frozen=True, repr=False)
class _Beam:
    """What both geometries share."""

    angles_rad: tuple[float, ...]
    cells: int
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        name = type(self).__name__
        object.__setattr__(self, "angles_rad", _angles(name, self.angles_rad))
        object.__setattr__(self, "cells", _count(name, "cells", self.cells, "the number of detector cells"))
        object.__setattr__(self, "shape", _shape(name, self.shape))
        for field in self._lengths:
            object.__setattr__(self, field, _length(name, field, getattr(self, field)))

    def __repr__(self) -> str:
        parts = [f"{self.views} views"]
        if self.views:
            low, high = min(self.angles_rad), max(self.angles_rad)
            parts[0] += f" in {math.degrees(low):g}..{math.degrees(high):g} deg"
        parts += [f"cells={self.cells}", f"shape={self.shape}"]
        parts += [f"{name}={getattr(self, name):g}" for name in self._lengths]
        return f"{type(self).__name__}({', '.join(parts)})"

    @property
    def views(self) -> int:
        """V, the number of views."""
        return len(self.angles_rad)

    @property
    def sinogram_shape(self) -> tuple[int, int]:
        """(V, K): views, cells."""
        return self.views, self.cells

    @cached_property
    def angles(self) -> Tensor:
        """View angles in radians, [V] float64 on the CPU; shared, not to be written to."""
        return torch.tensor(self.angles_rad, dtype=torch.float64)

    @cached_property
    def cell_centres_mm(self) -> Tensor:
        """u_k in mm, [K] float64 on the CPU; shared, not to be written to."""
        k = torch.arange(self.cells, dtype=torch.float64)
        pitch, _, offset, _ = self.lengths_mm[-4:]
        return (k - (self.cells - 1) / 2) * pitch + offset

    @cached_property
    def lengths_mm(self) -> tuple[float, ...]:
        """The lengths in the order of the kernels: (R, D,) pitch, pixel, offset, axis; R and D in a fan only."""
        return tuple(getattr(self, name) for name in self._lengths)

    def subset(self, views: Iterable[int]) -> Self:
        """The same scan with only these views (indices, negative ones count from the end), in this order.

        `scan.subset(range(0, scan.views, 10))` is every tenth view. Raises IndexError for a view that is not there.
        """
        chosen = [operator.index(view) for view in views]
        for view in chosen:
            if not -self.views <= view < self.views:
                raise IndexError(
                    f"{type(self).__name__}.subset: got view {view}; expected -{self.views}..{self.views - 1}, as the "
                    f"scan has {self.views} views"
                )
        return replace(self, angles_rad=tuple(self.angles_rad[view] for view in chosen))

    @property
    def _lengths(self) -> tuple[str, ...]:
        return tuple(field.name for field in fields(self) if field.kw_only)


@dataclass(frozen=True, repr=False)
class ParallelBeam(_Beam):
    """Parallel rays: cell k of view v integrates along X cos b_v + Y sin b_v = u_k - axis (see the module's text).

    angles_rad: V view angles in radians, any order and spacing (a sequence, array or tensor). cells: K, the number of
    detector cells. shape: (H, W) of the image. pitch, pixel: widths of a cell and of a pixel, mm, above 0. offset,
    axis: shifts of the detector and of the rotation axis, mm.

    V, K, H and W may be 0. Raises ValueError or TypeError, naming the field, for a value that is not of this form.
    """

    _: KW_ONLY
    pitch: float = 1.0
    pixel: float = 1.0
    offset: float = 0.0
    axis: float = 0.0

    @classmethod
    def uniform(
        cls,
        views: int,
        cells: int,
        shape: Sequence[int],
        *,
        arc_rad: float = math.pi,
        pitch: float = 1.0,
        pixel: float = 1.0,
        offset: float = 0.0,
        axis: float = 0.0,
    ) -> Self:
        """A scan with `views` evenly spaced angles from 0 over `arc_rad` (a half turn), the end not repeated."""
        angles = _even(cls.__name__, views, arc_rad)
        return cls(angles, cells, _shape(cls.__name__, shape), pitch=pitch, pixel=pixel, offset=offset, axis=axis)

    def lines(self, view: int) -> tuple[Tensor, Tensor, Tensor]:
        """The rays X nx + Y ny = p of one view: nx, ny (a unit vector) and p in mm, [K] float64 each."""
        b, p = self.angles[view], self.cell_centres_mm - self.axis
        return b.cos().expand_as(p), b.sin().expand_as(p), p


@dataclass(frozen=True, repr=False)
class FanBeam(_Beam):
    """A point source that faces a flat detector; formulas and sketch in the module's text.

    As `ParallelBeam`, and source_axis: R, from the source to the rotation axis, mm, more than a pixel beyond the
    corner pixels' centres; axis_detector: D, from there to the detector, mm, 0 or more (0: a detector scaled to the
    rotation axis).

    Raises as ParallelBeam does, and ValueError where the source enters the circle round the image.
    """

    _: KW_ONLY
    source_axis: float
    axis_detector: float
    pitch: float = 1.0
    pixel: float = 1.0
    offset: float = 0.0
    axis: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        # a pixel weighs in up to one pixel away: nearer, a ray's line behind the source could still meet the image
        reach = self.pixel * (math.hypot(*(max(0, size - 1) for size in self.shape)) / 2 + 1)
        if not self.source_axis > reach:
            raise ValueError(
                f"FanBeam: got source_axis {self.source_axis:g} mm, which puts the source inside the circle round the "
                f"image; expected more than a pixel beyond the corner pixels' centres, {reach:.6g} mm; check that "
                f"lengths and pixel ({self.pixel:g}) are both in mm, or take fewer pixels"
            )

    @classmethod
    def uniform(
        cls,
        views: int,
        cells: int,
        shape: Sequence[int],
        *,
        source_axis: float,
        axis_detector: float,
        arc_rad: float = 2 * math.pi,
        pitch: float = 1.0,
        pixel: float = 1.0,
        offset: float = 0.0,
        axis: float = 0.0,
    ) -> Self:
        """A scan with `views` evenly spaced angles from 0 over `arc_rad` (a whole turn), the end not repeated."""
        return cls(
            _even(cls.__name__, views, arc_rad),
            cells,
            _shape(cls.__name__, shape),
            source_axis=source_axis,
            axis_detector=axis_detector,
            pitch=pitch,
            pixel=pixel,
            offset=offset,
            axis=axis,
        )

    def lines(self, view: int) -> tuple[Tensor, Tensor, Tensor]:
        """The rays X nx + Y ny = p of one view: nx, ny (a unit vector) and p in mm, [K] float64 each.

        With the fan angle g = atan(u / (R + D)): n = (cos(b - g), sin(b - g)), p = R sin g - axis cos g.
        """
        g = torch.atan(self.cell_centres_mm / (self.source_axis + self.axis_detector))
        b = self.angles[view]
        return (b - g).cos(), (b - g).sin(), self.source_axis * g.sin() - self.axis * g.cos()


def _even(owner: str, views: int, arc_rad: float) -> tuple[float, ...]:
    count = _count(owner, "views", views, "the number of views")
    arc = _length(owner, "arc_rad", arc_rad, unit="an angle in radians")
    return tuple(arc * v / count for v in range(count))


def _angles(owner: str, value: Any) -> tuple[float, ...]:
    try:
        angles = tuple(float(a) for a in (value.tolist() if hasattr(value, "tolist") else value))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{owner}: got angles_rad of type {type(value).__name__}; expected one angle in radians for each view: a "
            f"flat sequence of numbers, such as (0.0, 0.1), or {owner}.uniform(views, ...)"
        ) from error
    for view, angle in enumerate(angles):
        if not math.isfinite(angle):
            raise ValueError(
                f"{owner}: got angles_rad[{view}] = {angle}; expected finite angles in radians; drop that view"
            )
    return angles


def _count(owner: str, name: str, value: Any, meaning: str) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{owner}: got {name} = {value!r}; expected {meaning}, an integer of 0 or more; use int(...)"
        ) from None
    if count < 0:
        raise ValueError(f"{owner}: got {name} = {count}; expected {meaning}, an integer of 0 or more")
    return count


def _shape(owner: str, value: Any) -> tuple[int, int]:
    sizes = tuple(value) if isinstance(value, Iterable) else (value,)
    if len(sizes) != 2:
        raise ValueError(
            f"{owner}: got shape = {value!r}; expected (H, W), the image's rows and columns; leave batch sizes out"
        )
    return (
        _count(owner, "shape[0]", sizes[0], "the image's rows"),
        _count(owner, "shape[1]", sizes[1], "the image's columns"),
    )


_POSITIVE = ("pitch", "pixel", "source_axis")


def _length(owner: str, name: str, value: Any, unit: str = "a length in mm") -> float:
    try:
        length = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{owner}: got {name} = {value!r}; expected {unit}, one number; use float(...)") from None
    low = " above 0" if name in _POSITIVE else " of 0 or more" if name == "axis_detector" else ""
    outside = (name in _POSITIVE and length <= 0) or (name == "axis_detector" and length < 0)
    if outside or not math.isfinite(length):
        raise ValueError(f"{owner}: got {name} = {length:g}; expected {unit}, finite{low and ' and'}{low}")
    return length
