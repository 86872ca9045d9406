"""The layout of the SpaRe benchmark, and which layout a folder has."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from toy_scenes import write_colmap_text, write_images

from common.splatting import Camera, SceneError, load_spare, look_at, open_scene, recognise
from common.splatting.spare import decompose, spare_cameras

K = torch.tensor([[2900.0, 0, 810], [0, 2880, 610], [0, 0, 1]])


def rig(count=6):
    eyes = [(600 * np.cos(a), 600 * np.sin(a), 250.0) for a in np.linspace(0, 1, count)]
    return [look_at(eye, (0, 0, 0), (0, 0, 1), K, 1600, 1200) for eye in eyes]


def projection(camera: Camera):
    return (camera.K.double() @ camera.viewmat[:3].double()).numpy()


@pytest.fixture
def benchmark(tmp_path):
    """Six cameras, inputs 0, 1, 2 and test views 4, 5 of one scene; images at a quarter of the size."""
    (tmp_path / "synth_calibration").mkdir()
    for index, camera in enumerate(rig()):
        np.savetxt(tmp_path / "synth_calibration" / f"pos_{index + 1:03d}.txt", -3.0 * projection(camera))
    split = {"Amplifier": {"input_views": [2, 0, 1], "test_views": [4, 5], "dataset": "Synthetic"}}
    (tmp_path / "Track1_split_test.json").write_text(json.dumps(split))
    write_images(tmp_path / "Amplifier", [f"cam_{n:03d}_3_0000.png" for n in (1, 2, 3)], (400, 300))
    return tmp_path


turns = st.lists(st.floats(-3, 3), min_size=3, max_size=3)


@settings(max_examples=40, deadline=None)
@given(turns, st.floats(0.1, 50), st.sampled_from([1.0, -1.0]), st.floats(-5, 5))
def test_a_projection_matrix_is_taken_apart(turn, scale, sign, skew):
    """Up to scale and sign, as matrices come; K may have a skew."""
    x, y, z = turn
    rotation = torch.linalg.matrix_exp(torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64))
    viewmat = torch.eye(4, dtype=torch.float64)
    viewmat[:3, :3], viewmat[:3, 3] = rotation, torch.tensor([30.0, -20.0, 600.0])
    matrix = K.double().clone()
    matrix[0, 1] = skew
    camera = decompose(sign * scale * (matrix @ viewmat[:3]).numpy(), 1600, 1200)
    assert torch.allclose(camera.viewmat.double(), viewmat, atol=1e-4)  # float32 of 600
    assert torch.allclose(camera.K.double(), matrix, atol=1e-2)


@pytest.mark.parametrize("bad", [np.zeros((3, 4)), np.ones((3, 4)), np.eye(4), np.full((3, 4), np.nan)])
def test_what_is_no_projection_is_refused(bad):
    with pytest.raises(SceneError, match="a projection matrix"):
        decompose(bad, 1600, 1200)


def test_index_i_is_camera_i_plus_one(benchmark):
    scene = load_spare(benchmark, "Amplifier")
    assert [v.name for v in scene.train] == ["cam_003_3_0000.png", "cam_001_3_0000.png", "cam_002_3_0000.png"]
    assert scene.test == (), "hidden ground truth: the cameras are all there is"
    for view, index in zip(scene.train, (2, 0, 1), strict=True):
        assert torch.allclose(view.camera.viewmat, rig()[index].viewmat, atol=1e-3)
        assert torch.allclose(view.camera.K[:2], rig()[index].K[:2] / 4, atol=1e-3)
    assert torch.allclose(spare_cameras(benchmark / "synth_calibration", [4])[0].center, rig()[4].center, atol=1e-2)


def test_test_views_that_are_there_are_loaded(benchmark):
    write_images(benchmark / "Amplifier", ["cam_005_3_0000.png"], (400, 300))
    with pytest.raises(FileNotFoundError, match="cam_006_3_0000"):
        load_spare(benchmark, "Amplifier")  # one of two: something is wrong
    write_images(benchmark / "Amplifier", ["cam_006_3_0000.png"], (400, 300))
    scene = load_spare(benchmark, "Amplifier", factor=2)
    assert [v.name for v in scene.test] == ["cam_005_3_0000.png", "cam_006_3_0000.png"]
    assert scene.test[0].image.shape == (150, 200, 3)


def test_dtu_files_and_lightings_have_their_own_names(benchmark):
    split = {"scan63": {"input_views": [0, 1], "test_views": [2], "dataset": "DTU"}}
    (benchmark / "Track1_split_test.json").write_text(json.dumps(split))
    write_images(benchmark / "scan63", ["rect_001_5_r5000.png", "rect_002_5_r5000.png"], (400, 300))
    assert [v.name for v in load_spare(benchmark, "scan63", lighting=5).train] == [
        "rect_001_5_r5000.png",
        "rect_002_5_r5000.png",
    ]
    (benchmark / "dtu_calibration").mkdir()
    np.savetxt(benchmark / "dtu_calibration" / "pos_001.txt", projection(rig()[0]))
    with pytest.raises(FileNotFoundError, match=r"dtu_calibration.pos_002\.txt: .*view index 1 is camera 2"):
        load_spare(benchmark, "scan63", lighting=5)


def test_spare_errors(benchmark):
    with pytest.raises(SceneError, match=r"no scene 'Amp'.*\['Amplifier'\]"):
        load_spare(benchmark, "Amp")
    with pytest.raises(SceneError, match="lighting is 0 to 6"):
        load_spare(benchmark, "Amplifier", lighting=7)
    (benchmark / "Track2_split_test.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="2 split files"):
        load_spare(benchmark, "Amplifier")
    chosen = benchmark / "Track1_split_test.json"
    (benchmark / "synth_calibration" / "pos_001.txt").write_text("1 2 3\n")
    with pytest.raises(SceneError, match=r"pos_001\.txt: expected a 3 x 4 projection matrix"):
        load_spare(benchmark, "Amplifier", split=chosen)


def test_layouts_are_recognised(benchmark, tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        recognise(root / "none")
    with pytest.raises(SceneError, match="no scene in it"):
        recognise(root)
    with pytest.raises(SceneError, match="load_spare"):
        recognise(benchmark)
    write_images(root, ["a.png", "b.jpg"])
    with pytest.raises(SceneError, match="It has 2 images: pose them with resparse scene pose"):
        open_scene(root)
    for layout, file in (
        ("llff", "poses_bounds.npy"),
        ("nerfstudio", "transforms.json"),
        ("blender", "transforms_train.json"),
    ):
        write_colmap_text(root / "sparse")
        (root / file).touch()
        assert recognise(root) == layout
        (root / file).unlink()
        assert recognise(root) == "colmap"
    with pytest.raises(SceneError, match="layout is one of blender, nerfstudio, llff, colmap; got 'dtu'"):
        open_scene(root, layout="dtu")


@pytest.mark.parametrize(
    ("name", "layout"),
    [("scene_fern_llff", "llff"), ("scene_chair_blender", "blender"), ("scene_brighton_drone", "colmap")],
)
def test_the_real_sets_are_recognised(real_data, name, layout):
    assert recognise(real_data(name)) == layout


def test_options_of_another_layout_are_not_swallowed(tmp_path):
    write_colmap_text(tmp_path / "sparse")
    write_images(tmp_path / "images", ["a.png", "b.png", "c.png", "sub/d.png"])
    assert len(open_scene(tmp_path, train=["a", "b"]).test) == 2
    with pytest.raises(TypeError, match="background"):
        open_scene(tmp_path, background=(1, 1, 1))


def test_a_sixteen_bit_grey_image_is_not_clipped(tmp_path):
    """Pillow's own conversion to RGB cuts 16 bits at 255."""
    write_colmap_text(tmp_path / "sparse")
    write_images(tmp_path / "images", ["b.png", "c.png", "sub/d.png"])
    ramp = np.linspace(0, 65535, 192).astype(np.uint16).reshape(12, 16)
    Image.fromarray(ramp).save(tmp_path / "images" / "a.png")
    image = open_scene(tmp_path, train=["a", "b"]).train[0].image
    assert np.allclose(image[..., 0], ramp / 65535, atol=1 / 255)
