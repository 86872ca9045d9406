"""Finished units of work on disk, so that a run that was killed goes on where it stopped."""

from __future__ import annotations

import ctypes
import io
import multiprocessing
import re
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import torch

from common import files, paths, seeds

T = TypeVar("T")


class WorkerDied(RuntimeError):
    """A process that computed a cell was killed."""


class Store:
    """The cells of one paper under one digest of parameters and sources, in `results/cells/<slug>/<digest>/`."""

    def __init__(self, slug: str, digest: str):
        self.folder = paths.cells(slug, digest)

    def get(self, key: str, fn: Callable[[], T], *, tell: Callable[[str], None]) -> tuple[T, float, bool]:
        """The result of `fn()`, the seconds it took when it was computed, and whether it was restored."""
        stored = self.find(key, fn)
        if stored:
            tell(f"{key}: restored")
            return stored["result"], stored["seconds"], True
        tell(key)
        return *self.compute(key, fn), False

    def find(self, key: str, fn: Callable[[], Any]) -> dict[str, Any] | None:
        """What is stored under the key for this very function: `result` and `seconds`."""
        path = self._path(key)
        stored = _load(path, key)
        if not stored or stored["code"] != _code_digest(fn):
            return None
        print(f"resparse: {key}: restored from {paths.relative(path)}")
        return stored

    def compute(self, key: str, fn: Callable[[], T]) -> tuple[T, float]:
        """The result of `fn()` and the seconds it took; both are stored."""
        began = time.perf_counter()
        with seeds.isolated(key):
            result = fn()
        seconds = time.perf_counter() - began
        self._save(key, {"result": result, "seconds": seconds, "code": _code_digest(fn)})
        return result, seconds

    def compute_at_once(
        self, jobs: Mapping[str, Callable[[], T]], workers: int, *, beat: Callable[[], None]
    ) -> Iterator[tuple[str, T, float]]:
        """Key, result and seconds of each job as it ends; `workers` processes with one thread each.

        `beat` is called every second. The first job that fails ends it all with its error; what was finished is stored.
        Raises WorkerDied where a process was killed, as it is for want of memory.
        """
        # fresh processes: a copy of one that has used OpenMP's threads may hang in them
        context = multiprocessing.get_context("spawn")
        pool, others = (
            ProcessPoolExecutor(workers, context, initializer=_begin_worker),
            multiprocessing.active_children(),
        )
        waiting: dict[Future, str] = {}
        try:
            waiting = {pool.submit(self.compute, key, fn): key for key, fn in jobs.items()}
            while waiting:
                beat()
                for future in wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED).done:
                    yield waiting[future], *future.result()
                    del waiting[future]
        except BrokenProcessPool as error:
            raise WorkerDied(
                f"a process that computed one of {', '.join(list(waiting.values())[:workers])} was killed, perhaps for "
                "want of memory; finished cells are kept. Run again with fewer workers"
            ) from error
        finally:
            if waiting:  # an error or an interrupt: do not let them finish for nobody
                for process in set(multiprocessing.active_children()) - set(others):
                    process.terminate()
            pool.shutdown(cancel_futures=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{_file_name(key)}.pt"

    def _save(self, key: str, content: dict[str, Any]) -> None:
        buffer = io.BytesIO()  # torch hides the operating system's error when it writes to a file itself
        torch.save(content, buffer)
        try:
            files.write(self._path(key), buffer.getbuffer().tobytes())
        except OSError as error:
            print(
                f"resparse: cannot keep {key!r} in {paths.relative(self.folder)} ({error.strerror}); expected to write "
                f"{buffer.tell() / 2**20:.1f} MB. The run goes on, but would compute it again after a restart: make "
                "room, or delete results/cells",
                file=sys.stderr,
            )


def _begin_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started us decides what an interrupt ends
    if sys.platform == "linux":  # and should not outlive them, however they end
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


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
