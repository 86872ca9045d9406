"""Rows of pictures, and bars with intervals: what the notebook draws more than once."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common import plots, stats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def gallery(
    rows: Sequence[Sequence[Tensor | None]],
    titles: Sequence[str] = (),
    *,
    row_labels: Sequence[str] = (),
    under: Sequence[Sequence[str]] = (),
    width: float = 1.5,
) -> Figure:
    """Rows of square pictures, [H, W, 3] in 0..1 or [H, W] in false colours of one range a row; None leaves a gap.

    titles  of the columns;  under: a line of text under every picture;  width in inches of one picture
    """
    import matplotlib.pyplot as plt

    high = width + (0.25 if under else 0.05)
    size = (width * len(rows[0]) + 0.3, high * len(rows) + (0.45 if titles else 0))
    fig, axes = plt.subplots(len(rows), len(rows[0]), figsize=size, squeeze=False)
    for number, row in enumerate(rows):
        flat = [picture[picture.isfinite()] for picture in row if picture is not None and picture.ndim == 2]
        values = torch.cat([torch.zeros(0), *flat])
        span = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
        for place, picture in enumerate(row):
            ax = axes[number, place]
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
            if picture is None:
                ax.axis("off")
                continue
            shown = picture.detach().cpu()
            ax.imshow(shown.clamp(0, 1) if shown.ndim == 3 else shown, cmap="viridis", vmin=span[0], vmax=span[1])
            if under:
                ax.set_xlabel(under[number][place], fontsize="x-small")
    for ax, title in zip(axes[0], titles, strict=False):
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
    ax.set_ylim(len(values) - 0.5, -0.5)  # the first on top, also where several axes share it
    everything = [x for found in values.values() for x in found]
    low, high = min(everything), max(everything)
    margin = 0.15 * (high - low) or 0.1 * abs(high) or 1.0
    ax.set_xlim(low - margin, high + margin)


def smooth(losses: Sequence[float], points: int = 50) -> tuple[list[float], list[float]]:
    """Steps and values of a training loss, as means over equal stretches of it."""
    width = max(1, len(losses) // points)
    values = [statistics.fmean(losses[at : at + width]) for at in range(0, len(losses) - width + 1, width)]
    return [width * (index + 0.5) for index in range(len(values))], values
