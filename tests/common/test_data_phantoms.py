"""Laws of the phantom generators: seeds, plausible values, areas, exact line integrals."""

import math

import numpy as np
import pytest
import torch

from common.data import phantoms
from common.data._canvas import Canvas, Draws
from common.data.ellipses import Ellipses, shepp_logan


@pytest.mark.parametrize("kind", phantoms.KINDS)
def test_same_seed_same_images(kind):
    first = phantoms.generate(kind, 3, 48, seed=5)
    assert torch.equal(first, phantoms.generate(kind, 3, 48, seed=5))
    assert not torch.equal(first, phantoms.generate(kind, 3, 48, seed=6))
    assert (first[0] - first[1]).abs().mean() > 20  # slices of one seed differ too


@pytest.mark.parametrize("kind", phantoms.KINDS)
def test_more_slices_extend_the_set(kind):
    few = phantoms.generate(kind, 2, 32, seed=0)
    many = phantoms.generate(kind, 40, 32, seed=0)  # 40 slices of 32 x 32 need two batches
    assert torch.equal(few, many[:2])
    assert not torch.equal(many[32], many[0])


@pytest.mark.parametrize("kind", phantoms.KINDS)
def test_finer_pixels_refine_the_same_anatomy(kind):
    coarse = phantoms.generate(kind, 6, 64, seed=1)
    fine = phantoms.generate(kind, 6, 128, seed=1)
    halved = torch.nn.functional.avg_pool2d(fine[:, None], 2)[:, 0]
    same = (halved - coarse).square().mean().sqrt()
    other = (halved - coarse.roll(1, 0)).square().mean().sqrt()
    assert same < 0.2 * other


@pytest.mark.parametrize("kind", phantoms.KINDS)
def test_values_are_those_of_tissues(kind):
    hu = phantoms.generate(kind, 24, 96, seed=2)
    assert hu.dtype == torch.float32 and hu.shape == (24, 96, 96)
    assert hu.min() >= -1024 and hu.max() <= 2500
    assert (hu[:, 0] < -950).all() and (hu[:, :, 0] < -600).all()  # air round the patient, couch at most
    shares = {
        "air": (hu < -900).float().mean().item(),
        "fat": ((hu > -150) & (hu < -60)).float().mean().item(),
        "soft": ((hu > 0) & (hu < 130)).float().mean().item(),
        "bone": (hu > 300).float().mean().item(),
    }
    expected = {
        "head": {"air": (0.4, 0.8), "fat": (0.005, 0.06), "soft": (0.15, 0.45), "bone": (0.03, 0.15)},
        "abdomen": {"air": (0.3, 0.7), "fat": (0.08, 0.35), "soft": (0.15, 0.45), "bone": (0.005, 0.05)},
    }[kind]
    for tissue, (low, high) in expected.items():
        assert low < shares[tissue] < high, (tissue, shares)


def test_the_head_is_a_closed_shell_of_bone():
    """From the middle of the cavity every direction meets bone (above the skull base)."""
    hu = phantoms.generate("head", 20, 128, seed=3)
    middle = 63.5
    radius = np.arange(0, 62)
    for image in hu:
        brain = ((image > 15) & (image < 60)).float()
        row = (brain.sum(1) @ torch.arange(128.0)) / brain.sum()
        column = (brain.sum(0) @ torch.arange(128.0)) / brain.sum()
        assert abs(row - middle) < 20 and abs(column - middle) < 20
        for angle in np.linspace(0, 2 * math.pi, 24, endpoint=False):
            rows = np.clip(np.round(row.item() + radius * np.sin(angle)), 0, 127).astype(int)
            columns = np.clip(np.round(column.item() + radius * np.cos(angle)), 0, 127).astype(int)
            assert image[rows, columns].max() > 250


def test_generation_leaves_the_thread_count_and_the_global_generator_alone():
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    phantoms.generate("head", 1, 32, seed=0)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)


def test_empty_and_odd_requests():
    assert phantoms.generate("head", 0, 32, seed=0).shape == (0, 32, 32)
    assert torch.isfinite(phantoms.generate("abdomen", 1, 33, seed=0)).all()
    with pytest.raises(ValueError, match="abdomen"):
        phantoms.generate("abdomin", 1, 32, seed=0)
    with pytest.raises(ValueError, match="size >= 8"):
        phantoms.generate("head", 1, 4, seed=0)


@pytest.mark.parametrize("power", [2.0, 3.0])
@pytest.mark.parametrize("a, b, tolerance", [(20.0, 12.0, 0.02), (6.0, 3.0, 0.05), (30.0, 0.4, 0.2)])
def test_coverage_keeps_the_area(power, a, b, tolerance):
    """Mean coverage is the superellipse's area; pixels are 2 mm.

    The last is thinner than a pixel: there the first-order distance to the outline is too long near the tips.
    """
    canvas = Canvas(Draws("test", range(1), 0), 64, 128.0, 0.0, warp_mm=0.0)
    # averaged over positions within a pixel and directions, as a random shape is
    shifts = [(dx / 5 * 2.0, dy / 5 * 2.0, t) for dx in range(5) for dy in range(5) for t in (0.0, 0.4, 0.9)]
    drawn = [canvas.ellipse(x, y, a, b, angle_rad=t, power=power).sum().item() * 2.0**2 for x, y, t in shifts]
    g = math.gamma(1 + 1 / power)
    area = 4 * a * b * g * g / math.gamma(1 + 2 / power)
    assert np.mean(drawn) == pytest.approx(area, rel=tolerance)


def test_noise_has_unit_variance_and_its_length():
    canvas = Canvas(Draws("test", range(24), 1), 96, 240.0, 0.0, warp_mm=0.0)
    for scale_mm in (8.0, 30.0):
        noise = canvas.noise(scale_mm)
        assert noise.std() == pytest.approx(1.0, abs=0.2)
        near = round(0.25 * scale_mm / canvas.pixel_mm)
        far = round(3 * scale_mm / canvas.pixel_mm)
        assert (noise[..., near:] * noise[..., :-near]).mean() > 0.6
        assert (noise[..., far:] * noise[..., :-far]).mean().abs() < 0.2


def test_chord_through_a_disc():
    disc = Ellipses(((0.02, 50.0, 50.0, 10.0, -5.0, 0.3),))
    sinogram = disc.parallel([0.0, 1.1, math.pi / 2], 201)
    u = torch.arange(201, dtype=torch.float64) - 100
    for view, angle in enumerate((0.0, 1.1, math.pi / 2)):
        t = u - (10 * math.cos(angle) - 5 * math.sin(angle))
        torch.testing.assert_close(sinogram[view], 0.02 * 2 * (2500 - t * t).clamp_min(0).sqrt())


def test_projection_of_a_turned_ellipse():
    """Kak and Slaney: 2 rho a b sqrt(s^2 - t^2) / s^2, s^2 = a^2 cos^2(b - angle) + b^2 sin^2(b - angle)."""
    density, a, b, x0, y0, turn = 0.03, 40.0, 15.0, 12.0, 7.0, 0.7
    angles = np.linspace(0, math.pi, 7, endpoint=False)
    sinogram = Ellipses(((density, a, b, x0, y0, turn),)).parallel(angles.tolist(), 151, offset_mm=3.0, axis_mm=-2.0)
    u = torch.arange(151, dtype=torch.float64) - 75 + 3.0
    for view, angle in enumerate(angles):
        t = u + 2.0 - x0 * math.cos(angle) - y0 * math.sin(angle)
        s2 = (a * math.cos(angle - turn)) ** 2 + (b * math.sin(angle - turn)) ** 2
        expected = 2 * density * a * b * (s2 - t * t).clamp_min(0).sqrt() / s2
        torch.testing.assert_close(sinogram[view], expected, rtol=1e-9, atol=1e-12)


def test_projections_of_the_image_agree_with_the_exact_ones():
    """Row and column sums of the drawn phantom are its projections at 90 and 0 degrees."""
    phantom = shepp_logan(radius_mm=100.0, scale_per_mm=0.02)
    image = phantom.image((200, 200), 1.0, supersample=8)
    across = phantom.parallel([0.0, math.pi / 2], 200)
    assert (image.sum(0) - across[0]).abs().mean() < 0.01 * across.max()
    assert (image.sum(1).flip(0) - across[1]).abs().mean() < 0.01 * across.max()
    assert (image.sum(1) - across[1]).abs().mean() > 0.01 * across.max()  # the flip matters: y points up


def test_every_view_carries_the_same_mass():
    phantom = shepp_logan(radius_mm=100.0)
    mass = phantom.parallel(np.linspace(0, math.pi, 9).tolist(), 8001, pitch_mm=0.0375).sum(1) * 0.0375
    torch.testing.assert_close(mass, mass[0].expand_as(mass), rtol=1e-4, atol=0)


def test_fan_of_a_far_source_is_parallel():
    phantom = shepp_logan(radius_mm=100.0)
    angles = [0.3, 2.0, 4.4]
    kwargs = {"pitch_mm": 1.3, "offset_mm": 2.0, "axis_mm": -4.0}
    parallel = phantom.parallel(angles, 180, **kwargs)
    far = phantom.fan(angles, 180, source_axis_mm=1e7, axis_detector_mm=0.0, **kwargs)
    # edges of the skull are vertical in the projection: compare the mean
    assert (far - parallel).abs().mean() < 1e-4 * parallel.max()
    near = phantom.fan(angles, 180, source_axis_mm=400.0, axis_detector_mm=0.0, **kwargs)
    assert (near - parallel).abs().mean() > 1e-2 * parallel.max()


def test_fan_follows_the_projector_convention():
    """A small disc at X lands on u = t (R + D) / U with t = X cos b + Y sin b + axis, U = R - (X sin b - Y cos b)."""
    x, y, source, detector, axis = 30.0, -20.0, 300.0, 200.0, 5.0
    disc = Ellipses(((1.0, 0.5, 0.5, x, y, 0.0),))
    angles = [0.0, 0.8, 2.5, 5.0]
    sinogram = disc.fan(angles, 4001, source_axis_mm=source, axis_detector_mm=detector, pitch_mm=0.05, axis_mm=axis)
    u = (torch.arange(4001, dtype=torch.float64) - 2000) * 0.05
    found = (sinogram * u).sum(1) / sinogram.sum(1)
    for view, b in enumerate(angles):
        t = x * math.cos(b) + y * math.sin(b) + axis
        expected = t * (source + detector) / (source - (x * math.sin(b) - y * math.cos(b)))
        assert found[view].item() == pytest.approx(expected, abs=0.01)


def test_shepp_logan_values():
    toft = shepp_logan(1.0).image((256, 256), 2 / 256, supersample=2)
    assert toft.max() == pytest.approx(1.0) and toft.min() >= -1e-12
    assert toft[128, 128] == pytest.approx(0.2, abs=0.05)
    original = shepp_logan(1.0, modified=False).image((256, 256), 2 / 256, supersample=2)
    assert original[128, 128] == pytest.approx(1.02, abs=0.005)
