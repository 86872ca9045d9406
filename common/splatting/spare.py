"""Scenes of the SpaRe benchmark (AIM 2024 Sparse Neural Rendering) and of DTU in the same layout.

A split file names input and test views by index; index i is camera i + 1: its projection matrix is in `pos_014.txt`
for i = 13, its image `rect_014_3_r5000.png` (DTU) or `cam_014_3_0000.png` (SpaRe) for lighting 3, all lamps on.
Source: https://sparebenchmark.github.io/docs/dataset/structure
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from common.splatting import splits
from common.splatting._images import load_view
from common.splatting.cameras import Camera
from common.splatting.errors import SceneError
from common.splatting.scene import Scene

__all__ = ["ALL_LAMPS", "decompose", "image_name", "load_spare", "spare_cameras"]

ALL_LAMPS = 3
LIGHTINGS = range(7)
FULL_SIZE = (1600, 1200)  # of the images that the projection matrices describe


def load_spare(
    folder: str | Path,
    scene: str,
    *,
    split: str | Path | None = None,
    calibration: str | Path | None = None,
    lighting: int = ALL_LAMPS,
    factor: float = 1,
    allow_single: bool = False,
) -> Scene:
    """One scene of the benchmark. World units are those of the calibration (DTU: mm); there are no points.

    folder       holds a folder for each scene
    split        the JSON file; None for the only `*split*.json` in `folder`
    calibration  the folder of `pos_001.txt` and so on; None for the only one below `folder`, or, of several, the one
                 whose name has the dataset of the scene in it
    lighting     0..6

    The published sets hold the input views alone. Then the scene has no test views, and `spare_cameras` gives the
    cameras to render from.

    Raises FileNotFoundError for missing files; SceneError for broken ones, for an unknown scene or lighting, and where
    only some of the test images are there.
    """
    root = Path(folder)
    if lighting not in LIGHTINGS:
        raise SceneError(f"{root}: lighting is 0 to {LIGHTINGS[-1]}, {ALL_LAMPS} for all lamps; got {lighting}.")
    table = splits.spare(_only_split(root) if split is None else split)
    if scene not in table:
        raise SceneError(f"{root}: no scene {scene!r} in the split; it has {sorted(table)}.")
    chosen = table[scene]
    place = _calibration(root, chosen.dataset) if calibration is None else Path(calibration)

    def load(indices: Sequence[int]):
        names = [image_name(index, chosen.dataset, lighting) for index in indices]
        cameras = spare_cameras(place, indices)
        return tuple(
            load_view(name, root / scene / name, camera, shrink=factor)
            for name, camera in zip(names, cameras, strict=True)
        )

    tests = [root / scene / image_name(index, chosen.dataset, lighting) for index in chosen.test]
    hidden = not any(path.is_file() for path in tests)
    return Scene(scene, load(chosen.train), () if hidden else load(chosen.test), allow_single=allow_single)


def spare_cameras(calibration: str | Path, indices: Sequence[int]) -> list[Camera]:
    """Cameras of some view indices (0-based) at 1600 x 1200, from their 3 x 4 projection matrices.

    Raises FileNotFoundError for a camera without a file, SceneError where a file holds no projection matrix.
    """
    cameras = []
    for index in indices:
        path = Path(calibration) / f"pos_{index + 1:03d}.txt"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; view index {index} is camera {index + 1}.")
        try:
            cameras.append(decompose(np.loadtxt(path), *FULL_SIZE))
        except ValueError as error:
            raise SceneError(f"{path}: expected a 3 x 4 projection matrix; {error}") from error
    return cameras


def decompose(projection: np.ndarray, width: int, height: int) -> Camera:
    """The camera of a projection matrix [3, 4] ~ K [R | t], known up to a factor: K upper triangular, diagonal > 0.

    Raises SceneError for another shape or a matrix that is no finite camera (Hartley and Zisserman, 6.2.4).
    """
    P = np.asarray(projection, dtype=np.float64)
    if P.shape != (3, 4) or not np.isfinite(P).all():
        raise SceneError(
            f"a projection matrix is [3, 4] and finite; got {list(P.shape)}, finite: {np.isfinite(P).all()}"
        )
    left = P[:, :3]
    if abs(np.linalg.det(left)) <= 1e-12 * np.abs(left).max() ** 3:
        raise SceneError("a projection matrix has an invertible left half; this one is singular")
    P = P * np.sign(np.linalg.det(P[:, :3]))  # a rotation has determinant 1, and K's is positive
    # RQ decomposition: QR of the matrix turned upside down
    Q, R = np.linalg.qr(P[::-1, :3].T)
    K, rotation = R.T[::-1, ::-1], Q.T[::-1]
    signs = np.sign(np.diag(K))
    K, rotation = K * signs, rotation * signs[:, None]
    translation = np.linalg.solve(K, P[:, 3])
    viewmat = np.eye(4)
    viewmat[:3] = np.concatenate([rotation, translation[:, None]], axis=1)
    return Camera(torch.from_numpy(viewmat).float(), torch.from_numpy(K / K[2, 2]).float(), width, height)


def image_name(index: int, dataset: str, lighting: int = ALL_LAMPS) -> str:
    """File name of view `index` (0-based) of a data set: DTU, or else SpaRe."""
    if "dtu" in dataset.lower():
        return f"rect_{index + 1:03d}_{lighting}_r5000.png"
    return f"cam_{index + 1:03d}_{lighting}_0000.png"


def _only_split(root: Path) -> Path:
    found = sorted(root.glob("*split*.json"))
    if len(found) != 1:
        raise FileNotFoundError(
            f"{root}: {len(found)} split files {[path.name for path in found]}; expected one, or say split=..."
        )
    return found[0]


def _calibration(root: Path, dataset: str) -> Path:
    found = sorted({path.parent for path in root.rglob("pos_001.txt")})
    kind = "dtu" if "dtu" in dataset.lower() else "s"  # SpaRe's own archive is called synth_calibration
    fitting = [path for path in found if path.relative_to(root).as_posix().lower().startswith(kind)]
    if len(found) != 1 and len(fitting) != 1:
        raise FileNotFoundError(
            f"{root}: {len(found)} folders with pos_001.txt {[path.name for path in found]}; expected one, or say "
            "calibration=..."
        )
    return found[0] if len(found) == 1 else fitting[0]
