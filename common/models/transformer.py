"""The pre-norm transformer block that the small ViT and the small language models are made of.

    x <- x + attention(norm(x));  x <- x + feed_forward(norm(x))          x [B, L, width]

Every weight matrix is an nn.Linear with a name of its own, so that a sparsity pattern can be given by name:
`*.attention.query`, `.key`, `.value`, `.out` [width, width] (`.key` and `.value` have fewer rows with `key_heads`),
`*.feed_forward.up` [ratio width, width] and `*.feed_forward.down` [width, ratio width].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Attention", "Block", "FeedForward", "rotate"]


class Attention(nn.Module):
    """Multi-head self-attention, x [B, L, width] -> [B, L, width].

    Args:
        causal: position i sees positions 0..i, or all see all.
        key_heads: keys and values have this many heads, which equal numbers of query heads share; `heads` if None.
        rotary: queries and keys are turned by their positions, see `rotate`.
    """

    def __init__(self, width: int, heads: int, *, causal: bool, key_heads: int | None = None, rotary: bool = False):
        super().__init__()
        key_heads = heads if key_heads is None else key_heads
        if heads < 1 or width < 1 or width % heads:
            raise ValueError(f"Attention: got width={width}, heads={heads}; expected a width in multiples of heads.")
        if key_heads < 1 or heads % key_heads:
            raise ValueError(f"Attention: got heads={heads}, key_heads={key_heads}; expected a divisor of the heads.")
        if rotary and width // heads % 2:
            raise ValueError(
                f"Attention: got width={width}, heads={heads}; expected an even width of a head, for rotary positions "
                "turn pairs."
            )
        self.heads, self.key_heads, self.causal, self.rotary = heads, key_heads, causal, rotary
        sizes = (width, width // heads * key_heads, width // heads * key_heads, width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, size) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        layers = {self.query: self.heads, self.key: self.key_heads, self.value: self.key_heads}
        q, k, v = (layer(x).unflatten(-1, (heads, -1)).transpose(1, 2) for layer, heads in layers.items())
        if self.rotary:  # q [B, heads, L, width / heads]; k, v [B, key_heads, L, width / heads]
            q, k = rotate(q), rotate(k)
        grouped = self.heads != self.key_heads
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=grouped)
        return self.out(mixed.transpose(1, 2).flatten(2))


def rotate(x: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotary positions (Su et al. 2021): the pair (x_i, x_{i + D/2}) of position p is turned by p base^(-2i/D).

    x [..., L, D] with D even -> same; the product of two such vectors depends on their distance alone.
    """
    length, dim = x.shape[-2:]
    slower = base ** (-torch.arange(0, dim, 2, device=x.device, dtype=torch.float64) / dim)
    angle = torch.arange(length, device=x.device, dtype=torch.float64)[:, None] * slower  # [L, D / 2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class FeedForward(nn.Module):
    """Two linear layers with GELU between, applied to each position: [..., width] -> [..., width]."""

    def __init__(self, width: int, ratio: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Attention and feed-forward, each behind a layer norm and around a shortcut; x [B, L, width] -> same.

    `causal`, `key_heads`, `rotary` as in `Attention`.
    """

    def __init__(
        self, width: int, heads: int, ratio: int, *, causal: bool, key_heads: int | None = None, rotary: bool = False
    ):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal=causal, key_heads=key_heads, rotary=rotary)
        self.feed_forward = FeedForward(width, ratio)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))
