"""Scenes from COLMAP models, and the points of a model that only training views vouch for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from common.splatting import splits
from common.splatting._colmap_files import ColmapCamera, ColmapImage, ColmapModel, find_model, read_model
from common.splatting._images import IMAGE_SUFFIXES, image_folder, load_view
from common.splatting.cameras import Camera
from common.splatting.errors import SceneError
from common.splatting.scene import PointCloud, Scene, View

__all__ = ["ColmapModel", "Distortion", "find_model", "load_colmap", "model_camera", "model_points", "read_model"]

Distortion = Literal["error", "ignore"]

MIN_TRACK = 2  # training views that must have seen a point: with fewer, a test view was needed to find it
SAME_PLACE = 1e-3  # of the size of the camera rig: two pose files of one reconstruction agree better than that

_ONE_FOCAL = {"SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL"}
_TWO_FOCALS = {"PINHOLE", "OPENCV", "FULL_OPENCV"}


def load_colmap(
    folder: str | Path,
    *,
    images: str = "images",
    factor: float = 1,
    views: int | None = None,
    train: Sequence[int | str] | None = None,
    test: Sequence[int | str] | None = None,
    distortion: Distortion = "error",
    allow_single: bool = False,
) -> Scene:
    """The scene of a COLMAP model (binary or text, in sparse/0, sparse or the folder itself) and its images.

    images      folder of the images within `folder`; for a factor of 8 also `images_8`
    factor      images that much smaller, from `images_<factor>` or resampled here
    views, train, test   see `splits.choose`; the views are sorted by name
    distortion  "ignore" drops the lens distortion of a radial camera model. What that costs is the displacement of a
                pixel: 0.85 pixels on average for the fern scene at 504 x 378 (k = 0.02), much more for wide lenses.

    The points are those whose track has at least two training views, None where no point is left. Their positions
    and colours were still fitted to all views that saw them; `sfm.triangulate` starts from the training views alone.

    Raises FileNotFoundError for missing files, SceneError for damaged ones, for a camera with distortion, for images
    that do not fit their camera, and for fewer than two training views (one with `allow_single`).
    """
    root = Path(folder)
    place = find_model(root)
    if place is None:
        raise FileNotFoundError(
            f"{root}: no COLMAP model here: expected cameras, images and points3D (.bin or .txt) in sparse/0, sparse "
            "or the folder itself. Photographs without one: resparse scene pose."
        )
    model = read_model(place)
    posed = sorted(model.images.values(), key=lambda image: image.name)
    source, shrink = image_folder(root, factor, images)
    names = [image.name for image in posed]
    split = splits.choose(names, views=views, train=train, test=test)

    def load(index: int) -> View:
        image = posed[index]
        camera = model_camera(model, image, distortion=distortion)
        return load_view(image.name, _image_file(source, image.name), camera, shrink=shrink)

    points = model_points(model).seen_by([names[index] for index in split.train], at_least=MIN_TRACK)
    return Scene(
        root.resolve().name,
        train=tuple(map(load, split.train)),
        test=tuple(map(load, split.test)),
        points=points if len(points) else None,
        allow_single=allow_single,
    )


def model_camera(model: ColmapModel, image: ColmapImage, *, distortion: Distortion = "error") -> Camera:
    """The pinhole camera of one image of a model; `distortion` as in `load_colmap`.

    Raises SceneError for a camera with distortion ("error"), or one that no pinhole comes near (fisheye and others).
    """
    source = model.cameras[image.camera_id]
    if distortion not in ("error", "ignore"):
        raise SceneError(f"distortion is 'error' or 'ignore'; got {distortion!r}.")
    K = torch.tensor(_intrinsics(model, source, ignore=distortion == "ignore"), dtype=torch.float32)
    norm = np.linalg.norm(image.quaternion)
    if not (np.isfinite(norm) and norm > 0 and np.isfinite(image.translation).all()):
        raise SceneError(f"{model.folder}: image {image.name!r} has no usable pose (quaternion {image.quaternion}).")
    viewmat = np.eye(4)
    viewmat[:3, :3] = _rotation(image.quaternion / norm)
    viewmat[:3, 3] = image.translation
    return Camera(torch.from_numpy(viewmat).float(), K, source.width, source.height)


def model_points(model: ColmapModel) -> PointCloud:
    """All points of a model with their tracks; `view_names` are its images sorted by name."""
    posed = sorted(model.images.values(), key=lambda image: image.name)
    column = {image.id: index for index, image in enumerate(posed)}
    points = model.points
    owners = np.repeat(np.arange(len(points.ids)), np.diff(points.track_starts))
    seen = np.zeros((len(points.ids), len(posed)), dtype=bool)
    seen[owners, [column[image] for image in points.track_images.tolist()]] = True
    return PointCloud(
        torch.from_numpy(points.xyz).float(),
        torch.from_numpy(points.rgb).float() / 255,
        view_names=tuple(image.name for image in posed),
        seen=torch.from_numpy(seen),
    )


def points_for(
    folder: Path, cameras: Mapping[str, Camera], train: Sequence[str], transform: Tensor | None = None
) -> PointCloud | None:
    """Points of the COLMAP model in `folder` for a scene whose poses come from another file.

    cameras    all posed views of the scene, in sorted order; the model's images are matched by name, or, where no name
               is shared (LLFF renames its photographs), in sorted order
    train      names of the training views, as in `cameras`; points need `MIN_TRACK` of them in their track
    transform  [3, 4] from the model's world to the scene's, or None where they are one

    Returns None where no point is left.

    Raises SceneError where the model poses the views elsewhere: its points are then not of this world.
    """
    model = read_model(folder)
    posed = sorted(model.images.values(), key=lambda image: image.name)
    stems = {Path(image.name).stem: image for image in posed}
    matched = {name: stems[Path(name).stem] for name in cameras if Path(name).stem in stems}
    if not matched and len(posed) == len(cameras):
        matched = dict(zip(cameras, posed, strict=True))
    if not set(train) <= set(matched):
        raise SceneError(f"{folder}: none of its {len(posed)} images is called {sorted(set(train) - set(matched))[0]}.")
    cloud = model_points(model)
    move = torch.eye(3, 4) if transform is None else transform
    centers = torch.stack([model_camera(model, image, distortion="ignore").center for image in matched.values()])
    expected = torch.stack([cameras[name].center for name in matched])
    off = (centers @ move[:, :3].T + move[:, 3] - expected).norm(dim=1).max()
    size = (expected - expected.mean(dim=0)).norm(dim=1).max()
    if off > SAME_PLACE * size:
        raise SceneError(
            f"{folder}: its cameras stand up to {off:.3g} away from the scene's poses (which span {size:.3g}), so its "
            "points are of another world. Leave them out with points=False."
        )
    cloud = cloud.seen_by([matched[name].name for name in train], at_least=MIN_TRACK)
    moved = PointCloud(cloud.positions @ move[:, :3].T + move[:, 3], cloud.colors, None, tuple(train), cloud.seen)
    return moved if len(moved) else None


def _intrinsics(model: ColmapModel, camera: ColmapCamera, *, ignore: bool) -> list[list[float]]:
    if camera.model in _ONE_FOCAL:
        (fx, cx, cy), bent = camera.params[:3], camera.params[3:]
        fy = fx
    elif camera.model in _TWO_FOCALS:
        (fx, fy, cx, cy), bent = camera.params[:4], camera.params[4:]
    else:
        raise SceneError(
            f"{model.folder}: camera {camera.id} is {camera.model}, which no pinhole comes near; expected an "
            "undistorted model. Undistort it (colmap image_undistorter), or pose the photographs again (resparse scene "
            "pose)."
        )
    if any(bent) and not ignore:
        values = ", ".join(f"{value:.4g}" for value in bent)
        raise SceneError(
            f"{model.folder}: camera {camera.id} is {camera.model} with distortion {values}; "
            "expected a pinhole. Undistort it (colmap image_undistorter), pose the photographs again (resparse scene "
            "pose), or accept the error with distortion='ignore'."
        )
    return [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]


def _rotation(q: np.ndarray) -> np.ndarray:
    """[3, 3] of a unit quaternion (w, x, y, z)."""
    w, (x, y, z) = q[0], q[1:]
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + 2 * w * cross + 2 * cross @ cross


def _image_file(folder: Path, name: str) -> Path:
    """The file of an image, which a reduced set may hold with another suffix (images_8/a.png for a.JPG)."""
    exact = folder / name
    if exact.is_file():
        return exact
    others = [exact.with_suffix(suffix) for suffix in IMAGE_SUFFIXES]
    return next((path for path in others if path.is_file()), exact)
