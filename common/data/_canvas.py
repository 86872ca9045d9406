"""Drawing many random slices at once: seeded draws, antialiased superellipses, smooth noise.

Axes: every tensor is [N, H, W], one slice an entry; x runs to the right, y up, both in mm from the middle. A shape's
parameters are scalars or [N], so that one call draws the same organ, differently, into every slice.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Parameter = float | Tensor  # a scalar or [N]


class Draws:
    """Random numbers, one independent stream a slice.

    Slice i of (kind, seed) is the same whatever the count and the size: images of more slices, or of finer pixels,
    show the same anatomy.
    """

    def __init__(self, kind: str, slices: Iterable[int], seed: int):
        tag = zlib.crc32(kind.encode())
        self._streams = [np.random.Generator(np.random.PCG64([seed, tag, index])) for index in slices]

    def __len__(self) -> int:
        return len(self._streams)

    def uniform(self, low: float, high: float) -> Tensor:
        """[N] in [low, high)."""
        return torch.tensor([stream.uniform(low, high) for stream in self._streams], dtype=torch.float32)

    def chance(self, probability: float) -> Tensor:
        """[N] of 0 and 1."""
        return (self.uniform(0, 1) < probability).float()

    def normal(self, *shape: int) -> Tensor:
        """[N, *shape] standard normal."""
        return torch.from_numpy(np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in self._streams]))


class Canvas:
    """N images in HU under construction, `fov_mm` wide and high, with `size` pixels a side.

    `warp_mm` bends the coordinates by a smooth random field of that size (standard deviation), so that all outlines
    drawn afterwards are a little irregular, together, as neighbouring organs are.
    """

    def __init__(self, draws: Draws, size: int, fov_mm: float, background_hu: float, warp_mm: float):
        self.draws, self.size, self.fov_mm = draws, size, fov_mm
        self.pixel_mm = fov_mm / size
        axis = (torch.arange(size, dtype=torch.float32) - (size - 1) / 2) * self.pixel_mm
        bend = self.noise(fov_mm / 5, channels=2) * warp_mm
        self.x = axis + bend[:, 0]
        self.y = -axis[:, None] + bend[:, 1]
        self.hu = torch.full((len(draws), size, size), float(background_hu))

    def place(self, rotation_rad: Parameter, shift_x_mm: Parameter, shift_y_mm: Parameter) -> None:
        """Turn and shift the patient: later shapes are given in the patient's own axes."""
        self.x, self.y = _turned(self.x - _column(shift_x_mm), self.y - _column(shift_y_mm), rotation_rad)

    def noise(self, scale_mm: float, channels: int = 0) -> Tensor:
        """Smooth noise of unit variance and correlation length about `scale_mm`: [N, H, W] or [N, channels, H, W]."""
        knots = max(4, math.ceil(self.fov_mm / scale_mm) + 1)
        coarse = self.draws.normal(max(channels, 1), knots, knots)
        fine = F.interpolate(
            coarse, size=(self.size, self.size), mode="bicubic", align_corners=False, antialias=knots > self.size
        )
        fine = fine / 0.75  # bicubic interpolation of white noise loses about a quarter of its deviation
        return fine if channels else fine[:, 0]

    def ellipse(
        self,
        x_mm: Parameter,
        y_mm: Parameter,
        a_mm: Parameter,
        b_mm: Parameter,
        *,
        angle_rad: Parameter = 0.0,
        power: float = 2.0,
        wobble: Sequence[tuple[int, Parameter, Parameter]] = (),
    ) -> Tensor:
        """Coverage [N, H, W] in [0, 1] of superellipses |x/a|^p + |y/b|^p <= 1, antialiased over one pixel.

        `wobble`: (order, amplitude, phase) terms that scale the radius by 1 + amplitude cos(order * angle + phase).
        Semi-axes below half a pixel are drawn half a pixel wide and fainter: their area grows by less than a fifth.
        """
        half_pixel = self.pixel_mm / 2
        a, b = _column(a_mm), _column(b_mm)
        wide_a, wide_b = a.clamp_min(half_pixel), b.clamp_min(half_pixel)
        fade = (a.clamp_min(0) / wide_a) * (b.clamp_min(0) / wide_b)
        x, y = _turned(self.x - _column(x_mm), self.y - _column(y_mm), angle_rad)
        u, v = x / wide_a, y / wide_b
        if power == 2.0:
            radius = torch.sqrt(u * u + v * v).clamp_min(1e-6)
            slope = torch.sqrt((u / wide_a) ** 2 + (v / wide_b) ** 2) / radius
        else:
            u_p, v_p = u.abs() ** (power - 1), v.abs() ** (power - 1)
            total = (u_p * u.abs() + v_p * v.abs()).clamp_min(1e-9)
            radius = total ** (1 / power)
            slope = torch.sqrt((u_p / wide_a) ** 2 + (v_p / wide_b) ** 2) * radius / total
        level = torch.ones(())
        if wobble:
            theta = torch.atan2(v, u)
            for order, amplitude, phase in wobble:
                level = level + _column(amplitude) * torch.cos(order * theta + _column(phase))
        # first-order distance to the outline, positive inside; the slope never vanishes away from the middle
        inside_mm = (level - radius) / slope.clamp_min(1e-6)
        return (inside_mm / self.pixel_mm + 0.5).clamp(0, 1) * fade

    def ring_of(self, outer: Tensor, inner: Tensor) -> Tensor:
        """Coverage of what lies in `outer` but not in `inner`."""
        return (outer - inner).clamp_min(0)

    def band(self, field: Tensor, half_width: Parameter) -> Tensor:
        """Soft coverage [N, H, W] of |field| < half_width: thin winding lines where the field is smooth noise."""
        half_width = _column(half_width)
        return (1.5 - field.abs() / half_width).clamp(0, 1)

    def paint(self, coverage: Tensor, hu: Parameter | Tensor) -> None:
        """Put a material of `hu` (scalar, [N] or [N, H, W]) over what is there."""
        value = hu if isinstance(hu, Tensor) and hu.ndim == 3 else _column(hu)
        self.hu = self.hu + coverage * (value - self.hu)


def _column(parameter: Parameter) -> Tensor:
    """Scalar -> [], [N] -> [N, 1, 1]."""
    tensor = torch.as_tensor(parameter, dtype=torch.float32)
    return tensor[:, None, None] if tensor.ndim == 1 else tensor


def _turned(x: Tensor, y: Tensor, angle_rad: Parameter) -> tuple[Tensor, Tensor]:
    """Coordinates in axes turned by `angle_rad` (counter-clockwise)."""
    if isinstance(angle_rad, float) and angle_rad == 0.0:
        return x, y
    angle = _column(angle_rad)
    c, s = torch.cos(angle), torch.sin(angle)
    return c * x + s * y, c * y - s * x
