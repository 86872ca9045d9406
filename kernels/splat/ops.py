"""The compiled stages as torch ops: memory, gradients, shapes for tracing. `stages.py` checks the arguments before."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels._load import native

TILE = 16  # pixels a side, as in tile.h


def project(
    means: Tensor,
    quats: Tensor | None,
    scales: Tensor | None,
    covars: Tensor | None,
    opacities: Tensor | None,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    limits: Sequence[float],
    antialiased: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See stages.projection; limits: near and far plane, radius clip, eps2d."""
    return _project(means, quats, scales, covars, opacities, viewmats, Ks, width, height, list(limits), antialiased)


def harmonics(degree: int, dirs: Tensor, coeffs: Tensor, masks: Tensor | None) -> Tensor:
    """dirs [R, N, 3]; coeffs [N, K, 3] or [R, N, K, 3]; masks [R, N] or None -> [R, N, 3]."""
    return _harmonics(degree, dirs, coeffs, masks)


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
    alpha_max: float,
    absgrad: bool,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """See stages.rasterize."""
    boxes, ids, keys, offsets = _bin(means2d, radii, depths, first, width, height)
    render, alphas, *_ = _rasterize(
        means2d, conics, colors, opacities, backgrounds, boxes, ids, offsets, width, height, alpha_max, absgrad
    )
    rows, columns = -(-height // TILE), -(-width // TILE)
    tiles = {
        "tiles_per_gauss": boxes.view(torch.int32).view(-1, 6)[:, 2] * boxes.view(torch.int32).view(-1, 6)[:, 3],
        "isect_ids": keys,
        "flatten_ids": ids,
        "isect_offsets": offsets[:-1].view(len(first) - 1, rows, columns).int(),
    }
    return render, alphas, tiles


def _threads() -> int:
    return torch.get_num_threads()


def _plain(*tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor.detach().contiguous() for tensor in tensors]


# --- projection


def _project_kernel(
    means: Tensor,
    quats: Tensor | None,
    scales: Tensor | None,
    covars: Tensor | None,
    opacities: Tensor | None,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    limits: Sequence[float],
    antialiased: bool,
) -> tuple[Tensor, ...]:
    out = _project_fake(means, quats, scales, covars, opacities, viewmats)
    inputs = _plain(means, quats, scales, covars, opacities, viewmats, Ks)
    native().splat_project(*inputs, width, height, *limits, antialiased, *out, _threads())
    return out


def _project_fake(means: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    size = (rest[4].shape[0], means.shape[0])
    radii = means.new_empty((*size, 2), dtype=torch.int32)
    return radii, *(means.new_empty(shape) for shape in ((*size, 2), size, (*size, 3), size))


def _project_backward_kernel(
    means: Tensor,
    quats: Tensor | None,
    scales: Tensor | None,
    covars: Tensor | None,
    viewmats: Tensor,
    Ks: Tensor,
    radii: Tensor,
    grads: Sequence[Tensor],
    width: int,
    height: int,
    eps2d: float,
    antialiased: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = _plain(means, quats, scales, covars, viewmats, Ks)
    out = _project_backward_fake(means, quats, scales, covars, viewmats)
    given = [None if tensor.ndim == 1 else tensor for tensor in out]
    native().splat_project_backward(
        *inputs, width, height, eps2d, antialiased, *_plain(radii, *grads), *given, _threads()
    )
    return out


def _project_backward_fake(means: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    quats, scales, covars, viewmats = (means.new_empty(0 if t is None else t.shape) for t in rest[:4])
    return means.new_empty(means.shape), quats, scales, covars, viewmats


def _project_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.width, ctx.height, limits, ctx.antialiased = inputs
    means, quats, scales, covars, _, viewmats, Ks = tensors
    ctx.eps2d = limits[3]
    ctx.save_for_backward(means, quats, scales, covars, viewmats, Ks, output[0])
    ctx.mark_non_differentiable(output[0])


def _project_gradient(ctx: Any, _: None, *grads: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, radii = ctx.saved_tensors
    means, *shape, viewmats = _project_backward(
        *inputs, radii, list(grads), ctx.width, ctx.height, ctx.eps2d, ctx.antialiased
    )
    shape = [None if t.ndim == 1 else t for t in shape]
    return means, *shape, None, viewmats, None, None, None, None, None


# --- spherical harmonics


def _harmonics_kernel(degree: int, dirs: Tensor, coeffs: Tensor, masks: Tensor | None) -> Tensor:
    out = torch.empty_like(dirs, memory_format=torch.contiguous_format)
    native().splat_harmonics(degree, *_plain(dirs, coeffs), _bytes(masks), out, _threads())
    return out


def _harmonics_fake(degree: int, dirs: Tensor, coeffs: Tensor, masks: Tensor | None) -> Tensor:
    return torch.empty_like(dirs, memory_format=torch.contiguous_format)


def _harmonics_backward_kernel(
    degree: int, dirs: Tensor, coeffs: Tensor, masks: Tensor | None, grad: Tensor
) -> tuple[Tensor, Tensor]:
    out = _harmonics_backward_fake(degree, dirs, coeffs)
    dirs, coeffs, grad = _plain(dirs, coeffs, grad)
    native().splat_harmonics_backward(degree, dirs, coeffs, _bytes(masks), grad, *out, _threads())
    return out


def _harmonics_backward_fake(degree: int, dirs: Tensor, coeffs: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return dirs.new_empty(dirs.shape), coeffs.new_empty(coeffs.shape)


def _harmonics_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.degree, *tensors = inputs
    ctx.save_for_backward(*tensors)


def _harmonics_gradient(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor, None]:
    dirs, coeffs = _harmonics_backward(ctx.degree, *ctx.saved_tensors, grad)
    return None, dirs, coeffs, None


def _bytes(masks: Tensor | None) -> Tensor | None:
    return None if masks is None else masks.contiguous().view(torch.uint8)


# --- rasterization


def _bin_kernel(
    means2d: Tensor, radii: Tensor, depths: Tensor, first: Tensor, width: int, height: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    means2d, radii, depths, first = _plain(means2d, radii, depths, first)
    boxes = torch.empty(len(means2d), 3, dtype=torch.int64)
    pairs = native().splat_boxes(means2d, radii, depths, width, height, boxes, _threads())
    _check_memory(pairs, len(means2d), width, height)
    ids, keys = torch.empty(pairs, dtype=torch.int32), torch.empty(pairs, dtype=torch.int64)
    offsets = torch.empty(_tiles(first, width, height) + 1, dtype=torch.int64)
    native().splat_bin(depths, boxes, first, width, height, ids, keys, offsets, _threads())
    return boxes, ids, keys, offsets


def _bin_fake(
    means2d: Tensor, radii: Tensor, depths: Tensor, first: Tensor, width: int, height: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pairs = torch.library.get_ctx().new_dynamic_size()
    return (
        means2d.new_empty((means2d.shape[0], 3), dtype=torch.int64),
        means2d.new_empty(pairs, dtype=torch.int32),
        means2d.new_empty(pairs, dtype=torch.int64),
        means2d.new_empty(_tiles(first, width, height) + 1, dtype=torch.int64),
    )


def _tiles(first: Tensor, width: int, height: int) -> int:
    return (first.shape[0] - 1) * -(-width // TILE) * -(-height // TILE)


def _check_memory(pairs: int, items: int, width: int, height: int) -> None:
    needed = pairs * (4 + 8 + 8 + 64)
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**62
    if pairs >= 2**31 or needed > there:
        raise MemoryError(
            f"kernels.splat: {items} Gaussians touch {pairs:,} tiles of {width} x {height} pixels, which takes "
            f"{needed / 2**30:.0f} GiB (the machine has {there / 2**30:.0f}); expected fewer; make the Gaussians "
            "smaller (their scales may have diverged) or fewer, or the images smaller"
        )


def _rasterize_kernel(
    means2d: Tensor,
    conics: Tensor,
    colors: Tensor,
    opacities: Tensor,
    backgrounds: Tensor | None,
    boxes: Tensor,
    ids: Tensor,
    offsets: Tensor,
    width: int,
    height: int,
    alpha_max: float,
    absgrad: bool,
) -> tuple[Tensor, ...]:
    render, alphas, transmittance, records, masks = _rasterize_fake(
        means2d, conics, colors, opacities, backgrounds, boxes, ids, offsets, width, height
    )
    inputs = _plain(means2d, conics, colors, opacities, ids, offsets, backgrounds)
    native().splat_forward(*inputs, width, height, alpha_max, records, masks, render, transmittance, _threads())
    torch.sub(1, transmittance[..., None], out=alphas)
    return render, alphas, transmittance, records, masks


def _rasterize_fake(
    means2d: Tensor,
    conics: Tensor,
    colors: Tensor,
    opacities: Tensor,
    backgrounds: Tensor | None,
    boxes: Tensor,
    ids: Tensor,
    offsets: Tensor,
    width: int,
    height: int,
    *_: Any,
) -> tuple[Tensor, ...]:
    channels = colors.shape[1]
    cameras = (offsets.shape[0] - 1) // (-(-width // TILE) * -(-height // TILE))
    return (
        colors.new_empty(cameras, height, width, channels),
        colors.new_empty(cameras, height, width, 1),
        colors.new_empty(cameras, height, width),
        colors.new_empty(colors.shape[0], _record_floats(channels)),
        colors.new_empty(ids.shape, dtype=torch.int64),
    )


def _record_floats(channels: int) -> int:
    return 8 + -(-channels // 8) * 8


def _rasterize_backward_kernel(
    means2d: Tensor,
    conics: Tensor,
    colors: Tensor,
    opacities: Tensor,
    boxes: Tensor,
    ids: Tensor,
    offsets: Tensor,
    render: Tensor,
    transmittance: Tensor,
    records: Tensor,
    masks: Tensor,
    grad_render: Tensor,
    grad_alphas: Tensor,
    width: int,
    height: int,
    alpha_max: float,
    absgrad: bool,
) -> tuple[Tensor, ...]:
    out = _rasterize_backward_fake(means2d, conics, colors, opacities)
    scratch = records.new_empty(len(ids), records.shape[1])
    inputs = _plain(means2d, conics, colors, opacities, ids, offsets)
    state = _plain(boxes, records, masks, render, transmittance, grad_render, grad_alphas)
    given = [*out[:4], out[4] if absgrad else None]
    native().splat_backward(*inputs, width, height, alpha_max, *state, scratch, *given, _threads())
    return out


def _rasterize_backward_fake(
    means2d: Tensor, conics: Tensor, colors: Tensor, opacities: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (means2d, conics, colors, opacities, means2d))


def _rasterize_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    means2d, conics, colors, opacities, backgrounds, boxes, ids, offsets, *ctx.options = inputs
    render, _, transmittance, records, masks = output
    ctx.has_background = backgrounds is not None
    ctx.save_for_backward(
        means2d, conics, colors, opacities, boxes, ids, offsets, render, transmittance, records, masks
    )
    ctx.mark_non_differentiable(transmittance, records, masks)
    ctx.set_materialize_grads(False)


def _rasterize_gradient(ctx: Any, grad_render: Tensor | None, grad_alphas: Tensor | None, *_: None) -> tuple:
    saved = ctx.saved_tensors
    means2d, render, transmittance = saved[0], saved[7], saved[8]
    grad_render = torch.zeros_like(render) if grad_render is None else grad_render
    grad_alphas = torch.zeros_like(transmittance) if grad_alphas is None else grad_alphas
    *grads, absolute = _rasterize_backward(*saved, grad_render, grad_alphas, *ctx.options)
    if ctx.options[-1]:
        means2d.absgrad = absolute
    background = torch.einsum("chwd,chw->cd", grad_render, transmittance) if ctx.has_background else None
    return *grads, background, *[None] * 7


# Defined piece by piece because `torch.library.custom_op` imports the compiler on the first call, which takes seconds.
_library = torch.library.Library("resparse", "FRAGMENT")
_SHAPE = "Tensor means, Tensor? quats, Tensor? scales, Tensor? covars"
_ITEMS = "Tensor means2d, Tensor conics, Tensor colors, Tensor opacities"
_PAIRS = "Tensor boxes, Tensor ids, Tensor offsets"
_IMAGE = "SymInt width, SymInt height"
for _definition, _kernel, _fake in (
    (
        f"splat_project({_SHAPE}, Tensor? opacities, Tensor viewmats, Tensor Ks, {_IMAGE}, float[] limits, "
        "bool antialiased) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _project_kernel,
        _project_fake,
    ),
    (
        f"splat_project_backward({_SHAPE}, Tensor viewmats, Tensor Ks, Tensor radii, Tensor[] grads, {_IMAGE}, "
        "float eps2d, bool antialiased) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _project_backward_kernel,
        _project_backward_fake,
    ),
    (
        "splat_harmonics(int degree, Tensor dirs, Tensor coeffs, Tensor? masks) -> Tensor",
        _harmonics_kernel,
        _harmonics_fake,
    ),
    (
        "splat_harmonics_backward(int degree, Tensor dirs, Tensor coeffs, Tensor? masks, Tensor grad) "
        "-> (Tensor, Tensor)",
        _harmonics_backward_kernel,
        _harmonics_backward_fake,
    ),
    (
        f"splat_bin(Tensor means2d, Tensor radii, Tensor depths, Tensor first, {_IMAGE}) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        _bin_kernel,
        _bin_fake,
    ),
    (
        f"splat_rasterize({_ITEMS}, Tensor? backgrounds, {_PAIRS}, {_IMAGE}, float alpha_max, bool absgrad) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _rasterize_kernel,
        _rasterize_fake,
    ),
    (
        f"splat_rasterize_backward({_ITEMS}, {_PAIRS}, Tensor render, Tensor transmittance, Tensor records, "
        f"Tensor masks, Tensor grad_render, Tensor grad_alphas, {_IMAGE}, float alpha_max, bool absgrad) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _rasterize_backward_kernel,
        _rasterize_backward_fake,
    ),
):
    _library.define(_definition)
    _op = getattr(torch.ops.resparse, _definition[: _definition.index("(")]).default
    _library.impl(_op, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(_op, _fake, lib=_library)
_ops = torch.ops.resparse
_project, _project_backward = _ops.splat_project.default, _ops.splat_project_backward.default
_harmonics, _harmonics_backward = _ops.splat_harmonics.default, _ops.splat_harmonics_backward.default
_rasterize, _rasterize_backward = _ops.splat_rasterize.default, _ops.splat_rasterize_backward.default
_bin = _ops.splat_bin.default


def _no_second(ctx: Any, *_: Any) -> Any:
    raise NotImplementedError(
        "kernels.splat: got create_graph=True on compiled ops, which have no second derivatives; expected first ones; "
        "use float64 tensors or KERNELS_BACKEND=reference"
    )


for _op, _gradient, _setup in (
    (_project_backward, _no_second, None),
    (_harmonics_backward, _no_second, None),
    (_rasterize_backward, _no_second, None),
    (_project, _project_gradient, _project_setup),
    (_harmonics, _harmonics_gradient, _harmonics_setup),
    (_rasterize, _rasterize_gradient, _rasterize_setup),
):
    torch.library.register_autograd(_op, _gradient, setup_context=_setup, lib=_library)
