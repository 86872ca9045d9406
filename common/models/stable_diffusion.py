"""Stable Diffusion with a ControlNet as a predictor for `common.models.diffusion`: text and condition in, noise out.

The networks are those of diffusers; sampling, SDEdit and low-rank adaptation are ours, the same as for small networks.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from common.models import lora
from common.models.diffusion import Schedule

__all__ = ["MissingWeights", "StableDiffusion"]

MULTIPLE = 64  # pixels: eight for the latents, eight for the U-Net's three halvings


class MissingWeights(OSError):
    """The weights of a pretrained network cannot be had."""


class StableDiffusion(nn.Module):
    """Stable Diffusion 1.x and a ControlNet. Images are [B, 3, H, W] with sides in multiples of 64.

    schedule  its noise schedule; latents are noised and denoised by it
    """

    def __init__(self, unet: Any, control: Any, coder: Any, text: Any, tokenizer: Any, schedule: Schedule):
        super().__init__()
        self.unet, self.control, self.coder, self.text = unet, control, coder, text
        self.tokenizer, self.schedule = tokenizer, schedule
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, model: str, control: str, *, device: str | torch.device = "cpu") -> StableDiffusion:
        """Load both by name or folder, for instance stable-diffusion-v1-5/stable-diffusion-v1-5 and
        lllyasviel/control_v11f1e_sd15_tile.

        Raises MissingWeights where one of them is neither here nor to be downloaded.
        """
        diffusers: Any = importlib.import_module("diffusers")  # which makes its names as they are asked for
        from transformers import CLIPTextModel, CLIPTokenizer

        def part(kind: Any, name: str, **options: Any) -> Any:
            try:
                return kind.from_pretrained(name, **options)
            except (OSError, ValueError) as error:
                raise MissingWeights(
                    f"{name} cannot be loaded ({str(error).splitlines()[0]}). Download it once on a machine with a "
                    "connection, or name a folder that holds it in the layout of diffusers."
                ) from error

        kept = part(diffusers.DDPMScheduler, model, subfolder="scheduler").alphas_cumprod
        made = cls(
            part(diffusers.UNet2DConditionModel, model, subfolder="unet"),
            part(diffusers.ControlNetModel, control),
            part(diffusers.AutoencoderKL, model, subfolder="vae"),
            part(CLIPTextModel, model, subfolder="text_encoder"),
            part(CLIPTokenizer, model, subfolder="tokenizer"),
            Schedule(torch.cat([kept.new_ones(1), kept]).float().to(device)),
        )
        return made.to(device)

    def encode_text(self, prompt: str) -> Tensor:
        """[1, L, D] what the U-Net is told."""
        tokens = self.tokenizer(
            prompt,
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        )
        return self.text(tokens.input_ids.to(self.unet.device))[0]

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Images in -1..1 -> latents [B, 4, H/8, W/8], the mode of their distribution."""
        if image.ndim != 4 or image.shape[2] % MULTIPLE or image.shape[3] % MULTIPLE:
            raise ValueError(
                f"StableDiffusion: got images of shape {list(image.shape)}; expected [B, 3, H, W] with sides in "
                f"multiples of {MULTIPLE}. Pad them."
            )
        return self.coder.encode(image).latent_dist.mode() * self.coder.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images, about -1..1."""
        return self.coder.decode(latents / self.coder.config.scaling_factor).sample

    def forward(self, x: Tensor, t: Tensor, text: Tensor, condition: Tensor, strength: float = 1.0) -> Tensor:
        """The predicted noise of latents x at times t [B] of `schedule`, 1 to T.

        text       [1 or B, L, D] from `encode_text`
        condition  [B, 3, H, W] in 0..1, for the ControlNet; `strength` scales what it adds
        """
        told = {"encoder_hidden_states": text.expand(len(x), -1, -1)}
        step = t - 1  # diffusers counts the noised times from 0
        down, middle = self.control(
            x, step, **told, controlnet_cond=condition, conditioning_scale=strength, return_dict=False
        )
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return self.unet(x, step, **told, **residuals).sample

    def adapt(self, rank: int) -> list[nn.Parameter]:
        """Low-rank changes in all attention of U-Net, ControlNet and text encoder; returns what is to be trained."""
        ends = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
        networks = (self.unet, self.control, self.text)
        return [p for network in networks for p in lora.add(network, lambda name: name.endswith(ends), rank=rank)]
