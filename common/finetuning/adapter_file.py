"""Sparse adapters on disk: new values of the chosen entries, their places, and of which base they are.

A folder with adapter_model.safetensors and adapter_config.json (the SaraConfig). For a parameter `P` of the model:

    P.values   [k], in the weight's dtype, so that the trained weights come back bit for bit; or differences to the base
               in a narrower dtype
    P.offsets  int16 [k] and P.starts int32 [tiles + 1]: where they are, see kernels.masked_grad.Selection

The header (safetensors' metadata) has

    format   resparse-sara
    version  1
    tensors  JSON: {P: {"shape": as the selection sees it, "dtype": of the base, "base": sha256 of the base's bytes,
             "stores": "values" or "differences"}}

An entry takes 2 bytes of place and 4 or 2 of value.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import files
from common.finetuning.config import SaraConfig
from kernels.masked_grad import Selection

__all__ = ["CONFIG", "WEIGHTS", "Adapter", "AdapterFileError", "Part", "base_hash"]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FORMAT, VERSION = "resparse-sara", "1"


class AdapterFileError(ValueError):
    """A folder that holds no adapter, a damaged one, one of another version, or one of another base."""


@dataclass(frozen=True)
class Part:
    """What an adapter changes in one parameter.

    selection  which entries, on the CPU
    stored     [k], their new values, or differences to the base's, see `differences`
    dtype      of the base's weight
    base       sha256 of its bytes
    """

    selection: Selection
    stored: Tensor
    dtype: torch.dtype
    base: str
    differences: bool = False

    def change(self, base: Tensor) -> Tensor:
        """[k], new values less those of the base [k], in float32 or float64."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        stored = self.stored.to(wide)
        return stored if self.differences else stored - base.to(wide)

    def values(self, base: Tensor) -> Tensor:
        """[k], the new values in the weight's dtype, by the base's [k]."""
        return (
            (base.to(self.change(base).dtype) + self.change(base)).to(self.dtype) if self.differences else self.stored
        )


@dataclass(frozen=True)
class Adapter:
    """A sparse adapter in memory: parts by the parameter's name, the config it was made with, `Sparse.theta`."""

    config: SaraConfig
    parts: dict[str, Part]
    theta: float

    def save(self, folder: Path) -> None:
        """Write it into the folder, as a whole or not at all.

        Raises OSError with one line where it cannot be written (disk full, not writable); what was there is untouched.
        """
        from safetensors.torch import save

        tensors, about = {}, {}
        for name, part in self.parts.items():
            tensors[f"{name}.values"] = part.stored.contiguous()
            tensors[f"{name}.offsets"], tensors[f"{name}.starts"] = part.selection.offsets, part.selection.starts
            stores = "differences" if part.differences else "values"
            shape, dtype = list(part.selection.shape), str(part.dtype).removeprefix("torch.")
            about[name] = {"shape": shape, "dtype": dtype, "base": part.base, "stores": stores}
        content = save(tensors, {"format": FORMAT, "version": VERSION, "tensors": json.dumps(about)})
        config = {"peft_type": "SARA", **asdict(self.config), "theta": None if math.isnan(self.theta) else self.theta}
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as beside:
                files.write(Path(beside) / WEIGHTS, content)
                files.write_json(Path(beside) / CONFIG, config)
                folder.mkdir(exist_ok=True)
                for name in (WEIGHTS, CONFIG):
                    os.replace(Path(beside) / name, folder / name)
        except OSError as error:
            why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
            raise OSError(
                error.errno,
                f"adapter of {len(content):,} bytes was not saved to {folder}: {why}; the model and what was there "
                "before are untouched: make room, or save to another folder",
            ) from error

    @classmethod
    def load(cls, folder: Path) -> Adapter:
        """Read it. Raises AdapterFileError where there is none that this version can read."""
        tensors, about = _read(folder / WEIGHTS)
        parts = {name: _part(folder / WEIGHTS, name, tensors, entry) for name, entry in about.items()}
        try:
            stored = json.loads((folder / CONFIG).read_text())
            stored.pop("peft_type", None)
            theta = stored.pop("theta")
            return cls(SaraConfig(**stored), parts, math.nan if theta is None else float(theta))
        except (KeyError, OSError, TypeError, ValueError) as error:
            raise AdapterFileError(f"{folder / CONFIG} cannot be read ({error}); save the adapter again") from error


def base_hash(weight: Tensor) -> str:
    """sha256 of a weight's bytes in its dtype, row by row as a selection sees it."""
    flat = weight.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise AdapterFileError(f"{path} is not there; expected a folder written by save_pretrained")
    try:
        with safe_open(path, framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(
            f"{path} is cut short or no safetensors file ({error}); save the adapter again"
        ) from error
    if header.get("format") != FORMAT:
        raise AdapterFileError(
            f"{path} has format {header.get('format')!r}; expected {FORMAT!r}: an adapter of another method is "
            "loaded by its own library"
        )
    if header.get("version") != VERSION:
        raise AdapterFileError(f"{path} is of version {header.get('version')!r}; expected {VERSION!r}: update Resparse")
    try:
        about = json.loads(header["tensors"])
        assert isinstance(about, dict)
    except (KeyError, ValueError, AssertionError) as error:
        raise AdapterFileError(f"{path} has a damaged header; save the adapter again") from error
    return tensors, about


def _part(path: Path, name: str, tensors: dict[str, Tensor], about: Any) -> Part:
    """One parameter's part; `Selection` checks every place."""
    try:
        selection = Selection(tuple(about["shape"]), tensors[f"{name}.offsets"], tensors[f"{name}.starts"])
        stored, dtype = tensors[f"{name}.values"], getattr(torch, about["dtype"])
        if (
            stored.shape != (selection.count,)
            or not isinstance(dtype, torch.dtype)
            or not bool(stored.isfinite().all())
        ):
            raise ValueError(f"{stored.dtype} {list(stored.shape)} values of {selection.count}, or not finite ones")
        return Part(selection, stored, dtype, about["base"], about["stores"] == "differences")
    except (ArithmeticError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise AdapterFileError(f"{path} is damaged at {name!r} ({error}); save the adapter again") from error
