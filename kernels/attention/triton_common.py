"""What the attention kernels of `triton.py` and `triton_backward.py` share: launching, and the loads and products."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
from torch import Tensor

from kernels.attention.masks import Lists

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ModuleNotFoundError:  # the modules can still be imported and read; `kernels._dispatch` refuses to run them

    def jit(function):
        return function


__all__ = [
    "LOG2_E",
    "constants_of",
    "dot",
    "flags",
    "heads_in_order",
    "jit",
    "list_strides",
    "live_keys",
    "load_rows",
    "on",
    "rows_apart",
    "store_rows",
    "strides",
]

LOG2_E = 1.4426950408889634
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")

MOST_APART = 1 << 23  # elements between two tokens, so that places within a tile of 128 fit 32 bits


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Where Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def rows_apart(x: Tensor) -> Tensor:
    """x [B, H, L, D] as the kernels take it: the numbers of a token side by side, tokens anywhere."""
    beside = x.stride(-1) == 1 or x.shape[-1] == 1
    return x if beside and x.stride(-2) < MOST_APART else x.contiguous()


def strides(*tensors: Tensor) -> list[int]:
    """Of batch, head and token, for each of the tensors."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def flags(key_mask: Tensor | None, otherwise: Tensor) -> Tensor:
    """The key mask in bytes; without one any tensor does, for it is not read."""
    return otherwise if key_mask is None else key_mask.contiguous().view(torch.uint8)


def list_strides(sizes: tuple[int, int]) -> tuple[int, int]:
    """How far the lists of a mask [batch or 1, heads or 1] lie from those of the next batch entry and head."""
    return (sizes[1] if sizes[0] > 1 else 0), int(sizes[1] > 1)


def heads_in_order(lists: Lists, sizes: tuple[int, int], batch: int, heads: int, rows: int) -> Tensor:
    """int32 [batch * heads], those with the most tiles first: started last, they would keep the GPU waiting."""
    kept = lists.starts[::rows].diff().view(sizes).expand(batch, heads).flatten()
    return kept.argsort(descending=True, stable=True).to(torch.int32)


def constants_of(q: Tensor, k: Tensor, block: int, key_mask: Tensor | None) -> dict[str, Any]:
    """What every kernel is compiled for; block is what the number of keys must be a multiple of to need no checks."""
    dim = q.shape[-1]
    return {
        "DIM": dim,
        "WIDTH": max(16, triton.next_power_of_2(dim)),
        "WHOLE": key_mask is None and k.shape[2] % block == 0,
        "MASKED": key_mask is not None,
        "INTERPRETED": INTERPRETED,
    }


@jit
def load_rows(x, first, stride, live, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, ALL: tl.constexpr):
    """x[first : first + ROWS] as [ROWS, WIDTH]; zero where not live, whatever lies there, unless ALL are."""
    dim = tl.arange(0, WIDTH)
    at = x + first.to(tl.int64) * stride + (tl.arange(0, ROWS)[:, None] * stride + dim[None, :])
    if ALL:
        if DIM == WIDTH:
            return tl.load(at)
        else:
            return tl.load(at, mask=(dim < DIM)[None, :], other=0.0)
    else:
        return tl.load(at, mask=live[:, None] & (dim < DIM)[None, :], other=0.0)


@jit
def store_rows(x, value, first, stride, live, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """The other way."""
    dim = tl.arange(0, WIDTH)
    at = x + first.to(tl.int64) * stride + (tl.arange(0, ROWS)[:, None] * stride + dim[None, :])
    tl.store(at, value.to(x.dtype.element_ty), mask=live[:, None] & (dim < DIM)[None, :])


@jit
def live_keys(key_mask, first, length, KEYS: tl.constexpr, MASKED: tl.constexpr):
    """Which of the keys from `first` are there, [KEYS]."""
    key = first + tl.arange(0, KEYS)
    live = key < length
    if MASKED:
        live = live & (tl.load(key_mask + key, mask=live, other=0) != 0)
    return live


@jit
def dot(left, right, total, INTERPRETED: tl.constexpr):
    """total + left right, in float32; float32 factors are not rounded to tf32."""
    if INTERPRETED:  # Triton's interpreter would multiply the bits of bfloat16
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")
