"""A page that shows Gaussians in any browser: one file, no network, no installation; also inside a notebook.

    files.write(path, viewer.page(model, cameras, title="fern, 3 views"))
    viewer.cell(model, cameras, title="fern, 3 views")          # the last line of a notebook cell

The page holds the Gaussians in the `.splat` form (see `ply`) and draws them with WebGL 2, with or without a GPU; a
worker sorts them. It starts at the first camera; dragging turns around the middle of the scene, and the buttons step
through the cameras. What it leaves out against `Gaussians.render`: view-dependent colour (SH above degree 0), and
8-bit steps show where hundreds of faint layers add up.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.splatting.cameras import Camera
from common.splatting.model import Gaussians
from common.splatting.ply import splat_bytes

if TYPE_CHECKING:
    from IPython.display import HTML

__all__ = ["MOST", "cell", "page"]

MOST = 50_000  # Gaussians: 1.6 MB, 2.1 MB as base64 in the page or the notebook
TEMPLATE = Path(__file__).with_name("viewer.html")


def page(
    model: Gaussians,
    cameras: Sequence[Camera],
    *,
    title: str,
    background: Tensor | None = None,
    antialiased: bool = False,
    most: int = MOST,
) -> str:
    """The page as HTML.

    cameras      where to look from; the first is the start, sizes may differ
    background   [3] colour behind the Gaussians, 0..1; black where None
    antialiased  as the model was trained
    most         leave out all but so many Gaussians, those with the largest volume times opacity; the page grows by 43
                 bytes for each

    Raises ValueError for no cameras or no Gaussians.
    """
    if not cameras or not len(model):
        raise ValueError(
            f"viewer: got {len(cameras)} cameras and {len(model)} Gaussians; expected at least one of both."
        )
    up = torch.stack([camera.up for camera in cameras]).mean(dim=0)
    scene = {
        "background": [0.0, 0.0, 0.0] if background is None else background.tolist(),
        "antialiased": antialiased,
        "up": (up / up.norm()).tolist(),
        "cameras": [_plain(camera) for camera in cameras],
        "payload": base64.b64encode(splat_bytes(model, most=most)).decode("ascii"),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    return template.replace("@TITLE@", html.escape(title)).replace("@SCENE@", json.dumps(scene))


def cell(
    model: Gaussians,
    cameras: Sequence[Camera],
    *,
    title: str,
    background: Tensor | None = None,
    antialiased: bool = False,
    most: int = MOST,
    height: int = 480,
) -> HTML:
    """`page` in a frame of `height` pixels, for the end of a notebook cell. It stays in the saved notebook."""
    from IPython.display import HTML

    content = page(model, cameras, title=title, background=background, antialiased=antialiased, most=most)
    frame = f'<iframe srcdoc="{html.escape(content)}" width="100%" height="{height}" style="border:0"></iframe>'
    return HTML(f"<div>{frame}</div>")


def _plain(camera: Camera) -> dict[str, Any]:
    k = camera.K.tolist()
    return {
        "viewmat": camera.viewmat.flatten().tolist(),
        "fx": k[0][0],
        "fy": k[1][1],
        "cx": k[0][2],
        "cy": k[1][2],
        "width": camera.width,
        "height": camera.height,
    }
