"""Seeded scenes with exact depth, normals, masks and poses: an object on a platform, a facade, a room. z is up."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from common.splatting.cameras import Camera, intrinsics, look_at
from common.splatting.errors import SceneError
from common.splatting.raycast import ALL_LAMPS, Shape, Texture, World
from common.splatting.scene import PointCloud, Scene, View

__all__ = [
    "facade_rig",
    "facade_scene",
    "facade_world",
    "object_rig",
    "object_scene",
    "object_world",
    "room_rig",
    "room_scene",
    "room_world",
    "surface_points",
]

BLACK = (0.0, 0.0, 0.0)
SKY = (0.62, 0.74, 0.88)
UP = (0.0, 0.0, 1.0)
_WAVES = 12


def object_scene(
    seed: int,
    *,
    views: int = 3,
    tests: int = 10,
    size: tuple[int, int] = (128, 96),
    lighting: int = ALL_LAMPS,
    points: int = 2000,
    noise: float = 0.0,
    outliers: float = 0.0,
) -> Scene:
    """Objects on a white platform in a black box, as SpaRe and DTU show them; the masks leave the platform out.

    seed      of shapes, textures and points; the rig of 49 cameras is always the same
    views     training views, spread over the rig; fewer are a subset of more
    tests     test views, evenly among the rest of the rig
    size      (width, height) in pixels
    lighting  0..6, 3 for all lamps
    points    how many points the training views give (`surface_points`, also for noise and outliers)
    """
    world, rig = object_world(seed), object_rig(size)
    train = _spread(rig, views)
    rest = [index for index in range(len(rig)) if index not in train]
    test = [rest[int(place)] for place in torch.linspace(0, len(rest) - 1, tests).round()]
    shots = _photographed(world, rig, train, lighting), _photographed(world, rig, test, lighting)
    cloud = surface_points(world, shots[0], points, seed=seed, noise=noise, outliers=outliers)
    return _scene(f"object-{seed}", world, *shots, cloud)


def facade_scene(
    seed: int,
    *,
    views: int = 5,
    tests: int = 10,
    size: tuple[int, int] = (128, 96),
    points: int = 2000,
    noise: float = 0.0,
    outliers: float = 0.0,
) -> Scene:
    """The front of a house with windows, door and columns, seen from the street; the sky is background.

    Arguments as of `object_scene`. Training cameras stand on an arc, test cameras between them; the masks hold all
    that is not sky.
    """
    world, rig = facade_world(seed), facade_rig(size, views, tests)
    shots = _photographed(world, rig, range(views)), _photographed(world, rig, range(views, views + tests))
    cloud = surface_points(world, shots[0], points, seed=seed, noise=noise, outliers=outliers)
    return _scene(f"facade-{seed}", world, *shots, cloud)


def room_scene(
    seed: int,
    *,
    views: int = 8,
    tests: int = 10,
    size: tuple[int, int] = (128, 96),
    arc_deg: float = 360.0,
    points: int = 4000,
    noise: float = 0.0,
    outliers: float = 0.0,
) -> Scene:
    """A furnished room looked at from all sides: cameras near the walls, facing the middle; every pixel is surface.

    Arguments as of `object_scene`. The masks hold the furniture.

    arc_deg  0..360: the part of the circle on which the training cameras stand; the test cameras stand all around.
             Of four training views, none sees 8 % of the test pixels' surface at 360 degrees, 22 % at 180, 35 % at 90
    """
    world, rig = room_world(seed), room_rig(size, views, tests, arc_deg)
    shots = _photographed(world, rig, range(views)), _photographed(world, rig, range(views, views + tests))
    cloud = surface_points(world, shots[0], points, seed=seed, noise=noise, outliers=outliers)
    return _scene(f"room-{seed}", world, *shots, cloud)


def surface_points(
    world: World, views: Sequence[View], count: int, *, seed: int, noise: float = 0.0, outliers: float = 0.0
) -> PointCloud:
    """Points on the surfaces that the given views see, equally many from each, with colours, normals and tracks.

    views     of this world, with depth and normals; give training views only for a start without leakage
    count     points, fewer where the views have not so many pixels with a surface
    noise     standard deviation of the positions, world units
    outliers  share 0..1 of the points put anywhere in the box around the others, 1.5 times as large; they keep colour,
              normal and (now wrong) track

    Raises SceneError for values out of range.
    """
    if count < 1 or not views or not 0 <= outliers <= 1 or noise < 0:
        raise SceneError(
            f"surface_points: got {count} points of {len(views)} views, noise {noise}, outliers {outliers}; expected "
            "1 or more of both, noise >= 0 and a share of outliers between 0 and 1."
        )
    generator = torch.Generator().manual_seed(seed)
    parts: list[tuple[Tensor, ...]] = []
    for number, view in enumerate(views):
        assert view.depth is not None and view.normals is not None, "World.render gives both"
        pixels = torch.nonzero(view.depth.flatten() > 0).squeeze(1)
        share = count * (number + 1) // len(views) - count * number // len(views)
        taken = pixels[torch.randperm(len(pixels), generator=generator)[:share]]
        maps = (view.camera.backproject(view.depth), view.image, view.normals)
        parts.append(tuple(values.reshape(-1, 3)[taken] for values in maps))
    positions, colors, normals = (torch.cat(column) for column in zip(*parts, strict=True))
    seen = torch.stack([world.visible(positions, view.camera) for view in views], dim=1)
    low, high = positions.amin(dim=0), positions.amax(dim=0)
    middle, half = (low + high) / 2, 0.75 * (high - low)
    positions = positions + noise * torch.randn(positions.shape, generator=generator)
    wild = torch.randperm(len(positions), generator=generator)[: round(outliers * len(positions))]
    positions[wild] = middle + half * (2 * torch.rand(len(wild), 3, generator=generator) - 1)
    return PointCloud(positions, colors, normals, tuple(view.name for view in views), seen)


def object_rig(size: tuple[int, int]) -> list[Camera]:
    """49 cameras in 7 rows before the platform: 80 degrees wide, 15 to 55 degrees high, at a distance of 3.2."""
    K = intrinsics(*size, fov_x_rad=math.radians(42))
    rig = []
    for row in range(7):
        height = math.radians(15 + 40 * row / 6)
        for column in range(7):
            around = math.radians(-130 + 80 * column / 6)
            flat = 3.2 * math.cos(height)
            eye = (flat * math.cos(around), flat * math.sin(around), 0.35 + 3.2 * math.sin(height))
            rig.append(look_at(eye, (0, 0, 0.35), UP, K, *size))
    return rig


def facade_rig(size: tuple[int, int], views: int, tests: int) -> list[Camera]:
    """`views` cameras on an arc of 70 degrees before the facade, then `tests` within the arc at other heights."""
    K = intrinsics(*size, fov_x_rad=math.radians(60))

    def stand(place: float, distance: float, height: float) -> Camera:
        around = math.radians(70 * (place - 0.5))
        eye = (distance * math.sin(around), -distance * math.cos(around), height)
        return look_at(eye, (0, 0, 2.6), UP, K, *size)

    train = [stand(i / max(views - 1, 1), 7.5 + 0.8 * (i % 2), 1.7 + 0.5 * (i % 3)) for i in range(views)]
    return train + [stand((i + 0.5) / tests, 7.2 + 0.5 * (i % 3), 1.5 + 0.4 * (i % 4)) for i in range(tests)]


def room_rig(size: tuple[int, int], views: int, tests: int, arc_deg: float = 360.0) -> list[Camera]:
    """`views` cameras evenly on an arc of the room, then `tests` all around it; all face the middle."""
    K = intrinsics(*size, fov_x_rad=math.radians(75))

    def stand(turn: float, radius: float, height: float) -> Camera:
        around = 2 * math.pi * turn
        return look_at((radius * math.cos(around), radius * math.sin(around), height), (0, 0, 0.8), UP, K, *size)

    train = [stand(arc_deg / 360 * i / views, 2.1, 1.3 + 0.3 * (i % 2)) for i in range(views)]
    return train + [stand((i + 0.37) / tests, 1.9, 1.2 + 0.2 * (i % 3)) for i in range(tests)]


def object_world(seed: int) -> World:
    """Four or five boxes, cylinders and balls, some on top of others, on a round white platform; black all around."""
    draw = _Draw(seed)
    whites = torch.tensor([[0.92, 0.92, 0.92], [0.8, 0.8, 0.8], [0.75, 0.75, 0.77]]).double()
    white = Texture("plain", whites, 0.3, *draw.waves(0.3))
    shapes = [Shape("cylinder", _vector(0, 0, -0.05), _vector(1.25, 1.25, 0.05), torch.eye(3).double(), white, False)]
    count = 4 + int(draw.number(0, 2))
    turn = draw.number(0, 1)
    for index in range(count):
        kind = ("box", "cylinder", "sphere")[(index + seed) % 3]
        around = 2 * math.pi * (turn + index / (count - 1))
        away = 0.0 if index == count - 1 else draw.number(0.48, 0.68)
        half = _vector(draw.number(0.16, 0.26), draw.number(0.16, 0.26), draw.number(0.2, 0.42))
        if index == count - 1:
            half[2] = draw.number(0.4, 0.55)  # the one in the middle stands out
        place = _vector(away * math.cos(around), away * math.sin(around), float(half[2]))
        axes = _turned(draw.number(0, math.pi))
        shapes.append(Shape(kind, place, half, axes, draw.texture(0.16)))
        if kind != "sphere" and index % 2 == 0:
            ball = draw.number(0.1, 0.16)
            top = place + _vector(0, 0, float(half[2]) + ball)
            shapes.append(Shape("sphere", top, _vector(ball, ball, ball), axes, draw.texture(0.12)))
    lamps = torch.tensor([[-2.5, -2.5, 4.0], [2.8, -2.0, 3.5], [0.3, 1.0, 5.0]]).double()
    return World(tuple(shapes), lamps, torch.tensor(BLACK))


def facade_world(seed: int) -> World:
    """A brick wall 9 wide and 5.4 high with three rows of window frames and panes, a door, columns and a cornice."""
    draw = _Draw(seed)
    still = torch.eye(3).double()
    frame, stone, pane = draw.texture(0.5, "waves"), draw.texture(0.6, "waves"), draw.texture(0.35, "checker")

    def box(x: float, y: float, z: float, *half: float, texture: Texture) -> Shape:
        return Shape("box", _vector(x, y, z), _vector(*half), still, texture)

    shapes = [
        box(0, 0.3, 2.7, 4.5, 0.3, 2.7, texture=draw.texture(0.6, "bricks")),
        box(0, -4, -0.05, 12, 8, 0.05, texture=draw.texture(0.8, "checker")),
        box(0, -0.12, 5.3, 4.6, 0.2, 0.15, texture=stone),
        box(0, -0.06, 0.95, 0.6, 0.1, 0.95, texture=draw.texture(0.3, "stripes")),
    ]
    width = draw.number(0.32, 0.42)
    for row, z in enumerate((1.5, 3.0, 4.4)):
        for x in (-3.4, -1.9, 0.0, 1.9, 3.4):
            if row == 0 and x == 0.0:
                continue  # the door is there
            shapes.append(box(x, -0.04, z, width + 0.08, 0.1, 0.53, texture=frame))
            shapes.append(box(x, -0.1, z, width, 0.06, 0.45, texture=pane))
    for x in (-0.95, 0.95):
        column = draw.number(0.12, 0.17)
        half = _vector(column, column, 1.15)
        shapes.append(Shape("cylinder", _vector(x, -0.6, 1.15), half, still, draw.texture(0.4, "stripes")))
    shapes.append(box(0, -0.4, 2.4, 1.3, 0.4, 0.1, texture=stone))
    lamps = torch.tensor([[-9.0, -9.0, 12.0], [6.0, -12.0, 9.0], [0.0, -14.0, 5.0]]).double()
    return World(tuple(shapes), lamps, torch.tensor(SKY))


def room_world(seed: int) -> World:
    """A room of 5.6 x 5.6 x 2.8 with patterned walls, a table, seats, a ball and pillars."""
    draw = _Draw(seed)
    still = torch.eye(3).double()
    shapes = [
        Shape("box", _vector(0, 0, 1.4), _vector(2.8, 2.8, 1.4), still, draw.texture(0.7, "checker"), False),
        Shape("box", _vector(0, 0, 0.01), _vector(1.4, 1.4, 0.01), still, draw.texture(0.35, "waves"), False),
        Shape("cylinder", _vector(0, 0, 0.72), _vector(0.7, 0.7, 0.04), still, draw.texture(0.3, "stripes")),
        Shape("cylinder", _vector(0, 0, 0.34), _vector(0.1, 0.1, 0.34), still, draw.texture(0.3, "waves")),
        Shape("sphere", _vector(0.1, -0.1, 1.0), _vector(0.24, 0.24, 0.24), still, draw.texture(0.15)),
    ]
    for index in range(4):
        around = math.pi / 2 * index + draw.number(-0.3, 0.3)
        place = _vector(1.15 * math.cos(around), 1.15 * math.sin(around), 0.24)
        kind = ("box", "cylinder")[index % 2]
        shapes.append(Shape(kind, place, _vector(0.24, 0.24, 0.24), _turned(around), draw.texture(0.2)))
    for index in range(4):
        x, y = 2.5 * (1 if index % 2 else -1), 2.5 * (1 if index < 2 else -1)
        pillar = draw.number(0.14, 0.22)
        half = _vector(pillar, pillar, 1.4)
        shapes.append(Shape("cylinder", _vector(x, y, 1.4), half, still, draw.texture(0.3, "stripes")))
    lamps = torch.tensor([[-1.5, -1.2, 2.6], [1.6, -0.8, 2.6], [0.2, 1.7, 2.6]]).double()
    return World(tuple(shapes), lamps, torch.tensor(BLACK))


class _Draw:
    """Random numbers and textures of one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def number(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.generator, dtype=torch.float64))

    def texture(self, period: float, pattern: str | None = None) -> Texture:
        patterns = ("waves", "checker", "stripes", "bricks")
        chosen = pattern or patterns[int(self.number(0, len(patterns)))]
        dark = 0.08 + 0.35 * torch.rand(3, generator=self.generator, dtype=torch.float64)
        light = 0.55 + 0.4 * torch.rand(3, generator=self.generator, dtype=torch.float64)
        third = torch.rand(3, generator=self.generator, dtype=torch.float64)
        return Texture(chosen, torch.stack([dark, light, third]), period, *self.waves(period))  # pyright: ignore[reportArgumentType]

    def waves(self, period: float) -> tuple[Tensor, Tensor]:
        """Wave vectors [2, M, 3] with lengths of period * 2 down to period / 4, and phases [2, M]."""
        directions = torch.randn(2, _WAVES, 3, generator=self.generator, dtype=torch.float64)
        octaves = torch.rand(2, _WAVES, 1, generator=self.generator, dtype=torch.float64) * 3 - 1
        vectors = torch.nn.functional.normalize(directions, dim=-1) * (2 * math.pi / period) * 2**octaves
        return vectors, 2 * math.pi * torch.rand(2, _WAVES, generator=self.generator, dtype=torch.float64)


def _photographed(
    world: World, rig: Sequence[Camera], which: Iterable[int], lighting: int = ALL_LAMPS
) -> tuple[View, ...]:
    """The views of some cameras of a rig, named by their number from 1."""
    return tuple(world.render(rig[index], f"cam_{index + 1:03d}", lighting=lighting) for index in which)


def _scene(name: str, world: World, train: tuple[View, ...], test: tuple[View, ...], points: PointCloud) -> Scene:
    return Scene(name, train, test, points, world.background, allow_single=len(train) == 1)


def _spread(rig: Sequence[Camera], count: int) -> list[int]:
    """`count` cameras, the first in the middle, each next one farthest from those taken: fewer are a subset of more."""
    centers = torch.stack([camera.center for camera in rig])
    taken = [len(rig) // 2]
    while len(taken) < count:
        distance = torch.cdist(centers, centers[taken]).amin(dim=1)
        taken.append(int(distance.argmax()))
    return taken


def _vector(x: float, y: float, z: float) -> Tensor:
    return torch.tensor([x, y, z], dtype=torch.float64)


def _turned(angle_rad: float) -> Tensor:
    """Axes turned about z."""
    c, s = math.cos(angle_rad), math.sin(angle_rad)
    return torch.tensor([[c, s, 0], [-s, c, 0], [0, 0, 1]], dtype=torch.float64)
