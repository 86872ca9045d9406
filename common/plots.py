"""One look for every figure: calm axes, colours that colour-blind readers can tell apart, and the same grid of images.

Nothing here picks a matplotlib backend: a notebook draws inline, a script or a test under Agg. Functions that take an
`ax` draw into it and return it; `image_grid` owns its figure and returns that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from common import stats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito (2008): eight colours that stay apart under the common colour-vision deficiencies; their yellow is left
# out because thin yellow lines vanish on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Line styles differ as well, so that a figure printed in grey still reads.
LINES = ("-", "--", "-.", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), "-")


def style() -> None:
    """Set matplotlib's defaults for this process (fonts, grid, colour cycle, figure resolution)."""
    import matplotlib as mpl
    from matplotlib.rcsetup import cycler

    mpl.rcParams.update(
        {
            "axes.prop_cycle": cycler("color", list(COLORS)),
            "axes.axisbelow": True,
            "axes.grid": True,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlelocation": "left",
            "axes.titlesize": "medium",
            "axes.titleweight": "bold",
            "figure.constrained_layout.use": True,
            "figure.dpi": 110,
            "figure.facecolor": "white",
            "font.size": 10,
            "grid.alpha": 0.25,
            "image.cmap": "gray",
            "image.interpolation": "nearest",
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "lines.markersize": 5,
            "savefig.dpi": 150,
            "savefig.facecolor": "white",
        }
    )


def image_grid(
    images: Sequence[Sequence[Any]],
    row_labels: Sequence[str] = (),
    col_labels: Sequence[str] = (),
    vmin: float | None = None,
    vmax: float | None = None,
    cmap: str = "gray",
    colorbar_label: str = "",
    *,
    errors: Sequence[Sequence[Any]] | None = None,
    error_max: float | None = None,
    error_label: str = "error",
    cell_inches: float = 1.9,
) -> Figure:
    """Draw rows of images in ONE window, so that brightness may be compared, with one colour bar.

    Args:
        images: rows of `[H, W]` arrays or tensors; `None` leaves a cell empty (rows may not be ragged).
        row_labels, col_labels: empty, or one a row and one a column.
        vmin, vmax: the window in the images' unit (for CT: HU); default: least and greatest finite value of all images.
        cmap, colorbar_label: colour map and the colour bar's label (say the unit).
        errors: rows of error maps of the same layout; each is drawn under its row in a window of its own,
            `-error_max..error_max` (default: the 99th percentile of |error|, so that one bad pixel hides nothing).
        cell_inches: width of one cell.

    Raises:
        ValueError: ragged rows, labels that do not fit the grid, an empty window.
    """
    import matplotlib.pyplot as plt

    rows = [[_array(image) for image in row] for row in images]
    _require_grid(rows, row_labels, col_labels)
    low, high = _window(rows, vmin, vmax)
    layers = [(row, dict(cmap=cmap, vmin=low, vmax=high)) for row in rows]
    names = list(row_labels) or [""] * len(rows)
    if errors is not None:
        maps = [[_array(image) for image in row] for row in errors]
        if [len(row) for row in maps] != [len(row) for row in rows]:
            raise ValueError(
                f"error maps do not fit the images: got rows of {[len(row) for row in maps]}, expected "
                f"{[len(row) for row in rows]}; give one error map (or None) for each image."
            )
        limit = _error_limit(maps) if error_max is None else error_max
        look = dict(cmap="RdBu_r", vmin=-limit, vmax=limit)
        layers = [layer for row, errs in zip(layers, maps, strict=True) for layer in (row, (errs, look))]
        names = [label for name in names for label in (name, error_label)]

    shape = next(image.shape for row in rows for image in row if image is not None)
    size = (cell_inches * len(rows[0]) + 0.9, cell_inches * len(layers) * shape[0] / shape[1] + 0.4)
    figure = plt.figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(layers), len(rows[0]), squeeze=False)
    for i, (row, look) in enumerate(layers):
        for j, image in enumerate(row):
            _show(axes[i, j], image, look)
        axes[i, 0].set_ylabel(names[i])
    for j, label in enumerate(col_labels):
        axes[0, j].set_title(label, loc="center", fontsize="small")
    _colorbars(figure, axes, colorbar_label, error_label if errors is not None else None)
    return figure


def curves(ax: Axes, series: Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]]) -> Axes:
    """Draw `{label: (steps, values)}`: the mean over seeds and its 95 % confidence band at each step.

    Args:
        series: steps `[T]`; values `[seeds, T]` (one seed is drawn as a bare line: it has no band).

    Raises:
        ValueError: values and steps of different lengths.
    """
    for index, (label, (steps, values)) in enumerate(series.items()):
        table = np.atleast_2d(np.asarray(values, dtype=float))
        if table.shape[1] != len(steps):
            raise ValueError(
                f"curve {label!r}: got values of shape {table.shape} for {len(steps)} steps, expected [seeds, "
                f"{len(steps)}]; give one row of values for each seed."
            )
        _band(ax, np.asarray(steps, dtype=float), table, label, index, marker="")
    ax.legend()
    return ax


def metric_against(
    ax: Axes, x: Sequence[float], series: Mapping[str, Mapping[float, Sequence[float]] | Sequence[Sequence[float]]]
) -> Axes:
    """Draw a metric against `x` (for instance PSNR against views): mean over seeds with 95 % confidence bars.

    Args:
        x: the positions `[X]`, drawn evenly spaced when they are far from it (18, 36, 72) so that none crowds another.
        series: `{label: values}` with values `{x: [value of each seed]}` or an array `[seeds, X]`; points with one
            seed have no bar.

    Raises:
        ValueError: a position without values, or an array that does not fit `x`.
    """
    steps = np.diff(np.asarray(x, dtype=float))
    uneven = len(x) > 2 and steps.max() > 1.5 * steps.min()
    places = np.arange(len(x), dtype=float) if uneven else np.asarray(x, dtype=float)
    shift = 0.02 * (np.ptp(places) or 1.0)  # bars of several series at one place would otherwise hide one another
    for index, (label, values) in enumerate(series.items()):
        columns = _columns(label, x, values)
        mean = [float(np.mean(column)) for column in columns]
        spread = [_bar(column) for column in columns]
        at = places + shift * (index - (len(series) - 1) / 2)
        look = _look(index)
        ax.errorbar(at, mean, yerr=np.transpose(spread), label=label, capsize=3, marker=MARKERS[index % 7], **look)
    ax.set_xticks(places, [f"{value:g}" for value in x])
    ax.legend()
    return ax


def _columns(label: str, x: Sequence[float], values: Any) -> list[np.ndarray]:
    if isinstance(values, Mapping):
        missing = [value for value in x if value not in values]
        if missing:
            raise ValueError(
                f"series {label!r} has no values at {missing}: got {sorted(values)}, expected every one of {list(x)}; "
                "measure them or leave them out of x."
            )
        return [np.atleast_1d(np.asarray(values[value], dtype=float)) for value in x]
    table = np.atleast_2d(np.asarray(values, dtype=float))
    if table.shape[1] != len(x):
        raise ValueError(
            f"series {label!r}: got an array of shape {table.shape}, expected [seeds, {len(x)}]; give one row of "
            "values for each seed, or a mapping from x to the values of its seeds."
        )
    return list(table.T)


def _bar(column: np.ndarray) -> tuple[float, float]:
    if len(column) < 2:
        return 0.0, 0.0
    interval = stats.interval(column)
    return interval.mean - interval.low, interval.high - interval.mean


def _band(ax: Axes, x: np.ndarray, table: np.ndarray, label: str, index: int, marker: str) -> None:
    ax.plot(x, table.mean(axis=0), label=label, marker=marker, **_look(index))
    if len(table) > 1:
        intervals = [stats.interval(column) for column in table.T]
        low, high = [i.low for i in intervals], [i.high for i in intervals]
        ax.fill_between(x, low, high, color=COLORS[index % 7], alpha=0.18, linewidth=0)


def _look(index: int) -> dict[str, Any]:
    return {"color": COLORS[index % len(COLORS)], "linestyle": LINES[index % len(LINES)]}


def _array(image: Any) -> np.ndarray | None:
    if image is None:
        return None
    if hasattr(image, "detach"):
        image = image.detach().cpu().numpy()
    image = np.asarray(image, dtype=float)
    if image.ndim != 2:
        raise ValueError(f"got an image of shape {image.shape}, expected [H, W]; take one slice or channel of it.")
    return image


def _require_grid(rows: list[list[Any]], row_labels: Sequence[str], col_labels: Sequence[str]) -> None:
    widths = [len(row) for row in rows]
    if not rows or len(set(widths)) != 1 or not any(image is not None for row in rows for image in row):
        raise ValueError(f"got rows of {widths} images, expected equal rows with an image; fill gaps with None.")
    for name, labels, count in (("row", row_labels, len(rows)), ("column", col_labels, widths[0])):
        if labels and len(labels) != count:
            raise ValueError(f"got {len(labels)} {name} labels for {count} {name}s; give one for each, or none.")


def _window(rows: list[list[Any]], vmin: float | None, vmax: float | None) -> tuple[float, float]:
    values = np.concatenate([image.ravel() for row in rows for image in row if image is not None])
    values = values[np.isfinite(values)]
    low = float(values.min()) if vmin is None else vmin
    high = float(values.max()) if vmax is None else vmax
    if vmin is not None and vmax is not None and not low < high:
        raise ValueError(f"got the window {vmin}..{vmax}, expected vmin < vmax; swap or widen it.")
    return low, high


def _error_limit(maps: list[list[Any]]) -> float:
    values = np.concatenate([np.abs(image).ravel() for row in maps for image in row if image is not None])
    return float(np.percentile(values[np.isfinite(values)], 99)) or 1.0


def _show(ax: Axes, image: np.ndarray | None, look: dict[str, Any]) -> None:
    ax.grid(False)
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)
    if image is not None:
        ax.imshow(image, **look)


def _colorbars(figure: Figure, axes: np.ndarray, label: str, error_label: str | None) -> None:
    # With error maps the bars stand beside the first pair of rows: bars over interleaved rows would overlap.
    pairs = [(axes, label)] if error_label is None else [(axes[:1], label), (axes[1:2], error_label)]
    for block, text in pairs:
        drawn = next((ax.images[0] for ax in block.ravel() if ax.images), None)
        if drawn is not None:
            figure.colorbar(drawn, ax=list(block.ravel()), label=text, shrink=0.9, aspect=25)
