"""CO3Dv2 (Reizenstein et al. 2021): sequences of photographs around objects, as the authors' download leaves them.

    ROOT/<category>/frame_annotations.jgz            gzipped JSON: image, mask and camera of every frame
    ROOT/<category>/set_lists/set_lists_<subset>.json    {"train" | "val" | "test": [[sequence, frame, path], ...]}
    ROOT/<category>/<sequence>/{images,masks}/...

Cameras are PyTorch3D's: row vectors, x_cam = x R + T with x to the left, y up, z forward, lengths in normalised device
coordinates. Every picture is cut to a square around the object's mask, put in front of white, and the world is moved
and scaled so that the object lies in the unit ball around the origin.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.splatting import Camera, SceneError, View

MARGIN = 1.2  # of the square around the mask
BALL = 1.1  # the ball's radius, times the largest half side of a mask's box at the object's distance
ISOTROPIC, PER_SIDE = "ndc_isotropic", "ndc_norm_image_bounds"


def sequences(root: Path, category: str, subset: str, part: str) -> list[str]:
    """Names of the sequences of one part ("train", "val" or "test") of a subset, such as fewview_dev.

    Raises FileNotFoundError naming what is there, SceneError for a file of another form.
    """
    folder = _category(root, category) / "set_lists"
    path = folder / f"set_lists_{subset}.json"
    if not path.is_file():
        there = sorted(found.stem.removeprefix("set_lists_") for found in folder.glob("set_lists_*.json"))
        raise FileNotFoundError(f"{path}: no such subset of {category}; there are {there or 'none'}: set subset.")
    lists = json.loads(path.read_text())
    if part not in lists:
        raise SceneError(f"{path}: no part {part!r}, it has {sorted(lists)}; is this a file of CO3Dv2?")
    return sorted({entry[0] for entry in lists[part]})


def views(root: Path, category: str, sequence: str, size: int, count: int) -> list[View]:
    """`count` frames of a sequence, evenly along it, as square views of `size` pixels.

    Raises FileNotFoundError for missing files, SceneError where the sequence has fewer frames with a mask.
    """
    folder = _category(root, category)
    frames = _frames(folder / "frame_annotations.jgz").get(sequence, ())
    usable = [frame for frame in frames if _masked(frame) and frame.get("viewpoint")]
    if len(usable) < count:
        raise SceneError(
            f"{folder.name}/{sequence}: {len(usable)} of {len(frames)} frames have a mask and a camera; expected "
            f"{count}. Ask for fewer views, or leave the sequence out."
        )
    places = torch.linspace(0, len(usable) - 1, count).round().int().tolist()
    return normalised([_view(root, usable[place], size) for place in places])


def camera(viewpoint: Mapping[str, Any], width: int, height: int) -> Camera:
    """The camera of an annotation for its image of width x height pixels.

    Raises SceneError for an unknown format of the intrinsics.
    """
    kind = viewpoint.get("intrinsics_format", PER_SIDE)
    if kind not in (ISOTROPIC, PER_SIDE):
        raise SceneError(f"intrinsics_format is {kind!r}; expected {ISOTROPIC} or {PER_SIDE}.")
    half = torch.tensor([width / 2, height / 2])
    unit = half.min().expand(2) if kind == ISOTROPIC else half  # pixels in a unit of normalised coordinates
    focal = torch.tensor(viewpoint["focal_length"]) * unit
    middle = half - torch.tensor(viewpoint["principal_point"]) * unit  # x to the left and y up
    K = torch.eye(3)
    K[0, 0], K[1, 1], K[:2, 2] = focal[0], focal[1], middle
    flip = torch.tensor([-1.0, -1.0, 1.0])
    viewmat = torch.eye(4)
    viewmat[:3, :3] = flip[:, None] * torch.tensor(viewpoint["R"]).T
    viewmat[:3, 3] = flip * torch.tensor(viewpoint["T"])
    return Camera(viewmat, K, width, height)


def normalised(found: Sequence[View]) -> list[View]:
    """The views in a world whose origin is the point that all look at, and whose unit ball holds the object."""
    cameras = [view.camera for view in found]
    centers = torch.stack([one.center for one in cameras]).double()
    forwards = torch.stack([one.forward for one in cameras]).double()
    across = torch.eye(3).double() - forwards[:, :, None] * forwards[:, None, :]
    focus = torch.linalg.lstsq(across.sum(dim=0), (across @ centers[:, :, None]).sum(dim=0)).solution[:, 0]
    radii = []
    for view, center in zip(found, centers, strict=True):
        assert view.mask is not None
        _, side = _box(view.mask)
        radii.append(side / 2 / float(view.camera.K[0, 0]) * float((center - focus).norm()))
    scale = 1 / (BALL * max(radii))
    moved = []
    for view in found:
        viewmat = view.camera.viewmat.clone()
        viewmat[:3, 3] = scale * (viewmat[:3, 3] + viewmat[:3, :3] @ focus.float())
        moved.append(replace(view, camera=replace(view.camera, viewmat=viewmat)))
    return moved


def _masked(frame: Mapping[str, Any]) -> bool:
    return bool(frame.get("mask")) and frame["mask"].get("mass", 1) > 0  # mass: pixels of the object


def _view(root: Path, frame: Mapping[str, Any], size: int) -> View:
    image, mask = _pixels(root / frame["image"]["path"], "RGB"), _pixels(root / frame["mask"]["path"], "L")
    height, width = image.shape[1:]
    if mask.shape[1:] != image.shape[1:]:
        mask = F.interpolate(mask[None], size=(height, width), mode="nearest-exact")[0]
    where = camera(frame["viewpoint"], width, height)
    (left, top), side = _box(mask[0])
    grown = round(side * MARGIN)
    left, top = left - (grown - side) // 2, top - (grown - side) // 2
    both = torch.cat([image * mask + 1 - mask, mask])  # in front of white
    # beyond the photograph: white, and not the object
    canvas = torch.cat([torch.ones(3, grown, grown), torch.zeros(1, grown, grown)])
    rows, columns = slice(max(top, 0), min(top + grown, height)), slice(max(left, 0), min(left + grown, width))
    canvas[:, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = both[:, rows, columns]
    K = where.K.clone()
    K[0, 2], K[1, 2] = K[0, 2] - left, K[1, 2] - top
    cut = replace(where, K=K, width=grown, height=grown)
    name = f"{frame['sequence_name']}/{frame['frame_number']}"
    return View(name, cut, canvas[:3].movedim(0, -1).contiguous(), canvas[3]).resized(size, size)


def _box(mask: Tensor) -> tuple[tuple[int, int], int]:
    """Left and top corner and the side of the square around what is set in a mask [H, W]."""
    rows, columns = (mask > 0.5).any(dim=1).nonzero(), (mask > 0.5).any(dim=0).nonzero()
    if not len(rows):
        raise SceneError("a mask shows no object; leave this frame out.")
    (top, bottom), (left, right) = ((int(x[0]), int(x[-1]) + 1) for x in (rows, columns))
    side = max(bottom - top, right - left)
    return ((left + right - side) // 2, (top + bottom - side) // 2), side


def _pixels(path: Path, mode: str) -> Tensor:
    """[C, H, W] in 0..1."""
    import numpy as np
    from PIL import Image

    if not path.is_file():
        raise FileNotFoundError(f"{path}: the annotations name it, but it is not there; fetch the whole category.")
    with Image.open(path) as stored:
        pixels = torch.from_numpy(np.array(stored.convert(mode)))
    return (pixels[None] if pixels.ndim == 2 else pixels.movedim(-1, 0)).float() / 255


def _category(root: Path, category: str) -> Path:
    folder = root / category
    if not folder.is_dir():
        there = sorted(path.name for path in root.glob("*/")) if root.is_dir() else []
        raise FileNotFoundError(f"{folder}: no such category of CO3Dv2; there are {there[:8] or 'none'}: set category.")
    return folder


@lru_cache(maxsize=2)
def _frames(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The annotations of a category by sequence, in the order of frames."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no annotations of the frames; fetch the category's first archive.")
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        frames = json.load(stream)
    found: dict[str, list[dict[str, Any]]] = {}
    for frame in sorted(frames, key=lambda frame: frame["frame_number"]):
        found.setdefault(frame["sequence_name"], []).append(frame)
    return found
