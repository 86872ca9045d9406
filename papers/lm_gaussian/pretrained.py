"""The authors' networks in place of the stand-ins: DUSt3R, Marigold, and Stable Diffusion with ControlNet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import seeds
from common.models.diffusion import epsilon_loss, sdedit, train
from common.models.dust3r import dust3r
from common.models.marigold import Marigold
from common.models.stable_diffusion import MULTIPLE, StableDiffusion
from common.splatting import Scene
from common.splatting.virtual import virtual_cameras
from papers.lm_gaussian import repair
from papers.lm_gaussian.data import Case
from papers.lm_gaussian.method import Mono
from papers.lm_gaussian.priors import Stereo
from papers.lm_gaussian.settings import Params


def case(params: Params, scene: Scene) -> Case:
    """A scene of photographs with what the networks say of them.

    Raises MissingWeights and ModuleNotFoundError where the networks are not here, naming what to do.
    """
    moved = scene.to(params.device)
    stereo = dust3r(moved.train, params.dust3r, device=params.device)
    ask = Marigold(params.marigold_depth, params.marigold_normals, device=params.device)
    return Case(
        moved,
        {view.name: Stereo(*pair) for view, pair in zip(moved.train, stereo, strict=True)},
        {view.name: Mono(*ask(view)) for view in moved.train},
        virtual_cameras(moved.train, params.between, closed=params.closed),
    )


def repairer(params: Params, pairs: repair.Pairs | None, seed: int) -> LatentRepair:
    """Stable Diffusion with ControlNet, adapted to the pairs of a scene; None: as it is."""
    network = StableDiffusion.from_pretrained(params.stable_diffusion, params.controlnet, device=params.device)
    found = LatentRepair(params, network, seed)
    if pairs is not None:
        found.adapt(pairs)
    return found


class LatentRepair:
    """SDEdit in latents, controlled by the render that is to be repaired, under the scene's prompt."""

    def __init__(self, params: Params, network: StableDiffusion, seed: int):
        self.params, self.network, self.seed = params, network, seed

    def adapt(self, pairs: repair.Pairs) -> list[float]:
        """Low-rank changes, trained on random crops of (early render, photograph); returns the losses."""
        params, network = self.params, self.network
        torch.manual_seed(seeds.derived(self.seed, "lora"))
        trained = network.adapt(params.lora_rank)
        side = min(params.lora_crop, *(MULTIPLE * (size // MULTIPLE) for size in pairs[0][0].shape[1:]))
        if side < MULTIPLE:
            raise ValueError(f"the photographs are smaller than {MULTIPLE} pixels: expected larger ones; lower factor.")

        def loss(model: nn.Module, draw: torch.Generator) -> Tensor:
            bad, good = repair.crop(pairs, draw, count=params.lora_batch, size=side, device=params.device)
            text = network.encode_text(params.prompt)  # anew each time: its encoder is trained too
            predict = partial(model, text=text, condition=(bad + 1) / 2)
            return epsilon_loss(predict, network.encode(good), network.schedule, draw)

        settings = {"steps": params.lora_steps, "learning_rate": params.lora_rate}
        return train(network, loss, seed=self.seed, parameters=trained, **settings).losses

    @torch.no_grad()
    def __call__(self, renders: Tensor, turn: int) -> Tensor:
        params, network = self.params, self.network
        draw = seeds.generator(self.seed, "repair", turn, device=params.device)
        text, repaired = network.encode_text(params.prompt), []
        for picture in renders.movedim(-1, 1).split(1):
            padded = _padded(picture)
            latents = sdedit(
                partial(network, text=text, condition=padded, strength=params.control),
                network.encode(2 * padded - 1),
                network.schedule,
                strength=params.strength,
                steps=params.ddim_steps,
                eta=params.eta,
                generator=draw,
            )
            repaired.append((network.decode(latents) + 1)[..., : picture.shape[2], : picture.shape[3]] / 2)
        return torch.cat(repaired).clamp(0, 1).movedim(1, -1).contiguous()


def _padded(picture: Tensor) -> Tensor:
    """[1, 3, H, W] with its last rows and columns repeated up to multiples of 64."""
    wanted: Sequence[int] = [MULTIPLE * math.ceil(size / MULTIPLE) for size in picture.shape[2:]]
    down, right = wanted[0] - picture.shape[2], wanted[1] - picture.shape[3]
    return F.pad(picture, (0, right, 0, down), mode="replicate")
