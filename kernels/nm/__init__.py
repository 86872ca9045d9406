"""N:M sparsity: which weights are kept, a packed format, and a linear layer that runs on it.

    from kernels import nm
    packed = nm.pack(weight, 2, 8)
    y = nm.linear(x, packed, bias)

Any n of any m up to 256, float32 and bfloat16 weights, any batch. On the CPU: C++ (AVX2, AVX-512, portable); on CUDA
Triton, and torch's own kernels for 2:4. In float64 and on other devices the plain-torch `reference.py`, the
specification, runs. KERNELS_BACKEND=reference|cpu|triton forces one. The same call gives the same bits again, whatever
the number of threads. `speedup` says where packed products pay; where they do not, `linear` runs dense and says so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.nm import crossover, ops, reference
from kernels.nm.crossover import autotune, speedup
from kernels.nm.tensor import LARGEST, NMTensor, packed_from

__all__ = ["NMTensor", "autotune", "linear", "mask", "pack", "speedup"]


def mask(weight: Tensor, n: int, m: int, dim: int = -1, *, transposable: bool = False, ragged: bool = False) -> Tensor:
    """The n largest magnitudes of every m along `dim`: bool of the same shape, exactly n of every group, also on ties.

    weight        real floating point, any shape and stride; or any score whose magnitude ranks the weights
    n, m          0 <= n <= m, m >= 1
    transposable  tiles of m x m over the last two axes, n in every row and column of a tile, so that the transpose is
                  n:m too; the mask that keeps the largest sum of magnitudes (`dim` has no meaning then)
    ragged        let m not divide the axis: a last group of r keeps min(n, r)

    Of equal magnitudes the first is kept. NaN counts as larger than everything, so that it is not hidden.

    Returns the mask. Raises TypeError for integer, bool and complex weights, ValueError for n, m or an axis that do not
    fit, KernelUnavailable where no kernel serves.
    """
    if not weight.is_floating_point():
        raise TypeError(f"kernels.nm.mask: got dtype {weight.dtype}; expected real floating point, e.g. weight.float()")
    if not (m >= 1 and 0 <= n <= m):
        raise ValueError(f"kernels.nm.mask: got {n}:{m}; expected 0 <= n <= m and m >= 1")
    size = weight.shape[dim]
    if size % m and not ragged:
        raise ValueError(
            f"kernels.nm.mask: axis {dim} of {list(weight.shape)} has {size} entries, which {m} does not divide; "
            "choose another m or axis, leave this layer out, or pass ragged=True"
        )
    if transposable:
        raise NotImplementedError("kernels.nm.mask: transposable masks are on their way")
    with torch.no_grad():
        return reference.mask(weight.movedim(dim, -1), n, m).movedim(-1, dim)


def pack(weight: Tensor, n: int, m: int, kept: Tensor | None = None, *, dtype: torch.dtype | None = None) -> NMTensor:
    """The packed form of a weight with groups along its last axis.

    weight  [O, K], float32, bfloat16, float16 (stored as float32) or float64; m divides K; O is free
    n, m    1 <= n <= m <= 256
    kept    [O, K] bool, at most n of every m; by default `mask(weight, n, m)`
    dtype   of the stored values, float32 or bfloat16; by default the weight's

    Returns an NMTensor, without a history of its own: train its `values`. Raises TypeError for dtypes, ValueError for
    shapes, patterns and masks that do not fit, KernelUnavailable where no kernel serves.
    """
    if weight.ndim != 2 or not weight.numel():
        raise ValueError(f"kernels.nm.pack: got a weight of {list(weight.shape)}; expected [O, K], none of them 0")
    if not 1 <= n <= m <= LARGEST:
        raise ValueError(f"kernels.nm.pack: got {n}:{m}; expected 1 <= n <= m <= {LARGEST}")
    kept = mask(weight, n, m) if kept is None else kept
    if kept.shape != weight.shape or kept.dtype != torch.bool:
        raise ValueError(
            f"kernels.nm.pack: got a mask {list(kept.shape)} of {kept.dtype} for a weight {list(weight.shape)}; "
            "expected torch.bool of the same shape, e.g. nm.mask(weight, n, m)"
        )
    if weight.shape[1] % m:
        raise ValueError(
            f"kernels.nm.pack: got a weight of {list(weight.shape)}, whose {weight.shape[1]} columns {m} does not "
            "divide; choose another m, or leave this layer out"
        )
    stored = dtype or (torch.float32 if weight.dtype == torch.float16 else weight.dtype)
    if stored not in (torch.float32, torch.bfloat16, torch.float64) or not weight.is_floating_point():
        raise TypeError(f"kernels.nm.pack: got {weight.dtype}, to be stored as {stored}; expected float32 or bfloat16")
    return packed_from(weight.to(stored), kept, n, m)


def linear(
    x: Tensor,
    packed: NMTensor,
    bias: Tensor | None = None,
    *,
    straight_through: Tensor | None = None,
    dense: bool | None = None,
) -> Tensor:
    """x W^T + bias of a packed weight W [O, K].

    x                 [..., K], float32, bfloat16 or float16; sums are float32 (float64 with float64 values: for checks)
    bias              [O]
    straight_through  the dense weight [O, K] that W was packed from, which then gets the whole gradient dy^T x, also
                      where W has zeros (Bengio et al. 2013); without it `packed.values` gets its own, at the kept
                      entries alone
    dense             run torch's dense product instead; by default where `speedup` knows it to be faster

    Gradients go to x, bias, and straight_through or packed.values.

    Returns [..., O] in the dtype of x. Raises ValueError for shapes, TypeError for dtypes, KernelUnavailable where no
    kernel serves the device.
    """
    rows, columns = packed.shape
    if x.ndim < 1 or x.shape[-1] != columns:
        raise ValueError(f"kernels.nm.linear: got x of {list(x.shape)}; expected [..., {columns}]")
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"kernels.nm.linear: got a bias of {list(bias.shape)}; expected [{rows}]")
    if straight_through is not None and straight_through.shape != packed.shape:
        raise ValueError(
            f"kernels.nm.linear: got straight_through of {list(straight_through.shape)}; expected {list(packed.shape)}"
        )
    for tensor, name in ((x, "x"), (bias, "bias")):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"kernels.nm.linear: got {name} of {tensor.dtype}; expected real floating point")
    tokens = x.shape[:-1].numel()
    if dense is None:
        dense = x.device.type == "cpu" and crossover.dense_is_faster(packed.n, packed.m, tokens, packed.dtype)
    compute = torch.float64 if packed.dtype == torch.float64 else torch.float32
    bias = None if bias is None else bias.to(compute)
    if dense and straight_through is None:
        y = torch.nn.functional.linear(x.to(compute), packed.to_dense().to(compute), bias)
    else:
        y = ops.linear(x.reshape(tokens, columns).to(compute), packed, bias, straight_through)
    return y.reshape(*x.shape[:-1], rows).to(x.dtype)
