"""Scenes in the layout of LLFF: `poses_bounds.npy` beside `images_8` (or another factor), optionally a COLMAP model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.splatting import splits
from common.splatting._images import image_files, image_folder, load_view
from common.splatting.cameras import Camera
from common.splatting.colmap import find_model, points_for
from common.splatting.errors import SceneError
from common.splatting.scene import Scene

__all__ = ["load_llff", "poses_bounds"]

COLUMNS = 17  # a 3 x 5 matrix row by row, then near and far


def load_llff(
    folder: str | Path,
    *,
    factor: float = 8,
    images: str = "images",
    views: int | None = None,
    train: Sequence[int | str] | None = None,
    test: Sequence[int | str] | None = None,
    points: bool = True,
    allow_single: bool = False,
) -> Scene:
    """The scene of `poses_bounds.npy` and the images in `images_<factor>`, or `images` resampled.

    views, train, test   see `splits.choose`; the views are sorted by name, as the rows of the file are
    points  take those of the COLMAP model in the folder, if there is one, whose track has two training views or more;
            False leaves them out

    Raises FileNotFoundError for missing files; SceneError for a broken pose file, another number of images than poses,
    images that do not fit, a COLMAP model of another world, and fewer than two training views (one with allow_single).
    """
    root = Path(folder)
    cameras, _ = poses_bounds(root / "poses_bounds.npy")
    source, shrink = image_folder(root, factor, images)
    files = image_files(source)
    if len(files) != len(cameras):
        raise SceneError(
            f"{root}: {len(cameras)} poses in poses_bounds.npy, but {len(files)} images in {source.name}; expected one "
            "image for each pose, in sorted order."
        )
    split = splits.choose([path.name for path in files], views=views, train=train, test=test)
    posed = {path.name: camera for path, camera in zip(files, cameras, strict=True)}
    train_views, test_views = (
        tuple(load_view(files[i].name, files[i], cameras[i], shrink=shrink) for i in indices)
        for indices in (split.train, split.test)
    )
    place = find_model(root) if points else None
    cloud = points_for(place, posed, [view.name for view in train_views]) if place else None
    return Scene(root.resolve().name, train_views, test_views, cloud, allow_single=allow_single)


def poses_bounds(path: str | Path) -> tuple[list[Camera], Tensor]:
    """Cameras at the photographs' full size, and [N, 2] float32 nearest and farthest depth of each view.

    A row holds [down, right, backwards, centre, (height, width, focal)] as columns of a 3 x 5 matrix; the principal
    point is the middle of the image.

    Raises FileNotFoundError, and SceneError where the file is no such array.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; an LLFF scene keeps its poses there.")
    try:
        table = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise SceneError(f"{path}: not a NumPy array ({error}); {path.stat().st_size} bytes. Get it again.") from error
    if table.ndim != 2 or table.shape[1] != COLUMNS or not np.isfinite(table.astype(np.float64)).all():
        raise SceneError(f"{path}: expected finite numbers [N, {COLUMNS}]; got {table.dtype} {list(table.shape)}.")
    matrices = torch.from_numpy(table[:, :15].astype(np.float64)).reshape(-1, 3, 5)
    down, right, backwards, centers, sizes = matrices.unbind(dim=2)
    cameras = []
    for axes, center, (height, width, focal) in zip(
        torch.stack([right, down, -backwards], dim=1), centers, sizes.tolist(), strict=True
    ):
        viewmat = torch.eye(4, dtype=torch.float64)
        viewmat[:3, :3] = axes
        viewmat[:3, 3] = -axes @ center
        K = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
        cameras.append(Camera(viewmat.float(), K.float(), round(width), round(height)))
    return cameras, torch.from_numpy(table[:, 15:].astype(np.float32))
