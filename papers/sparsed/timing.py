"""Times of one attention under SparseD, for heads of 64 with random numbers in them.

dense      torch's attention
search     dense attention and the weights of all tiles, by the kernel that this house shares
select     the pattern from those weights
sparse     attention by the pattern
released   the pattern as the released code finds it, block of queries by block of queries, without an attention
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F

from common import seeds
from kernels import attention
from papers.sparsed import method
from papers.sparsed.method import RELEASED, SparseD
from papers.sparsed.settings import Params

__all__ = ["NAMES", "contenders", "generation_speedup", "seconds"]

NAMES = ("dense", "search", "select", "sparse", "released")
HEADS, DIM = 2, 64
ROUNDS = 3  # of a repeat; it reports their median
PROMPT = 0.75  # share of the sequence


@seeds.one_thread()
def seconds(params: Params, length: int) -> dict[str, list[float]]:
    """`params.repeats` medians of each by name. All take turns, so that what else the machine does meets all."""
    runs = contenders(length, params.timing_block, params.keep_ratio, params.device)
    for run in runs.values():
        run()  # warm
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(params.repeats):
        rounds = [{name: _seconds(run) for name, run in runs.items()} for _ in range(ROUNDS)]
        for name, medians in found.items():
            medians.append(statistics.median(taken[name] for taken in rounds))
    return found


def contenders(length: int, block: int, keep_ratio: float, device: str) -> dict[str, Callable[[], object]]:
    """What is timed; each can be called again and again."""
    draw = seeds.generator(0, "timing")
    query, key, value = (torch.randn(1, HEADS, length, DIM, generator=draw).to(device) for _ in range(3))
    way = SparseD(1, round(PROMPT * length), keep_ratio, block_size=block)
    scores = attention.search(query, key, value, block_size=block).scores
    pattern = way.select(scores)
    pattern.lists()
    return {
        "dense": partial(F.scaled_dot_product_attention, query, key, value),
        "search": partial(attention.search, query, key, value, block_size=block),
        "select": lambda: way.select(scores).lists(),
        "sparse": partial(attention.block_sparse_attention, query, key, value, pattern, block_size=block),
        "released": partial(
            method.by_query_blocks, query, key, way.prompt_blocks, keep_ratio, block_size=block, compat=RELEASED
        ),
    }


def generation_speedup(times: Mapping[str, float], steps: int, skip: float, *, released: bool) -> float:
    """Attention of a generation: all dense, over SparseD's with its one pattern, from the times of one attention."""
    last = method.dense_steps(steps, skip)
    found = times["dense"] + times["released"] if released else times["search"] + times["select"]
    mine = (last - 1) * times["dense"] + found + (steps - last) * times["sparse"]
    return steps * times["dense"] / mine


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - started
