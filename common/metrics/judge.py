"""A classifier of our own that judges generated images: features for distances, and whether they show what was asked.

    judge = trained("judge-cifar16")
    fcd = frechet(judge.features(samples), judge.features(held_out.images))
    score = judge.content_score(samples, asked)

It learns style and content of the plain images and of all styles at once, so that both are seen by its features.
`FCD-local`, the Fréchet distance of them, is not standard FID; not comparable with published values. `about()` says so,
with the hash of the network that was used; print it beside every table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from common import seeds
from common.data import captioned, shapes
from common.data.captioned import Captioned
from common.data.images import crop_and_flip, shuffled_batches
from common.data.styles import STYLES, stylised
from common.models.resnet_cifar import ResNetCifar
from common.training.checkpoints import checkpoint
from common.training.supervised import Schedule, fit, no_bar

__all__ = ["LOOKS", "NOTE", "RECIPES", "Judge", "Recipe", "train", "trained"]

NOTE = "not standard FID; not comparable with published values"
LOOKS = ("", *STYLES)  # what a judge tells apart besides content; "" is plain
WIDTH = 16  # of the ResNet: four times as many features, so that a thousand images are enough for a covariance
BATCH = 256  # images at a time, in use
MOVED = 1  # pixels an image is moved by at most, in training
DECAY, CLIP = 0.05, 1.0


@dataclass(frozen=True)
class Recipe:
    """A judge and its training.

    data    `cifar10` (the training split) or `shapes` (`count` generated images)
    depth   of the ResNet, 6n + 2
    rate    peak learning rate of AdamW: warm-up over a twentieth of the steps, then a cosine to zero
    """

    data: Literal["cifar10", "shapes"]
    depth: int
    steps: int
    batch: int
    rate: float = 3e-3
    count: int = 0
    seed: int = 0


RECIPES = {
    "judge-cifar16": Recipe("cifar10", depth=14, steps=3000, batch=128),
    "judge-shapes": Recipe("shapes", depth=8, steps=450, batch=64, rate=6e-3, count=2000),
}


class Judge(nn.Module):
    """Names the style and each attribute of images [N, 3, H, W] in -1..1; in evaluation mode without gradients.

    sha256  of the file of its weights, "" where there is none
    """

    def __init__(self, attributes: Mapping[str, tuple[str, ...]], *, depth: int, sha256: str = ""):
        super().__init__()
        self.attributes, self.sha256 = dict(attributes), sha256
        self.sizes = [len(LOOKS), *map(len, attributes.values())]
        self.network = ResNetCifar(width=WIDTH, depth=depth, classes=sum(self.sizes))
        self.eval()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Logits of the style [N, 6] and of each attribute's words, with gradients."""
        return list(self.network(images).split(self.sizes, dim=1))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """[N, 64] of the last layer but one."""
        self._check(images)
        return torch.cat([self.network.features(part) for part in images.split(BATCH)])

    def content_score(self, images: Tensor, content: Tensor) -> float:
        """Share 0..1 of the attributes that are seen as asked; content int64 [N, A] as in `Captioned`.

        Its scale is what the judge says of real images, so report that beside it. Raises ValueError for other shapes.
        """
        if content.shape != (len(images), len(self.attributes)):
            raise ValueError(
                f"content_score: got content {list(content.shape)} for {len(images)} images; expected "
                f"{[len(images), len(self.attributes)]}: {', '.join(self.attributes)}"
            )
        return float((self._named(images)[:, 1:] == content.to(images.device)).float().mean())

    def style_score(self, images: Tensor, style: str) -> float:
        """Share 0..1 of the images that are seen to be in that style ("" for plain)."""
        if style not in LOOKS:
            raise ValueError(f"style_score: got style {style!r}; expected one of {', '.join(STYLES)}, or '' for plain")
        return float((self._named(images)[:, 0] == LOOKS.index(style)).float().mean())

    def about(self) -> str:
        """The sentence that belongs beside every FCD-local."""
        return f"FCD-local, features of the classifier {self.sha256[:12] or 'without a file'}: {NOTE}."

    @torch.no_grad()
    def _named(self, images: Tensor) -> Tensor:
        self._check(images)
        found = [torch.stack([x.argmax(1) for x in self(part)], dim=1) for part in images.split(BATCH)]
        return torch.cat(found)

    def _check(self, images: Tensor) -> None:
        if self.training:
            raise RuntimeError("Judge: it is in training mode, where a verdict depends on its neighbours; call .eval()")
        if images.ndim != 4 or images.shape[1] != 3 or not len(images):
            raise ValueError(f"Judge: got images {list(images.shape)}; expected [N, 3, H, W] in -1..1 with N >= 1")


def trained(name: str, *, retrain: bool = False, progress: Callable = no_bar) -> Judge:
    """The judge of this name in `RECIPES`, read from `checkpoints/` or trained and kept there."""
    recipe = RECIPES[name]
    settings = {**asdict(recipe), "styles": LOOKS, "width": WIDTH, "moved": MOVED}

    def make(keep: Path) -> dict[str, Tensor]:
        return train(recipe, progress=progress, keep=keep).state_dict()

    found = checkpoint(name, settings, make, retrain=retrain)
    attributes = captioned.CLASS if recipe.data == "cifar10" else captioned.SHAPES
    judge = Judge(attributes, depth=recipe.depth, sha256=found.sha256)
    judge.load_state_dict(found.state)
    return judge.eval()


@seeds.one_thread()
def train(recipe: Recipe, *, progress: Callable = no_bar, keep: Path | None = None) -> Judge:
    """Train a judge on plain and stylised images, each drawn in any style; see `fit` for `keep`."""
    if recipe.data == "cifar10":
        data = captioned.cifar10("train")
    else:
        data = shapes.shapes(recipe.count, seed=seeds.derived(recipe.seed, "judge"))
    with seeds.isolated(f"judge {recipe.seed}"):
        judge = Judge(data.attributes, depth=recipe.depth)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=recipe.rate, weight_decay=DECAY)
    schedule = Schedule(recipe.steps, recipe.steps // 20)
    batches = _batches(data, recipe, seeds.generator(recipe.seed, "judge"))
    fit(judge, batches, _loss, optimizer, schedule, clip=CLIP, progress=progress, keep=keep)
    return judge.eval()


def _batches(data: Captioned, recipe: Recipe, draw: Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, [style, content ...] int64 [B, 1 + A]): moved and mirrored first, so that textures keep their place."""
    for index in shuffled_batches(len(data), recipe.batch, recipe.steps, draw):
        look = torch.randint(len(LOOKS), (recipe.batch,), generator=draw)
        images = crop_and_flip(data.images[index], draw, padding=MOVED)
        for number, style in enumerate(LOOKS):
            if style:
                images[look == number] = stylised(images[look == number], style)
        yield images, torch.cat([look[:, None], data.content[index]], dim=1)


def _loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Sum of the cross-entropies of style and attributes, in nats."""
    images, labels = batch
    logits = network(images)
    return torch.stack([F.cross_entropy(x, y) for x, y in zip(logits, labels.unbind(1), strict=True)]).sum()
