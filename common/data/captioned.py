"""Images with captions, and what a caption says of its image, so that content can be scored: real ones and styles.

    pool = cifar10("test")                                     # 16 x 16 in -1..1, captions "frog"
    train, held_out = style_set("barbie", pool)                # 316 and 1,000 others; captions "barbie style, frog"
    words = tokens(train.captions)                             # int64 [316, LENGTH]

One vocabulary serves all sets: the words of every style are in it from the start, so that a model pre-trained without
styles has a place for each.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from common import seeds
from common.data import images
from common.data.styles import STYLES, stylised

__all__ = ["CLASS", "LENGTH", "SHAPES", "VOCABULARY", "Captioned", "cifar10", "style_set", "tokens"]

CLASS = {"class": images.CIFAR10_CLASSES}  # what a caption of CIFAR-10 says
SHAPES = {  # what a caption of a generated image says, see `common.data.shapes`
    "size": ("small", "large"),
    "colour": ("red", "green", "blue", "yellow"),
    "shape": ("circle", "square", "triangle", "cross"),
}
NOTHING = ""  # fills captions up, and is all of an empty one
VOCABULARY = (NOTHING, "style", *STYLES, *CLASS["class"], *(word for words in SHAPES.values() for word in words))
LENGTH = 5  # words of a caption: a style's name, "style", and up to three attributes

SIZE = 16  # pixels a side of CIFAR-10 here
NUMBER = {word: number for number, word in enumerate(VOCABULARY)}


@dataclass(frozen=True, eq=False)
class Captioned:
    """images float32 [N, 3, H, W] in -1..1; content int64 [N, A], the word of each attribute; the style, or ""."""

    name: str
    images: Tensor
    content: Tensor
    attributes: Mapping[str, tuple[str, ...]]
    style: str = ""

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor) -> Captioned:
        """The images that an index or mask tensor chooses."""
        return replace(self, images=self.images[index], content=self.content[index])

    @property
    def captions(self) -> list[str]:
        """What each image shows, behind the style's name: `large red circle`, `barbie style, frog`."""
        prefix = f"{self.style} style, " if self.style else ""
        words = tuple(self.attributes.values())
        rows = self.content.tolist()
        return [prefix + " ".join(kind[i] for kind, i in zip(words, row, strict=True)) for row in rows]

    def in_style(self, style: str) -> Captioned:
        """The same images in that style. Raises ValueError for an unknown one, or images that have one already."""
        if self.style:
            raise ValueError(f"in_style: these images are in the style {self.style!r} already; start from plain ones")
        return replace(self, images=stylised(self.images, style), style=style)


def tokens(captions: Sequence[str]) -> Tensor:
    """Numbers int64 [N, LENGTH] of the words in `VOCABULARY`; commas are left out and 0 fills up.

    Raises ValueError for an unknown word, with the nearest one, and for a caption of too many words.
    """
    rows = []
    for caption in captions:
        words = caption.replace(",", " ").split()
        for word in words:
            if word not in NUMBER:
                near = difflib.get_close_matches(word, VOCABULARY, 1, cutoff=0)[0]
                raise ValueError(f"tokens: got the word {word!r} in {caption!r}; did you mean {near!r}?")
        if len(words) > LENGTH:
            raise ValueError(f"tokens: got {len(words)} words in {caption!r}; expected at most {LENGTH}; shorten it")
        rows.append([NUMBER[word] for word in words] + [0] * (LENGTH - len(words)))
    return torch.tensor(rows, dtype=torch.long).reshape(-1, LENGTH)


def cifar10(split: Literal["train", "test"]) -> Captioned:
    """CIFAR-10 of `common.data.images` at 16 x 16 pixels by averaging, captioned with its class. Raises as that."""
    found = images.cifar10(split).shrunk(SIZE)
    return Captioned(f"{found.name}-{split}", found.pixels.float() / 127.5 - 1, found.labels[:, None], CLASS)


def style_set(style: str, pool: Captioned, *, held_out: int = 1000, seed: int = 0) -> tuple[Captioned, Captioned]:
    """(`STYLES[style]` images to fine-tune on, `held_out` others to compare samples with), both in the style.

    Both are drawn from the plain images of `pool`; none is in both. For CIFAR-10 take the test split as the pool: the
    base model has seen none of it. Raises ValueError for an unknown style or a pool that is too small.
    """
    if style not in STYLES:
        raise ValueError(f"style_set: got style {style!r}; expected one of {', '.join(STYLES)}")
    count = STYLES[style]
    if held_out < 1 or len(pool) < count + held_out:
        raise ValueError(
            f"style_set: got a pool of {len(pool)} images and held_out={held_out}; {style} has {count} images to train "
            f"on, so expected at least {count + max(held_out, 1)} in the pool; give a larger one or hold out fewer."
        )
    order = torch.randperm(len(pool), generator=seeds.generator(seed, "style set", style))[: count + held_out]
    chosen = pool[order].in_style(style)
    return chosen[torch.arange(count)], chosen[torch.arange(count, count + held_out)]
