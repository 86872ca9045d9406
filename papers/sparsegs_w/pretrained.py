"""The authors' kind of networks in place of the stand-ins: DUSt3R, and Stable Diffusion with ControlNet tile."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from common.models.diffusion import Predictor
from common.models.dust3r import dust3r
from common.models.stable_diffusion import StableDiffusion
from papers.sparsegs_w import phototourism
from papers.sparsegs_w.data import Case, Pointmap
from papers.sparsegs_w.settings import Params


def case(params: Params) -> Case:
    """A folder of photographs with what DUSt3R says of them.

    Raises as `phototourism.load`; MissingWeights and ModuleNotFoundError where the network is not here.
    """
    scene, masks, _ = phototourism.load(params)
    moved = scene.to(params.device)
    maps = dust3r(moved.train, params.dust3r, device=params.device)
    named = {view.name: Pointmap(*pair) for view, pair in zip(moved.train, maps, strict=True)}
    return Case(moved, {name: mask.to(params.device) for name, mask in masks.items()}, named, reference_tests=False)


class Latents:
    """A `prior.Space`: Stable Diffusion's latents, controlled by ControlNet tile under the scene's prompt."""

    limit: float | None = None
    factor: int = 8

    def __init__(self, params: Params):
        self.network = StableDiffusion.from_pretrained(params.stable_diffusion, params.controlnet, device=params.device)
        self.schedule, self.control = self.network.schedule, params.control
        with torch.no_grad():
            self.text = self.network.encode_text(params.prompt)

    def encode(self, pictures: Tensor) -> Tensor:
        return self.network.encode(2 * pictures - 1)

    def decode(self, z: Tensor) -> Tensor:
        return (self.network.decode(z) + 1) / 2

    def predictor(self, pictures: Tensor) -> Predictor:
        return partial(self.network, text=self.text, condition=pictures, strength=self.control)
