"""Sparse points from posed training views alone: SIFT, matching and triangulation by pycolmap, poses held fixed."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.splatting import _pycolmap
from common.splatting.cameras import Camera
from common.splatting.errors import SceneError
from common.splatting.scene import PointCloud, View

__all__ = ["triangulate"]


def triangulate(views: Sequence[View]) -> PointCloud:
    """Points that two of the views or more saw, with their tracks; no other view has a part in them.

    views   two or more with different names, posed; their images go to COLMAP as 8-bit PNG
    cost    features: about a second a view of 1008 x 756 on one core; matches: all pairs of views

    Raises SceneError for fewer than two views, and where nothing matches.
    """
    names = [view.name for view in views]
    if len(views) < 2 or len(set(names)) < len(names):
        raise SceneError(f"triangulate: {len(views)} views {names}; expected two or more, with different names.")
    from PIL import Image

    with tempfile.TemporaryDirectory(prefix="resparse-sfm-") as scratch, _pycolmap.quiet() as pycolmap:
        root = Path(scratch)
        files = [f"{number:04d}.png" for number in range(len(views))]
        (root / "images").mkdir()
        for view, file in zip(views, files, strict=True):
            pixels = (view.image.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
            Image.fromarray(pixels).save(root / "images" / file)
        database = root / "database.db"
        _pycolmap.extract(pycolmap, database, root / "images", files, shared=False, model="PINHOLE")
        model = _posed(pycolmap, database, dict(zip(files, (view.camera for view in views), strict=True)))
        _pycolmap.match(pycolmap, database)
        (root / "out").mkdir()
        model = pycolmap.triangulate_points(
            model, database, root / "images", root / "out", options=_pycolmap.mapping_options(pycolmap)
        )
        return _cloud(model, dict(zip(files, names, strict=True)))


def _posed(pycolmap: Any, database: Path, cameras: dict[str, Camera]) -> Any:
    """A reconstruction with the database's images at the given poses, and no points; sets the database's cameras."""
    model = pycolmap.Reconstruction()
    with pycolmap.Database.open(database) as store:
        for image in sorted(store.read_all_images(), key=lambda image: image.name):
            camera = cameras[image.name]
            K = camera.K.double()
            pinhole = pycolmap.Camera(
                camera_id=image.camera_id,
                model="PINHOLE",
                width=camera.width,
                height=camera.height,
                params=[float(K[0, 0]), float(K[1, 1]), float(K[0, 2]), float(K[1, 2])],
                has_prior_focal_length=True,
            )
            model.add_camera_with_trivial_rig(pinhole)
            store.update_camera(pinhole)
            pose = camera.viewmat[:3].double().cpu().numpy()
            model.add_image_with_trivial_frame(
                pycolmap.Image(name=image.name, camera_id=image.camera_id, image_id=image.image_id),
                pycolmap.Rigid3d(pose),
            )
    return model


def _cloud(model: Any, names: dict[str, str]) -> PointCloud:
    points = sorted(model.points3D.items())
    if not points:
        raise SceneError(
            f"triangulate: the {len(names)} views share no point that could be triangulated; expected views that "
            "overlap, with texture. Dense stereo (stereo.plane_sweep) or random points need no matches."
        )
    columns = list(names.values())
    seen = torch.zeros(len(points), len(columns), dtype=torch.bool)
    for row, (_, point) in enumerate(points):
        for element in point.track.elements:
            seen[row, columns.index(names[model.image(element.image_id).name])] = True
    positions = torch.from_numpy(np.stack([point.xyz for _, point in points])).float()
    colors = torch.from_numpy(np.stack([point.color for _, point in points])).float() / 255
    return PointCloud(positions, colors, None, tuple(columns), seen)
