"""Scenes worth rendering, the blending of splats a second time pixel by pixel, and where an image has kinks.

Nothing of the blending is shared with `kernels.splat`: it is Python floats in a loop over pixels.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernels.splat import reference

PROJECTED = ("radii", "means2d", "depths", "conics", "compensations")


@dataclass(frozen=True)
class Scene:
    """N Gaussians seen by C cameras, as `projection` and `rasterization` take them."""

    means: Tensor  # [N, 3]
    quats: Tensor  # [N, 4]
    scales: Tensor  # [N, 3]
    opacities: Tensor  # [N]
    viewmats: Tensor  # [C, 4, 4]
    Ks: Tensor  # [C, 3, 3]
    width: int
    height: int

    def to(self, dtype: torch.dtype) -> Scene:
        tensors = {name: value.to(dtype) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    def arguments(self) -> tuple:
        return tuple(vars(self).values())


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def turn(random: torch.Generator, angle: float | None = None) -> Tensor:
    """A rotation [3, 3] float64 about a random axis, by a random angle or this one (in radians)."""
    x, y, z = torch.nn.functional.normalize(torch.randn(3, generator=random, dtype=torch.float64), dim=0).tolist()
    angle = float(torch.rand((), generator=random)) * 2 * math.pi if angle is None else angle
    return torch.linalg.matrix_exp(angle * torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64))


def scene(seed: int, count: int, cameras: int = 1, width: int = 37, height: int = 21) -> Scene:
    """Random Gaussians of a fifth of a pixel to a sixth of the image, most of them in view, float64.

    Some lie beside the image, every eighth behind the first camera, every ninth is too faint to be drawn, every seventh
    nearly opaque. The other cameras stand near the first one. All numbers are float32 numbers.
    """
    random = generator(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=random, dtype=torch.float64)

    focal = 0.9 * max(width, height)
    K = torch.tensor([[focal, 0, width / 2 + 0.7], [0, 1.1 * focal, height / 2 - 0.4], [0, 0, 1]], dtype=torch.float64)
    pixels = torch.stack([uniform(-0.2, 1.2, count) * width, uniform(-0.2, 1.2, count) * height], -1)
    z = uniform(math.log(0.5), math.log(8.0), count).exp()
    means = torch.cat([(pixels - K[:2, 2]) / K.diagonal()[:2], torch.ones(count, 1, dtype=torch.float64)], -1)
    means = means * z[:, None]
    scales = uniform(math.log(0.2), math.log(max(width, height) / 6), count, 3).exp() * z[:, None] / focal
    opacities = uniform(0.02, 0.98, count)
    means[::8, 2] *= -1
    opacities[4::9] = 0.003
    opacities[2::7] = 0.9995

    world = torch.eye(4, dtype=torch.float64)  # the first camera's view matrix: anywhere
    world[:3, :3], world[:3, 3] = turn(random), uniform(-3, 3, 3)
    views = [world]
    for _ in range(cameras - 1):
        step = torch.eye(4, dtype=torch.float64)
        step[:3, :3], step[:3, 3] = turn(random, 0.15), uniform(-0.2, 0.2, 3)
        views.append(step @ world)
    means = (means - world[:3, 3]) @ world[:3, :3]
    quats = torch.randn(count, 4, generator=random, dtype=torch.float64)
    made = Scene(means, quats, scales, opacities, torch.stack(views)[:cameras], K.repeat(cameras, 1, 1), width, height)
    return made.to(torch.float32).to(torch.float64)


def break_some(scene: Scene) -> dict[int, str]:
    """Break the first Gaussians of a scene in place; what is wrong with each."""
    nan, inf = float("nan"), float("inf")
    huge = torch.finfo(scene.means.dtype).max / 2  # its square overflows
    values = {
        "means": (nan, inf),
        "quats": (nan, inf, 0.0, -inf),
        "scales": (nan, inf, huge),
        "opacities": (nan, inf, -1.0),
    }
    faults = [(name, value) for name, some in values.items() for value in some]
    for i, (name, value) in enumerate(faults):
        target = getattr(scene, name)[i]
        if name == "quats" or target.ndim == 0:
            target.fill_(value)
        else:
            target[1] = value
    return {i: f"{name} = {value}" for i, (name, value) in enumerate(faults)}


def covariances(scene: Scene) -> Tensor:
    """[N, 3, 3] float64, of float32 numbers."""
    return reference._covariances(scene.quats, scene.scales).float().double()


def project(scene: Scene, **options: Any) -> dict[str, Tensor]:
    """What the reference's projection returns, by name."""
    return dict(zip(PROJECTED, reference.projection(*scene.arguments(), **options), strict=True))


def items(scene: Scene, colors: Tensor, antialiased: bool = False) -> dict[str, Tensor]:
    """The first seven arguments of `rasterize`, for colors [N, D], by the reference's projection."""
    seen = project(scene, antialiased=antialiased)
    cameras, count = seen["depths"].shape
    return {
        "means2d": seen["means2d"].flatten(0, 1),
        "conics": seen["conics"].flatten(0, 1),
        "colors": colors.repeat(cameras, 1),
        "opacities": (scene.opacities * seen["compensations"]).flatten(),
        "radii": seen["radii"].flatten(0, 1),
        "depths": seen["depths"].flatten(),
        "first": torch.arange(cameras + 1) * count,
    }


def blend_pixel_by_pixel(
    items: dict[str, Tensor], backgrounds: Tensor | None, width: int, height: int, alpha_max: float, tile_size: int
) -> tuple[Tensor, Tensor]:
    """What `rasterize` must return, float64."""
    first, channels = items["first"].tolist(), items["colors"].shape[1]
    lists = {name: values.tolist() for name, values in items.items()}
    render = torch.zeros(len(first) - 1, height, width, channels, dtype=torch.float64)
    alphas = torch.zeros(len(first) - 1, height, width, 1, dtype=torch.float64)
    for camera in range(len(first) - 1):
        order = sorted(range(first[camera], first[camera + 1]), key=lists["depths"].__getitem__)
        for y in range(height):
            for x in range(width):
                transmittance, colour = 1.0, [0.0] * channels
                for i in order:
                    alpha = _alpha(lists, i, x, y, alpha_max, tile_size)
                    if alpha is None:
                        continue
                    if transmittance * (1 - alpha) <= 1e-4:
                        break
                    for d in range(channels):
                        colour[d] += alpha * transmittance * lists["colors"][i][d]
                    transmittance *= 1 - alpha
                back = [0.0] * channels if backgrounds is None else backgrounds[camera].tolist()
                render[camera, y, x] = torch.tensor(
                    [c + transmittance * b for c, b in zip(colour, back, strict=True)], dtype=torch.float64
                )
                alphas[camera, y, x] = 1 - transmittance
    return render, alphas


def _alpha(lists: dict, i: int, x: int, y: int, alpha_max: float, tile_size: int) -> float | None:
    """How far item i covers pixel (x, y); None where it is not drawn."""
    for centre, radius, pixel in zip(lists["means2d"][i], lists["radii"][i], (x, y), strict=True):
        first_tile = math.floor((centre - radius) / tile_size)
        past_tile = math.ceil((centre + radius) / tile_size)
        if radius == 0 or not first_tile <= pixel // tile_size < past_tile:
            return None
    dx, dy = lists["means2d"][i][0] - (x + 0.5), lists["means2d"][i][1] - (y + 0.5)
    a, b, c = lists["conics"][i]
    sigma = 0.5 * a * dx**2 + b * dx * dy + 0.5 * c * dy**2
    alpha = min(alpha_max, lists["opacities"][i] * math.exp(-sigma))
    return alpha if sigma >= 0 and alpha >= 1 / 255 else None


def kinks(items: dict[str, Tensor], width: int, height: int, alpha_max: float = 0.999) -> Tensor:
    """[C, H, W]: pixels where a last bit decides: alpha near 1/255 or alpha_max, T near 1e-4, or depths nearly equal.

    For float64 items. "Near" covers what float32 does to these items: about 1e-3 of alpha, more where sigma cancels.
    """
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    first = items["first"].tolist()
    images = [torch.zeros(0, height, width, dtype=torch.bool)]
    for start, stop in itertools.pairwise(first):
        drawn = [i for i in range(start, stop) if (items["radii"][i] > 0).all()]
        order = torch.tensor(sorted(drawn, key=items["depths"].tolist().__getitem__), dtype=torch.long)
        mean, conic, opacity, depth = (items[name][order] for name in ("means2d", "conics", "opacities", "depths"))
        dx, dy = mean[:, 0, None, None] - x, mean[:, 1, None, None] - y  # [n, H, W]
        a, b, c = (conic[:, k, None, None] for k in range(3))
        terms = a * dx**2 / 2 + c * dy**2 / 2 + (b * dx * dy).abs()
        sigma = a * dx**2 / 2 + c * dy**2 / 2 + b * dx * dy
        alpha = opacity[:, None, None] * torch.exp(-sigma)
        margin = 2e-3 + 2e-5 * terms
        near = (alpha * 255 - 1).abs() < margin
        near |= (alpha / alpha_max - 1).abs() < margin
        near |= (sigma < 1e-5 * terms) & (terms > 1e-12)
        counts = alpha >= 1 / 255
        left = torch.where(counts, 1 - alpha.clamp(max=alpha_max), 1).cumprod(0)
        near |= counts & ((left * 1e4 - 1).abs() < 0.05)
        close = depth.diff() < 1e-5 * depth[1:]
        near[1:] |= close[:, None, None] & counts[1:] & counts[:-1]
        images.append(near.any(0)[None])
    return torch.cat(images)
