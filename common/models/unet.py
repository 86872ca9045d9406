"""A plain U-Net for image-to-image work: the baseline that most reconstruction papers compare with."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UNet(nn.Module):
    """Encoder-decoder of plain 3x3 convolutions with batch norm, ReLU and skips (Ronneberger et al., 2015).

    image [B, 1, H, W] -> [B, 1, H, W]; H and W must be multiples of 2^(depth-1). `residual=True` adds the input to the
    output, as in FBPConvNet (Jin et al., 2017): the network then only draws the artefacts.

    Args:
        width: channels at full resolution; every level below has twice as many.
        depth: number of resolutions.
    """

    def __init__(self, *, width: int, depth: int = 3, residual: bool = True):
        super().__init__()
        if width < 1 or depth < 1:
            raise ValueError(f"UNet: got width={width}, depth={depth}; expected both to be at least 1.")
        self.residual, self.depth = residual, depth
        channels = [width * 2**level for level in range(depth)]
        self.down = nn.ModuleList(
            _double_conv(c_in, c_out) for c_in, c_out in zip([1, *channels], channels, strict=False)
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(below, here, 2, stride=2) for here, below in itertools.pairwise(channels)
        )
        self.merge = nn.ModuleList(_double_conv(2 * c, c) for c in channels[:-1])
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        multiple = 2 ** (self.depth - 1)
        if image.ndim != 4 or image.shape[1] != 1 or image.shape[2] % multiple or image.shape[3] % multiple:
            raise ValueError(
                f"UNet: got an image of shape {tuple(image.shape)}; expected [B, 1, H, W] with H and W multiples of "
                f"{multiple}. Pad the image, or build the network with less depth."
            )
        features, x = [], image
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else F.max_pool2d(x, 2))  # [B, width 2^level, H/2^level, W/2^level]
            features.append(x)
        for level in reversed(range(self.depth - 1)):
            x = self.merge[level](torch.cat([features[level], self.up[level](x)], dim=1))
        return self.head(x) + image if self.residual else self.head(x)


def _double_conv(channels_in: int, channels_out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for c in (channels_in, channels_out):
        layers += [nn.Conv2d(c, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU()]
    return nn.Sequential(*layers)
