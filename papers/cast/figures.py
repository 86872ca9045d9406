"""The notebook's pictures: axes in, axes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from common import plots
from papers.cast import evaluation
from papers.cast.experiment import ARMS

__all__ = ["arms_by_seed", "descents", "gaps", "label", "patterns", "remaining", "sizes", "smoothed_losses"]

SMOOTH = 25  # steps
WIDE = 3.0  # greatest over least value from which on an axis is logarithmic


def label(arm: str) -> str:
    """An arm's name for readers."""
    return ARMS[arm].label


def descents(ax: Axes, paths: Mapping[str, tuple[list[float], float]]) -> Axes:
    """Mean magnitude of pruned weights over the steps, by schedule; dotted: the peak learning rate."""
    for color, line, (name, (path, rate)) in zip(plots.COLORS, plots.LINES, paths.items(), strict=False):
        ax.plot(path, color=color, linestyle=line, label=f"{name} learning rate")
        ax.axhline(rate, color=color, linestyle=":", linewidth=1)
    ax.set(yscale="log", xlabel="step", ylabel="mean |θ| of the pruned half")
    ax.legend()
    return ax


def smoothed_losses(ax: Axes, runs: Mapping[str, Sequence[Sequence[float]]]) -> Axes:
    """Training loss by arm: thick the mean over seeds, thin each seed, over a running window."""
    for color, line, (arm, losses) in zip(plots.COLORS, plots.LINES, runs.items(), strict=False):
        width = min(SMOOTH, len(losses[0]))
        curves = np.array([np.convolve(row, np.ones(width) / width, "valid") for row in losses])
        steps = np.arange(width - 1, len(losses[0]))
        ax.plot(steps, curves.T, color=color, alpha=0.25, linewidth=0.8)
        ax.plot(steps, curves.mean(0), color=color, linestyle=line, label=label(arm))
    ax.set(xlabel="step", ylabel="training loss, nats a token")
    ax.legend()
    return ax


def remaining(ax: Axes, runs: Mapping[str, Sequence[Sequence[tuple[int, float]]]]) -> Axes:
    """Magnitude of what pruning would cut over that of what it would keep, along the training; a line a seed."""
    for color, line, (arm, rows) in zip(plots.COLORS, plots.LINES, runs.items(), strict=False):
        for number, row in enumerate(rows):
            steps, values = zip(*row, strict=True)
            shown = {"label": label(arm)} if number == 0 else {}
            ax.plot(steps, values, color=color, linestyle=line, **shown)
    ax.set(yscale="log", xlabel="step", ylabel="|pruned| / |kept|")
    ax.legend()
    return ax


def sizes(ax: Axes, counts: Mapping[int, Sequence[int]], at: Sequence[int]) -> Axes:
    """The distribution of the weights' magnitudes at some steps."""
    for color, line, step in zip(plots.COLORS, plots.LINES, at, strict=False):
        centres, share = evaluation.shares_of_sizes(counts[step])
        ax.plot(centres, share, color=color, linestyle=line, label=f"step {step}")
    ax.set(xlabel="log10 |θ|", ylabel="share of the weights")
    ax.legend()
    return ax


def arms_by_seed(ax: Axes, found: Mapping[str, Sequence[float]], unit: str) -> Axes:
    """A dot a seed, an arm a row, and a bar at each mean; on a logarithmic axis where the range is wide."""
    for place, values in enumerate(found.values()):
        color = plots.COLORS[place % len(plots.COLORS)]
        ax.plot(values, [place] * len(values), "o", color=color, alpha=0.7)
        ax.plot([np.mean(values)] * 2, [place - 0.3, place + 0.3], color=color)
    ax.set_yticks(range(len(found)), [label(arm) if arm in ARMS else arm for arm in found])
    ax.invert_yaxis()
    ax.set(xlabel=unit)
    everything = [value for values in found.values() for value in values]
    if min(everything) > 0 and max(everything) > WIDE * min(everything):
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("{x:g}" if max(everything) < 10 * min(everything) else "")
    return ax


def patterns(ax: Axes, names: Sequence[str], found: Mapping[str, Mapping[str, Sequence[float]]]) -> Axes:
    """Perplexity of each arm at each pattern, mean and 95 % interval."""
    for index, (arm, by_pattern) in enumerate(found.items()):
        interval = [_interval(by_pattern[name]) for name in names]
        mean, low, high = (np.array(part) for part in zip(*interval, strict=True))
        at = np.arange(len(names)) + 0.06 * (index - (len(found) - 1) / 2)
        look: dict[str, Any] = {"color": plots.COLORS[index % 7], "marker": plots.MARKERS[index % 7], "linestyle": ""}
        ax.errorbar(at, mean, yerr=[mean - low, high - mean], capsize=3, label=label(arm), **look)
    ax.set_xticks(range(len(names)), names)
    ax.set(ylabel="perplexity", yscale="log")
    ax.legend()
    return ax


def gaps(ax: Axes, tokens: Sequence[float], rows: Sequence[Sequence[float]]) -> Axes:
    """Gap to the dense model against training tokens: thin the seeds, thick their mean, dashed the power law through
    the mean's ends. The axes are logarithmic, on which that is a straight line, unless a gap is not above zero."""
    for row in rows:
        ax.plot(tokens, row, color=plots.COLORS[0], alpha=0.4, linewidth=0.8, marker="o")
    mean = np.mean(rows, axis=0)
    ax.plot(tokens, mean, color=plots.COLORS[0], marker="o", label="CAST, mean of the seeds")
    if min(mean[0], mean[-1]) > 0:  # else no power law goes through them
        at = np.geomspace(tokens[0], tokens[-1], 50)
        power = np.log(mean[-1] / mean[0]) / np.log(tokens[-1] / tokens[0])
        law = mean[0] * (at / tokens[0]) ** power
        ax.plot(at, law, color=plots.COLORS[1], linestyle="--", label="power law through the ends")
    if (np.array(rows) > 0).all():
        ax.set(xscale="log", yscale="log")
    else:
        ax.axhline(0, color="black", linewidth=1)
    ax.set(xlabel="training tokens", ylabel="perplexity above the dense model's")
    ax.legend()
    return ax


def _interval(values: Sequence[float]) -> tuple[float, float, float]:
    from common import stats

    found = stats.interval(values)
    finite = len(values) > 1
    return found.mean, found.low if finite else found.mean, found.high if finite else found.mean
