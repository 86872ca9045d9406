"""What is measured while a sparse model trains: how the masks move, and how noisy the gradients are.

A meter is made with the handle and then fed by `Sparsity.step`:

    moved = MaskMeter(handle); noise = GradientVariance(handle)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from common.sparsity.sparsify import Sparsity

__all__ = ["GradientVariance", "MaskMeter", "Meter"]


class Meter:
    """Base of the meters; `every`: only each such step is measured (1: all)."""

    def __init__(self, handle: Sparsity, every: int = 1):
        if every < 1:
            raise ValueError(f"{type(self).__name__}: got every {every}; expected 1 or more")
        self.every = every
        self.steps: list[int] = []
        handle.meters.append(self)

    def before_step(self, handle: Sparsity) -> None:
        """Called while gradients and masks are still those of the step that ended."""

    def after_step(self, handle: Sparsity) -> None:
        """Called when masks are those of the next step."""


class MaskMeter(Meter):
    """How far the masks move: SAD and flip rate, by layer and in total.

    Sparse architecture divergence of two masks (arXiv 2102.04010, section 4.1): ||E_j - E_i||_1, the number of places
    that differ. `to_first` is against the masks there were when the meter was made, `flips` against those of the
    measurement before (with `every` = 1: of the step before). A dense layer counts as a mask of ones.

    steps             the steps that were measured
    to_first, flips   {layer: [count, one a measurement]}
    sizes             {layer: number of weights}
    """

    def __init__(self, handle: Sparsity, every: int = 1):
        super().__init__(handle, every)
        self._first = {name: layer.kept for name, layer in handle.layers.items()}
        self._last = dict(self._first)
        self.sizes = {name: layer.weight.numel() for name, layer in handle.layers.items()}
        self.to_first: dict[str, list[int]] = {name: [] for name in self._first}
        self.flips: dict[str, list[int]] = {name: [] for name in self._first}

    def after_step(self, handle: Sparsity) -> None:
        if handle.steps % self.every:
            return
        self.steps.append(handle.steps)
        for name, layer in handle.layers.items():
            mask = layer.kept
            self.to_first[name].append(_differing(mask, self._first[name]))
            self.flips[name].append(_differing(mask, self._last[name]))
            self._last[name] = mask

    def sad(self, layer: str | None = None) -> list[float]:
        """SAD to the first masks, divided by the number of weights: of one layer, or of all together."""
        return self._rate(self.to_first, layer)

    def flip_rate(self, layer: str | None = None) -> list[float]:
        """SAD to the measurement before, divided by the number of weights."""
        return self._rate(self.flips, layer)

    def _rate(self, counts: dict[str, list[int]], layer: str | None) -> list[float]:
        names = list(counts) if layer is None else [layer]
        size = sum(self.sizes[name] for name in names)
        return [sum(row) / size for row in zip(*(counts[name] for name in names), strict=True)]


class GradientVariance(Meter):
    """Variance of the gradient's entries, of kept and of pruned weights apart, by layer.

    Of each step: mean over a layer's kept (or pruned) entries of (g - mean g)^2, g as the optimiser finds it. `average`
    is the running average over steps, a <- r a + (1 - r) v, corrected for its start at 0 as Adam's moments are.
    A step without pruned entries (a dense phase) gives nan for `pruned` and leaves its average alone.

    steps          the steps that were measured
    kept, pruned   {layer: [variance, one a measurement]}
    """

    def __init__(self, handle: Sparsity, every: int = 1):
        super().__init__(handle, every)
        self.kept: dict[str, list[float]] = {name: [] for name in handle.layers}
        self.pruned: dict[str, list[float]] = {name: [] for name in handle.layers}

    def before_step(self, handle: Sparsity) -> None:
        if handle.steps % self.every:
            return
        if missing := [name for name, layer in handle.layers.items() if layer.weight.grad is None]:
            raise RuntimeError(
                f"GradientVariance: {missing[0]!r} has no gradient; call handle.step() before zero_grad()"
            )
        self.steps.append(handle.steps)
        for name, layer in handle.layers.items():
            assert layer.weight.grad is not None
            kept, pruned = _variances(layer.weight.grad.detach(), layer.kept)
            self.kept[name].append(kept)
            self.pruned[name].append(pruned)

    def average(self, of: str, rate: float = 0.9) -> list[float]:
        """Running average over steps of the mean over layers; of: `kept` or `pruned`; rate: r in [0, 1)."""
        rows = zip(*(self.kept if of == "kept" else self.pruned).values(), strict=True)
        average, weight, found = 0.0, 0.0, []
        for row in rows:
            value = sum(row) / len(row)
            if value == value:  # nan: nothing was pruned
                average, weight = rate * average + (1 - rate) * value, rate * weight + (1 - rate)
            found.append(average / weight if weight else float("nan"))
        return found


def _differing(a: Tensor | None, b: Tensor | None) -> int:
    if a is b:
        return 0
    if a is None or b is None:
        mask = b if a is None else a
        assert mask is not None
        return int((~mask).sum())
    return int((a ^ b).sum())


def _variances(grad: Tensor, kept: Tensor | None) -> tuple[float, float]:
    """Variance of the entries where kept, and where not, from three sums."""
    if kept is None:
        return float(grad.var(correction=0)), float("nan")
    square = grad.square()
    within = kept.to(grad.dtype)
    count = within.sum()
    sums = torch.stack([grad.sum(), square.sum(), (grad * within).sum(), (square * within).sum(), count]).double()
    total, squares, in_total, in_squares, inside = sums.tolist()
    outside = grad.numel() - inside

    def variance(total: float, squares: float, count: float) -> float:
        return max(0.0, squares / count - (total / count) ** 2) if count else float("nan")

    return variance(in_total, in_squares, inside), variance(total - in_total, squares - in_squares, outside)
