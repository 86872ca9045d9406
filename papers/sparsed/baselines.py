"""Patterns that are known beforehand, the same in every step and head: what serves autoregressive models."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.attention.policy import Policy, Site
from kernels import attention
from kernels.attention import BlockMask
from papers.sparsed.method import blocks_kept

if TYPE_CHECKING:
    from common.attention.meter import Meter

__all__ = ["Fixed", "sink_and_window", "window"]


class Fixed(Policy):
    """Attention by a pattern of tiles that depends on their number alone, from the first step on.

    pattern: number of blocks n -> bool [n, n].
    """

    def __init__(self, pattern: Callable[[int], Tensor], block_size: int):
        self.pattern, self.block_size = pattern, block_size

    def attend(self, query: Tensor, key: Tensor, value: Tensor, site: Site, meter: Meter) -> Tensor:
        blocks = -(-query.shape[2] // self.block_size)
        mask = BlockMask.of(self.pattern(blocks)[None, None].to(query.device))
        meter.density(mask.density())
        with meter.phase("sparse"):
            return attention.block_sparse_attention(
                query, key, value, mask, block_size=self.block_size, scale=site.scale, key_mask=site.key_mask
            )


def window(blocks: int, keep_ratio: float) -> Tensor:
    """Every block of queries keeps the `keep_ratio` of key blocks around itself; the same number at the ends."""
    return _around(blocks, 0, blocks_kept(blocks, keep_ratio))


def sink_and_window(blocks: int, keep_ratio: float, sink: float = 0.1) -> Tensor:
    """As `window`, with the first `sink` of all blocks among what is kept (StreamingLLM's attention sink).

    A block for the window always stays: without its own surroundings a token sees nothing of its sentence.
    """
    kept = blocks_kept(blocks, keep_ratio)
    return _around(blocks, min(kept - 1, blocks_kept(blocks, sink)), kept)


def _around(blocks: int, first: int, kept: int) -> Tensor:
    """The first blocks, and as many of the others, nearest to the row, as make `kept`."""
    place = torch.arange(blocks)
    distance = (place[:, None] - place).abs().masked_fill(place < first, -1)
    return distance.argsort(dim=1, stable=True).argsort(dim=1) < kept
