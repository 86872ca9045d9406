"""The specification of kernels.splat: images. Oracles: a loop over pixels, finite differences, a closed form, laws."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import splat_oracle
import torch
from torch import Tensor

from kernels.splat import reference

F64 = torch.float64
seeds = st.integers(0, 2**16)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=splat_oracle.generator(seed), dtype=F64)


def render(
    scene: splat_oracle.Scene, colors: Tensor, background: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    items = splat_oracle.items(scene, colors).values()
    backgrounds = None if background is None else background.expand(len(scene.viewmats), -1)
    return reference.rasterize(*items, backgrounds, scene.width, scene.height, **options)


@pytest.mark.parametrize("background", [False, True])
def test_gradients_of_rasterize(background: bool) -> None:
    scene = splat_oracle.scene(5, 14, 2, width=11, height=7)
    items = splat_oracle.items(scene, random(14, 2))
    smooth = ~splat_oracle.kinks(items, 11, 7)[..., None]
    assert smooth.double().mean() > 0.8
    names = ("means2d", "conics", "colors", "opacities")
    rest = [items[name] for name in ("radii", "depths", "first")]
    backgrounds = random(2, 2, seed=1).requires_grad_() if background else None

    def outputs(*inputs: Tensor) -> tuple[Tensor, ...]:
        image, alphas = reference.rasterize(*inputs[:4], *rest, *(inputs[4:] or [None]), 11, 7)
        return image * smooth, alphas * smooth

    inputs = [items[name].clone().requires_grad_() for name in names]
    inputs += [] if backgrounds is None else [backgrounds]
    (outputs(*inputs)[0].square().sum()).backward()
    assert all(t.grad is not None and t.grad.any() for t in inputs), "nothing to check"
    assert torch.autograd.gradcheck(outputs, inputs)


def test_a_clipped_alpha_passes_the_gradient_of_the_colour_alone() -> None:
    mean, conic = torch.tensor([[0.5, 0.5]], dtype=F64), torch.tensor([[1.0, 0.0, 1.0]], dtype=F64)
    inputs = [mean, conic, random(1, 3), torch.ones(1, dtype=F64)]
    inputs = [t.requires_grad_() for t in inputs]
    rest = torch.tensor([[4, 4]]), torch.ones(1, dtype=F64), torch.tensor([0, 1])
    image, alphas = reference.rasterize(*inputs, *rest, None, 1, 1, alpha_max=0.99)
    (image.sum() + alphas.sum()).backward()
    torch.testing.assert_close(alphas.flatten(), torch.tensor([0.99], dtype=F64))
    torch.testing.assert_close(inputs[2].grad, torch.full((1, 3), 0.99, dtype=F64))
    assert all(t.grad is not None and not t.grad.any() for t in (*inputs[:2], inputs[3]))


@hypothesis.given(
    seed=seeds,
    count=st.integers(0, 40),
    cameras=st.integers(1, 2),
    size=st.tuples(st.integers(1, 21), st.integers(1, 9)),
    tile_size=st.sampled_from([4, 16]),
    alpha_max=st.sampled_from([0.99, 0.999]),
    background=st.booleans(),
)
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
def test_rasterize_agrees_with_a_loop_over_pixels(
    seed: int, count: int, cameras: int, size: tuple, tile_size: int, alpha_max: float, background: bool
) -> None:
    scene = splat_oracle.scene(seed, count, cameras, *size)
    items = splat_oracle.items(scene, random(count, 3))
    backgrounds = random(cameras, 3, seed=1) if background else None
    found = reference.rasterize(*items.values(), backgrounds, *size, alpha_max=alpha_max, tile_size=tile_size)
    expected = splat_oracle.blend_pixel_by_pixel(items, backgrounds, *size, alpha_max, tile_size)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


def stack_of_opaque_gaussians(count: int = 30) -> dict[str, Tensor]:
    """Wide Gaussians of opacity 0.3 on one another: T falls below 1e-4 after 25 of them."""
    return {
        "means2d": torch.full((count, 2), 4.0, dtype=F64),
        "conics": torch.tensor([[1e-4, 0.0, 1e-4]], dtype=F64).repeat(count, 1),
        "colors": torch.arange(1.0, count + 1, dtype=F64)[:, None],
        "opacities": torch.full((count,), 0.3, dtype=F64),
        "radii": torch.full((count, 2), 300),
        "depths": torch.arange(count, dtype=F64),
        "first": torch.tensor([0, count]),
    }


def test_a_pixel_ends_before_the_gaussian_that_would_darken_it() -> None:
    items = stack_of_opaque_gaussians()
    items["conics"] *= 1e-12  # alpha is 0.3 everywhere
    image, alphas = reference.rasterize(*items.values(), None, 8, 8)
    drawn = 25  # 0.7^25 = 1.3e-4, 0.7^26 = 0.9e-4
    torch.testing.assert_close(alphas, torch.full_like(alphas, 1 - 0.7**drawn), rtol=0, atol=1e-14)
    expected = sum(0.3 * 0.7**k * (k + 1) for k in range(drawn))
    torch.testing.assert_close(image, torch.full_like(image, expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("change", ["opacities", "conics", "means2d", "depths", "radii"])
def test_the_loop_over_pixels_sees_every_input(change: str) -> None:
    scene = splat_oracle.scene(1, 40, 1, 20, 9)
    items = splat_oracle.items(scene, random(40, 3))
    exact, _ = splat_oracle.blend_pixel_by_pixel(items, None, 20, 9, 0.999, 4)
    other: dict[str, Callable[[Tensor], Tensor]] = {
        "opacities": lambda t: t * 0.99,
        "conics": lambda t: t * torch.tensor([1.0, -1.0, 1.0], dtype=F64),
        "means2d": lambda t: t + 0.5,
        "depths": lambda t: -t,
        "radii": lambda t: (t / 4).int(),
    }
    found, _ = reference.rasterize(*(items | {change: other[change](items[change])}).values(), None, 20, 9, tile_size=4)
    assert (found - exact).abs().max() > 1e-3


@hypothesis.given(seed=seeds, count=st.integers(1, 30))
@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
def test_the_order_of_the_gaussians_does_not_matter(seed: int, count: int) -> None:
    scene, colors = splat_oracle.scene(seed, count, 2), random(count, 3)
    order = torch.randperm(count, generator=splat_oracle.generator(seed))
    names = ("means", "quats", "scales", "opacities")
    shuffled = replace(scene, **{name: getattr(scene, name)[order] for name in names})
    for ours, theirs in zip(render(scene, colors), render(shuffled, colors[order]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_equal_depths_keep_the_order_of_the_input() -> None:
    items = stack_of_opaque_gaussians(6)
    items["depths"] = torch.tensor([2.0, 1.0, 2.0, 1.0, 1.0, 2.0], dtype=F64)
    found, _ = reference.rasterize(*items.values(), None, 8, 8)
    sorted_items = items | {"depths": torch.tensor([3.0, 0, 4, 1, 2, 5], dtype=F64)}
    assert torch.equal(found, reference.rasterize(*sorted_items.values(), None, 8, 8)[0])
    other = items | {"depths": torch.tensor([3.0, 1, 4, 0, 2, 5], dtype=F64)}
    assert not torch.allclose(found, reference.rasterize(*other.values(), None, 8, 8)[0])


def product(p: Tensor, q: Tensor) -> Tensor:
    """Quaternions multiplied: first q, then p."""
    vector = p[..., :1] * q[..., 1:] + q[..., :1] * p[..., 1:] + torch.linalg.cross(p[..., 1:], q[..., 1:])
    return torch.cat([p[..., :1] * q[..., :1] - (p[..., 1:] * q[..., 1:]).sum(-1, keepdim=True), vector], -1)


@hypothesis.given(seed=seeds)
@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
def test_moving_the_world_and_the_cameras_together_changes_nothing(seed: int) -> None:
    scene, colors = splat_oracle.scene(seed, 20, 2), random(20, 3)
    axis = torch.nn.functional.normalize(random(3, seed=seed) - 0.5, dim=0)
    angle, shift = 2.0, torch.tensor([0.3, -1.0, 2.0], dtype=F64)
    quaternion = torch.cat([torch.tensor([math.cos(angle / 2)], dtype=F64), math.sin(angle / 2) * axis])
    x, y, z = axis.tolist()
    rotation = torch.linalg.matrix_exp(angle * torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=F64))
    pose = torch.eye(4, dtype=F64)
    pose[:3, :3], pose[:3, 3] = rotation, shift
    moved = replace(
        scene,
        means=scene.means @ rotation.T + shift,
        quats=product(quaternion.expand_as(scene.quats), scene.quats),
        viewmats=scene.viewmats @ torch.linalg.inv(pose),
    )
    for ours, theirs in zip(render(scene, colors), render(moved, colors), strict=True):
        # but for pixels that a last bit decides
        smooth = ~splat_oracle.kinks(splat_oracle.items(scene, colors), scene.width, scene.height)
        torch.testing.assert_close(ours[smooth], theirs[smooth], rtol=0, atol=1e-9)


@pytest.mark.parametrize("by", [(16, 0), (0, 16), (16, 32), (5, 3)])
def test_moving_the_principal_point_by_whole_pixels_moves_the_image(by: tuple[int, int]) -> None:
    scene, colors = splat_oracle.scene(2, 30, 1, 60, 50), random(30, 3)
    # no Gaussian near the border: what comes into view there is no part of the law
    items = splat_oracle.items(scene, colors)
    moved = items | {"means2d": items["means2d"] + torch.tensor(by, dtype=F64)}
    image, alphas = reference.rasterize(*items.values(), None, 60, 50)
    found, found_alphas = reference.rasterize(*moved.values(), None, 60, 50)
    right, down = by
    for before, after in ((image, found), (alphas, found_alphas)):
        torch.testing.assert_close(after[:, down:, right:], before[:, : 50 - down, : 60 - right], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (15, 16), (17, 33), (37, 5)])
def test_a_smaller_image_is_a_part_of_a_larger_one(width: int, height: int) -> None:
    scene, colors = splat_oracle.scene(4, 30, 2, 48, 48), random(30, 3)
    items = splat_oracle.items(scene, colors).values()
    backgrounds = random(2, 3, seed=1)
    whole = reference.rasterize(*items, backgrounds, 48, 48)
    part = reference.rasterize(*items, backgrounds, width, height)
    for large, small in zip(whole, part, strict=True):
        assert torch.equal(large[:, :height, :width], small)


def test_nothing_in_view_is_the_background() -> None:
    scene, backgrounds = splat_oracle.scene(0, 0, 2, 20, 3), random(2, 3)
    assert [t.shape for t in splat_oracle.project(scene).values()] == [(2, 0, 2), (2, 0, 2), (2, 0), (2, 0, 3), (2, 0)]
    image, alphas = reference.rasterize(
        *splat_oracle.items(scene, random(0, 3)).values(), backgrounds.requires_grad_(), 20, 3
    )
    assert torch.equal(image, backgrounds[:, None, None].expand(2, 3, 20, 3)) and not alphas.any()
    image.sum().backward()
    torch.testing.assert_close(backgrounds.grad, torch.full((2, 3), 60.0, dtype=F64))
    image, alphas = render(scene, random(0, 3))
    assert not image.any() and not alphas.any()


def test_one_gaussian_in_closed_form() -> None:
    # a ball of 0.5 at depth 2 before a camera of focal length 8, at pixel (9, 5): on the axis nothing is distorted
    means, quats = torch.tensor([[0.0, 0, 2]], dtype=F64), torch.tensor([[2.0, 0, 0, 0]], dtype=F64)
    K = torch.tensor([[[8.0, 0, 9], [0, 8, 5], [0, 0, 1]]], dtype=F64)
    variance = (8 * 0.5 / 2) ** 2 + 0.3
    half, opacity = torch.full((1, 3), 0.5, dtype=F64), torch.full((1,), 0.6, dtype=F64)
    scene = splat_oracle.Scene(means, quats, half, opacity, torch.eye(4, dtype=F64)[None], K, 20, 12)
    out = splat_oracle.project(scene, antialiased=True)
    rho = (variance - 0.3) / variance
    radius = math.ceil(math.sqrt(2 * math.log(255 * 0.6 * rho) * variance))
    assert out["radii"].tolist() == [[[radius, radius]]] and out["radii"].dtype == torch.int32
    assert out["means2d"].tolist() == [[[9.0, 5.0]]] and out["depths"].tolist() == [[2.0]]
    torch.testing.assert_close(out["conics"], torch.tensor([[[1 / variance, 0, 1 / variance]]], dtype=F64))
    torch.testing.assert_close(out["compensations"], torch.tensor([[rho]], dtype=F64))
    image, alphas = render(scene, torch.ones(1, 1, dtype=F64), torch.full((1,), 0.25, dtype=F64))
    y, x = torch.meshgrid(torch.arange(12) + 0.5, torch.arange(20) + 0.5, indexing="ij")
    alpha = 0.6 * torch.exp(-((x - 9) ** 2 + (y - 5) ** 2).double() / 2 / variance)
    alpha = torch.where(alpha >= 1 / 255, alpha, 0)
    torch.testing.assert_close(alphas[0, ..., 0], alpha, rtol=0, atol=1e-14)
    torch.testing.assert_close(image[0, ..., 0], alpha + (1 - alpha) * 0.25, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_broken_gaussians_are_culled_and_spoil_nothing(dtype: torch.dtype) -> None:
    scene, colors = splat_oracle.scene(8, 40, 2).to(dtype), random(40, 3).to(dtype)
    whole = replace(scene, **{n: getattr(scene, n)[12:].clone() for n in ("means", "quats", "scales")})
    whole = replace(whole, opacities=scene.opacities[12:].clone())
    faults = splat_oracle.break_some(scene)

    def gradients(scene: splat_oracle.Scene, colors: Tensor) -> tuple[Tensor, list[Tensor]]:
        leaves = {n: getattr(scene, n).clone().requires_grad_() for n in ("means", "quats", "scales", "viewmats")}
        scene = replace(scene, **leaves)
        items = splat_oracle.items(scene, colors, antialiased=True)
        image, alphas = reference.rasterize(*items.values(), None, scene.width, scene.height)
        (image.square().sum() + alphas.sum()).backward()
        return image.detach(), [leaf.grad for leaf in leaves.values() if leaf.grad is not None]

    out = splat_oracle.project(scene, antialiased=True)
    for i, fault in faults.items():
        assert not any(values[:, i].any() for values in out.values()), fault
    image, found = gradients(scene, colors)
    expected_image, expected = gradients(whole, colors[12:])
    torch.testing.assert_close(image, expected_image)
    assert len(found) == len(expected) == 4
    for ours, theirs in zip(found[:3], expected[:3], strict=True):
        assert not ours[:12].any()
        assert torch.equal(ours[12:], theirs) and theirs.any()
    torch.testing.assert_close(found[3], expected[3])


def test_items_that_are_broken_are_not_drawn() -> None:
    scene = splat_oracle.scene(11, 30)
    items = splat_oracle.items(scene, random(30, 3))
    seen = (items["radii"] > 0).all(-1).nonzero()[:6, 0]
    without = items | {"radii": items["radii"].clone()}
    without["radii"][seen] = 0
    expected, _ = reference.rasterize(*without.values(), None, scene.width, scene.height)
    names = ("means2d", "conics", "opacities", "depths")
    for i, name in zip(seen, names, strict=False):
        items[name] = items[name].clone()
        items[name][i] = float("nan")
    items["conics"][seen[4], 1] = 2 * items["conics"][seen[4]].max()  # a saddle
    items["conics"][seen[5]] *= -1
    leaves = {name: items[name].requires_grad_() for name in names[:3]}
    found, _ = reference.rasterize(*items.values(), None, scene.width, scene.height)
    assert torch.equal(found, expected)
    found.square().sum().backward()
    for leaf in leaves.values():
        assert leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad.any() and not leaf.grad[seen].any()
