"""A folder of a photo collection: COLMAP model, photographs of all sizes, masks of what is transient if there are any.

FOLDER/images/        as PhotoTourism's `dense` folder has them (FOLDER/dense/images is found too)
FOLDER/sparse/0/      or sparse/: the COLMAP model, undistorted
FOLDER/masks/x.png    for images/x.jpg: white where something transient stands
FOLDER/x.tsv          NeRF in the wild's split, with columns filename and split (train, test); without it every
                      eighth photograph tests
"""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from common.splatting import Scene, SceneError, View, load_colmap
from common.splatting.colmap import find_model, read_model
from common.splatting.splits import hold_out
from papers.sparsegs_w.settings import Params


def load(params: Params) -> tuple[Scene, dict[str, Tensor], bool]:
    """The scene with all photographs at one size, masks [H, W] bool of the training photographs, and whether a folder
    of masks was there (else they are empty).

    Raises FileNotFoundError for a missing folder, model, image or mask, SceneError for a split that does not fit.
    """
    root = _root(params.data_dir)
    train, test = _split(params, root)
    scene = load_colmap(root, train=train, test=test)
    folder = root / "masks"
    masked = [replace(view, mask=_mask(folder, view)) for view in scene.train]
    size = (params.width, params.height)
    cut = [cropped(view, *size) for view in masked]
    masks = {view.name: view.mask > 0.5 for view in cut if view.mask is not None}
    plain = tuple(replace(view, mask=None) for view in cut)
    tests = tuple(cropped(replace(view, mask=None), *size) for view in scene.test)
    return replace(scene, train=plain, test=tests, points=None), masks, folder.is_dir()


def cropped(view: View, width: int, height: int) -> View:
    """The view scaled until it covers width x height, and its middle cut out; the camera follows."""
    scale = max(width / view.camera.width, height / view.camera.height)
    large = view.resized(max(width, round(view.camera.width * scale)), max(height, round(view.camera.height * scale)))
    left, top = (large.camera.width - width) // 2, (large.camera.height - height) // 2
    K = large.camera.K.clone()
    K[0, 2], K[1, 2] = K[0, 2] - left, K[1, 2] - top
    part = (slice(top, top + height), slice(left, left + width))
    camera = replace(large.camera, K=K, width=width, height=height)
    mask = None if large.mask is None else large.mask[part].contiguous()
    return View(view.name, camera, large.image[part].contiguous(), mask)


def _root(data_dir: str) -> Path:
    given = Path(data_dir)
    if not data_dir or not given.is_dir():
        raise FileNotFoundError(
            f"data_dir is {data_dir!r}; phototourism needs a folder with images/ and a COLMAP model in sparse/: "
            "--set data_dir=FOLDER"
        )
    found = next((folder for folder in (given, given / "dense") if find_model(folder)), None)
    if found is None:
        raise FileNotFoundError(
            f"{given}: no COLMAP model here or in dense/; expected cameras, images and points3D in sparse/0 or sparse."
        )
    return found


def _split(params: Params, root: Path) -> tuple[list[str], list[str]]:
    """Names of the training and of the test photographs."""
    place = find_model(root)
    assert place is not None, "_root found one"
    posed = sorted(image.name for image in read_model(place).images.values())
    tables = sorted([*root.glob("*.tsv"), *root.parent.glob("*.tsv")])
    if tables:
        rows = _rows(tables[0])
        known = {name: [row["filename"] for row in rows if row["split"] == name] for name in ("train", "test")}
        rest, test = ([name for name in known[part] if name in set(posed)] for part in ("train", "test"))
        if len(rest) < 2 or not test:
            raise SceneError(
                f"{tables[0]}: {len(rest)} train and {len(test)} test photographs among the {len(posed)} posed ones; "
                "expected 2 and 1 or more. The table may be another scene's."
            )
    else:
        held = hold_out(len(posed))
        rest, test = [posed[index] for index in held.train], [posed[index] for index in held.test]
    if params.photos:
        return list(params.photos), [name for name in test if name not in params.photos][: params.tests]
    if len(rest) < params.views:
        raise SceneError(f"{root}: {len(rest)} training photographs, views asks for {params.views}; lower it.")
    chosen = [rest[round(place)] for place in torch.linspace(0, len(rest) - 1, params.views).tolist()]
    return chosen, test[: params.tests]


def _rows(table: Path) -> list[dict[str, str]]:
    with table.open(newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    if not rows or not {"filename", "split"} <= set(rows[0]):
        raise SceneError(f"{table}: expected tab-separated columns filename and split, as NeRF in the wild has them.")
    return rows


def _mask(folder: Path, view: View) -> Tensor:
    """[H, W] 1 where something transient stands; all 0 where there is no folder of masks."""
    if not folder.is_dir():
        return torch.zeros(view.image.shape[:2])
    path = folder / f"{Path(view.name).stem}.png"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no mask of the photograph {view.name}; expected one for each training photograph (black where "
            "nothing is transient), or no folder masks at all."
        )
    white = _grey(path)
    if white.shape != view.image.shape[:2]:
        raise SceneError(
            f"{path}: {list(white.shape)} pixels, its photograph has {list(view.image.shape[:2])}; resize the mask."
        )
    return white


def _grey(path: Path) -> Tensor:
    """[H, W] 0..1 of an image file."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as stored:
            return torch.from_numpy(np.array(stored.convert("L"))).float() / 255
    except (UnidentifiedImageError, OSError) as error:
        raise SceneError(f"{path}: the mask cannot be read ({error}). Get it again, or save it as PNG.") from error
