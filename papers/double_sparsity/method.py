"""Double Sparsity: post-training sparse attention (Yang et al., 2024, arXiv 2408.07092).

Decoding reads the whole cache of keys and values for every token. A few channels of the keys, the same ones for every
text, are enough to tell which tokens matter (channel sparsity); only those tokens are then read in full (token
sparsity). Which channels is found out once, on any text.

symbol   name here    shape            meaning
q, k, v  query, ...   [B, H, L, D]     as attention gets them, rotated; keys repeated for grouped queries
         scores       [H, D]           importance of a channel in a head, over a calibration text
C        channels     [H, r]           the r = D / 16 channels with the largest scores
         labels       [B, H, L, r]     those channels of every key, contiguous, perhaps of 4 bits: the label cache
         keep         scalar           share of the tokens that are read in full, 1/16
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common.attention.causal import CausalSite, Rows, Selector
from common.attention.decode import budgets, top

Statistic = Literal["qk", "q", "k"]


# ---------------------------------------------------------------------------------------------- which channels, offline


def calibrate(
    batches: Iterable[Sequence[tuple[Tensor, Tensor]]], statistic: Statistic = "qk", *, released: bool = False
) -> list[Tensor]:
    """Channel importance of every layer, [H, D]: the mean over tokens of |q * k| (or |q|, or |k|) of the same token.

    Args:
        batches: for each, (query [B, H, L, D], key [B, G, L, D]) of every layer.
        released: as the released code does by a slip: every batch overwrites what the batches before it said.

    Raises ValueError for no batch.
    """
    sums: list[Tensor] = []
    tokens = 0
    for layers in batches:
        found = [_statistic(query, key, statistic).double().sum((0, 2)) for query, key in layers]
        count = layers[0][0].shape[0] * layers[0][0].shape[2]
        if released or not sums:
            sums, tokens = found, count
        else:
            sums, tokens = [a + b for a, b in zip(sums, found, strict=True)], tokens + count
    if not sums:
        raise ValueError("calibrate: got no batch; expected at least one, whose channels are looked at")
    return [part / tokens for part in sums]


def top_channels(scores: Tensor, count: int) -> Tensor:
    """The `count` channels of each head with the largest scores [H, D]: int64 [H, count], the best first."""
    if not 1 <= count <= scores.shape[-1]:
        raise ValueError(f"top_channels: got {count} of {scores.shape[-1]} channels; expected 1 to all")
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :count]


def overlap(first: Tensor, second: Tensor) -> float:
    """Share of the channels [H, r] that two choices have in common, mean over heads; r / D by chance."""
    return (first[:, :, None] == second[:, None]).any(-1).double().mean().item()


# ---------------------------------------------------------------------------------------------------- the label cache


def labels_of(x: Tensor, channels: Tensor, bits: int = 16) -> Tensor:
    """The channels [H, r] of queries or keys [B, H, L, D]: [B, H, L, r], rounded to `bits` if fewer than 16."""
    index = channels[None, :, None].expand(x.shape[0], -1, x.shape[2], -1)
    found = x.gather(-1, index)
    return found if bits >= 16 else quantized(found, bits)


def quantized(labels: Tensor, bits: int) -> Tensor:
    """Labels rounded to 2^bits - 1 levels, even about zero, of each token's and head's greatest magnitude."""
    levels = 2 ** (bits - 1) - 1
    scale = labels.abs().amax(-1, keepdim=True) / levels
    return torch.where(scale > 0, (labels / scale.clamp_min(1e-30)).round() * scale, 0.0)


# ------------------------------------------------------------------------------------------------------------ decoding


class DoubleSparsity(Selector):
    """In every decoding step the tokens with the largest products of labels are read, as many as `keep` allows.

    channels   [H, r] of every layer, see `top_channels`
    keep       share of the keys so far, in (0, 1]
    bits       of the labels of keys
    """

    phase = "decode"

    def __init__(self, *, channels: Sequence[Tensor], keep: float, bits: int = 16):
        if not 0 < keep <= 1 or not 2 <= bits <= 16:
            raise ValueError(f"DoubleSparsity: got keep={keep}, bits={bits}; expected keep in (0, 1] and 2 to 16 bits")
        self.channels, self.keep, self.bits = channels, keep, bits

    def plan(self, query: Tensor, key: Tensor, site: CausalSite) -> Rows:
        if site.layer >= len(self.channels):
            raise ValueError(
                f"DoubleSparsity: got layer {site.layer} and channels of {len(self.channels)} layers; expected those "
                "of every attention; calibrate the same model"
            )
        channels = self.channels[site.layer].to(query.device)
        labels = labels_of(key.float(), channels, self.bits)

        def rows(start: int, stop: int) -> Tensor:
            asked = labels_of(query[:, :, start:stop].float(), channels)
            scores = asked @ labels[:, :, :stop].mT  # the scale of the scores changes no order
            later = torch.arange(stop, device=query.device) > torch.arange(start, stop, device=query.device)[:, None]
            return top(scores.masked_fill(later, -torch.inf), budgets(self.keep, start, stop, query.device))

        return rows


def decode_dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One decoding step as it was: query [B, H, 1, D] over the whole cache [B, H, L, D] -> [B, H, 1, D]."""
    return F.scaled_dot_product_attention(query, key, value)


def decode(query: Tensor, key: Tensor, value: Tensor, labels: Tensor, channels: Tensor, count: int) -> Tensor:
    """One decoding step: labels choose `count` tokens of the cache, which alone are read.

    query [B, H, 1, D]; key and value [B, H, L, D]; labels [B, H, L, r] of the keys -> [B, H, 1, D].
    """
    asked = labels_of(query, channels)  # [B, H, 1, r]
    chosen = (asked @ labels.mT).squeeze(2).topk(count, dim=-1, sorted=False).indices  # [B, H, count]
    # as rows of one table, whole rows are copied; `gather` would look up every channel
    length, size = key.shape[2:]
    start = torch.arange(chosen.shape[0] * chosen.shape[1], device=key.device)[:, None] * length
    places = (chosen.flatten(0, 1) + start).flatten()
    keys, values = (x.reshape(-1, size).index_select(0, places).view(*chosen.shape, size) for x in (key, value))
    return F.scaled_dot_product_attention(query, keys, values)


# ------------------------------------------------------------------------------------------------------ what it reads


@dataclass(frozen=True)
class Cache:
    """A cache of `length` tokens a head of `size` channels, each of `width` bytes."""

    length: int
    size: int
    width: int = 2

    def dense(self) -> int:
        """Bytes that a head reads for one decoded token: all keys and values."""
        return 2 * self.length * self.size * self.width

    def sparse(self, channels: int, tokens: int, *, bits: int = 16, scales: bool = True) -> float:
        """The same under Double Sparsity: all labels (below 16 bits with a scale a token), and the chosen tokens."""
        labels = self.length * channels * bits / 8
        if bits < 16 and scales:
            labels += self.length * self.width
        return labels + 2 * tokens * self.size * self.width


def _statistic(query: Tensor, key: Tensor, statistic: Statistic) -> Tensor:
    repeated = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return {"qk": lambda: query * repeated, "q": lambda: query, "k": lambda: repeated}[statistic]().abs()
