"""The notebook's pictures: axes in, axes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from common import plots
from papers.sst.experiment import ARMS, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ORDER = list(ARMS)  # an arm keeps its colour in every figure
SMOOTH = 25  # steps


def color(arm: str) -> str:
    """An arm's colour; variants of SST share one."""
    return plots.COLORS[min(ORDER.index(arm), 4)]


def visits(ax: Axes, chosen: Sequence[Sequence[int]], count: int) -> Axes:
    """Which of `count` pairs of singular vectors are trained (dark), an iteration a column."""
    table = np.zeros((count, len(chosen)))
    for iteration, indices in enumerate(chosen):
        table[list(indices), iteration] = 1
    ax.imshow(table, cmap="Blues", aspect="auto", vmin=0, vmax=1.4, origin="upper")
    ax.grid(False)
    ax.set(xlabel="iteration", ylabel="index of the singular value")
    return ax


def smoothed(ax: Axes, runs: Mapping[str, Sequence[Sequence[float]]]) -> Axes:
    """Values by arm along a training: thick the mean over seeds, thin each seed, over a running window."""
    for arm, rows in runs.items():
        length = min(len(row) for row in rows)
        width = max(1, min(SMOOTH, length // 4))
        curves = np.array([np.convolve(row[:length], np.ones(width) / width, "valid") for row in rows])
        steps = np.arange(width - 1, length)
        ax.plot(steps, curves.T, color=color(arm), alpha=0.25, linewidth=0.8)
        ax.plot(steps, curves.mean(0), color=color(arm), linestyle=plots.LINES[ORDER.index(arm) % 7], label=label(arm))
    ax.set(xlabel="step")
    ax.legend()
    return ax


def dots(ax: Axes, values: Mapping[str, Sequence[float]]) -> Axes:
    """A row an arm and a dot a seed; a bar marks the mean."""
    for place, (arm, row) in enumerate(values.items()):
        ax.plot(row, [place] * len(row), "o", color=color(arm), alpha=0.7)
        ax.plot([float(np.mean(row))] * 2, [place - 0.3, place + 0.3], color=color(arm))
    ax.set_yticks(range(len(values)), [label(arm) for arm in values])
    ax.invert_yaxis()
    return ax


def spectra(ax: Axes, values: Mapping[str, Sequence[Sequence[float]]]) -> Axes:
    """Singular values, falling; a line an arm, of the first seed."""
    for arm, rows in values.items():
        sigma = np.asarray(rows[0])
        ax.plot(range(1, len(sigma) + 1), sigma, color=color(arm), linestyle=plots.LINES[ORDER.index(arm) % 7],
                label=label(arm))  # fmt: skip
    ax.set(xlabel="index", ylabel="singular value")
    ax.legend()
    return ax


def cuts(ax: Axes, values: Mapping[str, Mapping[float, Sequence[float]]]) -> Axes:
    """How much the logarithm of the perplexity rises when a share of the singular values is cut off; a line a seed."""
    for arm, found in values.items():
        shares = [0.0, *found]
        for number in range(len(next(iter(found.values())))):
            row = [0.0, *(found[share][number] for share in found)]
            shown = {"label": label(arm)} if number == 0 else {}
            ax.plot(shares, row, "o-", color=color(arm), alpha=0.8, **shown)
    ax.set(xlabel="share of the singular values that is cut off", ylabel="rise of the loss, nats a token")
    ax.legend()
    return ax


def ledgers(ax: Axes, found: Mapping[str, Mapping[str, float]]) -> Axes:
    """Stacked bars of gigabytes by method and by what they hold."""
    left = np.zeros(len(found))
    for shade, part in zip(plots.COLORS, next(iter(found.values())), strict=False):
        sizes = np.array([parts[part] for parts in found.values()])
        ax.barh(range(len(found)), sizes, left=left, color=shade, label=part)
        left += sizes
    ax.set_yticks(range(len(found)), [label(arm) for arm in found])
    ax.invert_yaxis()
    ax.set(xlabel="GB in float32")
    ax.legend()
    return ax
