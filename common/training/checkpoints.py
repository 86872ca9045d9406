"""Models that the project trained itself: found by what they were trained with, trained anew where they are missing.

`checkpoints/<name>.safetensors` holds the weights and, in its header, the settings, the commit and the seconds they
took. DVC keeps the file (`<name>.safetensors.dvc` in git has its hash); nothing but time is lost without it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import files, paths, provenance

__all__ = ["Checkpoint", "checkpoint", "rounded"]

LARGEST = 30 * 2**20  # bytes: what is kept beside the code stays small


@dataclass(frozen=True)
class Checkpoint:
    """state: the weights, float32; sha256 of the file; path; restored: whether it was there already."""

    state: dict[str, Tensor]
    sha256: str
    path: Path
    restored: bool


def checkpoint(
    name: str,
    settings: Mapping[str, Any],
    train: Callable[[Path], Mapping[str, Tensor]],
    *,
    retrain: bool = False,
) -> Checkpoint:
    """The model of this name made with these settings: read, or trained and stored.

    Weights are kept as float16, and those returned after a training are rounded alike, so that a model is the same
    whether it was read or made. A file of other settings is replaced.

    Args:
        name: lower-case words joined by `-`.
        settings: all that decides what comes out (data, sizes, steps, seed), as JSON has it.
        train: called with a path where an interrupted training may keep its state (`fit(..., keep=path)`); returns a
            state dict. The path is removed once the model is stored.
        retrain: train whatever is there.

    Raises ValueError for a bad name, settings that are no JSON, or a model of more than 30 MB.
    """
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        raise ValueError(f"checkpoint: got name {name!r}; expected lower-case words joined by '-'")
    path = paths.checkpoint(name)
    wanted = _plain(name, settings)
    if not retrain and (found := _read(path, wanted)) is not None:
        return Checkpoint(found, files.sha256(path), path, True)
    unfinished = path.with_name(f".{name}.{files.digest([json.dumps(wanted, sort_keys=True)])}.unfinished.pt")
    began = time.perf_counter()
    state = rounded(train(unfinished))
    _write(path, wanted, state, time.perf_counter() - began)
    unfinished.unlink(missing_ok=True)
    return Checkpoint(state, files.sha256(path), path, False)


def rounded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as a checkpoint gives it back: floats rounded to float16, all else as it is."""
    return {
        name: value.detach().cpu().half().float() if value.is_floating_point() else value.detach().cpu()
        for name, value in state.items()
    }


def _plain(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(settings), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"checkpoint {name}: got settings that are no JSON ({error}); expected names with numbers, texts and lists"
        ) from error


def _read(path: Path, wanted: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The weights, if the file is there, whole, and made with these settings; else says why not."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        print(f"resparse: {paths.relative(path)} is not here; training it")
        return None
    try:
        with safe_open(path, "pt") as stream:
            found = json.loads((stream.metadata() or {}).get("settings", "{}"))
            if found == wanted:
                state = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118  (not a mapping)
                return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    except (SafetensorError, ValueError) as error:
        print(f"resparse: {paths.relative(path)} cannot be read ({error}); training it again")
        return None
    changed = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    print(f"resparse: {paths.relative(path)} was made with other settings ({', '.join(changed)}); training it again")
    return None


def _write(path: Path, settings: Mapping[str, Any], state: Mapping[str, Tensor], seconds: float) -> None:
    from safetensors.torch import save

    half = {name: (value.half() if value.is_floating_point() else value).contiguous() for name, value in state.items()}
    about = {
        "settings": json.dumps(settings, sort_keys=True),
        "commit": str(provenance.git().get("commit", "")),
        "seconds": f"{seconds:.0f}",
        "torch": torch.__version__,
    }
    content = save(half, about)
    if len(content) > LARGEST:
        raise ValueError(
            f"checkpoint {path.stem}: got {len(content) / 2**20:.1f} MB; expected at most {LARGEST / 2**20:.0f}; make "
            "the model smaller"
        )
    files.write(path, content)
