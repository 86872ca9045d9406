"""Rows of colour pictures and bars with intervals: what the notebook draws more than once."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from common import plots, stats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def gallery(
    rows: Sequence[Sequence[Tensor]],
    titles: Sequence[str] | Sequence[Sequence[str]] = (),
    *,
    row_labels: Sequence[str] = (),
    width: float = 2.2,
) -> Figure:
    """Rows of pictures, [H, W, 3] in 0..1 or [H, W] in false colours.

    titles  of the columns, or a row of titles for each row; width in inches of one picture
    """
    import matplotlib.pyplot as plt

    shape = rows[0][0].shape
    high = width * shape[0] / shape[1] + (0.45 if titles else 0.1)
    size = (width * len(rows[0]), high * len(rows))
    fig, axes = plt.subplots(len(rows), len(rows[0]), figsize=size, squeeze=False)
    for number, row in enumerate(rows):
        for ax, picture in zip(axes[number], row, strict=True):
            ax.imshow(
                picture.detach().cpu().clamp(0, 1) if picture.ndim == 3 else picture.detach().cpu(), cmap="viridis"
            )
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
    for number, named in enumerate([titles] if titles and isinstance(titles[0], str) else titles):
        for ax, title in zip(axes[number], named, strict=True):
            ax.set_title(title, fontsize="small", loc="center")
    for number, title in enumerate(row_labels):
        axes[number, 0].set_ylabel(title)
    return fig


def bars(ax: Axes, values: Mapping[str, Sequence[float]]) -> None:
    """A bar a name: the mean over seeds, its 95 % interval where there are two or more, and a dot a seed."""
    for place, found in enumerate(values.values()):
        span = stats.interval(found)
        error = [[span.mean - span.low], [span.high - span.mean]] if len(found) > 1 else None
        color = plots.COLORS[place % len(plots.COLORS)]
        ax.barh(place, statistics.fmean(found), xerr=error, color=color, alpha=0.75, capsize=3)
        ax.plot(found, [place] * len(found), "k.", markersize=4)
    ax.set_yticks(range(len(values)), list(values))
    ax.invert_yaxis()
    everything = [x for found in values.values() for x in found]
    ax.set_xlim(min(everything) - 1.5, max(everything) + 1)


def smooth(losses: Sequence[float], points: int = 50) -> tuple[list[float], list[float]]:
    """Steps and values of a training loss, as means over equal stretches of it."""
    width = max(1, len(losses) // points)
    values = [statistics.fmean(losses[at : at + width]) for at in range(0, len(losses) - width + 1, width)]
    return [width * (index + 0.5) for index in range(len(values))], values
