"""What the notebook draws: accuracy against cost, counted work, times of kernels, fidelity by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from common import plots, stats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from common.sparsity import Passes

Rows = Mapping[str, Sequence[float]]  # by name: the value of each seed
LABELS = {
    "sr_ste": "SR-STE",
    "bdwp": "BDWP",
    "bdwp_ste": "BDWP without the pull",
    "bi_mask": "Bi-Mask",
    "transposable": "transposable",
}
PASSES = {"forward": "forward", "input_gradient": "input gradient", "weight_gradient": "weight gradient"}


def accuracy(ax: Axes, top1: Rows, cost: Mapping[str, float]) -> Axes:
    """Top-1 against the work of training (share of dense), with 95 % intervals over seeds; `dense` as a band.

    Arms of one cost stand side by side, so that their bars do not hide one another.
    """
    recipes = [recipe for recipe in LABELS if any(name.startswith(f"{recipe}/") for name in top1)]
    for index, recipe in enumerate(recipes):
        names = sorted((name for name in top1 if name.startswith(f"{recipe}/")), key=lambda name: cost[name])
        at = [cost[name] + 0.006 * (index - (len(recipes) - 1) / 2) for name in names]
        whiskers(ax, at, [top1[name] for name in names], LABELS[recipe], index)
        for x, name in zip(at, names, strict=True):
            mean = sum(top1[name]) / len(top1[name])
            ax.annotate(name.split("/")[1], (x, mean), (4, 4), textcoords="offset points", fontsize="x-small")
    dense = stats.interval(top1["dense"])
    ax.axhline(dense.mean, color="black", linewidth=1, label="dense (cost 1)")
    if dense.n > 1:
        ax.axhspan(dense.low, dense.high, color="black", alpha=0.1, linewidth=0)
    ax.set(xlabel="multiply-accumulates of training, share of dense", ylabel="top-1 on the test images, %")
    ax.legend(fontsize="small")
    return ax


def whiskers(ax: Axes, at: Sequence[float], rows: Sequence[Sequence[float]], label: str, index: int) -> None:
    """Means over seeds with their 95 % intervals, not joined."""
    found = [stats.interval(row) for row in rows]
    spans = [(i.mean - i.low, i.high - i.mean) if i.n > 1 else (0.0, 0.0) for i in found]  # one seed has no interval
    below, above = zip(*spans, strict=True)
    color, marker = plots.COLORS[index % 7], plots.MARKERS[index % 7]
    means = [i.mean for i in found]
    ax.errorbar(at, means, yerr=[below, above], label=label, capsize=3, color=color, marker=marker, linestyle="none")


def differences(ax: Axes, pairs: Mapping[str, Sequence[float]]) -> Axes:
    """Paired differences, a dot a seed, and their 95 % interval beside it."""
    for place, row in enumerate(pairs.values()):
        ax.plot(row, [place] * len(row), "o", color=plots.COLORS[place % 7], alpha=0.5, markersize=4)
        found = stats.interval(row)
        if found.n > 1:
            ax.plot([found.low, found.high], [place + 0.25] * 2, color="black", linewidth=2)
        ax.plot(found.mean, place + 0.25, "|", color="black", markersize=10)
    ax.axvline(0, color="black", linewidth=1)
    ax.set_yticks(range(len(pairs)), list(pairs))
    ax.invert_yaxis()
    ax.set(xlabel="difference in top-1, points")
    return ax


def work(ax: Axes, columns: Mapping[str, Passes]) -> Axes:
    """Stacked bars: what each pass takes, as a share of a dense step, for `columns` {label: shares}."""
    bottom = [0.0] * len(columns)
    for index, (name, label) in enumerate(PASSES.items()):
        heights = [getattr(passes, name) for passes in columns.values()]
        ax.bar(range(len(columns)), heights, bottom=bottom, label=label, color=plots.COLORS[index], width=0.7)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    for place, total in enumerate(bottom):
        ax.annotate(f"{total:.3f}", (place, total), (0, 2), textcoords="offset points", ha="center", fontsize="small")
    ax.set_xticks(range(len(columns)), list(columns), fontsize="small")
    ax.set(ylabel="multiply-accumulates, share of dense", ylim=(0, 1.12))
    ax.legend(fontsize="small", ncols=3, loc="upper right")
    return ax


def times(ax: Axes, ratios: Mapping[str, Rows], ideal: Mapping[str, Sequence[float]]) -> Axes:
    """Grouped bars of dense time over ours: `ratios` {series: {group: repeats}}; dotted: `ideal`."""
    groups = list(next(iter(ratios.values())))
    width = 0.8 / len(ratios)
    for index, (label, row) in enumerate(ratios.items()):
        at = [place + width * (index - (len(ratios) - 1) / 2) for place in range(len(groups))]
        found = [stats.interval(row[group]) for group in groups]
        spans = [(i.mean - i.low, i.high - i.mean) if i.n > 1 else (0.0, 0.0) for i in found]
        below, above = zip(*spans, strict=True)
        ax.bar(at, [i.mean for i in found], width, label=label, color=plots.COLORS[index % 7])
        ax.errorbar(at, [i.mean for i in found], yerr=[below, above], color="black", linestyle="none", capsize=2)
        low, high = [place - width / 2 for place in at], [place + width / 2 for place in at]
        ax.hlines(ideal[label], low, high, color="black", linestyle=":", linewidth=1.5)
    ax.axhline(1, color="black", linewidth=1)
    ax.set_xticks(range(len(groups)), groups, fontsize="small")
    ax.set(ylabel="dense time / ours", ylim=(0, None))
    ax.legend(fontsize="small")
    return ax
