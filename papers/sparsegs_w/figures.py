"""Rows of pictures, and bars with intervals: what the notebook draws more than once."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from common import plots, stats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def gallery(rows: Mapping[str, Sequence[Tensor]], titles: Sequence[str] = (), *, width: float = 2.2) -> Figure:
    """Named rows of pictures of one size: [H, W, 3] in 0..1, or [H, W] masks and maps.

    titles  of the columns; width of a picture in inches
    """
    import matplotlib.pyplot as plt

    longest = max(len(row) for row in rows.values())
    height, wide = next(iter(rows.values()))[0].shape[:2]
    size = (width * longest + 0.4, (width * height / wide + 0.12) * len(rows) + (0.45 if titles else 0))
    fig, axes = plt.subplots(len(rows), longest, figsize=size, squeeze=False)
    for line, (label, row) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(label, fontsize="small")
        for place, ax in enumerate(line):
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
            if place < len(row):
                ax.imshow(row[place].detach().float().cpu().clamp(0, 1), vmin=0, vmax=1)
            else:
                ax.set_visible(False)
    for ax, title in zip(axes[0], titles, strict=False):
        ax.set_title(title, fontsize="small", loc="center")
    return fig


def spread(ax: Axes, values: Mapping[str, Sequence[float]], label: str) -> None:
    """A line an arm: a dot for each seed, the mean and its 95 % interval where there are several."""
    for place, found in enumerate(values.values()):
        color = plots.COLORS[place % len(plots.COLORS)]
        if len(found) > 1:
            span = stats.interval(found)
            ax.plot([span.low, span.high], [place, place], color=color, alpha=0.35, linewidth=5, solid_capstyle="butt")
        ax.plot([statistics.fmean(found)], [place], "|", color=color, markersize=13, markeredgewidth=2.5)
        ax.plot(found, [place] * len(found), ".", color="black", markersize=5)
    ax.set_yticks(range(len(values)), list(values))
    ax.invert_yaxis()
    everything = [value for found in values.values() for value in found]
    margin = 0.12 * (max(everything) - min(everything)) or 0.1
    ax.set_xlim(min(everything) - margin, max(everything) + margin)
    ax.set_xlabel(label)


def smooth(losses: Sequence[float], points: int = 50) -> tuple[list[float], list[float]]:
    """Steps and values of a training loss: means over equal stretches of it."""
    width = max(1, len(losses) // points)
    values = [statistics.fmean(losses[at : at + width]) for at in range(0, len(losses) - width + 1, width)]
    return [width * (index + 0.5) for index in range(len(values))], values
