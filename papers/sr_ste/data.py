"""The images of the SR-STE experiments as batches: sets in memory (digits, CIFAR-10) and ImageNet's folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from common import data as datasets
from common import seeds
from common.data import images
from papers.sr_ste.settings import Params

Split = Literal["validation", "test"]
Batch = tuple[Tensor, Tensor]  # images float32 [B, C, H, W], labels int64 [B]

SPLIT_SEED = 0  # the held-out images are the same in every training
EVALUATED_AT_ONCE = 500


def load(params: Params) -> InMemory | Folder:
    """The data set of a run. Raises ValueError for a superfluous data_dir, FileNotFoundError for a missing one."""
    if params.dataset == "imagenet":
        return Folder(params)
    if params.data_dir:
        raise ValueError(
            f"sr_ste: got data_dir={params.data_dir!r} with dataset={params.dataset!r}, which needs none; expected it "
            "to be empty. Remove it, or set dataset=imagenet."
        )
    return InMemory(params)


class InMemory:
    """Digits or CIFAR-10: all pixels as uint8 tensors, standardised with the moments of the training images."""

    def __init__(self, params: Params):
        read = images.digits if params.dataset == "digits" else images.cifar10
        train, self.test = read("train"), read("test")
        if params.size != train.pixels.shape[-1]:
            train, self.test = train.shrunk(params.size), self.test.shrunk(params.size)
        self.train, self.validation = train, None
        if params.validation:
            self.train, self.validation = train.hold_out(params.validation, seed=SPLIT_SEED)
        self.name, self.classes, self.channels = train.name, len(train.classes), train.pixels.shape[1]
        self.standardise = images.Standardiser(self.train)
        self.padding = params.size // 8 if params.augment else None  # 4 of 32 pixels, as in He et al. 2016

    def __len__(self) -> int:
        return len(self.train)

    def provenance(self) -> str:
        """One sha256 for the set: of its registered files, or of the pixels that scikit-learn brought along."""
        if self.name == images.CIFAR10:
            return datasets.registry()[images.CIFAR10].sha256
        return hashlib.sha256(self.train.pixels.numpy().tobytes() + self.test.pixels.numpy().tobytes()).hexdigest()

    def batches(self, batch: int, steps: int, seed: int) -> Iterator[Batch]:
        """Training batches, the same for every arm of a seed."""
        augmentation = seeds.generator(seed, "augmentation")
        for chosen in images.shuffled_batches(len(self), batch, steps, seeds.generator(seed, "order")):
            pixels = self.train.pixels[chosen]
            if self.padding is not None:
                pixels = images.crop_and_flip(pixels, augmentation, padding=self.padding)
            yield self.standardise(pixels), self.train.labels[chosen]

    def held_out(self, split: Split) -> Iterator[Batch]:
        """All images of a split in order; nothing for validation where none was held out."""
        chosen = self.test if split == "test" else self.validation
        for part in torch.arange(len(chosen) if chosen else 0).split(EVALUATED_AT_ONCE):
            if chosen is not None and len(part):
                yield self.standardise(chosen.pixels[part]), chosen.labels[part]


class Folder:
    """ImageNet as it is unpacked, `<data_dir>/train|val/<class>/*.JPEG`, read by `loaders` processes.

    Its validation split is the test here, as in all published numbers.
    """

    def __init__(self, params: Params):
        self.train = images.image_folder(params.data_dir, "train", size=params.size)
        self.test = images.image_folder(params.data_dir, "val", size=params.size)
        if self.train.classes != self.test.classes:
            raise ValueError(
                f"sr_ste: {params.data_dir} has {len(self.train.classes)} classes in train/ and "
                f"{len(self.test.classes)} in val/; expected the same folders in both. For ImageNet, sort val/ into "
                "folders of classes."
            )
        self.name, self.classes, self.channels, self.loaders = "imagenet", len(self.train.classes), 3, params.loaders

    def __len__(self) -> int:
        return len(self.train)

    def provenance(self) -> str:
        """A sha256 of the file names of both splits: the pixels are too many to hash before each run."""
        names = "\n".join(path.rsplit("/", 2)[-1] for part in (self.train, self.test) for path, _ in part.samples)
        return hashlib.sha256(names.encode()).hexdigest()

    def batches(self, batch: int, steps: int, seed: int) -> Iterator[Batch]:
        """Training batches, the same images in the same order for every arm of a seed."""
        order = seeds.generator(seed, "order")
        loader = torch.utils.data.DataLoader(
            self.train,
            batch,
            shuffle=True,
            drop_last=True,
            num_workers=self.loaders,
            generator=order,
            pin_memory=torch.cuda.is_available(),
        )
        if not len(loader):
            raise ValueError(f"sr_ste: got batch={batch} of {len(self)} images; expected at most as many.")
        done = 0
        while True:
            for images_, labels in loader:
                if done == steps:
                    return
                yield images_, labels
                done += 1

    def held_out(self, split: Split) -> Iterator[Batch]:
        """The images of val/ in order; there is no further validation split."""
        if split == "test":
            yield from torch.utils.data.DataLoader(self.test, EVALUATED_AT_ONCE // 2, num_workers=self.loaders)
