"""Checks and timings of kernels.nm on a GPU.

Products are timed in CUDA graphs, since a launch from Python takes longer than a few tokens do, and on so many copies
of the weight that the cache cannot hold them, as a model's layers follow each other. Those of vectors, whose rows share
their places, are timed with many tokens, where arithmetic counts. Dense products by cuBLAS run beside them, in float32
(torch's default there: no tf32) and in bfloat16; a ratio is to the one of the same dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import nm
from kernels.nm import ops, reference
from kernels.nm.tensor import pattern
from pipelines.gpu.report import Check, Timing, call_times, error, graph_times, measured, quartiles

# |error| / |exact| of float32 sums of up to 4096 products
WORST_ERROR = 3e-6
# where the result itself is bfloat16: its last bit, which a GPU rounds and the interpreter cuts off
WORST_NARROW = 2**-7

Call = Callable[[], Tensor]

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class Layer:
    """A weight of n:m [rows, groups * m], how many tokens meet it, and how many of its rows share their places."""

    n: int
    m: int
    rows: int
    groups: int
    tokens: int
    vector: int = 1

    def __str__(self) -> str:
        return f"{pattern(self.n, self.m, self.vector)} {self.rows}x{self.groups * self.m} x {self.tokens}"


# ragged rows and tokens, places in nibbles and in bytes, a group wider than a tile, m that is no power of two, vectors
TINY = (Layer(2, 4, 21, 5, 3), Layer(2, 8, 37, 9, 17), Layer(7, 100, 19, 2, 20), Layer(3, 24, 37, 9, 17, 16))
LAYERS = (
    *TINY,
    Layer(1, 1, 5, 70, 2),
    Layer(2, 4, 1000, 250, 40),
    Layer(1, 16, 130, 40, 300),
    Layer(3, 24, 70, 30, 40),
    Layer(5, 32, 70, 30, 1),
    Layer(13, 256, 40, 3, 40),
    Layer(2, 8, 4096, 512, 1),
    Layer(2, 8, 4096, 512, 256),
    Layer(2, 4, 37, 9, 1, 16),
    Layer(2, 8, 1000, 500, 333, 32),
    Layer(5, 32, 300, 30, 40, 256),
    Layer(2, 8, 4096, 512, 1, 64),
    Layer(2, 8, 4096, 512, 2048, 128),
)
PATTERNS = ((2, 4), (1, 4), (2, 8), (1, 8), (1, 16), (1, 32))
SIZE = 4096  # rows and columns of a timed weight
TOKENS = (1, 16, 256)
SHARED = ((2, 4), (2, 8), (1, 16))  # patterns of the vectors
MANY = (256, 4096)  # tokens that they meet
CACHE_BYTES = 256 * 2**20  # more than any GPU's cache


def checks(device: torch.device, tiny: bool) -> Iterator[Check]:
    """Products and gradients against float64, masks against the specification, the same bits again."""
    for layer in TINY if tiny else LAYERS:
        for dtype in NAMES:
            yield from _of_layer(device, layer, dtype)
    for n, m in ((2, 4), (3, 7)) if tiny else ((2, 4), (1, 16), (3, 7), (31, 64)):
        yield from _of_mask(device, n, m, 40 if tiny else 4000)


def timings(device: torch.device, repeats: int) -> Iterator[Timing]:
    """Products of a 4096 x 4096 weight with 1, 16 and 256 tokens, by vectors with more; gradients, mask searches."""
    for tokens in TOKENS:
        yield from _products(device, tokens, repeats)
    for tokens in MANY:
        yield from _products_of_vectors(device, tokens, repeats)
    yield from _gradients(device, TOKENS[-1], repeats)
    yield from _searches(device, repeats)


def _of_layer(device: torch.device, layer: Layer, dtype: torch.dtype) -> Iterator[Check]:
    n, m = layer.n, layer.m
    generator = torch.Generator().manual_seed(0)
    sizes = (
        (layer.rows, layer.groups * m),
        (layer.tokens, layer.groups * m),
        (layer.tokens, layer.rows),
        (layer.rows,),
    )
    weight, x, dy, bias = (torch.randn(size, generator=generator).to(device) for size in sizes)
    weight = (weight * _by_vectors(weight, n, m, layer.vector)).to(dtype)
    exact = weight.double()
    packed = nm.pack(weight, n, m, weight != 0, vector=layer.vector)
    narrow = x.to(dtype)

    def unpacked(gradient: Tensor) -> Tensor:
        return replace(packed, values=gradient).to_dense()

    def gradients() -> float:
        """Autograd gives what the ops give, and leaves no slope where nothing is kept."""
        leaf, values = x.clone().requires_grad_(), packed.values.clone().requires_grad_()
        nm.linear(leaf, replace(packed, values=values), bias).backward(dy)
        assert leaf.grad is not None and values.grad is not None
        dx = (leaf.grad != ops.input_gradient(dy, packed)).sum()
        dw = (values.grad != ops.weight_gradient(dy, x, packed)).sum()
        return float(dx + dw + (values.grad[packed.values == 0] != 0).sum())

    def unrepeated() -> float:
        calls = (
            lambda: nm.linear(x, packed, bias),
            lambda: ops.input_gradient(dy, packed),
            lambda: ops.weight_gradient(dy, x, packed),
        )
        return float(sum((call() != call()).sum() for call in calls))

    measures: dict[str, tuple[Callable[[], float], float]] = {
        "linear against float64": (
            lambda: error(nm.linear(x, packed, bias), x.double() @ exact.mT + bias.double()),
            WORST_ERROR,
        ),
        "linear of that dtype": (
            lambda: error(ops.linear(narrow, packed, None, None), narrow.double() @ exact.mT),
            WORST_ERROR if dtype == torch.float32 else WORST_NARROW,
        ),
        "input gradient": (lambda: error(ops.input_gradient(dy, packed), dy.double() @ exact), WORST_ERROR),
        "weight gradient": (
            lambda: error(unpacked(ops.weight_gradient(dy, x, packed)), dy.double().mT @ x.double() * (weight != 0)),
            WORST_ERROR if dtype == torch.float32 else WORST_NARROW,
        ),
        "gradients": (gradients, 0.0),
        "not the same again": (unrepeated, 0.0),
        "strides": (
            lambda: float((nm.linear(x.mT.contiguous().mT, packed) - nm.linear(x, packed)).abs().max()),
            0.0,
        ),
    }
    for name, (measure, limit) in measures.items():
        yield measured("nm", f"{layer}, {NAMES[dtype]}", name, measure, limit)


def _of_mask(device: torch.device, n: int, m: int, groups: int) -> Iterator[Check]:
    generator = torch.Generator().manual_seed(0)
    # equal magnitudes of both signs, zeros, infinities, NaN, denormal numbers
    pool = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, torch.inf, -torch.inf, torch.nan, 1e-44, -3e-45])
    for name, score in (
        ("noise", torch.randn(3, groups * m, generator=generator)),
        ("ties and NaN", pool[torch.randint(len(pool), (3, groups * m), generator=generator)]),
        ("an inner axis", torch.randn(3, groups * m, 5, generator=generator)),
    ):
        weight = score.to(device)
        wanted = reference.mask(score.movedim(1, -1), n, m).movedim(-1, 1)

        def different(weight: Tensor = weight, wanted: Tensor = wanted) -> float:
            return float((nm.mask(weight, n, m, 1).cpu() != wanted).sum())

        yield measured("nm", f"mask {n}:{m}, {name}", "not as specified", different, 0.0)
    whole = torch.randn(37, groups * m, generator=generator).mul(4).round()  # sums of it are exact in any order

    def different_in_vectors() -> float:
        return float((nm.mask(whole.to(device), n, m, 1, vector=16).cpu() != _by_vectors(whole, n, m, 16)).sum())

    yield measured("nm", f"mask {n}:{m}, vectors", "not as specified", different_in_vectors, 0.0)


def _by_vectors(weight: Tensor, n: int, m: int, vector: int) -> Tensor:
    """The specified mask of a weight whose rows share their places in vectors."""
    sums = torch.stack([rows.abs().sum(dim=0) for rows in weight.split(vector)])
    return reference.mask(sums, n, m).repeat_interleave(vector, 0)[: len(weight)]


def _products(device: torch.device, tokens: int, repeats: int) -> Iterator[Timing]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SIZE, SIZE, generator=generator).to(device)
    x = torch.randn(tokens, SIZE, generator=generator).to(device)
    dense: dict[torch.dtype, Timing] = {}
    for dtype in NAMES:
        calls = _dense_calls(x.to(dtype), weight.to(dtype))
        dense[dtype] = _timed(f"{SIZE}^2", f"dense {NAMES[dtype]}", calls, tokens, repeats, _read(weight.to(dtype)))
        yield dense[dtype]
    for n, m in PATTERNS:
        for dtype in NAMES:
            packed = nm.pack(weight, n, m, dtype=dtype)
            case, call = f"{n}:{m} {SIZE}^2", f"packed {NAMES[dtype]}"
            calls = _packed_calls(x.to(dtype), packed)
            yield _timed(case, call, calls, tokens, repeats, _read(packed), dense[dtype])
            if tokens == 1 and (n, m) == PATTERNS[0]:
                low, median, high = quartiles(call_times(calls[0], repeats))
                rate, unit = _read(packed)
                yield Timing("nm", case, f"{call}, from Python", tokens, median, low, high, rate / median, unit)
    try:
        semi = nm.pack(weight, 2, 4, dtype=torch.bfloat16).to_semi_structured()
        calls = [partial(F.linear, x.bfloat16(), semi)] * 16
        work, beside = _read(weight.bfloat16()), dense[torch.bfloat16]
        yield _timed(f"2:4 {SIZE}^2", "torch's 2:4, one copy", calls, tokens, repeats, work, beside)
    except Exception as error:  # its own terms: device, cuSPARSELt, shapes
        print(f"torch's own 2:4 product with {tokens} tokens was not timed: {type(error).__name__}: {error}")


def _products_of_vectors(device: torch.device, tokens: int, repeats: int) -> Iterator[Timing]:
    """Beside dense products of the same dtype; the rate is that of a dense product in the same time."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SIZE, SIZE, generator=generator).to(device)
    x = torch.randn(tokens, SIZE, generator=generator).to(device)
    work = 2 * SIZE * SIZE * tokens / 1e9, "TFLOP/s"
    for dtype in NAMES:
        calls = _dense_calls(x.to(dtype), weight.to(dtype))
        dense = _timed(f"{SIZE}^2", f"dense {NAMES[dtype]}, many tokens", calls, tokens, repeats, work)
        yield dense
        for n, m in SHARED:
            for vector in (32, 64, 128):
                packed = nm.pack(weight, n, m, vector=vector, dtype=dtype)
                calls = _packed_calls(x.to(dtype), packed)
                case = f"{packed.pattern} {SIZE}^2"
                yield _timed(case, f"vectors {NAMES[dtype]}", calls, tokens, repeats, work, dense)


def _gradients(device: torch.device, tokens: int, repeats: int) -> Iterator[Timing]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SIZE, SIZE, generator=generator).to(device)
    x, dy = (torch.randn(tokens, SIZE, generator=generator).to(device) for _ in range(2))
    work = 2 * SIZE * SIZE * tokens / 1e9, "TFLOP/s"  # of the dense product
    gradients: dict[str, tuple[Call, Callable[[nm.NMTensor], Tensor]]] = {
        "input gradient": (lambda: dy @ weight, partial(ops.input_gradient, dy)),
        "weight gradient": (lambda: dy.mT @ x, partial(ops.weight_gradient, dy, x)),
    }
    for name, (by_torch, ours) in gradients.items():
        dense = _timed(f"{SIZE}^2", f"{name}, dense float32", [by_torch] * 16, tokens, repeats, work)
        yield dense
        for n, m in ((2, 4), (2, 8), (1, 16)):
            packed = nm.pack(weight, n, m)
            yield _timed(f"{n}:{m} {SIZE}^2", name, [partial(ours, packed)] * 16, tokens, repeats, work, dense)


def _searches(device: torch.device, repeats: int) -> Iterator[Timing]:
    weight = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)).to(device)
    for n, m in (*PATTERNS, (16, 32), (32, 64)):
        case, work = f"{n}:{m} {SIZE}^2", _read(weight)
        topk = _timed(case, "mask by torch topk", [partial(_by_topk, weight, n, m)], 1, repeats, work)
        yield topk
        yield _timed(case, "mask", [partial(nm.mask, weight, n, m)] * 16, 1, repeats, work, topk)


def _by_topk(weight: Tensor, n: int, m: int) -> Tensor:
    groups = weight.abs().unflatten(-1, (-1, m))
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.topk(n, dim=-1).indices, True).flatten(-2)


def _dense_calls(x: Tensor, weight: Tensor) -> list[Call]:
    return _in_turns([partial(F.linear, x, weight.clone()) for _ in range(_copies(weight.nbytes))])


def _packed_calls(x: Tensor, packed: nm.NMTensor) -> list[Call]:
    def copy() -> nm.NMTensor:
        return replace(packed, values=packed.values.clone(), places=packed.places.clone())

    return _in_turns([partial(nm.linear, x, copy()) for _ in range(_copies(packed.nbytes))])


def _copies(nbytes: int) -> int:
    return -(-CACHE_BYTES // nbytes)


def _in_turns(calls: Sequence[Call]) -> list[Call]:
    """At least 16 calls: a graph should run for longer than it takes to launch."""
    return list(islice(cycle(calls), max(16, len(calls))))


def _read(weight: Tensor | nm.NMTensor) -> tuple[float, str]:
    return weight.nbytes / 1e6, "GB/s"  # over milliseconds


def _timed(
    case: str,
    call: str,
    calls: Sequence[Call],
    tokens: int,
    repeats: int,
    work: tuple[float, str],
    beside: Timing | None = None,
) -> Timing:
    low, median, high = quartiles(graph_times(calls, repeats))
    ratio, name = (beside.median_ms / median, beside.call) if beside else (None, "")
    return Timing("nm", case, call, tokens, median, low, high, work[0] / median, work[1], ratio, name)
