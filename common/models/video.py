"""A small video diffusion transformer of HunyuanVideo's own class: flow matching, and sampling by Euler's method.

    x_s = (1 - s) video + s noise,    velocity = noise - video,    s from 1 (noise) to 0 (video)

Videos are [B, C, F, H, W]; text is embedded already, [B, T, W] with presence bool [B, T].
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from common.models.stable_diffusion import MissingWeights

__all__ = ["VideoTransformer", "pretrained_pipeline", "sample", "velocity_loss"]

TIMES = 1000  # the transformer's timestep of pure noise


class VideoTransformer(nn.Module):
    """(x [B, C, F, H, W], s [B], text [B, T, W], presence [B, T]) -> velocity like x.

    `core` is diffusers' HunyuanVideoTransformer3DModel, which joins video and text in one attention (video first);
    tokens are patches of patch x patch pixels of one frame. Give `core` to what works on diffusers' transformers.

    Args:
        heads, head_dim: of attention; their product is the width.
        double, single: blocks with weights of their own for video and text, and with common ones.
        channels, patch: of the video; H and W are multiples of patch.
        text_width: of a text token.
    """

    def __init__(
        self, *, heads: int, double: int, single: int, head_dim: int = 64, channels: int, patch: int, text_width: int
    ):
        super().__init__()
        from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel

        time, space = head_dim // 4, 3 * head_dim // 8
        self.core = HunyuanVideoTransformer3DModel(
            in_channels=channels,
            out_channels=channels,
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            num_layers=double,
            num_single_layers=single,
            num_refiner_layers=1,
            patch_size=patch,
            guidance_embeds=False,
            text_embed_dim=text_width,
            pooled_projection_dim=text_width,
            rope_axes_dim=(time, space, space),
        )

    def forward(self, x: Tensor, s: Tensor, text: Tensor, present: Tensor) -> Tensor:
        pooled = text.sum(1) / present.sum(1, keepdim=True).clamp(min=1)
        core: Any = self.core
        return core(x, s * TIMES, text, present.long(), pooled, return_dict=False)[0]


def velocity_loss(network: nn.Module, video: Tensor, text: Tensor, present: Tensor, generator: Generator) -> Tensor:
    """Mean squared error of the velocity at a time drawn for each video.

    Times are logistic-normal (Esser et al. 2024): sigmoid of a normal number, so that the middle is seen most.
    """
    noise = torch.randn(video.shape, generator=generator)
    s = torch.randn(len(video), generator=generator).sigmoid()
    at = s[:, None, None, None, None]
    return F.mse_loss(network((1 - at) * video + at * noise, s, text, present), noise - video)


@torch.no_grad()
def sample(
    network: nn.Module,
    noise: Tensor,
    text: Tensor,
    present: Tensor,
    *,
    steps: int,
    shift: float = 1.0,
    after_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Videos from noise [B, C, F, H, W] in `steps` Euler steps, one forward pass each.

    Args:
        shift: times s become shift s / (1 + (shift - 1) s): above 1 more steps are spent near the noise, as
            HunyuanVideo does with 7.
        after_step: called with the number of steps done and the video so far.

    Raises ValueError for fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"sample: got {steps} steps; expected at least 1")
    even = torch.linspace(1, 0, steps + 1)
    times = (shift * even / (1 + (shift - 1) * even)).tolist()
    x = noise
    for done, (now, then) in enumerate(itertools.pairwise(times), start=1):
        x = x + (then - now) * network(x, torch.full((len(x),), now), text, present)
        if after_step:
            after_step(done, x)
    return x


def pretrained_pipeline(name: str, *, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Any:
    """A diffusers pipeline (HunyuanVideo, CogVideoX, Wan, LTX) by name or folder.

    Raises MissingWeights where it is neither here nor to be downloaded.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    try:
        pipe = DiffusionPipeline.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        raise MissingWeights(
            f"{name} cannot be loaded ({str(error).splitlines()[0]}). Download it once on a machine with a "
            "connection, or name a folder that holds it in the layout of diffusers (--set model=FOLDER)."
        ) from error
    return pipe.to(device)
