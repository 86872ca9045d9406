"""Writing files so that a reader never meets half of one, and hashing them."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO


def write(path: Path, fill: Callable[[BinaryIO], Any] | bytes | str) -> None:
    """Write `path` as a whole or not at all: into a temporary file beside it, then renamed.

    fill: the content, or a function that writes it into the open binary file.

    Raises OSError as `open` and `write` do (disk full, not writable); what was there before is then untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as stream:
            if callable(fill):
                fill(stream)
            else:
                stream.write(fill.encode() if isinstance(fill, str) else fill)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON for people and diffs: indented, in the order given, newline at the end; NaN is refused."""
    write(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256(path: Path) -> str:
    """The file's content as a hex digest, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest(parts: Iterable[str]) -> str:
    """A short digest (16 hex digits) of a sequence of texts; ["ab"] and ["a", "b"] differ."""
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part.encode()).digest())
    return total.hexdigest()[:16]
