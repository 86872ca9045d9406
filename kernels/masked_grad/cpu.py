"""The compiled kernels' side in Python: contiguous memory, scratch, and which of two routes a gradient takes.

Products of single entries cost as much as there are entries, and the transposing of their factors on top; a dense
product of 64 rows, of which the entries are taken before the next 64, costs the same however few there are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels._load import native
from kernels.masked_grad.selection import matrix

if TYPE_CHECKING:
    from kernels.masked_grad.ops import Hyper, Window

PANEL = 64  # rows
# Products of single entries are faster up to a density of DENSEST - TRANSPOSING / rows of a group: measured with AVX2
# on one core, linear layers and convolutions of 64 to 1280 rows, 1 to 8192 tokens, which make no difference to it.
DENSEST, TRANSPOSING = 0.4, 13


def linear_gradient(dy: Tensor, x: Tensor, offsets: Tensor, starts: Tensor) -> Tensor:
    """Chosen entries [k], float32, of dy^T x; dy [T, O] and x [T, I] both float32 or bfloat16."""
    out = torch.empty(len(offsets), dtype=torch.float32)
    rows, columns = dy.shape[1], x.shape[1]
    if _in_panels(dy, len(offsets), (rows, columns), 1):
        panel = torch.empty(min(PANEL, rows), columns)
        for row in range(0, rows, PANEL):
            part = dy[:, row : row + PANEL].mT
            _take(torch.mm(part, x, out=panel[: len(part)]), row, offsets, starts, rows, out)
        return out
    factors = _bits(dy.contiguous()), _bits(x.contiguous())
    native().masked_grad_linear(*factors, offsets, starts, _room((rows, columns)), out, torch.get_num_threads())
    return out


def conv2d_gradient(dy: Tensor, x: Tensor, offsets: Tensor, starts: Tensor, window: Window) -> Tensor:
    """Chosen entries [k], float32, of the gradient of a convolution's weight; dy and x float32 or bfloat16."""
    out = torch.empty(len(offsets), dtype=torch.float32)
    shape = (dy.shape[1], x.shape[1] // window.groups, *window.size)
    if _in_panels(dy, len(offsets), matrix(shape), window.groups):
        _conv2d_in_panels(dy, x, offsets, starts, window, shape, out)
        return out
    factors, room = (_bits(dy.contiguous()), _bits(x.contiguous())), _room(matrix(shape), window.groups)
    native().masked_grad_conv2d(*factors, offsets, starts, *window, room, out, torch.get_num_threads())
    return out


def adamw_(
    weight: Tensor,
    grad: Tensor,
    offsets: Tensor,
    starts: Tensor,
    first: Tensor,
    second: Tensor,
    master: Tensor | None,
    scale: Tensor,
    hyper: Hyper,
) -> None:
    """One step in place; weight contiguous, float32 or bfloat16."""
    native().masked_grad_adamw(
        _bits(weight.view(matrix(weight.shape))), _bits(grad.contiguous()), offsets, starts, first, second, master,
        scale.item(), hyper.beta1, hyper.beta2, hyper.keep, hyper.rate, hyper.root, hyper.eps, torch.get_num_threads(),
    )  # fmt: skip


def _in_panels(dy: Tensor, count: int, shape: tuple[int, int], groups: int) -> bool:
    rows, columns = shape
    if dy.dtype != torch.float32 or not count:  # torch rounds sums to bfloat16, and `values` may want float32
        return False
    return count > (DENSEST - TRANSPOSING * groups / rows) * rows * columns


def _conv2d_in_panels(
    dy: Tensor, x: Tensor, offsets: Tensor, starts: Tensor, window: Window, shape: tuple[int, ...], out: Tensor
) -> None:
    """A panel is of whole groups, or of some rows of one."""
    size = shape[0] // window.groups  # rows of a group
    whole = max(1, PANEL // size)  # groups
    for begin in range(0, shape[0], whole * size):
        for row in range(begin, min(begin + whole * size, shape[0]), PANEL):
            last = min(row + PANEL, begin + whole * size, shape[0])
            groups, channel = max(1, (last - row) // size), row // size * shape[1]
            panel = torch.ops.aten.convolution_backward(
                dy[:, row:last], x[:, channel : channel + groups * shape[1]], x.new_empty(last - row, *shape[1:]), None,
                window.stride, window.padding, window.dilation, False, (0, 0), groups, (False, True, False),
            )[1]  # fmt: skip
            _take(panel.reshape(last - row, -1), row, offsets, starts, shape[0], out)


def _take(panel: Tensor, row: int, offsets: Tensor, starts: Tensor, rows: int, out: Tensor) -> None:
    native().masked_grad_take(panel, row, offsets, starts, rows, out, torch.get_num_threads())


def _room(shape: tuple[int, int], groups: int = 1) -> Tensor:
    """The kernel's scratch, in torch's memory so that it is counted there."""
    return torch.empty(native().masked_grad_scratch(*shape, groups, torch.get_num_threads()))


def _bits(tensor: Tensor) -> Tensor:
    """bfloat16 as its bits, which is how it travels to the kernels; float32 as it is."""
    return tensor.detach().view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor.detach()
