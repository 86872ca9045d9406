"""A small ray caster: boxes, ellipsoids and cylinders with procedural textures, lamps and hard shadows.

Every shape is a unit shape under an affine map, so that one parameter t along a ray holds in both frames. Rays are
those of `Camera.rays`, whose t is the depth along the optical axis: depth maps are exact up to rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from common.splatting.cameras import Camera
from common.splatting.errors import SceneError
from common.splatting.scene import View

__all__ = ["LIGHTINGS", "Shape", "Texture", "World"]

# which of three lamps are on, by SpaRe's numbers 0..6; 3 is all of them
LIGHTINGS = ((0,), (1,), (2,), (0, 1, 2), (0, 1), (1, 2), (0, 2))
ALL_LAMPS = 3

_NEAR = 1e-6  # of a ray's parameter: nothing closer is hit, so that a surface does not shade itself
_PARALLEL = 1e-15  # a direction's component along an axis that counts as none, so that slabs need no division by zero
_AMBIENT = 0.35
_DIFFUSE = 0.75  # what all lamps that are on give together to a surface facing them


@dataclass(frozen=True, eq=False)
class Texture:
    """Albedo as a function of the position on a shape, in the shape's own axes and world units.

    pattern   what divides palette[0] from palette[1]: nothing, a checker, stripes, bricks with joints, or waves
    palette   [3, 3] float64, 0..1; the third colour comes in by waves, so that no place looks like another
    period    length of the pattern in world units; the waves go from twice that down to a quarter
    waves     [2, M, 3] wave vectors and [2, M] phases of two fields
    """

    pattern: Literal["plain", "checker", "stripes", "bricks", "waves"]
    palette: Tensor
    period: float
    waves: Tensor
    phases: Tensor

    def albedo(self, position: Tensor, normal: Tensor) -> Tensor:
        """[N, 3] colours at `position` [N, 3] with `normal` [N, 3], both in the shape's axes."""
        fields = torch.sin(self.waves @ position.T + self.phases[..., None]).mean(dim=1)  # [2, N]
        fields = torch.tanh(math.sqrt(self.waves.shape[1]) * fields)
        share = (self._pattern(position, normal, fields[0]) + 1) / 2
        color = torch.lerp(self.palette[0], self.palette[1], share[:, None])
        return torch.lerp(color, self.palette[2], 0.25 + 0.25 * fields[1][:, None])

    def _pattern(self, position: Tensor, normal: Tensor, field: Tensor) -> Tensor:
        if self.pattern == "plain":
            return -torch.ones_like(field)
        if self.pattern == "waves":
            return field
        # patterns are flat: they leave out the axis that the surface faces
        faced = normal.abs().argmax(dim=1)
        u = torch.where(faced == 0, position[:, 1], position[:, 0]) / self.period
        v = torch.where(faced == 2, position[:, 1], position[:, 2]) / self.period
        if self.pattern == "stripes":
            return _soft(torch.sin(2 * math.pi * u))
        if self.pattern == "checker":
            return _soft(torch.sin(math.pi * u)) * _soft(torch.sin(math.pi * v))
        row = torch.floor(2 * v)  # bricks twice as wide as high, each row moved by half a brick
        joint = torch.minimum(_to_edge(2 * v) / 2, _to_edge(u + 0.5 * row))
        return torch.tanh((joint - 0.05) * 40)


@dataclass(frozen=True, eq=False)
class Shape:
    """A convex solid: the unit shape scaled by `half` along its axes, turned and moved.

    kind    box: |x|, |y|, |z| <= 1; sphere: the unit ball; cylinder: the unit disc times |z| <= 1
    center  [3] float64;  half [3] float64 half sizes;  axes [3, 3] float64, rows are the shape's axes in the world
    is_object   counts for the mask of a view
    """

    kind: Literal["box", "sphere", "cylinder"]
    center: Tensor
    half: Tensor
    axes: Tensor
    texture: Texture
    is_object: bool = True

    def single(self) -> Shape:
        """The same shape in float32."""
        t = self.texture
        texture = replace(t, palette=t.palette.float(), waves=t.waves.float(), phases=t.phases.float())
        return replace(
            self, center=self.center.float(), half=self.half.float(), axes=self.axes.float(), texture=texture
        )

    @property
    def radius(self) -> float:
        """Of a ball around the centre that holds the solid, with a little play for rounding."""
        return 1.001 * float(self.half.norm() if self.kind != "sphere" else self.half.max())

    def interval(self, origin: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Parameters [N] at which rays from origin [3] along directions [3, N] enter and leave the solid.

        Entering > leaving where they miss it.
        """
        o = (self.axes @ (origin - self.center) / self.half)[:, None]
        d = (self.axes / self.half[:, None]) @ directions
        if self.kind == "sphere":
            return _quadratic(o, d)
        d = torch.where(d.abs() < _PARALLEL, _PARALLEL, d)
        first, second = (-1 - o) / d, (1 - o) / d
        near, far = torch.minimum(first, second), torch.maximum(first, second)
        if self.kind == "box":
            return near[0].maximum(near[1]).maximum(near[2]), far[0].minimum(far[1]).minimum(far[2])
        side_near, side_far = _quadratic(o[:2], d[:2])
        return torch.maximum(side_near, near[2]), torch.minimum(side_far, far[2])

    def surface(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Albedo [N, 3] and outward unit normal [N, 3] at points [N, 3] of the surface."""
        local = (points - self.center) @ self.axes.T
        unit = local / self.half
        if self.kind == "sphere":
            normal = unit
        elif self.kind == "box":
            normal = _one_axis(unit, unit.abs().argmax(dim=1))
        else:
            on_cap = unit[:, 2].abs() > unit[:, :2].norm(dim=1)
            side = torch.cat([unit[:, :2], torch.zeros_like(unit[:, 2:])], dim=1)
            normal = torch.where(on_cap[:, None], _one_axis(unit, torch.full_like(on_cap, 2, dtype=torch.long)), side)
        normal = torch.nn.functional.normalize(normal / self.half, dim=1)
        return self.texture.albedo(local, normal), normal @ self.axes


@dataclass(frozen=True, eq=False)
class World:
    """Shapes and lamps. Rays that hit nothing see `background` [3]; their depth and normals are 0.

    lamps  [3, 3] float64 positions
    """

    shapes: tuple[Shape, ...]
    lamps: Tensor
    background: Tensor

    def render(self, camera: Camera, name: str, *, lighting: int = ALL_LAMPS, samples: int = 2) -> View:
        """The view of a camera: image, mask of the objects, depth and normals.

        lighting  0..6, which lamps are on (LIGHTINGS)
        samples   rays a pixel along each axis for image and mask; depth and normals are those of the pixel's centre
        """
        if lighting not in range(len(LIGHTINGS)) or samples < 1:
            raise SceneError(
                f"render: lighting is 0 to {len(LIGHTINGS) - 1} and samples >= 1; got {lighting} and {samples}."
            )
        size = (camera.height, camera.width)
        center = camera.center.double()
        rays = camera.rays().double().reshape(-1, 3)
        t, index = self.trace(center, rays)
        hit = index >= 0
        normals = torch.zeros_like(rays)
        _, normals[hit] = self._surface(center + t[hit, None] * rays[hit], index[hit], rays[hit])
        depth = torch.where(hit, t, 0)
        fine = camera.resized(camera.width * samples, camera.height * samples)
        image, mask = self._single._shade(camera.center, fine.rays().reshape(-1, 3), LIGHTINGS[lighting])

        def pixels(values: Tensor) -> Tensor:
            blocks = values.reshape(size[0], samples, size[1], samples, -1).mean(dim=(1, 3))
            return blocks.squeeze(-1).float()

        return View(
            name, camera, pixels(image), pixels(mask), depth.reshape(size).float(), normals.reshape(*size, 3).float()
        )

    def trace(self, origin: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Parameter [N] of the first surface along rays from origin [3], directions [N, 3] (inf for none).

        Returns also the number [N] of its shape, -1 for none.
        """
        best = torch.full(directions.shape[:1], torch.inf, dtype=directions.dtype)
        which = torch.full(directions.shape[:1], -1)
        columns = directions.T.contiguous()
        # only rays within the cone around a shape's bounding ball can hit it
        offsets = torch.stack([shape.center for shape in self.shapes]) - origin
        distances = offsets.norm(dim=1)
        sines = torch.tensor([shape.radius for shape in self.shapes]).to(distances) / distances
        cosines = torch.where(sines < 1, torch.sqrt((1 - sines**2).clamp_min(0)), -2)  # within the ball: any ray can
        along = (offsets / distances[:, None]) @ (columns / columns.norm(dim=0))
        for number, shape in enumerate(self.shapes):
            rows = torch.nonzero(along[number] >= cosines[number]).squeeze(1)
            near, far = shape.interval(origin, columns[:, rows])
            t = torch.where(near > _NEAR, near, far)  # from inside, the far wall
            closer = (near <= far) & (t > _NEAR) & (t < best[rows])
            best[rows[closer]] = t[closer]
            which[rows[closer]] = number
        return best, which

    def visible(self, points: Tensor, camera: Camera) -> Tensor:
        """[P] bool: whether surface points [P, 3] fall into the camera's image with nothing in front of them."""
        pixels, depth = camera.project(points)
        inside = (depth > 0) & (pixels >= 0).all(dim=1)
        inside &= (pixels[:, 0] < camera.width) & (pixels[:, 1] < camera.height)
        center = camera.center.double()
        t, _ = self.trace(center, points.double() - center)
        return inside & (t > 1 - 1e-4)  # float32 points lie this much behind or before their surface

    @cached_property
    def _single(self) -> World:
        """The same in float32, twice as fast: enough for colours."""
        return replace(self, shapes=tuple(shape.single() for shape in self.shapes), lamps=self.lamps.float())

    def _shade(self, center: Tensor, rays: Tensor, lamps: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        t, index = self.trace(center, rays)
        hit = index >= 0
        points = center + t[hit, None] * rays[hit]
        albedo, normal = self._surface(points, index[hit], rays[hit])
        light = torch.full(points.shape[:1], _AMBIENT, dtype=points.dtype)
        for lamp in lamps:
            away = points - self.lamps[lamp]
            facing = -(torch.nn.functional.normalize(away, dim=1) * normal).sum(dim=1)
            lit = torch.nonzero(facing > 0).squeeze(1)
            first, _ = self.trace(self.lamps[lamp], away[lit])
            light[lit] += _DIFFUSE / len(lamps) * facing[lit] * (first > 1 - 1e-4)  # the point itself, up to rounding
        image = self.background.to(rays).expand_as(rays).clone()
        image[hit] = (albedo * light[:, None]).clamp(0, 1)
        objects = torch.tensor([shape.is_object for shape in self.shapes])
        return image, (hit & objects[index]).to(rays)

    def _surface(self, points: Tensor, index: Tensor, rays: Tensor) -> tuple[Tensor, Tensor]:
        """Albedo and normal towards the ray's origin at points [N, 3] on shapes [N]."""
        albedo, normal = torch.zeros_like(points), torch.zeros_like(points)
        for number, shape in enumerate(self.shapes):
            here = index == number
            if here.any():
                albedo[here], normal[here] = shape.surface(points[here])
        away = (normal * rays).sum(dim=1, keepdim=True) > 0
        return albedo, torch.where(away, -normal, normal)


def _quadratic(o: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Where |o + t d| = 1 for columns of d: entering and leaving; (inf, -inf) for a miss."""
    a, b, c = (d * d).sum(dim=0), (o * d).sum(dim=0), (o * o).sum(dim=0) - 1
    root = (b * b - a * c).clamp_min(0).sqrt()
    missed = b * b < a * c
    return torch.where(missed, torch.inf, (-b - root) / a), torch.where(missed, -torch.inf, (root - b) / a)


def _one_axis(vectors: Tensor, axis: Tensor) -> Tensor:
    """[N, 3] the signs of one component, 0 in the others."""
    chosen = torch.nn.functional.one_hot(axis, 3)
    return torch.sign(vectors) * chosen


def _soft(values: Tensor) -> Tensor:
    """-1..1 with edges a few hundredths of a period wide, which a pixel raster still shows without stairs."""
    return torch.tanh(6 * values)


def _to_edge(values: Tensor) -> Tensor:
    """Distance to the next whole number, 0..0.5."""
    return (values - values.round()).abs()
