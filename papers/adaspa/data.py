"""Short videos with captions: generated moving sprites, whose captions are exact, and the real clips.

A video is [3, F, H, W] in -1..1. A caption is a list of phrases, each a tuple of words; `embed` turns captions into the
text tokens that a text encoder would give.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from common import data, seeds

CLIPS = "video_clips"  # as registered
NAMES = ("cockatoo.mp4", "realshort.mp4", "viewer_garden_480p.mp4", "newtonscradle.gif")
COLORS = {
    "red": (0.9, -0.7, -0.7), "green": (-0.7, 0.8, -0.7), "blue": (-0.6, -0.5, 0.95),
    "yellow": (0.9, 0.8, -0.7), "cyan": (-0.7, 0.8, 0.9), "magenta": (0.9, -0.6, 0.9),
}  # fmt: skip
SHAPES = ("square", "disc", "triangle")
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "rest": (0, 0)}  # x, y (down)
WORDS = (*COLORS, *SHAPES, *MOTIONS, *(name.split(".")[0] for name in NAMES))

TEXT, WIDTH = 16, 64  # text tokens of a caption, padding included, and the width of each
SPEED = 1 / 20  # of the side, a frame
REAL_SIDE = 2.0  # real frames are shrunk to so many sides, and a random square is cut out

Caption = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Sprite:
    """What is drawn: radius and start (x, y) are shares of the side."""

    color: str
    shape: str
    motion: str
    radius: float
    start: tuple[float, float]


def scene(generator: Generator) -> list[Sprite]:
    """Two or three sprites of different colours; later ones pass before earlier ones."""

    def uniform() -> float:
        return torch.rand((), generator=generator).item()

    def pick(names: Sequence[str]) -> str:
        return names[int(torch.randint(len(names), (), generator=generator))]

    colors = torch.randperm(len(COLORS), generator=generator).tolist()
    count = 2 + int(uniform() < 0.5)
    return [
        Sprite(
            tuple(COLORS)[color], pick(SHAPES), pick(tuple(MOTIONS)), 0.13 + 0.06 * uniform(), (uniform(), uniform())
        )
        for color in colors[:count]
    ]


def caption(sprites: Sequence[Sprite]) -> Caption:
    """(colour, shape, motion) of each sprite."""
    return tuple((sprite.color, sprite.shape, sprite.motion) for sprite in sprites)


def render(sprites: Sequence[Sprite], background: Tensor, frames: int) -> Tensor:
    """Video [3, frames, S, S] of sprites over a background [S, S]; they bounce at the rim."""
    side = background.shape[-1]
    place = (torch.arange(side) + 0.5) / side
    video = background.expand(3, frames, side, side)
    for sprite in sprites:
        path = [_bounced(sprite, axis, frames) for axis in (0, 1)]
        x, y = place - path[0][:, None], place - path[1][:, None]  # [frames, S] from the sprite's centre
        distance = _distance(sprite.shape, x[:, None, :], y[:, :, None], sprite.radius)
        cover = (0.5 - distance * side).clamp(0, 1)  # [frames, S, S]: a soft rim of one pixel
        video = video * (1 - cover) + torch.tensor(COLORS[sprite.color])[:, None, None, None] * cover
    return video


def background(side: int, generator: Generator) -> Tensor:
    """A smooth dark texture [side, side] that stays the same in all frames."""
    coarse = torch.rand(1, 1, 5, 5, generator=generator) * 0.5 - 0.9
    return F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=True)[0, 0].clamp(-1, 1)


def sprites(frames: int, side: int, seed: int, number: int) -> tuple[Tensor, Caption]:
    """Video and caption of that number in the endless list of a seed."""
    draw = seeds.generator(seed, "sprites", number)
    found = scene(draw)
    return render(found, background(side, draw), frames), caption(found)


@cache
def clips(side: int) -> tuple[Tensor, ...]:
    """The real clips, [F, 3, h, w] in -1..1, the shorter edge `REAL_SIDE` sides long.

    Raises as `data.path` where they are neither here nor to be had.
    """
    import av

    folder = data.path(CLIPS)
    found = []
    for name in NAMES:
        with av.open(str(folder / name)) as stream:
            shown = torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in stream.decode(video=0)])
        height, width = shown.shape[1:3]
        scale = REAL_SIDE * side / min(height, width)
        size = (round(height * scale), round(width * scale))
        values = shown.movedim(-1, 1)
        found.append(torch.cat([_shrunk(part, size) for part in values.split(32)]))
    return tuple(found)


def real(frames: int, side: int, generator: Generator) -> tuple[Tensor, Caption]:
    """A random piece of a random clip, and the clip's name for a caption."""

    def below(end: int) -> int:
        return int(torch.randint(end, (), generator=generator))

    number = below(len(NAMES))
    clip = clips(side)[number]
    stride = 1 + below(max(1, min(3, (len(clip) - 1) // frames)))
    start = below(len(clip) - (frames - 1) * stride)
    top, left = below(clip.shape[-2] - side + 1), below(clip.shape[-1] - side + 1)
    piece = clip[start::stride][:frames, :, top : top + side, left : left + side]
    return piece.movedim(0, 1), ((NAMES[number].split(".")[0],),)


def batches(
    *, frames: int, side: int, batch: int, real_share: float, seed: int, first: int = 0
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless batches for training: videos [B, 3, F, S, S], text [B, TEXT, WIDTH], presence [B, TEXT]."""
    draw = seeds.generator(seed, "mixture")
    for start in itertools.count(first, batch):
        pairs = [
            real(frames, side, draw)
            if torch.rand((), generator=draw) < real_share
            else sprites(frames, side, seed, number)
            for number in range(start, start + batch)
        ]
        yield torch.stack([video for video, _ in pairs]), *embed([words for _, words in pairs])


def embed(captions: Sequence[Caption]) -> tuple[Tensor, Tensor]:
    """Text tokens [B, TEXT, WIDTH] and which of them are there, bool [B, TEXT].

    A fixed stand-in for a text encoder: each word has a random vector, and each token carries its phrase's words, so
    that a colour is tied to its shape; the transformer itself sees no order of text tokens.
    """
    text, present = torch.zeros(len(captions), TEXT, WIDTH), torch.zeros(len(captions), TEXT, dtype=torch.bool)
    table = torch.randn(len(WORDS), WIDTH, generator=seeds.generator(0, "words"))
    for row, phrases in enumerate(captions):
        place = 0
        for phrase in phrases:
            vectors = table[[WORDS.index(word) for word in phrase]]
            for vector in vectors:  # the word itself, and softly the others of its phrase
                text[row, place] = vector + 0.5 * vectors.sum(0)
                present[row, place] = True
                place += 1
    return text, present


def _bounced(sprite: Sprite, axis: int, frames: int) -> Tensor:
    """The centre's coordinate in each frame: moves evenly and is thrown back where the rim is touched."""
    room = 1 - 2 * sprite.radius
    way = sprite.start[axis] * room + MOTIONS[sprite.motion][axis] * SPEED * torch.arange(frames)
    return sprite.radius + room - (way.remainder(2 * room) - room).abs()


def _distance(shape: str, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Signed distance from the outline, negative inside, in the units of x and y."""
    if shape == "disc":
        return (x.square() + y.square()).sqrt() - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - radius * 0.9
    slope = math.sqrt(5)  # of a triangle as high as wide, tip up
    return torch.maximum(y - radius, (2 * x.abs() - y - radius) / slope)


def _shrunk(frames: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(frames.float() / 127.5 - 1, size=size, mode="area")
