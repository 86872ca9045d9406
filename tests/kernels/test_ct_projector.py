"""The numbers of kernels.ct: every backend against an independent oracle, the adjoint, and the laws of geometry."""

from __future__ import annotations

import math
from dataclasses import replace

import ct_oracle
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

from kernels.ct import FanBeam, ParallelBeam, backproject, project

# float32 data with float64 positions: rounding of some hundred sums. float64: rounding alone.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
IMPLEMENTATIONS = {
    "cpu": ("cpu", torch.float32),
    "reference": ("reference", torch.float32),
    "reference float64": ("reference", torch.float64),
}


@pytest.fixture(params=IMPLEMENTATIONS)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """The dtype to compute in, with the backend of this round forced. A missing binary is an error, never a skip."""
    backend, dtype = IMPLEMENTATIONS[request.param]
    monkeypatch.setenv("KERNELS_BACKEND", backend)
    return dtype


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def noise(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    # white noise: smooth images hide errors of position
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance; both zero: 0."""
    distance, size = (found.double() - expected.double()).norm(), expected.double().norm()
    return float(distance / size) if size > 0 else float(distance)


def adjoint_defect(scan: ParallelBeam | FanBeam, back: ParallelBeam | FanBeam, dtype: torch.dtype) -> float:
    """|<A x, y> - <x, B y>| / (|A x| |y|) with A of `scan` and B the adjoint of `back`."""
    x, y = noise(*scan.shape, dtype=dtype), noise(*scan.sinogram_shape, dtype=dtype, seed=1)
    ax, by = project(x, scan).double(), backproject(y, back).double()
    x, y = x.double(), y.double()
    return float(((ax * y).sum() - (x * by).sum()).abs() / (ax.norm() * y.norm()))


@pytest.mark.parametrize("name", ct_oracle.SCANS)
def test_both_ways_agree_with_the_oracle(name: str, dtype: torch.dtype, threads: int) -> None:
    scan = ct_oracle.SCANS[name]
    a = torch.from_numpy(ct_oracle.matrix(scan))
    x, y = noise(3, *scan.shape, dtype=dtype), noise(3, *scan.sinogram_shape, dtype=dtype, seed=1)
    forward, back = project(x, scan), backproject(y, scan)
    assert forward.dtype == back.dtype == dtype
    assert error(forward.flatten(1), x.double().flatten(1) @ a.T) < TOLERANCE[dtype]
    assert error(back.flatten(1), y.double().flatten(1) @ a) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ct_oracle.SCANS)
@pytest.mark.parametrize(
    "change",
    [
        lambda s: replace(s, offset=s.offset + s.pixel / 2),
        lambda s: replace(s, axis=s.axis + s.pixel / 2),
        lambda s: replace(s, angles_rad=tuple(-b for b in s.angles_rad)),
        lambda s: replace(s, pixel=s.pixel * 0.99),
    ],
    ids=["detector moved by half a pixel", "axis moved by half a pixel", "turned the other way", "pixels 1 % smaller"],
)
def test_the_oracle_sees_a_wrong_geometry(name: str, change) -> None:
    scan = ct_oracle.SCANS[name]
    x = noise(*scan.shape)
    exact = torch.from_numpy(ct_oracle.matrix(scan)) @ x.flatten()
    assert error(project(x, change(scan)).flatten(), exact) > 3e-3


@pytest.mark.parametrize("name", ct_oracle.SCANS)
def test_back_projection_is_the_adjoint(name: str, dtype: torch.dtype) -> None:
    scan = ct_oracle.SCANS[name]
    assert adjoint_defect(scan, scan, dtype) < TOLERANCE[dtype]


def test_the_adjoint_check_bites() -> None:
    scan = ct_oracle.SCANS["fan"]
    assert adjoint_defect(scan, replace(scan, offset=scan.offset + scan.pixel / 2), torch.float64) > 1e-3


@pytest.mark.parametrize("fan", [False, True])
def test_the_compiled_kernel_at_an_ordinary_size(fan: bool, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # sizes of several tiles, no multiple of a vector width; the oracle would be too large here
    lengths = {"pitch": 1.3, "pixel": 0.8, "offset": 0.21, "axis": -0.4}
    if fan:
        scan = FanBeam.uniform(31, 201, (131, 117), source_axis=170.0, axis_detector=90.0, **lengths)
    else:
        scan = ParallelBeam.uniform(31, 201, (131, 117), **lengths)
    x, y = noise(2, *scan.shape, dtype=torch.float32), noise(2, *scan.sinogram_shape, dtype=torch.float32)
    monkeypatch.setenv("KERNELS_BACKEND", "cpu")
    forward, back = project(x, scan), backproject(y, scan)
    assert torch.equal(forward, project(x, scan)), "not the same again"
    assert torch.equal(back, backproject(y, scan)), "not the same again"
    monkeypatch.setenv("KERNELS_BACKEND", "reference")
    assert error(forward, project(x.double(), scan)) < TOLERANCE[torch.float32]
    assert error(back, backproject(y.double(), scan)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("views", [18, 72])
def test_a_detector_much_wider_than_the_image(views: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # most rays miss, and near 45 degrees a sheet of few rays lies wholly beside the image (GloReDi's scanner)
    scan = FanBeam.uniform(views, 336, (128, 128), source_axis=537.5, axis_detector=537.5, pitch=2.0)
    x = noise(1, *scan.shape, dtype=torch.float32)
    expected = project(x.double(), scan)
    monkeypatch.setenv("KERNELS_BACKEND", "cpu")
    found = project(x, scan)
    assert error(found, expected) < TOLERANCE[torch.float32]
    assert not found[expected == 0].any()


sizes = st.integers(0, 9)


@hypothesis.given(
    sizes=st.tuples(sizes, sizes, sizes, st.integers(0, 4)),
    batch=st.lists(st.integers(0, 3), max_size=2),
    fan=st.booleans(),
    lengths=st.tuples(st.floats(0.2, 4.0), st.floats(0.2, 4.0), st.floats(-2.0, 2.0), st.floats(-2.0, 2.0)),
    turn=st.floats(-7.0, 7.0),
)
@hypothesis.settings(max_examples=120, deadline=None, derandomize=True)
def test_any_small_shape(sizes: tuple, batch: list, fan: bool, lengths: tuple, turn: float) -> None:
    height, width, cells, views = sizes
    common = dict(zip(("pitch", "pixel", "offset", "axis"), lengths, strict=True))
    angles = [turn + v for v in range(views)]
    if fan:
        reach = common["pixel"] * (math.hypot(height, width) / 2 + 1)
        scan = FanBeam(angles, cells, (height, width), source_axis=reach * 1.01, axis_detector=reach, **common)
    else:
        scan = ParallelBeam(angles, cells, (height, width), **common)
    x = noise(*batch, *scan.shape, dtype=torch.float32)
    y = noise(*batch, *scan.sinogram_shape, dtype=torch.float32)
    forward, back = project(x, scan), backproject(y, scan)
    assert forward.shape == (*batch, *scan.sinogram_shape)
    assert back.shape == (*batch, *scan.shape)
    a = torch.from_numpy(ct_oracle.matrix(scan))
    rays, pixels = a.shape
    exact_forward = (x.double().reshape(-1, pixels) if pixels else x.new_zeros(math.prod(batch), 0).double()) @ a.T
    exact_back = (y.double().reshape(-1, rays) if rays else y.new_zeros(math.prod(batch), 0).double()) @ a
    # in units of the largest weight: a ray that only grazes a pixel leaves no relative accuracy
    scale = common["pixel"] * math.sqrt(2) * 10
    assert (forward.flatten() - exact_forward.flatten()).abs().max().item() < 1e-5 * scale if forward.numel() else True
    assert (back.flatten() - exact_back.flatten()).abs().max().item() < 1e-5 * scale if back.numel() else True


def scan_of(fan: bool, **lengths: float) -> ParallelBeam | FanBeam:
    if fan:
        distances = {"source_axis": 40.0, "axis_detector": 20.0} | lengths
        return FanBeam.uniform(8, 31, (16, 16), **distances)
    return ParallelBeam.uniform(8, 31, (16, 16), arc_rad=2 * math.pi, **lengths)


@pytest.mark.parametrize("fan", [False, True])
def test_scaling_all_lengths_scales_the_integrals(fan: bool, dtype: torch.dtype) -> None:
    scan = scan_of(fan, pitch=1.1, pixel=0.9, offset=0.3, axis=0.2)
    names = ("source_axis", "axis_detector", "pitch", "pixel", "offset", "axis")[0 if fan else 2 :]
    larger = replace(scan, **{name: 2.5 * getattr(scan, name) for name in names})
    x = noise(*scan.shape, dtype=dtype)
    assert error(project(x, larger), 2.5 * project(x, scan)) < TOLERANCE[dtype]


@pytest.mark.parametrize("fan", [False, True])
def test_an_offset_of_whole_cells_shifts_the_sinogram(fan: bool, dtype: torch.dtype) -> None:
    scan, moved = scan_of(fan, pitch=1.25), scan_of(fan, pitch=1.25, offset=3 * 1.25)
    x = noise(*scan.shape, dtype=dtype)
    assert error(project(x, moved)[:, :-3], project(x, scan)[:, 3:]) < TOLERANCE[dtype]


def test_in_a_parallel_beam_the_axis_is_an_offset_the_other_way(dtype: torch.dtype) -> None:
    x = noise(16, 16, dtype=dtype)
    assert error(project(x, scan_of(False, axis=0.7)), project(x, scan_of(False, offset=-0.7))) < TOLERANCE[dtype]


@pytest.mark.parametrize("fan", [False, True])
def test_turning_the_image_turns_the_views(fan: bool, dtype: torch.dtype) -> None:
    # a quarter turn counter-clockwise: view b then shows what view b - 90° showed; 8 views over the whole turn
    scan = scan_of(fan, offset=0.3, axis=0.2)
    x = noise(*scan.shape, dtype=dtype)
    turned = project(torch.rot90(x, dims=(-2, -1)), scan)
    assert error(turned, project(x, scan).roll(2, dims=0)) < TOLERANCE[dtype]
    assert error(turned, project(x, scan).roll(-2, dims=0)) > 0.1


def test_moving_the_image_by_whole_pixels_moves_its_shadow(dtype: torch.dtype) -> None:
    # u = X at 0°, u = Y at 90°; the image keeps clear of its border, so nothing is lost
    scan = ParallelBeam((0.0, math.pi / 2), 20, (16, 16))
    x = torch.zeros(16, 16, dtype=dtype)
    x[4:12, 4:12] = noise(8, 8, dtype=dtype)
    still = project(x, scan)
    right, up = project(x.roll(2, dims=1), scan), project(x.roll(-3, dims=0), scan)
    assert error(right[0], still[0].roll(2)) < TOLERANCE[dtype]
    assert error(right[1], still[1]) < TOLERANCE[dtype]
    assert error(up[1], still[1].roll(3)) < TOLERANCE[dtype]
    assert error(up[0], still[0]) < TOLERANCE[dtype]


def test_lines_along_the_axes_are_sums_of_pixels(dtype: torch.dtype) -> None:
    # the one case a reader can check by hand, exact on purpose: 0.5 mm pixels, every ray through pixel centres
    x = torch.arange(12.0, dtype=dtype).reshape(3, 4)
    scan = ParallelBeam((0.0, math.pi), 4, (3, 4), pitch=0.5, pixel=0.5)
    columns = 0.5 * x.sum(0)
    np.testing.assert_allclose(project(x, scan).numpy(), torch.stack([columns, columns.flip(0)]).numpy(), rtol=1e-6)


@pytest.mark.parametrize("fan", [False, True])
def test_nan_comes_out_where_it_went_in_and_nowhere_else(fan: bool, dtype: torch.dtype) -> None:
    scan = scan_of(fan)
    at, rings = torch.zeros(2, 1, *scan.shape, dtype=torch.float64), (0, 2)
    for reach, image in zip(rings, at, strict=True):
        image[0, 5 - reach : 6 + reach, 9 - reach : 10 + reach] = 1
    hit, near = (project(image, scan)[0] > 1e-3 for image in at.to(dtype))
    x = noise(*scan.shape, dtype=dtype)
    x[5, 9] = math.nan
    out = project(x, scan)
    assert out[hit].isnan().all()
    assert out[~near].isfinite().all()
    y = noise(*scan.sinogram_shape, dtype=dtype)
    y[3, 15] = math.nan
    image = backproject(y, scan)
    one = torch.zeros_like(y)
    one[3, 15] = 1
    assert image[backproject(one, scan) > 1e-3].isnan().all()
    assert image.isfinite().sum() > image.numel() / 2
