"""AdamW of chosen entries, written into the weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.masked_grad import ops
from kernels.masked_grad.selection import Selection


@dataclass
class Moments:
    """What AdamW remembers of k entries: averages of the gradient and of its square, and the number of steps made.

    first, second  float32 [k] (float64 of float64 weights)
    step           0 before the first one
    """

    first: Tensor
    second: Tensor
    step: int = 0

    @classmethod
    def zeros(cls, selection: Selection, dtype: torch.dtype = torch.float32) -> Moments:
        """Before the first step, on the selection's device."""
        first, second = (torch.zeros(selection.count, dtype=dtype, device=selection.device) for _ in range(2))
        return cls(first, second)


def adamw_(
    weight: Tensor,
    grad: Tensor,
    selection: Selection,
    state: Moments,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    grad_scale: Tensor | float = 1.0,
    master: Tensor | None = None,
) -> None:
    """One step of AdamW (Loshchilov and Hutter 2019) on the chosen entries of the weight, in place and in one pass.

    weight        of the selection's shape, float32, bfloat16 or float64; contiguous ones are updated without a copy
    grad          [k], float32, bfloat16 or float64, as `handle(selection).grad`
    state         moments, changed in place; its step counts this one
    lr            learning rate >= 0
    betas, eps    as in torch.optim.AdamW
    weight_decay  of the chosen entries alone, times lr, as in torch.optim.AdamW
    grad_scale    the gradient is multiplied by it first; a tensor of one number is read where it lies, see `clip_scale`
    master        float32 [k]: the values of a bfloat16 weight without rounding, changed in place and rounded into it

    Returns nothing. Raises ValueError for shapes, devices and ranges, TypeError for dtypes, KernelUnavailable where no
    kernel serves the device.
    """
    _check(weight, grad, selection, state, master)
    if lr < 0 or weight_decay < 0 or eps < 0 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(
            f"kernels.masked_grad.adamw_: got lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}; expected "
            "0 <= beta < 1 and the others >= 0"
        )
    scale = torch.as_tensor(grad_scale, dtype=state.first.dtype, device=weight.device).reshape(())
    step = state.step + 1
    rate, root = lr / (1 - betas[0] ** step), (1 - betas[1] ** step) ** -0.5
    hyper = ops.Hyper(*betas, 1 - lr * weight_decay, rate, root, eps)
    ops.adamw_(weight.detach(), grad.detach(), selection, state.first, state.second, master, scale, hyper)
    state.step = step


def clip_scale(grads: Sequence[Tensor], max_norm: float) -> Tensor:
    """What the gradients have to be multiplied by so that their common norm is at most `max_norm`, as `grad_scale`.

    grads are those of the chosen entries, of all layers that are clipped together, on one device. As
    torch.nn.utils.clip_grad_norm_ it is min(1, max_norm / (norm + 1e-6)), and NaN where a gradient is.

    Returns a tensor of one float32 (float64 of float64), not read to the CPU. Raises ValueError for a max_norm <= 0.
    """
    if not max_norm > 0:
        raise ValueError(f"kernels.masked_grad.clip_scale: got max_norm={max_norm}; expected more than 0")
    if not grads:
        return torch.ones(())
    wide = torch.float64 if grads[0].dtype == torch.float64 else torch.float32
    norms = [torch.linalg.vector_norm(grad.detach(), dtype=wide) for grad in grads]
    return (max_norm / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp(max=1.0)


def _check(weight: Tensor, grad: Tensor, selection: Selection, state: Moments, master: Tensor | None) -> None:
    """Raises for what no backend serves."""
    call = "kernels.masked_grad.adamw_"
    if tuple(weight.shape) != selection.shape:
        raise ValueError(
            f"{call}: got a weight of {list(weight.shape)} and a selection of {list(selection.shape)}; expected "
            "the same"
        )
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    tensors = {"grad": grad, "state.first": state.first, "state.second": state.second, "master": master}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != (selection.count,):
            raise ValueError(f"{call}: got {name} of {list(tensor.shape)}; expected [{selection.count}]")
        if tensor is not None and name != "grad" and (tensor.dtype != wide or not tensor.is_contiguous()):
            raise TypeError(
                f"{call}: got {name} of {tensor.dtype}, strides {tensor.stride()}; expected {wide}, contiguous"
            )
    for name, tensor in (("weight", weight), ("grad", grad)):
        if tensor.dtype not in ops.DTYPES:
            raise TypeError(f"{call}: got {name} of {tensor.dtype}; expected torch.float32, bfloat16 or float64")
    for name, tensor in {"selection": selection, **tensors}.items():
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(
                f"{call}: got a weight on {weight.device} and {name} on {tensor.device}; expected one device"
            )
    if master is not None and weight.dtype != torch.bfloat16:
        raise TypeError(f"{call}: got a master of a weight of {weight.dtype}; expected one for bfloat16 weights alone")
