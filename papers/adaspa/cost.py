"""What attention costs: exact counts for HunyuanVideo, and measured times of one head at any length."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F

from kernels import attention
from papers.adaspa import planted

__all__ = [
    "HUNYUAN",
    "attention_flops",
    "grid_of",
    "linear_flops",
    "measure",
    "ratios",
    "search_share",
    "share",
    "speedup",
]

# HunyuanVideo's transformer: width, blocks (20 of two streams, 40 of one), tokens of text, latent rows and columns of
# a 720p video after patching; 129 frames are 33 latent ones.
HUNYUAN = {"width": 3072, "blocks": 60, "text": 256, "rows": 45, "columns": 80}
STEPS = 50


def attention_flops(tokens: int) -> float:
    """Of one forward pass: q k and p v, 2 L^2 d multiply-adds each, in every block."""
    return 4 * tokens**2 * HUNYUAN["width"] * HUNYUAN["blocks"]


def linear_flops(tokens: int) -> float:
    """Of one forward pass: query, key, value, output and a feed-forward of four widths, 12 d^2 weights a token."""
    return 2 * 12 * HUNYUAN["width"] ** 2 * HUNYUAN["blocks"] * tokens


def share(tokens: int) -> float:
    """Of attention in all that is computed."""
    return attention_flops(tokens) / (attention_flops(tokens) + linear_flops(tokens))


def speedup(
    attention_share: float, costs: Mapping[str, float], search_steps: Sequence[int], *, cached: bool = True
) -> float:
    """Of a generation of 50 steps, by Amdahl's law, where all but attention takes the time it took.

    Args:
        attention_share: of attention in the time of a dense step.
        costs: `sparse`, `search` (with the dense attention it is fused with) and `scores` (with the choice), in units
            of a dense attention.
        search_steps: T_s.
        cached: whether later searches use the first one's LSE.
    """
    first, later = search_steps[0], len(search_steps) - 1
    again = costs["scores"] + costs["sparse"] if cached else costs["search"]
    total = first - 1 + costs["search"] + later * again + (STEPS - first - later) * costs["sparse"]
    return 1 / (1 - attention_share + attention_share * total / STEPS)


def search_share(attention_share: float, costs: Mapping[str, float], search_steps: Sequence[int]) -> float:
    """Time spent on searching alone, over that of a dense generation."""
    later = len(search_steps) - 1
    return attention_share * (costs["search"] - 1 + later * costs["scores"]) / STEPS


def grid_of(tokens: int) -> tuple[int, int, int]:
    """Frames, rows and columns of a video of at most so many tokens: HunyuanVideo's 33 x 45 x 80 made smaller alike."""
    scale = min(1.0, (tokens / (33 * 45 * 80)) ** (1 / 3))
    rows, columns = max(2, round(HUNYUAN["rows"] * scale)), max(2, round(HUNYUAN["columns"] * scale))
    return max(1, tokens // (rows * columns)), rows, columns


def measure(
    tokens: int, *, head_dim: int, keep_ratios: Sequence[float], block: int, rounds: int, seed: int = 0
) -> dict[str, Any]:
    """Seconds of one planted head: `dense` (torch), `search`, `scores` (with the choice), `sparse/<keep>`, each a list.

    Every round times each once, in turn, so that a ratio is of neighbours in time. Also `tokens`, and by keep ratio
    `found`, the share of the attention weight in the tiles kept, and their `density` with the text's.
    """
    text = min(HUNYUAN["text"], tokens // 8)
    grid = grid_of(tokens - text)
    heads = planted.planted(grid, text, head_dim=head_dim, kinds=("tiles",), seed=seed)
    query, key, value = heads.query, heads.key, heads.value
    length = query.shape[2]
    first = attention.search(query, key, value, block_size=block)
    sink = attention.text_blocks(length, length, heads.text, block_size=block)

    def search_again() -> attention.BlockMask:
        scores = attention.block_scores(query, key, first.lse, block_size=block)
        return attention.select_blocks(scores, keep_ratios[0], forced=sink)

    masks = {keep: attention.select_blocks(first.scores, keep, forced=sink) for keep in keep_ratios}
    for mask in masks.values():
        mask.lists()
    runs: dict[str, Callable[[], Any]] = {
        "dense": lambda: F.scaled_dot_product_attention(query, key, value),
        "search": lambda: attention.search(query, key, value, block_size=block),
        "scores": search_again,
    }
    for keep, mask in masks.items():
        runs[f"sparse/{keep:g}"] = lambda mask=mask: attention.block_sparse_attention(
            query, key, value, mask, block_size=block
        )
    if rounds > 1:  # the longest heads take minutes, and a warm-up moves nothing there
        for run in runs.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return {
        "tokens": length,
        "seconds": seconds,
        "found": {f"{keep:g}": attention.recall(first.scores, mask).item() for keep, mask in masks.items()},
        "density": {f"{keep:g}": mask.density().item() for keep, mask in masks.items()},
    }


def ratios(seconds: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    """For each round, each time over the dense one of that round."""
    rounds = [dict(zip(seconds, values, strict=True)) for values in zip(*seconds.values(), strict=True)]
    return [{name: own / row["dense"] for name, own in row.items() if name != "dense"} for row in rounds]
