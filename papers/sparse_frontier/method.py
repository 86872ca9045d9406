"""The Sparse Frontier: sparse attention trade-offs in transformer LLMs (Nawrot et al., 2025, arXiv 2504.17768).

A benchmark, whose method is a comparison: six training-free ways to leave out attention, set up alike; what each costs,
searching for what to keep included; and the statistics that the conclusions rest on. Selectors: common.attention.

symbol   name here           meaning
L        length              tokens of the prompt, or in the cache
rho      density             share of the attention that is computed, or of the cache that is read; sparsity is 1 - rho
d, N     width, layers       of the model
h, n_kv  heads, key_heads    heads of queries, of keys and values
d_h      head                size of a head
B        batch               sequences decoded at once: they share the weights that are read, and have a cache each
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from common.attention.causal import Selector
from common.attention.decode import AdaSnapKV, Quest, SnapKV
from common.attention.prefill import BlockSparse, FlexPrefill, VerticalSlash

PREFILL = ("vertical_slash", "flex_prefill", "block")
DECODE = ("snapkv", "ada_snapkv", "quest")


# ---------------------------------------------------------------------------------------------------- the six methods


@dataclass(frozen=True)
class Settings:
    """The methods' settings; the values are those of the paper, for prompts of 16,384 tokens and more.

    window       last queries that lines, and SnapKV's keys, are judged by (512 for tasks of retrieval)
    first        keys that are always kept
    last_lines   nearest distances that are always kept, by methods of lines
    last_keys    keys at the prompt's end that SnapKV always keeps
    least        lines of each kind that FlexPrefill keeps at least
    block, page  keys of a block, and of Quest's pages
    pool         keys over which SnapKV pools scores
    floor        share of an even budget that Ada-SnapKV leaves each head
    """

    window: int = 256
    first: int = 4
    last_lines: int = 64
    last_keys: int = 128
    least: int = 512
    block: int = 16
    page: int = 16
    pool: int = 21
    floor: float = 0.2


def selector(name: str, strength: float, use: Settings) -> Selector:
    """A method at a strength: the share that it keeps, 1 - sparsity; for `flex_prefill` the coverage."""
    lines = {"window": use.window, "first": use.first, "last": use.last_lines}
    snap = {"window": use.window, "pool": use.pool, "first": use.first, "last": use.last_keys}
    made: dict[str, Callable[[], Selector]] = {
        "vertical_slash": lambda: VerticalSlash(keep=strength, **lines),
        "flex_prefill": lambda: FlexPrefill(coverage=strength, least=use.least, **lines),
        "block": lambda: BlockSparse(keep=strength, block=use.block),
        "snapkv": lambda: SnapKV(keep=strength, **snap),
        "ada_snapkv": lambda: AdaSnapKV(keep=strength, floor=use.floor, **snap),
        "quest": lambda: Quest(keep=strength, page=use.page),
    }
    return made[name]()


# ------------------------------------------------------------------------------------------------------ the cost model


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that its costs depend on; `gated`: a feed-forward of three matrices, not two."""

    width: int
    layers: int
    heads: int
    key_heads: int
    head: int
    hidden: int
    vocabulary: int
    gated: bool = True

    @property
    def projections(self) -> int:
        """Weights of a layer's query, key, value and output: d (2 d + 2 d_h n_kv), where h d_h = d."""
        return 2 * self.width * self.head * (self.heads + self.key_heads)

    @property
    def feed_forward(self) -> int:
        return (3 if self.gated else 2) * self.width * self.hidden

    @property
    def weights(self) -> int:
        """Weights that a decoding step reads: all but the embeddings, of which it reads one row."""
        return self.layers * (self.projections + self.feed_forward) + self.width * self.vocabulary


QWEN2_7B = Shape(width=3584, layers=28, heads=28, key_heads=4, head=128, hidden=18944, vocabulary=152064)
SHAPES = {
    "Qwen2.5-7B": QWEN2_7B,
    "Qwen2.5-14B": Shape(5120, 48, 40, 8, 128, 13824, 152064),
    "Qwen2.5-32B": Shape(5120, 64, 40, 8, 128, 27648, 152064),
    "Qwen2.5-72B": Shape(8192, 80, 64, 8, 128, 29568, 152064),
    "Llama-3.1-8B": Shape(4096, 32, 32, 8, 128, 14336, 128256),
    "Llama-3.1-70B": Shape(8192, 80, 64, 8, 128, 28672, 128256),
}


def attention_flops(shape: Shape, length: int, density: float = 1.0) -> float:
    """N rho (4 h L^2 d_h + 3 h L^2): scores, softmax and the mixing of values, as if no mask halved them."""
    return shape.layers * density * shape.heads * length**2 * (4 * shape.head + 3)


def prefill_flops(
    shape: Shape, length: int, density: float = 1.0, *, indexing: float = 0.0, logits: bool = True
) -> float:
    """FLOPs of a prefill: attention at a density, all linear layers, and what the search for what to keep took."""
    linear = 2 * length * shape.layers * (shape.projections + shape.feed_forward)
    head = 2 * length * shape.width * shape.vocabulary if logits else 0
    return linear + head + attention_flops(shape, length, density) + indexing


def attention_share(shape: Shape, length: int, *, logits: bool = True) -> float:
    """Share of dense attention in the FLOPs of a prefill."""
    return attention_flops(shape, length) / prefill_flops(shape, length, logits=logits)


def speedup(share: float, times: float) -> float:
    """Amdahl: how much faster all gets if the part of this share gets `times` faster."""
    return 1 / (1 - share + share / times)


def prefill_indexing(name: str, shape: Shape, length: int, use: Settings) -> float:
    """FLOPs of the search in all layers.

    Lines: attention of the last `window` queries, and a sum along both kinds of lines. Blocks: means, and scores of
    blocks.
    """
    if name == "block":
        blocks = length / use.block
        return shape.layers * shape.heads * (2 * length * shape.head + 2 * blocks**2 * shape.head)
    window = min(use.window, length)
    return shape.layers * shape.heads * window * length * (2 * shape.head + 3 + 2)


def decode_bytes(
    shape: Shape, length: int, density: float = 1.0, *, batch: int = 1, indexing: float = 0.0, size: int = 2
) -> float:
    """Bytes read in one decoding step of `batch` sequences: weights + B N 2 L d_h n_kv rho, `size` bytes a number."""
    cache = 2 * length * shape.head * shape.key_heads * shape.layers
    return size * (shape.weights + batch * (cache * density + indexing))


def decode_indexing(name: str, shape: Shape, length: int, use: Settings) -> float:
    """Numbers read to choose, a step and sequence: Quest's least and greatest keys of pages. SnapKV chose before."""
    if name != "quest":
        return 0.0
    return 2 * length / use.page * shape.head * shape.key_heads * shape.layers


# ---------------------------------------------------------------------------------------------------------- statistics


def relative_error(dense: float, sparse: float) -> float:
    """(dense - sparse) / dense; below 0 where sparse is better. Raises ValueError for a dense model at 0."""
    if dense <= 0:
        raise ValueError(f"relative_error: got {dense} for the dense model; expected one that can do the task")
    return (dense - sparse) / dense


def interpolated(points: Mapping[float, float], at: float) -> float:
    """The value at a place between measured ones {place: value}, on straight lines; beyond them the outermost value."""
    places = sorted(points)
    if at <= places[0]:
        return points[places[0]]
    for left, right in itertools.pairwise(places):
        if at <= right:
            part = (at - left) / (right - left)
            return (1 - part) * points[left] + part * points[right]
    return points[places[-1]]


def tolerated(errors: Mapping[float, float], limit: float, end: float = 1.0) -> float:
    """The largest sparsity up to which the error {sparsity: error} stays within `limit`, on straight lines between.

    At most `end`: of curves that never break, what differs is only where they were last measured.
    """
    places = sorted(errors)
    if errors[places[0]] > limit:
        return 0.0
    for left, right in itertools.pairwise(places):
        if errors[right] > limit:
            return min(end, left + (right - left) * (limit - errors[left]) / (errors[right] - errors[left]))
    return min(end, places[-1])


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points (cost, quality) no other one beats: places, by rising cost. Of equal points the first counts."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i))
    front: list[int] = []
    for place in order:
        if not front or points[place][1] > points[front[-1]][1]:
            front.append(place)
    return front
