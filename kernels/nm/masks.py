"""The search for N:M masks: its arguments, and the op behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import _dispatch
from kernels._load import native
from kernels.nm import reference
from kernels.nm.tensor import require_vector

LARGEST_TILE = 64  # as in mask.h
LARGEST_ON_GPU = 64  # group that the Triton kernel serves


def mask(
    weight: Tensor,
    n: int,
    m: int,
    dim: int = -1,
    *,
    transposable: bool = False,
    ragged: bool = False,
    vector: int = 1,
) -> Tensor:
    """The n largest magnitudes of every m along `dim`: bool of the same shape, exactly n of every group, also on ties.

    weight        real floating point, any shape and stride; or any score whose magnitude ranks the weights
    n, m          0 <= n <= m, m >= 1; with `transposable` m <= 64
    transposable  tiles of m x m over the last two axes, n in every row and column of a tile, so that the transpose is
                  n:m too; of all such masks the one that keeps the largest sum of magnitudes (for sums, those of a tile
                  are rounded to 45 bits below its largest). Leading axes are a batch, `dim` has no meaning
    ragged        let m not divide the axis: a last group of r keeps min(n, r)
    vector        1, 16, 32, 64, 128 or 256 neighbours along the axis before `dim` (the rows of a matrix) keep the same
                  n of every m, those with the largest sums of magnitudes; the last vector may be shorter

    Of equal magnitudes the first is kept. NaN counts as larger than everything, so that it is not hidden.
    Transposable masks are found by trying all tiles for m <= 4, else by minimum-cost flow, measured to be 7 to 34 times
    slower. On CUDA the reference finds them, and masks of m > 64: slow, and transposable ones on the CPU.

    Returns the mask, without a gradient, in the memory layout of the weight. Raises TypeError for integer, bool and
    complex weights, ValueError for n, m, a vector or an axis that do not fit, KernelUnavailable where no kernel serves.
    """
    _check(weight, n, m)
    require_vector(vector, "mask")
    if transposable:
        _check_tiles(weight, m, ragged, vector)
        return _mask(_score(weight), n, m, -1, True)
    if not -weight.ndim <= dim < weight.ndim:
        raise ValueError(
            f"kernels.nm.mask: got axis {dim} of a weight {list(weight.shape)}; expected one of its {weight.ndim} axes"
        )
    size = weight.shape[dim]
    if size % m and not ragged:
        raise ValueError(
            f"kernels.nm.mask: axis {dim} of {list(weight.shape)} has {size} entries, which {m} does not divide; "
            "choose another m or axis, leave this layer out, or pass ragged=True"
        )
    dim = dim if dim < 0 else dim - weight.ndim
    if vector == 1:
        return _mask(_score(weight), n, m, dim, False)
    if dim == -weight.ndim:
        raise ValueError(
            f"kernels.nm.mask: got vectors of {vector} for the first axis of a weight {list(weight.shape)}; expected "
            "an axis before that of the groups; turn the weight over, e.g. with weight.mT"
        )
    return _shared(_score(weight), n, m, dim, vector)


def _check(weight: Tensor, n: int, m: int) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"kernels.nm.mask: got {type(weight).__name__}; expected a torch.Tensor; use torch.as_tensor(weight)"
        )
    if not weight.is_floating_point():
        raise TypeError(f"kernels.nm.mask: got dtype {weight.dtype}; expected real floating point, e.g. weight.float()")
    if not (m >= 1 and 0 <= n <= m):
        raise ValueError(f"kernels.nm.mask: got {n}:{m}; expected 0 <= n <= m and m >= 1")


def _check_tiles(weight: Tensor, m: int, ragged: bool, vector: int) -> None:
    sizes = list(weight.shape)
    if vector > 1:
        raise ValueError(
            f"kernels.nm.mask: got transposable=True with vectors of {vector}; the rows of a vector keep one pattern, "
            "those of a tile several; choose one of the two"
        )
    if ragged:
        raise ValueError(
            "kernels.nm.mask: got transposable=True with ragged=True; a tile has no last group to shorten; choose an m "
            "that divides both axes, or pad the weight"
        )
    if m > LARGEST_TILE:
        raise ValueError(f"kernels.nm.mask: got transposable tiles of m = {m}; expected m <= {LARGEST_TILE}")
    if weight.ndim < 2 or sizes[-1] % m or sizes[-2] % m:
        raise ValueError(
            f"kernels.nm.mask: got a weight {sizes} for transposable tiles of {m} x {m}; expected [..., rows, columns] "
            f"that {m} divides; choose another m, leave this layer out, or move the axes to the end (a convolution's "
            "with weight.permute(2, 3, 0, 1))"
        )


def _score(weight: Tensor) -> Tensor:
    """Narrow floats become float32, which is exact; float64 stays."""
    return weight.detach() if weight.dtype == torch.float64 else weight.detach().float()


def _shared(score: Tensor, n: int, m: int, dim: int, vector: int) -> Tensor:
    """The mask of the sums of |score| over each vector, for all of its rows; dim < 0."""
    rows = score.abs().movedim(dim - 1, 0)
    whole = len(rows) // vector
    sums = rows[: whole * vector].unflatten(0, (whole, vector)).sum(dim=1)
    if whole * vector < len(rows):
        sums = torch.cat([sums, rows[whole * vector :].sum(dim=0, keepdim=True)])
    kept = _mask(sums.movedim(0, dim - 1), n, m, dim, False).repeat_interleave(vector, dim - 1)
    out = torch.empty_like(score, dtype=torch.bool)
    return out.copy_(kept.narrow(dim - 1, 0, len(rows)))


def _mask_kernel(score: Tensor, n: int, m: int, dim: int, transposable: bool) -> Tensor:
    out = torch.empty_like(score, dtype=torch.bool)
    backend = _dispatch.backend_for(score.device, score.dtype, "nm")
    if not score.numel():
        return out
    if backend == _dispatch.TRITON and (transposable or m > LARGEST_ON_GPU):
        got = "a transposable mask" if transposable else f"groups of {m}"
        _dispatch.refuse_forced(backend, "nm.mask", got, f"groups of at most {LARGEST_ON_GPU} along one axis")
        backend = _dispatch.REFERENCE
    if backend == _dispatch.REFERENCE:
        if transposable:
            return out.copy_(reference.transposable_mask(score, n, m))
        return out.copy_(reference.mask(score.movedim(dim, -1), n, m).movedim(-1, dim))
    if transposable:
        score = score.contiguous()
        found = out if out.is_contiguous() else torch.empty_like(score, dtype=torch.bool)
        sizes = (-1, *score.shape[-2:])
        native().nm_transposable_mask(
            score.view(sizes), n, m, found.view(torch.uint8).view(sizes), torch.get_num_threads()
        )
        return out.copy_(found) if found is not out else out
    # the same bytes seen as a contiguous [outer, axis, inner]
    if score.stride() != out.stride():
        score = torch.empty_like(out, dtype=score.dtype).copy_(score)
    order = sorted(range(out.ndim), key=out.stride, reverse=True)
    at = order.index(dim + out.ndim)
    outer, inner = (torch.Size([out.shape[i] for i in axes]).numel() for axes in (order[:at], order[at + 1 :]))
    plain, bytes_ = (t.permute(order).view(outer, -1, inner) for t in (score, out.view(torch.uint8)))
    if backend == _dispatch.TRITON:
        from kernels.nm import mask_triton

        mask_triton.mask(plain, n, m, bytes_)
    else:
        native().nm_mask(plain, n, m, bytes_, torch.get_num_threads())
    return out


def _mask_fake(score: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(score, dtype=torch.bool)


def _mask_vmap(info: Any, in_dims: tuple, score: Tensor, n: int, m: int, dim: int, transposable: bool) -> Any:
    return _mask(score.movedim(in_dims[0], 0), n, m, dim, transposable), 0


# Defined piece by piece because `torch.library.custom_op` imports the compiler on the first call, which takes seconds.
_library = torch.library.Library("resparse", "FRAGMENT")
_library.define("nm_mask(Tensor score, int n, int m, int dim, bool transposable) -> Tensor")  # dim < 0
_mask = torch.ops.resparse.nm_mask.default
_library.impl(_mask, _mask_kernel, "CompositeExplicitAutograd")
torch.library.register_fake(_mask, _mask_fake, lib=_library)
torch.library.register_vmap(_mask, _mask_vmap, lib=_library)
