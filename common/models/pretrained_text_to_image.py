"""Stable Diffusion 1.x, 2.x and 3 by name, as a `Model` of `common.models.text_to_image`: captions in, noise out.

    model = PretrainedTextToImage.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5", device="cuda")
    loss = noise_loss(model, model.encode(images), model.encode_text(captions), model.encode_text([""]), draw)

One loss and one sampler then serve them all, and the small models too. What a network predicts becomes the noise:

    epsilon         itself
    v_prediction    sqrt(a) v + sqrt(1 - a) x_t                                       (Salimans and Ho 2022)
    flow            x_s + (1 - s) v  of  x_s = (1 - s) x_0 + s noise = x_t / (sqrt(a) + sqrt(1 - a)),
                    s = sqrt(1 - a) / (sqrt(a) + sqrt(1 - a))                         (Stable Diffusion 3)

For a flow the squared error of the noise is (1 - s)^2 times that of the velocity, which its authors train; late times
weigh less here than there.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models.diffusion import LEAST_SIGNAL, Schedule
from common.models.video import pretrained_pipeline

__all__ = ["PretrainedTextToImage"]

TIMES = 1000


class PretrainedTextToImage(nn.Module):
    """(x [B, C, h, w] latents, t [B] in 1..T, text [B, L, D]) -> predicted noise like x.

    core      the pipeline's U-Net or transformer: what is fine-tuned; all else is frozen
    schedule  its noise schedule

    Raises ValueError for pipelines that predict something else.
    """

    def __init__(self, pipe: Any):
        super().__init__()
        flow = getattr(pipe, "unet", None) is None
        self.pipe, self.coder = [pipe], pipe.vae.requires_grad_(False).eval()  # a list: no submodule of this
        self.core = pipe.transformer if flow else pipe.unet
        self.predicts: Literal["epsilon", "v_prediction", "flow"]
        self.predicts = "flow" if flow else pipe.scheduler.config.prediction_type
        if self.predicts not in ("epsilon", "v_prediction", "flow"):
            raise ValueError(
                f"PretrainedTextToImage: got a pipeline that predicts {self.predicts!r}; expected epsilon, "
                "v_prediction, or a flow as Stable Diffusion 3's"
            )
        self.schedule = _flow_schedule(pipe.scheduler) if flow else _noise_schedule(pipe.scheduler)

    @classmethod
    def from_pretrained(
        cls, name: str, *, device: str = "cuda", dtype: torch.dtype = torch.float32
    ) -> PretrainedTextToImage:
        """Load a pipeline by name or folder; raises MissingWeights where it is neither here nor to be downloaded."""
        made = cls(pretrained_pipeline(name, device=device, dtype=dtype))
        made.schedule = made.schedule.to(device)
        return made

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """N captions -> [N, L, D]; of Stable Diffusion 3 the last row is the pooled text, filled up with zeros."""
        pipe, device = self.pipe[0], next(self.core.parameters()).device
        if self.predicts != "flow":
            return pipe.encode_prompt(list(captions), device, 1, False)[0]
        told = pipe.encode_prompt(list(captions), None, None, device=device, do_classifier_free_guidance=False)
        text, pooled = told[0], told[2]
        return torch.cat([text, F.pad(pooled, (0, text.shape[-1] - pooled.shape[-1]))[:, None]], dim=1)

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Images [N, 3, H, W] in -1..1 -> latents, the mode of their distribution."""
        config = self.coder.config
        return (self.coder.encode(image).latent_dist.mode() - (config.shift_factor or 0)) * config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images within -1..1."""
        config = self.coder.config
        return self.coder.decode(latents / config.scaling_factor + (config.shift_factor or 0)).sample.clamp(-1, 1)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        core: Any = self.core
        a = self.schedule.at(t).to(x)
        text = text.expand(len(x), -1, -1)
        if self.predicts != "flow":
            found = core(x, t - 1, encoder_hidden_states=text).sample  # diffusers counts the noised times from 0
            return found if self.predicts == "epsilon" else a.sqrt() * found + (1 - a).sqrt() * x
        size = a.sqrt() + (1 - a).sqrt()
        s, at = (1 - a).sqrt() / size, x / size
        width = int(core.config.pooled_projection_dim)
        told = {"encoder_hidden_states": text[:, :-1], "pooled_projections": text[:, -1, :width]}
        return at + (1 - s) * core(at, timestep=TIMES * s.flatten(), **told).sample


def _noise_schedule(scheduler: Any) -> Schedule:
    """Of diffusers' betas; its time 0 is our time 1."""
    diffusers: Any = importlib.import_module("diffusers")
    kept = diffusers.DDPMScheduler.from_config(scheduler.config).alphas_cumprod
    return Schedule(torch.cat([kept.new_ones(1), kept]).float())


def _flow_schedule(scheduler: Any) -> Schedule:
    """Of times s that are evenly spaced before the shift s -> k s / (1 + (k - 1) s) of Stable Diffusion 3 (k = 3)."""
    shift = float(scheduler.config.shift)
    even = torch.linspace(0, 1, TIMES + 1, dtype=torch.float64)
    s = shift * even / (1 + (shift - 1) * even)
    signal = (1 - s).square() / ((1 - s).square() + s.square())
    return Schedule(signal.clamp_min(LEAST_SIGNAL).float())
