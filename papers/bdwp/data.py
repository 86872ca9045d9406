"""The images of the BDWP experiments as batches: digits, CIFAR-10 and CIFAR-100 in memory, and folders of classes."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import data as datasets
from common import seeds
from common.data import images
from common.data.images import ImageSet
from papers.bdwp.settings import Params

Batch = tuple[Tensor, Tensor]  # images float32 [B, C, H, W], labels int64 [B]

EVALUATED_AT_ONCE = 500
SET_OF = {"resnet9": "cifar10", "vit": "cifar100", "vgg19": "cifar100", "resnet18": "tiny_imagenet"}
SET_OF |= {"resnet50": "imagenet"}  # as published; the sizes of images in pixels:
SIZE_OF = {"cifar10": 32, "cifar100": 32, "tiny_imagenet": 64, "imagenet": 224}
CLASSES_OF = {"cifar10": 10, "cifar100": 100, "tiny_imagenet": 200, "imagenet": 1000}
FOLDER_OF = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}  # as their archives unpack
FOLDER_OF |= {"tiny_imagenet": "tiny-imagenet-200", "imagenet": "imagenet"}


def load(params: Params, network: str) -> InMemory | Folder:
    """The set that a network is trained on.

    Raises ValueError for a superfluous data_dir or a network without a published set, FileNotFoundError for a missing
    folder.
    """
    if params.dataset != "published":
        if params.data_dir:
            raise ValueError(
                f"bdwp: got data_dir={params.data_dir!r} with dataset={params.dataset!r}, which needs none; expected "
                "it to be empty. Remove it, or set dataset=published."
            )
        read = images.digits if params.dataset == "digits" else images.cifar10
        train, test = (_sized(read(split), params.size) for split in ("train", "test"))
        return InMemory(train, test, augment=params.augment)
    if network not in SET_OF:
        raise ValueError(f"bdwp: {network} has no published set; expected one of {', '.join(SET_OF)}.")
    name = SET_OF[network]
    folder = Path(params.data_dir).expanduser() / FOLDER_OF[name]
    if name.startswith("cifar"):
        return InMemory(cifar(folder, "train"), cifar(folder, "test"), augment=params.augment)
    return Folder(name, folder, loaders=params.loaders)


class InMemory:
    """All pixels as uint8 tensors, standardised with the moments of the training images."""

    def __init__(self, train: ImageSet, test: ImageSet, *, augment: bool):
        self.train, self.test = train, test
        self.name, self.classes = train.name, len(train.classes)
        self.channels, self.size = train.pixels.shape[1], train.pixels.shape[-1]
        self.standardise = images.Standardiser(train)
        self.padding = self.size // 8 if augment else None  # 4 of 32 pixels, as in He et al. 2016

    def __len__(self) -> int:
        return len(self.train)

    def provenance(self) -> str:
        """One sha256 for the set: of its registered files, or of its pixels."""
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

    def tested(self) -> Iterator[Batch]:
        """All test images in order."""
        for part in torch.arange(len(self.test)).split(EVALUATED_AT_ONCE):
            yield self.standardise(self.test.pixels[part]), self.test.labels[part]


class Folder:
    """Tiny ImageNet or ImageNet, `<folder>/train|val/<class>/...`, read by `loaders` processes.

    The validation split is the test here, as in published numbers.
    """

    channels = 3

    def __init__(self, name: str, folder: Path, *, loaders: int):
        self.name, self.size, self.loaders = name, SIZE_OF[name], loaders
        self.train = images.image_folder(folder, "train", size=self.size)
        self.test = images.image_folder(folder, "val", size=self.size)
        if self.train.classes != self.test.classes:
            raise ValueError(
                f"bdwp: {folder} has {len(self.train.classes)} classes in train/ and {len(self.test.classes)} in val/; "
                "expected the same folders in both. Both sets come with val/ in one heap: sort it into folders of "
                "classes by the list that comes with it."
            )
        self.classes = len(self.train.classes)

    def __len__(self) -> int:
        return len(self.train)

    def provenance(self) -> str:
        """A sha256 of the file names of both splits: the pixels are too many to hash before each run."""
        names = "\n".join(path.rsplit("/", 2)[-1] for part in (self.train, self.test) for path, _ in part.samples)
        return hashlib.sha256(names.encode()).hexdigest()

    def batches(self, batch: int, steps: int, seed: int) -> Iterator[Batch]:
        """Training batches, the same images in the same order for every arm of a seed."""
        if not 1 <= batch <= len(self):
            raise ValueError(f"bdwp: got batch={batch} of {len(self)} images; expected at most as many.")
        loader = torch.utils.data.DataLoader(
            self.train,
            batch,
            shuffle=True,
            drop_last=True,
            num_workers=self.loaders,
            generator=seeds.generator(seed, "order"),
            pin_memory=torch.cuda.is_available(),
        )
        done = 0
        while True:
            for pixels, labels in loader:
                if done == steps:
                    return
                yield pixels, labels
                done += 1

    def tested(self) -> Iterator[Batch]:
        """The images of val/ in order."""
        yield from torch.utils.data.DataLoader(self.test, EVALUATED_AT_ONCE // 2, num_workers=self.loaders)


def cifar(folder: Path, split: str) -> ImageSet:
    """CIFAR-10 or CIFAR-100 in the layout of its python archive (cs.toronto.edu/~kriz/cifar.html).

    Each file is a pickled {b"data": uint8 [N, 3072], b"labels" or b"fine_labels": [N]}: unpack only archives that you
    trust. Raises FileNotFoundError where a file is missing.
    """
    ten = folder.name == FOLDER_OF["cifar10"]
    train = [f"data_batch_{part}" for part in range(1, 6)] if ten else ["train"]
    parts = [_unpickled(folder / name) for name in (train if split == "train" else ["test_batch" if ten else "test"])]
    name = "cifar10" if ten else "cifar100"
    pixels = torch.cat([torch.as_tensor(part[b"data"]).view(-1, 3, 32, 32) for part in parts])
    labels = torch.cat([torch.as_tensor(part[b"labels" if ten else b"fine_labels"]) for part in parts])
    return ImageSet(name, pixels, labels.long(), tuple(str(label) for label in range(CLASSES_OF[name])))


def _unpickled(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(
            f"bdwp: {path} is missing; expected the python archive of CIFAR, unpacked in data_dir. It must be fetched "
            "by you: cs.toronto.edu/~kriz/cifar.html."
        )
    with path.open("rb") as stream:
        return pickle.load(stream, encoding="bytes")


def _sized(images_: ImageSet, size: int) -> ImageSet:
    return images_ if size == images_.pixels.shape[-1] else images_.shrunk(size)
