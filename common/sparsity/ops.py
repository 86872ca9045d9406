"""The gradients of N:M training: of the masked weight, and of a layer whose input gradient has a mask of its own.

masked      W -> W~ = f * W                    dW = g * dW~ + lambda (1 - E) W
linear      y = x W~^T + b                     dx = dy W_b,   dW~ = dy^T x
conv2d      y = x conv W~ + b                  dx by W_b,     dW~ by x
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["conv2d", "linear", "masked"]


def masked(weight: Tensor, factor: Tensor, *, decay: float = 0.0, scaled: bool = False) -> Tensor:
    """W~ = f * W, with dW = g * dW~ + decay (W - W~), g = f if `scaled` and 1 if not.

    weight, factor  of one shape, real floating point; factor is E + beta (1 - E), and E itself where decay > 0, so that
                    W - W~ = (1 - E) W
    """
    return _Masked.apply(weight, factor, decay, scaled)  # pyright: ignore[reportReturnType]


def linear(x: Tensor, weight: Tensor, back: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., I] by the weight [O, I]; its gradient is dy by the weight `back` [O, I], which itself gets none."""
    return _Linear.apply(x, weight, back, bias)  # pyright: ignore[reportReturnType]


def conv2d(
    x: Tensor,
    weight: Tensor,
    back: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """x [B, I, H, W] by the weight [O, I/groups, kh, kw]; its gradient is by the weight `back`, which gets none."""
    return _Conv2d.apply(x, weight, back, bias, stride, padding, dilation, groups)  # pyright: ignore[reportReturnType]


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, factor: Tensor, decay: float, scaled: bool) -> Tensor:
        effective = weight * factor
        ctx.save_for_backward(factor if scaled else None, *((weight, effective) if decay else (None, None)))
        ctx.decay = decay
        return effective

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        factor, weight, effective = ctx.saved_tensors
        if factor is not None:
            grad = grad * factor
        if weight is not None:
            grad = torch.add(grad, weight - effective, alpha=ctx.decay)
        return grad, None, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, back: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, back)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, back = ctx.saved_tensors
        need_x, need_weight, _, need_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)  # under autocast the gradient may be narrower than x and the weights
        return (
            (grad @ back.to(grad.dtype)).to(x.dtype) if need_x else None,
            (rows.T @ x.to(grad.dtype).flatten(0, -2)).to(back.dtype) if need_weight else None,
            None,
            rows.sum(0).to(back.dtype) if need_bias else None,
        )


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, back: Tensor, bias: Tensor | None, *shape: Any) -> Tensor:
        ctx.save_for_backward(x, back)
        ctx.shape = shape
        return F.conv2d(x, weight, bias, *shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, back = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.shape
        need_x, need_weight, _, need_bias = ctx.needs_input_grad[:4]
        found = torch.ops.aten.convolution_backward(
            grad,
            x.to(grad.dtype),
            back.to(grad.dtype),
            [back.shape[0]],
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            [need_x, need_weight, need_bias],
        )
        dx, dweight, dbias = (d if d is None else d.to(t.dtype) for d, t in zip(found, (x, back, back), strict=True))
        return dx, dweight, None, dbias, None, None, None, None
