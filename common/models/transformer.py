"""The pre-norm transformer block that the small ViT and the small GPT are made of.

    x <- x + attention(norm(x));  x <- x + feed_forward(norm(x))          x [B, L, width]

Every weight matrix is an nn.Linear with a name of its own, so that a sparsity pattern can be given by name:
`*.attention.query`, `.key`, `.value`, `.out` [width, width], `*.feed_forward.up` [ratio width, width] and
`*.feed_forward.down` [width, ratio width].
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Attention", "Block", "FeedForward"]


class Attention(nn.Module):
    """Multi-head self-attention, x [B, L, width] -> [B, L, width]. `causal`: position i sees positions 0..i."""

    def __init__(self, width: int, heads: int, *, causal: bool):
        super().__init__()
        if heads < 1 or width < 1 or width % heads:
            raise ValueError(f"Attention: got width={width}, heads={heads}; expected a width in multiples of heads.")
        self.heads, self.causal = heads, causal
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )  # [B, heads, L, width / heads]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with GELU between, applied to each position: [..., width] -> [..., width]."""

    def __init__(self, width: int, ratio: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Attention and feed-forward, each behind a layer norm and around a shortcut; x [B, L, width] -> same."""

    def __init__(self, width: int, heads: int, ratio: int, *, causal: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal=causal)
        self.feed_forward = FeedForward(width, ratio)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))
