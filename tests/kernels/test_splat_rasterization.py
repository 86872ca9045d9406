"""kernels.splat.rasterization: gsplat's call. Every mode against float64, packed against dense, batches one by one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import splat_oracle
import torch
from splat_compare import assert_as_good, random, run, weights_of
from torch import Tensor

from kernels.splat import rasterization, reference

F32, F64 = torch.float32, torch.float64
MODES = ("RGB", "D", "ED", "RGB+D", "RGB+ED")
seeds = st.integers(0, 2**16)


def rendering(scene: splat_oracle.Scene, **options: Any) -> Callable:
    """function(**tensors) -> (render, alphas), with the sizes of the scene."""
    size = {"width": scene.width, "height": scene.height}
    return lambda **tensors: rasterization(**tensors, **size, **options)[:2]


def tensors_of(scene: splat_oracle.Scene) -> dict[str, Tensor]:
    return {name: value for name, value in vars(scene).items() if isinstance(value, Tensor)}


def coefficients(count: int, degree: int, cameras: tuple = ()) -> Tensor:
    """Spherical harmonics of colours that no rounding moves across 0, every fifth of them below."""
    coeffs = (random(*cameras, count, (degree + 1) ** 2 + 1, 3, seed=degree) - 0.5) / 10
    coeffs[..., 0, :] += 1.5
    coeffs[..., ::5, 0, 0] = -5
    return coeffs


@hypothesis.given(
    seed=seeds,
    count=st.integers(0, 40),
    cameras=st.integers(1, 2),
    mode=st.sampled_from(MODES),
    channels=st.sampled_from([1, 2, 3, 4, 7, 9, 40]),
    degree=st.sampled_from([None, None, 0, 1, 2, 3]),
    each=st.booleans(),
    background=st.booleans(),
    by=st.sampled_from(["quats", "covars"]),
    packed=st.booleans(),
    antialiased=st.booleans(),
)
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
def test_every_mode(
    seed: int,
    count: int,
    cameras: int,
    mode: Any,
    channels: int,
    degree: int | None,
    each: bool,
    background: bool,
    by: str,
    packed: bool,
    antialiased: bool,
) -> None:
    scene = splat_oracle.scene(seed, count, cameras, 33, 18)
    views = (cameras,) if each else ()
    channels = channels if degree is None else 3
    inputs: dict[str, Tensor | None] = dict(tensors_of(scene))
    inputs["colors"] = random(*views, count, channels) if degree is None else coefficients(count, degree, views)
    inputs["backgrounds"] = random(cameras, channels, seed=1) if background else None
    items = splat_oracle.items(scene, torch.zeros(count, 1), antialiased)
    if by == "covars":
        inputs |= {"quats": None, "scales": None, "covars": splat_oracle.covariances(scene)}
    kind = "antialiased" if antialiased else "classic"
    function = rendering(scene, render_mode=mode, sh_degree=degree, packed=packed, rasterize_mode=kind)
    smooth = ~splat_oracle.kinks(items, scene.width, scene.height)
    depth = {"RGB": 0, "D": 1, "ED": 1}.get(mode, 1)
    weights = weights_of(smooth, (channels if "RGB" in mode else 0) + depth, seed)
    found = run(function, inputs, F32, weights)
    exact = run(function, inputs, F64, weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERNELS_BACKEND", "reference")
        rough = run(function, inputs, F32, weights)
    # D / alpha hardly depends on the opacity: its gradient is a difference of two that all but cancel
    assert_as_good(found, rough, exact, little=2e-3 if "ED" in mode else 2e-4)


def test_gradients_reach_everything() -> None:
    scene = splat_oracle.scene(1, 40, 2)
    inputs = tensors_of(scene) | {"colors": coefficients(40, 3), "backgrounds": random(2, 3)}
    weights = [random(2, scene.height, scene.width, 4), random(2, scene.height, scene.width, 1)]
    function = rendering(scene, render_mode="RGB+ED", sh_degree=3, rasterize_mode="antialiased")
    found = run(function, inputs, F32, weights)
    for name in inputs:
        assert found[f"d {name}"].any() == (name != "Ks"), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("degree", [None, 2])
def test_it_is_its_stages_put_together_by_hand(mode: Any, degree: int | None) -> None:
    scene = splat_oracle.scene(6, 30, 2)
    inputs = tensors_of(scene) | {"backgrounds": random(2, 3)}
    inputs["colors"] = random(30, 3) if degree is None else coefficients(30, 2)

    def by_hand(colors: Tensor, backgrounds: Tensor, **kw: Tensor) -> tuple[Tensor, Tensor]:
        size = {"width": scene.width, "height": scene.height}
        radii, means2d, depths, conics, factors = reference.projection(**kw, **size, antialiased=True)
        images = []
        for c, view in enumerate(kw["viewmats"]):
            # the camera stands where R x + t = 0
            eye = -torch.linalg.solve(view[:3, :3], view[:3, 3])
            seen = colors
            if degree is not None:
                seen = (reference.spherical_harmonics(degree, kw["means"] - eye, colors) + 0.5).clamp(min=0)
            values, back = seen, backgrounds[c]
            if "D" in mode:
                values, back = torch.cat([seen, depths[c, :, None]], -1), torch.cat([back, torch.zeros(1, dtype=F64)])
            if "RGB" not in mode:
                values, back = values[:, -1:], back[-1:]
            flat = (means2d[c], conics[c], values, kw["opacities"] * factors[c], radii[c], depths[c])
            image, alphas = reference.rasterize(*flat, torch.tensor([0, 30]), back[None], **size)
            if "ED" in mode:
                image = torch.cat([image[..., :-1], image[..., -1:] / alphas.clamp(min=1e-10)], -1)
            images.append((image[0], alphas[0]))
        render, alphas = zip(*images, strict=True)
        return torch.stack(render), torch.stack(alphas)

    channels = {"RGB": 3, "D": 1, "ED": 1}.get(mode, 4)
    weights = weights_of(torch.ones(2, scene.height, scene.width, dtype=torch.bool), channels, 0)
    function = rendering(scene, render_mode=mode, sh_degree=degree, rasterize_mode="antialiased")
    found, expected = run(function, inputs, F64, weights), run(by_hand, inputs, F64, weights)
    for name, value in expected.items():
        ours = found[name]
        if name == "d viewmats":  # the last row is (0, 0, 0, 1) and no parameter
            ours, value = ours[:, :3], value[:, :3]
        torch.testing.assert_close(ours, value, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("degree", [None, 2])
def test_packed_is_dense(degree: int | None) -> None:
    scene = splat_oracle.scene(2, 60, 3).to(F32)
    results = []
    for packed in (False, True):
        leaves = {name: value.clone().requires_grad_() for name, value in tensors_of(scene).items() if name != "Ks"}
        leaves["colors"] = (random(60, 5) if degree is None else coefficients(60, 2)).float().requires_grad_()
        render, alphas, meta = rasterization(
            **leaves,
            Ks=scene.Ks,
            width=scene.width,
            height=scene.height,
            sh_degree=degree,
            packed=packed,
            absgrad=True,
            render_mode="RGB+ED",
        )
        meta["means2d"].retain_grad()
        (render.square().sum() + alphas.sum()).backward()
        results.append((render, alphas, meta, leaves))
    (render, alphas, dense, leaves), (render2, alphas2, packed, leaves2) = results
    assert torch.equal(render, render2) and torch.equal(alphas, alphas2)
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, leaves2[name].grad, rtol=1e-5, atol=1e-6, msg=name)
    cameras, ids = (dense["radii"] > 0).all(-1).nonzero(as_tuple=True)
    assert torch.equal(packed["camera_ids"], cameras) and torch.equal(packed["gaussian_ids"], ids)
    assert not packed["batch_ids"].any() and dense["gaussian_ids"] is dense["camera_ids"] is dense["batch_ids"] is None
    for name in ("radii", "means2d", "depths", "conics", "opacities", "tiles_per_gauss"):
        assert torch.equal(packed[name], dense[name][cameras, ids]), name
    assert torch.equal(packed["isect_ids"], dense["isect_ids"])
    assert torch.equal(packed["isect_offsets"], dense["isect_offsets"])
    flat = cameras * 60 + ids
    assert torch.equal(flat[packed["flatten_ids"].long()], dense["flatten_ids"].long())
    for values, others in (
        (packed["means2d"].grad, dense["means2d"].grad),
        (packed["means2d"].absgrad, dense["means2d"].absgrad),
    ):
        assert values.shape == (len(ids), 2) and others.shape == (3, 60, 2)
        assert torch.equal(values, others[cameras, ids])
    absolute, gradient = packed["means2d"].absgrad, packed["means2d"].grad.abs()
    assert (absolute > gradient * (1 - 1e-4) - 1e-5).all() and (absolute > 2 * gradient).any()


def test_cameras_together_are_cameras_one_by_one() -> None:
    scene, coeffs = splat_oracle.scene(3, 50, 3).to(F32), coefficients(50, 1).float()
    backgrounds = random(3, 3).float()
    function = rendering(scene, sh_degree=1)
    render, alphas = function(**tensors_of(scene), colors=coeffs, backgrounds=backgrounds)
    for i in range(3):
        one = replace(scene, viewmats=scene.viewmats[i : i + 1], Ks=scene.Ks[i : i + 1])
        found = function(**tensors_of(one), colors=coeffs, backgrounds=backgrounds[i : i + 1])
        assert torch.equal(found[0][0], render[i]) and torch.equal(found[1][0], alphas[i])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("degree", [None, 1])
def test_batches_are_their_scenes_one_by_one(packed: bool, degree: int | None) -> None:
    scenes = [splat_oracle.scene(seed, 20, 2).to(F32) for seed in range(6)]
    colors = (random(6, 20, 3) if degree is None else torch.stack([coefficients(20, 1)] * 6)).float()
    backgrounds = random(6, 2, 3).float()
    names = list(tensors_of(scenes[0]))
    batch = {name: torch.stack([getattr(scene, name) for scene in scenes]).unflatten(0, (2, 3)) for name in names}
    batch |= {"colors": colors.unflatten(0, (2, 3)), "backgrounds": backgrounds.unflatten(0, (2, 3))}
    size = {"width": scenes[0].width, "height": scenes[0].height, "packed": packed, "sh_degree": degree}
    size["render_mode"] = "RGB+D"
    render, alphas, meta = rasterization(**batch, **size)
    assert render.shape == (2, 3, 2, *render.shape[3:5], 4) and alphas.shape == (*render.shape[:-1], 1)
    assert (meta["n_batches"], meta["n_cameras"]) == (6, 2)
    assert meta["isect_offsets"].shape == (2, 3, 2, meta["tile_height"], meta["tile_width"])
    if packed:
        assert meta["batch_ids"].unique().tolist() == list(range(6))
    else:
        assert meta["radii"].shape == (2, 3, 2, 20, 2) and meta["depths"].shape == (2, 3, 2, 20)
    for i, scene in enumerate(scenes):
        alone = rasterization(**tensors_of(scene), colors=colors[i], backgrounds=backgrounds[i], **size)
        assert torch.equal(render.flatten(0, 1)[i], alone[0]) and torch.equal(alphas.flatten(0, 1)[i], alone[1])
        mine = meta["batch_ids"] == i if packed else None
        for name in ("radii", "means2d", "depths", "conics", "opacities"):
            found = meta[name][mine] if packed else meta[name].flatten(0, 1)[i]
            assert torch.equal(found, alone[2][name]), name


@pytest.mark.parametrize("packed", [False, True])
def test_absgrad_of_a_batch_has_the_shape_of_its_means(packed: bool) -> None:
    scene = splat_oracle.scene(4, 20, 2).to(F32)
    batch = {name: torch.stack([value, value]).requires_grad_() for name, value in tensors_of(scene).items()}
    batch["Ks"] = batch["Ks"].detach()
    colors = random(2, 20, 3).float()
    render, _, meta = rasterization(
        **batch, colors=colors, width=scene.width, height=scene.height, packed=packed, absgrad=True
    )
    render.square().sum().backward()
    assert meta["means2d"].absgrad.shape == meta["means2d"].shape and meta["means2d"].absgrad.any()


def test_meta_has_what_gsplat_s_has() -> None:
    scene = splat_oracle.scene(5, 30, 2, 37, 21).to(F32)
    *_, meta = rasterization(**tensors_of(scene), colors=random(30, 3).float(), width=37, height=21)
    expected = """batch_ids camera_ids gaussian_ids radii means2d depths conics opacities tile_width tile_height
        tiles_per_gauss isect_ids flatten_ids isect_offsets width height tile_size n_batches n_cameras"""
    assert sorted(meta) == sorted(expected.split())
    assert (meta["width"], meta["height"], meta["tile_size"]) == (37, 21, 16)
    assert (meta["tile_width"], meta["tile_height"], meta["n_batches"], meta["n_cameras"]) == (3, 2, 1, 2)
    assert int(meta["tiles_per_gauss"].sum()) == len(meta["flatten_ids"]) == len(meta["isect_ids"])


def test_the_signature_is_gsplat_s() -> None:
    gsplat = pytest.importorskip("gsplat", reason="gsplat, whose signature it is, is not installed")
    ours = inspect.signature(rasterization).parameters
    theirs = inspect.signature(gsplat.rasterization).parameters
    shared = [name for name in ours if name in theirs]
    assert [name for name in theirs if name in ours] == shared
    assert shared[:24] == list(theirs)[:24], "positional arguments move"
    for name in shared:
        assert ours[name].default == theirs[name].default, name


def test_a_wall_has_its_depth() -> None:
    # one opaque Gaussian, 1000 wide, 3 before the camera: D is alpha times depth, ED the depth
    means = torch.tensor([[0.0, 0, 3]])
    scale, quat = torch.tensor([[1e3, 1e3, 1e-3]]), torch.tensor([[1.0, 0, 0, 0]])
    K = torch.tensor([[[20.0, 0, 10], [0, 20, 8], [0, 0, 1]]])
    colors, view = torch.tensor([[0.2, 0.4, 0.6]]), torch.eye(4)[None]
    arguments = (means, quat, scale, torch.tensor([0.8]), colors, view, K, 20, 16)
    for mode, expected in (("D", [2.4]), ("ED", [3.0]), ("RGB+D", [0.16, 0.32, 0.48, 2.4])):
        render, alphas, _ = rasterization(*arguments, render_mode=mode)
        torch.testing.assert_close(render, torch.tensor(expected).expand(1, 16, 20, -1), rtol=1e-4, atol=0)
        torch.testing.assert_close(alphas, torch.full((1, 16, 20, 1), 0.8), rtol=1e-4, atol=0)
    opaque = (*arguments[:3], torch.ones(1), *arguments[4:])
    torch.testing.assert_close(rasterization(*opaque)[1].max(), torch.tensor(0.999))
    torch.testing.assert_close(rasterization(*opaque, alpha_max=0.9)[1].max(), torch.tensor(0.9))
    # nothing there: no depth, and not a number neither
    behind = (-means, *arguments[1:])
    for mode in MODES:
        render, alphas, _ = rasterization(
            *behind, render_mode=mode, backgrounds=torch.ones(1, 3) if "RGB" in mode else None
        )
        assert not alphas.any() and render[..., :3].unique().tolist() == ([1.0] if "RGB" in mode else [0.0])
        assert mode not in ("RGB+D", "RGB+ED") or not render[..., 3].any()


@pytest.mark.parametrize("packed", [False, True])
def test_no_gaussians_and_none_in_view(packed: bool) -> None:
    backgrounds = random(2, 3).float().requires_grad_()
    for count in (0, 1):  # the only one is behind the camera
        scene = replace(splat_oracle.scene(0, count, 1).to(F32))
        leaves = {name: value.clone().requires_grad_() for name, value in tensors_of(scene).items()}
        leaves |= {name: leaves[name].detach().repeat(2, 1, 1).requires_grad_() for name in ("viewmats", "Ks")}
        colors = torch.zeros(count, 4, 3, requires_grad=True)
        render, alphas, meta = rasterization(
            **leaves,
            colors=colors,
            backgrounds=backgrounds,
            width=20,
            height=3,
            sh_degree=1,
            packed=packed,
            render_mode="RGB+ED",
        )
        assert torch.equal(render[..., :3], backgrounds[:, None, None].expand(2, 3, 20, 3)) and not alphas.any()
        (render.sum() + alphas.sum()).backward()
        assert len(meta["flatten_ids"]) == 0
        for name, leaf in (leaves | {"colors": colors}).items():
            assert leaf.grad is None or not leaf.grad.any(), name
    torch.testing.assert_close(backgrounds.grad, torch.full((2, 3), 120.0))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("degree", [None, 3])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_broken_gaussians_spoil_nothing(packed: bool, degree: int | None, backend: str, monkeypatch) -> None:
    monkeypatch.setenv("KERNELS_BACKEND", backend)
    scene = splat_oracle.scene(8, 60, 2).to(F32)
    colors = (random(60, 4) if degree is None else coefficients(60, 3)).float()
    names = ("means", "quats", "scales", "opacities")
    whole = replace(scene, **{name: getattr(scene, name)[12:].clone() for name in names})
    faults = splat_oracle.break_some(scene)
    colors[:12:2] = torch.nan
    mode = "RGB" if degree is None else "RGB+ED"
    function = rendering(scene, sh_degree=degree, packed=packed, render_mode=mode, rasterize_mode="antialiased")
    weights = weights_of(torch.ones(2, scene.height, scene.width, dtype=torch.bool), 4, 0)
    found = run(function, tensors_of(scene) | {"colors": colors}, F32, weights)
    expected = run(function, tensors_of(whole) | {"colors": colors[12:]}, F32, weights)
    assert all(value.any() for name, value in expected.items() if name != "d Ks")
    for name, value in expected.items():
        ours = found[name]
        if name in ("d means", "d quats", "d scales", "d opacities", "d colors"):
            for i, fault in faults.items():
                assert not ours[i].any(), f"{name} of a Gaussian with {fault}"
            ours = ours[12:]
        torch.testing.assert_close(ours, value, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
