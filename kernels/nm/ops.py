"""The packed products as torch ops: memory, gradients, shapes for tracing. `__init__.py` checks the arguments before.

Ops take `values`, `places`, m and vector as `NMTensor` has them; x and dy are [tokens, ...], float32, or bfloat16 if
the values are too, and the results are of their dtype; sums are float32 in any case.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import _dispatch
from kernels._load import native
from kernels.nm import crossover, reference, vectors
from kernels.nm.tensor import NMTensor, bits, from_groups, to_groups


def linear(
    x: Tensor, packed: NMTensor, bias: Tensor | None, straight_through: Tensor | None, dense: bool | None = False
) -> Tensor:
    """y [T, O] of x [T, K]; see kernels.nm.linear."""
    rows = packed.shape[0]
    return _linear(x, packed.values, packed.places, packed.m, packed.vector, rows, bias, straight_through, dense)


def input_gradient(dy: Tensor, packed: NMTensor) -> Tensor:
    """dy W [T, K] of dy [T, O]."""
    return _input_gradient(dy, packed.values, packed.places, packed.m, packed.vector)


def weight_gradient(dy: Tensor, x: Tensor, packed: NMTensor) -> Tensor:
    """The gradient of `packed.values`, laid out and typed as they are, of dy [T, O] and x [T, K]."""
    return _weight_gradient(dy, x, packed.values, packed.places, packed.m, packed.vector)


def backend_for(device: torch.device, dtype: torch.dtype) -> str:
    """What runs the products of an x there."""
    return _dispatch.backend_for(device, torch.float32 if dtype == torch.bfloat16 else dtype, "nm")


def _unpacked(values: Tensor, places: Tensor, m: int, vector: int, rows: int) -> Tensor:
    return reference.unpack(*to_groups(values, places, m, rows, vector), m)


def _packed(values: Tensor, places: Tensor, m: int, vector: int, rows: int) -> NMTensor:
    return NMTensor(values.detach(), places, (rows, values.shape[1] * m), values.shape[2], m, vector)


def _linear_kernel(
    x: Tensor,
    values: Tensor,
    places: Tensor,
    m: int,
    vector: int,
    rows: int,
    bias: Tensor | None,
    straight_through: Tensor | None,
    dense: bool | None,
) -> Tensor:
    backend = backend_for(x.device, x.dtype)
    given = None if bias is None else bias.detach().contiguous()
    if dense is None:  # here and not before, so that a compiler neither reads the table nor takes it for fixed
        dense = backend == _dispatch.CPU and crossover.dense_is_faster(_packed(values, places, m, vector, rows), len(x))
    narrow = x.dtype == torch.bfloat16 and not x.is_cuda
    # bfloat16 is multiplied by bfloat16 where this processor does that, and for this pattern it is worth it
    in_tiles = narrow and backend == _dispatch.CPU and native().nm_takes_bfloat16(values.shape[2], m, len(x))
    if narrow and (dense or vector > 1 or not in_tiles):
        wide = _linear_kernel(x.float(), values, places, m, vector, rows, bias, straight_through, dense)
        return wide.to(x.dtype)
    if dense:
        return torch.nn.functional.linear(
            x,
            _packed(values, places, m, vector, rows).to_dense().to(x.dtype),
            None if given is None else given.to(x.dtype),
        )
    if backend == _dispatch.REFERENCE:
        given = None if given is None else given.to(x.dtype)
        return reference.linear(x, *to_groups(values, places, m, rows, vector), m, given)
    if backend == _dispatch.TRITON and vector > 1:
        from kernels.nm import vectors_triton

        return vectors_triton.linear(x.contiguous(), values, places, m, vector, given)
    if backend == _dispatch.TRITON:
        from kernels.nm import triton

        return triton.linear(x.contiguous(), values, places, m, rows, given)
    if vector > 1:
        return vectors.linear(x, values, places, m, vector, given)
    y = x.new_empty(len(x), rows)
    native().nm_linear(bits(x.contiguous()), bits(values), places, m, given, bits(y), torch.get_num_threads())
    return y


def _linear_fake(
    x: Tensor,
    values: Tensor,
    places: Tensor,
    m: int,
    vector: int,
    rows: int,
    bias: Tensor | None,
    straight_through: Tensor | None,
    dense: bool | None,
) -> Tensor:
    return x.new_empty(x.shape[0], rows)


def _input_gradient_kernel(dy: Tensor, values: Tensor, places: Tensor, m: int, vector: int) -> Tensor:
    backend = backend_for(dy.device, dy.dtype)
    if dy.dtype == torch.bfloat16 and not dy.is_cuda:
        return _input_gradient_kernel(dy.float(), values, places, m, vector).to(dy.dtype)
    if backend == _dispatch.REFERENCE or (backend == _dispatch.TRITON and vector > 1):
        # on a GPU: vectors overlap in the columns, so that compressed products would have to be added up out of order
        return dy @ _unpacked(values, places, m, vector, dy.shape[1]).to(dy.dtype)
    if vector > 1:
        return vectors.input_gradient(dy, values, places, m, vector)
    if backend == _dispatch.TRITON:
        from kernels.nm import triton

        return triton.input_gradient(dy.contiguous(), values, places, m)
    dx = _input_gradient_fake(dy, values, places, m, vector)
    native().nm_input_gradient(dy.contiguous(), bits(values), places, m, dx, torch.get_num_threads())
    return dx


def _input_gradient_fake(dy: Tensor, values: Tensor, places: Tensor, m: int, vector: int) -> Tensor:
    return dy.new_empty(dy.shape[0], values.shape[1] * m)


# Above this share of kept weights a dense product, of which the kept entries are taken, is faster: see bench.py.
SAMPLED_BELOW = 1 / 3


def _weight_gradient_kernel(dy: Tensor, x: Tensor, values: Tensor, places: Tensor, m: int, vector: int) -> Tensor:
    backend = backend_for(dy.device, dy.dtype)
    if backend == _dispatch.TRITON and vector == 1:
        from kernels.nm import triton

        return triton.weight_gradient(dy.contiguous(), x.contiguous(), values, places, m)
    if dy.dtype == torch.bfloat16 and not dy.is_cuda:
        dy, x = dy.float(), x.float()
    if backend == _dispatch.CPU and vector > 1:
        out = vectors.weight_gradient(dy, x, values, places, m, vector)
    elif vector > 1 or backend == _dispatch.REFERENCE or values.shape[2] > SAMPLED_BELOW * m:
        _, index = to_groups(values, places, m, dy.shape[1], vector)
        groups = (dy.mT @ x).unflatten(1, (-1, m)).gather(-1, index)  # [O, K/m, n]
        out = groups if vector > 1 else from_groups(groups, values.shape[0])
    else:
        out = torch.empty(values.shape, dtype=torch.float32)
        native().nm_weight_gradient(
            dy.contiguous(), x.contiguous(), bits(values), places, m, out, torch.get_num_threads()
        )
    return out.where(values != 0, 0).to(values.dtype)


def _weight_gradient_fake(dy: Tensor, x: Tensor, values: Tensor, places: Tensor, m: int, vector: int) -> Tensor:
    return torch.empty_like(values)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, values, places, ctx.m, ctx.vector, _, bias, straight_through, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.dense_dtype = None if straight_through is None else straight_through.dtype
    ctx.save_for_backward(x, values, places)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, values, places = ctx.saved_tensors
    wants_x, wants_values, _, _, _, _, wants_bias, wants_dense, _ = ctx.needs_input_grad
    dx = _input_gradient(dy, values, places, ctx.m, ctx.vector) if wants_x else None
    kept = _weight_gradient(dy, x, values, places, ctx.m, ctx.vector) if wants_values else None
    bias = dy.sum(dim=0, dtype=ctx.bias_dtype) if wants_bias else None
    dense = None
    if wants_dense:
        wide = torch.promote_types(dy.dtype, ctx.dense_dtype)
        wide = wide if dy.is_cuda else torch.promote_types(wide, torch.float32)
        dense = (dy.mT.to(wide) @ x.to(wide)).to(ctx.dense_dtype)
    return dx, kept, None, None, None, None, bias, dense, None


_library = torch.library.Library("resparse", "FRAGMENT")
for _definition, _kernel, _fake in (
    (
        "nm_linear(Tensor x, Tensor values, Tensor places, int m, int vector, SymInt rows, Tensor? bias, "
        "Tensor? straight_through, bool? dense) -> Tensor",
        _linear_kernel,
        _linear_fake,
    ),
    (
        "nm_input_gradient(Tensor dy, Tensor values, Tensor places, int m, int vector) -> Tensor",
        _input_gradient_kernel,
        _input_gradient_fake,
    ),
    (
        "nm_weight_gradient(Tensor dy, Tensor x, Tensor values, Tensor places, int m, int vector) -> Tensor",
        _weight_gradient_kernel,
        _weight_gradient_fake,
    ),
):
    _library.define(_definition)
    _op = getattr(torch.ops.resparse, _definition[: _definition.index("(")]).default
    _library.impl(_op, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(_op, _fake, lib=_library)
_linear = torch.ops.resparse.nm_linear.default
_input_gradient = torch.ops.resparse.nm_input_gradient.default
_weight_gradient = torch.ops.resparse.nm_weight_gradient.default
torch.library.register_autograd(_linear, _gradient, setup_context=_setup, lib=_library)
