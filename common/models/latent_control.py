"""Stable Diffusion with a controller that is fed feature maps instead of pictures, under one prompt.

The controller is ControlNet's: a trainable copy of the U-Net's encoder whose outputs pass convolutions that start at
zero. Its condition is brought in by a module of yours, so it may be anything that has a place for each latent position.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from common.models.denoiser import zero_
from common.models.diffusion import Schedule
from common.models.stable_diffusion import MULTIPLE, MissingWeights

__all__ = ["LatentControlled"]


class LatentControlled(nn.Module):
    """eps(x_t, t, condition) of latents x [B, 4, H/8, W/8]; all but the controller is frozen.

    denoiser  eps(x_t, t) of the U-Net alone, under the same prompt
    control   the controller, to be trained; at first it changes nothing
    schedule  the noise schedule of the model, times 1 to T
    """

    def __init__(self, unet: Any, control: Any, coder: Any, text: Tensor, schedule: Schedule, hint: nn.Module):
        super().__init__()
        self.unet, self.coder, self.schedule = unet, coder, schedule
        self.requires_grad_(False).eval()
        self.register_buffer("text", text, persistent=False)
        width = int(unet.config.block_out_channels[0])
        control.controlnet_cond_embedding = nn.Sequential(hint, zero_(nn.Conv2d(width, width, 1)))
        self.control = control.requires_grad_(True)

    @classmethod
    def from_pretrained(
        cls, model: str, prompt: str, hint: Callable[[int], nn.Module], *, device: str | torch.device = "cpu"
    ) -> LatentControlled:
        """Load Stable Diffusion 1.x by name or folder, and copy its encoder.

        prompt  what all pictures show
        hint    given the U-Net's first number of channels, a module from the condition to [B, channels, H/8, W/8]

        Raises MissingWeights where a part is neither here nor to be downloaded.
        """
        diffusers: Any = importlib.import_module("diffusers")  # which makes its names as they are asked for
        from transformers import CLIPTextModel, CLIPTokenizer

        def part(kind: Any, folder: str) -> Any:
            try:
                return kind.from_pretrained(model, subfolder=folder)
            except (OSError, ValueError) as error:
                raise MissingWeights(
                    f"{folder} of {model} cannot be loaded ({str(error).splitlines()[0]}). Download it once on a "
                    "machine with a connection, or name a folder that holds it in the layout of diffusers."
                ) from error

        kept = part(diffusers.DDPMScheduler, "scheduler").alphas_cumprod
        tokenizer, text = part(CLIPTokenizer, "tokenizer"), part(CLIPTextModel, "text_encoder")
        length = tokenizer.model_max_length
        tokens = tokenizer(prompt, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        with torch.no_grad():
            told = text(tokens.input_ids)[0]
        unet = part(diffusers.UNet2DConditionModel, "unet")
        made = cls(
            unet,
            diffusers.ControlNetModel.from_unet(unet),
            part(diffusers.AutoencoderKL, "vae"),
            told,
            Schedule(torch.cat([kept.new_ones(1), kept]).float().to(device)),
            hint(int(unet.config.block_out_channels[0])),
        )
        return made.to(device)

    def encode(self, image: Tensor) -> Tensor:
        """Images [B, 3, H, W] in -1..1 -> latents, the mode of their distribution. Gradients pass.

        Raises ValueError for sides that are not multiples of 64.
        """
        if image.ndim != 4 or image.shape[2] % MULTIPLE or image.shape[3] % MULTIPLE:
            raise ValueError(
                f"LatentControlled: got images of shape {list(image.shape)}; expected [B, 3, H, W] with sides in "
                f"multiples of {MULTIPLE}. Set another size."
            )
        return self.coder.encode(image).latent_dist.mode() * self.coder.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images, about -1..1."""
        return self.coder.decode(latents / self.coder.config.scaling_factor).sample

    def denoiser(self, x: Tensor, t: Tensor) -> Tensor:
        """eps(x_t, t): the frozen model, at times t [B], 1 to T."""
        return self.unet(x, t - 1, encoder_hidden_states=self._told(x)).sample

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """eps(x_t, t, condition), with a condition for `hint`."""
        told, step = self._told(x), t - 1  # diffusers counts the noised times from 0
        down, middle = self.control(x, step, encoder_hidden_states=told, controlnet_cond=condition, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return self.unet(x, step, encoder_hidden_states=told, **residuals).sample

    def _told(self, x: Tensor) -> Tensor:
        return self.get_buffer("text").expand(len(x), -1, -1)
