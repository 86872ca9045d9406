"""Stable Diffusion in place of the small model: distillation in its latents, with a controller made of its U-Net."""

from __future__ import annotations

from torch import Tensor

from common.models.latent_control import LatentControlled
from papers.sparse3d.method import EpipolarHint, NetworkPrior
from papers.sparse3d.settings import Params

LATENT_PIXELS = 8  # a side of the square of pixels that becomes one latent position


class LatentPrior(NetworkPrior):
    """x are latents; the gradient goes through the encoder to the render."""

    def encode(self, image: Tensor) -> Tensor:
        return self.network.encode(2 * image - 1)


def fresh_prior(params: Params, channels: int) -> LatentPrior:
    """Stable Diffusion, told the category, with a controller that changes nothing yet.

    Raises MissingWeights where the weights are not here, naming what to do.
    """

    def hint(width: int) -> EpipolarHint:
        return EpipolarHint(channels, width, params.ray_pixels / LATENT_PIXELS)

    network = LatentControlled.from_pretrained(
        params.stable_diffusion, f"a photo of a {params.category}", hint, device=params.device
    )
    return LatentPrior(network, network.schedule)
