"""The notebook's pictures: axes in, axes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from common import plots
from papers.sparse_frontier.evaluation import Grid, curve
from papers.sparse_frontier.settings import Params

__all__ = ["LABELS", "errors_by_length", "iso_flop", "masks", "shares", "skill_curves"]

LABELS = {
    "dense": "dense",
    "vertical_slash": "Vertical-Slash",
    "flex_prefill": "FlexPrefill",
    "block": "Block-Sparse",
    "snapkv": "SnapKV",
    "ada_snapkv": "Ada-SnapKV",
    "quest": "Quest",
}
COLOR = {name: plots.COLORS[place] for place, name in enumerate([*list(LABELS)[1:], "dense"])}
MARKER = {name: plots.MARKERS[place] for place, name in enumerate([*list(LABELS)[1:], "dense"])}


def masks(axes: Sequence[Axes], found: Mapping[str, Tensor]) -> None:
    """What one head reads under each method: queries down, keys across."""
    for ax, (name, mask) in zip(axes, found.items(), strict=True):
        ax.imshow(mask, cmap="Greys", vmin=0, vmax=1.4)
        ax.set(title=LABELS[name], xticks=[], yticks=[])
        ax.grid(False)


def shares(
    ax: Axes, lengths: Sequence[int], by_model: Mapping[str, Sequence[float]], printed: Mapping[int, float]
) -> Axes:
    """Share of attention in a prefill against length, by model; crosses: as printed."""
    for color, line, (name, values) in zip(plots.COLORS, plots.LINES, by_model.items(), strict=False):
        ax.plot(lengths, values, color=color, linestyle=line, label=name)
    ax.plot(list(printed), list(printed.values()), "x", color="black", markersize=9, label="as printed")
    ax.set(xscale="log", xlabel="prompt, tokens", ylabel="share of attention", ylim=(0, 1))
    ax.set_xticks([2**n for n in range(12, 18)], [f"{2 ** (n - 10)}k" for n in range(12, 18)])
    ax.legend(fontsize="small")
    return ax


def skill_curves(ax: Axes, params: Params, grid: Grid, methods: Sequence[str], task: str, place: str) -> Axes:
    """Skill against realised sparsity, a line a method: mean and range over seeds; dotted: dense."""
    main = params.models[-1]
    for name in methods:
        rows = [sorted(curve(grid[main, task, place, seed], name).items()) for seed in params.seeds]
        x, y = (np.array([[point[part] for point in row] for row in rows]) for part in (0, 1))
        ax.plot(x.mean(0), y.mean(0), color=COLOR[name], marker=MARKER[name], label=LABELS[name])
        ax.fill_between(x.mean(0), y.min(0), y.max(0), color=COLOR[name], alpha=0.15, linewidth=0)
    dense = np.mean([grid[main, task, place, seed]["dense"] for seed in params.seeds])
    ax.axhline(dense, color="black", linestyle=":", linewidth=1)
    ax.set(title=task, xlabel="sparsity", xlim=(0, 1), ylim=(-0.1, 1.05))
    return ax


def iso_flop(ax: Axes, points: Sequence[tuple[str, str, float, float, float]], best: Sequence[int], unit: str) -> Axes:
    """Mean skill against cost: small open marks the smaller model, filled the larger; the line joins the front."""
    models = list(dict.fromkeys(point[0] for point in points))
    for model, name, _, cost, skill in points:
        larger = model == models[-1]
        fill = COLOR[name] if larger else "none"
        size = 7 if name == "dense" else 5
        ax.plot(cost, skill, MARKER[name], color=COLOR[name], markerfacecolor=fill, markersize=size)
    ax.plot([points[i][3] for i in best], [points[i][4] for i in best], color="grey", linewidth=1, zorder=0)
    for name in dict.fromkeys(point[1] for point in points):
        ax.plot([], [], MARKER[name], color=COLOR[name], label=LABELS[name])
    ax.plot([], [], "o", color="grey", markerfacecolor="none", label="open: the smaller model")
    ax.plot([], [], color="grey", linewidth=1, label="Pareto front")
    ax.set(xlabel=unit, ylabel="mean skill over tasks")
    ax.legend(fontsize="small")
    return ax


def errors_by_length(ax: Axes, lengths: Sequence[int], by_limit: Mapping[str, Sequence[Sequence[float]]]) -> Axes:
    """A quantity against length, a line a label, values [seeds][length]: mean and range over seeds."""
    for color, marker, (label, rows) in zip(plots.COLORS, plots.MARKERS, by_limit.items(), strict=False):
        table = np.array(rows)
        ax.plot(lengths, table.mean(0), color=color, marker=marker, label=label)
        ax.fill_between(lengths, table.min(0), table.max(0), color=color, alpha=0.15, linewidth=0)
    ax.set(xscale="log", xlabel="sequence, tokens")
    ax.set_xticks(lengths, [str(length) for length in lengths])
    ax.minorticks_off()
    ax.legend(fontsize="small")
    return ax
