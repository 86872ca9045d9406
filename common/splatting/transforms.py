"""Scenes described by `transforms*.json`: Blender's (NeRF-synthetic) and nerfstudio's.

Both hold camera-to-world matrices with OpenGL axes (x right, y up, z backwards).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from common.splatting import splits
from common.splatting._images import IMAGE_SUFFIXES, image_size, load_view, read_pixels
from common.splatting.cameras import Camera, intrinsics
from common.splatting.colmap import Distortion, find_model, points_for
from common.splatting.errors import SceneError
from common.splatting.ply import import_points
from common.splatting.scene import Scene, View

__all__ = ["WHITE", "load_blender", "load_nerfstudio"]

WHITE = (1.0, 1.0, 1.0)
PINHOLES = ("", "PINHOLE", "SIMPLE_PINHOLE", "OPENCV")
BENT = ("k1", "k2", "k3", "k4", "p1", "p2")


def load_blender(
    folder: str | Path,
    *,
    factor: float = 1,
    views: int | None = None,
    train: Sequence[int | str] | None = None,
    test: Sequence[int | str] | None = None,
    background: Sequence[float] = WHITE,
    allow_single: bool = False,
) -> Scene:
    """A NeRF-synthetic scene: `transforms_train.json` and `transforms_test.json` with their RGBA images.

    views   of the training file: the first so many of the published ids (`splits.blender`); None for all
    train, test   instead: frames of the training and of the test file, by index or name
    background    [3] 0..1 behind the object; the alpha channel becomes the views' mask

    The layout has no points. Raises FileNotFoundError for missing files, SceneError for files of another form.
    """
    root = Path(folder)
    frames = {part: _read(root / f"transforms_{part}.json") for part in ("train", "test")}
    names = {part: [str(Path(f["file_path"])) for f in frames[part]["frames"]] for part in frames}
    if train is None and views is not None:
        train = splits.blender(views)
    elif views is not None:
        raise SceneError(f"{root}: views and train are both given; views takes the published ids, train your own.")

    def load(part: str, which: Sequence[int | str] | None) -> tuple[View, ...]:
        taken = range(len(names[part])) if which is None else splits.choose(names[part], train=which, test=()).train
        return tuple(_blender_view(root, frames[part], index, factor, background) for index in taken)

    shade = torch.tensor(background, dtype=torch.float32)
    return Scene(
        root.resolve().name, load("train", train), load("test", test), background=shade, allow_single=allow_single
    )


def load_nerfstudio(
    folder: str | Path,
    *,
    factor: float = 1,
    views: int | None = None,
    train: Sequence[int | str] | None = None,
    test: Sequence[int | str] | None = None,
    points: Literal["tracks", "ply", "none"] = "tracks",
    distortion: Distortion = "error",
    allow_single: bool = False,
) -> Scene:
    """A scene processed for nerfstudio: `transforms.json` with intrinsics for all frames or for each.

    factor  from the folder `images_<factor>` beside that of the images, or resampled here
    views, train, test   see `splits.choose`; without them `train_filenames` and `test_filenames` count, where present
    points  "tracks": the COLMAP model in the folder, points that two training views saw (none if there is no model);
            "ply": all of `ply_file_path`. A PLY has no tracks, so its points may come from test views: no fair
            start for a sparse-view run; "none"
    distortion   as in `load_colmap`

    Raises FileNotFoundError for missing files, SceneError for files of another form and unsupported cameras.
    """
    root = Path(folder)
    meta = _read(root / "transforms.json")
    frames = sorted(meta["frames"], key=lambda frame: frame["file_path"])
    names = [str(Path(frame["file_path"])) for frame in frames]
    if (views, train, test) == (None, None, None) and "train_filenames" in meta:
        train = [str(Path(name)) for name in meta["train_filenames"]]
        test = [str(Path(name)) for name in meta.get("test_filenames", meta.get("val_filenames", []))]
    split = splits.choose(names, views=views, train=train, test=test)
    cameras = {
        name: _nerfstudio_camera(root, {**meta, **frame}, distortion) for name, frame in zip(names, frames, strict=True)
    }
    train_views, test_views = (
        tuple(_nerfstudio_view(root, names[i], frames[i], cameras[names[i]], factor) for i in indices)
        for indices in (split.train, split.test)
    )
    cloud = None
    if points == "tracks" and (place := find_model(root)):
        moved = torch.tensor(meta.get("applied_transform", np.eye(4).tolist()), dtype=torch.float32)[:3]
        cloud = points_for(place, cameras, [view.name for view in train_views], moved)
    elif points == "ply":
        if "ply_file_path" not in meta:
            raise SceneError(f"{root}: transforms.json names no ply_file_path; points='tracks' or 'none' needs none.")
        cloud = import_points(root / meta["ply_file_path"])
    return Scene(root.resolve().name, train_views, test_views, cloud, allow_single=allow_single)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        for frame in meta["frames"]:
            frame["pose"] = _viewmat(frame["transform_matrix"])
            Path(frame["file_path"])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise SceneError(
            f"{path}: expected JSON with frames, each with file_path and a 4 x 4 transform_matrix; "
            f"{type(error).__name__}: {error}"
        ) from error
    if not meta["frames"]:
        raise SceneError(f"{path}: no frames in it.")
    return meta


def _viewmat(matrix: Sequence[Sequence[float]]) -> Tensor:
    """World to camera with OpenCV axes from a camera-to-world matrix with OpenGL axes."""
    pose = torch.tensor(matrix, dtype=torch.float64)
    if tuple(pose.shape) not in ((4, 4), (3, 4)):
        raise SceneError(f"transform_matrix is 4 x 4; got {list(pose.shape)}")
    viewmat = torch.eye(4, dtype=torch.float64)
    viewmat[:3, :3] = (pose[:3, :3] * torch.tensor([1.0, -1.0, -1.0])).T
    viewmat[:3, 3] = -viewmat[:3, :3] @ pose[:3, 3]
    return viewmat.float()


def _blender_view(root: Path, meta: Mapping[str, Any], index: int, factor: float, background: Sequence[float]) -> View:
    frame = meta["frames"][index]
    path = _with_suffix(root / frame["file_path"])
    width, height = image_size(path)
    try:
        K = intrinsics(width, height, fov_x_rad=float(meta["camera_angle_x"]))
    except (KeyError, TypeError):
        raise SceneError(f"{root}: no camera_angle_x in its transforms; a Blender scene has it.") from None
    camera = Camera(frame["pose"], K, width, height)
    return load_view(str(Path(frame["file_path"])), path, camera, shrink=factor, background=background)


def _nerfstudio_camera(root: Path, frame: Mapping[str, Any], distortion: Distortion) -> Camera:
    model = frame.get("camera_model", "")
    if model not in PINHOLES:
        raise SceneError(
            f"{root}: {frame['file_path']} has camera_model {model}, which no pinhole comes near; expected one of "
            f"{', '.join(PINHOLES[1:])}. Undistort the images first."
        )
    bent = {key: frame[key] for key in BENT if frame.get(key)}
    if bent and distortion == "error":
        raise SceneError(
            f"{root}: {frame['file_path']} has lens distortion {bent}; expected none. Undistort the images first, or "
            "accept the error with distortion='ignore'."
        )
    size = {"w": frame.get("w"), "h": frame.get("h")}
    if None in size.values():
        size["w"], size["h"] = image_size(_with_suffix(root / frame["file_path"]))
    width, height = int(size["w"] or 0), int(size["h"] or 0)
    if "fl_x" in frame:
        fx, fy = float(frame["fl_x"]), float(frame.get("fl_y", frame["fl_x"]))
    elif "camera_angle_x" in frame:
        fx = fy = 0.5 * width / math.tan(0.5 * float(frame["camera_angle_x"]))
    else:
        raise SceneError(f"{root}: {frame['file_path']} has neither fl_x nor camera_angle_x, so no focal length.")
    cx, cy = float(frame.get("cx", width / 2)), float(frame.get("cy", height / 2))
    return Camera(frame["pose"], torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]]), width, height)


def _nerfstudio_view(root: Path, name: str, frame: Mapping[str, Any], camera: Camera, factor: float) -> View:
    path, shrink = _with_suffix(root / frame["file_path"]), factor
    reduced = path.parent.with_name(f"{path.parent.name}_{factor:g}") / path.name
    if factor > 1 and reduced.is_file():
        path, shrink = reduced, 1.0
    view = load_view(name, path, camera, shrink=shrink)
    if not frame.get("mask_path"):
        return view
    mask = torch.from_numpy(read_pixels(root / frame["mask_path"])[..., :1].astype(np.float32) / 255)
    sized = torch.nn.functional.interpolate(mask.movedim(-1, 0)[None], size=view.image.shape[:2], mode="area")
    return replace(view, mask=sized[0, 0])


def _with_suffix(path: Path) -> Path:
    """The image file of a `file_path`, which Blender writes without its suffix."""
    if path.is_file() or path.suffix.lower() in IMAGE_SUFFIXES:
        return path
    candidates = [path.with_name(path.name + suffix) for suffix in IMAGE_SUFFIXES]
    return next((file for file in candidates if file.is_file()), candidates[0])
