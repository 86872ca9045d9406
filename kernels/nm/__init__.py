"""N:M sparsity: which weights are kept, a packed format, and a linear layer that runs on it.

from kernels import nm
kept = nm.mask(weight, 2, 4)
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.nm import reference

__all__ = ["mask"]


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
