"""Masks on the GPU, in Triton: every weight's rank in its group by comparing it with all others there.

For which Triton and where it is checked, see `triton.py`.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from kernels.nm.triton import jit, on

with contextlib.suppress(ModuleNotFoundError):  # see triton.py
    import triton
    import triton.language as tl

__all__ = ["mask"]


def mask(score: Tensor, n: int, m: int, out: Tensor) -> None:
    """out [outer, axis, inner] uint8: 1 at the n largest |score| of every m along the axis; both contiguous.

    score float32; m <= 64 (`masks.LARGEST_ON_GPU`); otherwise as `reference.mask`.
    """
    outer, axis, inner = score.shape
    groups, width = triton.cdiv(axis, m), triton.next_power_of_2(m)
    count = outer * groups * inner
    if count >= 2**31:
        raise ValueError(
            f"kernels.nm.mask on the GPU: got {count} groups; expected fewer than 2^31, as the kernel counts them in "
            "32 bits; split the weight"
        )
    at_once = max(1, 8192 // width**2)
    with on(score.device):
        _mask_kernel[(triton.cdiv(count, at_once),)](
            score.view(torch.int32), out, count, axis, groups, inner, n, M=m, WIDTH=width, GROUPS=at_once
        )


@jit
def _mask_kernel(
    bits,  # of the score [outer, axis, inner]
    out,
    count,
    axis,
    groups,
    inner,
    n,
    M: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
):
    number = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    outer = (number // inner // groups).to(tl.int64)
    place = tl.arange(0, WIDTH)
    along = (number // inner % groups * M)[:, None] + place[None, :]
    live = (number < count)[:, None] & (place < M)[None, :] & (along < axis)
    at = (outer[:, None] * axis + along) * inner + (number % inner)[:, None]
    # magnitudes order as their bits do; NaN are one number above infinity, what is not there is below zero
    size = tl.minimum(tl.load(bits + at, mask=live, other=0) & 0x7FFFFFFF, 0x7F800001)
    size = tl.where(live, size, -1)
    own, other = size[:, :, None], size[:, None, :]
    ahead = (other > own) | ((other == own) & (place[None, None, :] < place[None, :, None]))
    rank = tl.sum(ahead.to(tl.int32), axis=2)
    tl.store(out + at, (rank < n).to(tl.uint8), mask=live)
