"""Scenes on disk in the layouts of LLFF, Blender, nerfstudio and SpaRe, and their recognition."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from toy_scenes import IMAGES, write_colmap_binary, write_images

from common.splatting import (
    SceneError,
    fern,
    load_blender,
    load_llff,
    load_nerfstudio,
    look_at,
    open_scene,
)
from common.splatting.colmap import model_camera, read_model
from common.splatting.llff import poses_bounds

NAMES = sorted(name for _, name, _, _ in IMAGES)
OPENGL = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))


def cameras_of(folder):
    model = read_model(folder)
    return {image.name: model_camera(model, image) for image in model.images.values()}


def to_llff(camera, focal):
    """A row of poses_bounds.npy of one of our cameras."""
    right, down, forward = camera.viewmat[:3, :3]
    columns = [down, right, -forward, camera.center, torch.tensor([12.0, 16.0, focal])]
    return [*torch.stack(columns, dim=1).flatten().tolist(), 2.0, 9.0]


@pytest.fixture
def llff(tmp_path):
    """The COLMAP toy with its poses in poses_bounds.npy; images_1 are renamed as LLFF renames them."""
    write_colmap_binary(tmp_path / "sparse" / "0")
    write_images(tmp_path / "images", [f"image{i:03d}.png" for i in range(4)])
    cameras = cameras_of(tmp_path / "sparse" / "0")
    np.save(tmp_path / "poses_bounds.npy", np.array([to_llff(cameras[name], 20.0) for name in NAMES]))
    return tmp_path


def test_llff_cameras_are_those_of_the_model(llff):
    cameras, bounds = poses_bounds(llff / "poses_bounds.npy")
    for ours, expected in zip(cameras, (cameras_of(llff / "sparse" / "0")[name] for name in NAMES), strict=True):
        assert torch.allclose(ours.viewmat, expected.viewmat, atol=1e-6)
        assert ours.K.tolist() == [[20, 0, 8], [0, 20, 6], [0, 0, 1]] and (ours.width, ours.height) == (16, 12)
    assert bounds.tolist() == [[2, 9]] * 4


def test_llff_takes_points_in_sorted_order_where_names_differ(llff):
    scene = load_llff(llff, factor=1, train=[0, 1])
    assert scene.points.positions.tolist() == [pytest.approx([0.1, 0.2, 5.0])]  # seen by a and b
    assert scene.points.view_names == ("image000.png", "image001.png")
    assert load_llff(llff, factor=1, train=[0, 1], points=False).points is None
    assert load_llff(llff, factor=1, train=[0, 3]).points is None


def test_llff_refuses_points_of_another_world(llff):
    moved = [(number, name, (*pose[:4], pose[4], pose[5] + number, pose[6]), kp) for number, name, pose, kp in IMAGES]
    write_colmap_binary(llff / "sparse" / "0", images=moved)
    with pytest.raises(SceneError, match=r"stand up to .* away from the scene's poses.*points=False"):
        load_llff(llff, factor=1)


def test_llff_errors(llff):
    (llff / "images" / "image003.png").unlink()
    with pytest.raises(SceneError, match=r"4 poses in poses_bounds\.npy, but 3 images in images"):
        load_llff(llff, factor=1)
    with pytest.raises(FileNotFoundError, match="no folder photos or photos_8"):
        load_llff(llff, images="photos")
    with pytest.raises(SceneError, match="factor is how much smaller"):
        load_llff(llff, factor=0.5)
    np.save(llff / "poses_bounds.npy", np.zeros((3, 15)))
    with pytest.raises(SceneError, match=r"expected finite numbers \[N, 17\]; got float64 \[3, 15\]"):
        load_llff(llff, factor=1)
    (llff / "poses_bounds.npy").write_bytes(b"\x93NUMPY broken")
    with pytest.raises(SceneError, match="not a NumPy array"):
        load_llff(llff, factor=1)


def test_fern_is_its_colmap_model(real_data):
    folder = real_data("scene_fern_llff")
    expected = cameras_of(folder / "sparse_pinhole" / "0")
    for factor, scale in ((8, 1), (4, 2)):
        scene = fern(factor=factor)
        for view in (*scene.train, *scene.test):
            camera = expected[view.name]
            # float32 of values up to 80, and a focal length rounded on its way through COLMAP
            assert torch.allclose(view.camera.viewmat, camera.viewmat, atol=2e-5)
            assert torch.allclose(view.camera.K[:2], scale * camera.K[:2], rtol=1e-6)
    assert [view.name for view in scene.train] == ["image001.png", "image010.png", "image019.png"]
    assert [view.name for view in scene.test] == ["image000.png", "image008.png", "image016.png"]
    assert scene.train[0].image.shape == (756, 1008, 3) and len(scene.points) == 1256
    assert fern(factor=16).train[0].image.shape == (189, 252, 3)


EYES = [(3.0, 0.5, 1.0), (0.4, 3.0, 1.2), (-3.0, 0.3, 1.1), (0.2, -3.0, 0.9)]


def gl_pose(eye):
    camera = look_at(eye, (0, 0, 0), (0, 0, 1), torch.tensor([[20.0, 0, 8], [0, 20, 6], [0, 0, 1]]), 16, 12)
    return camera, (torch.linalg.inv(camera.viewmat.double()) @ OPENGL.double()).tolist()


@pytest.fixture
def blender(tmp_path):
    for part, eyes in (("train", EYES[:3]), ("test", EYES[3:])):
        frames = [{"file_path": f"./{part}/r_{i}", "transform_matrix": gl_pose(eye)[1]} for i, eye in enumerate(eyes)]
        meta = {"camera_angle_x": 2 * math.atan(8 / 20), "frames": frames}
        (tmp_path / f"transforms_{part}.json").write_text(json.dumps(meta))
        write_images(tmp_path / part, [f"r_{i}.png" for i in range(len(eyes))], alpha=True)
    return tmp_path


def test_blender_cameras_images_and_masks(blender):
    scene = load_blender(blender, background=(0.25, 0.5, 1.0))
    assert [view.name for view in scene.train] == ["train/r_0", "train/r_1", "train/r_2"]
    for view, eye in zip((*scene.train, *scene.test), EYES, strict=True):
        assert torch.allclose(view.camera.viewmat, gl_pose(eye)[0].viewmat, atol=1e-6)
        assert torch.allclose(view.camera.K, torch.tensor([[20.0, 0, 8], [0, 20, 6], [0, 0, 1]]))
    stored = np.asarray(Image.open(blender / "train" / "r_1.png")) / 255.0
    color, alpha = stored[..., :3], stored[..., 3:]
    expected = color * alpha + np.array([0.25, 0.5, 1.0]) * (1 - alpha)
    assert np.allclose(scene.train[1].image, expected, atol=1e-6)
    assert np.allclose(scene.train[1].mask, alpha[..., 0], atol=1e-6)
    assert scene.background.tolist() == [0.25, 0.5, 1.0] and scene.points is None


def test_blender_views_are_chosen_by_index_and_name(blender):
    scene = load_blender(blender, train=["r_2", 0], test=[0])
    assert [view.name for view in scene.train] == ["train/r_2", "train/r_0"]
    with pytest.raises(SceneError, match="view 26: there are 3 views"):
        load_blender(blender, views=8)
    with pytest.raises(SceneError, match="views and train are both given"):
        load_blender(blender, views=8, train=[0])


def test_blender_errors(blender):
    (blender / "train" / "r_1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"r_1\.png: no such image"):
        load_blender(blender)
    path = blender / "transforms_train.json"
    meta = json.loads(path.read_text())
    for broken, message in (
        ({**meta, "frames": []}, "no frames"),
        ({"camera_angle_x": 1}, "expected JSON with frames.*KeyError"),
        ({**meta, "frames": [{"file_path": "a", "transform_matrix": [[1]]}]}, "transform_matrix is 4 x 4"),
        ({"frames": meta["frames"]}, "no camera_angle_x"),
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(SceneError, match=message):
            load_blender(blender)
    path.write_text("{")
    with pytest.raises(SceneError, match=r"transforms_train\.json: expected JSON"):
        load_blender(blender)


def test_the_chair_has_the_published_views(real_data):
    scene = open_scene(real_data("scene_chair_blender"), views=8, factor=4)
    assert [view.name for view in scene.train] == [f"train/r_{i}" for i in (26, 86, 2, 55, 75, 93, 16, 73)]
    assert [view.name for view in scene.test] == [f"test/r_{8 * i}" for i in range(25)]
    assert scene.train[0].image.shape == (100, 100, 3)
    # NeRF-synthetic cameras stand on a sphere of radius 4.03 and look at its centre
    for view in scene.train:
        assert view.camera.center.norm() == pytest.approx(4.031, abs=1e-3)
        assert torch.allclose(view.camera.project(torch.zeros(3))[0], torch.tensor([50.0, 50.0]), atol=1e-2)
        assert torch.equal(view.image[view.mask == 0], torch.ones_like(view.image[view.mask == 0]))


@pytest.fixture
def nerfstudio(tmp_path):
    """The COLMAP toy as nerfstudio stores it: its world turned, poses with OpenGL axes."""
    write_colmap_binary(tmp_path / "colmap" / "sparse" / "0")
    write_images(tmp_path / "images", NAMES)
    turn = torch.tensor([[0.0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
    frames = []
    for name, camera in cameras_of(tmp_path / "colmap" / "sparse" / "0").items():
        pose = turn @ torch.linalg.inv(camera.viewmat) @ OPENGL
        frames.append({"file_path": f"images/{name}", "transform_matrix": pose.tolist()})
    meta = {"w": 16, "h": 12, "fl_x": 20, "fl_y": 21, "cx": 8, "cy": 6, "k1": 0, "camera_model": "OPENCV"}
    meta |= {"applied_transform": turn[:3].tolist(), "ply_file_path": "sparse_pc.ply", "frames": frames}
    (tmp_path / "transforms.json").write_text(json.dumps(meta))
    return tmp_path


def edit(folder, **changes):
    path = folder / "transforms.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_nerfstudio_points_and_cameras_are_of_one_world(nerfstudio):
    scene = load_nerfstudio(nerfstudio, train=["a", "b"])
    assert scene.points.view_names == ("images/a.png", "images/b.png")
    assert torch.allclose(scene.points.positions, torch.tensor([[0.2, 5.0, 0.1]]))  # (0.1, 0.2, 5), turned
    model = cameras_of(nerfstudio / "colmap" / "sparse" / "0")
    pixel, depth = scene.train[0].camera.project(scene.points.positions)
    expected, expected_depth = model["a.png"].project(torch.tensor([[0.1, 0.2, 5.0]]))
    assert torch.allclose(pixel, expected, atol=1e-4) and torch.allclose(depth, expected_depth, atol=1e-5)
    edit(nerfstudio, applied_transform=torch.eye(4)[:3].tolist())
    with pytest.raises(SceneError, match="points are of another world"):
        load_nerfstudio(nerfstudio, train=["a", "b"])


def test_nerfstudio_intrinsics_may_be_of_each_frame(nerfstudio):
    meta = json.loads((nerfstudio / "transforms.json").read_text())
    for number, frame in enumerate(meta["frames"]):
        frame |= {"fl_x": 30 + number, "fl_y": 40}
    edit(nerfstudio, frames=meta["frames"])
    found = load_nerfstudio(nerfstudio)
    expected = {frame["file_path"]: frame["fl_x"] for frame in meta["frames"]}
    assert {v.name: float(v.camera.K[0, 0]) for v in (*found.train, *found.test)} == expected
    for frame in meta["frames"]:
        del frame["fl_x"], frame["fl_y"]
    path = nerfstudio / "transforms.json"
    meta |= {"frames": meta["frames"], "camera_angle_x": 2 * math.atan(8 / 20)}
    path.write_text(json.dumps({key: value for key, value in meta.items() if key not in ("fl_x", "fl_y", "w", "h")}))
    assert load_nerfstudio(nerfstudio).train[0].camera.K[0, 0] == pytest.approx(20)


def test_nerfstudio_lists_of_views_and_masks_are_used(nerfstudio):
    edit(nerfstudio, train_filenames=["images/c.png", "images/a.png"], test_filenames=["images/b.png"])
    scene = load_nerfstudio(nerfstudio)
    assert [v.name for v in scene.train] == ["images/c.png", "images/a.png"]
    assert [v.name for v in scene.test] == ["images/b.png"]
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(12, 16)).save(nerfstudio / "mask.png")
    meta = json.loads((nerfstudio / "transforms.json").read_text())
    edit(nerfstudio, frames=[frame | {"mask_path": "mask.png"} for frame in meta["frames"]])
    assert torch.allclose(load_nerfstudio(nerfstudio).test[0].mask.flatten() * 255, torch.arange(192.0), atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"camera_model": "OPENCV_FISHEYE"}, "camera_model OPENCV_FISHEYE, which no pinhole"),
        ({"k1": 0.1, "p2": 0.01}, r"lens distortion \{'k1': 0.1, 'p2': 0.01\}"),
        ({"frames": []}, "no frames"),
    ],
)
def test_nerfstudio_cameras_that_are_no_pinholes_are_refused(nerfstudio, changes, message):
    edit(nerfstudio, **changes)
    with pytest.raises(SceneError, match=message):
        load_nerfstudio(nerfstudio)
    if "k1" in changes:
        assert load_nerfstudio(nerfstudio, distortion="ignore").train[0].camera.K[0, 0] == 20


def test_nerfstudio_point_clouds_without_tracks_have_to_be_asked_for(nerfstudio):
    header = "ply\nformat ascii 1.0\nelement vertex 2\n" + "".join(f"property float {axis}\n" for axis in "xyz")
    header += "".join(f"property uchar {color}\n" for color in ("red", "green", "blue")) + "end_header\n"
    (nerfstudio / "sparse_pc.ply").write_text(header + "1 2 3 255 0 51\n4 5 6 0 255 0\n")
    assert len(load_nerfstudio(nerfstudio, train=["a", "b"]).points) == 1
    cloud = load_nerfstudio(nerfstudio, points="ply").points
    assert cloud.positions.tolist() == [[1, 2, 3], [4, 5, 6]] and cloud.seen is None
    assert torch.allclose(cloud.colors[0], torch.tensor([1, 0, 0.2]))
    assert load_nerfstudio(nerfstudio, points="none").points is None
