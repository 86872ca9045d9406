"""Generated images with captions, for runs without data: a coloured shape on a dark ground, "large red circle".

Size, colour and shape are what a caption says; place, ground, and the exact size and colour vary from image to image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common import seeds
from common.data.captioned import SHAPES, SIZE, Captioned

__all__ = ["shapes"]

RADIUS = {"small": 3.2, "large": 5.6}  # of SIZE / 2, half the width of a shape
COLOURS = {"red": (0.95, 0.22, 0.2), "green": (0.2, 0.85, 0.3), "blue": (0.2, 0.25, 0.95), "yellow": (0.98, 0.9, 0.2)}
GROUND = (0.02, 0.16)  # grey values 0..1, darker than every colour: a style that keeps brightness alone keeps the shape
ARM = 0.34  # half the width of a cross's arm, as a share of its radius


def shapes(count: int, *, seed: int) -> Captioned:
    """`count` images [count, 3, 16, 16] with all attributes drawn evenly; the same for the same seed.

    Raises ValueError for a negative count.
    """
    if count < 0:
        raise ValueError(f"shapes: got count={count}; expected 0 or more")
    draw = seeds.generator(seed, "shapes")
    content = torch.stack([torch.randint(len(words), (count,), generator=draw) for words in SHAPES.values()], dim=1)
    size, colour, shape = content.unbind(1)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=draw)

    radius = torch.tensor(list(RADIUS.values()))[size] * uniform(0.92, 1.08)
    free = (SIZE / 2 - 1 - radius)[:, None]  # so that a shape stays inside
    middle = free * uniform(-1, 1, 2)
    paint = (torch.tensor(list(COLOURS.values()))[colour] + uniform(-0.08, 0.08, 3)).clamp(0, 1)[..., None, None]
    slope = uniform(-0.06, 0.06)[:, None, None]
    axis = torch.arange(SIZE) - (SIZE - 1) / 2
    ground = (uniform(*GROUND)[:, None, None] + slope * axis[:, None] / (SIZE / 2)).expand(-1, SIZE, SIZE)
    x = (axis - middle[:, :1])[:, None, :]
    y = (middle[:, 1:] - axis)[:, :, None]  # up
    inside = (0.5 - _distance(x, y, radius[:, None, None], shape)).clamp(0, 1)[:, None]
    image = torch.lerp(ground[:, None].expand(-1, 3, -1, -1), paint.expand(-1, -1, SIZE, SIZE), inside)
    return Captioned(f"shapes-{seed}", 2 * image.clamp(0, 1) - 1, content, SHAPES)


def _distance(x: Tensor, y: Tensor, radius: Tensor, shape: Tensor) -> Tensor:
    """Pixels [N, H, W] to the outline of each image's shape, negative inside; x, y from its middle, broadcast."""
    across, along = x.abs(), y.abs()
    wide, narrow = torch.maximum(across, along), torch.minimum(across, along)
    outlines = {
        "circle": torch.hypot(x, y) - radius,
        "square": wide - 0.88 * radius,
        "triangle": torch.maximum(0.894 * across + 0.447 * (y - radius), -y - 0.8 * radius),  # sides 1 : 2
        "cross": torch.maximum(narrow - ARM * radius, wide - radius),
    }
    every = torch.stack(torch.broadcast_tensors(*(outlines[word] for word in SHAPES["shape"])))
    return every[shape, torch.arange(len(shape))]
