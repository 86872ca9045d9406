"""Running a paper's notebook: checked before, watched while it runs, believed only on proof.

The percent file is the source; jupytext reads it, papermill runs it with typed parameters in the kernel `python3` of
this very interpreter. A run has succeeded when the notebook ended *and* `metrics.json` is there: after an out-of-memory
kill the saved notebook looks complete, so it is not asked.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from common import execute, files, params, paths, record

TICK_S = 0.5
PATIENCE_S = 5.0  # between asking a process to end and ending it
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class RunFailed(RuntimeError):
    """A run that did not succeed; the text is one paragraph for the user."""


class NotebookError(ValueError):
    """A notebook that cannot be driven: what, got, expected, next step."""


def check(slug: str) -> None:
    """Refuse a notebook whose parameters cell and dataclass differ.

    papermill would inject a parameter the notebook does not know, and warn.

    Raises NotebookError, or params.ParamError if there is no such paper.
    """
    cls, path = params.settings(slug), paths.notebook(slug)
    expected = ["profile", *(field.name for field in dataclasses.fields(cls))]
    got = parameter_names(path)
    missing = [name for name in expected if name not in got]
    extra = [name for name in got if name not in expected]
    if missing or extra:
        parts = ([f"lacks {', '.join(missing)}"] if missing else []) + (
            [f"has {', '.join(extra)}, which Params does not{params.suggest(extra[0], missing)}"] if extra else []
        )
        raise NotebookError(
            f"{paths.relative(path)}: the parameters cell {' and '.join(parts)}; expected `profile` and each field of "
            f"Params in papers/{slug}/settings.py once, with None for the profile's value"
        )


def parameter_names(path: Path) -> list[str]:
    """The names that the notebook's cell tagged `parameters` assigns.

    Raises NotebookError unless there is exactly one such cell and it only assigns.
    """
    import jupytext

    cells = [cell for cell in jupytext.read(path).cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise NotebookError(
            f"{paths.relative(path)}: got {len(cells)} cells tagged `parameters`, expected one; begin it with the line "
            '# %% tags=["parameters"]'
        )
    names = []
    for node in ast.parse(cells[0].source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if not all(isinstance(target, ast.Name) for target in targets):
            raise NotebookError(
                f"{paths.relative(path)}: line {node.lineno} of the parameters cell is `{ast.unparse(node)}`; expected "
                "only name = value there"
            )
        names += [target.id for target in targets if isinstance(target, ast.Name)]
    return names


def execute_notebook(
    slug: str,
    profile: str,
    values: Mapping[str, Any],
    folder: Path,
    *,
    tick: Callable[[int, str], None] = lambda pid, message: None,
) -> None:
    """Run the paper's notebook; its record, saved notebook, HTML page and log go into `folder`, which must be new.

    values: every parameter with its value (`params.resolved`). tick: called twice a second with the process id of the
        run and what it is doing.

    Raises RunFailed with the reason; the partial notebook is then in `folder`. Any exception raised meanwhile in this
    process (by a signal handler, or by `tick`) ends the kernel before it goes on.
    """
    folder.mkdir(parents=True)
    params.dump({"profile": profile, **values}, folder / "resolved.yaml")
    job = {
        "source": str(paths.notebook(slug)),
        "folder": str(folder),
        "parameters": {"profile": profile, **values},
        "title": f"{slug}, {profile}",
    }
    files.write_json(folder / "job.json", job)
    with _environment(folder) as environment, (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", "common.execute", str(folder / "job.json")],
            cwd=paths.root(),
            env=environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C is for the driver, which then ends the run in order
        )
        memory = _watch(process, folder, tick)
    (folder / "job.json").unlink()
    _believe(slug, folder, process.returncode, memory)


def doing(folder: Path) -> str:
    """What the run in `folder` is doing: the cell, and the last heartbeat of its record."""
    cell, beat = _read_json(folder / execute.CELL), _read_json(folder / record.HEARTBEAT)
    parts = [f"cell {cell['index']}/{cell['of']} {cell['under']}".rstrip()] if cell else ["starting"]
    return " | ".join([*parts, *([beat["message"]] if beat else [])])


@contextlib.contextmanager
def _environment(folder: Path) -> Iterator[dict[str, str]]:
    """An environment in which `python3` is this interpreter, whatever kernels and settings the user has installed."""
    with tempfile.TemporaryDirectory(prefix="resparse-") as name:
        home = Path(name)
        spec = {
            "argv": [sys.executable, "-X", "faulthandler", "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            "display_name": "Python 3",
            "language": "python",
        }
        files.write_json(home / "kernels" / "python3" / "kernel.json", spec)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_RUN")}
        search = [str(paths.root()), *filter(None, [os.environ.get("PYTHONPATH")])]
        yield {
            "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait make a busy host ten times slower
            **inherited,
            record.RUN_DIR: str(folder),
            "PYTHONPATH": os.pathsep.join(search),
            "JUPYTER_PATH": str(home),
            "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
            "IPYTHONDIR": str(home / "ipython"),
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        }


def _watch(process: subprocess.Popen[bytes], folder: Path, tick: Callable[[int, str], None]) -> float:
    """Wait for the run and leave no process of it behind; the most memory seen, as a share of the machine's."""
    import psutil

    family: set[psutil.Process] = set()
    most, total = 0.0, psutil.virtual_memory().total
    try:
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                family |= set(psutil.Process(process.pid).children(recursive=True))
                most = max(most, sum(child.memory_info().rss for child in family if child.is_running()) / total)
            tick(process.pid, doing(folder))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TICK_S)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            family |= {psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)}
        _end(family)
        process.wait()
        if process.stdin:
            process.stdin.close()
    return most


def _end(family: set[Any]) -> None:
    import psutil

    for ask in ("terminate", "kill"):
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                getattr(member, ask)()
        psutil.wait_procs(family, timeout=PATIENCE_S)
        family = {member for member in family if member.is_running() and member.status() != psutil.STATUS_ZOMBIE}


def _believe(slug: str, folder: Path, status: int, memory: float) -> None:
    """Return if the run succeeded; raise RunFailed with the reason otherwise."""
    outcome, cell = _read_json(folder / execute.OUTCOME), _read_json(folder / execute.CELL)
    where = f"in cell {cell['index']} of {cell['of']}" if cell else "before its first cell"
    if cell and cell["under"]:
        where += f", under '{cell['under']}'"
    if outcome is None:
        raise RunFailed(
            f"{slug}: the process that runs the notebook ended with status {status} {where}; expected it to report an "
            f"outcome. Its last words: {_last_line(folder / 'log.txt')}"
        )
    if not outcome["ok"] and outcome["kind"] == "dead kernel":
        raise RunFailed(f"{slug}: the kernel died {where}. {_cause_of_death(folder, memory)}")
    if not outcome["ok"]:
        raise RunFailed(f"{slug}: {_COLOURS.sub('', outcome['error']).strip()} ({where})")
    if not (folder / "metrics.json").is_file():
        raise RunFailed(
            f"{slug}: the notebook ended without metrics.json, so nothing proves that it measured what it should; "
            "expected it to call record.close() at its end"
        )


def _cause_of_death(folder: Path, memory: float) -> str:
    log = (folder / "log.txt").read_text(errors="replace")
    fatal = re.search(r"Fatal Python error: .*", log)
    if fatal:
        return f"It crashed in compiled code ({fatal[0]}); the log beside the notebook says where"
    used = f"The run used {memory:.0%} of the machine's memory when it was last seen"
    if memory > 0.7:
        return f"{used}: the system most likely ended it for lack of memory. Next: a smaller profile, or more memory"
    return f"{used}, so something else ended it: a signal, or a limit of the container. Finished cells are kept"


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "(none)"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
