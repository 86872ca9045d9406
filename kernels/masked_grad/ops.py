"""The layers and the update as torch ops: memory, gradients, shapes for tracing. The public functions check before.

A selection travels as its tensors `offsets` and `starts`; x and dy are [tokens, ...] or images.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import _dispatch
from kernels.masked_grad import reference
from kernels.masked_grad.selection import Selection, positions

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class Window(NamedTuple):
    """How a convolution's window moves: (rows, columns) each, in pixels."""

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of what a convolution of such an image gives."""
        moves = zip((height, width), self.size, self.stride, self.padding, self.dilation, strict=True)
        rows, columns = ((side + 2 * p - d * (size - 1) - 1) // s + 1 for side, size, s, p, d in moves)
        return rows, columns


class Hyper(NamedTuple):
    """Factors of one step of AdamW: m and v as usual, then w = w keep - rate m / (sqrt(v) root + eps)."""

    beta1: float
    beta2: float
    keep: float  # 1 - lr weight_decay
    rate: float  # lr over the first correction of the bias
    root: float  # of the second: one over its root
    eps: float


def linear(x: Tensor, weight: Tensor, values: Tensor, selection: Selection, bias: Tensor | None) -> Tensor:
    """y [T, O] of x [T, I]; see kernels.masked_grad.linear."""
    return _linear(x, weight, values, selection.offsets, selection.starts, bias)


def conv2d(
    x: Tensor, weight: Tensor, values: Tensor, selection: Selection, bias: Tensor | None, window: Window
) -> Tensor:
    """y [N, O, H', W'] of x [N, C, H, W]; see kernels.masked_grad.conv2d."""
    return _conv2d(x, weight, values, selection.offsets, selection.starts, bias, *window[1:])


def adamw_(
    weight: Tensor,
    grad: Tensor,
    selection: Selection,
    first: Tensor,
    second: Tensor,
    master: Tensor | None,
    scale: Tensor,
    hyper: Hyper,
) -> None:
    """See kernels.masked_grad.adamw_; scale is a tensor of one number by which the gradient is multiplied first."""
    _adamw(weight, grad, selection.offsets, selection.starts, first, second, master, scale, *hyper)


def backend_for(tensor: Tensor) -> str:
    """What runs the ops on such a tensor."""
    dtype = torch.float32 if tensor.dtype == torch.bfloat16 else tensor.dtype
    return _dispatch.backend_for(tensor.device, dtype, "masked_grad")


def autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a layer of torch would compute with: under autocast all of them in its dtype, but for float64."""
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _linear_kernel(
    x: Tensor, weight: Tensor, values: Tensor, offsets: Tensor, starts: Tensor, bias: Tensor | None
) -> Tensor:
    backend_for(x)  # forward is torch's in any case; what backward cannot do is said here
    return torch.nn.functional.linear(x, weight, bias)


def _linear_fake(
    x: Tensor, weight: Tensor, values: Tensor, offsets: Tensor, starts: Tensor, bias: Tensor | None
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _linear_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, values, offsets, starts, _ = inputs
    wants_x, _, wants_values, *_ = ctx.needs_input_grad
    ctx.dtype = values.dtype
    ctx.save_for_backward(x if wants_values else None, weight if wants_x else None, offsets, starts)


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, offsets, starts = ctx.saved_tensors
    with torch.no_grad():
        dx = None if weight is None else dy @ weight
        entries = None if x is None else _linear_gradient(dy, x, offsets, starts, ctx.dtype)
        bias = dy.sum(dim=0) if ctx.needs_input_grad[5] else None
    dx, entries, bias = _once(dx, entries, bias)
    return dx, None, entries, None, None, bias


def _linear_gradient_kernel(dy: Tensor, x: Tensor, offsets: Tensor, starts: Tensor, dtype: torch.dtype) -> Tensor:
    kernels = _compiled(dy)
    if kernels is None:
        dy, x = _wide(dy), _wide(x)
        return reference.linear_gradient(dy, x, positions(offsets, starts, (dy.shape[1], x.shape[1]))).to(dtype)
    return kernels.linear_gradient(dy, x, offsets, starts).to(dtype)


def _linear_gradient_fake(dy: Tensor, x: Tensor, offsets: Tensor, starts: Tensor, dtype: torch.dtype) -> Tensor:
    return dy.new_empty(offsets.shape, dtype=dtype)


def _conv2d_kernel(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    offsets: Tensor,
    starts: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    backend_for(x)
    return torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _conv2d_fake(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    offsets: Tensor,
    starts: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    return torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _conv2d_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, values, offsets, starts, _, stride, padding, dilation, groups = inputs
    wants_x, _, wants_values, *_ = ctx.needs_input_grad
    ctx.dtype, ctx.shape, ctx.window = (
        values.dtype,
        x.shape,
        _window(weight.shape[2:], stride, padding, dilation, groups),
    )
    ctx.save_for_backward(x if wants_values else None, weight if wants_x else None, offsets, starts)


def _conv2d_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, offsets, starts = ctx.saved_tensors
    window = ctx.window
    with torch.no_grad():
        dx = entries = None
        if weight is not None:
            given = dy.new_empty(1).expand(ctx.shape)  # asked for its shape alone
            moves = (*window[1:4], False, (0, 0), window.groups)
            dx = torch.ops.aten.convolution_backward(dy, given, weight, None, *moves, (True, False, False))[0]
        if x is not None:
            entries = _conv2d_gradient(dy, x, offsets, starts, *window, ctx.dtype)
        bias = dy.sum(dim=(0, 2, 3)) if ctx.needs_input_grad[5] else None
    dx, entries, bias = _once(dx, entries, bias)
    return dx, None, entries, None, None, bias, None, None, None, None


def _conv2d_gradient_kernel(
    dy: Tensor,
    x: Tensor,
    offsets: Tensor,
    starts: Tensor,
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    dtype: torch.dtype,
) -> Tensor:
    window, kernels = _window(size, stride, padding, dilation, groups), _compiled(dy)
    if kernels is None:
        dy, x = _wide(dy), _wide(x)
        shape = (dy.shape[1], x.shape[1] // groups, *window.size)
        return reference.conv2d_gradient(dy, x, positions(offsets, starts, shape), shape, *window[1:]).to(dtype)
    return kernels.conv2d_gradient(dy, x, offsets, starts, window).to(dtype)


def _conv2d_gradient_fake(
    dy: Tensor,
    x: Tensor,
    offsets: Tensor,
    starts: Tensor,
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    dtype: torch.dtype,
) -> Tensor:
    return dy.new_empty(offsets.shape, dtype=dtype)


def _adamw_kernel(
    weight: Tensor,
    grad: Tensor,
    offsets: Tensor,
    starts: Tensor,
    first: Tensor,
    second: Tensor,
    master: Tensor | None,
    scale: Tensor,
    beta1: float,
    beta2: float,
    keep: float,
    rate: float,
    root: float,
    eps: float,
) -> None:
    kernels, hyper = _compiled(weight), Hyper(beta1, beta2, keep, rate, root, eps)
    flat = weight if weight.is_contiguous() else weight.contiguous()
    if kernels is None:
        entries = positions(offsets, starts, weight.shape)
        reference.update_(flat, grad.to(first.dtype) * scale, entries, first, second, master, *hyper)
    else:
        kernels.adamw_(flat, grad, offsets, starts, first, second, master, scale, hyper)
    if flat is not weight:
        weight.copy_(flat)
    # compiled code writes where torch does not see it; a backward that still needs the weight has to
    torch.autograd.graph.increment_version([tensor for tensor in (weight, first, second, master) if tensor is not None])


def _adamw_fake(*_: Any) -> None:
    return None


def _compiled(tensor: Tensor) -> Any:
    """The module with what runs on such a tensor; None for the reference."""
    backend = backend_for(tensor)
    if backend == _dispatch.CPU:
        from kernels.masked_grad import cpu as module
    elif backend == _dispatch.TRITON:
        from kernels.masked_grad import triton as module
    else:
        return None
    return module


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _window(size: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> Window:
    size, stride, padding, dilation = ((pair[0], pair[1]) for pair in (size, stride, padding, dilation))
    return Window(size, stride, padding, dilation, groups)


def _once(*grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients as they are; where a graph of them is wanted, one that says that there is none."""
    if not torch.is_grad_enabled():
        return grads
    return tuple(None if grad is None else _Once.apply(grad, torch.ones((), requires_grad=True)) for grad in grads)


class _Once(torch.autograd.Function):
    """A gradient that cannot be differentiated again. The second argument is there to require a gradient."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, leaf: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "kernels.masked_grad: got a gradient of a gradient; expected one differentiation; for a second one write "
            "the layer in plain torch, with the weight made of its entries: kernels.masked_grad.reference"
        )


_TENSORS = "Tensor x, Tensor weight, Tensor values, Tensor offsets, Tensor starts, Tensor? bias"
_MOVES = "int[] stride, int[] padding, int[] dilation, int groups"
_library = torch.library.Library("resparse", "FRAGMENT")
for _definition, _kernel, _fake in (
    (f"masked_grad_linear({_TENSORS}) -> Tensor", _linear_kernel, _linear_fake),
    (
        "masked_grad_linear_gradient(Tensor dy, Tensor x, Tensor offsets, Tensor starts, ScalarType dtype) -> Tensor",
        _linear_gradient_kernel,
        _linear_gradient_fake,
    ),
    (f"masked_grad_conv2d({_TENSORS}, {_MOVES}) -> Tensor", _conv2d_kernel, _conv2d_fake),
    (
        f"masked_grad_conv2d_gradient(Tensor dy, Tensor x, Tensor offsets, Tensor starts, int[] size, {_MOVES}, "
        "ScalarType dtype) -> Tensor",
        _conv2d_gradient_kernel,
        _conv2d_gradient_fake,
    ),
    (
        "masked_grad_adamw_(Tensor(a!) weight, Tensor grad, Tensor offsets, Tensor starts, Tensor(b!) first, "
        "Tensor(c!) second, Tensor(d!)? master, Tensor scale, float beta1, float beta2, float keep, float rate, "
        "float root, float eps) -> ()",
        _adamw_kernel,
        _adamw_fake,
    ),
):
    _library.define(_definition)
    _op = getattr(torch.ops.resparse, _definition[: _definition.index("(")]).default
    _library.impl(_op, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(_op, _fake, lib=_library)
_linear = torch.ops.resparse.masked_grad_linear.default
_linear_gradient = torch.ops.resparse.masked_grad_linear_gradient.default
_conv2d = torch.ops.resparse.masked_grad_conv2d.default
_conv2d_gradient = torch.ops.resparse.masked_grad_conv2d_gradient.default
_adamw = torch.ops.resparse.masked_grad_adamw_.default
torch.library.register_autograd(_linear, _linear_backward, setup_context=_linear_setup, lib=_library)
torch.library.register_autograd(_conv2d, _conv2d_backward, setup_context=_conv2d_setup, lib=_library)
