"""What the notebook draws: the schedules, accuracy against sparsity and against products, and noise over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from common import plots, stats
from common.sparsity import Recipe
from papers.progressive_gradient_flow.experiment import LABELS, pattern_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ORDER = list(LABELS)  # an arm keeps its colour in every figure


def look(arm: str) -> dict:
    """Colour and line of an arm."""
    index = ORDER.index(arm)
    return {"color": plots.COLORS[index % 7], "linestyle": plots.LINES[index % 7]}


def schedules(recipes: Mapping[str, Recipe], n: int, m: int, steps: int) -> Figure:
    """How much of the weights takes part in each step: beta of the mask flows, the density of the structure flows."""
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4))
    at = np.arange(steps)
    for arm in ("linear", "exponential"):
        left.plot(at, [recipes[arm].rule(s, n, m).beta for s in at], label=LABELS[arm], **look(arm))
    for arm in ("stepwise", "stepwise_released"):
        right.step(at, [recipes[arm].rule(s, n, m).n / m for s in at], where="post", label=LABELS[arm], **look(arm))
    blocks = [recipes["geometric"].rule(s, n, m).m / m for s in at]
    right.plot(at, np.full(steps, n / m), label=LABELS["geometric"], **look("geometric"))
    for start in [0, *(np.flatnonzero(np.diff(blocks)) + 1)]:
        k = int(blocks[start])
        right.annotate(f"{k * n}:{k * m}", (start, n / m), (start, n / m + 0.06), fontsize="x-small")
    left.set(xlabel="step", ylabel="β: what a pruned weight counts", title="mask decay")
    right.set(xlabel="step", ylabel="share of weights kept", ylim=(0, 1.02), title="structure decay")
    left.legend(), right.legend()
    return fig


def against_sparsity(
    ax: Axes, scores: Mapping[tuple[str, str], Sequence[float]], patterns: Sequence[str], arms: Sequence[str]
) -> Axes:
    """A line an arm over the patterns, mean over seeds with its 95 % band; scores by (arm, pattern)."""
    ordered = sorted(patterns, key=lambda text: pattern_of(text)[0] / pattern_of(text)[1], reverse=True)
    places = np.arange(len(ordered))
    for arm in arms:
        found = [stats.interval(scores[arm, pattern]) for pattern in ordered]
        ax.plot(places, [i.mean for i in found], marker="o", label=LABELS[arm], **look(arm))
        if all(i.n > 1 for i in found):
            ax.fill_between(
                places,
                [i.low for i in found],
                [i.high for i in found],
                color=look(arm)["color"],
                alpha=0.15,
                linewidth=0,
            )
    dense = stats.interval(next(values for (arm, _), values in scores.items() if arm == "dense"))
    ax.axhline(dense.mean, label="dense", **look("dense"))
    if dense.n > 1:
        ax.axhspan(dense.low, dense.high, color=look("dense")["color"], alpha=0.12, linewidth=0)
    ax.set_xticks(places, ordered)
    ax.set(xlabel="n:m of the feed-forward layers")
    ax.legend(fontsize="small")
    return ax


def against_products(ax: Axes, points: Mapping[str, tuple[float, Sequence[float]]]) -> Axes:
    """A point an arm: (products of its training over those of dense, score of each seed), with 95 % bars."""
    for arm, (share, values) in points.items():
        found = stats.interval(values)
        bars = [[found.mean - found.low], [found.high - found.mean]] if found.n > 1 else None
        index = ORDER.index(arm)
        color, marker = plots.COLORS[index % 7], plots.MARKERS[index % 7]
        ax.errorbar(
            [share], [found.mean], yerr=bars, marker=marker, color=color, capsize=3, linestyle="", label=LABELS[arm]
        )
    ax.set(xlabel="products of the training, over dense")
    ax.legend(fontsize="x-small", ncols=2)
    return ax


def over_time(
    ax: Axes, curves: Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]], *, first: float = 0.0
) -> Axes:
    """{arm: (steps, values of each seed)} as means with 95 % bands, from the step `first` on."""
    for arm, (steps, rows) in curves.items():
        at, table = np.asarray(steps, dtype=float), np.asarray(rows, dtype=float)
        shown = (at >= first) & np.isfinite(table).all(axis=0)
        at, table = at[shown], table[:, shown]
        ax.plot(at, table.mean(axis=0), label=LABELS[arm], **look(arm))
        if len(table) > 1:
            bands = [stats.interval(column) for column in table.T]
            low, high = [i.low for i in bands], [i.high for i in bands]
            ax.fill_between(
                at, np.maximum(low, table.min(axis=0) / 2), high, color=look(arm)["color"], alpha=0.15, lw=0
            )
    ax.set(xlabel="step")
    ax.legend(fontsize="small")
    return ax
