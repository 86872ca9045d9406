"""Labelled images as uint8 tensors: CIFAR-10, digits, a folder of classes; and their augmentation.

    train, validation = cifar10("train").hold_out(1200, seed=0)
    scale = Standardiser(train)
    x = scale(crop_and_flip(train.pixels[chosen], generator))      # float32 [B, C, H, W]

Sets that fit in memory are an `ImageSet`. ImageNet does not: `image_folder` reads it in batches.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from common import seeds
from common.data import _store

__all__ = ["ImageSet", "Standardiser", "cifar10", "crop_and_flip", "digits", "image_folder", "shuffled_batches"]

CIFAR10 = "img_cifar10_jpeg"  # as registered
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DIGITS_TEST = 360  # of 1797
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in 0..1
RESIZE_OVER_CROP = 256 / 224  # evaluation: the short side before the central crop


@dataclass(frozen=True)
class ImageSet:
    """pixels uint8 [N, C, H, W], labels int64 [N] in 0..len(classes)-1."""

    name: str
    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> ImageSet:
        """The images that an index or mask tensor chooses."""
        return ImageSet(self.name, self.pixels[index], self.labels[index], self.classes)

    def hold_out(self, count: int, *, seed: int) -> tuple[ImageSet, ImageSet]:
        """Split off `count` images, equally many of each class: (the rest, the held out ones).

        Raises ValueError where classes do not divide the count or a class has too few images.
        """
        each, remainder = divmod(count, len(self.classes))
        smallest = int(self.labels.bincount(minlength=len(self.classes)).min())
        if remainder or not 0 < each < smallest:
            raise ValueError(
                f"hold_out: got count={count} of {len(self)} images, expected a multiple of {len(self.classes)} "
                f"classes that leaves some of each; the smallest class has {smallest}."
            )
        order = torch.randperm(len(self), generator=seeds.generator(seed, "hold_out"))
        held = torch.zeros(len(self), dtype=torch.bool)
        for label in range(len(self.classes)):
            held[order[self.labels[order] == label][:each]] = True
        return self[~held], self[held]

    def shrunk(self, size: int) -> ImageSet:
        """The same at size x size pixels, by averaging areas. Raises ValueError unless size divides the sides."""
        height, width = self.pixels.shape[2:]
        if size < 1 or height % size or width % size:
            raise ValueError(f"shrunk: got size={size} for images of {height} x {width}; expected a divisor of both.")
        small = F.avg_pool2d(self.pixels.float(), (height // size, width // size))
        return ImageSet(self.name, small.round().to(torch.uint8), self.labels, self.classes)


class Standardiser:
    """pixels uint8 [B, C, H, W] -> float32 with mean 0 and variance 1 in each channel of the set it was made from."""

    def __init__(self, images: ImageSet):
        values = images.pixels.float().transpose(0, 1).flatten(1)  # [C, N H W]
        self.mean, self.std = (x.view(1, -1, 1, 1) for x in (values.mean(dim=1), values.std(dim=1).clamp_min(1e-3)))

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels.float() - self.mean.to(pixels.device)) / self.std.to(pixels.device)


def cifar10(split: Literal["train", "test"]) -> ImageSet:
    """CIFAR-10 from the registered JPEG set: 12,000 training or 10,000 test images, 32 x 32 RGB, shuffled.

    Lossy and with 24 % of the training images, so accuracies are not comparable with published ones. The file is sorted
    by class; the order here is one fixed shuffle. There is no validation split: take one with `hold_out`.

    Raises as `data.path` where the set is neither here nor to be had.
    """
    import numpy as np
    from PIL import Image

    folder = _store.path(CIFAR10, only="*.npz")
    with np.load(folder / f"{split}.npz") as stored:
        raw, offsets, labels = (stored[key] for key in ("jpeg_bytes", "offsets", "labels"))
    decoded = [np.asarray(Image.open(io.BytesIO(raw[low:high]))) for low, high in itertools.pairwise(offsets)]
    pixels = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2)  # [N, 3, 32, 32]
    order = torch.randperm(len(labels), generator=seeds.generator(0, "cifar10", split))
    return ImageSet(CIFAR10, pixels[order].contiguous(), torch.from_numpy(labels).long()[order], CIFAR10_CLASSES)


def digits(split: Literal["train", "test"]) -> ImageSet:
    """The 1,797 handwritten digits that scikit-learn brings along, 1 x 8 x 8: 1,437 to train, 360 to test; offline.

    Grey values 0..16 become 0..240. The split is one fixed shuffle.
    """
    from sklearn.datasets import load_digits

    grey, label = load_digits(return_X_y=True)
    pixels, labels = (15 * torch.as_tensor(grey)).to(torch.uint8).view(-1, 1, 8, 8), torch.as_tensor(label)
    order = torch.randperm(len(labels), generator=seeds.generator(0, "digits"))
    chosen = order[:DIGITS_TEST] if split == "test" else order[DIGITS_TEST:]
    return ImageSet("digits", pixels[chosen], labels[chosen].long(), tuple("0123456789"))


def crop_and_flip(pixels: Tensor, generator: Generator, *, padding: int = 4) -> Tensor:
    """[B, C, H, W] -> same: each image moved by up to `padding` pixels (zeros come in) and mirrored with chance 1/2.

    The augmentation of He et al. 2016, section 4.2; every image is moved on its own. The generator is a CPU one.
    """
    count, _, height, width = pixels.shape
    down, right = torch.randint(2 * padding + 1, (2, count, 1), generator=generator)
    rows = down + torch.arange(height)  # [B, H]
    columns = right + torch.arange(width)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(pixels, (padding,) * 4).permute(0, 2, 3, 1)  # [B, H + 2p, W + 2p, C]
    image = torch.arange(count)[:, None, None]
    device = pixels.device
    moved = padded[image.to(device), rows[:, :, None].to(device), columns[:, None, :].to(device)]
    return moved.permute(0, 3, 1, 2).contiguous()


def shuffled_batches(count: int, batch: int, steps: int, generator: Generator) -> Iterator[Tensor]:
    """`steps` index tensors [batch] int64 below `count`: one shuffled pass after another, without its odd rest.

    Raises ValueError for a batch larger than a pass.
    """
    if not 1 <= batch <= count:
        raise ValueError(f"shuffled_batches: got batch={batch} of {count} items; expected 1 <= batch <= {count}.")
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.randperm(count, generator=generator)
        chosen, order = order[:batch], order[batch:]
        yield chosen


def image_folder(root: str | Path, split: Literal["train", "val"], *, size: int = 224):
    """`<root>/<split>/<class>/*.JPEG` as a torchvision dataset of (image float32 [3, size, size], label).

    The layout and the preprocessing of ImageNet as in torchvision's reference training: a random crop of 8 to 100 % of
    the area and a mirror for `train`, a central crop of the resized image for `val`; standardised with ImageNet's
    moments. Raises FileNotFoundError where the folder or its classes are missing.
    """
    from torchvision import datasets, transforms

    folder = Path(root).expanduser() / split
    if not any(path.is_dir() for path in (folder.iterdir() if folder.is_dir() else ())):
        raise FileNotFoundError(
            f"image_folder: got root={str(root)!r}, but {folder} holds no folders of classes; expected "
            f"<root>/{split}/<class>/*.JPEG as ImageNet is unpacked. It must be fetched by you: image-net.org."
        )
    if split == "train":
        shape: Sequence = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    else:
        shape = [transforms.Resize(round(size * RESIZE_OVER_CROP)), transforms.CenterCrop(size)]
    moments = transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    return datasets.ImageFolder(str(folder), transforms.Compose([*shape, transforms.ToTensor(), moments]))
