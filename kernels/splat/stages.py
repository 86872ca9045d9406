"""The stages of the rasterizer as functions of their own: what they take, which implementation runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import _dispatch
from kernels.splat import ops, reference

__all__ = ["position_noise", "projection", "rasterize", "relocation", "spherical_harmonics"]


def projection(
    means: Tensor,
    quats: Tensor | None,
    scales: Tensor | None,
    opacities: Tensor | None,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    *,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    radius_clip: float = 0.0,
    eps2d: float = 0.3,
    antialiased: bool = False,
    covars: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """3-D Gaussians before cameras, as 2-D Gaussians on their images (EWA splatting, Zwicker et al. 2001).

    means [N, 3]; quats [N, 4] (w, x, y, z) of any length and scales [N, 3], or covars [N, 3, 3] of which the symmetric
    part counts; opacities [N] in 0..1, which bound the radii only (None: 3.33 standard deviations); viewmats [C, 4, 4]
    world to camera, OpenCV axes; Ks [C, 3, 3] in pixels, no gradient.

    Returns radii [C, N, 2] int32 (0: culled), means2d [C, N, 2] in pixels, depths [C, N], conics [C, N, 3] in
    1/pixel^2, compensations [C, N] (the factor of the opacity, 1 unless `antialiased`). Culled are Gaussians outside
    the planes, beside the image, fainter than 1/255, or broken (NaN, zero quaternion, overflow): zeros, with zero
    gradients.
    Raises ValueError for shapes that do not fit, TypeError for dtypes, KernelUnavailable where no kernel serves.
    """
    count, cameras = len(means), len(viewmats)
    expect("projection", means, (count, 3), "means [N, 3]")
    if (covars is None) == (quats is None) or (quats is None) != (scales is None):
        raise ValueError("kernels.splat.projection: got both or neither of quats with scales and covars; expected one")
    for tensor, shape, name in (
        (quats, (count, 4), "quats [N, 4]"),
        (scales, (count, 3), "scales [N, 3]"),
        (covars, (count, 3, 3), "covars [N, 3, 3]"),
        (opacities, (count,), "opacities [N]"),
        (viewmats, (cameras, 4, 4), "viewmats [C, 4, 4]"),
        (Ks, (cameras, 3, 3), "Ks [C, 3, 3]"),
    ):
        if tensor is not None:
            expect("projection", tensor, shape, name, like=means)
    expect_image("projection", width, height)
    limits = (near_plane, far_plane, radius_clip, eps2d)
    if backend(means) == _dispatch.CPU:
        return ops.project(means, quats, scales, covars, opacities, viewmats, Ks, width, height, limits, antialiased)
    keywords: dict[str, Any] = dict(zip(("near_plane", "far_plane", "radius_clip", "eps2d"), limits, strict=True))
    keywords |= {"antialiased": antialiased, "covars": covars}
    return reference.projection(means, quats, scales, opacities, viewmats, Ks, width, height, **keywords)


def spherical_harmonics(degree: int, dirs: Tensor, coeffs: Tensor, masks: Tensor | None = None) -> Tensor:
    """Colours from real spherical harmonics along directions, without the half that 3DGS adds.

    degree 0..3; dirs [..., 3] of any length; coeffs [..., K, 3], K >= (degree + 1)^2, whose leading sizes broadcast;
    masks [...] bool: where False, the colour is 0 and nothing has a gradient.

    Returns [..., 3]. Raises ValueError for a degree or shapes that do not fit, TypeError for dtypes.
    """
    if degree not in (0, 1, 2, 3):
        raise ValueError(f"kernels.splat.spherical_harmonics: got degree {degree!r}; expected 0, 1, 2 or 3")
    if dirs.shape[-1:] != (3,) or coeffs.ndim < 2 or coeffs.shape[-1] != 3:
        raise ValueError(
            f"kernels.splat.spherical_harmonics: got dirs {tuple(dirs.shape)} and coeffs {tuple(coeffs.shape)}; "
            "expected [..., 3] and [..., K, 3]"
        )
    if coeffs.shape[-2] < (degree + 1) ** 2:
        raise ValueError(
            f"kernels.splat.spherical_harmonics: got {coeffs.shape[-2]} coefficients; expected {(degree + 1) ** 2} or "
            f"more for degree {degree}; lower the degree, or pad with zeros"
        )
    batch = torch.broadcast_tensors(dirs[..., 0], coeffs[..., 0, 0])[0].shape  # torch.broadcast_shapes imports sympy
    if backend(dirs) != _dispatch.CPU:
        if masks is not None:  # before the polynomials: behind them, a gradient of 0 * NaN is NaN
            dirs = torch.where(masks[..., None], dirs, 0)
            coeffs = torch.where(masks[..., None, None], coeffs, 0)
        return reference.spherical_harmonics(degree, dirs, coeffs).expand(*batch, 3)
    count = batch[-1] if batch else 1
    table = (batch[:-1].numel(), count)  # cameras and Gaussians
    if masks is not None:
        masks = masks.expand(batch).reshape(table)
    if coeffs.ndim != 3 or coeffs.shape[0] != count or not batch:  # else all cameras share them
        coeffs = coeffs.expand(*batch, *coeffs.shape[-2:]).reshape(*table, *coeffs.shape[-2:])
    rows = dirs.expand(*batch, 3).reshape(*table, 3)
    return ops.harmonics(degree, rows, coeffs, masks).reshape(*batch, 3)


def rasterize(
    means2d: Tensor,
    conics: Tensor,
    colors: Tensor,
    opacities: Tensor,
    radii: Tensor,
    depths: Tensor,
    first: Tensor,
    backgrounds: Tensor | None,
    width: int,
    height: int,
    *,
    alpha_max: float = 0.999,
    tile_size: int = 16,
    absgrad: bool = False,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """2-D Gaussians, blended front to back into images (Kerbl et al. 2023, equation 3).

    means2d [M, 2], conics [M, 3], radii [M, 2] int32, depths [M] as `projection` gives them, opacities [M] with the
    compensation in them, colors [M, D], first [C + 1] int64: camera c draws the items first[c] : first[c + 1].
    backgrounds [C, D] or None for black. An item's opacity at a pixel is at most alpha_max, and nothing below 1/255; a
    pixel is closed before the item that would leave it 1e-4 of its light. Conics must be positive definite: other items
    are not drawn. With `absgrad` the backward pass sets `means2d.absgrad` [M, 2], the sum over pixels of |dL/dmeans2d|.

    Returns render [C, H, W, D], alphas [C, H, W, 1] and what the tiles hold: tiles_per_gauss [M] int32, isect_ids [I]
    int64, flatten_ids [I] int32, isect_offsets [C, tile rows, tile columns] int32; the reference gives an empty dict.
    Raises ValueError for shapes that do not fit or an alpha_max outside (0, 1), TypeError for dtypes, MemoryError where
    the pairs of items and tiles do not fit in memory.
    Costs O(items + pairs + pixels) memory: 64 bytes a pair in the backward pass (up to 8 channels).
    """
    items = len(means2d)
    expect("rasterize", means2d, (items, 2), "means2d [M, 2]")
    for tensor, shape, name in (
        (conics, (items, 3), "conics [M, 3]"),
        (colors, (items, None), "colors [M, D]"),
        (opacities, (items,), "opacities [M]"),
        (depths, (items,), "depths [M]"),
        (backgrounds, (len(first) - 1, colors.shape[-1]), "backgrounds [C, D]"),
    ):
        if tensor is not None:
            expect("rasterize", tensor, shape, name, like=means2d)
    expect("rasterize", radii, (items, 2), "radii [M, 2]", dtype=torch.int32)
    expect("rasterize", first, (None,), "first [C + 1]", dtype=torch.int64)
    expect_image("rasterize", width, height)
    if not 0 < alpha_max < 1:
        raise ValueError(
            f"kernels.splat.rasterize: got alpha_max {alpha_max}; expected a number between 0 and 1, as 0.999"
        )
    if tile_size != ops.TILE:
        raise ValueError(f"kernels.splat.rasterize: got tile_size {tile_size}; expected {ops.TILE}, the one there is")
    if backend(means2d) == _dispatch.CPU:
        return ops.rasterize(
            means2d, conics, colors, opacities, radii, depths, first, backgrounds, width, height, alpha_max, absgrad
        )
    if absgrad:
        raise ValueError(
            "kernels.splat.rasterize: absgrad needs the compiled kernel; use float32 on the CPU without it"
        )
    render, alphas = reference.rasterize(
        means2d, conics, colors, opacities, radii, depths, first, backgrounds, width, height, alpha_max=alpha_max
    )
    return render, alphas, {}


def relocation(opacities: Tensor, scales: Tensor, ratios: Tensor) -> tuple[Tensor, Tensor]:
    """What n copies of a Gaussian must be to look together like the one they replace (3DGS-MCMC, equation 9).

    opacities [n] in 0..1, scales [n, 3], ratios [n] int: how many copies, the original included, cut to 1..51.

    Returns opacities [n] and scales [n, 3]. Raises ValueError for shapes that do not fit.
    """
    count = len(opacities)
    expect("relocation", opacities, (count,), "opacities [n]")
    expect("relocation", scales, (count, 3), "scales [n, 3]", like=opacities)
    if tuple(ratios.shape) != (count,) or ratios.is_floating_point():
        raise ValueError(f"kernels.splat.relocation: got ratios {tuple(ratios.shape)} {ratios.dtype}; expected [n] int")
    return reference.relocation(opacities, scales, ratios)  # some hundred Gaussians every hundred steps


def position_noise(quats: Tensor, scales: Tensor, opacities: Tensor, noise: Tensor) -> Tensor:
    """The noise that 3DGS-MCMC adds to the means: Sigma noise sigmoid(100 ((1 - opacity) - 0.995)).

    quats [N, 4], scales [N, 3], opacities [N] after their activations; noise [N, 3]: normal numbers times the step.

    Returns [N, 3], without a gradient; 0 for broken Gaussians. Raises ValueError for shapes that do not fit.
    """
    count = len(quats)
    expect("position_noise", quats, (count, 4), "quats [N, 4]")
    for tensor, shape, name in (
        (scales, (count, 3), "scales [N, 3]"),
        (opacities, (count,), "opacities [N]"),
        (noise, (count, 3), "noise [N, 3]"),
    ):
        expect("position_noise", tensor, shape, name, like=quats)
    with torch.no_grad():
        return reference.position_noise(quats, scales, opacities, noise)


def backend(tensor: Tensor) -> str:
    """Which implementation of a stage runs for this tensor; on CUDA the stages have only the reference."""
    chosen = _dispatch.backend_for(tensor.device, tensor.dtype, "splat")
    return chosen if chosen == _dispatch.CPU else _dispatch.REFERENCE


def expect(
    function: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    name: str,
    like: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Raises unless the tensor has the shape (None: any size), and the dtype and device of `like`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"kernels.splat.{function}: got {type(tensor).__name__}; expected a tensor, {name}")
    got = tuple(tensor.shape)
    if len(got) != len(shape) or any(want not in (None, size) for size, want in zip(got, shape, strict=True)):
        sizes = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(
            f"kernels.splat.{function}: got {name.split()[0]} of shape {got}; expected {name}, here [{sizes}]"
        )
    wanted = dtype or (like.dtype if like is not None else tensor.dtype)
    if tensor.dtype != wanted:
        raise TypeError(
            f"kernels.splat.{function}: got {name} as {tensor.dtype}; expected {wanted}; convert it with .to()"
        )
    if like is not None and tensor.device != like.device:
        raise ValueError(
            f"kernels.splat.{function}: got {name} on {tensor.device}; expected {like.device}, where the rest is"
        )


def expect_image(function: str, width: int, height: int) -> None:
    """Raises ValueError for an image without pixels, or with more than 2^20 a side."""
    if not (1 <= width <= 2**20 and 1 <= height <= 2**20):
        raise ValueError(
            f"kernels.splat.{function}: got an image of {width} x {height}; expected 1 to 2^20 pixels a side"
        )
