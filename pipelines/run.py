"""The life of one run: `python -m pipelines.run gloredi --profile smoke [--set views=18,36 ...]`.

Parameters are merged and checked, MLflow gets a run, the notebook is executed, and only after success its metrics,
provenance, figures and executed notebook go to their official places under `results/`. A failed run leaves what it had
in `results/scratch/failed/<slug>/<profile>` and touches nothing official.

A run with `--set` is a trial: tracked and kept in `results/scratch/trials`, never official, because nothing that the
board or DVC knows would say how it was made.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
from common import execute, files, params, paths, provenance, record, runner, tracking

SAMPLE_S = 10.0  # between two looks at what the machine is doing
STOPPED = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Stopped(BaseException):
    """A signal asked the driver to stop."""

    def __init__(self, number: int):
        super().__init__(STOPPED[signal.Signals(number)])
        self.number = number


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0 success, 1 a failed run or a mistake, 128 + n after signal n."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.run", description="Run one paper's notebook.")
    parser.add_argument("slug", help="the paper's folder under papers/")
    parser.add_argument("--profile", help="smoke, laptop or paper; default: the profile of params.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a parameter: a trial")
    parser.add_argument("--relog", action="store_true", help="log the finished run to MLflow again, without running")
    chosen = parser.parse_args(arguments)
    try:
        profile = chosen.profile or params.house()[0]
        return relog(chosen.slug, profile) if chosen.relog else run(chosen.slug, profile, chosen.set)
    except (params.ParamError, runner.NotebookError, tracking.TrackingError, OSError) as error:
        print(f"resparse: {error}", file=sys.stderr)
        return 1


def run(slug: str, profile: str, assignments: list[str]) -> int:
    """Run a paper; the exit status.

    assignments: `name=value` texts that win over the profile.

    Raises params.ParamError, runner.NotebookError, tracking.TrackingError before anything starts; OSError when the
    results folder cannot be written.
    """
    _require_own_code()
    cls = params.settings(slug)
    overrides = dict(params.parse_assignment(cls, text) for text in assignments)
    values = params.resolved(params.load(cls, slug, profile, overrides))
    runner.check(slug)
    tracking.uri()
    folder = paths.running(slug, profile, os.getpid())
    _clear_dead(folder.parent)
    tags = {"overrides": json.dumps(overrides)} if overrides else {}
    tracked = tracking.Run(slug, profile, tags)
    with _signals(), _Console(f"{slug}/{profile}") as console:
        try:
            _execute(slug, profile, values, folder, tracked, console)
            with _deferred_signals():
                place = _keep_trial(slug, profile, folder) if overrides else _publish(slug, profile, folder, tracked.id)
        except (runner.RunFailed, OSError) as error:
            return _failed(slug, profile, folder, tracked, str(error), "FAILED")
        except Stopped as stop:
            _failed(slug, profile, folder, tracked, f"{slug}: stopped by {stop}", "KILLED")
            return 128 + stop.number
        tracked.log(place)
        tracked.finish("FINISHED")
    print(f"resparse: {slug}/{profile} finished: {paths.relative(place)}{f', {tracked.link}' if tracked.id else ''}")
    return 0


def relog(slug: str, profile: str) -> int:
    """Log a finished run, whose files are all there, as a new MLflow run; the exit status."""
    folder = paths.run(slug, profile)
    if not (folder / "metrics.json").is_file():
        print(
            f"resparse: nothing to log: {paths.relative(folder)}/metrics.json does not exist; expected a finished run. "
            f"Next: python -m pipelines.run {slug} --profile {profile}",
            file=sys.stderr,
        )
        return 1
    print(tracking.log_folder(slug, profile, folder, {"relogged": "true"}))
    return 0


def _execute(
    slug: str, profile: str, values: dict[str, Any], folder: Path, tracked: tracking.Run, console: _Console
) -> None:
    sampled = None

    def tick(pid: int, message: str) -> None:
        nonlocal sampled
        console.show(message)
        if sampled is None:
            tracked.start(values)  # while the notebook's process starts up: both take seconds
        if sampled is None or time.time() - sampled >= SAMPLE_S:
            tracked.sample(pid)
            sampled = time.time()

    runner.execute_notebook(slug, profile, values, folder, tick=tick)


def _publish(slug: str, profile: str, folder: Path, run_id: str) -> Path:
    """Move a successful run to its official places: each file whole, the metrics last."""
    origin = json.loads((folder / "provenance.json").read_text())
    origin["run"] = run_id
    files.write_json(folder / "provenance.json", origin)
    _drop_workings(folder)
    _replace(folder / "figures", paths.figures(slug, profile))
    files.write(paths.provenance(slug, profile), (folder / "provenance.json").read_bytes())
    files.write(paths.metrics(slug, profile), (folder / "metrics.json").read_bytes())
    provenance.remember(origin)
    _replace(folder, paths.run(slug, profile))
    shutil.rmtree(folder)
    return paths.run(slug, profile)


def _keep_trial(slug: str, profile: str, folder: Path) -> Path:
    _drop_workings(folder)
    place = paths.trial(slug, profile)
    _replace(folder, place)
    shutil.rmtree(folder)
    print("resparse: a trial, because of --set: the official results are as they were")
    return place


def _failed(slug: str, profile: str, folder: Path, tracked: tracking.Run, reason: str, status: str) -> int:
    """Keep what is there, attach it to the tracked run, say what went wrong."""
    place = paths.failed(slug, profile)
    left = ""
    if folder.is_dir():
        with contextlib.suppress(OSError):  # on a full disk the reason matters more than the note beside the notebook
            (folder / "error.txt").write_text(reason + "\n")
        shutil.rmtree(place, ignore_errors=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(place)
        left = f" The partial notebook and everything measured: {paths.relative(place)}."
    names = (execute.PAGE, execute.NOTEBOOK, "error.txt", "log.txt", "record.jsonl", "resolved.yaml")
    tracked.attach(*(place / name for name in names), note=reason)
    tracked.finish(status)
    print(f"resparse: {reason.rstrip('.')}.{left}", file=sys.stderr)
    return 1


def _drop_workings(folder: Path) -> None:
    """Files that only serve a run in progress."""
    for name in (execute.OUTCOME, execute.CELL, record.HEARTBEAT, "log.txt"):
        (folder / name).unlink(missing_ok=True)


def _replace(source: Path, target: Path) -> None:
    """Make `target` a copy of the folder `source`, with the old one in place until the new one is complete."""
    new, old = (target.with_name(f".{target.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copytree(source, new)
        if target.exists():
            target.rename(old)
        new.rename(target)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _clear_dead(folder: Path) -> None:
    """Move what drivers that were killed left behind to where failed runs are kept."""
    import psutil

    for left in folder.glob("*-*") if folder.is_dir() else ():
        profile, _, pid = left.name.rpartition("-")
        if not psutil.pid_exists(int(pid)):
            place = paths.failed(folder.name, profile)
            shutil.rmtree(place, ignore_errors=True)
            place.parent.mkdir(parents=True, exist_ok=True)
            left.rename(place)


def _require_own_code() -> None:
    """Refuse to measure one checkout with the code of another, as an editable installation does behind one's back."""
    code = Path(common.__file__).parents[1]
    if code != paths.root():
        raise params.ParamError(
            f"this is the repository {paths.root().name!r}, but Python imports the code of another checkout "
            f"({code}); expected its own. Next: use this checkout's own .venv (make setup)"
        )


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into Stopped, so that a run is ended in order."""

    def stop(number: int, _: Any) -> None:
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in STOPPED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _deferred_signals() -> Iterator[None]:
    """Nothing official may be left half-written: a signal waits for the end of this block."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPED)


class _Console:
    """One line that says what a run is doing: rewritten on a terminal, repeated now and then in a log."""

    def __init__(self, label: str, every_s: float = 20.0):
        self._label, self._every = label, every_s
        self._began, self._shown, self._last = time.time(), 0.0, ""

    def __enter__(self) -> _Console:
        return self

    def __exit__(self, *_: object) -> None:
        if sys.stderr.isatty():
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)

    def show(self, message: str) -> None:
        """Show `message` if it is time to."""
        seconds = int(time.time() - self._began)
        line = f"{self._label}  {seconds // 60}:{seconds % 60:02d}  {message}"
        if sys.stderr.isatty():
            width = os.get_terminal_size(sys.stderr.fileno()).columns
            print(f"\r\x1b[2K{line[: width - 1]}", end="", file=sys.stderr, flush=True)
        elif message != self._last and time.time() - self._shown >= self._every:
            print(line, file=sys.stderr, flush=True)
            self._shown, self._last = time.time(), message


if __name__ == "__main__":
    sys.exit(main())
