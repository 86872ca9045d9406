"""What `resparse sparsify` trains, calibrates and scores a model on: a text, or a folder of images by class."""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset
from tqdm import tqdm

from common import data as datasets
from common import seeds
from common.data.images import RESIZE_OVER_CROP, shuffled_batches
from common.data.text import random_windows
from common.models.causal_lm import CausalLM
from common.models.gpt import perplexity
from common.sparsity.pretrained import Opened
from common.training import accuracy

HELD_OUT = 0.1  # share of a text, by position, or of each class's images, by the seed, where nothing else is said
LENGTH = 512  # tokens, unless the model sees fewer
SCORED_TOKENS, SCORED_IMAGES = 32768, 2000
COMPARED = 4  # windows or images on which two models' outputs are compared


class SparsifyError(ValueError):
    """What was typed, or what it names, does not go together."""


@dataclass(frozen=True)
class Options:
    """What was typed; see the command's help. Zeros stand for defaults that depend on the model."""

    model: str
    data: str
    n: int
    m: int
    method: str
    out: Path
    where: tuple[str, ...]
    weights: Path | None
    steps: int
    batch: int
    length: int
    size: int
    lr: float
    calibration: int
    held_out: int
    seed: int
    device: str


class Task(Protocol):
    """How a model is fed and scored. Batches are what `predict` takes; `samples` are inputs of the network alone."""

    metric: str
    unit: str
    larger_is_better: bool
    describe: str
    fingerprint: str

    def calibration(self) -> list[Any]: ...
    def batches(self, steps: int, done: int) -> Iterator[Any]: ...
    def predict(self, network: nn.Module, batch: Any) -> tuple[Tensor, Tensor]: ...
    def probe(self) -> Any: ...
    def score(self, network: nn.Module, title: str) -> float: ...
    def run(self, network: nn.Module, inputs: Tensor) -> Tensor: ...
    def samples(self) -> dict[str, Tensor]: ...


def open_task(opened: Opened, options: Options) -> Task:
    """The task of such a model. Raises SparsifyError where data and model do not fit."""
    return Text(opened, options) if opened.kind == "causal_lm" else Images(opened, options)


def bar(iterable: Iterable[Any], title: str) -> tqdm:
    """A plain bar over what has a length."""
    return tqdm(iterable, title, file=sys.stdout, ascii=True)


def loss(task: Task, network: nn.Module, batch: Any) -> Tensor:
    """Mean cross-entropy in nats."""
    logits, targets = task.predict(network, batch)
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


# ---------------------------------------------------------------------------------------------------------------- text


class Text:
    """Next-token prediction in windows of a text. Batches are windows [B, length + 1] int64."""

    metric, unit, larger_is_better = "perplexity", "", False

    def __init__(self, opened: Opened, options: Options):
        limit = opened.context
        self.length = options.length or min(LENGTH, limit or LENGTH)
        if limit and self.length > limit:
            raise SparsifyError(f"--length {self.length}: the model sees {limit} tokens at most; take that or less")
        self.options = options
        self.train, held = (_encode(opened, part) for part in texts(options.data))
        for tokens, what in ((self.train, "to train on"), (held, "held out")):
            if len(tokens) <= self.length:
                raise SparsifyError(
                    f"{options.data} is too short: {len(tokens):,} tokens {what}, expected more than the context of "
                    f"{self.length}; take a longer text, or a smaller --length"
                )
        scored = options.held_out or SCORED_TOKENS
        self.held = held[: max(scored, self.length + 1)]
        self.describe = (
            f"{options.data}: {len(self.train):,} tokens to train on, {len(self.held):,} of {len(held):,} held out are "
            f"scored, context {self.length}"
        )
        self.fingerprint = hashlib.sha256(self.train.numpy().tobytes()).hexdigest()[:16]

    def calibration(self) -> list[dict[str, Any]]:
        count = -(-self.options.calibration // self.options.batch)
        windows = [window[:, :-1] for window in self._windows(count, "calibration")]
        windows[-1] = windows[-1][: self.options.calibration - (count - 1) * self.options.batch]
        device = self.options.device
        return [{"input_ids": window.to(device), "use_cache": False} for window in windows]

    def batches(self, steps: int, done: int) -> Iterator[Tensor]:
        return itertools.islice(self._windows(steps, "training"), done, None)

    def predict(self, network: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
        batch = batch.to(self.options.device)
        return self.run(network, batch[:, :-1]), batch[:, 1:]

    def probe(self) -> Tensor:
        return self.held.unfold(0, self.length + 1, self.length)[:COMPARED]

    def score(self, network: nn.Module, title: str) -> float:
        model = CausalLM(network).train(network.training)  # it is put back into the mode that it seems to have
        try:
            shown = partial(bar, title=title)
            return perplexity(model, self.held, context=self.length, batch=self.options.batch, progress=shown)
        except OverflowError as error:
            raise SparsifyError(
                "the perplexity on held-out data is more than a number can hold: the model's weights are broken"
            ) from error

    def run(self, network: nn.Module, inputs: Tensor) -> Tensor:
        return network(input_ids=inputs, use_cache=False).logits

    def samples(self) -> dict[str, Tensor]:
        tokens = self.held.to(self.options.device)
        return {"1 token": tokens[None, :1], f"{self.length} tokens": tokens[None, : self.length]}

    def _windows(self, count: int, purpose: str) -> Iterator[Tensor]:
        draw = seeds.generator(self.options.seed, "windows", purpose)
        return random_windows(self.train, length=self.length + 1, batch=self.options.batch, steps=count, generator=draw)


def texts(name: str) -> tuple[str, str]:
    """The text to train on and the one that is held out, of a file, a folder of .txt files or a registered set.

    A folder's test.txt is held out and its other files are trained on, one after another by name; of anything else the
    last tenth is held out.

    Raises SparsifyError where there is no such text.
    """
    known = [entry for entry in datasets.registry() if entry.startswith("text_")]
    path = datasets.path(name) if name in known else Path(name).expanduser()
    if not path.exists():
        raise SparsifyError(
            f"--data {name}: no such file or folder, and no registered text; expected a .txt file, a folder of them, "
            f"or one of {', '.join(known)}"
        )
    found = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not found:
        raise SparsifyError(f"--data {name}: a folder without .txt files; expected text, train.txt and test.txt say")
    try:
        parts = {file.name: file.read_text(encoding="utf-8") for file in found}
    except UnicodeDecodeError as error:
        raise SparsifyError(f"--data {name}: no text in UTF-8 ({error}); convert it first") from None
    held = parts.pop("test.txt", "") if len(parts) > 1 else ""
    text = "".join(parts.values())
    cut = len(text) if held else round((1 - HELD_OUT) * len(text))
    return text[:cut], held or text[cut:]


def _encode(opened: Opened, text: str) -> Tensor:
    tokens = CausalLM(opened.network, opened.tokenizer).encode(text)
    rows = opened.network.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    if text and not len(tokens):
        raise SparsifyError(
            f"the tokenizer of {opened.name} turns the text into nothing; save the model's own beside it"
        )
    if len(tokens) and int(tokens.max()) >= rows:
        raise SparsifyError(
            f"the tokenizer of {opened.name} knows a token {int(tokens.max())}, the model has {rows}; expected the "
            "model's own tokenizer"
        )
    return tokens


# -------------------------------------------------------------------------------------------------------------- images


class Images:
    """Classification of the images of a folder. Batches are (pixels float32 [B, 3, S, S], labels int64 [B])."""

    metric, unit, larger_is_better = "accuracy", " %", True

    def __init__(self, opened: Opened, options: Options):
        self.options, size = options, options.size or opened.size
        self.train, every, classes = image_parts(opened, options, size)
        order = torch.randperm(len(every), generator=seeds.generator(options.seed, "scored")).tolist()
        self.held = Subset(every, order[: options.held_out or SCORED_IMAGES])
        if len(self.train) < options.batch:
            raise SparsifyError(
                f"{options.data} is too small: {len(self.train)} images to train on, expected at least the batch of "
                f"{options.batch}; take a smaller --batch"
            )
        self.describe = (
            f"{options.data}: {len(self.train):,} images to train on, {len(self.held):,} of {len(every):,} held out "
            f"are scored, {size} x {size} pixels"
        )
        names = "\n".join(str(file) for file in _files(self.train))
        self.fingerprint = hashlib.sha256(names.encode()).hexdigest()[:16]
        self._require_fit(opened, classes)

    def calibration(self) -> list[tuple[Tensor]]:
        draw = seeds.generator(self.options.seed, "calibration")
        chosen = torch.randperm(len(self.train), generator=draw)[: self.options.calibration]
        with seeds.isolated("calibration"):  # the random crops
            parts = [_load(self.train, part) for part in bar(chosen.split(self.options.batch), "calibration images")]
        return [(pixels.to(self.options.device),) for pixels, _ in parts]

    def batches(self, steps: int, done: int) -> Iterator[tuple[Tensor, Tensor]]:
        draw = seeds.generator(self.options.seed, "order")
        order = shuffled_batches(len(self.train), self.options.batch, steps, draw)
        for chosen in itertools.islice(order, done, None):
            yield _load(self.train, chosen)

    def predict(self, network: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        pixels, labels = batch
        return self.run(network, pixels.to(self.options.device)), labels.to(self.options.device)

    def probe(self) -> tuple[Tensor, Tensor]:
        return _load(self.held, torch.arange(min(COMPARED, len(self.held))))

    def score(self, network: nn.Module, title: str) -> float:
        parts = torch.arange(len(self.held)).split(self.options.batch)
        return accuracy(network, (_load(self.held, part) for part in bar(parts, title)))

    def run(self, network: nn.Module, inputs: Tensor) -> Tensor:
        found = network(inputs)
        return getattr(found, "logits", found)  # a few give auxiliary ones beside them in training

    def samples(self) -> dict[str, Tensor]:
        pixels = self.probe()[0][:1].to(self.options.device)
        return {"1 image": pixels, f"{self.options.batch} images": pixels.repeat(self.options.batch, 1, 1, 1)}

    def _require_fit(self, opened: Opened, classes: int) -> None:
        try:
            with torch.no_grad():
                told = self.run(opened.network, self.probe()[0]).shape[-1]
        except (AssertionError, RuntimeError) as error:  # a network of one size, too many halvings
            reason = str(error).splitlines()[0]
            raise SparsifyError(f"{opened.name} cannot take these images ({reason}); choose another --size") from error
        if told != classes:
            raise SparsifyError(
                f"{opened.name} tells {told} classes apart and {self.options.data} has {classes}; expected a model "
                "trained on these classes: give its state dict as --weights"
            )


def image_classes(name: str) -> int:
    """How many classes a folder of images has: folders in it, or in its train/.

    Raises SparsifyError where there are none, or a train/ without a val/.
    """
    root = Path(name).expanduser()
    if (root / "train").is_dir():
        if not (root / "val").is_dir():
            raise SparsifyError(
                f"--data {name}: there is a train and no val; expected NAME/train/<class>/*.jpg and the same in "
                "NAME/val, or NAME/<class>/*.jpg alone"
            )
        root /= "train"
    found = sum(path.is_dir() for path in root.iterdir()) if root.is_dir() else 0
    if not found:
        raise SparsifyError(
            f"--data {name}: no folder of classes; expected NAME/<class>/*.jpg, or the same in NAME/train and NAME/val"
        )
    return found


def image_parts(opened: Opened, options: Options, size: int) -> tuple[Subset, Subset, int]:
    """Images to train on (cropped and mirrored at random) and held out, and the number of classes.

    Of train/ and val/ each its own; of a single folder a tenth of each class, drawn by the seed, is held out.
    """
    from torchvision.datasets import ImageFolder

    root = Path(options.data).expanduser()
    whole = not (root / "train").is_dir()
    try:
        train = ImageFolder(str(root if whole else root / "train"), _view(opened, size, training=True))
        held = ImageFolder(str(root if whole else root / "val"), _view(opened, size, training=False))
    except FileNotFoundError as error:
        raise SparsifyError(f"--data {options.data}: {str(error).splitlines()[0]}") from None
    if train.classes != held.classes:
        raise SparsifyError(f"--data {options.data}: train and val hold other classes; expected the same folders")
    inside, outside = list(range(len(train))), list(range(len(held)))
    if whole:
        labels = torch.tensor(train.targets)
        order = torch.randperm(len(labels), generator=seeds.generator(options.seed, "hold out"))
        outside = []
        for label in range(len(train.classes)):
            members = order[labels[order] == label]
            if len(members) < 2:
                raise SparsifyError(f"--data {options.data}: class {train.classes[label]!r} has 1 image; expected 2")
            outside += members[: max(1, round(HELD_OUT * len(members)))].tolist()
        inside = sorted(set(inside) - set(outside))
    return Subset(train, inside), Subset(held, outside), len(train.classes)


def _view(opened: Opened, size: int, *, training: bool) -> Any:
    """The preprocessing of ImageNet, with the moments that the model expects."""
    from torchvision import transforms

    if training:
        shape: list[Any] = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    else:
        shape = [transforms.Resize(round(size * RESIZE_OVER_CROP)), transforms.CenterCrop(size)]
    return transforms.Compose([*shape, transforms.ToTensor(), transforms.Normalize(*opened.moments)])


def _files(subset: Subset) -> list[str]:
    part: Any = subset.dataset  # a folder, or a part of one
    every = _files(part) if isinstance(part, Subset) else [file for file, _ in part.samples]
    return [every[index] for index in subset.indices]


def _load(subset: Subset, chosen: Tensor) -> tuple[Tensor, Tensor]:
    loaded: list[Any] = []
    for index in chosen.tolist():
        try:
            loaded.append(subset[index])
        except OSError as error:  # Pillow does not always say which
            file = _files(subset)[index]
            reason = str(error).splitlines()[0]
            raise SparsifyError(f"{file} cannot be read as an image ({reason}); mend or remove it") from error
    return torch.stack([pixels for pixels, _ in loaded]), torch.tensor([label for _, label in loaded])
