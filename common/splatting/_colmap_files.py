"""COLMAP's model files, binary and text: cameras, images, points3D. Read as they are, checked, not interpreted.

Format: https://colmap.github.io/format.html. Whatever else lies beside (rigs, frames, database) is not needed here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.splatting.errors import SceneError

__all__ = ["MODELS", "ColmapCamera", "ColmapImage", "ColmapModel", "ColmapPoints", "find_model", "read_model"]

# name -> (number in binary files, parameters)
MODELS = {
    "SIMPLE_PINHOLE": (0, 3),
    "PINHOLE": (1, 4),
    "SIMPLE_RADIAL": (2, 4),
    "RADIAL": (3, 5),
    "OPENCV": (4, 8),
    "OPENCV_FISHEYE": (5, 8),
    "FULL_OPENCV": (6, 12),
    "FOV": (7, 5),
    "SIMPLE_RADIAL_FISHEYE": (8, 4),
    "RADIAL_FISHEYE": (9, 5),
    "THIN_PRISM_FISHEYE": (10, 12),
    "RAD_TAN_THIN_PRISM_FISHEYE": (11, 16),
    "SIMPLE_DIVISION": (12, 4),
    "DIVISION": (13, 5),
    "SIMPLE_FISHEYE": (14, 3),
    "FISHEYE": (15, 4),
    "EUCM": (16, 6),
    "EQUIRECTANGULAR": (17, 2),
}
NAMES = {number: (name, count) for name, (number, count) in MODELS.items()}
PLACES = ("sparse/0", "sparse", "colmap/sparse/0", ".")
FILES = ("cameras", "images", "points3D")
NO_POINT = -1  # of a keypoint that belongs to no 3-D point


@dataclass(frozen=True)
class ColmapCamera:
    """One camera of a model, parameters in COLMAP's order."""

    id: int
    model: str
    width: int
    height: int
    params: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class ColmapImage:
    """One posed image.

    quaternion  (w, x, y, z), world to camera;  translation [3]
    keypoints   [N, 2] float64 in pixels;  point_ids [N] int64, -1 where a keypoint has no 3-D point
    """

    id: int
    name: str
    camera_id: int
    quaternion: np.ndarray
    translation: np.ndarray
    keypoints: np.ndarray
    point_ids: np.ndarray


@dataclass(frozen=True, eq=False)
class ColmapPoints:
    """P points: ids [P] int64, xyz [P, 3], rgb [P, 3] uint8, error [P] pixels.

    The image ids of all tracks stand one after the other in `track_images` [T]; those of point p are at
    `track_starts[p]:track_starts[p + 1]`, with `track_starts` [P + 1].
    """

    ids: np.ndarray
    xyz: np.ndarray
    rgb: np.ndarray
    error: np.ndarray
    track_images: np.ndarray
    track_starts: np.ndarray


@dataclass(frozen=True, eq=False)
class ColmapModel:
    """A COLMAP model: cameras and images by id, points, and the folder they came from."""

    folder: Path
    cameras: dict[int, ColmapCamera]
    images: dict[int, ColmapImage]
    points: ColmapPoints


def find_model(folder: Path) -> Path | None:
    """The folder of the COLMAP model within `folder` (sparse/0, sparse, colmap/sparse/0 or itself), or None."""
    for place in PLACES:
        if all(_file(folder / place, stem) for stem in FILES):
            return folder / place
    return None


def read_model(folder: str | Path) -> ColmapModel:
    """The COLMAP model in `folder`, from binary files or, where there are none, from text.

    Raises FileNotFoundError where a file is missing; SceneError, naming file and place, where one is cut short, has
    more than it announces, or refers to what is not there.
    """
    folder = Path(folder)
    files = {stem: _file(folder, stem) for stem in FILES}
    missing = [stem for stem, path in files.items() if path is None]
    if missing:
        raise FileNotFoundError(
            f"{folder}: no {missing[0]}.bin or {missing[0]}.txt; a COLMAP model has {', '.join(FILES)}."
        )
    cameras, images, points = (_read(path) for path in files.values() if path)
    model = ColmapModel(folder, cameras, images, points)
    for image in images.values():
        if image.camera_id not in cameras:
            raise SceneError(
                f"{files['images']}: image {image.name!r} has camera {image.camera_id}, but there are only "
                f"{sorted(cameras)}; the files are not of one model."
            )
    strangers = np.setdiff1d(points.track_images, np.array(sorted(images), dtype=np.int64))
    if len(strangers):
        raise SceneError(
            f"{files['points3D']}: tracks name image {strangers[0]}, which images does not have "
            f"({len(strangers)} such); the files are not of one model."
        )
    return model


def _file(folder: Path, stem: str) -> Path | None:
    return next((path for path in (folder / f"{stem}.bin", folder / f"{stem}.txt") if path.is_file()), None)


def _read(path: Path):
    if path.suffix == ".txt":
        lines = _Lines(path)
        return {"cameras": _text_cameras, "images": _text_images, "points3D": _text_points}[path.stem](lines)
    stream = _Bytes(path)
    value = {"cameras": _cameras, "images": _images, "points3D": _points}[path.stem](stream)
    stream.finish()
    return value


class _Bytes:
    """A binary file read from front to back, little-endian; running out of bytes names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path.read_bytes()
        self.at = 0

    def take(self, layout: str) -> tuple:
        compiled = struct.Struct("<" + layout)
        self.need(compiled.size)
        values = compiled.unpack_from(self.data, self.at)
        self.at += compiled.size
        return values

    def array(self, dtype: np.dtype, count: int) -> np.ndarray:
        self.need(dtype.itemsize * count)
        values = np.frombuffer(self.data, dtype, count, self.at)
        self.at += dtype.itemsize * count
        return values

    def text(self) -> str:
        end = self.data.find(b"\0", self.at)
        if end < 0:
            self.need(len(self.data))
        value = self.data[self.at : end].decode("utf-8", "replace")
        self.at = end + 1
        return value

    def need(self, size: int) -> None:
        if self.at + size > len(self.data):
            raise SceneError(
                f"{self.path}: ends after {len(self.data)} bytes in the middle of a record that starts before byte "
                f"{self.at}; the file is truncated or not COLMAP's. Get it again."
            )

    def finish(self) -> None:
        if self.at != len(self.data):
            raise SceneError(
                f"{self.path}: {len(self.data)} bytes, but the records it announces end at byte {self.at}; the file is "
                "damaged or of another format. Get it again."
            )


_KEYPOINT = np.dtype([("xy", "<f8", 2), ("point", "<i8")])
_TRACK = np.dtype([("image", "<u4"), ("keypoint", "<u4")])


def _cameras(stream: _Bytes) -> dict[int, ColmapCamera]:
    cameras = {}
    for _ in range(stream.take("Q")[0]):
        number, model, width, height = stream.take("IiQQ")
        if model not in NAMES:
            raise SceneError(
                f"{stream.path}: camera {number} has model number {model}; known are 0 to {max(NAMES)}. The file is "
                "damaged, or newer than this reader."
            )
        name, count = NAMES[model]
        cameras[number] = ColmapCamera(number, name, width, height, stream.take(f"{count}d"))
    return cameras


def _images(stream: _Bytes) -> dict[int, ColmapImage]:
    images = {}
    for _ in range(stream.take("Q")[0]):
        number, *pose, camera = stream.take("I7dI")
        name = stream.text()
        points = stream.array(_KEYPOINT, stream.take("Q")[0])
        quaternion, translation = np.array(pose[:4]), np.array(pose[4:])
        images[number] = ColmapImage(number, name, camera, quaternion, translation, points["xy"], points["point"])
    return images


def _points(stream: _Bytes) -> ColmapPoints:
    records, tracks = [], []
    for _ in range(stream.take("Q")[0]):
        *record, length = stream.take("Q3d3BdQ")
        records.append(record)
        tracks.append(stream.array(_TRACK, length)["image"])
    return _points_of(records, tracks)


class _Lines:
    """The lines of a text file without comments; a line that does not parse is named with its number."""

    def __init__(self, path: Path) -> None:
        self.path = path
        numbered = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        self.lines = [(number, line.split()) for number, line in numbered if not line.startswith("#")]

    def filled(self) -> Iterator[tuple[int, list[str]]]:
        return ((number, words) for number, words in self.lines if words)

    def wrong(self, number: int, expected: str) -> SceneError:
        return SceneError(f"{self.path}, line {number}: expected {expected}. The file is damaged or of another format.")


def _text_cameras(lines: _Lines) -> dict[int, ColmapCamera]:
    cameras = {}
    for number, words in lines.filled():
        try:
            width, height = map(int, words[2:4])
            camera = ColmapCamera(int(words[0]), words[1], width, height, tuple(map(float, words[4:])))
            if len(camera.params) != MODELS[camera.model][1]:
                raise ValueError
        except (ValueError, IndexError, KeyError):
            expected = "CAMERA_ID MODEL WIDTH HEIGHT PARAMS[], with a known model and all its parameters"
            raise lines.wrong(number, expected) from None
        cameras[camera.id] = camera
    return cameras


def _text_images(lines: _Lines) -> dict[int, ColmapImage]:
    # two lines an image, of which the second is empty where there are no keypoints; empty ones at the end do not count
    rows = lines.lines
    while len(rows) % 2 and not rows[-1][1]:
        rows = rows[:-1]
    if len(rows) % 2:
        raise lines.wrong(rows[-1][0], "a line of POINTS2D[] after this one (it may be empty)")
    images = {}
    for (number, head), (below, keypoints) in zip(rows[::2], rows[1::2], strict=True):
        try:
            identity, camera = int(head[0]), int(head[8])
            pose = np.array(head[1:8], dtype=np.float64)
            name = " ".join([head[9], *head[10:]])
        except (ValueError, IndexError):
            raise lines.wrong(number, "IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME") from None
        try:
            table = np.array(keypoints, dtype=np.float64).reshape(-1, 3)
        except ValueError:
            raise lines.wrong(below, "POINTS2D[] as X Y POINT3D_ID") from None
        points = table[:, 2].astype(np.int64)
        images[identity] = ColmapImage(identity, name, camera, pose[:4], pose[4:], table[:, :2], points)
    return images


def _text_points(lines: _Lines) -> ColmapPoints:
    records, tracks = [], []
    for number, words in lines.filled():
        try:
            record = [int(words[0]), *map(float, words[1:4]), *map(int, words[4:7]), float(words[7])]
            track = np.array(words[8:], dtype=np.int64).reshape(-1, 2)[:, 0]
        except (ValueError, IndexError):
            raise lines.wrong(number, "POINT3D_ID X Y Z R G B ERROR TRACK[] as IMAGE_ID POINT2D_IDX") from None
        records.append(record)
        tracks.append(track)
    return _points_of(records, tracks)


def _points_of(records: list[list], tracks: list[np.ndarray]) -> ColmapPoints:
    lengths = np.array([len(track) for track in tracks], dtype=np.int64)
    table = np.array([record[1:] for record in records], dtype=np.float64).reshape(-1, 7)
    return ColmapPoints(
        ids=np.array([record[0] for record in records], dtype=np.int64),
        xyz=table[:, :3],
        rgb=table[:, 3:6].astype(np.uint8),
        error=table[:, 6],
        track_images=np.concatenate(tracks).astype(np.int64) if tracks else np.zeros(0, dtype=np.int64),
        track_starts=np.concatenate([[0], np.cumsum(lengths)]),
    )
