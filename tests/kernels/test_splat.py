"""The stages of kernels.splat in C++: values and gradients against the reference, on every instruction set."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import pytest
import splat_oracle
import torch
from splat_compare import ISAS, assert_as_good, compare, random, rasterizers, run, weights_of, worst_row
from torch import Tensor

from kernels import splat
from kernels.splat import reference

F32, F64 = torch.float32, torch.float64
seeds = st.integers(0, 2**16)


def projections(scene: splat_oracle.Scene, by: str, options: dict) -> tuple[dict, Callable, Callable]:
    inputs = {name: getattr(scene, name) for name in ("means", "quats", "scales", "opacities", "viewmats", "Ks")}
    if by == "covars":
        inputs |= {"covars": reference._covariances(scene.quats, scene.scales).float().double()}
        inputs |= {"quats": None, "scales": None}
    if by == "no opacities":
        inputs["opacities"] = None
    size = {"width": scene.width, "height": scene.height} | options
    return inputs, lambda **kw: splat.projection(**kw, **size), lambda **kw: reference.projection(**kw, **size)


def barely_seen(radii: Tensor, means2d: Tensor, scene: splat_oracle.Scene, clip: float) -> Tensor:
    """[C, N]: boxes that a pixel less would move out of the image, or under the clip."""
    size = torch.tensor([scene.width, scene.height])
    outside = (means2d + radii < 1.01) | (means2d - radii > size - 1.01)
    return outside.any(-1) | (radii <= clip + 1).all(-1)


@hypothesis.given(
    seed=seeds,
    count=st.integers(0, 60),
    cameras=st.integers(1, 3),
    by=st.sampled_from(["quats", "covars", "no opacities"]),
    antialiased=st.booleans(),
    eps2d=st.sampled_from([0.3, 0.1]),
    clip=st.sampled_from([0.0, 3.0]),
)
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
def test_projection(seed: int, count: int, cameras: int, by: str, antialiased: bool, eps2d: float, clip: float) -> None:
    scene = splat_oracle.scene(seed, count, cameras)
    options = {"antialiased": antialiased, "eps2d": eps2d, "radius_clip": clip}
    inputs, fast, plain = projections(scene, by, options)
    with torch.no_grad():
        float32 = {name: None if value is None else value.float() for name, value in inputs.items()}
        exact, found, rough = plain(**inputs), fast(**float32), plain(**float32)
    assert found[0].dtype == torch.int32
    # a radius may be wrong by a pixel, and with it whether the box reaches into the image
    seen = [(radii > 0).all(-1) for radii, *_ in (exact, found, rough)]
    everywhere = seen[0] & seen[1] & seen[2]
    assert not ((found[0] - exact[0]).abs() > 1)[everywhere].any()
    for (radii, means2d, *_), visible in zip((exact, found, rough), seen, strict=True):
        assert (barely_seen(radii, means2d, scene, clip) | everywhere | ~visible).all()
    weights = [
        (random(*out.shape, seed=i) + 0.1) * everywhere.view(cameras, count, *[1] * (out.ndim - 2))
        for i, out in enumerate(exact)
    ]
    compare(fast, plain, inputs, [0 * weights[0], *weights[1:]])


@pytest.mark.parametrize("factor", [1e-25, 1e-12, 1e12, 1e25])
def test_the_length_of_a_quaternion_or_direction_does_not_matter(factor: float) -> None:
    scene, dirs, coeffs = splat_oracle.scene(16, 20), random(20, 3) - 0.5, random(20, 16, 3)
    inputs, fast, _ = projections(scene, "quats", {})

    def both(times: float) -> dict[str, Tensor]:
        def outputs(quats: Tensor, dirs: Tensor, **kw: Any) -> list[Tensor]:
            colours = splat.spherical_harmonics(
                3, dirs * max(times, 1e-6), coeffs.float()
            )  # below 1e-12 it counts as 0
            return [*fast(quats=quats * times, **kw), colours]

        return run(outputs, inputs | {"dirs": dirs}, F32, [torch.zeros(1), *[torch.ones(1)] * 5])

    found = both(factor)
    for name, value in both(1.0).items():
        assert worst_row(found[name], value.double()) < 1e-4, name


@hypothesis.given(
    seed=seeds,
    degree=st.integers(0, 3),
    extra=st.integers(0, 2),
    dirs=st.sampled_from([(7,), (2, 7), (3, 2, 7), (0,), (2, 0), (1, 17)]),
    shared=st.booleans(),
    isa=st.sampled_from(ISAS),
)
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
def test_spherical_harmonics(seed: int, degree: int, extra: int, dirs: tuple, shared: bool, isa: str) -> None:
    count = (degree + 1) ** 2 + extra
    batch = dirs[-1:] if shared else dirs
    inputs: dict[str, Tensor | None] = {
        "dirs": 4 * random(*dirs, 3, seed=seed) - 2,
        "coeffs": random(*batch, count, 3, seed=seed + 1) - 0.5,
    }
    weights = [random(*dirs, 3, seed=seed + 2)]
    with mock.patch.dict(os.environ, KERNELS_ISA=isa):
        compare(
            lambda dirs, coeffs: (splat.spherical_harmonics(degree, dirs, coeffs),),
            lambda dirs, coeffs: (reference.spherical_harmonics(degree, dirs, coeffs),),
            inputs,
            weights,
        )


def test_spherical_harmonics_masked_and_along_no_direction() -> None:
    dirs, coeffs = (random(6, 3) - 0.5).float(), random(6, 16, 3, seed=1).float()
    dirs[1], dirs[2], coeffs[3] = 0, torch.nan, torch.nan
    masks = torch.tensor([True, True, False, False, True, False])
    dirs, coeffs = dirs.requires_grad_(), coeffs.requires_grad_()
    values = splat.spherical_harmonics(3, dirs, coeffs, masks)
    assert not values[~masks].any()
    torch.testing.assert_close(values[masks], reference.spherical_harmonics(3, dirs[masks], coeffs[masks]))
    values.sum().backward()
    assert dirs.grad is not None and coeffs.grad is not None
    assert not dirs.grad[~masks].any() and not coeffs.grad[~masks].any()
    assert not dirs.grad[1].any() and dirs.grad[0].all() and coeffs.grad.isfinite().all()
    assert coeffs.grad[1, :, 0].nonzero().flatten().tolist() == [0, 6]


@hypothesis.given(
    seed=seeds,
    count=st.integers(0, 80),
    cameras=st.integers(1, 2),
    size=st.tuples(st.integers(1, 50), st.integers(1, 40)),
    channels=st.sampled_from([1, 2, 3, 4, 7, 9, 40]),
    alpha_max=st.sampled_from([0.99, 0.999]),
    background=st.booleans(),
    antialiased=st.booleans(),
    isa=st.sampled_from(ISAS),
)
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
def test_rasterize(
    seed: int,
    count: int,
    cameras: int,
    size: tuple,
    channels: int,
    alpha_max: float,
    background: bool,
    antialiased: bool,
    isa: str,
) -> None:
    scene = splat_oracle.scene(seed, count, cameras, *size)
    backgrounds = random(cameras, channels, seed=2) if background else None
    inputs, fast, plain, smooth = rasterizers(
        scene, random(count, channels, seed=1), backgrounds, antialiased, alpha_max=alpha_max
    )
    with mock.patch.dict(os.environ, KERNELS_ISA=isa):
        compare(fast, plain, inputs, weights_of(smooth, channels, seed))


def test_the_comparison_sees_a_thousandth() -> None:
    scene = splat_oracle.scene(1, 40, 1)
    inputs, fast, plain, smooth = rasterizers(scene, random(40, 3), None, False)
    weights = weights_of(smooth, 3, 0)
    rough, exact = run(plain, inputs, F32, weights), run(plain, inputs, F64, weights)
    assert_as_good(run(fast, inputs, F32, weights), rough, exact)
    for name in ("means2d", "conics", "colors", "opacities"):
        changed = {
            key: None if value is None else value * (1.001 if key == name else 1) for key, value in inputs.items()
        }
        with pytest.raises(AssertionError, match="relative error"):
            assert_as_good(run(fast, changed, F32, weights), rough, exact)
        found = run(fast, inputs, F32, weights)
        found[f"d {name}"] *= 1.001
        with pytest.raises(AssertionError, match=f"d {name}: relative error"):
            assert_as_good(found, rough, exact)


@pytest.mark.parametrize("channels", [3, 9])
def test_rasterize_at_an_ordinary_size(channels: int) -> None:
    # 35 tiles, up to a hundred Gaussians on one another
    scene = splat_oracle.scene(3, 300, 1, 101, 70)
    inputs, fast, plain, smooth = rasterizers(scene, random(300, channels), random(1, channels, seed=1), False)
    assert smooth.double().mean() > 0.85
    weights = weights_of(smooth, channels, 0)
    rough, exact = run(plain, inputs, F32, weights), run(plain, inputs, F64, weights)
    for isa in ISAS:
        with mock.patch.dict(os.environ, KERNELS_ISA=isa):
            assert_as_good(run(fast, inputs, F32, weights), rough, exact, isa)
