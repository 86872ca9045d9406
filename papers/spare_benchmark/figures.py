"""The pictures of the notebook that are more than a call of matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from common import plots
from papers.spare_benchmark.evaluation import psnr_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WORST = 0.4  # error that is drawn brightest, mean over the colours of values in 0..1


def picture(axis: Axes, image: Tensor, title: str, **look: Any) -> Any:
    """An image without ticks."""
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    axis.set_title(title, fontsize=8, loc="center")
    return axis.imshow(image.cpu(), **look)


def short(name: str) -> str:
    """`cam_014` of `cam_014_3_0000.png`; other names without their suffix."""
    return name.split("_3_")[0].split(".")[0]


def renders(made: Mapping[str, Tensor], photograph: Tensor) -> Figure:
    """Renders [H, W, 3] by label beside the photograph; below each, its error."""
    import matplotlib.pyplot as plt
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    height, width = photograph.shape[:2]
    columns = len(made) + 1
    fig, axes = plt.subplots(2, columns, figsize=(2.1 * columns, 4.2 * height / width + 0.8), squeeze=False)
    for column, (label, image) in enumerate(made.items()):
        picture(axes[0, column], image, f"{label}\n{psnr_of(image, photograph):.1f} dB")
        error = (image - photograph).abs().mean(dim=-1)
        picture(axes[1, column], error, "", cmap="magma", vmin=0, vmax=WORST)
    picture(axes[0, -1], photograph, "photograph")
    axes[1, -1].axis("off")
    bar = axes[1, -1].inset_axes((0.05, 0.1, 0.08, 0.8))  # in the empty place, so that no column is moved
    fig.colorbar(ScalarMappable(Normalize(0, WORST), "magma"), cax=bar, label="error")
    return fig


def dots(panels: Mapping[str, Mapping[str, Sequence[float]]], quantity: str, *, zero: bool = False) -> Figure:
    """Rows of dots, one a seed, with a bar at the mean; a panel for each entry. `zero` draws a line there."""
    import matplotlib.pyplot as plt

    labels = list(next(iter(panels.values())))
    longest = max(len(label) for label in labels)
    size = (0.085 * longest + max(1.9 * len(panels), 3.5), 0.9 + 0.32 * len(labels))
    fig, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for axis, (title, rows) in zip(axes[0], panels.items(), strict=True):
        for place, values in enumerate(rows.values()):
            color = plots.COLORS[0] if zero else plots.COLORS[place % 7]
            axis.plot(values, [place] * len(values), "o", color=color, alpha=0.5, markersize=4)
            axis.plot([sum(values) / len(values)], [place], "|", color=color, markersize=16, markeredgewidth=2)
        if zero:
            axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(title, fontsize=9)
    fig.supxlabel(quantity, fontsize=9)
    axes[0, 0].set_yticks(range(len(labels)), labels)
    axes[0, 0].invert_yaxis()
    return fig


def against(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]], first: str, second: str
) -> Figure:
    """One metric against another: a colour and a marker for each label, a mark for each seed."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(panels), figsize=(3.3 * len(panels) + 1.2, 3.2), squeeze=False)
    for axis, (title, rows) in zip(axes[0], panels.items(), strict=True):
        for place, (label, (x, y)) in enumerate(rows.items()):
            look = {"color": plots.COLORS[place % 7], "marker": plots.MARKERS[place % 7]}
            axis.plot(x, y, linestyle="", label=label, **look)
        axis.set(xlabel=first, ylabel=second, title=title)
    axes[0, -1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return fig
