"""`rasterization`: gsplat's call, put together from the stages."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from kernels import _dispatch
from kernels.splat import gpu, stages

__all__ = ["rasterization"]

# arguments of gsplat 1.5.3 that the CPU takes only when they are None or False
GSPLAT_ONLY = (
    "distributed", "ftheta_coeffs", "radial_coeffs", "rolling_shutter", "sparse_grad", "tangential_coeffs",
    "thin_prism_coeffs", "viewmats_rs", "with_eval3d", "with_ut",
)  # fmt: skip
RenderMode = Literal["RGB", "D", "ED", "RGB+D", "RGB+ED"]


def rasterization(
    means: Tensor,
    quats: Tensor | None,
    scales: Tensor | None,
    opacities: Tensor,
    colors: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    radius_clip: float = 0.0,
    eps2d: float = 0.3,
    sh_degree: int | None = None,
    packed: bool = True,
    tile_size: int = 16,
    backgrounds: Tensor | None = None,
    render_mode: RenderMode = "RGB",
    sparse_grad: bool = False,
    absgrad: bool = False,
    rasterize_mode: Literal["classic", "antialiased"] = "classic",
    channel_chunk: int = 32,
    distributed: bool = False,
    camera_model: str = "pinhole",
    segmented: bool = False,
    covars: Tensor | None = None,
    *,
    alpha_max: float = 0.999,
    **others: Any,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Images of 3-D Gaussians (Kerbl et al. 2023), as gsplat 1.5.3's function of the same name.

    ... are optional batch sizes, N Gaussians, C cameras, D channels, K coefficients; float32, or float64 (slow).
    means [..., N, 3]; quats [..., N, 4] (w, x, y, z), of any length; scales [..., N, 3] and opacities [..., N] after
    their activations; covars [..., N, 3, 3] instead of quats and scales. colors [..., N, D] or [..., C, N, D]; with
    sh_degree (0..3) coefficients [..., N, K, 3] or [..., C, N, K, 3], of which the first (sh_degree + 1)^2 count.
    viewmats [..., C, 4, 4] world to camera, OpenCV axes; Ks [..., C, 3, 3] in pixels, pixel centres at index + 0.5.
    backgrounds [..., C, D].

    render_mode: RGB; D, the depth summed as a colour is; ED, D divided by the coverage; or both, depth last.
    rasterize_mode "antialiased" scales opacities by what the blur of eps2d [pixels^2] took. radius_clip [pixels] drops
    Gaussians no larger. packed: `meta` holds the visible ones alone. alpha_max: the most that one Gaussian covers, 0.99
    in Inria's code and from gsplat 1.6 on. channel_chunk and segmented change nothing here: any number of channels goes
    in one pass. The CPU takes pinhole cameras, dense gradients and 16-pixel tiles only.

    Returns render [..., C, H, W, X] (X: D, 1, or D + 1), alphas [..., C, H, W, 1], and meta: batch_ids, camera_ids,
    gaussian_ids (None unless packed), radii, means2d, depths, conics, opacities (with the compensation), tile_width,
    tile_height, tiles_per_gauss, isect_ids, flatten_ids, isect_offsets, width, height, tile_size, n_batches, n_cameras.
    After the backward pass with absgrad, meta["means2d"].absgrad is the sum over pixels of the gradient's magnitude.

    Gradients go to means, quats, scales, covars, opacities, colors, viewmats and backgrounds; not to Ks.
    Raises ValueError for shapes and options that do not fit, TypeError for dtypes, MemoryError where too many tiles are
    touched, KernelUnavailable on a CUDA device without gsplat.
    """
    options = {"sparse_grad": sparse_grad, "distributed": distributed} | others
    if _dispatch.backend_for(means.device, means.dtype, "splat") == _dispatch.GSPLAT:
        return gpu.rasterization(
            means, quats, scales, opacities, colors, viewmats, Ks, width, height, near_plane, far_plane, radius_clip,
            eps2d, sh_degree, packed, tile_size, backgrounds, render_mode, absgrad=absgrad, alpha_max=alpha_max,
            rasterize_mode=rasterize_mode, channel_chunk=channel_chunk, camera_model=camera_model, segmented=segmented,
            covars=covars, **options,
        )  # fmt: skip
    _check_options(options, camera_model, rasterize_mode, render_mode)
    batch = means.shape[:-2]
    flat = _flatten(batch, means, quats, scales, covars, opacities, viewmats, Ks)
    means, quats, scales, covars, opacities, viewmats, Ks = flat
    sizes = (len(means), viewmats.shape[1], means.shape[1])  # B, C, N
    colors = _colors_of(colors, sizes, batch, sh_degree)

    antialiased = rasterize_mode == "antialiased"
    limits: dict[str, Any] = {"near_plane": near_plane, "far_plane": far_plane, "radius_clip": radius_clip}
    shapes = (means, quats, scales, opacities, viewmats, Ks, covars)
    inputs = zip(*(_each(tensor, sizes[0]) for tensor in shapes), strict=True)
    parts = [
        stages.projection(m, q, s, o, v, k, width, height, eps2d=eps2d, antialiased=antialiased, covars=covar, **limits)
        for m, q, s, o, v, k, covar in inputs
    ]
    radii, means2d, depths, conics, compensations = map(_together, zip(*parts, strict=True))  # [B, C, N, ...]
    seen = (radii > 0).all(-1)
    opacities = opacities[:, None].expand(sizes)
    if antialiased:
        opacities = opacities * compensations
    ids = seen.nonzero(as_tuple=True) if packed else None
    meta = {"radii": radii, "means2d": means2d, "depths": depths, "conics": conics, "opacities": opacities}
    meta = {
        name: tensor.reshape(*batch, *tensor.shape[1:]) if ids is None else tensor[ids] for name, tensor in meta.items()
    }
    items = {name: _items(tensor, None, len(batch) + 2) if ids is None else tensor for name, tensor in meta.items()}
    if absgrad and ids is None:
        _pass_on_absgrad(items["means2d"], meta["means2d"])

    if sh_degree is None:
        values = _items(colors.expand(*sizes, colors.shape[-1]), ids)
    else:
        values = _items(_shaded(sh_degree, means, colors, viewmats, seen), ids)
    if "D" in render_mode:
        depth = items["depths"][:, None]
        values = torch.cat([values, depth], 1) if "RGB" in render_mode else depth
    render, alphas, tiles = stages.rasterize(
        items["means2d"], items["conics"], values, items["opacities"], items["radii"], items["depths"],
        _first(seen, packed), _backgrounds_of(backgrounds, sizes, batch, render_mode), width, height,
        alpha_max=alpha_max, tile_size=tile_size, absgrad=absgrad,
    )  # fmt: skip
    if "ED" in render_mode:
        expected = render[..., -1:] / alphas.clamp(min=1e-10)
        render = torch.cat([render[..., :-1], expected], -1)
    images = (*batch, sizes[1])
    meta |= _ids(ids, sizes) | _tiles(tiles, batch, sizes, width, height, tile_size, packed)
    return render.view(*images, *render.shape[1:]), alphas.view(*images, *alphas.shape[1:]), meta


def _check_options(options: dict[str, Any], camera_model: str, rasterize_mode: str, render_mode: str) -> None:
    for name, got, expected in (
        ("render_mode", render_mode, ("RGB", "D", "ED", "RGB+D", "RGB+ED")),
        ("rasterize_mode", rasterize_mode, ("classic", "antialiased")),
        ("camera_model", camera_model, ("pinhole",)),
    ):
        if got not in expected:
            raise ValueError(f"kernels.splat.rasterization: got {name}={got!r}; expected one of {', '.join(expected)}")
    for name, value in options.items():
        if name not in GSPLAT_ONLY:
            known = [*inspect.signature(rasterization).parameters, *GSPLAT_ONLY]
            near = difflib.get_close_matches(name, known, 1, cutoff=0)[0]
            raise TypeError(f"kernels.splat.rasterization: got an unknown argument {name!r}; did you mean {near!r}?")
        if value is not None and value is not False:
            raise ValueError(
                f"kernels.splat.rasterization: got {name}={value!r}, which the CPU does not have; leave it out, or "
                "move the tensors to a CUDA device, where gsplat does the work"
            )


def _flatten(batch: torch.Size, *tensors: Tensor | None) -> list[Any]:
    """Each tensor [..., n, ...] with its batch sizes as one."""
    out = []
    for tensor in tensors:
        if tensor is not None and tensor.shape[: len(batch)] != batch:
            raise ValueError(
                f"kernels.splat.rasterization: got a tensor of shape {tuple(tensor.shape)}; expected the batch sizes "
                f"{tuple(batch)} of means first"
            )
        out.append(tensor if tensor is None else tensor.reshape(batch.numel(), *tensor.shape[len(batch) :]))
    return out


def _colors_of(colors: Tensor, sizes: tuple[int, int, int], batch: torch.Size, sh_degree: int | None) -> Tensor:
    """[B, C or 1, N, D], with sh_degree [B, C or 1, N, K, 3]."""
    _, cameras, count = sizes
    flat = _flatten(batch, colors)[0]
    tail = 1 if sh_degree is None else 2  # sizes after N
    if flat.ndim == 2 + tail and flat.shape[1] == count:
        flat = flat[:, None]
    if flat.ndim != 3 + tail or flat.shape[1] not in (1, cameras) or flat.shape[2] != count:
        expected = "[..., N, D] or [..., C, N, D]" if tail == 1 else "[..., N, K, 3] or [..., C, N, K, 3]"
        raise ValueError(
            f"kernels.splat.rasterization: got colors {tuple(colors.shape)} for {count} Gaussians and {cameras} "
            f"cameras; expected {expected}" + ("" if tail == 1 else f" with sh_degree={sh_degree}")
        )
    return flat


def _shaded(degree: int, means: Tensor, coeffs: Tensor, viewmats: Tensor, seen: Tensor) -> Tensor:
    """Colours [B, C, N, 3] as the cameras see them: spherical harmonics plus a half, not below 0."""
    centres = torch.linalg.inv(viewmats)[..., :3, 3]  # [B, C, 3]
    dirs = means[:, None] - centres[:, :, None]
    coeffs = coeffs.squeeze(1)  # shared by the cameras, or not
    parts = [
        stages.spherical_harmonics(degree, *one, masks=mask)
        for *one, mask in zip(*(_each(tensor, len(means)) for tensor in (dirs, coeffs, seen)), strict=True)
    ]
    colors = _together(parts)
    return (colors + 0.5).clamp_min(0)


def _first(seen: Tensor, packed: bool) -> Tensor:
    """[B C + 1]: where each camera's items begin."""
    views, count = seen.shape[0] * seen.shape[1], seen.shape[2]
    if not packed:
        return torch.arange(views + 1, device=seen.device) * count
    counts = seen.sum(-1).flatten()
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _backgrounds_of(
    backgrounds: Tensor | None, sizes: tuple[int, int, int], batch: torch.Size, render_mode: str
) -> Tensor | None:
    """[B C, X] with a 0 for the depth."""
    if backgrounds is None:
        return None
    views = sizes[0] * sizes[1]
    if backgrounds.shape[:-1] != (*batch, sizes[1]):
        raise ValueError(
            f"kernels.splat.rasterization: got backgrounds {tuple(backgrounds.shape)}; expected [..., C, D], here "
            f"{[*batch, sizes[1], 'D']}"
        )
    flat = backgrounds.reshape(views, -1)
    if "D" not in render_mode:
        return flat
    zero = flat.new_zeros(views, 1)
    return torch.cat([flat, zero], 1) if "RGB" in render_mode else zero


def _each(tensor: Tensor | None, count: int) -> Sequence[Any]:
    """[B, ...] -> B tensors, or B times None. A batch of one is only viewed: an index would cost a copy going back."""
    if tensor is None:
        return [None] * count
    return [tensor.squeeze(0)] if len(tensor) == 1 else tensor.unbind()


def _together(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tuple(tensors))


def _items(tensor: Tensor, ids: tuple[Tensor, ...] | None, sizes: int = 3) -> Tensor:
    """[B, C, N, ...] as items [M, ...]: all, or those of the ids."""
    return tensor.flatten(0, sizes - 1) if ids is None else tensor[ids]


def _pass_on_absgrad(items: Tensor, means2d: Tensor) -> None:
    """Gives `means2d` the attribute that the backward pass sets on `items`, the same numbers in another shape."""
    if means2d.requires_grad:

        def hook(_: Tensor) -> None:
            means2d.absgrad = items.absgrad.view(means2d.shape)  # type: ignore[attr-defined]

        means2d.register_hook(hook)


def _ids(ids: tuple[Tensor, ...] | None, sizes: tuple[int, int, int]) -> dict[str, Any]:
    names = ("batch_ids", "camera_ids", "gaussian_ids")
    found = dict(zip(names, ids, strict=True)) if ids is not None else dict.fromkeys(names)
    return found | {"n_batches": sizes[0], "n_cameras": sizes[1]}


def _tiles(
    tiles: dict[str, Tensor],
    batch: torch.Size,
    sizes: tuple[int, int, int],
    width: int,
    height: int,
    tile_size: int,
    packed: bool,
) -> dict[str, Any]:
    out: dict[str, Any] = dict(tiles)
    if tiles:
        offsets = tiles["isect_offsets"]
        out["isect_offsets"] = offsets.view(*batch, sizes[1], *offsets.shape[1:])
        if not packed:
            out["tiles_per_gauss"] = tiles["tiles_per_gauss"].view(*batch, *sizes[1:])
    out |= {"width": width, "height": height, "tile_size": tile_size}
    return out | {"tile_width": -(-width // tile_size), "tile_height": -(-height // tile_size)}
