"""A user's own model: opened by name or folder, written to a folder once it is N:M, and loaded from there.

    opened = open_model("gpt2")                # a folder, a name of the hub, torchvision:resnet18, timm:NAME
    masks = prune_(opened.network, 2, 8, method="magnitude")
    save(opened, masks, 2, 8, "gpt2_2of8")
    model, tokenizer = load("gpt2_2of8")       # its pruned Linear layers are PackedLinear

The folder holds `packed.safetensors` (see packed.py), `resparse.json` (what the model is), and for a language model the
configuration and tokenizer in the layout of transformers.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from common import files
from common.models.causal_lm import CausalLM
from common.models.stable_diffusion import MissingWeights
from common.sparsity.packed import PackedFileError, load_packed, pack_, save_packed
from common.sparsity.recipes import Fixed
from common.sparsity.report import Report, report
from common.sparsity.sparsify import NMConfig, Sparsity, sparsify_

__all__ = ["ABOUT", "WEIGHTS", "MissingWeights", "Opened", "cast_", "load", "open_model", "save", "sparse"]

Kind = Literal["causal_lm", "torchvision", "timm"]

ABOUT, WEIGHTS = "resparse.json", "packed.safetensors"
FORMAT, VERSION = "resparse-model", 1
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


@dataclass
class Opened:
    """A model that is ready to be pruned: float32, on the CPU, in evaluation mode.

    name       the architecture of a classifier; the name or folder of a language model
    dtype      what its weights are stored in: bfloat16 where the checkpoint was, else float32
    classes    of a classifier
    moments    of a classifier: mean and standard deviation of each colour in 0..1 that it expects
    size       of a classifier: pixels a side that it expects
    """

    network: nn.Module
    kind: Kind
    name: str
    tokenizer: Any = None
    dtype: torch.dtype = torch.float32
    classes: int | None = None
    moments: tuple[tuple[float, ...], tuple[float, ...]] = field(default=((), ()))
    size: int = 0

    @property
    def context(self) -> int | None:
        """The most tokens that a language model says it can see."""
        return getattr(getattr(self.network, "config", None), "max_position_embeddings", None)


def open_model(name: str, *, weights: str | Path | None = None, classes: int | None = None) -> Opened:
    """Open a causal language model of transformers (folder or name on the hub) or a classifier (`torchvision:`, `timm:`
    and the architecture).

    weights   of a classifier: a file with its state dict (.safetensors, or torch's with tensors alone); None: the
              published ones, which are downloaded
    classes   of a classifier, for `weights`

    Raises MissingWeights where model, weights or tokenizer are not to be had, or do not fit together.
    """
    kind, colon, architecture = name.partition(":")
    if colon and kind in ("torchvision", "timm"):
        return _open_classifier(kind, architecture, Path(weights).expanduser() if weights else None, classes)
    if weights:
        raise MissingWeights(f"{name}: a language model's weights lie in its folder; name that folder as the model")
    return _open_language_model(name)


def save(opened: Opened, masks: Mapping[str, Tensor], n: int, m: int, folder: str | Path) -> Report:
    """Write a pruned model to a folder; the network then has zeros where it is pruned, and the dtype of the file.

    masks   bool by layer name, True where a weight is kept: at most n of every m

    Returns what it saves, for products of one token. Raises OSError where the folder cannot be written.
    """
    folder = Path(folder)
    network = cast_(opened.network, opened.dtype)
    handle = sparse(network, masks, n, m)
    with _without_twins(network):
        save_packed(network, folder / WEIGHTS)
    found = report(network)
    handle.remove(keep="zeros")
    if opened.kind == "causal_lm":
        config: Any = network.config
        config.save_pretrained(folder)
        opened.tokenizer.save_pretrained(folder)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "kind": opened.kind,
        "name": opened.name,
        "classes": opened.classes,
        "dtype": str(opened.dtype).removeprefix("torch."),
        "n": n,
        "m": m,
    }
    files.write_json(folder / ABOUT, content)
    return found


def load(folder: str | Path) -> tuple[nn.Module, Any]:
    """The model in such a folder, in evaluation mode on the CPU, and its tokenizer (None for a classifier).

    Pruned Linear layers are `PackedLinear`; pruned convolutions, which no packed product serves, are plain ones with
    zeros. A language model is the class of transformers, so `generate` works.

    Raises PackedFileError for a folder that holds no such model, or a file that is cut short, of another version or of
    another model; FileNotFoundError where there is none.
    """
    folder = Path(folder).expanduser()
    about = _about(folder)
    network, tokenizer = _rebuild(folder, about)
    with _without_twins(network):
        masks = load_packed(folder / WEIGHTS, network)
    linear = {name: mask for name, mask in masks.items() if type(network.get_submodule(name)) is nn.Linear}
    if linear:
        try:
            sparse(network, linear, about["n"], about["m"])
        except ValueError as error:
            raise PackedFileError(f"{folder}: {ABOUT} and {WEIGHTS} do not belong together ({error})") from error
        pack_(network)
    return network.eval(), tokenizer


def sparse(network: nn.Module, masks: Mapping[str, Tensor], n: int, m: int) -> Sparsity:
    """Put fixed masks on a network's layers; returns the handle."""
    handle = sparsify_(network, NMConfig(n, m, where=list(masks), recipe=Fixed()))
    handle.set_masks(masks)
    return handle


def cast_(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give all that is in the state dict another floating-point dtype, in place.

    Buffers outside it stay: the frequencies of rotary positions must keep their digits.
    """
    for tensor in network.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return network


# ------------------------------------------------------------------------------------------------------ language models


def _open_language_model(name: str) -> Opened:
    from transformers import AutoConfig

    _silence_transformers()
    folder = Path(name).expanduser()
    if folder.is_dir():
        _require_layout(folder)
        name = str(folder)
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise MissingWeights(f"{name}: no such folder; expected a model in the layout of transformers, or a hub name")
    model = CausalLM.from_pretrained(name)
    stored = AutoConfig.from_pretrained(name).dtype
    dtype = torch.bfloat16 if stored == torch.bfloat16 else torch.float32
    return Opened(model.network.eval(), "causal_lm", name, model.tokenizer, dtype)


def _require_layout(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise MissingWeights(f"{folder} holds no config.json; expected a model in the layout of transformers")
    if not any((folder / name).is_file() for name in TOKENIZERS):
        # transformers would make an empty one, that turns any text into nothing
        raise MissingWeights(
            f"{folder} holds no tokenizer ({', '.join(TOKENIZERS[:4])}); save the model's own beside it: "
            "AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)"
        )


def _silence_transformers() -> None:
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    logging.disable_progress_bar()
    hub.set_verbosity_error()  # off line it would announce each of its retries


# --------------------------------------------------------------------------------------------------------- classifiers


def _open_classifier(kind: Kind, architecture: str, weights: Path | None, classes: int | None) -> Opened:
    state = None if weights is None else _read_state(weights)
    network = _build_classifier(kind, architecture, classes if weights else None, published=weights is None)
    if state is not None:
        own = network.state_dict()
        wrong = sorted(key for key in state.keys() | own.keys() if _shape(state, key) != _shape(own, key))
        if wrong:
            raise MissingWeights(
                f"{weights}: {wrong[0]!r} is {_shape(state, wrong[0])} in the file and {_shape(own, wrong[0])} in "
                f"{architecture} for {classes} classes ({len(wrong)} such); expected the state dict of that model, "
                "trained on the classes of the data"
            )
        network.load_state_dict(state)
    about = getattr(network, "default_cfg", {})  # timm's
    mean, std = about.get("mean", (0.485, 0.456, 0.406)), about.get("std", (0.229, 0.224, 0.225))
    size = about.get("input_size", (3, 224, 224))[-1]
    return Opened(
        network.float().eval(), kind, architecture, classes=classes, moments=(tuple(mean), tuple(std)), size=size
    )


def _build_classifier(kind: Kind, architecture: str, classes: int | None, *, published: bool) -> nn.Module:
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if kind == "timm":
        try:
            import timm
        except ImportError:
            raise MissingWeights(f"timm:{architecture} needs timm, which is not installed; pip install timm") from None
        known, make = timm.list_models(), timm.create_model
        options["pretrained"] = published
    else:
        from torchvision import models

        known, make = models.list_models(module=models), models.get_model
        options["weights"] = "DEFAULT" if published else None
    if architecture not in known:
        near = difflib.get_close_matches(architecture, known, 1, cutoff=0)[0]
        raise MissingWeights(f"{kind} has no classifier {architecture!r}; did you mean {near!r}?")
    try:
        return make(architecture, **options)
    except (OSError, RuntimeError) as error:
        if not published:
            raise
        raise MissingWeights(
            f"the published weights of {kind}:{architecture} cannot be had ({str(error).splitlines()[0]}); download "
            "them on a machine with a connection and give their file as --weights"
        ) from error


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise MissingWeights(f"{path}: no such file; expected a state dict, .safetensors or torch's own")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's message advises to load it unsafely
        raise MissingWeights(
            f"{path} is no file of tensors alone; expected a state dict, as torch.save(model.state_dict(), F) makes it"
        ) from error
    except Exception as error:  # zip and safetensors each have their own
        raise MissingWeights(f"{path} cannot be read ({str(error).splitlines()[0]}); expected a state dict") from error
    for key in ("state_dict", "model"):  # as timm's and torchvision's own training scripts wrap it
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise MissingWeights(f"{path} holds a {type(found).__name__}; expected a state dict: tensors by name")
    return found


def _shape(state: Mapping[str, Tensor], key: str) -> list[int] | None:
    return list(state[key].shape) if key in state else None


# ------------------------------------------------------------------------------------------------------------- folders


def _about(folder: Path) -> dict[str, Any]:
    path = folder / ABOUT
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a folder written by `resparse sparsify`")
    try:
        about = dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError):
        raise PackedFileError(f"{path} is no JSON of a model; write the model again") from None
    if about.get("format") != FORMAT or about.get("version") != VERSION:
        raise PackedFileError(
            f"{path} has format {about.get('format')!r}, version {about.get('version')!r}; this code reads {FORMAT!r}, "
            f"version {VERSION}: save the model again, or use the release that wrote it"
        )
    missing = [key for key in ("kind", "name", "classes", "dtype", "n", "m") if key not in about]
    if missing or about["kind"] not in get_args(Kind) or about["dtype"] not in ("float32", "bfloat16"):
        raise PackedFileError(
            f"{path} is damaged ({f'no {missing[0]}' if missing else 'kind or dtype'}); save it again"
        )
    return about


def _rebuild(folder: Path, about: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    """The architecture in the stored dtype, its weights yet unset, and the tokenizer."""
    if about["kind"] != "causal_lm":
        return _build_classifier(about["kind"], about["name"], about["classes"], published=False), None
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    dtype = getattr(torch, about["dtype"])
    _require_layout(folder)
    network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    return CausalLM(network).network, AutoTokenizer.from_pretrained(folder)


@contextlib.contextmanager
def _without_twins(network: nn.Module) -> Iterator[None]:
    """Inside, a parameter that several modules share (a head tied to its embedding) is in the first of them alone, so
    that a file holds it once."""
    owners: dict[int, nn.Module] = {}
    twins: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if owners.setdefault(id(parameter), module) is not module:
                twins.append((module, name, parameter))
                module.register_parameter(name, None)
    try:
        yield
    finally:
        for module, name, parameter in twins:
            module.register_parameter(name, parameter)
