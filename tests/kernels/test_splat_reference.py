"""The specification of kernels.splat: projection, colours, relocation. Oracles: gsplat's torch, differences, laws."""

from __future__ import annotations

import math
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


def gsplat_torch() -> Any:
    return pytest.importorskip("gsplat.cuda._torch_impl", reason="gsplat, the oracle here, is not installed")


@hypothesis.given(seed=seeds, count=st.integers(1, 30), cameras=st.integers(1, 3))
@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
def test_projection_agrees_with_gsplat(seed: int, count: int, cameras: int) -> None:
    gsplat = gsplat_torch()
    scene = splat_oracle.scene(seed, count, cameras)
    covars, _ = gsplat._quat_scale_to_covar_preci(scene.quats, scene.scales, compute_preci=False)
    shape = (scene.viewmats, scene.Ks, scene.width, scene.height)
    theirs = gsplat._fully_fused_projection(scene.means, covars, *shape, calc_compensations=True)
    by_covars = (scene.means, None, None, scene.opacities, *shape)
    for ours in (
        reference.projection(*scene.arguments(), antialiased=True),
        reference.projection(*by_covars, antialiased=True, covars=covars),
    ):
        # radii have other rules: a circle of three sigmas in gsplat 1.4, the newest whose torch code runs anywhere
        seen = (ours[0] > 0).all(-1)
        for name, found, expected in zip(splat_oracle.PROJECTED[1:], ours[1:], theirs[1:], strict=True):
            # the same formulas in float64; conics reach 1 / 0.3, means2d some hundred pixels
            torch.testing.assert_close(found[seen], expected[seen], rtol=1e-9, atol=1e-9, msg=name)
            assert not found[~seen].any(), name


@pytest.mark.parametrize("degree", range(4))
def test_spherical_harmonics_agree_with_gsplat(degree: int) -> None:
    gsplat = gsplat_torch()
    dirs, coeffs = random(50, 3) - 0.5, random(50, 16, 3, seed=1) - 0.5
    # their constants have 7 to 10 digits
    torch.testing.assert_close(
        reference.spherical_harmonics(degree, dirs, coeffs),
        gsplat._spherical_harmonics(degree, dirs, coeffs),
        rtol=0,
        atol=1e-6,
    )


def test_spherical_harmonics_are_orthonormal() -> None:
    # exact quadrature on the sphere for degree 3 + 3: seven even steps around, Gauss's four nodes in z
    nodes = torch.tensor([-0.8611363115940526, -0.3399810435848563, 0.3399810435848563, 0.8611363115940526], dtype=F64)
    weights = torch.tensor([0.3478548451374538, 0.6521451548625461, 0.6521451548625461, 0.3478548451374538], dtype=F64)
    around = torch.arange(7, dtype=F64) * 2 * math.pi / 7
    z, phi = (t.flatten() for t in torch.meshgrid(nodes, around, indexing="ij"))
    flat = (1 - z**2).sqrt()
    dirs = torch.stack([flat * phi.cos(), flat * phi.sin(), z], -1)  # [28, 3]
    coeffs = torch.eye(16, dtype=F64)[:, None, :, None].expand(16, 1, 16, 3)  # each function by itself
    values = reference.spherical_harmonics(3, dirs, coeffs)[..., 0]  # [16, 28]
    products = (values * weights.repeat_interleave(7) * 2 * math.pi / 7) @ values.T
    torch.testing.assert_close(products, torch.eye(16, dtype=F64), rtol=0, atol=1e-12)


def test_spherical_harmonics_broadcast_and_read_no_more_than_their_degree() -> None:
    dirs, coeffs = random(2, 1, 5, 3) - 0.5, random(4, 5, 16, 3, seed=1)
    for degree in range(4):
        count = (degree + 1) ** 2
        values = reference.spherical_harmonics(degree, dirs, coeffs)
        assert values.shape == (2, 4, 5, 3)
        same = reference.spherical_harmonics(degree, 7 * dirs, coeffs[..., :count, :])
        torch.testing.assert_close(values, same, rtol=0, atol=1e-14)
        with pytest.raises(ValueError, match=rf"degree {degree} needs \[..., K >= {count}, 3\]"):
            reference.spherical_harmonics(degree, dirs, coeffs[..., : count - 1, :])
    for degree in (-1, 4, 1.5):
        with pytest.raises(ValueError, match="expected 0, 1, 2 or 3"):
            reference.spherical_harmonics(degree, dirs, coeffs)  # type: ignore[arg-type]


def test_a_zero_direction_has_a_value_and_no_gradient() -> None:
    dirs, coeffs = torch.zeros(2, 3, dtype=F64), random(2, 16, 3).requires_grad_()
    dirs[1, 0] = 1
    dirs.requires_grad_()
    values = reference.spherical_harmonics(3, dirs, coeffs)
    values.sum().backward()
    assert values.isfinite().all() and coeffs.grad is not None and coeffs.grad.isfinite().all()
    assert dirs.grad is not None and not dirs.grad[0].any() and dirs.grad[1].any()
    # even functions alone are not 0 there: the constant one and 3 z^2 - 1
    assert coeffs.grad[0, :, 0].nonzero().flatten().tolist() == [0, 6]


@pytest.mark.parametrize("antialiased", [False, True])
@pytest.mark.parametrize("by", ["quats", "covars"])
def test_gradients_of_the_projection(antialiased: bool, by: str) -> None:
    scene = splat_oracle.scene(3, 12, 2)
    seen = (splat_oracle.project(scene, antialiased=antialiased)["radii"] > 0).all(-1)
    assert seen.any() and not seen.all(), "the scene should have both"
    # covariances through a factor of theirs: they are small, and curved on the scale of a finite difference
    factors = torch.linalg.cholesky(reference._covariances(scene.quats, scene.scales))

    def outputs(means: Tensor, shape: Tensor, scales: Tensor, viewmats: Tensor) -> tuple[Tensor, ...]:
        quats = shape if by == "quats" else None
        return reference.projection(
            means,
            quats,
            None if quats is None else scales,
            scene.opacities,
            viewmats,
            scene.Ks,
            scene.width,
            scene.height,
            antialiased=antialiased,
            covars=None if by == "quats" else shape @ shape.mT,
        )[1:]

    inputs = (scene.means, scene.quats if by == "quats" else factors, scene.scales, scene.viewmats)
    assert torch.autograd.gradcheck(outputs, [t.clone().requires_grad_() for t in inputs])


@pytest.mark.parametrize("degree", range(4))
def test_gradients_of_spherical_harmonics(degree: int) -> None:
    dirs, coeffs = (random(5, 3) - 0.5).requires_grad_(), random(5, 16, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda d, c: reference.spherical_harmonics(degree, d, c), (dirs, coeffs))


def test_the_flattening_is_that_of_the_camera_linearised() -> None:
    scene = splat_oracle.scene(6, 40, 1)
    out = splat_oracle.project(scene, eps2d=0.0)

    def pixel(point: Tensor) -> Tensor:
        at = scene.Ks[0] @ (scene.viewmats[0, :3, :3] @ point + scene.viewmats[0, :3, 3])
        return at[:2] / at[2]

    checked = 0
    for i in range(40):
        u, v = out["means2d"][0, i].tolist()
        if out["radii"][0, i].any() and 0 <= u <= scene.width and 0 <= v <= scene.height:
            slope = torch.autograd.functional.jacobian(pixel, scene.means[i])
            flat = slope @ reference._covariances(scene.quats[i], scene.scales[i]) @ slope.T
            a, b, c = out["conics"][0, i]
            torch.testing.assert_close(torch.linalg.inv(flat), torch.stack([torch.stack([a, b]), torch.stack([b, c])]))
            checked += 1
    assert checked > 10


def test_the_options_cull_what_they_name() -> None:
    scene = splat_oracle.scene(7, 200, 1)
    everything = splat_oracle.project(scene)
    seen = (everything["radii"] > 0).all(-1)
    assert 20 < seen.sum() < 180
    depths = everything["depths"]
    middle = float(depths[seen].median())
    near = (splat_oracle.project(scene, near_plane=middle)["radii"] > 0).all(-1)
    assert torch.equal(near, seen & (depths > middle)) and not near[depths == middle].any()
    far = (splat_oracle.project(scene, far_plane=middle)["radii"] > 0).all(-1)
    assert torch.equal(far, seen & (depths < middle))
    clip = int(everything["radii"][seen].median())
    clipped = (splat_oracle.project(scene, radius_clip=clip)["radii"] > 0).all(-1)
    assert torch.equal(clipped, seen & (everything["radii"] > clip).any(-1)) and clipped.any()
    # faint ones: 0.003 < 1/255; with no opacities given nothing is faint
    faint = scene.opacities < 1 / 255
    assert faint.any() and not seen[:, faint].any()
    unknown = reference.projection(scene.means, scene.quats, scene.scales, None, *scene.arguments()[4:])[0]
    opaque = splat_oracle.project(replace(scene, opacities=torch.ones(200, dtype=F64)))["radii"]
    assert unknown[:, faint].any() and (unknown - opaque).abs().max() <= 1  # 3.33 and sqrt(2 ln 255) = 3.3290
    assert ((unknown >= everything["radii"]) | ~seen[..., None]).all()


def test_broken_cameras_see_nothing_and_spoil_nothing() -> None:
    scene = splat_oracle.scene(9, 20, 4)
    viewmats = scene.viewmats.clone()
    viewmats[1, 0, 0], viewmats[2, 2, 3] = float("nan"), float("inf")
    scene.Ks[3, 0, 0] = float("nan")
    viewmats.requires_grad_()
    out = reference.projection(*scene.arguments()[:4], viewmats, *scene.arguments()[5:], antialiased=True)
    assert out[0][0].any() and not any(values[1:].any() for values in out)
    sum(values.sum() for values in out[1:]).backward()
    assert viewmats.grad is not None and viewmats.grad.isfinite().all()
    assert viewmats.grad[0].any() and not viewmats.grad[1:].any()


@pytest.mark.parametrize("side", ["left", "right", "top", "bottom"])
def test_a_box_that_only_touches_the_border_is_outside(side: str) -> None:
    # on the axis of a camera of focal length 1, whose principal point moves; radius ceil(3.33 sqrt(1.3)) = 4 pixels
    def seen(inwards: float) -> bool:
        near, far = -4 + inwards, 68 - inwards
        centre = {"left": (near, 32), "right": (far, 32), "top": (32, near), "bottom": (32, far)}[side]
        K = torch.tensor([[[1, 0, centre[0]], [0, 1, centre[1]], [0, 0, 1]]], dtype=F64)
        mean, view = torch.tensor([[0, 0, 1]], dtype=F64), torch.eye(4, dtype=F64)[None]
        quat, scale = torch.ones(1, 4, dtype=F64), torch.ones(1, 3, dtype=F64)
        radii = reference.projection(mean, quat, scale, None, view, K, 64, 64)[0].flatten().tolist()
        assert radii in ([0, 0], [4, 4])
        return radii == [4, 4]

    assert not seen(0) and seen(2**-40)


@pytest.mark.parametrize("factor", [1e-150, 1e-30, 1e30, 1e300])
def test_the_length_of_a_quaternion_or_direction_does_not_matter(factor: float) -> None:
    scene = splat_oracle.scene(16, 20)
    scaled = splat_oracle.project(replace(scene, quats=scene.quats * factor))
    for name, expected in splat_oracle.project(scene).items():
        torch.testing.assert_close(scaled[name], expected, rtol=1e-10, atol=0, msg=name)
    dirs, coeffs = random(20, 3) - 0.5, random(20, 16, 3)
    expected = reference.spherical_harmonics(3, dirs, coeffs)
    torch.testing.assert_close(reference.spherical_harmonics(3, dirs * factor, coeffs), expected, rtol=1e-10, atol=0)


def test_intrinsics_have_no_gradient() -> None:
    scene = splat_oracle.scene(17, 20)
    Ks, means = scene.Ks.requires_grad_(), scene.means.requires_grad_()
    sum(values.sum() for values in splat_oracle.project(scene).values()).backward()
    assert means.grad is not None and means.grad.any() and Ks.grad is None


def test_a_camera_at_the_origin_of_the_world_has_gradients() -> None:
    # where the mean of a culled Gaussian must not be put to be out of the way
    viewmat = torch.eye(4, dtype=F64)[None].requires_grad_()
    scene = splat_oracle.scene(15, 2)
    means = torch.tensor([[0.0, 0.1, 3], [0, 0, -3]], dtype=F64)
    out = reference.projection(means, *scene.arguments()[1:3], None, viewmat, *scene.arguments()[5:], antialiased=True)
    assert out[0][0, 0].all() and not out[0][0, 1].any()
    sum(values.sum() for values in out[1:]).backward()
    assert viewmat.grad is not None and viewmat.grad.isfinite().all() and viewmat.grad.any()


def test_a_flat_gaussian_has_no_compensation_and_finite_gradients() -> None:
    scene = splat_oracle.scene(10, 20, 1)
    scene.scales[:, 1:] = 0  # needles: the determinant before widening is 0, or a rounding error of either sign
    scales = scene.scales.clone().requires_grad_()
    scene = replace(scene, scales=scales)
    radii, *_, compensations = reference.projection(
        scene.means, scene.quats, scales, None, *scene.arguments()[4:], antialiased=True
    )
    assert radii.any() and compensations.max() < 1e-6
    compensations.sum().backward()
    assert scales.grad is not None and scales.grad.isfinite().all()


def test_the_symmetric_part_of_covariances_counts() -> None:
    scene = splat_oracle.scene(14, 20)
    covars = reference._covariances(scene.quats, scene.scales).requires_grad_()
    arguments = (scene.means, None, None, *scene.arguments()[3:])
    out = reference.projection(*arguments, covars=covars)
    skew = random(20, 3, 3) * 1e-3
    skewed = reference.projection(*arguments, covars=covars.detach() + skew - skew.mT)
    for name, ours, theirs in zip(splat_oracle.PROJECTED, out, skewed, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0, msg=name)
    out[3].square().sum().backward()
    assert covars.grad is not None and covars.grad.any()
    torch.testing.assert_close(covars.grad, covars.grad.mT, rtol=0, atol=0)


def test_covariances_or_their_factors_not_both() -> None:
    scene = splat_oracle.scene(0, 3)
    covars = reference._covariances(scene.quats, scene.scales)
    for shape in ((None, None), (scene.quats, None), (None, scene.scales)):
        with pytest.raises(ValueError, match="both or neither"):
            reference.projection(scene.means, *shape, *scene.arguments()[3:])
    with pytest.raises(ValueError, match="both or neither"):
        reference.projection(*scene.arguments(), covars=covars)


def relocation_by_loops(opacity: float, ratio: int) -> tuple[float, float]:
    """3DGS-MCMC, equation 9, term by term."""
    new = 1 - (1 - opacity) ** (1 / ratio)
    total = 0.0
    for i in range(1, ratio + 1):
        for k in range(i):
            total += math.comb(i - 1, k) * (-1) ** k * new ** (k + 1) / math.sqrt(k + 1)
    return new, opacity / total


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_relocation_is_the_paper_s_double_sum(dtype: torch.dtype) -> None:
    ratios = torch.arange(1, 52).repeat(4)
    opacities = torch.tensor([0.005, 0.3, 0.9, 0.999], dtype=dtype).repeat_interleave(51)
    scales = random(len(ratios), 3).to(dtype)
    new, new_scales = reference.relocation(opacities, scales, ratios)
    assert new.dtype == new_scales.dtype == dtype
    expected = [relocation_by_loops(o, n) for o, n in zip(opacities.tolist(), ratios.tolist(), strict=True)]
    expected_new, factors = torch.tensor(expected, dtype=F64).unbind(-1)
    # the sum cancels from some hundred: 1e-16 * 1e3 in float64, a rounding in float32
    tolerance = {"rtol": 1e-6 if dtype == torch.float32 else 1e-11, "atol": 0}
    torch.testing.assert_close(new.double(), expected_new, **tolerance)
    torch.testing.assert_close(new_scales.double(), scales.double() * factors[:, None], **tolerance)


def test_copies_look_like_the_gaussian_they_replace() -> None:
    opacities, ratios = random(300), torch.arange(300) % 60 - 4
    copies = ratios.clamp(1, 51)
    opacities[299] = 1  # of 51 copies: the sum of alternating terms up to 2^47 must not be taken there
    scales = random(300, 3, seed=1)
    new, new_scales = reference.relocation(opacities, scales, ratios)
    torch.testing.assert_close(1 - (1 - new) ** copies, opacities, rtol=0, atol=1e-12)
    alone = copies == 1
    torch.testing.assert_close(new_scales[alone], scales[alone])
    # equation 9 keeps the light that passes along a line: the integral of 1 - (1 - o' exp(-x^2 / 2 s'^2))^n is that of
    # the old o exp(-x^2 / 2 s^2), which is o s sqrt(2 pi)
    x = torch.linspace(-12, 12, 4001, dtype=F64)
    factor = (new_scales / scales)[:, :1]
    covered = 1 - (1 - new[:, None] * torch.exp(-((x / factor) ** 2) / 2)) ** copies[:, None]
    torch.testing.assert_close(torch.trapezoid(covered, x), opacities * math.sqrt(2 * math.pi), rtol=1e-6, atol=0)


def test_relocation_at_the_ends() -> None:
    opacities = torch.tensor([0.0, 1.0, 1.0, 1.0])
    new, scales = reference.relocation(opacities, torch.ones(4, 3), torch.tensor([5, 1, 2, 51]))
    assert new[0] == 0 and torch.equal(scales[0], torch.ones(3))
    torch.testing.assert_close(1 - (1 - new) ** torch.tensor([5, 1, 2, 51]), opacities)
    assert ((scales > 0.3) & (scales <= 1)).all()
    empty = reference.relocation(torch.zeros(0), torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    assert [t.shape for t in empty] == [(0,), (0, 3)]


def test_noise_follows_the_shape_and_spares_the_opaque() -> None:
    scene = splat_oracle.scene(12, 30)
    noise = random(30, 3, seed=1) - 0.5
    moved = reference.position_noise(scene.quats, scene.scales, scene.opacities, noise)
    covars = reference._covariances(scene.quats, scene.scales)
    gate = 1 / (1 + torch.exp(-100 * ((1 - scene.opacities) - 0.995)))
    torch.testing.assert_close(moved, torch.einsum("nij,nj->ni", covars, noise) * gate[:, None], rtol=1e-10, atol=0)
    assert gate[scene.opacities > 0.5].max() < 1e-20 and gate[4] > 0.5  # opacity 0.003
    # seen along the axes of each Gaussian, noise grows with the variance there
    _, axes = torch.linalg.eigh(covars)
    along = (axes.mT @ moved[..., None])[..., 0] / (axes.mT @ noise[..., None])[..., 0]
    torch.testing.assert_close(along, scene.scales.sort(-1).values ** 2 * gate[:, None], rtol=1e-6, atol=0)


def test_broken_gaussians_get_no_noise() -> None:
    scene = splat_oracle.scene(13, 30)
    faults = splat_oracle.break_some(scene)
    moved = reference.position_noise(scene.quats, scene.scales, scene.opacities, random(30, 3, seed=1))
    assert moved.isfinite().all() and moved[12:].any()
    for i, fault in faults.items():
        if not fault.startswith(("means", "opacities = -1")):
            assert not moved[i].any(), fault
