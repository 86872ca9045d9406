"""A category with exact truth: chairs of random parts, sizes and fabrics, each in the unit ball around the origin."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from common import seeds
from common.splatting import Camera, intrinsics, look_at
from common.splatting.raycast import Shape, Texture, World

DISTANCE, FOV_RAD = 3.0, 0.62  # of the cameras: chairs just fit
LOW, HIGH = 0.17, 0.6  # how high cameras stand, radians
LAMPS = ((-3.0, -3.0, 5.0), (4.0, -2.0, 4.0), (0.5, 4.0, 6.0))
WAVES = 8
PATTERNS = ("plain", "stripes", "checker", "waves")


def chair(number: int) -> World:
    """The chair of that number, turned about the vertical by a random angle, in front of white.

    Seat, back (a panel, or two posts and bars), four legs, and arm rests on every second one or so. Front is where the
    back is not; there is no common orientation, as there is none in CO3D.
    """
    draw = seeds.generator(number, "chair")
    turn = _about_z(2 * math.pi * _number(draw))
    fabric, wood = _fabric(draw), _wood(draw)
    half_x, half_y = _between(draw, 0.34, 0.5), _between(draw, 0.32, 0.44)
    thick, seat = _between(draw, 0.045, 0.08), _between(draw, -0.2, -0.02)  # of the seat: half thickness, height of top
    shapes = []

    def part(kind: str, x: float, y: float, z: float, half: tuple[float, float, float], look: Texture, lean: float = 0):
        center = torch.tensor([x, y, z], dtype=torch.float64) @ turn
        axes = _about_x(lean) @ turn
        shapes.append(Shape(kind, center, torch.tensor(half, dtype=torch.float64), axes, look))  # pyright: ignore[reportArgumentType]

    part("box", 0, 0, seat - thick, (half_x, half_y, thick), fabric)
    floor, leg = -0.72, _between(draw, 0.045, 0.065)
    height = (seat - 2 * thick - floor) / 2
    kind = "box" if _number(draw) < 0.5 else "cylinder"
    for x in (-1, 1):
        for y in (-1, 1):
            part(kind, x * (half_x - leg), y * (half_y - leg), floor + height, (leg, leg, height), wood)

    back, lean = _between(draw, 0.24, 0.36), _between(draw, 0.0, 0.15)
    y, z = half_y - 0.06 + back * math.sin(lean), seat + back * math.cos(lean)
    if _number(draw) < 0.6:
        part("box", 0, y, z, (half_x, 0.05, back), fabric, lean)
    else:
        for x in (-1, 1):
            part(kind, x * (half_x - leg), y, z, (leg, leg, back), wood, lean)
        for share in (0.75, 0.0):
            place = y + share * back * math.sin(lean), z + share * back * math.cos(lean)
            part("box", 0, *place, (half_x, 0.04, 0.25 * back), fabric, lean)
    if _number(draw) < 0.5:
        rest = _between(draw, 0.11, 0.15)
        for x in (-1, 1):
            part("box", x * (half_x - 0.05), 0, seat + 2 * rest, (0.05, half_y - 0.02, 0.035), wood)
            part(kind, x * (half_x - 0.05), 0.1 - half_y, seat + rest, (0.04, 0.04, rest), wood)
    lamps = torch.tensor(LAMPS, dtype=torch.float64)
    return World(tuple(shapes), lamps, torch.ones(3))


def camera(around_rad: float, height_rad: float, size: int) -> Camera:
    """A camera that looks at the origin from that azimuth and elevation."""
    flat = DISTANCE * math.cos(height_rad)
    eye = (flat * math.cos(around_rad), flat * math.sin(around_rad), DISTANCE * math.sin(height_rad))
    return look_at(eye, (0, 0, 0), (0, 0, 1), intrinsics(size, size, fov_x_rad=FOV_RAD), size, size)


def anywhere(count: int, size: int, draw: torch.Generator) -> list[Camera]:
    """Cameras at random azimuths and heights."""
    return [camera(2 * math.pi * _number(draw), _between(draw, LOW, HIGH), size) for _ in range(count)]


def inputs(count: int, size: int, draw: torch.Generator) -> list[Camera]:
    """Cameras 90 to 130 degrees apart, beginning anywhere: fewer are the first of more."""
    around, found = 2 * math.pi * _number(draw), []
    for _ in range(count):
        found.append(camera(around, _between(draw, LOW, HIGH), size))
        around += math.radians(_between(draw, 90, 130))
    return found


def all_around(count: int, size: int, draw: torch.Generator) -> list[Camera]:
    """Cameras at even azimuths and random heights."""
    start = _number(draw)
    return [camera(2 * math.pi * (i + start) / count, _between(draw, LOW, HIGH), size) for i in range(count)]


def _fabric(draw: torch.Generator) -> Texture:
    """A colour with a pattern in a second one."""
    pattern = PATTERNS[int(len(PATTERNS) * _number(draw))]
    first, second = (torch.rand(3, generator=draw, dtype=torch.float64) for _ in range(2))
    first = 0.15 + 0.75 * first
    second = torch.where(first.mean() < 0.5, 0.55 + 0.4 * second, 0.4 * second)
    return _texture(draw, pattern, torch.stack([first, second, (first + second) / 2]), _between(draw, 0.3, 0.5))


def _wood(draw: torch.Generator) -> Texture:
    dark = _between(draw, 0.2, 0.6) * torch.tensor([1.0, 0.75, 0.5], dtype=torch.float64)
    return _texture(draw, "plain", torch.stack([dark, dark, 1.3 * dark]), 0.6)


def _texture(draw: torch.Generator, pattern: str, palette: Tensor, period: float) -> Texture:
    directions = torch.randn(2, WAVES, 3, generator=draw, dtype=torch.float64)
    octaves = 2 * torch.rand(2, WAVES, 1, generator=draw, dtype=torch.float64) - 1
    vectors = torch.nn.functional.normalize(directions, dim=-1) * (2 * math.pi / period) * 2**octaves
    phases = 2 * math.pi * torch.rand(2, WAVES, generator=draw, dtype=torch.float64)
    return Texture(pattern, palette, period, vectors, phases)  # pyright: ignore[reportArgumentType]


def _number(draw: torch.Generator) -> float:
    return float(torch.rand((), generator=draw, dtype=torch.float64))


def _between(draw: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * _number(draw)


def _about_z(angle_rad: float) -> Tensor:
    """Rows are the axes of what was turned by the angle."""
    c, s = math.cos(angle_rad), math.sin(angle_rad)
    return torch.tensor([[c, s, 0], [-s, c, 0], [0, 0, 1]], dtype=torch.float64)


def _about_x(angle_rad: float) -> Tensor:
    """Leaning backwards, to +y."""
    c, s = math.cos(angle_rad), math.sin(angle_rad)
    return torch.tensor([[1, 0, 0], [0, c, -s], [0, s, c]], dtype=torch.float64)
