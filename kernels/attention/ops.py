"""Attention as torch ops: memory, gradients, shapes for tracing. `__init__.py` checks the arguments before.

A mask travels as its lists (see `masks.py`) with the numbers of batch entries and heads it has: 1 serves all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import _dispatch
from kernels._load import native
from kernels.attention import reference
from kernels.attention.masks import BlockMask, Lists

BLOCK_SIZES = (16, 32, 64, 128)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, block: int, scale: float, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output and LSE; see kernels.attention.block_sparse_attention."""
    lists = mask.lists()
    return _attention(q, k, v, lists.starts, lists.columns, mask.shape[0], mask.shape[1], block, scale, key_mask)


def search(
    q: Tensor, k: Tensor, v: Tensor, block: int, scale: float, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, LSE and scores; see kernels.attention.search."""
    return _search(q, k, v, block, scale, key_mask)


def block_scores(q: Tensor, k: Tensor, lse: Tensor, block: int, scale: float, key_mask: Tensor | None) -> Tensor:
    """See kernels.attention.block_scores."""
    return _block_scores(q, k, lse, block, scale, key_mask)


def backend_for(q: Tensor) -> str:
    """What runs the op for such a query."""
    narrow = q.dtype == torch.bfloat16 or (q.dtype == torch.float16 and q.is_cuda)
    return _dispatch.backend_for(q.device, torch.float32 if narrow else q.dtype, "attention")


def tiles(length: int, block: int) -> int:
    """Blocks that cover so many tokens."""
    return -(-length // block)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Of sums and logarithms."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _bits(x: Tensor) -> Tensor:
    """For the compiled module: contiguous, bfloat16 as its bits."""
    x = x.detach().contiguous()
    return x.view(torch.uint16) if x.dtype == torch.bfloat16 else x


def _flags(key_mask: Tensor | None) -> Tensor | None:
    return None if key_mask is None else key_mask.contiguous().view(torch.uint8)


def _keep(q: Tensor, k: Tensor, lists: Lists, mask_batch: int, mask_heads: int, block: int, key_mask: Tensor | None):
    """The lists as a mask of tokens, for the reference."""
    rows, columns = tiles(q.shape[2], block), tiles(k.shape[2], block)
    dense = torch.zeros(mask_batch * mask_heads * rows, columns, dtype=torch.bool, device=q.device)
    row = torch.repeat_interleave(torch.arange(len(dense), device=q.device), lists.starts.diff())
    dense[row, lists.columns.long()] = True
    dense = dense.view(mask_batch, mask_heads, rows, columns).expand(q.shape[0], q.shape[1], rows, columns)
    return reference.token_mask(dense, key_mask, (q.shape[2], k.shape[2]), block)


def _present(key_mask: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    """Keys or values in the precision of sums, with padding set to zero: it may hold anything, NaN included."""
    found = [x.to(_wide(x.dtype)) for x in tensors]
    return found if key_mask is None else [x.masked_fill(~key_mask[:, None, :, None], 0) for x in found]


def _attention_kernel(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, columns: Tensor, mask_batch: int, mask_heads: int, block: int,
    scale: float, key_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    backend = backend_for(q)
    if backend == _dispatch.REFERENCE:
        keep = _keep(q, k, Lists(starts, columns), mask_batch, mask_heads, block, key_mask)
        keys, values = _present(key_mask, k, v)
        out, lse = reference.block_sparse_attention(q.to(_wide(q.dtype)), keys, values, keep, scale)
        return out.to(q.dtype), lse
    if backend == _dispatch.TRITON:
        from kernels.attention import triton

        return triton.attention(q, k, v, Lists(starts, columns), (mask_batch, mask_heads), block, scale, key_mask)
    out, lse = _attention_fake(q)
    native().attention(
        _bits(q), _bits(k), _bits(v), starts, columns, mask_batch, mask_heads, block, scale, _flags(key_mask),
        _bits(out), lse, torch.get_num_threads(),
    )  # fmt: skip
    return out, lse


def _attention_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3], dtype=_wide(q.dtype))


def _gradients_kernel(
    d_out: Tensor, d_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor,
    columns: Tensor, mask_batch: int, mask_heads: int, block: int, scale: float, key_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    backend, wide = backend_for(q), _wide(q.dtype)
    if backend == _dispatch.REFERENCE:
        keep = _keep(q, k, Lists(starts, columns), mask_batch, mask_heads, block, key_mask)
        keys, values = _present(key_mask, k, v)
        found = reference.gradients(q.to(wide), keys, values, keep, scale, out.to(wide), lse, d_out.to(wide), d_lse)
        return found[0].to(q.dtype), found[1].to(k.dtype), found[2].to(v.dtype)
    if backend == _dispatch.TRITON:
        from kernels.attention import triton

        lists, sizes = Lists(starts, columns), (mask_batch, mask_heads)
        return triton.gradients(d_out, d_lse, q, k, v, out, lse, lists, sizes, block, scale, key_mask)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    shift = (d_out.float() * out.float()).sum(-1) - d_lse  # [B, H, Lq], what the sums of rows take away
    native().attention_gradients(
        _bits(d_out.to(q.dtype)), shift, _bits(q), _bits(k), _bits(v), lse, starts, columns, mask_batch, mask_heads,
        block, scale, _flags(key_mask), _bits(dq), _bits(dk), _bits(dv), torch.get_num_threads(),
    )  # fmt: skip
    return dq, dk, dv


def _gradients_fake(d_out: Tensor, d_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _search_kernel(
    q: Tensor, k: Tensor, v: Tensor, block: int, scale: float, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    backend = backend_for(q)
    if backend == _dispatch.REFERENCE:
        keys, values = _present(key_mask, k, v)
        out, lse, scores = reference.search(q.to(_wide(q.dtype)), keys, values, key_mask, scale, block)
        return out.to(q.dtype), lse, scores
    if backend == _dispatch.TRITON:
        from kernels.attention import triton

        return triton.search(q, k, v, block, scale, key_mask)
    out, lse, scores = _search_fake(q, k, v, block, scale, key_mask)
    native().attention_search(
        _bits(q), _bits(k), _bits(v), block, scale, _flags(key_mask), _bits(out), lse, scores, torch.get_num_threads()
    )
    return out, lse, scores


def _search_fake(
    q: Tensor, k: Tensor, v: Tensor, block: int, scale: float, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = _attention_fake(q)
    return out, lse, _block_scores_fake(q, k, lse, block, scale, key_mask)


def _block_scores_kernel(
    q: Tensor, k: Tensor, lse: Tensor, block: int, scale: float, key_mask: Tensor | None
) -> Tensor:
    backend = backend_for(q)
    lse = lse.to(_wide(q.dtype)).contiguous()
    if backend == _dispatch.REFERENCE:
        (keys,) = _present(key_mask, k)
        return reference.block_scores(q.to(lse.dtype), keys, lse, key_mask, scale, block)
    if backend == _dispatch.TRITON:
        from kernels.attention import triton

        return triton.block_scores(q, k, lse, block, scale, key_mask)
    scores = _block_scores_fake(q, k, lse, block, scale, key_mask)
    native().attention_block_scores(
        _bits(q), _bits(k), lse, block, scale, _flags(key_mask), scores, torch.get_num_threads()
    )
    return scores


def _block_scores_fake(q: Tensor, k: Tensor, lse: Tensor, block: int, scale: float, key_mask: Tensor | None) -> Tensor:
    rows, columns = tiles(q.shape[2], block), tiles(k.shape[2], block)
    return q.new_empty(q.shape[0], q.shape[1], rows, columns, dtype=_wide(q.dtype))


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts, columns, ctx.mask_batch, ctx.mask_heads, ctx.block, ctx.scale, key_mask = inputs
    ctx.save_for_backward(q, k, v, *output, starts, columns, key_mask)


def _backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, starts, columns, key_mask = ctx.saved_tensors
    d_out = torch.zeros_like(out) if d_out is None else d_out
    d_lse = torch.zeros_like(lse) if d_lse is None else d_lse
    sizes = (ctx.mask_batch, ctx.mask_heads, ctx.block, ctx.scale)
    found = _gradients(d_out, d_lse, q, k, v, out, lse, starts, columns, *sizes, key_mask)
    return *found, None, None, None, None, None, None, None


_MASK = "Tensor starts, Tensor columns, int mask_batch, int mask_heads, int block, float scale, Tensor? key_mask"
_library = torch.library.Library("resparse", "FRAGMENT")
for _definition, _kernel, _fake in (
    (f"attention(Tensor q, Tensor k, Tensor v, {_MASK}) -> (Tensor, Tensor)", _attention_kernel, _attention_fake),
    (
        "attention_gradients(Tensor d_out, Tensor d_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        f"{_MASK}) -> (Tensor, Tensor, Tensor)",
        _gradients_kernel,
        _gradients_fake,
    ),
    (
        "attention_search(Tensor q, Tensor k, Tensor v, int block, float scale, Tensor? key_mask) -> "
        "(Tensor, Tensor, Tensor)",
        _search_kernel,
        _search_fake,
    ),
    (
        "attention_block_scores(Tensor q, Tensor k, Tensor lse, int block, float scale, Tensor? key_mask) -> Tensor",
        _block_scores_kernel,
        _block_scores_fake,
    ),
):
    _library.define(_definition)
    _op = getattr(torch.ops.resparse, _definition[: _definition.index("(")]).default
    _library.impl(_op, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(_op, _fake, lib=_library)
_attention = torch.ops.resparse.attention.default
_gradients = torch.ops.resparse.attention_gradients.default
_search = torch.ops.resparse.attention_search.default
_block_scores = torch.ops.resparse.attention_block_scores.default
torch.library.register_autograd(_attention, _backward, setup_context=_setup, lib=_library)
