"""Times of one linear layer's training step by the packed kernels of this house, against dense products.

A weight of size x size and a number of tokens, float32, one thread. What is timed, by name:

    dense/forward, dense/input, dense/weight      torch's three products
    2:8/forward       the packed forward view:    y = W_FF x
    2:8/input         the packed backward view, transposed, so that it is a forward-type product:  dx = W_BP^T dy
    2:8/scattered     the same product by a weight that is packed for the forward pass, as SR-STE's is
    2:8/generation    both masks, and both views packed
    dense/step        the three dense products
    2:8/step          packed forward, packed input gradient, dense weight gradient
    2:8/step_generated   the same, and the generation of both views
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from common import seeds
from kernels import nm
from kernels.nm import ops
from papers.bdwp.settings import parse, parse_layer

ROUNDS = 5  # of a repeat; it reports their median


@seeds.one_thread()
def seconds(layer: str, patterns: Sequence[str], repeats: int) -> dict[str, list[float]]:
    """`repeats` medians of each by name. All take turns, so that what else the machine does meets all of them."""
    runs = contenders(layer, patterns)
    for run in runs.values():
        run()  # warm
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        rounds = [{name: _seconds(run) for name, run in runs.items()} for _ in range(ROUNDS)]
        for name, medians in found.items():
            medians.append(statistics.median(taken[name] for taken in rounds))
    return found


def contenders(layer: str, patterns: Sequence[str]) -> dict[str, Callable[[], object]]:
    """What is timed; each can be called again and again."""
    size, tokens = parse_layer(layer)
    draw = seeds.generator(0, "timing")
    weight = torch.randn(size, size, generator=draw)
    x, dy = (torch.randn(tokens, size, generator=draw) for _ in range(2))

    def dense_step() -> tuple[Tensor, ...]:
        return F.linear(x, weight), dy @ weight, dy.T @ x

    runs: dict[str, Callable[[], object]] = {
        "dense/forward": lambda: F.linear(x, weight),
        "dense/input": lambda: dy @ weight,
        "dense/weight": lambda: dy.T @ x,
        "dense/step": dense_step,
    }
    for pattern in patterns:
        n, m = parse(pattern)
        packed = pre_generate(weight, n, m)
        passes = _sparse_runs(weight, x, dy, packed, n, m)
        runs |= {f"{pattern}/{name}": run for name, run in passes.items()}
    return runs


def pre_generate(weight: Tensor, n: int, m: int) -> tuple[nm.NMTensor, nm.NMTensor]:
    """Both views of a weight [O, I] as the kernels take them: W_FF [O, I], and the transpose of W_BP [I, O]."""
    return nm.pack(weight, n, m), nm.pack(weight.T.contiguous(), n, m)


def _sparse_runs(
    weight: Tensor, x: Tensor, dy: Tensor, packed: tuple[nm.NMTensor, nm.NMTensor], n: int, m: int
) -> dict[str, Callable[[], object]]:
    forward, backward = packed

    def step(views: tuple[nm.NMTensor, nm.NMTensor]) -> tuple[Tensor, ...]:
        return nm.linear(x, views[0], dense=False), nm.linear(dy, views[1], dense=False), dy.T @ x

    return {
        "forward": lambda: nm.linear(x, forward, dense=False),
        "input": lambda: nm.linear(dy, backward, dense=False),
        "scattered": lambda: ops.input_gradient(dy, forward),
        "generation": lambda: pre_generate(weight, n, m),
        "step": lambda: step(packed),
        "step_generated": lambda: step(pre_generate(weight, n, m)),
    }


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
