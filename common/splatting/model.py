"""Gaussians as trainable parameters, and their picture from a camera (kernels.splat.rasterization, gsplat's semantics).

    model = Gaussians.from_points(scene.points)
    picture = model.render(view.camera, mode="RGB+ED")     # .image [H, W, 3], .alpha [H, W], .depth [H, W]

Parameters are stored before their activation: scales as logarithms, opacities as logits, colours as spherical harmonics
(SH). `Gaussians.splats` applies the activations; `render` draws the result, so that whatever stands between the two
(dropout of opacities, detached positions, other colours) is a change of a named tuple.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from common.splatting.cameras import Camera
from common.splatting.scene import PointCloud

__all__ = ["FIELDS", "SH_C0", "Gaussians", "Mode", "Rendering", "Splats", "render"]

Mode = Literal["RGB", "RGB+D", "RGB+ED", "D", "ED"]

FIELDS = ("means", "log_scales", "quats", "opacity_logits", "sh0", "shN")
SH_C0 = 0.28209479177387814  # the constant basis function, sqrt(1 / (4 pi))
NEIGHBOURS = 3  # whose distance sets the first scale of a Gaussian (3DGS)
SMALLEST_DISTANCE = math.sqrt(1e-7)  # world units; points on one spot would get a scale of zero (3DGS)


class Splats(NamedTuple):
    """What the rasterizer takes: N Gaussians after their activations.

    means      [N, 3] world
    quats      [N, 4] rotation as w, x, y, z of any length but 0
    scales     [N, 3] standard deviations along the Gaussian's own axes, world units, > 0
    opacities  [N] 0..1
    colors     [N, K, 3] SH coefficients, K = (degree + 1)^2, or [N, D] plain values of D channels
    """

    means: Tensor
    quats: Tensor
    scales: Tensor
    opacities: Tensor
    colors: Tensor


@dataclass(frozen=True, eq=False)
class Rendering:
    """The picture from one camera, or with a leading dimension [C] from several.

    image  [H, W, X]: 3 channels for SH colours, D for plain ones, 0 in the modes "D" and "ED"
    alpha  [H, W] how much the Gaussians cover, 0..1
    depth  [H, W] along the optical axis, or None in mode "RGB". "D" sums depth times weight, "ED" divides that by alpha
    meta   gsplat's: means2d, radii, gaussian_ids, width, height, n_cameras, ...
    """

    image: Tensor
    alpha: Tensor
    depth: Tensor | None
    meta: dict[str, Any]


def render(
    splats: Splats,
    cameras: Camera | Sequence[Camera],
    *,
    mode: Mode = "RGB",
    background: Tensor | None = None,
    sh_degree: int | None = None,
    antialiased: bool = False,
    absgrad: bool = False,
) -> Rendering:
    """Draw the Gaussians from a camera, or from several of one size.

    background   [3] (or [D]) colour behind them; black where None
    sh_degree    SH degree in use, at most the stored one; None: the stored one
    antialiased  lower the opacity of Gaussians smaller than a pixel (Mip-Splatting)
    absgrad      backward also leaves `meta["means2d"].absgrad`, sums of absolute gradients (AbsGS)

    Raises ValueError for no Gaussians, no camera, cameras of several sizes, a degree above the stored one, and what
    kernels.splat refuses.
    """
    from kernels import splat

    several = [cameras] if isinstance(cameras, Camera) else list(cameras)
    _check(splats, several, sh_degree)
    values, alphas, meta = splat.rasterization(
        splats.means,
        splats.quats,
        splats.scales,
        splats.opacities,
        splats.colors,
        torch.stack([camera.viewmat for camera in several]),
        torch.stack([camera.K for camera in several]),
        several[0].width,
        several[0].height,
        sh_degree=_degree(splats.colors) if sh_degree is None else sh_degree,
        backgrounds=None if background is None or mode in ("D", "ED") else background.expand(len(several), -1),
        render_mode=mode,
        absgrad=absgrad,
        rasterize_mode="antialiased" if antialiased else "classic",
    )
    if isinstance(cameras, Camera):
        values, alphas = values[0], alphas[0]
    if mode == "RGB":
        return Rendering(values, alphas[..., 0], None, meta)
    return Rendering(values[..., :-1], alphas[..., 0], values[..., -1], meta)


class Gaussians(nn.Module):
    """N Gaussians. The parameters, all float32:

    means           [N, 3] world
    log_scales      [N, 3] logarithms of the standard deviations
    quats           [N, 4] rotations as w, x, y, z, not normalised
    opacity_logits  [N]
    sh0, shN        [N, 1, 3] and [N, K - 1, 3] SH coefficients of degree 0 and above; a colour is 0.5 + SH

    Raises ValueError where the shapes do not fit together.
    """

    means: nn.Parameter
    log_scales: nn.Parameter
    quats: nn.Parameter
    opacity_logits: nn.Parameter
    sh0: nn.Parameter
    shN: nn.Parameter

    def __init__(
        self, means: Tensor, log_scales: Tensor, quats: Tensor, opacity_logits: Tensor, sh0: Tensor, shN: Tensor
    ):
        super().__init__()
        values = dict(zip(FIELDS, (means, log_scales, quats, opacity_logits, sh0, shN), strict=True))
        count, higher = len(means), shN.shape[1] if shN.ndim == 3 else -1
        if higher not in (0, 3, 8, 15):
            raise ValueError(
                f"Gaussians: shN is [N, K - 1, 3] with 0, 3, 8 or 15 coefficients; got {list(shN.shape)}. Cut to one."
            )
        for name, shape in zip(FIELDS, ((3,), (3,), (4,), (), (1, 3), (higher, 3)), strict=True):
            value = values[name]
            if tuple(value.shape) != (count, *shape) or value.dtype != torch.float32:
                raise ValueError(
                    f"Gaussians: {name} is float32 {[count, *shape]} beside means {list(means.shape)}; got "
                    f"{value.dtype} {list(value.shape)}."
                )
            self.register_parameter(name, nn.Parameter(value.detach().clone().contiguous()))

    @classmethod
    def from_points(cls, points: PointCloud, *, sh_degree: int = 3, initial_opacity: float = 0.1) -> Gaussians:
        """One Gaussian a point: its colour, no rotation, and as wide as its neighbours are far (3DGS).

        The scale is the root mean square distance of the 3 nearest other points, at least 3e-4 world units.

        Raises ValueError for fewer than two points, an opacity outside (0, 1), or a degree outside 0..3.
        """
        count = len(points)
        if count < 2:
            raise ValueError(
                f"Gaussians.from_points: got {count} points, expected 2 or more, whose distances give the scales. "
                "Take more views, a denser initialisation, or Gaussians.random."
            )
        if not 0 < initial_opacity < 1 or sh_degree not in range(4):
            raise ValueError(
                f"Gaussians.from_points: initial_opacity is in (0, 1) and sh_degree 0, 1, 2 or 3; got "
                f"{initial_opacity} and {sh_degree}."
            )
        scales = _neighbour_distance(points.positions)[:, None].expand(-1, 3)  # [N, 3]
        colors = points.colors[:, None]  # [N, 1, 3]
        return cls(
            points.positions,
            scales.log(),
            points.positions.new_tensor([1.0, 0.0, 0.0, 0.0]).expand(count, 4),
            points.positions.new_full((count,), math.log(initial_opacity / (1 - initial_opacity))),
            (colors - 0.5) / SH_C0,
            colors.new_zeros(count, (sh_degree + 1) ** 2 - 1, 3),
        )

    @classmethod
    def random(
        cls,
        count: int,
        low: Sequence[float],
        high: Sequence[float],
        *,
        generator: torch.Generator,
        sh_degree: int = 3,
        initial_opacity: float = 0.1,
    ) -> Gaussians:
        """`from_points` of `count` points with random colours, spread evenly over the box from `low` to `high`."""
        values = torch.rand(count, 6, generator=generator, device=generator.device)
        corner, opposite = values.new_tensor(low), values.new_tensor(high)
        cloud = PointCloud(corner + values[:, :3] * (opposite - corner), values[:, 3:].contiguous())
        return cls.from_points(cloud, sh_degree=sh_degree, initial_opacity=initial_opacity)

    def __len__(self) -> int:
        return len(self.means)

    @property
    def sh_degree(self) -> int:
        """The stored SH degree, 0..3."""
        return math.isqrt(self.shN.shape[1] + 1) - 1

    def splats(self, sh_degree: int | None = None) -> Splats:
        """The Gaussians after their activations, with the SH coefficients up to `sh_degree` (None: all)."""
        higher = self.shN if sh_degree is None else self.shN[:, : (sh_degree + 1) ** 2 - 1]
        colors = torch.cat([self.sh0, higher], dim=1)  # [N, K, 3]
        return Splats(self.means, self.quats, self.log_scales.exp(), self.opacity_logits.sigmoid(), colors)

    def render(
        self,
        cameras: Camera | Sequence[Camera],
        *,
        mode: Mode = "RGB",
        background: Tensor | None = None,
        sh_degree: int | None = None,
        antialiased: bool = False,
    ) -> Rendering:
        """`render` of these Gaussians; see there."""
        splats = self.splats(sh_degree)
        return render(splats, cameras, mode=mode, background=background, antialiased=antialiased)

    def values(self) -> dict[str, Tensor]:
        """The parameters by name, detached; `Gaussians(**values)` makes the same model again."""
        return {name: getattr(self, name).detach() for name in FIELDS}


def _neighbour_distance(positions: Tensor) -> Tensor:
    """[P] root mean square distance of the nearest other points, at most NEIGHBOURS of them."""
    from scipy.spatial import KDTree

    points = positions.detach().cpu().double().numpy()
    distances, _ = KDTree(points).query(points, k=min(NEIGHBOURS, len(points) - 1) + 1)  # the first is the point itself
    others = torch.from_numpy(distances[:, 1:])
    return others.square().mean(dim=1).sqrt().clamp_min(SMALLEST_DISTANCE).to(positions)


def _degree(colors: Tensor) -> int | None:
    return math.isqrt(colors.shape[1]) - 1 if colors.ndim == 3 else None


def _check(splats: Splats, cameras: list[Camera], sh_degree: int | None) -> None:
    if not len(splats.means):
        raise ValueError(
            "render: got no Gaussians, expected at least one. If training lost them, prune less (prune_opacity, "
            "prune_scale3d of the strategy) or look whether the cameras fit the points."
        )
    sizes = {(camera.width, camera.height) for camera in cameras}
    if len(sizes) != 1:
        raise ValueError(
            f"render: cameras of one size are drawn together; got {sorted(sizes) or 'no camera'}. Call it once a size."
        )
    stored = _degree(splats.colors)
    if sh_degree is not None and (stored is None or not 0 <= sh_degree <= stored):
        raise ValueError(
            f"render: sh_degree is {sh_degree}, the colours {list(splats.colors.shape)} hold "
            f"{'no SH' if stored is None else f'degrees 0..{stored}'}; leave it out to use what is there."
        )
