"""Tiny scenes on disk, written by hand in each layout, so that the readers are tested on bytes we know."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

NUMBERS = {"SIMPLE_PINHOLE": 0, "PINHOLE": 1, "SIMPLE_RADIAL": 2, "OPENCV": 4, "OPENCV_FISHEYE": 5, "FOV": 7}
PINHOLE = ("PINHOLE", 16, 12, (20.0, 21.0, 8.0, 6.0))

# id, name, (qw, qx, qy, qz, tx, ty, tz), keypoints as (x, y, point id)
IMAGES = [
    (3, "b.png", (1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0), [(8.5, 6.0, 7), (2.0, 3.0, -1), (4.0, 4.0, 9)]),
    (1, "a.png", (0.8, 0.0, 0.6, 0.0, 0.5, -0.25, 2.0), [(1.0, 2.0, 7), (9.0, 3.0, 8)]),
    (4, "c.png", (1.0, 0.0, 0.0, 0.0, -2.0, 0.0, 0.0), [(5.0, 5.0, 8), (6.0, 6.0, 9)]),
    (9, "sub/d.png", (1.0, 0.0, 0.0, 0.0, -3.0, 0.0, 0.0), []),
]
# id, xyz, rgb, error, track as (image id, keypoint)
POINTS = [
    (7, (0.1, 0.2, 5.0), (255, 0, 10), 0.5, [(3, 0), (1, 0)]),
    (8, (0.5, -0.2, 6.0), (0, 255, 20), 0.25, [(1, 1), (4, 0)]),
    (9, (-0.5, 0.0, 4.0), (0, 0, 255), 0.75, [(3, 2), (4, 1)]),
]


def write_colmap_binary(folder: Path, camera=PINHOLE, images=IMAGES, points=POINTS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model, width, height, params = camera
    body = struct.pack("<QIiQQ", 1, 5, NUMBERS[model], width, height) + struct.pack(f"<{len(params)}d", *params)
    (folder / "cameras.bin").write_bytes(body)
    body = struct.pack("<Q", len(images))
    for number, name, pose, keypoints in images:
        body += struct.pack("<I7dI", number, *pose, 5) + name.encode() + b"\0" + struct.pack("<Q", len(keypoints))
        body += b"".join(struct.pack("<ddq", *keypoint) for keypoint in keypoints)
    (folder / "images.bin").write_bytes(body)
    body = struct.pack("<Q", len(points))
    for number, xyz, rgb, error, track in points:
        body += struct.pack("<Q3d3BdQ", number, *xyz, *rgb, error, len(track))
        body += b"".join(struct.pack("<II", *element) for element in track)
    (folder / "points3D.bin").write_bytes(body)


def write_colmap_text(folder: Path, camera=PINHOLE, images=IMAGES, points=POINTS) -> None:
    def words(*values: object) -> str:
        return " ".join(repr(value) if isinstance(value, float) else str(value) for value in values)

    folder.mkdir(parents=True, exist_ok=True)
    model, width, height, params = camera
    (folder / "cameras.txt").write_text(f"# Camera list\n{words(5, model, width, height, *params)}\n")
    lines = ["# Image list with two lines of data per image:"]
    for number, name, pose, keypoints in images:
        lines += [words(number, *pose, 5, name), words(*(value for keypoint in keypoints for value in keypoint))]
    (folder / "images.txt").write_text("\n".join(lines) + "\n")
    lines = ["# 3D point list"]
    for number, xyz, rgb, error, track in points:
        lines.append(words(number, *xyz, *rgb, error, *(value for element in track for value in element)))
    (folder / "points3D.txt").write_text("\n".join(lines) + "\n")


def write_images(folder: Path, names: Sequence[str], size: tuple[int, int] = (16, 12), alpha: bool = False) -> None:
    """Images of seeded noise, each another."""
    for number, name in enumerate(names):
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 4 if alpha else 3), dtype=np.uint8)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
