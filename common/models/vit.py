"""A small vision transformer: Dosovitskiy et al., An Image is Worth 16x16 Words (2021), eqs. 1-4.

The class is read from the mean over positions in place of a class token (their appendix D.3: it serves as well).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.models.transformer import Block

__all__ = ["ViT"]


class ViT(nn.Module):
    """image [B, channels, size, size] -> logits [B, classes], through (size / patch)² tokens of `width`.

    Args:
        size, patch: pixels a side of the image and of a patch; patch divides size.
        heads: of the attention; divides width.
        ratio: width of the feed-forward's hidden layer over `width`.

    For the names of its weight matrices see `transformer.py`; the patch embedding is a convolution, `embed`.
    """

    def __init__(
        self,
        *,
        size: int = 32,
        patch: int = 4,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        ratio: int = 4,
        classes: int = 10,
        channels: int = 3,
    ):
        super().__init__()
        if patch < 1 or size < patch or size % patch or min(depth, ratio, classes, channels) < 1:
            raise ValueError(
                f"ViT: got size={size}, patch={patch}, depth={depth}, ratio={ratio}, classes={classes}, "
                f"channels={channels}; expected a patch that divides the size, and the others at least 1."
            )
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.position = nn.Parameter(torch.zeros((size // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads, ratio, causal=False) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        nn.init.normal_(self.position, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image).flatten(2).transpose(1, 2)  # [B, tokens, width]
        if x.shape[1] != len(self.position):
            raise ValueError(
                f"ViT: got an image of shape {list(image.shape)}, which gives {x.shape[1]} patches; expected "
                f"{len(self.position)}. Resize it to the size the network was built for."
            )
        x = x + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))
