"""Which tiles of an attention matrix are kept: a bit each in memory, lists of columns for the kernels.

dense    bool [B, H, nq, nk]            what people write and look at
bits     uint8 [B, H, nq, ceil(nk/8)]   what is stored: 0.6 GB for all layers and heads of a video of 119,056 tokens,
                                        where the lists of a density of 0.2 take 2 GB
lists    starts int32 [B H nq + 1], columns uint16 [kept]: those of row r are columns[starts[r] : starts[r + 1]],
                                        ascending; what a kernel walks along
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["BlockMask", "Lists"]

MOST_COLUMNS = 1 << 16  # a column is 16 bits


class Lists(NamedTuple):
    """Kept columns by row: `starts` int32 [rows + 1], `columns` uint16 [kept], ascending within a row."""

    starts: Tensor
    columns: Tensor


@dataclass(frozen=True, eq=False)
class BlockMask:
    """A compact mask [B, H, nq, nk] over tiles. B and H may be 1 and then serve every batch entry or head.

    Made by `BlockMask.of(mask)`; `|` and `&` combine masks of one shape.
    """

    bits: Tensor
    shape: tuple[int, int, int, int]

    @staticmethod
    def of(mask: Tensor) -> BlockMask:
        """Of a bool mask [B, H, nq, nk]. Raises TypeError for another dtype, ValueError for another rank or more
        than 65,536 key blocks."""
        if mask.dtype != torch.bool:
            raise TypeError(
                f"block mask: got dtype {mask.dtype}; expected bool, True for the tiles to keep; compare first"
            )
        if mask.ndim != 4 or mask.shape[-1] > MOST_COLUMNS:
            raise ValueError(
                f"block mask: got shape {list(mask.shape)}; expected [batch or 1, heads or 1, query blocks, key "
                f"blocks] with at most {MOST_COLUMNS} key blocks"
            )
        padded = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
        weights = 1 << torch.arange(8, device=mask.device, dtype=torch.uint8)
        batch, heads, rows, columns = mask.shape
        return BlockMask((padded * weights).sum(-1, dtype=torch.uint8), (batch, heads, rows, columns))

    def dense(self) -> Tensor:
        """bool [B, H, nq, nk]."""
        places = torch.arange(8, device=self.bits.device, dtype=torch.uint8)
        return ((self.bits[..., None] >> places) & 1).bool().flatten(-2)[..., : self.shape[-1]]

    def lists(self) -> Lists:
        """The kept columns of every row; found once and then remembered."""
        found = self.__dict__.get("_lists")  # frozen says nothing of what is remembered
        if found is None:
            dense = self.dense().flatten(0, 2)
            starts = torch.zeros(len(dense) + 1, dtype=torch.int32, device=dense.device)
            torch.cumsum(dense.sum(-1), 0, out=starts[1:])
            found = Lists(starts, dense.nonzero()[:, 1].to(torch.uint16))
            object.__setattr__(self, "_lists", found)
        return found

    def density(self) -> Tensor:
        """Share of tiles kept, float32 [B, H]; every tile counts the same, a ragged one too."""
        return self.dense().float().mean((-2, -1))

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask there."""
        return self if self.bits.device == torch.device(device) else BlockMask(self.bits.to(device), self.shape)

    def __or__(self, other: BlockMask) -> BlockMask:
        return BlockMask(self.bits | self._fitting(other).bits, self.shape)

    def __and__(self, other: BlockMask) -> BlockMask:
        return BlockMask(self.bits & self._fitting(other).bits, self.shape)

    def _fitting(self, other: BlockMask) -> BlockMask:
        if self.shape != other.shape:
            raise ValueError(
                f"block masks of shapes {list(self.shape)} and {list(other.shape)}; expected the same shape"
            )
        return other
