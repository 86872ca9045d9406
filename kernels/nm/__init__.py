"""N:M sparsity: which weights are kept, a packed format, and a linear layer that runs on it.

    from kernels import nm
    packed = nm.pack(weight, 2, 8)
    y = nm.linear(x, packed, bias)

    packed = nm.pack(weight, 2, 8, vector=64)   # 64 rows share their places: for many tokens on a GPU

Any n of any m up to 256, float32 and bfloat16 weights, any batch. On the CPU: C++ (AVX2, AVX-512, portable, and AMX for
bfloat16 weights and inputs of many tokens); on CUDA Triton, with packing in plain torch. In float64 and on other
devices the plain-torch `reference.py`, the specification, runs. KERNELS_BACKEND=reference|cpu|triton forces one. The
same call gives the same bits again, whatever the number of threads; with vectors on the CPU, where torch's BLAS
multiplies, at a fixed number. `speedup` says where packed products pay on the CPU; where they do not, `linear` runs
dense and says so. On CUDA it never does: `make gpu-check` measures there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.nm import ops
from kernels.nm.crossover import autotune, speedup
from kernels.nm.masks import mask
from kernels.nm.tensor import LARGEST, NMTensor, packed_from, require_vector

__all__ = ["NMTensor", "autotune", "linear", "mask", "pack", "speedup"]


def pack(
    weight: Tensor,
    n: int,
    m: int,
    kept: Tensor | None = None,
    *,
    vector: int = 1,
    dtype: torch.dtype | None = None,
) -> NMTensor:
    """The packed form of a weight with groups along its last axis.

    weight  [O, K], float32, bfloat16, float16 (stored as float32) or float64; m divides K; O is free
    n, m    1 <= n <= m <= 256
    kept    [O, K] bool, at most n of every m; by default `mask(weight, n, m, vector=vector)`
    vector  rows that share their places, 16, 32, 64, 128 or 256: their products are dense ones of n/m of the size, for
            many tokens, where 1 is for few. It costs accuracy, for a column is kept for all of the rows or for none
    dtype   of the stored values, float32 or bfloat16; by default the weight's

    Returns an NMTensor, without a history of its own: train its `values`. Raises TypeError for dtypes, ValueError for
    shapes, patterns and masks that do not fit, KernelUnavailable where no kernel serves.
    """
    if weight.ndim != 2 or not weight.numel():
        raise ValueError(f"kernels.nm.pack: got a weight of {list(weight.shape)}; expected [O, K], none of them 0")
    if not 1 <= n <= m <= LARGEST:
        raise ValueError(f"kernels.nm.pack: got {n}:{m}; expected 1 <= n <= m <= {LARGEST}")
    require_vector(vector, "pack")
    kept = mask(weight, n, m, vector=vector) if kept is None else kept
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
    return packed_from(weight.to(stored), kept, n, m, vector)


def linear(
    x: Tensor,
    packed: NMTensor,
    bias: Tensor | None = None,
    *,
    straight_through: Tensor | None = None,
    dense: bool | None = None,
) -> Tensor:
    """x W^T + bias of a packed weight W [O, K].

    x                 [..., K], float32, bfloat16 or float16; products and sums are as good as float32's (float64 with
                      float64 values: for checks). On CUDA, and with bfloat16 x and values on CPUs with AMX, products
                      of many tokens meet all of x: a NaN or an infinity makes its whole token NaN, as dense ones do
    bias              [O]
    straight_through  the dense weight [O, K] that W was packed from, which then gets the whole gradient dy^T x, also
                      where W has zeros (Bengio et al. 2013); without it `packed.values` gets its own, at the kept
                      entries alone
    dense             run torch's dense product instead; by default on the CPU where `speedup` knows it to be faster.
                      Gradients are packed products all the same

    Gradients go to x, bias, and straight_through or packed.values.

    On CUDA products are for few tokens, when reading the weight is what takes the time, unless rows share their places
    (`vector` of `pack`): those are for many. For many tokens and 2:4 torch has kernels of its own, for another format:
    `torch.nn.functional.linear(x, packed.to_semi_structured())` with bfloat16 x and values, where the GPU and its
    cuSPARSELt serve them.

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
    compute = torch.float64 if packed.dtype == torch.float64 else torch.float32
    bias = None if bias is None else bias.to(compute)
    if x.dtype == packed.dtype == torch.bfloat16:
        compute = torch.bfloat16  # products are exact and sums float32 all the same: a wider x gains nothing
    y = ops.linear(x.reshape(tokens, columns).to(compute), packed, bias, straight_through, dense)
    return y.reshape(*x.shape[:-1], rows).to(x.dtype)
