"""The residual network for small images of He, Zhang, Ren and Sun, Deep Residual Learning (2016), section 4.2.

    image [B, C, H, W] -> stem -> 3 stages of n blocks, each of two 3x3 convolutions -> mean over positions -> logits

The depth counts convolutions and the last linear layer: 6n + 2. Published: width 16, depth 20, 32 x 32 pixels, 0.27
million parameters. Shortcuts have none (option A): where the resolution halves they take every second pixel and fill
the new channels with zeros.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ResNetCifar"]


class ResNetCifar(nn.Module):
    """image [B, channels, H, W] -> logits [B, classes]; any H and W of at least 4.

    Args:
        width: channels of the first stage; the second has twice, the third four times as many.
        depth: 6n + 2 for n blocks a stage: 8, 14, 20, 32, ...
    """

    def __init__(self, *, width: int = 16, depth: int = 20, classes: int = 10, channels: int = 3):
        super().__init__()
        if depth < 8 or depth % 6 != 2 or min(width, classes, channels) < 1:
            raise ValueError(
                f"ResNetCifar: got width={width}, depth={depth}, classes={classes}, channels={channels}; expected a "
                "depth of 6n + 2 (8, 14, 20, ...) and the others at least 1."
            )
        widths = (width, 2 * width, 4 * width)
        self.stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        blocks, before = [], width
        for stage, here in enumerate(widths):
            for block in range((depth - 2) // 6):
                blocks.append(_Block(before, here, stride=2 if stage and not block else 1))
                before = here
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image))

    def features(self, image: Tensor) -> Tensor:
        """What the last linear layer sees, [B, 4 width]."""
        x = F.relu(self.norm(self.stem(image)))  # [B, width, H, W]
        x = self.blocks(x)  # [B, 4 width, H/4, W/4]
        return x.mean(dim=(2, 3))


class _Block(nn.Module):
    """x [B, C_in, H, W] -> [B, C_out, H/stride, W/stride]: two convolutions around a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, *, stride: int):
        super().__init__()
        self.stride, self.new_channels = stride, channels_out - channels_in
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(shortcut, (0, 0, 0, 0, 0, self.new_channels)))
