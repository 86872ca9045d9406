"""A scene from a folder in any of the layouts that are known, recognised by the files in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from common.splatting._images import image_files
from common.splatting.colmap import find_model, load_colmap
from common.splatting.errors import SceneError
from common.splatting.llff import load_llff
from common.splatting.scene import Scene
from common.splatting.transforms import load_blender, load_nerfstudio

__all__ = ["Layout", "open_scene", "recognise"]

Layout = Literal["blender", "nerfstudio", "llff", "colmap"]
_LOADERS = {"blender": load_blender, "nerfstudio": load_nerfstudio, "llff": load_llff, "colmap": load_colmap}


def open_scene(
    folder: str | Path,
    *,
    layout: Layout | None = None,
    factor: float = 1,
    views: int | None = None,
    train: Sequence[int | str] | None = None,
    test: Sequence[int | str] | None = None,
    allow_single: bool = False,
    **options: Any,
) -> Scene:
    """The scene in `folder`: Blender, nerfstudio, LLFF or COLMAP.

    layout   None: `recognise`
    factor, views, train, test, allow_single   as in `load_colmap`
    options  what else the loader of that layout takes, such as background, points or distortion

    A SpaRe folder holds many scenes; open one of them with `load_spare`.
    Raises as the loaders, and TypeError for an option that the layout's loader does not have.
    """
    chosen = recognise(folder) if layout is None else layout
    if chosen not in _LOADERS:
        raise SceneError(f"layout is one of {', '.join(get_args(Layout))}; got {layout!r}.")
    common = {"factor": factor, "views": views, "train": train, "test": test, "allow_single": allow_single}
    return _LOADERS[chosen](folder, **common, **options)


def recognise(folder: str | Path) -> Layout:
    """The layout of a folder. Where there are several, what describes the poses best comes first.

    Raises FileNotFoundError for a folder that is not there; SceneError, saying what was found, for one in no known
    layout.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder.")
    if (root / "transforms_train.json").is_file():
        return "blender"
    if (root / "transforms.json").is_file():
        return "nerfstudio"
    if (root / "poses_bounds.npy").is_file():
        return "llff"
    if find_model(root):
        return "colmap"
    if any(root.glob("*split*.json")):
        raise SceneError(f"{root}: a SpaRe folder, of many scenes; open one with common.splatting.spare.load_spare.")
    photographs = len(image_files(root))
    advice = f" It has {photographs} images: pose them with resparse scene pose." if photographs else ""
    raise SceneError(
        f"{root}: no scene in it; expected transforms_train.json (Blender), transforms.json (nerfstudio), "
        f"poses_bounds.npy (LLFF) or sparse/0 (COLMAP).{advice}"
    )
