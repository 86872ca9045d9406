"""Compiled kernels of kernels.splat against the reference: how to run both and how good is good enough.

That is measured, not guessed: the error against the float64 reference may be a few times that of the reference run in
float32, on the same inputs. Pixels where a last bit decides (splat_oracle.kinks) are left out, of the loss too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import splat_oracle
import torch
from torch import Tensor

from kernels import _load, splat
from kernels.splat import reference

F32, F64 = torch.float32, torch.float64


def random(*shape: int, seed: int = 0) -> Tensor:
    """Numbers in 0..1, float64, that float32 has too."""
    return torch.rand(*shape, generator=splat_oracle.generator(seed)).double()


def runs_here(isa: str) -> bool:
    with mock.patch.dict(os.environ, KERNELS_ISA=isa):
        try:
            return _load.info()["isa"] == isa
        except RuntimeError:
            return False


# splatting knows no tiles: the emulated ones are those lanes again
ISAS = [isa for isa in _load.info()["isas_compiled"] if isa != "emulated_amx" and runs_here(isa)]


def run(function: Callable, inputs: dict[str, Tensor | None], dtype: torch.dtype, weights: list[Tensor]) -> dict:
    """What function(**inputs) returns, and the gradients at the inputs of the sum of outputs times weights; by name."""
    leaves = {
        name: value if value is None or not value.is_floating_point() else value.to(dtype).requires_grad_()
        for name, value in inputs.items()
    }
    outputs = function(**leaves)
    loss = sum((out * weight.to(dtype)).sum() for out, weight in zip(outputs, weights, strict=True))
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
    found = {f"d {name}": grad for name, grad in zip(wanted, grads, strict=True)}
    for i, (out, weight) in enumerate(zip(outputs, weights, strict=True)):
        if out.is_floating_point():
            found[f"output {i}"] = out.detach() * (weight != 0)
    return found


def worst_row(found: Tensor, truth: Tensor) -> float:
    """The largest error of a row (a Gaussian, a pixel) over the row's size plus a tenth of the largest number."""
    if truth.numel() == 0:
        return 0.0
    rows = (-1, truth.shape[-1]) if truth.ndim > 1 else (-1, 1)
    error = (found.double() - truth).abs().reshape(rows).amax(-1)
    size = truth.abs().reshape(rows).amax(-1)
    return float((error / (size + size.max() / 10 + 1e-30)).max())


def assert_as_good(found: dict, plain: dict, exact: dict, note: str = "", little: float = 2e-4) -> None:
    """Row by row, the error is at most 4 times that of plain float32 at its worst row, plus a little.

    The little is for powers of 2 by a polynomial, good to 1e-6 or so, and for the light from behind a Gaussian: the
    kernel has it as a difference, which is why gradients of what little shines through are good to fewer digits.
    """
    assert found.keys() == plain.keys() == exact.keys()
    for name, truth in exact.items():
        assert found[name].shape == truth.shape
        allowed = 4 * worst_row(plain[name], truth) + (little if name.startswith("d ") else 1e-5)
        error = worst_row(found[name], truth)
        assert error <= allowed, f"{name}: relative error {error:.3g}, allowed {allowed:.3g} {note}"


def compare(
    fast: Callable, plain: Callable, inputs: dict[str, Tensor | None], weights: list[Tensor], note: str = ""
) -> None:
    found = run(fast, inputs, F32, weights)
    assert all(value.dtype == F32 for value in found.values())
    assert_as_good(found, run(plain, inputs, F32, weights), run(plain, inputs, F64, weights), note)


def rasterizers(
    scene: splat_oracle.Scene, colors: Tensor, backgrounds: Tensor | None, antialiased: bool, **options: Any
) -> tuple[dict, Callable, Callable, Tensor]:
    """Inputs, the two functions, and [C, H, W] weights of 0 where a last bit decides."""
    items = splat_oracle.items(scene, colors, antialiased)
    items = {name: value.float().double() if value.is_floating_point() else value for name, value in items.items()}
    fixed = {name: items.pop(name) for name in ("radii", "depths", "first")}
    smooth = ~splat_oracle.kinks(items | fixed, scene.width, scene.height, **options)

    def call(function: Callable, **inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        dtype = inputs["means2d"].dtype  # type: ignore[union-attr]
        rest = {"width": scene.width, "height": scene.height} | options
        return function(**inputs, **(fixed | {"depths": fixed["depths"].to(dtype)}), **rest)[:2]

    inputs = items | {"backgrounds": backgrounds}
    return inputs, lambda **kw: call(splat.rasterize, **kw), lambda **kw: call(reference.rasterize, **kw), smooth


def weights_of(smooth: Tensor, channels: int, seed: int) -> list[Tensor]:
    return [(random(*smooth.shape, d, seed=seed + d) - 0.3) * smooth[..., None] for d in (channels, 1)]
