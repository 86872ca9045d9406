"""The notebook's pictures: axes in, axes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from common import plots
from papers.lora_limits.data import REGIMES

__all__ = ["against_degree", "against_length", "norms_of_heads"]

MEANING = {
    "constant": "constant norm",
    "below": "below: (log L)$^{1/4}$",
    "at": "at: (log L)$^{1/2}$",
    "above": "above: log L",
}


def against_degree(
    ax: Axes, degrees: Sequence[int], by_norm: Mapping[float, Sequence[Sequence[float]]], accuracy: float
) -> Axes:
    """Error against the degree, a line a norm: [seeds, degrees] values each; dotted: the accuracy asked for."""
    for (norm, rows), color, marker in zip(by_norm.items(), plots.COLORS, plots.MARKERS, strict=False):
        table = np.maximum(np.array(rows), 1e-16)
        ax.plot(degrees, np.median(table, axis=0), color=color, marker=marker, label=f"norm {norm:g}")
        ax.fill_between(degrees, table.min(0), table.max(0), color=color, alpha=0.15, linewidth=0)
    ax.axhline(accuracy, color="black", linestyle=":", linewidth=1)
    ax.set(yscale="log", xlabel="degree of the polynomial", ylabel="relative error of the gradient")
    ax.legend()
    return ax


def against_length(ax: Axes, lengths: Sequence[int], by_regime: Mapping[str, Sequence[Sequence[int]]]) -> Axes:
    """The rank that is needed against the length, a line a regime of the norm; dotted: as large as the length."""
    looks = zip(plots.COLORS, plots.MARKERS, plots.LINES, strict=False)
    for regime, (color, marker, line) in zip(REGIMES, looks, strict=False):
        table = np.array(by_regime[regime])
        ax.plot(lengths, table.mean(0), color=color, marker=marker, linestyle=line, label=MEANING[regime])
    ax.plot(lengths, lengths, color="black", linestyle=":", linewidth=1, label="rank = length")
    ax.set(xscale="log", yscale="log", xlabel="length L", ylabel="rank that is needed")
    ax.set_xticks(lengths, [str(length) for length in lengths])
    ax.minorticks_off()
    return ax


def norms_of_heads(ax: Axes, found: Sequence[Mapping[str, Any]], threshold: float) -> Axes:
    """Largest entries of queries and keys of every head, a colour a seed; dotted: the threshold."""
    for row, color, marker in zip(found, plots.COLORS, plots.MARKERS, strict=False):
        ax.plot(np.arange(1, len(row["norm"]) + 1), row["norm"], color=color, marker=marker, linestyle="")
    ax.axhline(threshold, color="black", linestyle=":", label=r"$\sqrt{\log L}$")
    count = max(len(row["norm"]) for row in found)
    ax.set(xlabel="head, layer by layer", ylabel="largest entry of Q and K", ylim=(0, None), xlim=(0.5, count + 0.5))
    ax.set_xticks(range(1, count + 1, -(-count // 12)))
    ax.legend()
    return ax
