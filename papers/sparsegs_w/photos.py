"""Photographs by strangers, made from clean views: other light and cameras, people in front, and masks that miss.

Everything is drawn at random by a generator; the clean view stays known, so that what is left of the people and of the
light can be measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

COUNT = (2, 3)  # people in a photograph, fewest and most
HEIGHT = (0.45, 0.8)  # of a person, as a share of the image's
TOUCHED = 0.05  # a pixel belongs to a person from this opacity on
# of detected masks: how often the legs of a person are missed, how ragged the outlines are, radius of a false patch
MISSED, LEGS, RAGGED, FALSE_PATCH = 0.25, 0.3, 0.35, 0.06
# of light and cameras: spread of the logarithms of brightness, of each channel's factor and of gamma; of the offset
BRIGHTNESS, TINT, GAMMA, OFFSET = 0.3, 0.12, 0.25, 0.05


@dataclass(frozen=True, eq=False)
class Light:
    """What another light and another camera make of a picture: clip(gain * image^gamma + offset), each [3]."""

    gain: Tensor
    gamma: Tensor
    offset: Tensor

    def __call__(self, image: Tensor) -> Tensor:
        """image [..., 3] in 0..1 -> the same shape and range."""
        return (self.gain * image.clamp(0, 1) ** self.gamma + self.offset).clamp(0, 1)


NEUTRAL = Light(torch.ones(3), torch.ones(3), torch.zeros(3))


@dataclass(frozen=True, eq=False)
class Person:
    """Somebody in front: opacity [H, W] in 0..1 and colours [H, W, 3]."""

    alpha: Tensor
    color: Tensor


def light(draw: torch.Generator) -> Light:
    """Another light: brightness, a tint, contrast and haze."""
    brightness, *rest = (2 * torch.rand(8, generator=draw) - 1).tolist()
    tint, offset = (torch.tensor(rest[at : at + 3]) for at in (0, 3))
    gamma = torch.full((3,), math.exp(GAMMA * rest[6]))
    return Light(torch.exp(BRIGHTNESS * brightness + TINT * tint), gamma, OFFSET * offset)


def people(height: int, width: int, draw: torch.Generator) -> list[Person]:
    """Two or three people standing before the camera, their feet near the image's lower border."""
    count = int(torch.randint(COUNT[0], COUNT[1] + 1, (1,), generator=draw))
    return [_person(height, width, draw) for _ in range(count)]


def photographed(image: Tensor, crowd: Sequence[Person], seen_in: Light) -> Tensor:
    """[H, W, 3]: the people pasted in front of the image, both in that light."""
    for person in crowd:
        image = torch.lerp(image, person.color, person.alpha[..., None])
    return seen_in(image)


def covered(crowd: Sequence[Person], height: int, width: int) -> Tensor:
    """[H, W] bool: every pixel that a person touches."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    for person in crowd:
        mask |= person.alpha > TOUCHED
    return mask


def detected(crowd: Sequence[Person], height: int, width: int, draw: torch.Generator) -> Tensor:
    """[H, W] bool: the people as a segmentation network would find them.

    The legs of some are missed, outlines are ragged by a pixel or two, and something that is no person is taken for
    one. The mask is grown by a pixel, as one does.
    """
    found = torch.zeros(height, width)
    for person in crowd:
        alpha = person.alpha.clone()
        if float(torch.rand((), generator=draw)) < MISSED:
            rows = (alpha > TOUCHED).any(dim=1).nonzero()
            first, last = int(rows[0]), int(rows[-1])
            alpha[round(last - LEGS * (last - first)) :] = 0
        found = torch.maximum(found, alpha)
    soft = F.avg_pool2d(found[None, None], 5, 1, 2, count_include_pad=False)[0, 0]
    ragged = RAGGED * smooth_field((height, width), draw, knots=9).clamp(-1.2, 1.2)  # too little to open holes inside
    mask = soft + ragged * (soft > 0.02) > 0.5
    row, column = torch.rand(2, generator=draw).tolist()
    rows, columns = _grid(height, width)
    mask |= (rows - row * height).square() + (columns - column * width).square() < (FALSE_PATCH * width) ** 2
    return F.max_pool2d(mask.float()[None, None], 3, 1, 1)[0, 0] > 0.5


def overlap(found: Tensor, truth: Tensor) -> dict[str, float]:
    """Of masks [...] bool: `iou`, intersection over union, and `recall`, the share of the truth that was found."""
    both = float((found & truth).sum())
    return {"iou": both / max(1.0, float((found | truth).sum())), "recall": both / max(1.0, float(truth.sum()))}


def smooth_field(shape: tuple[int, int], draw: torch.Generator, *, knots: int = 5) -> Tensor:
    """[H, W] a smooth random field of mean square about 1."""
    coarse = torch.randn(1, 1, knots, knots, generator=draw)
    values = F.interpolate(coarse, size=shape, mode="bicubic", align_corners=True)[0, 0]
    return values / values.square().mean().sqrt()


def _person(height: int, width: int, draw: torch.Generator) -> Person:
    size, across, feet, period, *shades = torch.rand(14, generator=draw).tolist()
    tall = height * (HEIGHT[0] + (HEIGHT[1] - HEIGHT[0]) * size)
    middle, ground = width * (0.08 + 0.84 * across), height * (0.95 + 0.12 * feet)
    rows, columns = _grid(height, width)

    def ellipse(up: float, half_high: float, half_wide: float) -> Tensor:
        y, x = (rows - (ground - up * tall)) / (half_high * tall), (columns - middle) / (half_wide * tall)
        return (0.5 + (1 - (x.square() + y.square()).sqrt()) * half_wide * tall).clamp(0, 1)  # soft over a pixel

    legs, body, head = ellipse(0.25, 0.3, 0.11), ellipse(0.62, 0.24, 0.16), ellipse(0.92, 0.085, 0.075)
    coat, stripe, trousers = (torch.tensor(shades[at : at + 3]) for at in (0, 3, 6))
    wave = 0.5 + 0.5 * torch.sin(rows * 2 * math.pi / (3 + 5 * period))[..., None]
    color = torch.lerp(coat, stripe, 0.6 * wave).expand(height, width, 3)
    color = torch.where((rows > ground - 0.42 * tall)[..., None], 0.7 * trousers, color)
    skin = torch.tensor([0.85, 0.65, 0.5]) * (0.4 + 0.6 * shades[9])
    color = torch.where((rows < ground - 0.83 * tall)[..., None], skin, color)
    return Person(torch.stack([legs, body, head]).amax(dim=0), color)


def _grid(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the pixel centres, [H, W] each."""
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return rows, columns
