"""Files that a training can go on from, and stopping it only between steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from common import files

__all__ = ["CheckpointError", "read", "uninterrupted", "write"]

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or belongs to another training."""


def write(path: Path, state: dict[str, Any]) -> None:
    """Write a training's state as a whole or not at all; the file before stays until then."""
    files.write(path, lambda stream: torch.save({"format": FORMAT, **state}, stream))


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote. Loads tensors and plain values alone, so a file from elsewhere cannot run code.

    Raises CheckpointError for a file that is damaged or of another kind.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each have their own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is no readable checkpoint ({reason}); delete it to start anew.") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of this version of Resparse; delete it to start anew.")
    return state


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let an interrupt (Ctrl-C, the stop button) wait until the end of the block; a second one does not wait.

    Outside the main thread, where Python receives no signals, it does nothing.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    waiting: list[tuple[Any, ...]] = []

    def wait(*received: Any) -> None:
        if waiting:
            before(*received)
        waiting.append(received)

    signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if waiting:
        before(*waiting[0])
