"""Layers that train chosen entries of a weight, at the memory of these entries alone.

    from kernels import masked_grad
    selection = masked_grad.Selection.from_mask(weight.abs() < 1e-3)
    values = masked_grad.handle(selection)           # a leaf for the gradient, with no storage of its own
    y = masked_grad.linear(x, weight, values, selection, bias)
    y.sum().backward()                               # values.grad [k]; never a gradient [O, I]
    masked_grad.adamw_(weight, values.grad, selection, moments, lr=1e-4)

A layer runs dense on the weight, which holds the trained values in place. Backward makes the chosen entries of the
weight's gradient and no others: products of single entries where few are chosen, else dense panels of 64 rows of which
the entries are taken, one after the other. `adamw_` writes its update into the weight. A chosen entry costs 2 bytes of
index, 4 of gradient and 8 of moments; what backward holds beside them does not grow with the number of layers.

float32 and bfloat16 (float32 sums). On the CPU: C++ (AVX2, AVX-512, portable); on CUDA Triton. In float64 the
plain-torch `reference.py`, the specification, runs, and makes dense gradients. KERNELS_BACKEND=reference|cpu|triton
forces one. The same call gives the same bits again; where single entries are summed, on any number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.masked_grad import ops
from kernels.masked_grad.selection import Selection
from kernels.masked_grad.update import Moments, adamw_, clip_scale

__all__ = ["Moments", "Selection", "adamw_", "clip_scale", "conv2d", "handle", "linear"]

Pair = int | tuple[int, int]


def handle(selection: Selection, dtype: torch.dtype = torch.float32) -> Tensor:
    """A leaf [k] on the selection's device that receives the gradient of the chosen entries in its `.grad`.

    All its elements share one number, a zero: it never stands for the values, which live in the weight. `.grad` is an
    ordinary tensor [k] of this dtype, in the order of `selection.positions()`; float32 also for bfloat16 weights keeps
    what the float32 sums have.

    Returns a tensor [k] of one number's storage that requires grad. Raises TypeError for another dtype than float32,
    bfloat16 and float64.
    """
    if dtype not in ops.DTYPES:
        raise TypeError(f"kernels.masked_grad.handle: got {dtype}; expected torch.float32, bfloat16 or float64")
    return torch.zeros(1, dtype=dtype, device=selection.device).expand(selection.count).requires_grad_()


def linear(x: Tensor, weight: Tensor, values: Tensor, selection: Selection, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, with gradients to x, bias and the chosen entries of W (dW_oi = sum_n dy_no x_ni).

    x          [..., I], float32, bfloat16 or float64
    weight     [O, I] of x's dtype, requires no grad; it already holds the values. Changing it in place between forward
               and backward is an error, as everywhere in torch
    values     [k], receives the gradient, in its dtype; what it holds is not read. Make one with `handle`
    selection  which entries of the weight it stands for, of its shape
    bias       [O]

    Under autocast x, weight and bias are converted as torch.nn.functional.linear does it.

    Returns [..., O] in x's dtype. Raises ValueError for shapes and devices, TypeError for dtypes, KernelUnavailable
    where no kernel serves the device; RuntimeError when it is differentiated twice.
    """
    x, weight, bias = ops.autocast(x, weight, bias)
    _check("linear", x, weight, values, selection, bias)
    if weight.ndim != 2:
        raise ValueError(f"kernels.masked_grad.linear: got a weight of {list(weight.shape)}; expected [O, I]")
    if x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"kernels.masked_grad.linear: got x of {list(x.shape)}; expected [..., {weight.shape[1]}]")
    y = ops.linear(x.reshape(x.shape[:-1].numel(), x.shape[-1]), weight, values, selection, bias)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def conv2d(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    selection: Selection,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """The convolution of torch.nn.functional.conv2d, with gradients to x, bias and the chosen entries of the weight.

    dW_ocuv = sum over n, i, j of dy[n, o, i, j] x[n, c, s i + d u - p, s j + d v - p].

    x          [N, C, H, W], float32, bfloat16 or float64
    weight     [O, C/groups, kh, kw] of x's dtype, requires no grad; it already holds the values (see `linear`)
    values     [k], receives the gradient; see `linear`
    selection  which entries of the weight it stands for, of its shape
    bias       [O]
    padding    pixels of zeros, or "valid", or "same" where stride is 1 and both sides get as much
    stride, dilation, groups  as in torch

    Returns [N, O, H', W'] in x's dtype. Raises as `linear` does.
    """
    x, weight, bias = ops.autocast(x, weight, bias)
    _check("conv2d", x, weight, values, selection, bias)
    if x.ndim != 4 or weight.ndim != 4 or groups < 1 or x.shape[1] != groups * weight.shape[1]:
        raise ValueError(
            f"kernels.masked_grad.conv2d: got x {list(x.shape)}, weight {list(weight.shape)} and groups={groups}; "
            "expected x [N, C, H, W] and weight [O, C/groups, kh, kw]"
        )
    if weight.shape[0] % groups:
        raise ValueError(f"kernels.masked_grad.conv2d: got groups={groups}; expected a divisor of O = {len(weight)}")
    step, spread = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    shape = ops.Window(
        (weight.shape[2], weight.shape[3]), step, _padding(padding, weight, step, spread), spread, groups
    )
    if min(shape.out_size(x.shape[2], x.shape[3])) < 1:
        raise ValueError(
            f"kernels.masked_grad.conv2d: got images of {list(x.shape[2:])}, smaller than the window of {shape}; "
            "expected larger images or more padding"
        )
    return ops.conv2d(x, weight, values, selection, bias, shape)


def _padding(
    padding: Pair | str, weight: Tensor, stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int]:
    if not isinstance(padding, str):
        return _pair("padding", padding, 0)
    across = [d * (size - 1) for d, size in zip(dilation, weight.shape[2:], strict=True)]
    if padding == "valid":
        return 0, 0
    if padding == "same" and stride == (1, 1) and not any(total % 2 for total in across):
        return across[0] // 2, across[1] // 2
    raise ValueError(
        f"kernels.masked_grad.conv2d: got padding={padding!r} with stride {stride} and a window of {across} pixels "
        "less one; expected numbers, 'valid', or 'same' with stride 1 and the same on both sides; else pad x first"
    )


def _pair(name: str, given: Pair, least: int) -> tuple[int, int]:
    numbers = (given, given) if isinstance(given, int) else tuple(given)
    if len(numbers) != 2 or any(not isinstance(number, int) or number < least for number in numbers):
        raise ValueError(f"kernels.masked_grad.conv2d: got {name}={given}; expected one or two integers >= {least}")
    return numbers[0], numbers[1]


def _check(name: str, x: Tensor, weight: Tensor, values: Tensor, selection: Selection, bias: Tensor | None) -> None:
    """Raises for what no layer takes."""
    call = f"kernels.masked_grad.{name}"
    if tuple(weight.shape) != selection.shape:
        raise ValueError(
            f"{call}: got a weight of {list(weight.shape)} and a selection of {list(selection.shape)}; expected "
            "the same"
        )
    if values.shape != (selection.count,):
        raise ValueError(
            f"{call}: got values of {list(values.shape)}; expected [{selection.count}], one for each selected entry, "
            "e.g. masked_grad.handle(selection)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{call}: got a bias of {list(bias.shape)}; expected [{len(weight)}]")
    for label, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{call}: got x of {x.dtype} and {label} of {tensor.dtype}; expected one dtype")
    for label, dtype in (("x", x.dtype), ("values", values.dtype)):
        if dtype not in ops.DTYPES:
            raise TypeError(f"{call}: got {label} of {dtype}; expected torch.float32, bfloat16 or float64")
    for label, tensor in (("weight", weight), ("values", values), ("bias", bias), ("selection", selection)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"{call}: got x on {x.device} and {label} on {tensor.device}; expected one device; move it with "
                ".to(...)"
            )
    if weight.requires_grad:
        raise ValueError(
            f"{call}: got a weight that requires grad, and it would get none; expected a frozen one: call "
            "weight.requires_grad_(False), and train `values`"
        )
