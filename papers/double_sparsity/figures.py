"""The notebook's pictures: axes in, axes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from common import plots
from papers.double_sparsity.experiment import ARMS

__all__ = ["against_ratio", "importances", "planted_scores", "speedups"]


def planted_scores(axes: Sequence[Axes], scores: Mapping[str, Tensor], outliers: Tensor) -> None:
    """Importance of every channel of one head [D] by each statistic; filled bars are the channels that matter."""
    for ax, (name, values) in zip(axes, scores.items(), strict=True):
        matters = np.isin(np.arange(len(values)), outliers)
        ax.bar(np.arange(len(values)), values, color=np.where(matters, plots.COLORS[1], "lightgrey"), width=0.9)
        ax.set(title=f"mean |{name}|", xlabel="channel", yticks=[])


def importances(ax: Axes, scores: Sequence[Tensor], title: str) -> Axes:
    """Importance of channels, [heads, D] of every layer, each head's over its largest."""
    rows, heads = torch.cat(list(scores)), len(scores[0])
    image = ax.imshow(rows / rows.amax(-1, keepdim=True), aspect="auto", cmap="viridis", vmin=0, vmax=1)
    ax.grid(False)
    ax.hlines([heads * layer - 0.5 for layer in range(1, len(scores))], *ax.get_xlim(), color="white", linewidth=1)
    every = -(-len(scores) // 8)
    shown = range(0, len(scores), every)
    ax.set_yticks([heads * (layer + 0.5) - 0.5 for layer in shown], [f"layer {layer + 1}" for layer in shown])
    ax.set(title=title, xlabel="channel")
    ax.figure.colorbar(image, ax=ax)
    return ax


def against_ratio(
    ax: Axes, ratios: Sequence[int], by_arm: Mapping[str, Mapping[int, Sequence[float]]], dense: float
) -> Axes:
    """A quantity against what is read, a line an arm: mean and range over seeds; dotted: dense."""
    places = np.arange(len(ratios))
    looks = zip(plots.COLORS, plots.MARKERS, plots.LINES, strict=False)
    for (arm, values), (color, marker, line) in zip(by_arm.items(), looks, strict=False):
        table = np.array([values[ratio] for ratio in ratios])
        ax.plot(places, table.mean(1), color=color, marker=marker, linestyle=line, label=ARMS[arm])
        ax.fill_between(places, table.min(1), table.max(1), color=color, alpha=0.15, linewidth=0)
    ax.axhline(dense, color="black", linestyle=":", linewidth=1, label="dense")
    ax.set_xticks(places, [f"1/{ratio}" for ratio in ratios])
    ax.set(xlabel="tokens and channels read")
    ax.legend(fontsize="small")
    return ax


def speedups(
    ax: Axes, contexts: Sequence[int], by_batch: Mapping[int, Sequence[Sequence[float]]], bound: float
) -> Axes:
    """Dense over sparse time against the cache's length, [repeats] values each; dotted: what fewer bytes allow."""
    for place, (batch, rows) in enumerate(by_batch.items()):
        table = np.array(rows)
        look = {"color": plots.COLORS[place], "marker": plots.MARKERS[place]}
        ax.plot(contexts, np.median(table, axis=1), label=f"batch {batch}", **look)
        ax.fill_between(contexts, table.min(1), table.max(1), color=plots.COLORS[place], alpha=0.15, linewidth=0)
    ax.axhline(bound, color="grey", linestyle=":", label="bytes read")
    ax.axhline(1, color="black", linewidth=0.8)
    ax.set(xscale="log", xlabel="tokens in the cache", ylabel="times as fast as dense", ylim=(0, 1.35 * bound))
    ax.set_xticks(contexts, [f"{context // 1024}k" for context in contexts])
    ax.minorticks_off()
    ax.legend(fontsize="small")
    return ax
