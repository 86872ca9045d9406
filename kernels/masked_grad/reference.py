"""Layers that train chosen entries of a weight, in plain torch: the specification. Slow, and with dense gradients.

`positions` [k], int64, are places in the flattened weight; the order of the entries is theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["adamw_", "conv2d", "linear"]


def linear(x: Tensor, weight: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I] times the weight [O, I] with values [k] at `positions`, transposed, plus bias [O]."""
    return torch.nn.functional.linear(x, _with(weight, values, positions), bias)


def conv2d(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    positions: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """torch's convolution by the weight [O, C/groups, kh, kw] with values [k] at `positions`."""
    return torch.nn.functional.conv2d(x, _with(weight, values, positions), bias, stride, padding, dilation, groups)


def linear_gradient(dy: Tensor, x: Tensor, positions: Tensor) -> Tensor:
    """The chosen entries [k] of dy^T x, of dy [T, O] and x [T, I]."""
    return (dy.mT @ x).flatten()[positions]


def conv2d_gradient(
    dy: Tensor,
    x: Tensor,
    positions: Tensor,
    shape: tuple[int, ...],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """The chosen entries [k] of the gradient of a convolution's weight, which is of `shape`."""
    moves = (stride, padding, dilation, False, (0, 0), groups)  # neither transposed nor padded on one side
    dense = torch.ops.aten.convolution_backward(dy, x, x.new_empty(shape), None, *moves, (False, True, False))[1]
    return dense.flatten()[positions]


def adamw_(
    weight: Tensor,
    grad: Tensor,
    positions: Tensor,
    first: Tensor,
    second: Tensor,
    master: Tensor | None = None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """Step number `step` >= 1 of AdamW (Loshchilov and Hutter 2019, algorithm 2), in place, on the chosen entries.

    weight of any shape, contiguous; grad, moments and master [k]. A bfloat16 weight is updated in float32 and rounded;
    with a master, which is the same number in float32, nothing is lost between steps.
    """
    rate, root = lr / (1 - betas[0] ** step), (1 - betas[1] ** step) ** -0.5
    update_(weight, grad, positions, first, second, master, *betas, 1 - lr * weight_decay, rate, root, eps)


def update_(
    weight: Tensor,
    grad: Tensor,
    positions: Tensor,
    first: Tensor,
    second: Tensor,
    master: Tensor | None,
    beta1: float,
    beta2: float,
    keep: float,
    rate: float,
    root: float,
    eps: float,
) -> None:
    """`adamw_` with its factors at hand: w keep - rate m / (sqrt(v) root + eps)."""
    flat = weight.view(-1)
    value = (flat[positions] if master is None else master).to(first.dtype)
    gradient = grad.to(first.dtype)
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    value = value * keep - rate * first / (second.sqrt() * root + eps)
    flat.index_copy_(0, positions, value.to(weight.dtype))
    if master is not None:
        master.copy_(value)


def _with(weight: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    return weight.detach().flatten().index_put((positions,), values.to(weight.dtype)).view(weight.shape)
