"""Checks and timings of kernels.masked_grad on a GPU.

A gradient is timed beside the dense one by cuBLAS or cuDNN, of which the chosen entries are taken; the update beside
torch's operations on the same entries. Both in CUDA graphs: a launch from Python takes longer than small layers do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import masked_grad
from kernels.masked_grad import Moments, Selection, reference
from pipelines.gpu.report import Check, Timing, error, graph_times, measured, quartiles

# |error| / |exact| of float32 sums of up to 8192 products
WORST_ERROR = 3e-6
# where the weight itself is bfloat16: its last bit, which a GPU rounds and the interpreter cuts off
WORST_NARROW = 2**-7

Move = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]  # stride, padding, dilation, groups


@dataclass(frozen=True)
class Layer:
    """A weight of `shape`, the shape of its input, and how a convolution moves (None for a linear layer)."""

    shape: tuple[int, ...]
    given: tuple[int, ...]
    density: float
    move: Move | None = None

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} at {self.density:.1%}" + (
            f", groups {self.move[3]}" if self.move else ""
        )


PLAIN: Move = (1, 1), (1, 1), (1, 1), 1
TINY = (
    Layer((37, 150), (20, 150), 0.1),
    Layer((20, 6, 3, 3), (2, 6, 6, 7), 0.3, PLAIN),
    Layer((12, 2, 3, 2), (2, 6, 7, 9), 0.3, ((1, 2), (0, 2), (2, 1), 3)),
)
LAYERS = (
    *TINY,
    Layer((1, 1), (1, 1), 1.1),
    Layer((1280, 1280), (8192, 1280), 0.006),
    Layer((130, 5121), (77, 5121), 0.5),
    Layer((640, 640, 3, 3), (2, 640, 16, 16), 0.023, PLAIN),
    Layer((135, 4, 3, 2), (3, 4, 17, 15), 0.3, ((2, 1), (0, 2), (1, 2), 1)),
    Layer((96, 1, 3, 3), (4, 96, 20, 20), 0.5, ((1, 1), (1, 1), (1, 1), 96)),
)
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
DENSITIES = (0.006, 0.023, 0.058, 0.2)
# a layer of attention and a convolution of Stable Diffusion, batch 4
TIMED = (Layer((1280, 1280), (4096, 1280), 0.0), Layer((640, 640, 3, 3), (4, 640, 32, 32), 0.0, PLAIN))


def checks(device: torch.device, tiny: bool) -> Iterator[Check]:
    """Gradients against float64, the update against its specification, the same bits again."""
    for layer in TINY if tiny else LAYERS:
        for dtype in DTYPES:
            yield from _of_layer(device, layer, dtype)
    for dtype in DTYPES:
        yield from _of_update(device, (70, 150) if tiny else (1280, 1300), dtype)


def timings(device: torch.device, repeats: int) -> Iterator[Timing]:
    """Two layers and the update of 20 million weights, at four densities."""
    for layer in TIMED:
        for dtype in DTYPES:
            yield from _gradients(device, layer, dtype, repeats)
    yield from _updates(device, repeats)


def _of_layer(device: torch.device, layer: Layer, dtype: torch.dtype) -> Iterator[Check]:
    selection, x, weight, dy = _case(device, layer, dtype)

    def gradients() -> tuple[Tensor, Tensor]:
        leaf, values = x.clone().requires_grad_(), masked_grad.handle(selection)
        _layer(layer, leaf, weight, values, selection).backward(dy)
        assert leaf.grad is not None and values.grad is not None
        return leaf.grad, values.grad

    def exact() -> tuple[Tensor, Tensor]:
        leaves = [tensor.double().requires_grad_() for tensor in (x, weight)]
        dx, dw = torch.autograd.grad(_dense(layer, *leaves), leaves, dy.double())
        return dx, selection.gather(dw)

    def unrepeated() -> float:
        return float((gradients()[1] != gradients()[1]).sum())

    # cuDNN takes tf32 for float32 unless told otherwise: 10 bits
    narrow = WORST_ERROR if dtype == torch.float32 and layer.move is None else WORST_NARROW
    measures: dict[str, tuple[Callable[[], float], float]] = {
        "chosen entries against float64": (lambda: error(gradients()[1], exact()[1]), WORST_ERROR),
        "input gradient": (lambda: error(gradients()[0], exact()[0]), narrow),
        "not the same again": (unrepeated, 0.0),
    }
    for name, (measure, limit) in measures.items():
        yield measured("masked_grad", f"{layer}, {DTYPES[dtype]}", name, measure, limit)


def _of_update(device: torch.device, shape: tuple[int, int], dtype: torch.dtype) -> Iterator[Check]:
    selection, weight, grad = _update(device, shape, 0.1, dtype)

    def moved(call: Callable[[Tensor, Moments, Tensor | None], None], master: bool) -> Tensor:
        held, state = weight.clone(), Moments.zeros(selection)
        kept = selection.gather(held).float() if master else None
        for _ in range(3):
            call(held, state, kept)
        return held if kept is None else kept

    def ours(held: Tensor, state: Moments, master: Tensor | None) -> None:
        masked_grad.adamw_(held, grad, selection, state, lr=0.1, master=master)

    def specified(held: Tensor, state: Moments, master: Tensor | None) -> None:
        state.step += 1
        reference.adamw_(
            held, grad, selection.positions(), state.first, state.second, master,
            lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, step=state.step,
        )  # fmt: skip

    for master in (False, True)[: 1 + (dtype == torch.bfloat16)]:

        def difference(master: bool = master) -> float:
            return error(moved(ours, master), moved(specified, master).double())

        limit = WORST_ERROR if dtype == torch.float32 or master else WORST_NARROW
        name = "AdamW as specified" + (", with a master" if master else "")
        yield measured("masked_grad", f"{shape[0]}x{shape[1]}, {DTYPES[dtype]}", name, difference, limit)


def _gradients(device: torch.device, layer: Layer, dtype: torch.dtype, repeats: int) -> Iterator[Timing]:
    """The rate is that of a dense product in the same time."""
    case = f"{'x'.join(map(str, layer.shape))}"
    for density in DENSITIES:
        selection, x, weight, dy = _case(device, Layer(layer.shape, layer.given, density, layer.move), dtype)
        index, positions = (selection.offsets, selection.starts), selection.positions()
        if layer.move is None:
            ours: Callable[[], Tensor] = partial(
                torch.ops.resparse.masked_grad_linear_gradient.default, dy, x, *index, torch.float32
            )
            dense = partial(lambda dy, x, at: (dy.mT @ x).flatten()[at], dy, x, positions)
        else:
            moves = (*layer.move[:3], False, (0, 0), layer.move[3])
            ours = partial(
                torch.ops.resparse.masked_grad_conv2d_gradient.default,
                dy, x, *index, layer.shape[2:], *layer.move, torch.float32,
            )  # fmt: skip
            call = partial(torch.ops.aten.convolution_backward, dy, x, weight, None, *moves, (False, True, False))
            dense = partial(lambda call, at: call()[1].flatten()[at], call, positions)
        work = 2 * dy.numel() * weight[0].numel() / 1e9
        beside = _timed(f"{case}, {density:.1%}", f"dense, taken, {DTYPES[dtype]}", dense, repeats, work)
        yield beside
        yield _timed(f"{case}, {density:.1%}", f"chosen entries, {DTYPES[dtype]}", ours, repeats, work, beside)


def _updates(device: torch.device, repeats: int) -> Iterator[Timing]:
    shape = (4000, 5000)
    for density in DENSITIES:
        selection, weight, grad = _update(device, shape, density, torch.float32)
        state, positions, scale = Moments.zeros(selection), selection.positions(), torch.ones((), device=device)
        factors = dict(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
        case, work = f"20M weights, {density:.1%}", 24 * selection.count / 1e6
        by_torch = partial(
            reference.adamw_, weight, grad, positions, state.first, state.second, None, lr=1e-4, step=1, **factors
        )
        beside = _timed(case, "AdamW by torch's index", by_torch, repeats, work, unit="GB/s")
        yield beside
        ours = partial(masked_grad.adamw_, weight, grad, selection, state, lr=1e-4, grad_scale=scale)
        yield _timed(case, "AdamW", ours, repeats, work, beside, "GB/s")


def _case(device: torch.device, layer: Layer, dtype: torch.dtype) -> tuple[Selection, Tensor, Tensor, Tensor]:
    """What is chosen, x, weight and dy."""
    generator = torch.Generator().manual_seed(0)
    selection = Selection.from_mask(torch.rand(layer.shape, generator=generator) < layer.density).to(device)
    x, weight = (torch.randn(shape, generator=generator).to(device, dtype) for shape in (layer.given, layer.shape))
    shape = _dense(layer, x, weight).shape
    return selection, x, weight, torch.randn(shape, generator=generator).to(device, dtype)


def _update(
    device: torch.device, shape: tuple[int, int], density: float, dtype: torch.dtype
) -> tuple[Selection, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    selection = Selection.from_mask(torch.rand(shape, generator=generator) < density)
    weight, grad = torch.randn(shape, generator=generator), torch.randn(selection.count, generator=generator)
    return selection.to(device), weight.to(device, dtype), grad.to(device)


def _layer(layer: Layer, x: Tensor, weight: Tensor, values: Tensor, selection: Selection) -> Tensor:
    if layer.move is None:
        return masked_grad.linear(x, weight, values, selection)
    return masked_grad.conv2d(x, weight, values, selection, None, *layer.move)


def _dense(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight) if layer.move is None else F.conv2d(x, weight, None, *layer.move)


def _timed(
    case: str,
    call: str,
    run: Callable[[], Any],
    repeats: int,
    work: float,
    beside: Timing | None = None,
    unit: str = "TFLOP/s",
) -> Timing:
    low, median, high = quartiles(graph_times([run] * 8, repeats))
    ratio, name = (beside.median_ms / median, beside.call) if beside else (None, "")
    return Timing("masked_grad", case, call, 1, median, low, high, work / median, unit, ratio, name)
