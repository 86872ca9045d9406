"""Figures: what is drawn is what was given, in one window, with intervals that stats agrees with."""

from __future__ import annotations

import io

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from common import plots, stats


@pytest.fixture(autouse=True)
def _own_style():
    with matplotlib.rc_context():
        plots.style()
        yield
    plt.close("all")


def images(rows=2, columns=3):
    generator = np.random.default_rng(0)
    return [[generator.normal(size=(8, 10)) for _ in range(columns)] for _ in range(rows)]


def drawn(figure):
    return [ax.images[0] for ax in figure.axes if ax.images and ax.get_label() != "<colorbar>"]


def test_all_images_share_one_window_and_one_bar():
    grid = images()
    figure = plots.image_grid(grid, ["a", "b"], ["x", "y", "z"], colorbar_label="HU")
    assert len(drawn(figure)) == 6
    every = np.concatenate([image.ravel() for row in grid for image in row])
    assert {image.get_clim() for image in drawn(figure)} == {(every.min(), every.max())}
    assert sum(ax.get_label() == "<colorbar>" for ax in figure.axes) == 1
    np.testing.assert_array_equal(drawn(figure)[4].get_array(), grid[1][1])


def test_errors_have_a_window_of_their_own_centred_on_zero():
    grid = images()
    figure = plots.image_grid(grid, ["a", "b"], vmin=-1, vmax=1, errors=[[None, e, e] for _, e, _ in grid])
    windows = [image.get_clim() for image in drawn(figure)]
    assert windows.count((-1, 1)) == 6
    low, high = next(window for window in windows if window != (-1, 1))
    assert low == -high and windows.count((low, high)) == 4
    figure.savefig(io.BytesIO())  # the layout engine must cope, warnings are errors


def test_tensors_and_gaps_are_welcome():
    figure = plots.image_grid([[torch.ones(4, 4, requires_grad=True), None]], vmin=0, vmax=1)
    assert len(drawn(figure)) == 1


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: plots.image_grid([images()[0], images()[0][:1]]), "equal rows"),
        (lambda: plots.image_grid([[None]]), "equal rows"),
        (lambda: plots.image_grid(images(), ["only one"]), "row labels"),
        (lambda: plots.image_grid([[np.zeros((2, 2, 3))]]), r"\[H, W\]"),
        (lambda: plots.image_grid(images(), vmin=1, vmax=1), "vmin < vmax"),
        (lambda: plots.image_grid(images(), errors=images(1)), "do not fit"),
        (lambda: plots.curves(plt.gca(), {"a": ([1, 2], [[1.0, 2.0, 3.0]])}), "2 steps"),
        (lambda: plots.metric_against(plt.gca(), [1, 2], {"a": {1: [3.0]}}), r"no values at \[2\]"),
        (lambda: plots.metric_against(plt.gca(), [1, 2], {"a": [[1.0, 2.0, 3.0]]}), "one row of values"),
    ],
)
def test_what_does_not_fit_is_refused(call, told):
    with pytest.raises(ValueError, match=told):
        call()


def test_curves_draw_the_mean_and_its_interval():
    ax = plt.figure().add_subplot()
    values = [[1.0, 2.0], [3.0, 2.0], [2.0, 5.0]]
    plots.curves(ax, {"ours": ([0, 10], values), "single": ([0, 10], [[1.0, 1.0]])})
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [2.0, 3.0])
    assert len(ax.collections) == 1  # the single seed has no band
    heights = ax.collections[0].get_paths()[0].vertices[:, 1]
    expected = stats.interval([2.0, 2.0, 5.0])
    assert heights.max() == pytest.approx(expected.high) and heights.min() == pytest.approx(
        min(expected.low, stats.interval([1.0, 3.0, 2.0]).low)
    )


@pytest.mark.parametrize("values", [{18: [1.0, 2.0], 36: [3.0, 3.0], 72: [5.0]}, [[1.0, 3.0, 5.0], [2.0, 3.0, 5.0]]])
def test_metric_against_takes_both_layouts(values):
    ax = plt.figure().add_subplot()
    plots.metric_against(ax, [18, 36, 72], {"ours": values})
    np.testing.assert_allclose(np.asarray(ax.lines[0].get_ydata(), dtype=float), [1.5, 3.0, 5.0])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["18", "36", "72"]


def test_series_differ_in_more_than_colour():
    ax = plt.figure().add_subplot()
    plots.metric_against(ax, [1, 2], {name: [[1.0, 2.0]] for name in "abcdefg"})
    lines = [line for line in ax.lines if line.get_marker() in plots.MARKERS]
    assert len({line.get_marker() for line in lines}) == 7
    assert len({line.get_color() for line in lines}) == 7
