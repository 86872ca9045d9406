"""Pairs of a bad and a good picture: what a repair model learns from, and what it is measured by."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Pairs", "crop", "held_out_error"]

Pairs = Sequence[tuple[Tensor, Tensor]]  # bad and good pictures [3, H, W], 0..1


def crop(pairs: Pairs, draw: torch.Generator, *, count: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    """`count` random square crops, half of them mirrored: bad and good [B, 3, size, size] in -1..1.

    Smaller pictures give crops as large as their shorter side. Raises RuntimeError for no pairs.
    """
    found = []
    for number in torch.randint(len(pairs), (count,), generator=draw, device=draw.device).tolist():
        both = torch.stack(list(pairs[number]))  # [2, 3, H, W]
        row, column, mirror = torch.rand(3, generator=draw, device=draw.device).tolist()
        side = min(size, *both.shape[-2:])
        top, left = int(row * (both.shape[-2] - side + 1)), int(column * (both.shape[-1] - side + 1))
        part = both[..., top : top + side, left : left + side]
        found.append(part.flip(-1) if mirror < 0.5 else part)
    bad, good = (2 * torch.stack(found).to(device) - 1).unbind(dim=1)
    return bad, good


def held_out_error(repair: Callable[[Tensor], Tensor], pairs: Pairs) -> dict[str, float]:
    """Mean squared error of pictures nobody trained on, `before` and `after`: how much a model repairs.

    repair  bad pictures [V, H, W, 3] in 0..1 -> repaired ones
    pairs   of one size
    """
    bad, good = (torch.stack([pair[side] for pair in pairs]).movedim(1, -1) for side in (0, 1))
    repaired = repair(bad).to(good)
    return {"before": float(F.mse_loss(bad, good)), "after": float(F.mse_loss(repaired, good))}
