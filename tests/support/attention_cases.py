"""Inputs for block-sparse attention, and what comes out of them in double precision."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.attention import reference

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float64: 1e-12}  # relative; bfloat16 has 8 bits


def made(
    batch: int = 1, heads: int = 2, groups: int = 2, queries: int = 150, keys: int = 200, dim: int = 64,
    dtype: torch.dtype = torch.float32, seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    draw = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, queries, dim), (batch, groups, keys, dim), (batch, groups, keys, dim)
    q, k, v = (torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes)
    return q, k, v


def some_mask(q: Tensor, k: Tensor, block: int, share: float = 0.5, heads: int | None = None, batch: int | None = None):
    rows, columns = math.ceil(q.shape[2] / block), math.ceil(k.shape[2] / block)
    draw = torch.Generator().manual_seed(1)
    return torch.rand(batch or q.shape[0], heads or q.shape[1], rows, columns, generator=draw) < share


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block: int, key_mask: Tensor | None = None):
    """By the reference, in double precision."""
    keep = reference.token_mask(mask.expand(*q.shape[:2], -1, -1), key_mask, (q.shape[2], k.shape[2]), block)
    if key_mask is not None:
        k, v = (x.masked_fill(~key_mask[:, None, :, None], 0) for x in (k, v))
    return reference.block_sparse_attention(q.double(), k.double(), v.double(), keep, q.shape[-1] ** -0.5)


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative to the norm; infinities where they are expected."""
    endless = expected.isinf()
    assert torch.equal(found.isinf(), endless) and torch.equal(found[endless].double(), expected[endless].double())
    difference = (found.double() - expected.double())[~endless].norm()
    assert difference <= tolerance * expected[~endless].norm().double(), difference / expected[~endless].double().norm()
