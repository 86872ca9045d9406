"""The two tasks: classify images, continue a text. A task makes networks, batches and a score; `fit` needs no more.

task = image_task(params);  network = task.network();  loss = task.loss(network, batch);  task.score(network)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import data as datasets
from common import files, seeds
from common.data import images, text
from common.models.gpt import GPT, next_token_loss, perplexity
from common.models.vit import ViT
from common.training import accuracy
from papers.progressive_gradient_flow.settings import Params

MARKOV_TOKENS = 20_000
EVALUATION_BATCH = 500
LOADERS = 14  # processes that read ImageNet


class Task(ABC):
    """`sparse`: glob patterns of the layers that become sparse; `metric`: the name of the score."""

    sparse: tuple[str, ...]
    metric: str
    params: Params
    learning_rate: float

    @abstractmethod
    def network(self) -> nn.Module:
        """A fresh network from torch's global generator, on the CPU."""

    @abstractmethod
    def batches(self, seed: int, steps: int) -> Iterator[Any]:
        """Training batches, the same for every arm of a seed."""

    @abstractmethod
    def loss(self, network: nn.Module, batch: Any) -> Tensor:
        """The training loss of a batch: scalar."""

    @abstractmethod
    def score(self, network: nn.Module) -> float:
        """On data that no training saw."""

    @abstractmethod
    def example(self) -> Tensor:
        """The network's input for one image or one window, [1, ...]."""

    @abstractmethod
    def provenance(self) -> tuple[str, dict[str, str] | str]:
        """The data's registered name, and its hashes."""


class SmallImages(Task):
    """Digits or CIFAR-10 in memory, by the tiny vision transformer; top-1 accuracy on the test split, in percent.

    No augmentation: trainings are too short to see an image often.
    """

    sparse = ("*.feed_forward.*",)
    metric = "top1"

    def __init__(self, params: Params):
        self.params, self.learning_rate = params, params.learning_rate
        load = images.digits if params.dataset == "digits" else images.cifar10
        self.train, self.test = load("train"), load("test")
        self.scale = images.Standardiser(self.train)

    def network(self) -> nn.Module:
        _, channels, size, _ = self.train.pixels.shape
        p = self.params
        shape = {"size": size, "patch": p.patch, "width": p.width, "depth": p.depth, "heads": p.heads}
        return ViT(**shape, channels=channels, classes=len(self.train.classes))

    def batches(self, seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        draw = seeds.generator(seed, "batches")
        for chosen in images.shuffled_batches(len(self.train), self.params.batch, steps, draw):
            yield self.scale(self.train.pixels[chosen]), self.train.labels[chosen]

    def loss(self, network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, labels = (part.to(self.params.device) for part in batch)
        return F.cross_entropy(network(x), labels)

    def score(self, network: nn.Module) -> float:
        parts = zip(self.test.pixels.split(EVALUATION_BATCH), self.test.labels.split(EVALUATION_BATCH), strict=True)
        return accuracy(network, ((self.scale(pixels), labels) for pixels, labels in parts))

    def example(self) -> Tensor:
        return self.scale(self.train.pixels[:1])

    def provenance(self) -> tuple[str, dict[str, str] | str]:
        if self.params.dataset == "digits":
            return "digits", "scikit-learn"
        folder = datasets.path(images.CIFAR10)
        return images.CIFAR10, {path.name: files.sha256(path) for path in sorted(folder.glob("*.npz"))}


class ImageNet(Task):
    """ImageNet by torchvision's ViT-B/16, trained as the authors configured it: RandAugment, mixup, a binary loss."""

    sparse = ("*.mlp.*",)
    metric = "top1"

    def __init__(self, params: Params):
        from torchvision.transforms import RandAugment

        self.params, self.learning_rate = params, params.learning_rate
        self.train = images.image_folder(params.data_dir, "train")
        self.test = images.image_folder(params.data_dir, "val")
        # crop and mirror, then two operations of strength 15 of 31, then to tensors
        self.train.transform.transforms.insert(2, RandAugment(num_ops=2, magnitude=15))

    def network(self) -> nn.Module:
        from torchvision.models import vit_b_16

        return vit_b_16(dropout=0.1, num_classes=len(self.train.classes))

    def batches(self, seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        draw, mixing = seeds.generator(seed, "batches"), np.random.default_rng(seeds.derived(seed, "mixup"))
        passed = 0
        while passed < steps:
            for x, labels in self._loader(self.train, generator=draw, shuffle=True, drop_last=True):
                yield _mixed(x, F.one_hot(labels, len(self.train.classes)).float(), self.params.mixup, mixing)
                passed += 1
                if passed == steps:
                    return

    def loss(self, network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, target = (part.to(self.params.device, non_blocking=True) for part in batch)
        with torch.autocast(self.params.device, torch.bfloat16):
            logits = network(x)
        return F.binary_cross_entropy_with_logits(logits.float(), target)

    def score(self, network: nn.Module) -> float:
        return accuracy(network, self._loader(self.test))

    def example(self) -> Tensor:
        return self.test[0][0][None]

    def provenance(self) -> tuple[str, str]:
        return "imagenet", files.digest(f"{path}/{label}" for path, label in self.test.samples)

    def _loader(self, dataset: Any, **options: Any) -> torch.utils.data.DataLoader:
        p = self.params
        batch = min(p.batch, len(dataset))
        loaders = LOADERS if p.device == "cuda" else 0
        return torch.utils.data.DataLoader(
            dataset, batch, num_workers=loaders, pin_memory=p.device == "cuda", **options
        )


class Text(Task):
    """A text by characters and the tiny GPT; perplexity a character of the test split."""

    sparse = ("*.feed_forward.*",)
    metric = "perplexity"

    def __init__(self, params: Params):
        self.params, self.learning_rate = params, params.text_learning_rate
        self.corpus = text.shakespeare() if params.text == "shakespeare" else text.markov(MARKOV_TOKENS)

    def network(self) -> nn.Module:
        p = self.params
        shape = {"context": p.context, "width": p.width, "depth": p.depth, "heads": p.heads}
        return GPT(vocabulary=len(self.corpus.vocabulary), **shape)

    def batches(self, seed: int, steps: int) -> Iterator[Tensor]:
        p, draw = self.params, seeds.generator(seed, "windows")
        windows = max(1, p.batch // 4)  # as many tokens as a batch of images of 16 patches has at a context of 64
        return text.random_windows(self.corpus.train, length=p.context + 1, batch=windows, steps=steps, generator=draw)

    def loss(self, network: nn.Module, batch: Tensor) -> Tensor:
        return next_token_loss(network, batch.to(self.params.device))

    def score(self, network: nn.Module) -> float:
        return perplexity(network, self.corpus.test, context=self.params.context)

    def example(self) -> Tensor:
        return self.corpus.train[None, : self.params.context]

    def provenance(self) -> tuple[str, dict[str, str] | str]:
        if self.params.text == "markov":
            return "markov", files.digest(map(str, self.corpus.train.tolist()))
        path = datasets.path(text.SHAKESPEARE) / "input.txt"
        return text.SHAKESPEARE, {path.name: files.sha256(path)}


def image_task(params: Params) -> Task:
    """The image task of the run."""
    return ImageNet(params) if params.dataset == "imagenet" else SmallImages(params)


def task_of(params: Params, name: str) -> Task:
    """`images` or `text`."""
    return image_task(params) if name == "images" else Text(params)


def _mixed(x: Tensor, target: Tensor, alpha: float, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2018): each batch with its own reverse, at a share drawn from Beta(alpha, alpha)."""
    if not alpha:
        return x, target
    share = generator.beta(alpha, alpha)
    return share * x + (1 - share) * x.flip(0), share * target + (1 - share) * target.flip(0)
