"""Posing raw photographs: rendered ones with true poses, EXIF turns, and what goes wrong."""

import numpy as np
import pytest
import torch
from PIL import Image

from common.splatting import PartlyPosed, SceneError, load_colmap, pose_photos
from common.splatting.colmap import read_model
from common.splatting.generated import facade_rig, facade_world
from common.splatting.photos import _photographs

SIZE = (256, 192)
ORIENTATION, FOCAL_35MM = 0x0112, 0xA405


@pytest.fixture(scope="module")
def rig():
    return facade_rig(SIZE, 12, 0)[2:8]


@pytest.fixture(scope="module")
def photographs(rig):
    world = facade_world(2)
    views = [world.render(camera, f"v{index}", samples=2) for index, camera in enumerate(rig)]
    return [Image.fromarray((view.image * 255).round().byte().numpy()) for view in views]


@pytest.fixture
def folder(tmp_path, photographs):
    """Six photographs that know their focal length; the third is stored lying on its side, with a note to turn it."""
    place = tmp_path / "photos"
    place.mkdir()
    for index, image in enumerate(photographs):
        exif = Image.Exif()
        if index == 2:
            image = image.transpose(Image.Transpose.ROTATE_90)
            exif[ORIENTATION] = 6
        exif.get_ifd(0x8769)[FOCAL_35MM] = 31  # mm: 31 / 36 * 256 = 220 pixels; true are 222
        image.save(place / f"shot{index}.jpg", quality=97, subsampling=0, exif=exif)
    return place


def aligned(found, true):
    """[N, 3] found camera centres brought onto the true ones by a similarity (Umeyama), and the size of the rig."""
    a, b = found - found.mean(dim=0), true - true.mean(dim=0)
    u, s, vt = torch.linalg.svd(b.T @ a)
    flip = torch.diag(torch.tensor([1.0, 1.0, float(torch.sign(torch.linalg.det(u @ vt)))], dtype=a.dtype))
    rotation = u @ flip @ vt
    scale = (s * flip.diagonal()).sum() / (a * a).sum()
    return scale * a @ rotation.T, b


def test_rendered_photographs_are_posed_where_they_were_rendered(folder, rig, tmp_path):
    told = []
    out = pose_photos(folder, tmp_path / "scene", train=["shot0", "shot2", "shot4"], progress=told.append)
    assert out == tmp_path / "scene"
    assert sorted(path.name for path in out.iterdir()) == ["images", "sparse"]
    scene = load_colmap(out, train=["shot0", "shot2", "shot4"])
    views = sorted((*scene.train, *scene.test), key=lambda view: view.name)
    assert [view.name for view in views] == [f"shot{i}.png" for i in range(6)]
    # the turned photograph is upright, as all others: their cameras agree on up
    found, true = aligned(
        torch.stack([view.camera.center for view in views]).double(),
        torch.stack([camera.center for camera in rig]).double(),
    )
    assert (found - true).norm(dim=1).max() < 0.03 * true.norm(dim=1).max()
    assert float(views[0].camera.K[0, 0]) == pytest.approx(221.7, rel=0.03)
    assert views[2].image.shape == views[1].image.shape
    ups = torch.stack([view.camera.up for view in views])
    assert (ups @ ups[0]).min() > 0.98

    model = read_model(out / "sparse" / "0")
    train = {image.id for image in model.images.values() if image.name in {"shot0.png", "shot2.png", "shot4.png"}}
    assert len(model.points.ids) > 50
    assert set(model.points.track_images.tolist()) <= train, "no other photograph has a part in the points"
    assert len(scene.points) == len(model.points.ids)
    pixels, depth = scene.train[1].camera.project(scene.points.positions[scene.points.seen[:, 1]])
    assert (depth > 0).all() and (pixels > -1).all()
    assert any("6 photographs, 6 with a focal length" in line for line in told)
    assert any("points from 3 training views" in line for line in told)


def test_a_photograph_of_another_place_is_named_and_the_rest_kept(folder, tmp_path):
    for name in ("shot3", "shot4", "shot5"):
        (folder / f"{name}.jpg").unlink()
    noise = np.random.default_rng(0).integers(0, 256, (192, 256, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "holiday.png")
    with pytest.raises(PartlyPosed, match=r"3 of 4 photographs posed.*left out: holiday\.png") as caught:
        pose_photos(folder, tmp_path / "scene")
    assert caught.value.left_out == ("holiday.png",)
    scene = load_colmap(caught.value.folder, train=[0, 1, 2])
    assert len(scene.train) == 3 and len(scene.points) > 50


def test_nothing_in_common_is_said_so_and_nothing_is_left_behind(tmp_path):
    place = tmp_path / "photos"
    place.mkdir()
    for seed in range(3):
        pixels = np.random.default_rng(seed).integers(0, 256, (120, 160, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{seed}.png")
    with pytest.raises(SceneError, match="no two of the 3 photographs match"):
        pose_photos(place, tmp_path / "scene")
    assert not (tmp_path / "scene").exists()


def test_what_is_no_set_of_photographs_is_refused_before_any_work(folder, tmp_path):
    out = tmp_path / "scene"
    with pytest.raises(FileNotFoundError, match="no such folder"):
        pose_photos(tmp_path / "none", out)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "IMG_1.HEIC").touch()
    (empty / "one.jpg").touch()
    with pytest.raises(SceneError, match=r"1 photographs; expected two or more.*Convert the \['.HEIC'\] files"):
        pose_photos(empty, out)
    with pytest.raises(SceneError, match=r"max_size.*got 10"):
        pose_photos(folder, out, max_size=10)
    with pytest.raises(SceneError, match=r"view 'shot': did you mean 'shot\d\.jpg'"):
        pose_photos(folder, out, train=["shot", "shot1"])
    out.mkdir()
    (out / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        pose_photos(folder, out)
    assert (out / "notes.txt").exists()


def test_a_broken_photograph_is_named(folder, tmp_path):
    data = (folder / "shot1.jpg").read_bytes()
    (folder / "shot1.jpg").write_bytes(data[: len(data) // 3])
    with pytest.raises(SceneError, match=r"shot1\.jpg: the image cannot be read"):
        pose_photos(folder, tmp_path / "scene")
    assert not (tmp_path / "scene").exists()
    (folder / "shot1.jpg").write_bytes(data)
    (folder / "shot1.png").write_bytes(data)
    with pytest.raises(SceneError, match="more than one photograph is called 'shot1'"):
        pose_photos(folder, tmp_path / "scene")


def test_an_unknown_camera_model_is_refused(folder, tmp_path):
    with pytest.raises(SceneError, match="camera_model 'PHONE' is none of COLMAP's"):
        pose_photos(folder, tmp_path / "scene", camera_model="PHONE")


def test_hidden_files_are_no_photographs(folder):
    (folder / "._shot0.jpg").write_text("left by a file manager")
    assert len(_photographs(folder)) == 6
