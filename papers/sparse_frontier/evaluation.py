"""What the claims read: errors, tolerated sparsities, costs and fronts of the grid, and checks on random attention."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.attention.causal import sparse_forward
from papers.sparse_frontier import method
from papers.sparse_frontier.method import DECODE, PREFILL, Settings, Shape
from papers.sparse_frontier.settings import Params

__all__ = [
    "PLACES",
    "Key",
    "check_methods",
    "costs",
    "curve",
    "error",
    "front",
    "iso_cost_gain",
    "learned",
    "published",
    "summary",
]

PLACES = ("short", "middle", "long")  # the three lengths
ERRORS_AT = (0.5, 0.8, 0.9, 0.95)
TWENTIETH = 0.95  # the sparsity of a budget of 1/20, the paper's smallest
SHARES = {"16k": 2**14, "64k": 2**16, "128k": 2**17}
PRINTED_SHARES = {"16k": 0.40, "64k": 0.68, "128k": 0.80}
LEARNED = 0.5  # skill from which on a task counts as learned
TIMES = 5  # the sparsity in attention whose effect on all is printed

Key = tuple[str, str, str, int]  # model, task, place of PLACES, seed
Grid = Mapping[Key, dict[str, Any]]
Row = tuple[str, str, int, float]  # metric, variant, seed, value


def published() -> Iterator[tuple[str, str, float]]:
    """(metric, variant, value) of the cost model for Qwen2.5-7B: shares in percent, and what 5x sparsity gains."""
    for name, length in SHARES.items():
        share = method.attention_share(method.QWEN2_7B, length)
        yield "attention_share", name, 100 * share
        yield (
            "attention_share_without_logits",
            name,
            100 * method.attention_share(method.QWEN2_7B, length, logits=False),
        )
        yield "gain", name, method.speedup(share, TIMES)
        yield "gain_of_printed_share", name, method.speedup(PRINTED_SHARES[name], TIMES)


def check_methods(use: Settings, *, length: int = 96, answers: int = 8) -> Iterator[tuple[str, str, float]]:
    """(metric, variant, value) on a random attention: `all_kept_error`, the largest change of the output if a method
    keeps everything, and `read`, the share of the keys that it reads when asked for half."""
    model = _Attention()
    tokens = torch.arange(length + answers)[None]
    dense, _ = sparse_forward(model, tokens, None, prompt=length)
    for name in (*PREFILL, *DECODE):
        out, _ = sparse_forward(model, tokens, method.selector(name, 1.0, use), prompt=length)
        yield "all_kept_error", name, (out - dense).abs().max().item()
        chosen = method.selector(name, 0.5, use)
        yield "read", name, sparse_forward(model, tokens, chosen, prompt=length)[1].density(chosen.phase)


def curve(cell: Mapping[str, Any], name: str) -> dict[float, float]:
    """Skill by realised sparsity of one method, the dense model at 0."""
    return {0.0: cell["dense"]} | {sparsity: skill for _, sparsity, skill in cell["points"][name]}


def error(cell: Mapping[str, Any], name: str, sparsity: float) -> float:
    """Relative error at a realised sparsity, on straight lines between those measured."""
    return method.relative_error(cell["dense"], method.interpolated(curve(cell, name), sparsity))


def costs(params: Params, shape: Shape, phase: str, name: str, length: int, sparsity: float) -> float:
    """FLOPs of a prefill, or bytes of a decoding step, of a method (or `dense`) at a sparsity, indexing included."""
    use = params.of_methods("")
    if phase == "prefill":
        indexing = 0.0 if name == "dense" else method.prefill_indexing(name, shape, length, use)
        return method.prefill_flops(shape, length, 1 - sparsity, indexing=indexing)
    indexing = 0.0 if name == "dense" else method.decode_indexing(name, shape, length, use)
    return method.decode_bytes(shape, length, 1 - sparsity, batch=params.decode_batch, indexing=indexing)


def front(
    params: Params, grid: Grid, shapes: Mapping[str, Shape], phase: str, place: str, seed: int
) -> tuple[list[tuple[str, str, float, float, float]], list[int]]:
    """All points (model, method, sparsity, cost, mean skill over tasks) of a phase and length, and which are Pareto.

    Sparsity and cost of a point are means over the tasks, for what is read may differ by task.
    """
    length = params.lengths[PLACES.index(place)]
    points = []
    for model in params.models:
        cells = [grid[model, task, place, seed] for task in params.tasks]
        skill = _mean([cell["dense"] for cell in cells])
        points.append((model, "dense", 0.0, costs(params, shapes[model], phase, "dense", length, 0.0), skill))
        for name in params.prefill if phase == "prefill" else params.decode:
            for index in range(len(cells[0]["points"][name])):
                measured = [cell["points"][name][index] for cell in cells]
                sparsity, skill = (_mean([point[part] for point in measured]) for part in (1, 2))
                cost = costs(params, shapes[model], phase, name, length, sparsity)
                points.append((model, name, sparsity, cost, skill))
    return points, method.pareto([(cost, skill) for *_, cost, skill in points])


def learned(params: Params, grid: Grid) -> list[str]:
    """The tasks that the larger dense model can do, at every length and seed; of others sparsity says nothing."""
    main = params.models[-1]
    return [
        task
        for task in params.tasks
        if min(grid[main, task, place, seed]["dense"] for place in PLACES for seed in params.seeds) >= LEARNED
    ]


def summary(params: Params, grid: Grid, blocks: Grid, shapes: Mapping[str, Shape]) -> Iterator[Row]:
    """Every number that claims read, by seed. The grid has all models; blocks the larger one at the long length.

    Raises ValueError for tasks that the dense model cannot do: see `learned`.
    """
    main = params.models[-1]
    for seed in params.seeds:
        dense = {m: _mean([grid[m, t, "long", seed]["dense"] for t in params.tasks]) for m in params.models}
        yield "size_gain", "", seed, dense[main] - dense[params.models[0]]
        yield from _errors(params, grid, seed)
        yield from _tolerances(params, grid, seed)
        yield from _lengths(params, grid, seed)
        for size in map(str, params.blocks):
            cells = [blocks[main, task, "long", seed] for task in params.tasks]
            yield "error_by_block", size, seed, _mean([error(cell, size, 0.8) for cell in cells])
        for phase, name in (("prefill", "vertical_slash"), ("prefill", "block"), ("decode", "quest")):
            yield "iso_cost_gain", name, seed, iso_cost_gain(params, grid, shapes, phase, name, seed)
        for phase in ("prefill", "decode"):
            points, best = front(params, grid, shapes, phase, "long", seed)
            sparse = [points[place][1] != "dense" for place in best]
            yield "sparse_on_front", phase, seed, sum(sparse) / len(sparse)


def iso_cost_gain(params: Params, grid: Grid, shapes: Mapping[str, Shape], phase: str, name: str, seed: int) -> float:
    """Skill of the larger model made as cheap as the smaller dense one by a method, over the smaller one's, mean over
    tasks at the long length. -1 where the method cannot make it that cheap."""
    small, large, length = params.models[0], params.models[-1], params.lengths[-1]
    allowed = costs(params, shapes[small], phase, "dense", length, 0.0)
    gains = []
    for task in params.tasks:
        by_sparsity = curve(grid[large, task, "long", seed], name)
        by_cost = {costs(params, shapes[large], phase, name, length, s): skill for s, skill in by_sparsity.items()}
        if min(by_cost) > allowed:
            return -1.0
        gains.append(method.interpolated(by_cost, allowed) - grid[small, task, "long", seed]["dense"])
    return _mean(gains)


def _errors(params: Params, grid: Grid, seed: int) -> Iterator[Row]:
    for name in params.methods:
        for sparsity in ERRORS_AT:
            found = {task: error(grid[params.models[-1], task, "long", seed], name, sparsity) for task in params.tasks}
            for task, value in found.items():
                yield "error", f"{name}/{task}/{sparsity:g}", seed, value
            yield "error", f"{name}/mean/{sparsity:g}", seed, _mean(list(found.values()))
            others = [value for task, value in found.items() if not task.startswith("retrieve")]
            yield "error", f"{name}/others/{sparsity:g}", seed, _mean(others)


def _tolerances(params: Params, grid: Grid, seed: int) -> Iterator[Row]:
    """The sparsity that a task tolerates, up to the paper's largest: that of the better method of the phase."""
    for phase, names in (("prefill", params.prefill), ("decode", params.decode)):
        for task in params.tasks:
            cell = grid[params.models[-1], task, "long", seed]
            found = []
            for name in names:
                errors = {s: method.relative_error(cell["dense"], skill) for s, skill in curve(cell, name).items()}
                found.append(method.tolerated(errors, params.limit, TWENTIETH))
            yield "tolerated", f"{phase}/{task}", seed, max(found)


def _lengths(params: Params, grid: Grid, seed: int) -> Iterator[Row]:
    """The error at 1/20 of the budget, and the keys a query needs, by length; means over methods and tasks."""
    needed = []
    for place, length in zip(PLACES, params.lengths, strict=True):
        cells = [grid[params.models[-1], task, place, seed] for task in params.tasks]
        yield (
            "error_at_twentieth",
            place,
            seed,
            _mean([error(cell, name, TWENTIETH) for cell in cells for name in params.methods]),
        )
        spared = []
        for cell in cells:
            errors = {s: method.relative_error(cell["dense"], skill) for s, skill in curve(cell, "quest").items()}
            spared.append(method.tolerated(errors, params.limit, TWENTIETH))
        needed.append((1 - _mean(spared)) * length)
        yield "keys_needed", place, seed, needed[-1]
    growth = math.log(needed[-1] / needed[0]) / math.log(params.lengths[-1] / params.lengths[0])
    yield "budget_exponent", "", seed, growth


class _Attention(nn.Module):
    """One attention with four heads over random queries, keys and values; tokens only say how many."""

    def forward(self, tokens: Tensor) -> Tensor:
        draw = torch.Generator().manual_seed(0)
        query, key, value = (torch.randn(1, 4, tokens.shape[1], 16, generator=draw) for _ in range(3))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
