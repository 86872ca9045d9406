"""N:M models on disk: a safetensors file of kept values, their places, and everything else as it is.

The header (safetensors' metadata) says which layout the file has:

    format    resparse-nm
    version   1
    layers    JSON: {layer: {"n", "m", "axis", "shape"}}

A packed weight `L.weight` is stored as `L.weight.values`, in the weight's dtype, [rows, groups, n], and
`L.weight.places`, uint8: the place of each value within its group, two of 4 bits a byte (the first in the low half) for
m <= 16 and one a byte up to m = 256. Groups lie along the layer's axis; a convolution's rows run over its other channel
axis and the kernel positions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import files
from common.sparsity.layers import NMLayer
from common.sparsity.rules import DIMENSION, Axis
from kernels.nm import reference

__all__ = ["PackedFileError", "load_packed", "save_packed"]

FORMAT, VERSION = "resparse-nm", "1"
NIBBLES = 16  # up to this m a place takes 4 bits
LARGEST_M = 256


class PackedFileError(ValueError):
    """A file that is not a packed model, is cut short, is of another version, or is of another model."""


def save_packed(model: nn.Module, path: str | Path) -> None:
    """Write a model with sparse layers: these packed, every other parameter and buffer as in its state_dict.

    The layers must have reached their hard mask: see `Sparsity.finalize_`. The file appears as a whole or not at all.

    Raises ValueError for a model without sparse layers, or one still on its way to the hard mask; OSError where the
    file cannot be written.
    """
    from safetensors.torch import save

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, NMLayer)}
    if not layers:
        raise ValueError("save_packed: the model has no sparse layer; expected one that sparsify_ was applied to")
    tensors, header = dict(model.state_dict()), {}
    for name, layer in layers.items():
        if layer.kept is None or layer.rule.beta > 0:
            raise ValueError(f"save_packed: {name!r} has no hard mask yet; call finalize_() on its handle first")
        key, rule = _weight(name), layer.rule
        if rule.m > LARGEST_M:
            raise ValueError(f"save_packed: {name!r} is {rule.n}:{rule.m}; expected m of at most {LARGEST_M}")
        rows = _rows(tensors.pop(key).detach(), layer.axis)
        values, places = reference.pack(rows, _rows(layer.kept, layer.axis), rule.n, rule.m)
        tensors[f"{key}.values"], tensors[f"{key}.places"] = values, _narrow(places, rule.m)
        header[name] = {"n": rule.n, "m": rule.m, "axis": layer.axis, "shape": list(layer.weight.shape)}
    # clones: safetensors refuses tensors that share memory, such as tied weights
    content = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "version": VERSION, "layers": json.dumps(header)}
    files.write(Path(path), save(content, metadata))


def load_packed(path: str | Path, model: nn.Module) -> dict[str, Tensor]:
    """Load such a file into a plain model of the same architecture: weights with zeros where they were pruned.

    Returns the masks by layer name; `sparsify_(model, NMConfig(n, m, where=list(masks), recipe=Fixed()))` with
    `set_masks(masks)` goes on training with them.

    Raises PackedFileError for a file that cannot be read or does not fit the model, which is then untouched;
    FileNotFoundError where there is none.
    """
    tensors, header = _read(Path(path))
    masks = {}
    for name, about in header.items():
        key = _weight(name)
        values, places = tensors.pop(f"{key}.values"), tensors.pop(f"{key}.places")
        places = _widen(places, values.shape, about["m"])
        shape, axis = torch.Size(about["shape"]), about["axis"]
        tensors[key] = _from_rows(reference.unpack(values, places, about["m"]), shape, axis)
        ones = reference.unpack(torch.ones_like(values), places, about["m"])
        masks[name] = _from_rows(ones, shape, axis) > 0
    expected = model.state_dict()
    if wrong := sorted(
        key for key in tensors.keys() | expected.keys() if _shape(tensors.get(key)) != _shape(expected.get(key))
    ):
        raise PackedFileError(
            f"{path}: {wrong[0]!r} is {_shape(tensors.get(wrong[0]))} in the file and "
            f"{_shape(expected.get(wrong[0]))} in the model ({len(wrong)} such); expected the architecture of the file"
        )
    model.load_state_dict(tensors)
    return masks


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a model written by save_packed")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise PackedFileError(f"{path} cannot be read ({error}): it is cut short or no safetensors file") from None
    if metadata.get("format") != FORMAT:
        raise PackedFileError(f"{path} is no packed N:M model; expected the format {FORMAT!r} in its header")
    if metadata.get("version") != VERSION:
        raise PackedFileError(
            f"{path} has version {metadata.get('version')!r} of the packed format; this code reads {VERSION!r}: save "
            "the model again, or use the release that wrote it"
        )
    return tensors, json.loads(metadata["layers"])


def _weight(layer: str) -> str:
    return f"{layer}.weight" if layer else "weight"


def _shape(tensor: Tensor | None) -> list[int] | None:
    return None if tensor is None else list(tensor.shape)


def _rows(weight: Tensor, axis: Axis) -> Tensor:
    """[rows, channels along the axis] of a weight."""
    moved = weight.movedim(DIMENSION[axis], -1)
    return moved.reshape(-1, moved.shape[-1])


def _from_rows(rows: Tensor, shape: torch.Size, axis: Axis) -> Tensor:
    dim = DIMENSION[axis]
    others = [size for i, size in enumerate(shape) if i != dim]
    return rows.reshape(*others, shape[dim]).movedim(-1, dim).contiguous()


def _narrow(places: Tensor, m: int) -> Tensor:
    """Places [rows, groups, n] as bytes: all of them, or [bytes] of two each."""
    if m > NIBBLES:
        return places.to(torch.uint8)
    flat = torch.nn.functional.pad(places.to(torch.uint8).flatten(), (0, places.numel() % 2)).view(-1, 2)
    return flat[:, 0] | flat[:, 1] << 4


def _widen(stored: Tensor, shape: torch.Size, m: int) -> Tensor:
    if m > NIBBLES:
        return stored.long()
    return torch.stack([stored & 15, stored >> 4], dim=1).flatten()[: shape.numel()].view(shape).long()
