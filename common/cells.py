"""Finished units of work on disk, so that a run that was killed goes on where it stopped."""

from __future__ import annotations

import io
import re
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from common import files, paths, seeds

T = TypeVar("T")


class Store:
    """The cells of one paper under one digest of parameters and sources, in `results/cells/<slug>/<digest>/`."""

    def __init__(self, slug: str, digest: str):
        self.folder = paths.cells(slug, digest)

    def get(self, key: str, fn: Callable[[], T], *, tell: Callable[[str], None]) -> tuple[T, float, bool]:
        """The result of `fn()`, the seconds it took when it was computed, and whether it was restored."""
        path, code = self.folder / f"{_file_name(key)}.pt", _code_digest(fn)
        stored = _load(path, key)
        if stored and stored["code"] == code:
            tell(f"{key}: restored")
            print(f"resparse: {key}: restored from {paths.relative(path)}")
            return stored["result"], stored["seconds"], True
        tell(key)
        began = time.perf_counter()
        with seeds.isolated(key):
            result = fn()
        seconds = time.perf_counter() - began
        self._save(path, key, {"result": result, "seconds": seconds, "code": code})
        return result, seconds, False

    def _save(self, path: Path, key: str, content: dict[str, Any]) -> None:
        buffer = io.BytesIO()  # torch hides the operating system's error when it writes to a file itself
        torch.save(content, buffer)
        try:
            files.write(path, buffer.getbuffer().tobytes())
        except OSError as error:
            print(
                f"resparse: cannot keep {key!r} in {paths.relative(self.folder)} ({error.strerror}); expected to write "
                f"{buffer.tell() / 2**20:.1f} MB. The run goes on, but would compute it again after a restart: make "
                "room, or delete results/cells",
                file=sys.stderr,
            )


def _load(path: Path, key: str) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return torch.load(path, weights_only=False)  # our own file: results may be any Python object
    except Exception as error:  # whatever a damaged file makes of unpickling
        name = paths.relative(path)
        print(f"resparse: {name} cannot be read ({type(error).__name__}); computing {key!r} again", file=sys.stderr)
        return None


def _code_digest(fn: Callable[..., Any]) -> str:
    """The code of `fn` and of the functions of its own module that it calls.

    Files on disk are part of the store's digest; this is for functions typed into an open notebook.
    """
    parts: list[str] = []
    seen: set[int] = set()

    def visit(function: Any) -> None:
        function = getattr(function, "func", function)  # functools.partial
        code = getattr(function, "__code__", None)
        if code is None or id(code) in seen:
            return
        seen.add(id(code))
        parts.extend(_texts(code))
        for name in code.co_names:
            called = function.__globals__.get(name)
            if getattr(called, "__module__", None) == function.__module__:
                visit(called)

    visit(fn)
    return files.digest(parts)


def _texts(code: types.CodeType) -> Iterator[str]:
    yield from (code.co_code.hex(), repr(code.co_names))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _texts(constant)
        else:
            yield repr(constant)


def _file_name(key: str) -> str:
    """A file name for any key; keys that differ only in characters a file name cannot hold stay apart."""
    safe = re.sub(r"[^A-Za-z0-9._=-]", "_", key)[:100]
    return safe if safe == key and not key.startswith(".") else f"cell_{safe}-{files.digest([key])[:8]}"
