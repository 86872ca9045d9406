"""N:M models on disk: a safetensors file of kept values, their places, and everything else as it is.

The header (safetensors' metadata) says which layout the file has:

    format    resparse-nm
    version   1, or 2 where a layer has a vector, which readers of 1 do not know
    layers    JSON: {layer: {"n", "m", "axis", "shape"}}, and "vector" where rows share their places

A packed weight `L.weight` is stored as `L.weight.values` and `L.weight.places`, laid out as `kernels.nm.NMTensor` has
them, so a product can read them as they are. Groups lie along the layer's axis; a convolution's rows run over its other
channel axis and the kernel positions.

`PackedLinear` is the layer that runs on it: for inference, or for training the kept weights alone.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import files
from common.sparsity.layers import NMLayer, NMLinear
from common.sparsity.rules import DIMENSION, Axis
from kernels import nm
from kernels.nm.tensor import NIBBLES

__all__ = ["PackedFileError", "PackedLinear", "load_packed", "pack_", "save_packed"]

FORMAT, VERSION, WITH_VECTORS = "resparse-nm", "1", "2"
LARGEST_M = 256


class PackedFileError(ValueError):
    """A file that is not a packed model, is cut short, is of another version, or is of another model."""


class PackedLinear(nn.Module):
    """A Linear on a packed weight: x [..., I] -> [..., O]. `values` is a parameter, `places` a buffer.

    `dense`: as kernels.nm.linear takes it; None lets its table choose.
    """

    def __init__(self, weight: nm.NMTensor, bias: Tensor | None, *, dense: bool | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.n, self.m, self.vector, self.dense = weight.n, weight.m, weight.vector, dense
        self.values = nn.Parameter(weight.values)
        self.register_buffer("places", weight.places)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @property
    def weight(self) -> nm.NMTensor:
        """The packed weight, of the parameter's own memory."""
        assert isinstance(self.places, Tensor)
        shape = (self.out_features, self.in_features)
        return nm.NMTensor(self.values, self.places, shape, self.n, self.m, self.vector)

    def forward(self, input: Tensor) -> Tensor:
        return nm.linear(input, self.weight, self.bias, dense=self.dense)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.weight.pattern} packed"


def pack_(model: nn.Module, *, dtype: torch.dtype | None = None) -> list[str]:
    """Put a PackedLinear in the place of every sparse Linear that is N:M along its inputs, in place.

    dtype  of the stored values: float32, bfloat16, or None for the weight's own

    Sparse convolutions and layers grouped along their outputs stay as they are: no packed product serves them. A model
    that is a single sparse layer cannot be packed in place.

    Returns the names of the packed layers. Raises ValueError where there is none, or a layer is still on its way to the
    hard mask.
    """
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, NMLinear) and layer.axis == "in"}
    if not found or "" in found:
        raise ValueError("pack_: got no sparse Linear along `in` inside the model; expected one made by sparsify_")
    packed = {name: _packed(name, layer, dtype) for name, layer in found.items()}
    for name, layer in found.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, PackedLinear(packed[name], layer.bias))
    return list(found)


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
    tensors, header, version = dict(model.state_dict()), {}, VERSION
    for name, layer in layers.items():
        packed, key = _packed(name, layer), _weight(name)
        del tensors[key]
        tensors[f"{key}.values"], tensors[f"{key}.places"] = packed.values, packed.places
        header[name] = {"n": packed.n, "m": packed.m, "axis": layer.axis, "shape": list(layer.weight.shape)}
        if packed.vector > 1:
            header[name]["vector"], version = packed.vector, WITH_VECTORS
    # clones: safetensors refuses tensors that share memory, such as tied weights
    content = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "version": version, "layers": json.dumps(header)}
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
        tensors[_weight(name)], masks[name] = _unpacked(Path(path), tensors, name, about)
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
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except SafetensorError as error:
        raise PackedFileError(f"{path} cannot be read ({error}): it is cut short or no safetensors file") from None
    if metadata.get("format") != FORMAT:
        raise PackedFileError(f"{path} is no packed N:M model; expected the format {FORMAT!r} in its header")
    if metadata.get("version") not in (VERSION, WITH_VECTORS):
        raise PackedFileError(
            f"{path} has version {metadata.get('version')!r} of the packed format; this code reads {VERSION!r} and "
            f"{WITH_VECTORS!r}: save the model again, or use the release that wrote it"
        )
    try:
        layers = dict(json.loads(metadata["layers"]))
    except (KeyError, TypeError, ValueError):
        raise PackedFileError(f"{path} is damaged: its header does not list the layers; save the model again") from None
    return tensors, layers


def _unpacked(path: Path, tensors: dict[str, Tensor], name: str, about: Any) -> tuple[Tensor, Tensor]:
    """A layer's weight with zeros, and its mask; takes what is stored of it out of `tensors`.

    Everything is checked first: the kernels write where `places` says.
    """
    key = _weight(name)
    try:
        shape, axis = torch.Size(about["shape"]), about["axis"]
        columns = shape[DIMENSION[axis]]
        values, places = tensors.pop(f"{key}.values"), tensors.pop(f"{key}.places")
        rows, vector = shape.numel() // columns, about.get("vector", 1)
        packed = nm.NMTensor(values, places, (rows, columns), about["n"], about["m"], vector)
        ones = replace(packed, values=torch.ones_like(values))
        if not values.is_floating_point():
            raise TypeError(f"values of {values.dtype}")
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        what = f"{error} is missing" if isinstance(error, LookupError) else str(error)
        raise PackedFileError(f"{path} is damaged at layer {name!r} ({what}); save the model again") from error
    nibbles = packed.m <= NIBBLES and packed.vector == 1
    both = torch.maximum(places & 15, places >> 4) if nibbles else places
    if both.numel() and int(both.max()) >= packed.m:
        raise PackedFileError(
            f"{path} is damaged at layer {name!r} (a place of {int(both.max())} in groups of {packed.m}); save the "
            "model again"
        )
    return _from_rows(packed.to_dense(), shape, axis), _from_rows(ones.to_dense(), shape, axis) > 0


def _packed(name: str, layer: NMLayer, dtype: torch.dtype | None = None) -> nm.NMTensor:
    rule = layer.rule
    if layer.kept is None or rule.beta > 0:
        raise ValueError(f"{name!r} has no hard mask yet; call finalize_() on its handle first")
    if rule.m > LARGEST_M:
        raise ValueError(f"{name!r} is {rule.n}:{rule.m}; expected m of at most {LARGEST_M} to pack it")
    weight, kept = (_rows(tensor.detach(), layer.axis) for tensor in (layer.weight, layer.kept))
    return nm.pack(weight, rule.n, rule.m, kept, vector=rule.vector, dtype=dtype)


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
