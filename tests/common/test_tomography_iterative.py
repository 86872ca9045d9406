"""SIRT, CGLS and TV against dense solvers, closed forms and their own certificates. float64: through the reference."""

import math

import numpy as np
import pytest
import torch

from common.tomography import cgls, fbp, operator_norm, sirt, tv
from common.tomography.iterative import _differences, _differences_adjoint
from kernels.ct import FanBeam, ParallelBeam, backproject, project

METHODS = {"sirt": sirt, "cgls": cgls, "tv": lambda y, g, **options: tv(y, g, weight=0.1, **options)}
TALL = FanBeam.uniform(9, 12, (6, 5), source_axis=20.0, axis_detector=10.0, pitch=1.3, pixel=0.8)  # 108 rays, 30 pixels
WIDE = ParallelBeam.uniform(3, 8, (6, 5), pixel=0.8)  # 24 rays, 30 pixels
FEW = ParallelBeam.uniform(4, 5, (3, 2), pixel=0.8)  # 20 rays, 6 pixels: soon at the end


def dense(geometry) -> torch.Tensor:
    height, width = geometry.shape
    basis = torch.eye(height * width, dtype=torch.float64).reshape(-1, height, width)
    return project(basis, geometry).flatten(1).T.contiguous()  # [V K, H W]


def noisy(geometry, *batch, seed=0, noise=0.3) -> torch.Tensor:
    """Inconsistent data of a non-negative image."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(*batch, *geometry.shape, dtype=torch.float64, generator=generator)
    sinogram = project(image, geometry)
    return sinogram + noise * torch.randn(sinogram.shape, dtype=torch.float64, generator=generator)


def on_image(y, geometry) -> torch.Tensor:
    """y, zero for the rays that miss the image."""
    return torch.where(project(torch.ones(geometry.shape, dtype=y.dtype), geometry) > 0, y, 0)


def objective(x, y, geometry, weight) -> float:
    """P(x) of tv, written out pixel by pixel."""
    fit, variation, (height, width) = project(x, geometry) - on_image(y, geometry), 0.0, geometry.shape
    for r in range(height):
        for c in range(width):
            down = float(x[r + 1, c] - x[r, c]) if r + 1 < height else 0.0
            right = float(x[r, c + 1] - x[r, c]) if c + 1 < width else 0.0
            variation += geometry.pixel * math.hypot(down, right)
    return float(fit.square().sum()) / 2 + weight * variation


def test_sirt_makes_the_textbook_steps():
    y, a = noisy(TALL), dense(TALL)
    a, data, x = a.numpy(), y.flatten().numpy(), np.zeros(30)
    rays, c = a.sum(1), 1 / a.sum(0)
    r = np.divide(1, rays, out=np.zeros_like(rays), where=rays > 0)
    for _ in range(7):
        x = x + 1.4 * c * (a.T @ (r * (data - a @ x)))
    found = sirt(y, TALL, iterations=7, relaxation=1.4, nonnegative=False)
    np.testing.assert_allclose(found.image.flatten().numpy(), x, rtol=1e-9, atol=1e-12)
    assert found.iterations == 7 and not found.converged


def test_sirt_ends_at_the_weighted_least_squares_solution():
    y, a = noisy(FEW), dense(FEW)
    root = torch.where(a.sum(1) > 0, a.sum(1), math.inf).rsqrt()
    solution = torch.linalg.lstsq(root[:, None] * a, (root * y.flatten())[:, None]).solution
    found = sirt(y, FEW, iterations=20000, nonnegative=False, tolerance=1e-9)
    assert found.converged and found.history["stop"][-1] <= 1e-9 < found.history["stop"][-2]
    torch.testing.assert_close(found.image.flatten(), solution[:, 0], rtol=1e-5, atol=1e-6)
    residual = float((project(found.image, FEW) - y).norm() / y.norm())
    assert found.history["residual"][-1] == pytest.approx(residual, rel=1e-6)


def test_sirt_clips_only_when_asked():
    y = noisy(TALL, noise=3.0)
    assert sirt(y, TALL).image.min() == 0
    assert sirt(y, TALL, nonnegative=False).image.min() < 0


def test_rays_off_the_image_do_not_matter():
    wide = ParallelBeam.uniform(6, 30, (6, 6))
    y = noisy(wide)
    spoilt = torch.where(on_image(torch.ones_like(y), wide) > 0, y, 50.0)
    assert (spoilt != y).sum() > 50
    for method in METHODS.values():
        torch.testing.assert_close(method(spoilt, wide).image, method(y, wide).image)


def test_pixels_that_no_ray_meets_keep_their_start():
    narrow = ParallelBeam.uniform(1, 3, (7, 7))
    start = torch.rand(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    missed = backproject(torch.ones(1, 3, dtype=torch.float64), narrow) == 0
    assert missed.sum() == 28
    for method in (sirt, cgls):
        image = method(torch.ones(1, 3, dtype=torch.float64), narrow, start=start).image
        assert torch.equal(image[missed], start[missed]) and image.isfinite().all()


@pytest.mark.parametrize("geometry", [TALL, WIDE], ids=["overdetermined", "underdetermined"])
def test_cgls_finds_the_least_squares_solution_of_least_norm(geometry):
    y, a = noisy(geometry), dense(geometry)
    solution = torch.linalg.pinv(a) @ y.flatten()
    found = cgls(y, geometry, tolerance=1e-10)
    assert found.converged and found.iterations <= 2 * 30  # the rank if it were not for rounding
    torch.testing.assert_close(found.image.flatten(), solution, rtol=1e-6, atol=1e-7)


def test_cgls_stops_by_the_discrepancy_principle():
    y = noisy(TALL, 3)
    norms = [float((project(cgls(y, TALL, tolerance=1e-10).image, TALL) - y)[i].norm()) for i in range(3)]
    wanted = 1.5 * max(norms)
    found = cgls(y, TALL, tolerance=0.0, noise_norm=wanted)
    reached = (project(found.image, TALL) - y).norm(dim=(1, 2))
    assert found.converged and found.history["stop"][-1] == 0 and (reached <= wanted).all()
    for item, image in zip(y, found.image, strict=True):  # each stopped as early as it would have alone
        alone = cgls(item, TALL, tolerance=0.0, noise_norm=wanted)
        torch.testing.assert_close(image, alone.image)
        before = cgls(item, TALL, tolerance=0.0, iterations=alone.iterations - 1) if alone.iterations > 1 else None
        assert before is None or (project(before.image, TALL) - item).norm() > wanted


def test_tv_agrees_with_dense_admm():
    for geometry, nonnegative in ((TALL, True), (WIDE, False)):
        y, weight = noisy(geometry, seed=2, noise=0.8), 0.4
        found = tv(y, geometry, weight=weight, iterations=20000, tolerance=1e-7, nonnegative=nonnegative)
        assert found.converged
        solution = admm(y, geometry, weight, nonnegative)
        best = objective(solution, y, geometry, weight)
        assert objective(found.image, y, geometry, weight) == pytest.approx(best, rel=1e-6)
        torch.testing.assert_close(found.image, solution, rtol=0, atol=2e-3)


def admm(y, geometry, weight, nonnegative, rho=0.5) -> torch.Tensor:
    """min 1/2 |A x - y|^2 + weight |p D x|_2,1 + [x >= 0] by ADMM with exact linear solves."""
    a, (height, width), p = dense(geometry), geometry.shape, geometry.pixel
    basis = torch.eye(height * width, dtype=torch.float64).reshape(-1, height, width)
    d = p * torch.stack([torch.cat([b.diff(dim=0).flatten(), b.diff(dim=1).flatten()]) for b in basis], dim=1)
    place = torch.zeros(2, height, width, dtype=torch.bool)
    place[0, :-1], place[1, :, :-1] = True, True
    k = torch.cat([d, torch.eye(height * width, dtype=torch.float64)])
    z, dual = torch.zeros(len(k), dtype=torch.float64), torch.zeros(len(k), dtype=torch.float64)
    factor = torch.linalg.cholesky(a.T @ a + rho * k.T @ k)
    for _ in range(20000):
        right = a.T @ y.flatten() + rho * k.T @ (z - dual)
        x = torch.cholesky_solve(right[:, None], factor)[:, 0]
        v = k @ x + dual
        edges = torch.zeros(2, height, width, dtype=torch.float64)
        edges[place] = v[: len(d)]
        edges *= (1 - weight / rho / edges.norm(dim=0).clamp_min(1e-12)).clamp_min(0)
        pixels = v[len(d) :].clamp_min(0) if nonnegative else v[len(d) :]
        z = torch.cat([edges[place], pixels])
        dual = v - z
    return z[len(d) :].reshape(height, width)


def test_tv_of_a_step_has_its_closed_form():
    """One view straight down a single row measures each pixel: A = pixel. A step loses weight/(p n) on either side."""
    row = ParallelBeam((0.0,), 10, (1, 10), pitch=0.5, pixel=0.5)
    step = torch.tensor([1.0] * 4 + [3.0] * 6, dtype=torch.float64)[None]
    y = project(step, row)
    torch.testing.assert_close(y, 0.5 * step)
    weight = 0.3
    found = tv(y, row, weight=weight, tolerance=1e-9, iterations=5000)
    expected = torch.tensor([1 + 0.3 / (0.5 * 4)] * 4 + [3 - 0.3 / (0.5 * 6)] * 6, dtype=torch.float64)[None]
    assert found.converged
    torch.testing.assert_close(found.image, expected, rtol=0, atol=1e-4)


def test_tv_with_no_weight_is_nonnegative_least_squares():
    from scipy.optimize import nnls

    y = noisy(TALL, noise=3.0)
    solution, norm = nnls(dense(TALL).numpy(), on_image(y, TALL).flatten().numpy())
    assert (solution == 0).sum() > 2  # the bound is felt
    found = tv(y, TALL, weight=0.0, tolerance=1e-8, iterations=20000)
    assert found.converged and found.history["objective"][-1] == pytest.approx(norm**2 / 2, rel=1e-7)
    torch.testing.assert_close(found.image.flatten(), torch.from_numpy(solution), rtol=0, atol=1e-2)


def test_tv_with_great_weight_is_the_best_constant():
    y = noisy(TALL, noise=1.0)
    ones = project(torch.ones(TALL.shape, dtype=torch.float64), TALL)
    found = tv(y, TALL, weight=1e3, tolerance=1e-6, iterations=20000)
    best = float((ones * y).sum() / ones.square().sum())
    torch.testing.assert_close(found.image, torch.full(TALL.shape, best, dtype=torch.float64), rtol=1e-2, atol=0)


def test_the_gap_bounds_the_distance_to_the_optimum():
    y = noisy(TALL, noise=1.0)
    found = tv(y, TALL, weight=0.5, tolerance=1e-9, iterations=20000)
    assert found.converged
    objectives, gaps = np.array(found.history["objective"]), np.array(found.history["stop"])
    best = objectives[-1]
    excess = (objectives - best) / objectives
    assert (excess[20:] <= gaps[20:] + 1e-9).all()  # before, twice the largest pixel may be below the solution's
    assert excess[20] > 1e-5  # there was something to bound
    assert gaps[-1] == pytest.approx(0, abs=1e-9)
    assert best == pytest.approx(objective(found.image, y, TALL, 0.5), rel=1e-12)


@pytest.mark.parametrize("scale", [0.1, 8.0])
@pytest.mark.parametrize("name", METHODS)
def test_scaling_all_lengths_scales_attenuation_inversely(name, scale):
    y = noisy(TALL)
    lengths = {key: scale * getattr(TALL, key) for key in ("source_axis", "axis_detector", "pitch", "pixel")}
    larger = FanBeam.uniform(9, 12, (6, 5), **lengths)
    before, after = (METHODS[name](y, geometry, iterations=5, tolerance=0.0) for geometry in (TALL, larger))
    torch.testing.assert_close(after.image * scale, before.image, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_images_of_a_batch_do_not_know_of_each_other(name):
    y = noisy(TALL, 2, 2) * torch.tensor([1e-3, 1.0], dtype=torch.float64)[:, None, None]
    together = METHODS[name](y, TALL, iterations=30, tolerance=0.0)
    assert together.image.shape == (2, 2, 6, 5)
    for i, j in ((0, 0), (1, 0), (0, 1)):
        alone = METHODS[name](y[i, j], TALL, iterations=30, tolerance=0.0)
        torch.testing.assert_close(together.image[i, j], alone.image, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("name", METHODS)
def test_converged_is_said_only_when_it_is_so(name):
    y = noisy(FEW)
    stopped = METHODS[name](y, FEW, iterations=3, tolerance=1e-6)
    assert not stopped.converged and stopped.iterations == 3
    assert stopped.history["stop"][-1] > 1e-6
    ended = METHODS[name](y, FEW, iterations=20000, tolerance=1e-6)
    assert ended.converged and ended.iterations < 20000
    assert ended.history["stop"][-1] <= 1e-6 < min(ended.history["stop"][:-1])
    assert all(len(values) == ended.iterations for values in ended.history.values())


@pytest.mark.parametrize("method", [sirt, cgls])  # tv's dual starts from nothing, whatever its image starts from
def test_a_solution_as_start_is_recognised(method):
    y = noisy(FEW)
    solution = method(y, FEW, iterations=20000, tolerance=1e-6).image
    again = method(y, FEW, start=solution, iterations=3, tolerance=1e-5)
    cold = method(y, FEW, iterations=3, tolerance=1e-5)
    assert again.converged and again.iterations == 1 and not cold.converged
    assert (again.image - solution).norm() < 1e-3 * (cold.image - solution).norm()


@pytest.mark.parametrize("name", METHODS)
def test_nothing_measured_gives_nothing(name):
    found = METHODS[name](torch.zeros(2, *TALL.sinogram_shape, dtype=torch.float64), TALL)
    assert found.converged and found.iterations == 1 and not found.image.any()
    empty = METHODS[name](torch.zeros(0, *TALL.sinogram_shape, dtype=torch.float64), TALL)
    assert empty.converged and empty.image.shape == (0, 6, 5)


@pytest.mark.parametrize("name", METHODS)
def test_float32_and_no_graph(name):
    y = noisy(TALL)
    exact = METHODS[name](y, TALL, iterations=5, tolerance=0.0).image
    single = METHODS[name](y.float().requires_grad_(), TALL, iterations=5, tolerance=0.0).image
    assert single.dtype == torch.float32 and not single.requires_grad
    assert (single - exact).norm() < 1e-3 * exact.norm()


def test_differences_and_their_adjoint():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 5, 7, dtype=torch.float64, generator=generator)
    g = torch.rand(2, 2, 5, 7, dtype=torch.float64, generator=generator)
    left, right = (_differences(x) * g).sum(), (x * _differences_adjoint(g)).sum()
    assert float((left - right).abs() / (x.norm() * g.norm())) < 1e-15
    assert _differences(torch.ones(5, 7)).abs().max() == 0
    assert _differences(torch.arange(7.0).expand(5, 7))[1, :, :-1].eq(1).all()


@pytest.mark.parametrize("geometry", [TALL, WIDE])
def test_operator_norm_is_the_largest_singular_value(geometry):
    exact = float(torch.linalg.matrix_norm(dense(geometry), 2))
    found = operator_norm(geometry, dtype=torch.float64, tolerance=1e-12, iterations=1000)
    assert found == pytest.approx(exact, rel=1e-6)
    assert operator_norm(geometry, dtype=torch.float64, iterations=2) <= exact
    assert operator_norm(ParallelBeam((0.0,), 4, (3, 3), offset=100.0), dtype=torch.float64) == 0


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"sinogram": torch.ones(9, 13)}, ValueError, ["9, 13", "9, 12"]),
        ({"sinogram": torch.full((9, 12), math.nan)}, ValueError, ["108 of 108", "NaN"]),
        ({"sinogram": torch.ones(9, 12, dtype=torch.int32)}, TypeError, ["int32", "float32"]),
        ({"iterations": 0}, ValueError, ["iterations", "0"]),
        ({"tolerance": -1e-3}, ValueError, ["tolerance", "-0.001"]),
        ({"start": torch.zeros(5, 6)}, ValueError, ["start", "5, 6", "6, 5"]),
        ({"start": torch.zeros(6, 5, dtype=torch.float64)}, ValueError, ["start", "float64", "float32"]),
        ({"start": torch.full((6, 5), math.inf)}, ValueError, ["start", "30 of 30"]),
    ],
)
def test_bad_input_is_named(name, change, error, words):
    arguments = {"sinogram": torch.ones(9, 12), **change}
    with pytest.raises(error) as raised:
        METHODS[name](arguments.pop("sinogram"), TALL, **arguments)
    assert all(word in str(raised.value) for word in words)


def test_numbers_out_of_range_are_named():
    y = torch.ones(9, 12)
    for relaxation in (0, 2, math.nan):
        with pytest.raises(ValueError, match="relaxation: got"):
            sirt(y, TALL, relaxation=relaxation)
    for weight in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match="weight: got"):
            tv(y, TALL, weight=weight)
    with pytest.raises(ValueError, match="noise_norm: got -1"):
        cgls(y, TALL, noise_norm=-1)


def test_a_bar_is_shown_when_asked(capsys):
    y = noisy(TALL)
    sirt(y, TALL, iterations=2)
    assert capsys.readouterr().out == ""
    sirt(y, TALL, iterations=2, progress=True)
    shown = capsys.readouterr().out
    assert "SIRT" in shown and "2/2" in shown


def test_iterative_methods_beat_fbp_on_few_noisy_views():
    """The order that makes them worth their time: TV > SIRT, CGLS > FBP on a disc in a disc, 12 views."""
    from common.data.ellipses import Ellipses

    geometry = ParallelBeam.uniform(12, 48, (32, 32))
    phantom = Ellipses(((0.02, 12.0, 10.0, 0.0, 0.0, 0.0), (0.02, 4.0, 4.0, 3.0, -2.0, 0.0))).image((32, 32), 1.0)
    y = project(phantom, geometry)
    y = y + 0.005 * torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
    errors = {
        "fbp": fbp(y, geometry),
        "sirt": sirt(y, geometry, iterations=100).image,
        "cgls": cgls(y, geometry, noise_norm=0.005 * math.sqrt(y.numel())).image,
        "tv": tv(y, geometry, weight=0.01, iterations=500, tolerance=1e-2).image,
    }
    errors = {name: float((image - phantom).norm() / phantom.norm()) for name, image in errors.items()}
    assert errors["tv"] < 0.6 * min(errors["sirt"], errors["cgls"])
    assert max(errors["sirt"], errors["cgls"]) < errors["fbp"]
