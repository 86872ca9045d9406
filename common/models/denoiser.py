"""Networks that predict the noise of a diffusion: a time-conditioned U-Net, and a control branch that steers it.

Small enough for a CPU: pixels enter in patches (a rearrangement, nothing is lost), so that the convolutions see an
image of half the size, and there is self-attention at the lowest resolution alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ControlBranch", "Controlled", "Denoiser"]

GROUPS = 8  # of group norms
LONGEST_WAVE = 10_000.0  # of the sinusoids that encode the time, in steps (Vaswani et al. 2017)


class Denoiser(nn.Module):
    """U-Net eps(x_t, t) with residual blocks, group norms and skips (Ho et al. 2020).

    x [B, channels, H, W], t [B] steps -> [B, channels, H, W]. H and W must be multiples of `multiple`.

    Args:
        width: channels at the highest resolution, a multiple of 8; every level below has twice as many.
        depth: number of resolutions.
        patch: side of the square of pixels that becomes one position, see above.
    """

    def __init__(self, *, channels: int = 3, width: int = 32, depth: int = 3, patch: int = 2):
        super().__init__()
        if width < GROUPS or width % GROUPS or depth < 1 or patch < 1 or channels < 1:
            raise ValueError(
                f"Denoiser: got channels={channels}, width={width}, depth={depth}, patch={patch}; expected a width in "
                f"multiples of {GROUPS} and the others at least 1."
            )
        self.patch, self.multiple = patch, patch * 2 ** (depth - 1)
        widths = [width * 2**level for level in range(depth)]
        self.encoder = _Encoder(channels * patch**2, widths)
        embedding = self.encoder.embedding
        self.merge = nn.ModuleList(_Block(2 * here, here, embedding) for here in widths)
        self.up = nn.ModuleList(nn.Conv2d(2 * here, here, 3, padding=1) for here in widths[:-1])
        self.head = nn.Sequential(_norm(width), nn.SiLU(), nn.Conv2d(width, channels * patch**2, 3, padding=1))
        zero_(self.head[-1])  # the first prediction is 0, the mean of all noise

    def forward(self, x: Tensor, t: Tensor, residuals: Sequence[Tensor] | None = None) -> Tensor:
        """`residuals` of a ControlBranch are added to the encoder's features."""
        if x.ndim != 4 or x.shape[2] % self.multiple or x.shape[3] % self.multiple:
            raise ValueError(
                f"Denoiser: got an image of shape {list(x.shape)}; expected [B, C, H, W] with H and W multiples of "
                f"{self.multiple}. Pad it or cut it."
            )
        features, embedding = self.encoder(F.pixel_unshuffle(x, self.patch), t)
        if residuals is not None:
            features = [ours + more for ours, more in zip(features, residuals, strict=True)]
        *skips, x = features
        for level in reversed(range(len(skips))):
            if level < len(self.up):
                x = self.up[level](F.interpolate(x, scale_factor=2.0))
            x = self.merge[level](torch.cat([skips[level], x], dim=1), embedding)
        return F.pixel_shuffle(self.head(x), self.patch)


class ControlBranch(nn.Module):
    """A trainable copy of a denoiser's encoder that sees a condition too (ControlNet, Zhang et al. 2023).

    It returns what is to be added to the denoiser's features. All its outputs pass convolutions that start at zero, so
    at first it changes nothing, and the denoiser keeps what it knew.

    Args:
        denoiser: whose encoder is copied; it stays as it is.
        hint: brings the condition to the encoder's first features [B, width, H / patch, W / patch]; None: for a
            condition that is an image like x. The zero convolution after it is added here.
    """

    def __init__(self, denoiser: Denoiser, hint: nn.Module | None = None):
        super().__init__()
        self.patch = denoiser.patch
        self.encoder = copy.deepcopy(denoiser.encoder)
        width, widths = self.encoder.stem.out_channels, self.encoder.widths
        if hint is None:
            stem = nn.Conv2d(self.encoder.stem.in_channels, width, 3, padding=1)
            hint = nn.Sequential(nn.PixelUnshuffle(self.patch), stem, nn.SiLU())
        self.hint = nn.Sequential(hint, zero_(nn.Conv2d(width, width, 1)))
        self.outputs = nn.ModuleList(zero_(nn.Conv2d(c, c, 1)) for c in (*widths, widths[-1]))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, strength: float = 1.0) -> list[Tensor]:
        """Residuals for `Denoiser.forward`, times `strength`; x [B, C, H, W], t [B]."""
        features, _ = self.encoder(F.pixel_unshuffle(x, self.patch), t, self.hint(condition))
        return [strength * out(feature) for out, feature in zip(self.outputs, features, strict=True)]


class Controlled(nn.Module):
    """A denoiser and its control branch as one network: eps(x_t, t, condition)."""

    def __init__(self, denoiser: Denoiser, control: ControlBranch):
        super().__init__()
        self.denoiser, self.control = denoiser, control

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, strength: float = 1.0) -> Tensor:
        return self.denoiser(x, t, self.control(x, t, condition, strength))


def zero_(module: nn.Module) -> nn.Module:
    """Set all parameters to zero; returns the module."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class _Encoder(nn.Module):
    """Features by level and the middle's, and the embedding of the time: ([B, width 2^l, h/2^l, w/2^l] ..., [B, E])."""

    def __init__(self, channels: int, widths: list[int]):
        super().__init__()
        self.widths, self.embedding = widths, 4 * widths[0]
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.time = nn.Sequential(
            nn.Linear(widths[0], self.embedding), nn.SiLU(), nn.Linear(self.embedding, self.embedding)
        )
        self.blocks = nn.ModuleList(_Block(width, width, self.embedding) for width in widths)
        self.down = nn.ModuleList(
            nn.Conv2d(here, 2 * here, 3, stride=2, padding=1) for here in widths[:-1]
        )  # to the next level
        self.middle = nn.ModuleList([_Block(widths[-1], widths[-1], self.embedding), _Attention(widths[-1])])

    def forward(self, x: Tensor, t: Tensor, hint: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        embedding = self.time(_waves(t, self.widths[0]))
        x = self.stem(x) if hint is None else self.stem(x) + hint
        features = []
        for level, block in enumerate(self.blocks):
            x = block(x if level == 0 else self.down[level - 1](x), embedding)
            features.append(x)
        block, attention = self.middle
        return [*features, attention(block(x, embedding))], embedding


class _Block(nn.Module):
    """Two convolutions and a residual connection; the time sets scale and shift between them."""

    def __init__(self, channels_in: int, channels_out: int, embedding: int):
        super().__init__()
        self.first = nn.Sequential(_norm(channels_in), nn.SiLU(), nn.Conv2d(channels_in, channels_out, 3, padding=1))
        self.film = nn.Linear(embedding, 2 * channels_out)
        self.norm = _norm(channels_out)
        self.second = zero_(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        self.skip = nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.film(F.silu(embedding))[..., None, None].chunk(2, dim=1)
        h = self.norm(self.first(x)) * (1 + scale) + shift
        return self.skip(x) + self.second(F.silu(h))


class _Attention(nn.Module):
    """Self-attention over all positions, one head, with a residual connection."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.query, self.key, self.value = (nn.Linear(channels, channels) for _ in range(3))
        self.out = nn.Linear(channels, channels)
        zero_(self.out)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).movedim(1, 2)  # [B, h w, C]
        mixed = F.scaled_dot_product_attention(self.query(tokens), self.key(tokens), self.value(tokens))
        return x + self.out(mixed).movedim(1, 2).reshape(x.shape)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels)


def _waves(t: Tensor, size: int) -> Tensor:
    """[B] times -> [B, size] sines and cosines."""
    half = size // 2
    frequency = torch.exp(torch.arange(half, device=t.device) * (-math.log(LONGEST_WAVE) / half))
    angle = t.to(frequency)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)
