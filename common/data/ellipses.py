"""Phantoms made of ellipses, with exact line integrals: the oracle for projectors and reconstructions.

Axes and angles as in kernels.ct: x to the right, y up, lengths in mm, attenuation in 1/mm; view angle b in radians.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Ellipses", "shepp_logan"]


@dataclass(frozen=True)
class Ellipses:
    """A sum of constant ellipses. Each row of `rows`: (density 1/mm, a_mm, b_mm, x_mm, y_mm, angle_rad).

    a is the semi-axis along x before the turn by angle_rad (counter-clockwise); densities add where ellipses overlap.
    """

    rows: tuple[tuple[float, float, float, float, float, float], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != 6 or not (row[1] > 0 and row[2] > 0):
                raise ValueError(f"an ellipse is (density, a > 0, b > 0, x, y, angle); got {row}")

    def image(self, shape: tuple[int, int], pixel_mm: float, *, supersample: int = 4) -> Tensor:
        """Pixel means [H, W] float64 in 1/mm from `supersample`^2 points a pixel; (0, 0) is the middle of the image."""
        if supersample < 1:
            raise ValueError(f"supersample counts points along a pixel side, at least 1; got {supersample}")
        height, width = shape
        step = pixel_mm / supersample
        x = (torch.arange(width * supersample, dtype=torch.float64) - (width * supersample - 1) / 2) * step
        y = -(torch.arange(height * supersample, dtype=torch.float64) - (height * supersample - 1) / 2) * step
        fine = torch.zeros(len(y), len(x), dtype=torch.float64)
        for density, a, b, x0, y0, angle in self.rows:
            u, v = _turned(x[None, :] - x0, y[:, None] - y0, angle)
            fine += density * ((u / a) ** 2 + (v / b) ** 2 <= 1).double()
        return fine.reshape(height, supersample, width, supersample).mean(dim=(1, 3))

    def line_integrals(self, point_mm: Tensor, direction: Tensor) -> Tensor:
        """Exact integrals along whole lines: through point_mm [..., 2], along direction [..., 2]; no unit, float64.

        In the ellipse's own axes scaled to a unit circle the chord is 2 sqrt(|d|^2 - (p x d)^2) / |d|^2 times the
        length of the direction before scaling.
        """
        p, d = point_mm.double(), direction.double()
        length = d.norm(dim=-1)
        total = torch.zeros(torch.broadcast_shapes(p.shape, d.shape)[:-1], dtype=torch.float64)
        for density, a, b, x0, y0, angle in self.rows:
            px, py = _turned(p[..., 0] - x0, p[..., 1] - y0, angle)
            dx, dy = _turned(d[..., 0], d[..., 1], angle)
            px, py, dx, dy = px / a, py / b, dx / a, dy / b
            square = dx * dx + dy * dy
            inside = (square - (px * dy - py * dx) ** 2).clamp_min(0)
            total += density * length * 2 * torch.sqrt(inside) / square
        return total

    def parallel(
        self,
        angles_rad: Sequence[float],
        cells: int,
        *,
        pitch_mm: float = 1.0,
        offset_mm: float = 0.0,
        axis_mm: float = 0.0,
    ) -> Tensor:
        """Parallel-beam sinogram [V, K] float64 at the cell centres: u = x cos b + y sin b + axis_mm."""
        cos, sin, u = _views(angles_rad, cells, pitch_mm, offset_mm)
        t = u - axis_mm
        point = torch.stack([t * cos, t * sin], dim=-1)
        return self.line_integrals(point, torch.stack([-sin, cos], dim=-1))

    def fan(
        self,
        angles_rad: Sequence[float],
        cells: int,
        *,
        source_axis_mm: float,
        axis_detector_mm: float,
        pitch_mm: float = 1.0,
        offset_mm: float = 0.0,
        axis_mm: float = 0.0,
    ) -> Tensor:
        """Fan-beam sinogram [V, K] float64 for a flat detector, at the cell centres.

        The source is at lateral coordinate 0, i.e. at R (sin b, -cos b) - axis_mm (cos b, sin b). Lines are taken to
        be infinite, so the phantom must lie between source and detector.
        """
        cos, sin, u = _views(angles_rad, cells, pitch_mm, offset_mm)
        source = torch.stack([source_axis_mm * sin - axis_mm * cos, -source_axis_mm * cos - axis_mm * sin], dim=-1)
        lateral = u - axis_mm
        cell = torch.stack([lateral * cos - axis_detector_mm * sin, lateral * sin + axis_detector_mm * cos], dim=-1)
        return self.line_integrals(source.expand_as(cell), cell - source)


def shepp_logan(radius_mm: float = 1.0, *, scale_per_mm: float = 1.0, modified: bool = True) -> Ellipses:
    """The Shepp-Logan head phantom inside a square of half-width `radius_mm`.

    modified=True has Toft's densities (skull 1, brain 0.2: visible at full range), False those of Shepp and Logan
    1974 (skull 2, brain 1.02); both are multiplied by `scale_per_mm`.
    """
    rows = [
        (
            scale_per_mm * (toft if modified else original),
            a * radius_mm,
            b * radius_mm,
            x * radius_mm,
            y * radius_mm,
            float(torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))),
        )
        for toft, original, a, b, x, y, degrees in _SHEPP_LOGAN
    ]
    return Ellipses(tuple(rows))


# Toft's density, Shepp and Logan's, semi-axes a and b, centre x and y, degrees
_SHEPP_LOGAN = (
    (1.0, 2.0, 0.69, 0.92, 0.0, 0.0, 0.0),
    (-0.8, -0.98, 0.6624, 0.874, 0.0, -0.0184, 0.0),
    (-0.2, -0.02, 0.11, 0.31, 0.22, 0.0, -18.0),
    (-0.2, -0.02, 0.16, 0.41, -0.22, 0.0, 18.0),
    (0.1, 0.01, 0.21, 0.25, 0.0, 0.35, 0.0),
    (0.1, 0.01, 0.046, 0.046, 0.0, 0.1, 0.0),
    (0.1, 0.01, 0.046, 0.046, 0.0, -0.1, 0.0),
    (0.1, 0.01, 0.046, 0.023, -0.08, -0.605, 0.0),
    (0.1, 0.01, 0.023, 0.023, 0.0, -0.606, 0.0),
    (0.1, 0.01, 0.023, 0.046, 0.06, -0.605, 0.0),
)


def _views(angles_rad: Sequence[float], cells: int, pitch_mm: float, offset_mm: float) -> tuple[Tensor, Tensor, Tensor]:
    """cos, sin of the views and centres of the cells, each [V, K]."""
    angles = torch.as_tensor(angles_rad, dtype=torch.float64)[:, None]
    u = (torch.arange(cells, dtype=torch.float64) - (cells - 1) / 2) * pitch_mm + offset_mm
    cos, sin, u = torch.broadcast_tensors(torch.cos(angles), torch.sin(angles), u[None, :])
    return cos, sin, u


def _turned(x: Tensor, y: Tensor, angle_rad: float) -> tuple[Tensor, Tensor]:
    angle = torch.tensor(angle_rad, dtype=torch.float64)
    return torch.cos(angle) * x + torch.sin(angle) * y, torch.cos(angle) * y - torch.sin(angle) * x
