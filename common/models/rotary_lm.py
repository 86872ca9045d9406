"""A small transformer language model with rotary positions: causal, or in both directions as masked diffusion needs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models.transformer import Block

__all__ = ["RotaryLM"]


class RotaryLM(nn.Module):
    """tokens [B, L] int64 in 0..vocabulary-1, of any length -> logits [B, L, vocabulary].

    Args:
        vocabulary: number of kinds of tokens, a mask token among them where one is wanted.
        heads: of queries; the default width gives them a size of 64.
        key_heads: of keys and values, a divisor of `heads`; as many if None.
        causal: position i sees positions 0..i, and its logits are for the token after it; else all see all.
        ratio: width of the feed-forward's hidden layer over `width`.
        near: to the vector of each token a linear map of those of the `near` tokens before it is added, before the
            first block. Without it a layer has to learn to look at the token before, and small models need very long
            to find out that this helps (an induction head, Olsson et al. 2022); with it they learn to look up keys in
            some hundred steps.

    Attention goes through torch's scaled_dot_product_attention, where `common.attention.language_attention` reaches it.
    For the names of its weight matrices see `transformer.py`; the map is `near`, the head `head`. Matrices start at
    N(0, 1/inputs), those that end a shortcut divided by sqrt(2 depth); embeddings at N(0, 1); biases at 0.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        causal: bool,
        width: int = 256,
        depth: int = 4,
        heads: int = 4,
        key_heads: int | None = None,
        ratio: int = 4,
        near: int = 0,
    ):
        super().__init__()
        if min(vocabulary, depth, ratio) < 1 or near < 0:
            raise ValueError(
                f"RotaryLM: got vocabulary={vocabulary}, depth={depth}, ratio={ratio}, near={near}; expected each to "
                "be at least 1, and near at least 0."
            )
        self.token = nn.Embedding(vocabulary, width)
        self.near = nn.Linear(near * width, width) if near else None
        self.blocks = nn.ModuleList(
            Block(width, heads, ratio, causal=causal, key_heads=key_heads, rotary=True) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear):
                ends_shortcut = name.endswith(("attention.out", "feed_forward.down"))
                share = 1 / math.sqrt(2 * depth) if ends_shortcut else 1.0
                nn.init.normal_(layer.weight, std=share / math.sqrt(layer.in_features))
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.ndim != 2:
            raise ValueError(f"RotaryLM: got tokens of shape {list(tokens.shape)}; expected [B, L].")
        x = self.token(tokens)  # [B, L, width]
        if self.near is not None:
            backs = range(1, self.near.in_features // x.shape[-1] + 1)
            before = [F.pad(x, (0, 0, back, 0))[:, : x.shape[1]] for back in backs]  # zeros before the first
            x = x + self.near(torch.cat(before, dim=-1))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
