"""Pictures of a known quality, for sabotages: the truth plus so much noise, and a perceptual metric that sees it."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from common.metrics.perceptual import Lpips


def bad(picture: Tensor, left: float, seed: int) -> Tensor:
    """The picture plus a share of noise, a little different for each seed."""
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(seed))
    return (picture + (left + 0.005 * seed) * 0.3 * noise).clamp(0, 1)


@cache
def random_lpips() -> Lpips:
    """LPIPS's formula with random weights: it still grows with the noise."""
    import torchvision

    torch.manual_seed(0)
    features = torchvision.models.alexnet(weights=None).features
    heads = [torch.rand(1, channels, 1, 1) for channels in (64, 192, 384, 256, 256)]
    return Lpips("alex", features, heads)
