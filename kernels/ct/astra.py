"""ASTRA's geometry dictionaries and ours: for data and scripts that come from the ASTRA toolbox, and for checking.

Both place angles, rotation and axes alike (checked by projecting in tests/kernels); ASTRA's lengths are in a unit of
the caller's choice, which these functions take to be mm. ASTRA itself is not needed.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from kernels.ct.geometry import FanBeam, ParallelBeam

__all__ = ["from_astra", "to_astra"]


def from_astra(proj_geom: Mapping[str, Any], vol_geom: Mapping[str, Any]) -> ParallelBeam | FanBeam:
    """The scan that ASTRA describes by a 'parallel' or 'fanflat' projection and a 2-D volume geometry.

    Returns a ParallelBeam or a FanBeam, equal in every length and angle.
    Raises ValueError for another type of projection ('parallel_vec', 'cone', ...), a 3-D volume, pixels that are not
    square or an image whose middle is not at the rotation axis; KeyError for an entry that is missing.
    """
    kind = proj_geom["type"]
    if kind not in ("parallel", "fanflat"):
        near = difflib.get_close_matches(str(kind), ("parallel", "fanflat"), 1, cutoff=0)[0]
        raise ValueError(
            f"from_astra: got a projection geometry of type {kind!r}; expected 'parallel' or 'fanflat'; did you mean "
            f"{near!r}? Otherwise describe the scan with ParallelBeam or FanBeam directly"
        )
    shape, pixel = _grid(vol_geom)
    angles, cells = tuple(np.ravel(proj_geom["ProjectionAngles"]).tolist()), int(proj_geom["DetectorCount"])
    pitch = float(proj_geom["DetectorWidth"])
    if kind == "parallel":
        return ParallelBeam(angles, cells, shape, pitch=pitch, pixel=pixel)
    distances = {
        "source_axis": float(proj_geom["DistanceOriginSource"]),
        "axis_detector": float(proj_geom["DistanceOriginDetector"]),
    }
    return FanBeam(angles, cells, shape, **distances, pitch=pitch, pixel=pixel)


def to_astra(geometry: ParallelBeam | FanBeam) -> tuple[dict[str, Any], dict[str, Any]]:
    """(proj_geom, vol_geom) as ASTRA's create_proj_geom and create_vol_geom return them.

    Returns a 'parallel' or 'fanflat' projection; with an offset or axis that is not 0 the vector form, 'parallel_vec'
    or 'fanflat_vec'. Raises nothing: every scan has such a form.
    """
    height, width = geometry.shape
    half_x, half_y = width * geometry.pixel / 2, height * geometry.pixel / 2
    window = {"WindowMinX": -half_x, "WindowMaxX": half_x, "WindowMinY": -half_y, "WindowMaxY": half_y}
    vol_geom = {"GridRowCount": height, "GridColCount": width, "option": window}
    fan = isinstance(geometry, FanBeam)
    if geometry.offset or geometry.axis:
        vectors = _fan_vectors(geometry) if fan else _parallel_vectors(geometry)
        kind = "fanflat_vec" if fan else "parallel_vec"
        return {"type": kind, "DetectorCount": geometry.cells, "Vectors": vectors}, vol_geom
    proj_geom: dict[str, Any] = {
        "type": "fanflat" if fan else "parallel",
        "DetectorWidth": geometry.pitch,
        "DetectorCount": geometry.cells,
        "ProjectionAngles": geometry.angles.numpy().copy(),
    }
    if fan:
        proj_geom |= {
            "DistanceOriginSource": geometry.source_axis,
            "DistanceOriginDetector": geometry.axis_detector,
        }
    return proj_geom, vol_geom


def _grid(vol_geom: Mapping[str, Any]) -> tuple[tuple[int, int], float]:
    """(H, W) and the pixel's width of a 2-D volume that is centred and has square pixels."""
    if "GridSliceCount" in vol_geom:
        raise ValueError(
            f"from_astra: got a volume of {vol_geom['GridSliceCount']} slices; expected a 2-D one; make it with "
            "create_vol_geom(rows, columns)"
        )
    height, width = int(vol_geom["GridRowCount"]), int(vol_geom["GridColCount"])
    window = vol_geom.get("option", {})
    x0, x1 = float(window.get("WindowMinX", -width / 2)), float(window.get("WindowMaxX", width / 2))
    y0, y1 = float(window.get("WindowMinY", -height / 2)), float(window.get("WindowMaxY", height / 2))
    if not width or not height:
        return (height, width), 1.0
    pixel = (x1 - x0) / width
    square = math.isclose((y1 - y0) / height, pixel, rel_tol=1e-9)
    centred = max(abs(x0 + x1), abs(y0 + y1)) <= 1e-9 * abs(pixel)
    if not (square and centred):
        raise ValueError(
            f"from_astra: got a volume window x {x0:g}..{x1:g}, y {y0:g}..{y1:g} with {width} columns and {height} "
            "rows; expected square pixels round the origin; resample the volume, or move the scan with offset and axis"
        )
    return (height, width), pixel


def _directions(geometry: ParallelBeam | FanBeam) -> tuple[np.ndarray, np.ndarray]:
    """Along the detector and towards the source, [V, 2] each, unit vectors."""
    cosine, sine = np.cos(geometry.angles.numpy()), np.sin(geometry.angles.numpy())
    return np.stack([cosine, sine], 1), np.stack([sine, -cosine], 1)


def _parallel_vectors(geometry: ParallelBeam) -> np.ndarray:
    """[V, 6]: direction of the rays, middle of the detector, step from cell to cell."""
    lateral, to_source = _directions(geometry)
    return np.hstack([to_source, (geometry.offset - geometry.axis) * lateral, geometry.pitch * lateral])


def _fan_vectors(geometry: FanBeam) -> np.ndarray:
    """[V, 6]: source, middle of the detector, step from cell to cell."""
    lateral, to_source = _directions(geometry)
    source = geometry.source_axis * to_source - geometry.axis * lateral
    detector = -geometry.axis_detector * to_source + (geometry.offset - geometry.axis) * lateral
    return np.hstack([source, detector, geometry.pitch * lateral])
