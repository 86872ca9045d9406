"""The notebook's pictures: axes in, axes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from common import plots
from papers.rl_subnetworks.experiment import ARMS, Run

__all__ = ["accuracies", "bars", "by_matrix", "sweep"]


def accuracies(ax: Axes, runs: Mapping[str, Run], target: float) -> Axes:
    """Accuracy against steps of one seed, a line an arm; dotted: where trainings end."""
    looks = zip(plots.COLORS, plots.LINES, strict=False)
    for (label, run), (color, line) in zip(runs.items(), looks, strict=False):
        ax.plot(list(run.accuracy), list(run.accuracy.values()), color=color, linestyle=line, label=said(label))
    ax.axhline(target, color="black", linestyle=":", linewidth=1)
    ax.set(xlabel="optimizer step", ylabel="accuracy", ylim=(0, 1))
    ax.legend(fontsize="small")
    return ax


def sweep(ax: Axes, tolerances: Sequence[float], by_label: Mapping[str, Sequence[Sequence[float]]]) -> Axes:
    """Sparsity against the tolerance, [seeds, tolerances] of each arm; the paper's 1e-5 is dotted."""
    places = np.arange(len(tolerances))
    looks = zip(plots.COLORS, plots.MARKERS, plots.LINES, strict=False)
    for (label, rows), (color, marker, line) in zip(by_label.items(), looks, strict=False):
        table = np.array(rows)
        ax.plot(places, table.mean(0), color=color, marker=marker, linestyle=line, label=said(label))
        ax.fill_between(places, table.min(0), table.max(0), color=color, alpha=0.15, linewidth=0)
    ax.axvline(list(tolerances).index(1e-5), color="black", linestyle=":", linewidth=1)
    ax.set_xticks(places, ["exact", *(f"{tolerance:g}" for tolerance in tolerances[1:])])
    ax.set(xlabel="tolerance", ylabel="share of weights unchanged", ylim=(-0.02, 1.02))
    ax.legend(fontsize="small")
    return ax


def by_matrix(ax: Axes, rows: Mapping[str, Mapping[str, float]]) -> Axes:
    """Sparsity of every weight matrix, by arm."""
    names = list(next(iter(rows.values())))
    for (label, shares), color, marker in zip(rows.items(), plots.COLORS, plots.MARKERS, strict=False):
        ax.plot(np.arange(len(names)), [shares[name] for name in names], color=color, marker=marker, label=said(label))
    short = [name.removesuffix(".weight").replace("blocks.", "").replace("feed_forward", "ff") for name in names]
    ax.set_xticks(np.arange(len(names)), short, rotation=60, ha="right", fontsize="small")
    ax.set(ylabel="share of weights unchanged", ylim=(-0.02, 1.02))
    ax.legend(fontsize="small")
    return ax


def bars(ax: Axes, groups: Mapping[str, Mapping[str, Sequence[float]]], ylabel: str) -> Axes:
    """Groups of bars, each the mean of one value a seed, which are dots; the same names in every group."""
    names = list(next(iter(groups.values())))
    width = 0.8 / len(names)
    for place, (name, color) in enumerate(zip(names, plots.COLORS, strict=False)):
        for group, values in enumerate(groups.values()):
            at = group + (place - (len(names) - 1) / 2) * width
            ax.bar(at, np.mean(values[name]), 0.9 * width, color=color, label=name if group == 0 else None)
            ax.plot([at] * len(values[name]), values[name], ".", color="black", markersize=3)
    ax.set_xticks(range(len(groups)), list(groups))
    ax.set(ylabel=ylabel)
    if len(names) > 1:
        ax.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1))
    return ax


def said(label: str) -> str:
    """`rl/bfloat16` as words."""
    name, _, rest = label.partition("/")
    return f"{ARMS.get(name, name)}, {rest.replace('/', ', rate ')}" if rest else ARMS.get(name, name)
