"""What `kernels.bench` times for splatting: `rasterization` forward and backward beside the naive twin in plain torch.

One call draws one view with colours from spherical harmonics of degree 3 and takes the gradients of everything back:
projection, sorting, tiles, all of it, gradients repeatable bit for bit. The scene is a wavy sheet of Gaussians that
fills the view, some three tiles each, as a trained scene has them. gsplat has nothing to compare with: without CUDA it
does not run. The naive twin, `reference.py` in float32, is what a user without CUDA would write.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from kernels import info, splat
from kernels.bench import CORES, Case, Contender, other_isas, with_isa
from kernels.splat import reference, stages

PEERS: tuple[str, ...] = ()
SIZES = ((20_000, 252, 189), (50_000, 504, 378), (100_000, 504, 378))  # Gaussians, pixels
NAIVE = 50_000  # Gaussians at most: a call of the naive twin takes many seconds beyond


def cases(quick: bool) -> Iterator[Case]:
    """One view, forward and backward, of three scenes; with `quick` a tiny one."""
    for count, width, height in [(300, 64, 48)] if quick else SIZES:
        yield _case(count, width, height)


def _case(count: int, width: int, height: int) -> Case:
    scene = sheet(count, width, height)
    grad = torch.randn(1, height, width, 3, generator=torch.Generator().manual_seed(1))
    ours = partial(_both_ways, partial(_draw, width, height), scene, grad)
    isa = info()["isa"]
    contenders = [
        Contender(f"ours {isa}", ours, _image, threads, ours=True) for threads in ((1, 2) if CORES > 1 else (1,))
    ]
    contenders += [
        Contender(f"ours {other}", partial(with_isa, other, ours), _image, ours=True) for other in other_isas()
    ]
    if count <= NAIVE:
        naive = partial(_both_ways, partial(_naive, width, height), scene, grad)
        contenders.append(Contender("naive torch", naive, _image, ours=True, note="reference.py in float32"))
    return Case(
        name=f"{count // 1000}k at {width}x{height}" if count >= 1000 else f"{count} at {width}x{height}",
        call="forward+backward",
        contenders=contenders,
        baseline="naive torch" if count <= NAIVE else f"ours {isa}",
        exact=lambda: _naive(width, height, *(t.double() for t in scene)),
        data_bytes=4 * (sum(t.numel() for t in scene) + 2 * grad.numel()),
        work=drawn_pairs(scene, width, height),
    )


def _image(out: tuple[Tensor, list[Tensor]]) -> Tensor:
    return out[0]


def sheet(count: int, width: int, height: int) -> list[Tensor]:
    """means, quats, scales, opacities, SH coefficients [N, 16, 3], viewmats and Ks of a scene that fills the view."""
    generator = torch.Generator().manual_seed(0)
    focal, margin = 1.2 * width, 1.1
    x, y = ((torch.rand(2, count, generator=generator) * 2 - 1) * margin).unbind()
    z = 3 + 0.4 * torch.sin(3 * x) * torch.cos(4 * y) + 0.1 * torch.randn(count, generator=generator)
    means = torch.stack([x * z * width / 2 / focal, y * z * height / 2 / focal, z], 1)
    spacing = 3 * margin / focal * math.sqrt(width * height / count)
    scales = spacing * torch.exp(0.4 * torch.randn(count, 3, generator=generator))
    quats = torch.randn(count, 4, generator=generator)
    opacities = torch.sigmoid(1.5 * torch.randn(count, generator=generator))
    coeffs = 0.2 * torch.randn(count, 16, 3, generator=generator)
    K = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    return [means, quats, scales, opacities, coeffs, torch.eye(4)[None], K[None]]


def drawn_pairs(scene: list[Tensor], width: int, height: int) -> int:
    """Pairs of a Gaussian and a pixel that it changes: at least 1/255 there, and the pixel not closed yet."""
    means, quats, scales, opacities, _, viewmats, Ks = scene
    radii, means2d, depths, conics, _ = stages.projection(means, quats, scales, opacities, viewmats, Ks, width, height)
    order = depths[0].argsort(stable=True)
    items = [t[order] for t in (means2d[0], conics[0], opacities, radii[0])]
    tile, total = torch.arange(16) + 0.5, 0
    for top in range(0, height, 16):
        for left in range(0, width, 16):
            total += _drawn_in_tile(items, left + tile[left + tile < width], top + tile[top + tile < height])
    return total


def _drawn_in_tile(items: list[Tensor], x: Tensor, y: Tensor) -> int:
    means2d, conics, opacities, radii = items
    near = (means2d[:, 0] - radii[:, 0] < x[-1]) & (means2d[:, 0] + radii[:, 0] > x[0])
    near &= (means2d[:, 1] - radii[:, 1] < y[-1]) & (means2d[:, 1] + radii[:, 1] > y[0]) & (radii[:, 0] > 0)
    means2d, (a, b, c) = means2d[near], conics[near].T[:, :, None, None]
    dx, dy = x[None, None] - means2d[:, 0, None, None], y[None, :, None] - means2d[:, 1, None, None]
    alpha = (opacities[near, None, None] * torch.exp(-(a * dx**2 + c * dy**2) / 2 - b * dx * dy)).clamp(max=0.999)
    alpha = torch.where(alpha >= reference.ALPHA_MIN, alpha, 0)
    open_after = (1 - alpha).cumprod(0) > reference.TRANSMITTANCE_MIN
    return int(((alpha > 0) & open_after).sum())


def _both_ways(draw: Callable, scene: list[Tensor], grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The image, and the gradients of everything but the intrinsics."""
    leaves = [t.clone().requires_grad_() for t in scene[:6]]
    image = draw(*leaves, scene[6])
    return image.detach(), list(torch.autograd.grad(image, leaves, grad))


def _draw(width: int, height: int, *scene: Tensor) -> Tensor:
    means, quats, scales, opacities, coeffs, viewmats, Ks = scene
    gaussians = {"means": means, "quats": quats, "scales": scales, "opacities": opacities, "colors": coeffs}
    camera = {"viewmats": viewmats, "Ks": Ks, "width": width, "height": height}
    return splat.rasterization(**gaussians, **camera, sh_degree=3, packed=False)[0]


def _naive(width: int, height: int, *scene: Tensor) -> Tensor:
    means, quats, scales, opacities, coeffs, viewmats, Ks = scene
    radii, means2d, depths, conics, _ = reference.projection(
        means, quats, scales, opacities, viewmats, Ks, width, height
    )
    centre = torch.linalg.inv(viewmats)[0, :3, 3]
    colors = (reference.spherical_harmonics(3, means - centre, coeffs) + 0.5).clamp_min(0)
    first = torch.tensor([0, len(means)])
    items = (means2d[0], conics[0], colors, opacities, radii[0], depths[0], first)
    return reference.rasterize(*items, None, width, height)[0]
