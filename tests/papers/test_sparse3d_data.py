"""Sparse3D's objects: generated chairs, and CO3Dv2 read from a folder that is made up here, byte by byte."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import params as parameters
from common.splatting import SceneError
from papers.sparse3d import chairs, co3d, data
from papers.sparse3d.settings import Params

SIZE = 16
WIDE, HIGH = 60, 40  # pixels of the made-up photographs
FOCAL = 2.0  # in halves of the shorter side


def tiny(**changes) -> Params:
    small = {"size": SIZE, "train_objects": 3, "train_views": 3, "tests": 2, "circle": 4, "points": 50}
    return dataclasses.replace(parameters.load(Params, "sparse3d", "smoke"), **(small | changes))


# ---------------------------------------------------------------------------------------------------------- generated


@pytest.mark.parametrize("number", range(8))
def test_chairs_lie_in_the_unit_ball(number: int):
    world = chairs.chair(number)
    for shape in world.shapes:
        corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3) * shape.half
        assert float((corners @ shape.axes + shape.center).norm(dim=1).max()) < 1.05


def test_a_number_always_gives_the_same_chair_and_another_number_another():
    first, again, other = (chairs.chair(n).render(chairs.camera(0.5, 0.3, SIZE), "a").image for n in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_held_out_chairs_do_not_train():
    seeds = range(100)
    trained = range(data.FIRST_TRAINED, data.FIRST_TRAINED + 5000)
    assert not set(seeds) & set(trained) and not {seed + data.OTHER for seed in seeds} & {*trained, *seeds}


def test_fewer_photographs_are_the_first_of_more_and_the_tests_stay():
    two, three = data.case(tiny(), 2, 1), data.case(tiny(), 3, 1)
    assert all(torch.equal(a.image, b.image) for a, b in zip(two.scene.train, three.scene.train, strict=False))
    assert all(torch.equal(a.image, b.image) for a, b in zip(two.scene.test, three.scene.test, strict=True))
    assert len(three.scene.train) == 3 and len(two.circle) == 4 and two.truth.shape == (4, SIZE, SIZE, 3)
    assert not torch.equal(data.other_case(tiny(), 2, 1).truth, two.truth)


def test_photographs_stand_well_apart():
    for seed in range(5):
        stands = chairs.inputs(3, SIZE, torch.Generator().manual_seed(seed))
        flat = torch.nn.functional.normalize(torch.stack([camera.center[:2] for camera in stands]), dim=-1)
        angles = torch.rad2deg(torch.acos((flat[:-1] * flat[1:]).sum(dim=1)))
        assert float(angles.min()) > 89 and float(angles.max()) < 131


def test_albums_hold_what_was_rendered_and_can_be_joined():
    whole, parts = data.album(tiny(), 0, 3), [data.album(tiny(), *part) for part in data.album_parts(tiny(), 2)]
    assert len(parts) == 2 and all(torch.equal(a, b) for a, b in zip(whole, data.joined(parts), strict=True))
    assert whole.images.shape == (3, 3, 3, SIZE, SIZE) and whole.masks.shape == (3, 3, SIZE, SIZE)
    with pytest.raises(ValueError, match="no objects"):
        data.bound([])


def test_a_scaled_world_shows_the_same_picture():
    view = data.case(tiny(), 2, 0).scene.test[0]
    larger = data.scaled(view, 2.5)
    point = torch.tensor([0.1, -0.2, 0.3])
    (pixel, depth), (same, deeper) = view.camera.project(point), larger.camera.project(2.5 * point)
    torch.testing.assert_close(pixel, same)
    assert float(deeper) == pytest.approx(2.5 * float(depth), rel=1e-5)


# -------------------------------------------------------------------------------------------------------------- CO3Dv2


def pose(around: float) -> tuple[list, list]:
    """R and T of PyTorch3D: a camera 5 from (0, 1, 2), on a circle in the plane y = 1, with y up."""
    forward = -np.array([math.sin(around), 0, math.cos(around)])
    up = np.array([0.0, 1, 0])
    left = np.cross(up, forward)
    rotation = np.stack([left, up, forward], axis=1)  # columns: the camera's axes in the world
    center = np.array([0, 1, 2]) - 5 * forward
    return rotation.tolist(), (-center @ rotation).tolist()


def frame(sequence: str, number: int, around: float, **viewpoint) -> dict:
    R, T = pose(around)
    camera = {"R": R, "T": T, "focal_length": [FOCAL, FOCAL], "principal_point": [0.0, 0.0]}
    paths = {kind: f"toy/{sequence}/{kind}s/frame{number:06d}.png" for kind in ("image", "mask")}
    return {
        "sequence_name": sequence,
        "frame_number": number,
        "image": {"path": paths["image"], "size": [HIGH, WIDE]},
        "mask": {"path": paths["mask"], "mass": 100.0},
        "viewpoint": camera | {"intrinsics_format": "ndc_isotropic"} | viewpoint,
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two sequences of eight frames: a red disc of 12 x 12 pixels in the middle of a green photograph."""
    folder = tmp_path / "toy"
    frames = [frame(name, n, 2 * math.pi * n / 8) for name in ("seq_b", "seq_a") for n in range(8)]
    for one in frames:
        image = np.zeros((HIGH, WIDE, 3), dtype=np.uint8)
        image[..., 1] = 200
        mask = np.zeros((HIGH, WIDE), dtype=np.uint8)
        mask[14:26, 24:36] = 255
        image[mask > 0] = (220, 0, 0)
        for kind, pixels in (("image", image), ("mask", mask)):
            path = tmp_path / one[kind]["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    with gzip.open(folder / "frame_annotations.jgz", "wt", encoding="utf-8") as stream:
        json.dump(frames, stream)
    (folder / "set_lists").mkdir()
    lists = {
        "train": [["seq_b", n, "..."] for n in range(8)],
        "val": [],
        "test": [["seq_a", n, "..."] for n in range(8)],
    }
    (folder / "set_lists/set_lists_fewview_dev.json").write_text(json.dumps(lists))
    return tmp_path


def test_pytorch3ds_cameras_put_points_where_pytorch3d_does():
    """By PyTorch3D's words: x_cam = x R + T; NDC x to the left, y up; the shorter side is -1..1."""
    R, T = pose(0.7)
    point = np.array([0.3, 1.4, 2.2])
    x, y, z = point @ np.array(R) + np.array(T)
    ndc = FOCAL * x / z + 0.1, FOCAL * y / z - 0.2
    viewpoint = {"R": R, "T": T, "focal_length": [FOCAL, FOCAL], "principal_point": [0.1, -0.2]}
    for kind, (half_x, half_y) in (("ndc_isotropic", (20, 20)), ("ndc_norm_image_bounds", (30, 20))):
        camera = co3d.camera(viewpoint | {"intrinsics_format": kind}, WIDE, HIGH)
        pixel, depth = camera.project(torch.tensor(point, dtype=torch.float32))
        expected = [WIDE / 2 - half_x * ndc[0], HIGH / 2 - half_y * ndc[1]]
        torch.testing.assert_close(pixel, torch.tensor(expected, dtype=torch.float32), atol=1e-3, rtol=0)
        assert float(depth) == pytest.approx(z, abs=1e-4)
    with pytest.raises(SceneError, match="intrinsics_format"):
        co3d.camera(viewpoint | {"intrinsics_format": "pixels"}, WIDE, HIGH)


def test_views_are_squares_around_the_object_in_front_of_white(root: Path):
    found = co3d.views(root, "toy", "seq_a", 14, 4)
    assert [view.name for view in found] == ["seq_a/0", "seq_a/2", "seq_a/5", "seq_a/7"]
    for view in found:
        assert view.image.shape == (14, 14, 3) and view.mask is not None
        torch.testing.assert_close(view.image[7, 7], torch.tensor([220 / 255, 0, 0]))
        torch.testing.assert_close(view.image[0, 0], torch.ones(3))
        assert float(view.mask.mean()) == pytest.approx((12 / 14) ** 2)  # 12 pixels in a square of 14


def test_the_world_is_moved_so_that_the_object_fills_the_unit_ball(root: Path):
    for view in co3d.views(root, "toy", "seq_a", 14, 8):
        pixel, depth = view.camera.project(torch.zeros(3))
        torch.testing.assert_close(pixel, torch.full((2,), 7.0), atol=1e-2, rtol=0)
        assert view.mask is not None
        # half a side of the mask at the object's distance is 1 / BALL
        half = view.mask.sum().sqrt() / 2 / view.camera.K[0, 0] * depth
        assert float(half) == pytest.approx(1 / co3d.BALL, rel=0.02)


def test_a_photograph_is_widened_where_the_square_leaves_it(root: Path):
    path = root / "toy/seq_a/masks/frame000000.png"
    mask = np.zeros((HIGH, WIDE), dtype=np.uint8)
    mask[0:38, 0:10] = 255  # the square of 46 pixels begins outside
    Image.fromarray(mask).save(path)
    view = co3d.views(root, "toy", "seq_a", 46, 8)[0]
    assert view.mask is not None and float(view.mask[:, 0].max()) == 0 and float(view.image[:, 0].min()) == 1
    assert float(view.mask.sum()) == 380


def test_cases_of_co3d_are_complete_and_their_photographs_are_not_tested(root: Path):
    params = tiny(dataset="co3dv2", data_dir=str(root), category="toy", subset="fewview_dev", views=[2, 3], size=16)
    case = data.case(params, 2, 0)
    assert len(case.scene.train) == 2 and len(case.scene.test) == 2 and case.truth is None
    assert not {v.name for v in case.scene.train} & {v.name for v in case.scene.test}
    more = data.case(params, 3, 0)
    assert [v.name for v in more.scene.train[:2]] == [v.name for v in case.scene.train]
    assert data.album(params, 0, 5).images.shape == (1, 3, 3, 16, 16)
    assert data.provenance(params)[0] == "co3dv2"
    with pytest.raises(ValueError, match="seed 3"):
        data.case(params, 2, 3)


def test_what_is_missing_is_named_with_the_way_out(root: Path):
    with pytest.raises(FileNotFoundError, match=r"no such category.*toy"):
        co3d.sequences(root, "apple", "fewview_dev", "train")
    with pytest.raises(FileNotFoundError, match=r"no such subset.*fewview_dev"):
        co3d.sequences(root, "toy", "manyview", "train")
    with pytest.raises(SceneError, match="8 of 8 frames"):
        co3d.views(root, "toy", "seq_a", SIZE, 9)
    with pytest.raises(SceneError, match="0 of 0 frames"):
        co3d.views(root, "toy", "seq_z", SIZE, 2)
    (root / "toy/seq_a/images/frame000000.png").unlink()
    with pytest.raises(FileNotFoundError, match="annotations name it"):
        co3d.views(root, "toy", "seq_a", SIZE, 4)
    with pytest.raises(ValueError, match="data_dir is empty"):
        data.case(tiny(dataset="co3dv2"), 2, 0)
