"""Accuracy against sparsity, and what a decay changes: what the notebook draws with intervals over seeds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from common import plots, stats
from papers.sr_ste.settings import parse

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Mapping[str, Sequence[float]]  # by arm: the value of each seed


def accuracy(ax: Axes, top1: Rows, kinds: Mapping[str, str], apart: Collection[str]) -> Axes:
    """Top-1 against the share of weights kept in the sparse layers; one series for each of `kinds` {prefix of the arms:
    label}, its patterns joined where they have the same n, but for those arms that stand `apart` with more layers left
    dense, marked by a star; and the dense network as a band."""
    for index, (prefix, label) in enumerate(kinds.items()):
        found = {name.split("/")[1]: row for name, row in top1.items() if name.split("/")[0] == prefix}
        found = {pattern: row for pattern, row in found.items() if "x" not in pattern}
        for number, n in enumerate(sorted({parse(pattern)[0] for pattern in found})):
            chosen = sorted((p for p in found if parse(p)[0] == n), key=lambda p: parse(p)[1])
            at = {p: parse(p)[1] / n * (1 + 0.04 * index - 0.04 * number) for p in chosen}  # beside one another
            alone = [p for p in chosen if f"{prefix}/{p}" in apart]
            joined = [p for p in chosen if p not in alone]
            for part in (joined, *([p] for p in alone)):
                name = label if part is joined and not number else ""
                bars(ax, [at[p] for p in part], [found[p] for p in part], name, index, marker=plots.MARKERS[number])
            for pattern in chosen if index == 0 else ():  # one label a place
                mean, star = sum(found[pattern]) / len(found[pattern]), "*" if pattern in alone else ""
                place = at[pattern], mean
                ax.annotate(pattern + star, place, (-6, 4), textcoords="offset points", ha="right", fontsize="small")
    dense = stats.interval(top1["dense"])
    ax.axhline(dense.mean, color="black", linewidth=1, label="dense")
    if dense.n > 1:
        ax.axhspan(dense.low, dense.high, color="black", alpha=0.1, linewidth=0)
    ax.set_xscale("log", base=2)
    ax.set_xticks([2, 4, 8, 16, 32], ["1/2", "1/4", "1/8", "1/16", "1/32"])
    ax.minorticks_off()
    ax.set(xlabel="share of weights kept", ylabel="top-1 on the test images, %")
    ax.legend()
    return ax


def sweep(ax: Axes, multiples: Sequence[float], rows: Sequence[Sequence[float]], *, ylabel: str, index: int) -> Axes:
    """A measure against the multiple of lambda_W, evenly spaced."""
    bars(ax, range(len(multiples)), rows, "", index)
    ax.set_xticks(range(len(multiples)), [f"{x:g}" for x in multiples])
    ax.set(xlabel="multiple of the run's $\\lambda_W$ (0 is STE)", ylabel=ylabel)
    return ax


def bars(
    ax: Axes, at: Sequence[float], rows: Sequence[Sequence[float]], label: str, index: int, *, marker: str = "o"
) -> None:
    """Means over seeds with their 95 % intervals at the places `at`."""
    found = [stats.interval(row) for row in rows]
    several = [i.n > 1 for i in found]  # one seed has no interval
    below = [i.mean - i.low if known else 0.0 for i, known in zip(found, several, strict=True)]
    above = [i.high - i.mean if known else 0.0 for i, known in zip(found, several, strict=True)]
    look = {"color": plots.COLORS[index], "linestyle": plots.LINES[index], "marker": marker}
    ax.errorbar(at, [i.mean for i in found], yerr=[below, above], label=label, capsize=3, **look)
