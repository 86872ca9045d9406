"""Marigold: depth up to scale and shift, and normals, of single photographs (Ke et al. 2024), through diffusers."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from common.models.stable_diffusion import MissingWeights
from common.splatting.scene import View

__all__ = ["Marigold"]

STEPS = 4  # of the distilled (LCM) models
TO_OPENCV = (1.0, -1.0, -1.0)  # its normals have x right, y up, z towards the viewer


class Marigold:
    """Both networks, by name or folder.

    Raises MissingWeights where one is neither here nor to be downloaded.
    """

    def __init__(self, depth: str, normals: str, *, device: str | torch.device = "cpu"):
        diffusers: Any = importlib.import_module("diffusers")  # which makes its names as they are asked for
        self.device = device
        self._depth, self._normals = (
            _load(diffusers.MarigoldDepthPipeline, depth),
            _load(diffusers.MarigoldNormalsPipeline, normals),
        )
        for pipe in (self._depth, self._normals):
            pipe.to(device)
            pipe.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(self, view: View, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Depth [H, W] in 0..1, larger is farther, and unit normals [H, W, 3] in world axes, of a view."""
        found = []
        for pipe in (self._depth, self._normals):
            draw = torch.Generator(device=self.device).manual_seed(seed)
            image = view.image.movedim(-1, 0)[None].to(self.device)
            found.append(pipe(image, num_inference_steps=STEPS, generator=draw, output_type="pt").prediction.float())
        depth, normals = found[0][0, 0], found[1][0].movedim(0, -1)
        facing = torch.nn.functional.normalize(normals * normals.new_tensor(TO_OPENCV), dim=-1)
        return depth.to(view.image), facing.to(view.image) @ view.camera.viewmat[:3, :3]


def _load(kind: Any, name: str) -> Any:
    try:
        return kind.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise MissingWeights(
            f"{name} cannot be loaded ({str(error).splitlines()[0]}). Download it once on a machine with a connection, "
            "or name a folder that holds it in the layout of diffusers."
        ) from error
