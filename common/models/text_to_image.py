"""Small diffusion models that draw what a caption says: a U-Net with cross-attention and a transformer, in pixels.

The networks are diffusers' own classes, so what works on them works on the large ones. Only `core` is trained. The
words' vectors are drawn once and stay as they are, as the text encoder of Stable Diffusion does when its U-Net is
fine-tuned; so a word that the training never showed has a vector like any other, which means nothing yet.

    model = TextToImage("unet", width=32, depth=3)
    text, nothing = model.encode_text(["frog", "ship"]), model.encode_text([""])     # [N, L, D], [1, L, D]
    noise = model(x, t, text)                              # x [N, 3, 16, 16] in -1..1, t [N] of model.schedule
    images = sample(model, text, nothing, steps=25, guidance=3.0, generator=draw)

`common.models.pretrained_text_to_image` has models of the same methods by name, which work on latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Generator, Tensor, nn

from common.data.captioned import LENGTH, VOCABULARY, tokens
from common.models.diffusion import Predictor, Schedule, ddim, epsilon_loss, times

__all__ = ["Kind", "Model", "TextToImage", "guided", "noise_loss", "sample"]

Kind = Literal["unet", "dit"]

TEXT_WIDTH = 64  # of a word's vector
TIMES = 1000
HEAD = 32  # width of a transformer's attention head
UNET_HEADS = 4
GROUPS = 16  # of group norms
PATCH = 2  # pixels a side of a transformer's token


class Model(Protocol):
    """eps(x_t, t, text), the schedule of its times, and the ways from captions and images to what it works on."""

    schedule: Schedule

    def __call__(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor: ...

    def encode_text(self, captions: Sequence[str]) -> Tensor: ...

    def encode(self, image: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


class TextToImage(nn.Module):
    """(x [B, 3, size, size], t [B] in 1..T, text [B, L, D]) -> predicted noise like x.

    core      diffusers' UNet2DConditionModel or PixArtTransformer2DModel (a DiT with cross-attention to the text)
    schedule  its noise schedule, cosine, T = 1000

    Args:
        kind: `unet`, `dit`.
        width: channels of the U-Net at full resolution, a multiple of 16, and by how many more each level below has; or
            of the transformer, a multiple of 32.
        depth: resolutions of the U-Net, all but the first with attention; or blocks of the transformer.
        size: pixels a side.
        seed: of the words' vectors; the core's weights come from torch's global generator.
    """

    table: Tensor
    places: Tensor

    def __init__(self, kind: Kind, *, width: int, depth: int, size: int = 16, seed: int = 0):
        super().__init__()
        cores = {"unet": _unet, "dit": _transformer}
        if kind not in cores:
            raise ValueError(f"TextToImage: got kind {kind!r}; expected one of {', '.join(cores)}")
        self.core = cores[kind](width, depth, size)
        self.schedule = Schedule.cosine(TIMES)
        draw = torch.Generator().manual_seed(seed)
        self.register_buffer("table", torch.randn(len(VOCABULARY), TEXT_WIDTH, generator=draw))
        self.register_buffer("places", torch.randn(LENGTH, TEXT_WIDTH, generator=draw) / 4)  # where in the caption

    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """N captions -> [N, L, D]; raises ValueError for words that are not in the vocabulary of `captioned`."""
        return self.table[tokens(captions).to(self.table.device)] + self.places

    def encode(self, image: Tensor) -> Tensor:
        """Images in -1..1 as they are: this model works on pixels."""
        return image

    def decode(self, latents: Tensor) -> Tensor:
        """The same, within -1..1."""
        return latents.clamp(-1, 1)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        core: Any = self.core
        told = {"timestep": t - 1, "encoder_hidden_states": text.expand(len(x), -1, -1)}  # diffusers counts from 0
        return core(x, **told, return_dict=False)[0]


def noise_loss(
    model: Model, latents: Tensor, text: Tensor, nothing: Tensor, generator: Generator, *, drop: float = 0.1
) -> Tensor:
    """`epsilon_loss` of latents [B, C, H, W] under text [B, L, D], of which a share `drop` is replaced.

    nothing  [1, L, D] of the empty caption, which takes its place (Ho and Salimans 2022), for `guided`
    """
    dropped = torch.rand(len(text), 1, 1, generator=generator, device=text.device) < drop
    told = torch.where(dropped, nothing, text)
    return epsilon_loss(lambda x, t: model(x, t, told), latents, model.schedule, generator)


def guided(model: Model, text: Tensor, nothing: Tensor, scale: float) -> Predictor:
    """Classifier-free guidance: eps(nothing) + scale (eps(text) - eps(nothing)) (Ho and Salimans 2022).

    text [B, L, D], nothing [1, L, D] the empty caption's. Scale 1 is the model under its captions, in one pass.
    """
    if scale == 1:
        return lambda x, t: model(x, t, text)
    both = torch.cat([nothing.expand_as(text), text])

    def predict(x: Tensor, t: Tensor) -> Tensor:
        without, told = model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return without + scale * (told - without)

    return predict


@torch.no_grad()
def sample(
    model: Model,
    text: Tensor,
    nothing: Tensor,
    *,
    steps: int = 25,
    guidance: float = 3.0,
    generator: Generator,
    shape: tuple[int, int, int] = (3, 16, 16),
    limit: float | None = 1.0,
    batch: int = 64,
) -> Tensor:
    """Images [N, 3, H, W] in -1..1 for text [N, L, D], by DDIM from noise of the generator.

    nothing       [1, L, D] of the empty caption, see `guided`
    shape, limit  of one image's latents, and within what they are kept: 1 for pixels, None for latents
    batch         images at a time; the noise of an image does not depend on it

    So two models that are given equal generators and texts draw from equal noise. Raises ValueError for no text, or
    fewer than one image at a time.
    """
    if not len(text) or batch < 1:
        raise ValueError(f"sample: got {len(text)} captions and batch={batch}; expected at least one of each")
    noise = torch.randn(len(text), *shape, generator=generator, device=text.device)
    at = times(model.schedule, steps)
    drawn = []
    for x, told in zip(noise.split(batch), text.split(batch), strict=True):
        drawn.append(model.decode(ddim(guided(model, told, nothing, guidance), x, model.schedule, at, limit=limit)))
    return torch.cat(drawn)


def _unet(width: int, depth: int, size: int) -> nn.Module:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    if width < GROUPS or width % GROUPS or depth < 2 or size % 2 ** (depth - 1):
        raise ValueError(
            f"TextToImage: got a U-Net of width={width}, depth={depth} for {size} pixels; expected a multiple of "
            f"{GROUPS}, at least 2, and pixels that can be halved depth - 1 times"
        )
    deeper = depth - 1
    return UNet2DConditionModel(
        sample_size=size,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=tuple(width * (level + 1) for level in range(depth)),
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * deeper),
        up_block_types=(*["CrossAttnUpBlock2D"] * deeper, "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=UNET_HEADS,  # which diffusers reads as their number
        norm_num_groups=GROUPS,
    )


def _transformer(width: int, depth: int, size: int) -> nn.Module:
    from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

    if width < HEAD or width % HEAD or depth < 1 or size % PATCH:
        raise ValueError(
            f"TextToImage: got a transformer of width={width}, depth={depth} for {size} pixels; expected a multiple of "
            f"{HEAD}, at least 1, and an even number of pixels"
        )
    return PixArtTransformer2DModel(
        num_attention_heads=width // HEAD,
        attention_head_dim=HEAD,
        in_channels=3,
        out_channels=3,
        num_layers=depth,
        cross_attention_dim=width,
        sample_size=size,
        patch_size=PATCH,
        caption_channels=TEXT_WIDTH,
    )
