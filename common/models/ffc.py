"""Fast Fourier convolutions (Chi, Jiang and Mu, NeurIPS 2020): layers in which every feature sees the whole image.

Channels come in two groups. The local group is served by ordinary convolutions, the global group also by a 1x1
convolution over the spectrum. A layer maps a pair (local [B, C_l, H, W], global [B, C_g, H, W]) to such a pair; a group
without channels is None.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FourierUnit(nn.Module):
    """A 1x1 convolution over the channels of the spectrum: one weight a frequency-independent mix, a global filter.

    x [B, C, H, W] -> the same shape.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.mix = nn.Conv2d(2 * channels, 2 * channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(x, norm="ortho")  # [B, C, H, W/2+1] complex
        parts = torch.cat([spectrum.real, spectrum.imag], dim=1)  # [B, 2C, H, W/2+1]
        real, imaginary = F.relu(self.norm(self.mix(parts))).chunk(2, dim=1)  # [B, C, H, W/2+1] each
        return torch.fft.irfft2(torch.complex(real, imaginary), s=x.shape[-2:], norm="ortho")


class SpectralTransform(nn.Module):
    """The global-to-global path: halve the channels, add the Fourier unit to its input, widen again."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        half = channels_out // 2
        self.reduce = nn.Sequential(nn.Conv2d(channels_in, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU())
        self.fourier = FourierUnit(half)
        self.expand = nn.Conv2d(half, channels_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.reduce(x)  # [B, C_out/2, H, W]
        return self.expand(x + self.fourier(x))  # [B, C_out, H, W]


class FFC(nn.Module):
    """Fast Fourier convolution with batch norm and ReLU on a pair (local, global); `None` where a branch is empty.

    local  <- conv(local) + conv(global)
    global <- conv(local) + spectral(global)
    """

    def __init__(self, channels: tuple[int, int], ratios: tuple[float, float], *, kernel: int = 3, stride: int = 1):
        super().__init__()
        (local_in, global_in), (local_out, global_out) = (
            (c - int(r * c), int(r * c)) for c, r in zip(channels, ratios, strict=True)
        )

        def conv(c_in: int, c_out: int) -> nn.Module | None:
            if not c_in or not c_out:
                return None
            return nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False, padding_mode="reflect")

        self.local_to_local, self.global_to_local = conv(local_in, local_out), conv(global_in, local_out)
        self.local_to_global = conv(local_in, global_out)
        self.global_to_global = SpectralTransform(global_in, global_out) if global_in and global_out else None
        self.local_norm = nn.BatchNorm2d(local_out) if local_out else None
        self.global_norm = nn.BatchNorm2d(global_out) if global_out else None

    def forward(self, pair: tuple[Tensor | None, Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
        x_local, x_global = pair

        def branch(from_local: nn.Module | None, from_global: nn.Module | None, norm: nn.Module | None):
            parts = [f(x) for f, x in ((from_local, x_local), (from_global, x_global)) if f is not None]
            return F.relu(norm(sum(parts[1:], parts[0]))) if norm is not None else None

        return (
            branch(self.local_to_local, self.global_to_local, self.local_norm),
            branch(self.local_to_global, self.global_to_global, self.global_norm),
        )


class FFCBlock(nn.Module):
    """Two FFCs and a residual connection on both branches."""

    def __init__(self, channels: int, ratio: float):
        super().__init__()
        self.first, self.second = (FFC((channels, channels), (ratio, ratio)) for _ in range(2))

    def forward(self, pair: tuple[Tensor | None, Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
        out = self.second(self.first(pair))
        return tuple(None if x is None else x + y for x, y in zip(pair, out, strict=True))  # type: ignore[return-value]
