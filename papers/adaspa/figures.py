"""The figures of the notebook that need more than a call of `common.plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from common import plots, stats
from papers.adaspa.experiment import ARMS, KEPT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["arms", "by_length", "families", "maps", "phases", "reaches", "shown", "trajectories", "videos"]


def shown(video: Tensor) -> np.ndarray:
    """Frames [F, S, S, 3] in 0..1 of a video [3, F, S, S] in -1..1."""
    return ((video.clamp(-1, 1) + 1) / 2).permute(1, 2, 3, 0).numpy()


def videos(rows: Mapping[str, Tensor], frames: int = 8) -> Figure:
    """Evenly spaced frames of videos [3, F, S, S], a row each."""
    import matplotlib.pyplot as plt

    count = min(frames, next(iter(rows.values())).shape[1])
    figure, axes = plt.subplots(len(rows), count, figsize=(1.15 * count + 1.6, 1.2 * len(rows) + 0.2), squeeze=False)
    for row, (name, video) in zip(axes, rows.items(), strict=True):
        pictures = shown(video)
        for ax, place in zip(row, np.linspace(0, len(pictures) - 1, count).round().astype(int), strict=True):
            ax.imshow(pictures[place])
            ax.set(xticks=[], yticks=[])
            ax.grid(visible=False)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    return figure


def maps(rows: Mapping[str, Sequence[Tensor]], columns: Sequence[str]) -> Figure:
    """Weights of tiles [n, n] on a logarithmic scale, a row of maps a name."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    size = (1.9 * len(columns) + 1.2, 1.95 * len(rows) + 0.3)
    figure, axes = plt.subplots(len(rows), len(columns), figsize=size, squeeze=False)
    shares = [[tile / tile.sum() * tile.shape[-1] for tile in row] for row in rows.values()]
    low = min(1e-3, *(float(x.mean()) / 10 for row in shares for x in row))
    for title, ax in zip(columns, axes[0], strict=True):
        ax.set_title(title, fontsize="small", loc="center")
    for name, line, row in zip(rows, axes, shares, strict=True):
        for ax, tile in zip(line, row, strict=True):
            drawn = ax.imshow(tile.clamp_min(low).numpy(), norm=LogNorm(low, 1), cmap="magma")
            ax.set(xticks=[], yticks=[])
            ax.grid(visible=False)
        line[0].set_ylabel(name, fontsize="small")
    figure.colorbar(drawn, ax=axes, shrink=0.6, label="share of its row of tiles")
    return figure


def reaches(ax: Axes, found: Mapping[str, Sequence[float]]) -> Axes:
    """A bar a name at the mean of the seeds, with the 95 % interval, and a dot a seed."""
    for place, (name, values) in enumerate(found.items()):
        color = plots.COLORS[place % len(plots.COLORS)]
        interval = stats.interval(values)
        ax.bar(place, interval.mean, color=color, alpha=0.35, width=0.6)
        if len(values) > 1:
            error = [[interval.mean - interval.low], [interval.high - interval.mean]]
            ax.errorbar(place, interval.mean, yerr=error, color=color, capsize=4)
        ax.plot([place] * len(values), values, "o", color=color, markersize=4, label=name)
    ax.set_xticks(range(len(found)), list(found), rotation=15, ha="right")
    return ax


def families(ax: Axes, found: Mapping[str, Mapping[float, Sequence[float]]]) -> Axes:
    """Recall of the best pattern of each family against the share of entries kept, mean of the seeds."""
    for index, (name, row) in enumerate(found.items()):
        look = {
            "color": plots.COLORS[index % 7],
            "linestyle": plots.LINES[index % 7],
            "marker": plots.MARKERS[index % 7],
        }
        ax.plot(list(row), [float(np.mean(values)) for values in row.values()], label=name, **look)
    ax.set(xlabel="share of entries kept", ylabel="recall", ylim=(0, 1.02))
    ax.legend()
    return ax


def arms(ax: Axes, found: Mapping[str, Sequence[float]], unit: str) -> Axes:
    """A dot a seed, an arm a row, and a bar at each mean."""
    for place, (arm, values) in enumerate(found.items()):
        color = plots.COLORS[0] if arm == "adaspa" else plots.COLORS[1]
        ax.plot(values, [place] * len(values), "o", color=color, alpha=0.7)
        ax.plot([np.mean(values)] * 2, [place - 0.32, place + 0.32], color=color)
    ax.set_yticks(range(len(found)), [ARMS[arm] for arm in found])
    ax.invert_yaxis()
    ax.set(xlabel=unit)
    return ax


def trajectories(ax: Axes, found: Mapping[str, Sequence[Tensor]], dense: Sequence[Tensor]) -> Axes:
    """Relative distance of the states of a generation [K, P, ...] to the dense one's, a line an arm, mean of seeds."""
    for index, (arm, runs) in enumerate(found.items()):
        lines = []
        for run, exact in zip(runs, dense, strict=True):
            gap = (run.float() - exact.float()).flatten(1).norm(dim=1)
            lines.append((gap / exact.float().flatten(1).norm(dim=1)).numpy())
        steps = KEPT * np.arange(1, len(lines[0]) + 1)
        look = {"color": plots.COLORS[index % 7], "linestyle": plots.LINES[index % 7]}
        ax.plot(steps, np.mean(lines, axis=0).clip(min=1e-7), label=ARMS[arm], **look)
    ax.set(xlabel="step", ylabel="relative distance to dense", yscale="log")
    ax.legend(fontsize="small")
    return ax


def by_length(
    ax: Axes, lengths: Sequence[int], series: Mapping[str, Sequence[float]], ideal: Mapping[str, float]
) -> Axes:
    """Times over the dense one against the number of tokens; dotted what is proportional to the work."""
    for index, (name, values) in enumerate(series.items()):
        color = plots.COLORS[index % 7]
        ax.plot(lengths, values, color=color, marker=plots.MARKERS[index % 7], label=name)
        if name in ideal:
            ax.axhline(ideal[name], color=color, linestyle=":", linewidth=1)
    ax.set(xscale="log", yscale="log", xlabel="tokens", ylabel="time over a dense attention")
    ax.set_xticks(list(lengths), [f"{length:,}" for length in lengths], rotation=20)
    ax.set_yticks([0.1, 0.2, 0.5, 1, 2], ["0.1", "0.2", "0.5", "1", "2"])
    ax.minorticks_off()
    ax.legend()
    return ax


def phases(ax: Axes, parts: Mapping[str, Mapping[str, float]]) -> Axes:
    """Stacked bars: a generation's time by part, in units of a dense one."""
    names = list(dict.fromkeys(name for row in parts.values() for name in row))
    left = np.zeros(len(parts))
    for index, name in enumerate(names):
        width = np.array([row.get(name, 0.0) for row in parts.values()])
        ax.barh(range(len(parts)), width, left=left, color=plots.COLORS[index % 7], alpha=0.8, label=name)
        left += width
    for place, total in enumerate(left):
        ax.text(total + 0.01, place, f"{1 / total:.2f}x", va="center")
    ax.set_yticks(range(len(parts)), list(parts))
    ax.invert_yaxis()
    ax.set(xlabel="time, in units of the dense generation", xlim=(0, 1.15))
    ax.legend(fontsize="small")
    return ax
