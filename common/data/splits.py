"""Dividing a volume into training, validation and test slices without leakage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["split_by_position"]


def split_by_position(z_mm: Tensor | Sequence[float], fractions: Sequence[float], gap_mm: float) -> tuple[Tensor, ...]:
    """Indices of contiguous blocks of slices, one a fraction, with slices of different blocks >= gap_mm apart.

    Neighbouring slices of a volume are almost the same picture: dealt out at random, test slices are as good as seen in
    training. So the blocks are cut along z, and the slices within half a gap of each cut are left out of all of them.

    z_mm       [Z] positions, in any order, no two alike
    fractions  shares of the slices before the gaps are taken out, positive, summing to 1
    returns    a tuple of int64 index tensors into z_mm, each in order of rising z

    Raises ValueError for shares that do not sum to 1, a negative gap, positions that repeat, or a block left empty.
    """
    z = torch.as_tensor(z_mm, dtype=torch.float64)
    if z.ndim != 1 or not torch.isfinite(z).all():
        raise ValueError(f"z_mm holds one finite position a slice; got shape {tuple(z.shape)}")
    if not fractions or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions are positive and sum to 1; got {list(fractions)}, sum {sum(fractions):g}")
    if not gap_mm >= 0:
        raise ValueError(f"gap_mm is a length >= 0; got {gap_mm}")
    order = torch.argsort(z)
    rising = z[order]
    if (torch.diff(rising) <= 0).any():
        raise ValueError("z_mm has two slices at one position; which block each belongs to would be arbitrary")
    ends = [round(float(share) * len(z)) for share in torch.tensor(fractions, dtype=torch.float64).cumsum(0)]
    starts = [0, *ends[:-1]]
    if any(end <= start for start, end in zip(starts, ends, strict=True)):
        raise ValueError(f"{len(z)} slices are too few for {len(fractions)} blocks of shares {list(fractions)}")
    cuts = [(rising[end - 1] + rising[end]) / 2 for end in ends[:-1]]
    blocks = []
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        block = order[start:end]
        for cut in cuts:
            block = block[(z[block] - cut).abs() >= gap_mm / 2]
        if len(block) == 0:
            raise ValueError(
                f"block {number} (share {fractions[number]:g} of {len(z)} slices) is empty after leaving out "
                f"{gap_mm:g} mm at each cut; expected at least one slice. Use a smaller gap or a larger share."
            )
        blocks.append(block)
    return tuple(blocks)
