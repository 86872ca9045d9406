"""The geometries of kernels.ct: what they accept, refuse and tell; ASTRA's dictionaries, checked by projecting."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch

from kernels.ct import FanBeam, ParallelBeam, backproject, from_astra, project, to_astra

DISTANCES = {"source_axis": 20.0, "axis_detector": 10.0}


def make(beam: type, *, angles=(0.0, 0.5), cells=6, shape=(4, 5), **lengths):
    return beam(angles, cells, shape, **((DISTANCES if beam is FanBeam else {}) | lengths))


@pytest.mark.parametrize("beam", [ParallelBeam, FanBeam])
def test_it_is_a_value(beam: type) -> None:
    scan = make(beam, offset=0.25)
    assert scan == make(beam, offset=0.25) and hash(scan) == hash(make(beam, offset=0.25))
    assert scan != make(beam, offset=0.5)
    assert scan.views == 2 and scan.sinogram_shape == (2, 6)
    assert scan.angles.dtype == scan.cell_centres_mm.dtype == torch.float64
    assert scan.cell_centres_mm.tolist() == [-2.25, -1.25, -0.25, 0.75, 1.75, 2.75]
    for twin in (pickle.loads(pickle.dumps(scan)), copy.deepcopy(scan), replace(scan)):
        assert twin == scan
    with pytest.raises(FrozenInstanceError):
        scan.pitch = 2.0
    assert scan != object()


def test_parallel_and_fan_with_equal_fields_differ() -> None:
    assert make(ParallelBeam) != make(FanBeam)


@pytest.mark.parametrize("angles", [[0, 0.5], np.array([0, 0.5]), torch.tensor([0, 0.5]), (x / 2 for x in range(2))])
def test_angles_come_in_many_forms(angles) -> None:
    scan = make(ParallelBeam, angles=angles, cells=np.int64(6), shape=[4, np.int32(5)], pitch=np.float32(1))
    assert scan == make(ParallelBeam)
    assert type(scan.cells) is int and type(scan.shape) is tuple and type(scan.pitch) is float


def test_uniform_does_not_repeat_the_end() -> None:
    half = ParallelBeam.uniform(4, 6, (4, 5), pitch=2.0)
    assert half.angles_rad == pytest.approx([0, math.pi / 4, math.pi / 2, 3 * math.pi / 4])
    assert half.pitch == 2.0
    whole = FanBeam.uniform(4, 6, (4, 5), **DISTANCES, axis=0.1)
    assert whole.angles_rad == pytest.approx([0, math.pi / 2, math.pi, 3 * math.pi / 2])
    assert whole.axis == 0.1 and whole.source_axis == 20.0
    short = FanBeam.uniform(3, 6, (4, 5), **DISTANCES, arc_rad=3.6)
    assert short.angles_rad == pytest.approx([0, 1.2, 2.4])
    assert ParallelBeam.uniform(0, 6, (4, 5)).views == 0


def test_a_subset_measures_the_same_rows() -> None:
    scan = FanBeam.uniform(12, 9, (6, 6), **DISTANCES, offset=0.3)
    sparse = scan.subset(range(0, 12, 4))
    assert sparse.angles_rad == scan.angles_rad[::4] and sparse.offset == 0.3
    image = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(project(image, sparse), project(image, scan)[::4])
    assert scan.subset(torch.tensor([-1, 0])).angles_rad == (scan.angles_rad[-1], scan.angles_rad[0])
    with pytest.raises(IndexError, match=r"got view 12; expected -12\.\.11"):
        scan.subset([12])


def test_repr_says_what_matters() -> None:
    text = repr(FanBeam.uniform(720, 736, (512, 512), source_axis=1024, axis_detector=512, pitch=1.5))
    for part in ("720 views in 0..359.5 deg", "cells=736", "shape=(512, 512)", "source_axis=1024", "pitch=1.5"):
        assert part in text
    assert len(text) < 250
    assert "0 views" in repr(make(ParallelBeam, angles=()))


@pytest.mark.parametrize("beam", [ParallelBeam, FanBeam])
@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"angles": (0.0, math.nan)}, ValueError, r"angles_rad\[1\] = nan; expected finite"),
        ({"angles": (math.inf,)}, ValueError, r"angles_rad\[0\] = inf"),
        ({"angles": 0.5}, TypeError, r"type float; expected one angle in radians for each view"),
        ({"angles": np.zeros((2, 2))}, TypeError, r"a flat sequence"),
        ({"cells": 6.0}, TypeError, r"cells = 6\.0; expected the number of detector cells, an integer"),
        ({"cells": -1}, ValueError, r"cells = -1"),
        ({"shape": 4}, ValueError, r"shape = 4; expected \(H, W\)"),
        ({"shape": (1, 4, 5)}, ValueError, r"leave batch sizes out"),
        ({"shape": (4, 5.0)}, TypeError, r"shape\[1\] = 5\.0"),
        ({"shape": (-4, 5)}, ValueError, r"shape\[0\] = -4"),
        ({"pitch": 0.0}, ValueError, r"pitch = 0; expected a length in mm, finite and above 0"),
        ({"pixel": -1.0}, ValueError, r"pixel = -1"),
        ({"pixel": math.inf}, ValueError, r"pixel = inf"),
        ({"offset": math.nan}, ValueError, r"offset = nan; expected a length in mm, finite"),
        ({"axis": "left"}, TypeError, r"axis = 'left'; expected a length in mm, one number"),
    ],
)
def test_nonsense_is_refused(beam: type, change: dict, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        make(beam, **change)
    assert str(caught.value).startswith(beam.__name__)


def test_a_fan_has_its_source_outside_the_image() -> None:
    reach = math.hypot(3, 4) / 2 + 1
    assert make(FanBeam, source_axis=reach * 1.0001)
    with pytest.raises(
        ValueError, match=r"source inside the circle .* a pixel beyond the corner pixels' centres, 3\.5 mm"
    ):
        make(FanBeam, source_axis=reach)
    with pytest.raises(ValueError, match=r"source inside the circle"):
        make(FanBeam, pixel=10.0)
    with pytest.raises(ValueError, match=r"axis_detector = -1; expected a length in mm, finite and of 0 or more"):
        make(FanBeam, axis_detector=-1.0)
    with pytest.raises(ValueError, match=r"views = -1"):
        FanBeam.uniform(-1, 6, (4, 5), **DISTANCES)
    with pytest.raises(TypeError):
        FanBeam((0.0,), 6, (4, 5), 20.0, 10.0)  # distances go by name: their order is no convention


# --- ASTRA ------------------------------------------------------------------------------------------------------------

PEER = "the astra-toolbox is a peer, for checks only: `make setup-peers` brings it"
ASTRA_SCANS = {
    "parallel": ParallelBeam.uniform(7, 71, (48, 48)),
    "parallel, mm": ParallelBeam((0.1, -0.6, 2.0, 4.0), 71, (40, 48), pitch=1.1, pixel=0.9),
    "parallel, moved": ParallelBeam.uniform(7, 71, (48, 40), offset=1.3, axis=-0.8),
    "fan": FanBeam.uniform(7, 81, (48, 48), source_axis=96.0, axis_detector=48.0, pitch=1.5),
    "fan, moved": FanBeam.uniform(
        7, 81, (40, 48), source_axis=90.0, axis_detector=30.0, pitch=1.2, pixel=0.9, offset=1.3, axis=-0.8
    ),
}


def astra_project(scan: ParallelBeam | FanBeam, image: np.ndarray) -> np.ndarray:
    """ASTRA's own projection: Joseph's weights in a parallel beam, exact chord lengths (Siddon) in a fan."""
    astra = pytest.importorskip("astra", reason=PEER)
    proj_geom, vol_geom = to_astra(scan)
    kind = "line_fanflat" if isinstance(scan, FanBeam) else "linear"
    projector = astra.create_projector(kind, proj_geom, vol_geom)
    try:
        ident, sinogram = astra.create_sino(image.astype(np.float32), projector)
        astra.data2d.delete(ident)
    finally:
        astra.projector.delete(projector)
    return np.array(sinogram)


def blob(scan: ParallelBeam | FanBeam) -> np.ndarray:
    """A smooth, lopsided image: for the fan, whose weights ASTRA's CPU projector takes differently."""
    height, width = scan.shape
    y, x = np.mgrid[:height, :width]
    return np.exp(-(((x - 0.6 * width) / 6) ** 2 + ((y - 0.35 * height) / 9) ** 2)).astype(np.float32)


def distance(scan: ParallelBeam | FanBeam, reference: np.ndarray, image: np.ndarray) -> float:
    ours = project(torch.from_numpy(image), scan).numpy()
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


@pytest.mark.parametrize("name", ASTRA_SCANS)
def test_astra_measures_the_same(name: str) -> None:
    scan = ASTRA_SCANS[name]
    fan = isinstance(scan, FanBeam)
    image = blob(scan) if fan else np.random.default_rng(0).normal(size=scan.shape).astype(np.float32)
    reference = astra_project(scan, image)
    # in a parallel beam the same weights, up to ASTRA's float32; in a fan Joseph against Siddon, which even within
    # ASTRA are 3.5e-2 apart on this blob (parallel beam, linear against line)
    assert distance(scan, reference, image) < (2.5e-2 if fan else 1e-4)
    for wrong in (
        replace(scan, offset=scan.offset + scan.pitch),
        replace(scan, axis=scan.axis + scan.pixel),
        replace(scan, angles_rad=tuple(-b for b in scan.angles_rad)),
    ):
        assert distance(wrong, reference, image) > (0.1 if fan else 1e-2)


@pytest.mark.parametrize("name", ["parallel", "parallel, mm", "fan"])
def test_dictionaries_come_back(name: str) -> None:
    scan = ASTRA_SCANS[name]
    back = from_astra(*to_astra(scan))
    # the pixel comes from the window's edges, by a division
    assert replace(back, pixel=scan.pixel) == scan
    assert back.pixel == pytest.approx(scan.pixel, rel=1e-14)


def test_dictionaries_made_by_astra_are_read() -> None:
    astra = pytest.importorskip("astra", reason=PEER)
    angles = np.linspace(0, np.pi, 5, endpoint=False)
    volume = astra.create_vol_geom(20, 30, -7.5, 7.5, -5.0, 5.0)  # rows, columns, x and y range
    found = from_astra(astra.create_proj_geom("parallel", 0.7, 41, angles), volume)
    assert found == ParallelBeam(angles, 41, (20, 30), pitch=0.7, pixel=0.5)
    found = from_astra(astra.create_proj_geom("fanflat", 0.7, 41, angles, 50.0, 25.0), volume)
    assert found == FanBeam(angles, 41, (20, 30), source_axis=50.0, axis_detector=25.0, pitch=0.7, pixel=0.5)


def test_what_astra_can_say_and_we_cannot_is_refused() -> None:
    proj_geom, vol_geom = to_astra(ASTRA_SCANS["parallel"])
    window = vol_geom["option"]
    with pytest.raises(ValueError, match=r"type 'cone'; expected 'parallel' or 'fanflat'"):
        from_astra(proj_geom | {"type": "cone"}, vol_geom)
    with pytest.raises(ValueError, match=r"type 'fanflat_vec'.* did you mean 'fanflat'"):
        from_astra(proj_geom | {"type": "fanflat_vec"}, vol_geom)
    with pytest.raises(ValueError, match=r"3 slices; expected a 2-D one"):
        from_astra(proj_geom, vol_geom | {"GridSliceCount": 3})
    with pytest.raises(ValueError, match=r"expected square pixels round the origin"):
        from_astra(proj_geom, vol_geom | {"option": window | {"WindowMaxX": 30.0}})
    with pytest.raises(ValueError, match=r"expected square pixels round the origin"):
        from_astra(proj_geom, vol_geom | {"option": {key: value + 1 for key, value in window.items()}})


def test_our_adjoint_is_astras() -> None:
    astra = pytest.importorskip("astra", reason=PEER)
    scan = ASTRA_SCANS["parallel"]
    data = np.random.default_rng(1).normal(size=scan.sinogram_shape).astype(np.float32)
    projector = astra.create_projector("linear", *to_astra(scan))
    ident, reference = astra.create_backprojection(data, projector)
    astra.data2d.delete(ident)
    astra.projector.delete(projector)
    ours = backproject(torch.from_numpy(data), scan).numpy()
    assert np.linalg.norm(ours - reference) / np.linalg.norm(reference) < 1e-4
