"""The project's own base models that draw captions: pre-trained on plain images, to be fine-tuned to styles.

    model, found = trained("diffusion-cifar16-unet")           # found.sha256: what a result was measured on
    model, found = trained("diffusion-cifar16-unet", retrain=True, progress=tqdm)

A training that is interrupted goes on where it was. From a shell, with a bar:

    python -c "from tqdm import tqdm; from common.training import text_to_image as t; \\
               t.trained('diffusion-cifar16-unet', progress=tqdm)"
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from common import seeds
from common.data import captioned, shapes
from common.data.captioned import NOTHING, VOCABULARY, Captioned
from common.models import diffusion
from common.models.text_to_image import Kind, TextToImage, noise_loss
from common.training.checkpoints import Checkpoint, checkpoint

__all__ = ["RECIPES", "Recipe", "build", "data_of", "train", "trained"]


@dataclass(frozen=True)
class Recipe:
    """A base model and its training by AdamW at a constant rate; the weights kept are a running mean.

    data          `cifar10` (12,000 images, mirrored at random) or `shapes` (`count` generated images)
    kind, width, depth   of the TextToImage
    ema           decay of the running mean
    drop          share of captions that are left out, for guidance
    seed          of the initial weights, the words' vectors, and all that is drawn
    """

    data: Literal["cifar10", "shapes"]
    kind: Kind
    width: int
    depth: int
    steps: int
    batch: int = 32
    rate: float = 1e-3
    ema: float = 0.999
    drop: float = 0.1
    count: int = 0
    seed: int = 0


# those of shapes take seconds and draw blobs in the right colours
RECIPES = {
    "diffusion-cifar16-unet": Recipe("cifar10", "unet", width=32, depth=3, steps=7_000),
    "diffusion-cifar16-dit": Recipe("cifar10", "dit", width=128, depth=6, steps=8_000),
    "diffusion-shapes-unet": Recipe(
        "shapes", "unet", width=16, depth=2, steps=300, batch=16, rate=3e-3, ema=0.98, count=2000
    ),
    "diffusion-shapes-dit": Recipe(
        "shapes", "dit", width=64, depth=3, steps=300, batch=16, rate=3e-3, ema=0.98, count=2000
    ),
}


def build(recipe: Recipe, state: dict[str, Tensor] | None = None) -> TextToImage:
    """The model with `state`, or fresh from torch's global generator."""
    model = TextToImage(recipe.kind, width=recipe.width, depth=recipe.depth, seed=recipe.seed)
    if state is not None:
        model.load_state_dict(state)
    return model.eval()


def data_of(recipe: Recipe) -> Captioned:
    """The plain images that a base model sees. Raises as `data.path` where CIFAR-10 is not to be had."""
    if recipe.data == "cifar10":
        return captioned.cifar10("train")
    return shapes.shapes(recipe.count, seed=seeds.derived(recipe.seed, "base"))


def trained(
    name: str, *, retrain: bool = False, progress: Callable[..., Any] | None = None
) -> tuple[TextToImage, Checkpoint]:
    """The base model of this name in `RECIPES`, read from `checkpoints/` or trained and kept there.

    progress  (iterable, description) draws a bar, as tqdm and `Record.progress` do
    """
    recipe = RECIPES[name]
    settings = {**asdict(recipe), "words": VOCABULARY}
    found = checkpoint(
        name, settings, lambda keep: train(recipe, progress=progress, keep=keep).network.state_dict(), retrain=retrain
    )
    return build(recipe, found.state), found


@seeds.one_thread()
def train(recipe: Recipe, *, progress: Callable[..., Any] | None = None, keep: Path | None = None) -> diffusion.Trained:
    """Pre-train a base model on plain images with plain captions; `keep` as the checkpoint of `diffusion.train`."""
    data = data_of(recipe)
    with seeds.isolated(f"text to image {recipe.seed}"):
        model = build(recipe)
    text, nothing = model.encode_text(data.captions), model.encode_text([NOTHING])

    def loss(network: nn.Module, generator: Generator) -> Tensor:
        chosen = torch.randint(len(data), (recipe.batch,), generator=generator)
        mirrored = torch.rand(recipe.batch, 1, 1, 1, generator=generator) < 0.5
        images = data.images[chosen]
        images = torch.where(mirrored, images.flip(-1), images)
        return noise_loss(network, images, text[chosen], nothing, generator, drop=recipe.drop)  # type: ignore[arg-type]

    return diffusion.train(
        model,
        loss,
        steps=recipe.steps,
        learning_rate=recipe.rate,
        seed=seeds.derived(recipe.seed, "text to image"),
        ema=recipe.ema,
        checkpoint=keep,
        progress=progress,
    )
