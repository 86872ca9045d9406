"""Many runs of one paper's notebook: seeds crossed with values of parameters, a few at a time (`resparse batch`).

A *cell* is one run with one seed and one value of each swept parameter. Cells run in worker processes
(`pipelines/executors`), so a crash, an out-of-memory kill or a segmentation fault is a row with its error. Each writes
`results/batch/<slug>/<name>/cells/<key>.json` as a whole when it ends; the key holds a digest of parameters, sources
and kernels, so that a restart skips exactly what is still true. Workers touch neither DVC nor MLflow; the parent logs
at the end. Batches never feed the board: that is what `resparse run` and `dvc repro` do.

    python -m pipelines.batch <job.json>      one cell, started by the executor
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import files, params, paths, provenance, runner
from pipelines.executors import Executor, Job, Outcome


class BatchError(ValueError):
    """A batch that cannot be planned or begun: what, got, expected, next step."""


class Interrupted(Exception):
    """The user stopped the batch; finished cells are kept."""


@dataclass(frozen=True)
class Cell:
    """One run of the notebook; `swept` names its place in the table, `values` are all its parameters."""

    key: str
    seed: int
    swept: Mapping[str, str]
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Batch:
    """What is asked for, and where its files are."""

    slug: str
    profile: str
    name: str
    cells: tuple[Cell, ...]

    @property
    def folder(self) -> Path:
        return paths.results() / "batch" / self.slug / self.name

    def row_path(self, cell: Cell) -> Path:
        return self.folder / "cells" / f"{cell.key}.json"

    def run_folder(self, cell: Cell) -> Path:
        """Record, executed notebook and log of the cell's run."""
        return self.folder / "runs" / cell.key

    def row(self, cell: Cell) -> dict[str, Any] | None:
        """The cell's row, done or failed; None before it has one, or if the file is damaged."""
        try:
            return json.loads(self.row_path(cell).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def is_done(self, cell: Cell) -> bool:
        return (self.row(cell) or {}).get("status") == "done"


def plan(slug: str, profile: str, *, seeds: str = "", sweeps: Sequence[str] = (), name: str = "") -> Batch:
    """Cross the swept values with the seeds, and check every cell's parameters before anything runs.

    seeds: such as `0..7` or `0,3`; empty for the profile's own. sweeps: such as `views=18,36`, one value a cell (for a
        list parameter a list of one). name: the batch's folder; the profile's name if empty.

    Raises params.ParamError for an unknown paper, profile, parameter or value, BatchError for what cannot be crossed.
    """
    cls = params.settings(slug)
    runner.check(slug)
    name = name or profile
    if not re.fullmatch(r"[A-Za-z0-9][\w.=,-]*", name):
        raise BatchError(f"got the batch name {name!r}, expected letters, digits and any of . _ - = , for a folder.")
    wanted = params.parse_assignment(cls, f"seeds={seeds}")[1] if seeds else params.load(cls, slug, profile).seeds
    axes = [params.parse_sweep(cls, text) for text in sweeps]
    _require_crossable(wanted, [axis for axis, _ in axes])
    sources = [provenance.sources_digest(slug), str(provenance.kernel_info().get("stamp") or "")]
    cells = []
    for choice in itertools.product(*(values for _, values in axes)):
        swept = {axis: value for (axis, _), value in zip(axes, choice, strict=True)}
        for seed in wanted:
            values = params.resolved(params.load(cls, slug, profile, {**swept, "seeds": [seed]}))
            labels = {axis: _label(value) for axis, value in swept.items()}
            digest = files.digest([slug, profile, json.dumps(values, sort_keys=True), *sources])
            cells.append(Cell(_key(labels, seed, digest), seed, labels, values))
    return Batch(slug, profile, name, tuple(cells))


def execute(batch: Batch, executor: Executor, *, tell: Callable[[Cell, dict[str, Any]], None]) -> list[Cell]:
    """Run the cells that are not done yet (failed ones again); returns those that ran.

    tell: called with each cell and its row as it ends.

    Raises BatchError if another process runs this batch, Interrupted on Ctrl-C or SIGTERM: by then every worker is
    stopped, finished cells have their rows, and unfinished ones have left nothing.
    """
    with _alone(batch), _sigterm_as_ctrl_c():
        todo = {cell.key: cell for cell in batch.cells if not batch.is_done(cell)}
        for cell in todo.values():
            batch.row_path(cell).unlink(missing_ok=True)
        outcomes = executor.run([_job(batch, cell) for cell in todo.values()])
        try:
            with contextlib.closing(outcomes):  # type: ignore[type-var]
                for outcome in outcomes:
                    cell = todo[outcome.key]
                    tell(cell, _settled(batch, cell, outcome))
        except KeyboardInterrupt:
            raise Interrupted from None
        finally:
            _remove_unfinished(batch)
    return list(todo.values())


def log(batch: Batch, cells: Sequence[Cell]) -> None:
    """One tracked run for the batch with a child for each of `cells` that is done; a broken store costs one line."""
    done = [cell for cell in cells if batch.is_done(cell)]
    if not done:
        return
    from common import tracking

    tags = {"batch": batch.name}
    try:
        parent = tracking.Run(batch.slug, batch.profile, tags)
        parent.start({"batch": batch.name, "cells": len(done), "swept": sorted({k for c in done for k in c.swept})})
        for cell in done if parent.id else []:
            child = {**tags, "cell": cell.key, "mlflow.parentRunId": parent.id}
            tracking.log_folder(batch.slug, batch.profile, batch.run_folder(cell), child)
        parent.finish("FINISHED")
    except Exception as error:  # the rows are on disk, whatever the dashboard thinks
        print(f"resparse: the batch is not tracked ({str(error).splitlines()[0]}); its rows are kept", file=sys.stderr)


def work(job_file: Path) -> int:
    """One cell, in a worker process: run the notebook, write the row. A failure of the notebook is a row too."""
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds through the runner, which ends the kernel
    job = json.loads(job_file.read_text(encoding="utf-8"))
    folder, began = Path(job["folder"]), time.perf_counter()
    row = {name: job[name] for name in ("key", "paper", "profile", "seed", "swept", "params")}
    try:
        runner.execute_notebook(job["paper"], job["profile"], job["params"], folder)
    except runner.RunFailed as error:
        row |= {"status": "failed", "error": str(error), "metrics": {}}
    else:
        measured, origin = (json.loads((folder / f"{name}.json").read_text()) for name in ("metrics", "provenance"))
        about = {name: origin[name] for name in ("git", "device", "sources_digest", "params_digest", "data")}
        about["kernels"] = origin["kernels"].get("stamp") or ""
        row |= {"status": "done", "error": "", "metrics": measured["metrics"], "provenance": about}
    row["seconds"] = round(time.perf_counter() - began, 2)
    files.write_json(Path(job["row"]), row)
    return 0


def _require_crossable(seeds: Sequence[int], axes: Sequence[str]) -> None:
    if "seeds" in axes:
        raise BatchError("got --set seeds=..., expected the seeds in an option of their own: --seeds 0..7")
    twice = sorted({axis for axis in axes if axes.count(axis) > 1})
    if twice:
        raise BatchError(f"got --set {twice[0]}=... twice, expected all its values at once: --set {twice[0]}=a,b")
    if not seeds or len(set(seeds)) < len(seeds):
        raise BatchError(f"got the seeds {list(seeds)}, expected at least one, and each once; for example --seeds 0..7")


def _label(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _key(labels: Mapping[str, str], seed: int, digest: str) -> str:
    """A file name a reader recognises, made unique by the digest."""
    readable = "-".join([*(f"{axis}={label}" for axis, label in labels.items()), f"seed{seed}"])
    return f"{re.sub(r'[^A-Za-z0-9._=-]', '_', readable)[:100]}-{digest[:10]}"


def _job(batch: Batch, cell: Cell) -> Job:
    folder = batch.run_folder(cell)
    shutil.rmtree(folder, ignore_errors=True)
    job_file = batch.folder / "jobs" / f"{cell.key}.json"
    about = {"key": cell.key, "paper": batch.slug, "profile": batch.profile, "seed": cell.seed}
    about |= {"swept": dict(cell.swept), "params": dict(cell.values)}
    files.write_json(job_file, {**about, "folder": str(folder), "row": str(batch.row_path(cell))})
    command = [sys.executable, "-m", "pipelines.batch", str(job_file)]
    return Job(cell.key, command, paths.root(), batch.folder / "logs" / f"{cell.key}.txt")


def _settled(batch: Batch, cell: Cell, outcome: Outcome) -> dict[str, Any]:
    """The row that the worker wrote; for a worker that could not, one that says how it died."""
    row = batch.row(cell)
    if row is None:
        how = f"was ended by {signal.Signals(-outcome.status).name}" if outcome.status < 0 else "failed"
        words = (batch.folder / "logs" / f"{cell.key}.txt").read_text(errors="replace").strip().splitlines()
        said = f" Its last words: {words[-1]}" if words else ""
        row = {"key": cell.key, "paper": batch.slug, "profile": batch.profile, "seed": cell.seed}
        row |= {"swept": dict(cell.swept), "params": dict(cell.values), "status": "failed"}
        row |= {"error": f"the worker process {how} (status {outcome.status}).{said}", "metrics": {}}
        row["seconds"] = outcome.seconds
        files.write_json(batch.row_path(cell), row)
    return row


def _remove_unfinished(batch: Batch) -> None:
    shutil.rmtree(batch.folder / "jobs", ignore_errors=True)
    for cell in batch.cells:
        if batch.row(cell) is None:
            shutil.rmtree(batch.run_folder(cell), ignore_errors=True)
            (batch.folder / "logs" / f"{cell.key}.txt").unlink(missing_ok=True)
    for leftover in batch.folder.glob("cells/.*.tmp"):
        leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(batch: Batch) -> Iterator[None]:
    """Refuse a second process on the same batch; the lock goes with the process, however it ends."""
    import fcntl

    batch.folder.mkdir(parents=True, exist_ok=True)
    with (batch.folder / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BatchError(
                f"another process is running the batch {batch.name!r} of {batch.slug}, expected one at a time; wait "
                "for it, or give this one a name of its own with --name."
            ) from None
        yield


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end_with_the_parent() -> None:
    sys.stdin.buffer.read()  # returns when the parent's end of the pipe closes, however the parent ended
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1])))
