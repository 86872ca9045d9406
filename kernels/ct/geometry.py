"""Scan geometries of 2-D tomography: which line each cell of each view measures.

Lengths are in mm. The image has its centre at the origin, X to the right and Y upwards: pixel (row r, column c) of an
image [H, W] lies at

    X = (c - (W-1)/2) pixel,    Y = ((H-1)/2 - r) pixel.

At angle b the detector's axis u points along (cos b, sin b). A point has the lateral coordinate t and, in a fan, the
depth U, its distance from the source along the central ray:

    t = X cos b + Y sin b + axis,          U = R - (X sin b - Y cos b),
    parallel beam:  u = t,                 fan beam:  u = t (R + D) / U,

with R = source_axis and D = axis_detector; for axis = 0 the source stands at R (sin b, -cos b). Cell k of K is centred at
u_k = (k - (K-1)/2) pitch + offset. `offset` moves the detector; `axis` is where the rotation axis stands beside the
central ray (in a parallel beam, axis = -offset does the same).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor


class _Beam:
    """What both geometries share."""

    angles_rad: tuple[float, ...]
    cells: int
    shape: tuple[int, int]
    pitch: float
    pixel: float
    offset: float
    axis: float

    def __post_init__(self) -> None:
        name = type(self).__name__
        angles = tuple(float(a) for a in self.angles_rad)
        if not all(map(math.isfinite, angles)):
            bad = next(i for i, a in enumerate(angles) if not math.isfinite(a))
            raise ValueError(f"{name}: angles_rad[{bad}] is {angles[bad]}, expected finite angles in radians")
        object.__setattr__(self, "angles_rad", angles)
        shape = tuple(self.shape)
        if len(shape) != 2 or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise ValueError(f"{name}: got shape {self.shape!r}, expected the image's (H, W), two integers >= 0")
        object.__setattr__(self, "shape", shape)
        if not isinstance(self.cells, int) or self.cells < 0:
            raise ValueError(
                f"{name}: got cells {self.cells!r}, expected the number of detector cells, an integer >= 0"
            )
        for field in self._lengths:
            value = float(getattr(self, field))
            if not math.isfinite(value) or (field in ("pitch", "pixel") and value <= 0):
                rule = "a length in mm > 0" if field in ("pitch", "pixel") else "a finite length in mm"
                raise ValueError(f"{name}: got {field} {getattr(self, field)!r}, expected {rule}")
            object.__setattr__(self, field, value)

    @property
    def views(self) -> int:
        """V, the number of views."""
        return len(self.angles_rad)

    @property
    def sinogram_shape(self) -> tuple[int, int]:
        """(V, K)."""
        return self.views, self.cells

    @cached_property
    def angles(self) -> Tensor:
        """Angles in radians, [V] float64 on the CPU."""
        return torch.tensor(self.angles_rad, dtype=torch.float64)

    @cached_property
    def cell_centres(self) -> Tensor:
        """u_k in mm, [K] float64 on the CPU."""
        k = torch.arange(self.cells, dtype=torch.float64)
        return (k - (self.cells - 1) / 2) * self.pitch + self.offset

    def subset(self, views: Iterable[int]) -> Self:
        """The same scan with only these views, in this order: sparse views of a full scan."""
        return replace(self, angles_rad=tuple(self.angles_rad[v] for v in views))  # type: ignore[type-var]


@dataclass(frozen=True)
class ParallelBeam(_Beam):
    """Parallel rays; formulas in the module's docstring.

    angles_rad: V view angles in radians, any order and spacing. cells: K detector cells. shape: (H, W) of the image.
    pitch, pixel: widths of a cell and of a pixel, mm. offset, axis: shifts of detector and rotation axis, mm.

    Raises ValueError for values that are not finite, not positive where they must be, or of the wrong form.
    """

    angles_rad: tuple[float, ...]
    cells: int
    shape: tuple[int, int]
    pitch: float = 1.0
    pixel: float = 1.0
    offset: float = 0.0
    axis: float = 0.0

    _lengths = ("pitch", "pixel", "offset", "axis")

    @classmethod
    def uniform(
        cls, views: int, cells: int, shape: Sequence[int], *, arc_rad: float = math.pi, **lengths: float
    ) -> Self:
        """`views` evenly spaced angles over `arc_rad`, the end not repeated."""
        return cls(tuple(arc_rad * v / views for v in range(views)), cells, tuple(shape), **lengths)  # type: ignore[arg-type]

    def rays(self, view: int) -> tuple[Tensor, Tensor]:
        """The lines X cos φ + Y sin φ = p of one view: φ in radians and p in mm, [K] float64 each."""
        p = self.cell_centres - self.axis
        return torch.full_like(p, self.angles_rad[view]), p


@dataclass(frozen=True)
class FanBeam(_Beam):
    """A point source and a flat detector; formulas in the module's docstring.

    As `ParallelBeam`, and: source_axis: R, from source to rotation axis, mm; axis_detector: D, from there to the
    detector, mm (0: a detector scaled to the rotation axis).

    Raises ValueError as ParallelBeam does, and if the source would enter the circle around the image.
    """

    angles_rad: tuple[float, ...]
    cells: int
    shape: tuple[int, int]
    source_axis: float
    axis_detector: float
    pitch: float = 1.0
    pixel: float = 1.0
    offset: float = 0.0
    axis: float = 0.0

    _lengths = ("pitch", "pixel", "offset", "axis", "source_axis", "axis_detector")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source_axis <= 0 or self.axis_detector < 0:
            raise ValueError(
                f"FanBeam: got source_axis {self.source_axis} and axis_detector {self.axis_detector}, expected a distance "
                "in mm > 0 and one >= 0"
            )
        reach = math.hypot(*self.shape) / 2 * self.pixel
        if self.source_axis <= reach:
            raise ValueError(
                f"FanBeam: the source, {self.source_axis} mm from the axis, enters the circle around the image, of radius "
                f"{reach:.6g} mm; expected source_axis to be larger, or fewer or smaller pixels"
            )

    @classmethod
    def uniform(
        cls, views: int, cells: int, shape: Sequence[int], *, arc_rad: float = 2 * math.pi, **lengths: float
    ) -> Self:
        """`views` evenly spaced angles over `arc_rad`, the end not repeated; `lengths` holds at least the distances."""
        return cls(tuple(arc_rad * v / views for v in range(views)), cells, tuple(shape), **lengths)  # type: ignore[arg-type]

    def rays(self, view: int) -> tuple[Tensor, Tensor]:
        """The lines X cos φ + Y sin φ = p of one view: φ in radians and p in mm, [K] float64 each.

        With the fan angle γ = atan(u / (R + D)): φ = b - γ, p = R sin γ - axis cos γ.
        """
        gamma = torch.atan(self.cell_centres / (self.source_axis + self.axis_detector))
        return self.angles_rad[view] - gamma, self.source_axis * gamma.sin() - self.axis * gamma.cos()
