"""COLMAP models: our reader against pycolmap's, damaged files, cameras, points without leakage."""

import shutil

import numpy as np
import pycolmap
import pytest
import torch
from PIL import Image
from toy_scenes import IMAGES, PINHOLE, POINTS, write_colmap_binary, write_colmap_text, write_images

from common.splatting import SceneError, load_colmap
from common.splatting.colmap import find_model, model_camera, model_points, read_model

NAMES = [name for _, name, _, _ in IMAGES]
WRITERS = {"binary": write_colmap_binary, "text": write_colmap_text}


@pytest.fixture
def scene(tmp_path):
    write_colmap_binary(tmp_path / "sparse" / "0")
    write_images(tmp_path / "images", NAMES)
    return tmp_path


@pytest.mark.parametrize("form", WRITERS)
def test_what_was_written_is_read(tmp_path, form):
    WRITERS[form](tmp_path)
    model = read_model(tmp_path)
    camera = model.cameras[5]
    assert (camera.model, camera.width, camera.height, camera.params) == PINHOLE
    assert [(i.id, i.name, i.camera_id) for i in model.images.values()] == [(n, name, 5) for n, name, _, _ in IMAGES]
    for (_, _, pose, keypoints), image in zip(IMAGES, model.images.values(), strict=True):
        assert [*image.quaternion, *image.translation] == list(pose)
        assert [(*xy, p) for xy, p in zip(image.keypoints.tolist(), image.point_ids.tolist(), strict=True)] == keypoints
    points = model.points
    tracks = [
        points.track_images[a:b].tolist() for a, b in zip(points.track_starts, points.track_starts[1:], strict=False)
    ]
    assert tracks == [[image for image, _ in track] for *_, track in POINTS]
    assert points.xyz.tolist() == [list(xyz) for _, xyz, *_ in POINTS]
    assert points.rgb.tolist() == [list(rgb) for _, _, rgb, *_ in POINTS] and points.rgb.dtype == np.uint8
    assert points.error.tolist() == [0.5, 0.25, 0.75] and points.ids.tolist() == [7, 8, 9]


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("camera", [PINHOLE, ("OPENCV", 640, 480, (500.0, 510, 320, 240, 0.1, -0.05, 1e-3, 2e-3))])
def test_pycolmap_reads_the_same(tmp_path, form, camera):
    """The oracle. It wants every image to be of a registered frame, as ours are."""
    WRITERS[form](tmp_path, camera=camera)
    ours, theirs = read_model(tmp_path), pycolmap.Reconstruction(tmp_path)
    assert ours.cameras[5].params == pytest.approx(theirs.cameras[5].params)
    assert ours.cameras[5].model == theirs.cameras[5].model.name
    for number, image in theirs.images.items():
        mine = ours.images[number]
        assert mine.name == image.name
        assert torch.allclose(
            model_camera(ours, mine, distortion="ignore").viewmat[:3],
            torch.from_numpy(image.cam_from_world().matrix()).float(),
            atol=1e-6,
        )
        assert np.array_equal(mine.keypoints, np.array([p.xy for p in image.points2D]).reshape(-1, 2))
    for index, number in enumerate(ours.points.ids):
        assert np.array_equal(ours.points.xyz[index], theirs.points3D[number].xyz)
        assert np.array_equal(ours.points.rgb[index], theirs.points3D[number].color)


def test_pycolmap_reads_the_same_from_what_it_writes(real_data, tmp_path):
    folder = real_data("scene_fern_llff") / "sparse" / "0"
    theirs = pycolmap.Reconstruction(folder)
    theirs.write_text(tmp_path)  # also rigs and frames, which are not needed
    for place in (folder, tmp_path):
        model = read_model(place)
        assert sorted(model.images) == sorted(theirs.images) and len(model.points.ids) == 6271
        expected = np.array([theirs.points3D[number].xyz for number in model.points.ids])
        assert np.allclose(model.points.xyz, expected, rtol=0, atol=0)


@pytest.mark.parametrize("stem", ["cameras", "images", "points3D"])
@pytest.mark.parametrize("cut", [4, 11, -1])
def test_a_truncated_file_is_named(tmp_path, stem, cut):
    write_colmap_binary(tmp_path)
    path = tmp_path / f"{stem}.bin"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(SceneError, match=rf"{stem}\.bin: ends after \d+ bytes.*truncated"):
        read_model(tmp_path)


@pytest.mark.parametrize("stem", ["cameras", "images", "points3D"])
def test_bytes_after_the_end_are_not_overlooked(tmp_path, stem):
    write_colmap_binary(tmp_path)
    with (tmp_path / f"{stem}.bin").open("ab") as file:
        file.write(b"\0\0\0")
    with pytest.raises(SceneError, match=rf"{stem}\.bin.*damaged"):
        read_model(tmp_path)


@pytest.mark.parametrize(
    ("stem", "line", "text", "message"),
    [
        ("cameras", 1, "5 PINHOLE 16 12 20 21 8", "cameras.txt, line 2: expected CAMERA_ID MODEL"),
        ("cameras", 1, "5 TELESCOPE 16 12 20 21 8 6", "line 2.*known model"),
        ("images", 1, "3 1 0 0 0 -1 zero 0 5 b.png", "images.txt, line 2: expected IMAGE_ID"),
        ("images", 1, "3 1 0 0 0 -1 0 0 5", "line 2"),
        ("images", 2, "8.5 6.0", "images.txt, line 3: expected POINTS2D"),
        ("points3D", 2, "8 0.5 -0.2", "points3D.txt, line 3: expected POINT3D_ID"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, stem, line, text, message):
    write_colmap_text(tmp_path)
    path = tmp_path / f"{stem}.txt"
    lines = path.read_text().splitlines()
    lines[line] = text
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(SceneError, match=message):
        read_model(tmp_path)


def test_files_of_different_models_are_noticed(tmp_path):
    write_colmap_binary(tmp_path, images=IMAGES[1:])
    with pytest.raises(SceneError, match="tracks name image 3"):
        read_model(tmp_path)
    (tmp_path / "points3D.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"no points3D\.bin or points3D\.txt"):
        read_model(tmp_path)


@pytest.mark.parametrize("place", ["sparse/0", "sparse", "colmap/sparse/0", "."])
def test_all_layouts_are_found(tmp_path, place):
    assert find_model(tmp_path) is None
    write_colmap_text(tmp_path / place)
    assert find_model(tmp_path) == tmp_path / place


def test_the_scene_has_views_sorted_by_name_and_points_of_training_views(scene):
    loaded = load_colmap(scene, train=["a", "b.png"])
    assert [view.name for view in loaded.train] == ["a.png", "b.png"]
    assert [view.name for view in loaded.test] == ["c.png", "sub/d.png"]
    pixels = np.asarray(Image.open(scene / "images" / "a.png"))
    assert torch.equal((loaded.train[0].image * 255).round().byte(), torch.from_numpy(pixels.copy()))
    assert loaded.points is not None and loaded.points.positions.tolist() == pytest.approx(np.float32([[0.1, 0.2, 5]]))
    assert loaded.points.view_names == ("a.png", "b.png") and loaded.points.seen.all()


@pytest.mark.parametrize(("train", "left"), [("ab", [7]), ("bc", [9]), ("ac", [8]), ("abc", [7, 8, 9])])
def test_no_test_view_has_a_part_in_the_points(scene, train, left):
    """The trap of sparse-view runs: a model of all views knows what the test views saw."""
    loaded = load_colmap(scene, train=list(train))
    expected = [xyz for number, xyz, *_ in POINTS if number in left]
    assert torch.allclose(loaded.points.positions, torch.tensor(expected))
    assert set(loaded.points.view_names) <= {view.name for view in loaded.train}
    by_id = {number: name for number, name, *_ in IMAGES}
    for *_, track in (point for point in POINTS if point[0] in left):
        assert len({by_id[image] for image, _ in track} & {f"{name}.png" for name in train}) >= 2


def test_fern_at_three_views_keeps_only_points_that_two_of_them_saw(real_data):
    folder = real_data("scene_fern_llff")
    loaded = load_colmap(folder, factor=8, views=3, distortion="ignore")
    assert len(loaded.points) == 1256  # of 6271; counted once more below, from pycolmap's tracks
    model = pycolmap.Reconstruction(folder / "sparse" / "0")
    train = {view.name for view in loaded.train}
    kept = 0
    for point in model.points3D.values():
        kept += len({model.images[e.image_id].name for e in point.track.elements} & train) >= 2
    assert kept == 1256


def test_no_points_left_is_none(scene):
    assert load_colmap(scene, train=["a", "sub/d"]).points is None


def residuals(folder, distortion=0.0):
    """[N, 2] pixels from the recorded keypoints to where our cameras put their points, with k of SIMPLE_RADIAL."""
    model = read_model(folder)
    cloud = model_points(model)
    row = {number: index for index, number in enumerate(model.points.ids.tolist())}
    off = []
    for image in model.images.values():
        has_point = image.point_ids >= 0
        positions = cloud.positions[[row[number] for number in image.point_ids[has_point].tolist()]]
        camera = model_camera(model, image)
        pixels, depth = camera.project(positions)
        assert (depth > 0).all()
        middle = camera.K[:2, 2]
        slopes = (pixels - middle) / camera.K[0, 0]
        bent = middle + (pixels - middle) * (1 + distortion * (slopes**2).sum(dim=1, keepdim=True))
        off.append(bent - torch.from_numpy(image.keypoints[has_point]).float())
    return torch.cat(off)


def test_fern_points_project_onto_the_recorded_keypoints(real_data):
    """A wrong convention of axes or of pixel centres would show: half a pixel would be in the mean of the residuals."""
    folder = real_data("scene_fern_llff") / "sparse_pinhole" / "0"
    dropped, kept = residuals(folder), residuals(folder, 0.019750463822896944)
    assert dropped.norm(dim=1).mean() == pytest.approx(0.855, abs=0.005)  # what `distortion="ignore"` costs
    assert kept.norm(dim=1).mean() == pytest.approx(0.3995, abs=0.005)
    assert kept.mean(dim=0).abs().max() < 0.01


def test_brighton_points_project_onto_the_recorded_keypoints(real_data):
    off = residuals(real_data("scene_brighton_drone") / "sparse" / "0")
    assert off.norm(dim=1).mean() == pytest.approx(0.26, abs=0.005)  # as its SOURCE.md says
    assert off.mean(dim=0).abs().max() < 0.01


def test_a_name_with_a_blank_is_one_name(tmp_path):
    for form, write in WRITERS.items():
        write(tmp_path / form, images=[(1, "holiday 1.jpg", IMAGES[0][2], [])], points=[])
        assert read_model(tmp_path / form).images[1].name == "holiday 1.jpg"


def test_a_distorted_camera_is_refused_or_knowingly_ignored(scene):
    bent = ("SIMPLE_RADIAL", 16, 12, (20.0, 8.0, 6.0, 0.1))
    write_colmap_binary(scene / "sparse" / "0", camera=bent)
    with pytest.raises(SceneError, match=r"camera 5 is SIMPLE_RADIAL with distortion 0\.1;.*image_undistorter"):
        load_colmap(scene)
    K = load_colmap(scene, distortion="ignore").train[0].camera.K
    assert K.tolist() == [[20, 0, 8], [0, 20, 6], [0, 0, 1]]
    write_colmap_binary(scene / "sparse" / "0", camera=("SIMPLE_RADIAL", 16, 12, (20.0, 8.0, 6.0, 0.0)))
    assert torch.equal(load_colmap(scene).train[0].camera.K, K)  # no distortion is a pinhole
    write_colmap_binary(scene / "sparse" / "0", camera=("FOV", 16, 12, (20.0, 20.0, 8.0, 6.0, 0.9)))
    with pytest.raises(SceneError, match="FOV, which no pinhole comes near"):
        load_colmap(scene, distortion="ignore")
    with pytest.raises(SceneError, match="distortion is 'error' or 'ignore'; got 'drop'"):
        load_colmap(scene, distortion="drop")


def test_reduced_images_bring_reduced_cameras(scene):
    write_images(scene / "images_2", [name.replace(".png", ".jpg") for name in NAMES], (8, 6))
    small = load_colmap(scene, factor=2)
    assert small.train[0].image.shape == (6, 8, 3)
    assert small.train[0].camera.K.tolist() == [[10, 0, 4], [0, 10.5, 3], [0, 0, 1]]
    shutil.rmtree(scene / "images_2")
    resampled, full = load_colmap(scene, factor=2), load_colmap(scene)
    assert torch.equal(resampled.train[0].camera.K, small.train[0].camera.K)
    blocks = full.train[0].image.reshape(6, 2, 8, 2, 3).mean(dim=(1, 3))
    assert torch.allclose(resampled.train[0].image, blocks, atol=1e-6)


def test_missing_and_unfitting_images_are_named(scene):
    (scene / "images" / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.png: no such image; images holds 2 images, such as a\.png"):
        load_colmap(scene, train=["a", "b"])
    write_images(scene / "images", ["b.png"], (12, 12))
    with pytest.raises(SceneError, match=r"b\.png: 12 x 12 pixels, but its camera has 16 x 12"):
        load_colmap(scene, train=["a", "b"])
    (scene / "images" / "b.png").write_bytes((scene / "images" / "a.png").read_bytes()[:200])
    with pytest.raises(SceneError, match=r"b\.png: the image cannot be read"):
        load_colmap(scene, train=["a", "b"])
    (scene / "images" / "b.png").write_text("not a picture")
    with pytest.raises(SceneError, match=r"b\.png: not an image that can be read; 13 bytes"):
        load_colmap(scene, train=["a", "b"])
    shutil.rmtree(scene / "images")
    with pytest.raises(FileNotFoundError, match="no folder images"):
        load_colmap(scene)


def test_the_stored_picture_counts_where_the_solver_saw_it_so(scene):
    """COLMAP ignores EXIF orientation; an upright copy of a turned photograph is turned as its camera is."""
    upright = Image.open(scene / "images" / "a.png").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    upright.save(scene / "images" / "a.png", exif=exif)
    assert torch.equal(load_colmap(scene, train=["a", "b"]).train[0].image, _floats(upright))
    upright.transpose(Image.Transpose.ROTATE_90).save(scene / "images" / "a.png", exif=exif)
    assert torch.equal(load_colmap(scene, train=["a", "b"]).train[0].image, _floats(upright))


def test_one_view_alone_has_to_be_asked_for(scene):
    with pytest.raises(SceneError, match=r"1 training views, expected 2 or more.*allow_single"):
        load_colmap(scene, train=["a"])
    assert load_colmap(scene, train=["a"], allow_single=True).extent == 0


def _floats(image):
    return torch.from_numpy(np.asarray(image).copy()).float() / 255
