"""The notebook's pictures: axes in, axes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from common import plots
from papers.sparsed.experiment import ARMS

__all__ = ["against_ratio", "arms_by_seed", "label", "learned", "pattern", "steps", "times"]


def label(arm: str) -> str:
    """An arm's name for readers."""
    return ARMS[arm].label


def learned(ax: Axes, losses: Mapping[str, Sequence[float]], width: int = 20) -> Axes:
    """Training losses by model, a running mean over `width` steps."""
    for color, line, (name, row) in zip(plots.COLORS, plots.LINES, losses.items(), strict=False):
        size = min(width, len(row))
        ax.plot(np.arange(size, len(row) + 1), np.convolve(row, np.ones(size) / size, "valid"), color=color,
                linestyle=line, label=name)  # fmt: skip
    ax.set(xlabel="step", ylabel="loss, nats a masked token")
    ax.legend()
    return ax


def pattern(ax: Axes, weights: Tensor, kept: Tensor, prompt: int) -> Axes:
    """Weights in tiles [n, n], each row summing to 1; kept tiles are framed, a line ends the prompt's key blocks."""
    ax.imshow(weights.sqrt().numpy(), cmap="Blues", vmin=0, vmax=1)
    for row, column in kept.nonzero().tolist():
        ax.add_patch(_frame(row, column))
    ax.axvline(prompt - 0.5, color=plots.COLORS[2], linewidth=1.5)
    ax.set(xlabel="key block", ylabel="query block")
    ax.grid(visible=False)
    return ax


def arms_by_seed(ax: Axes, found: Mapping[str, Sequence[float]], unit: str) -> Axes:
    """A dot a seed, an arm a row, and a bar at each mean."""
    for place, values in enumerate(found.values()):
        color = plots.COLORS[place % len(plots.COLORS)]
        ax.plot(values, [place] * len(values), "o", color=color, alpha=0.7)
        ax.plot([np.mean(values)] * 2, [place - 0.3, place + 0.3], color=color)
    ax.set_yticks(range(len(found)), [label(arm) for arm in found])
    ax.set(xlabel=unit, ylim=(len(found) - 0.5, -0.5))  # axes may share it, and inverting twice would be once too often
    return ax


def against_ratio(ax: Axes, found: Mapping[str, Mapping[float, Sequence[float]]], dense: float, unit: str) -> Axes:
    """Mean over seeds against rho, the seeds as dots; dotted: dense attention."""
    for index, (name, rows) in enumerate(found.items()):
        ratios = sorted(rows)
        color = plots.COLORS[index % 7]
        ax.plot(ratios, [np.mean(rows[ratio]) for ratio in ratios], color=color, linestyle=plots.LINES[index % 7],
                marker=plots.MARKERS[index % 7], label=name)  # fmt: skip
        for ratio in ratios:
            ax.plot([ratio] * len(rows[ratio]), rows[ratio], ".", color=color, alpha=0.5)
    ax.axhline(dense, color="grey", linestyle=":", label="dense")
    ax.set(xlabel="share of key blocks kept, ρ", ylabel=unit)
    ax.legend()
    return ax


def steps(ax: Axes, rows: Mapping[str, Sequence[Sequence[float]]], unit: str) -> Axes:
    """A value a denoising step: thick the mean over seeds, thin each seed."""
    for color, line, (name, values) in zip(plots.COLORS, plots.LINES, rows.items(), strict=False):
        table = np.array(values)
        at = np.arange(1, table.shape[1] + 1)
        ax.plot(at, table.T, color=color, alpha=0.25, linewidth=0.8)
        ax.plot(at, table.mean(0), color=color, linestyle=line, label=name)
    ax.set(xlabel="denoising step", ylabel=unit)
    ax.legend()
    return ax


def times(ax: Axes, lengths: Sequence[int], found: Mapping[str, Sequence[float]]) -> Axes:
    """Seconds of one attention by length, over the dense one's."""
    for index, (name, seconds) in enumerate(found.items()):
        share = np.array(seconds) / np.array(found["dense"])
        ax.plot(lengths, share, color=plots.COLORS[index % 7], linestyle=plots.LINES[index % 7],
                marker=plots.MARKERS[index % 7], label=name)  # fmt: skip
    ax.set(xlabel="tokens", ylabel="time over that of dense attention", xscale="log", yscale="log")
    ax.set_xticks(lengths, [f"{length:,}" for length in lengths])
    ax.minorticks_off()
    ax.yaxis.set_major_formatter("{x:g}")
    ax.legend()
    return ax


def _frame(row: int, column: int):
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=plots.COLORS[1], linewidth=1)
