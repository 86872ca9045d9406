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
    """Step by step: beta of the mask flows; the density of the structure flows; the length of their groups."""
    import matplotlib.pyplot as plt

    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.2))
    at = range(steps)
    for arm in ("linear", "exponential"):
        left.plot(at, [recipes[arm].rule(s, n, m).beta for s in at], label=LABELS[arm], **look(arm))
    for arm in ("stepwise", "stepwise_released", "geometric"):
        rules = [recipes[arm].rule(s, n, m) for s in at]
        middle.step(at, [rule.n / rule.m for rule in rules], where="post", label=LABELS[arm], **look(arm))
        right.step(at, [rule.m for rule in rules], where="post", **look(arm))
    left.set(xlabel="step", ylabel="β: what a pruned weight counts", title="mask decay")
    middle.set(xlabel="step", ylabel="share of weights kept", ylim=(0, 1.02), title="structure decay")
    right.set(xlabel="step", ylabel="weights in a group", yscale="log", title="structure decay: blocks")
    right.set_yticks([m, 2 * m, 4 * m, 8 * m], [m, 2 * m, 4 * m, 8 * m])
    right.minorticks_off()
    left.legend(fontsize="small"), middle.legend(fontsize="small")
    return fig


def against_sparsity(
    ax: Axes,
    values: Mapping[tuple[str, str], Sequence[float]],
    patterns: Sequence[str],
    arms: Sequence[str],
    *,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> Axes:
    """A line an arm over the patterns: mean and 95 % band over seeds, cut at `bounds`; values by (arm, pattern)."""
    ordered = sorted(patterns, key=lambda text: pattern_of(text)[0] / pattern_of(text)[1], reverse=True)
    places = np.arange(len(ordered))
    for arm in arms:
        found = [stats.interval(values[arm, pattern]) for pattern in ordered]
        ax.plot(places, [i.mean for i in found], marker="o", label=LABELS[arm], **look(arm))
        low, high = np.clip([i.low for i in found], *bounds), np.clip([i.high for i in found], *bounds)
        if np.isfinite(low).all():  # a single seed has no band
            ax.fill_between(places, low, high, color=look(arm)["color"], alpha=0.15, linewidth=0)
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
        face = "white" if index >= 7 else plots.COLORS[index]  # more arms than colours
        mark = {"marker": plots.MARKERS[index % 7], "color": plots.COLORS[index % 7], "markerfacecolor": face}
        ax.errorbar([share], [found.mean], yerr=bars, capsize=3, linestyle="", label=LABELS[arm], **mark)
    ax.set(xlabel="products of the training, over dense")
    ax.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.02, 0.5))
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
