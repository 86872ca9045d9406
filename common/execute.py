"""The process in which one notebook runs: `python -m common.execute job.json`, started by `common.runner`.

It is a process of its own so that the driver stays able to act: to answer a signal, to see a kernel die. It ends itself
and the kernel when its standard input closes, which happens when the driver dies, however that happens.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from common import files, notebook_html, paths

OUTCOME, CELL, NOTEBOOK, PAGE = "outcome.json", "cell.json", "notebook.ipynb", "notebook.html"


def main(job_file: str) -> int:
    """Run the job; write `outcome.json` beside the notebook. Exit status 0 means that the outcome was written."""
    threading.Thread(target=_end_with_the_driver, daemon=True).start()
    job = json.loads(Path(job_file).read_text())
    folder = Path(job["folder"])
    outcome = _execute(Path(job["source"]), folder, job["parameters"])
    try:
        _tidy(folder / NOTEBOOK, job["title"])
    except Exception as error:  # the measurement counts, its page does not
        outcome["page_error"] = f"{type(error).__name__}: {error}"
    files.write_json(folder / OUTCOME, outcome)
    return 0


def headings(notebook: Any) -> list[str]:
    """For each cell the heading it stands under, for messages that say where something happened."""
    current, found = "", []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            titles = [line.lstrip("# ").strip() for line in cell.source.splitlines() if line.startswith("#")]
            current = titles[-1] if titles else current
        found.append(current)
    return found


def _execute(source: Path, folder: Path, parameters: dict[str, Any]) -> dict[str, Any]:
    import jupytext
    import papermill
    from nbclient.exceptions import DeadKernelError

    notebook = jupytext.read(source)
    under, count = headings(notebook), len(notebook.cells) + 1  # one for the cell of injected parameters

    def on_cell_start(cell: Any, cell_index: int) -> None:
        place = {"index": cell_index + 1, "of": count, "under": under[max(0, min(cell_index - 1, len(under) - 1))]}
        files.write_json(folder / CELL, place)

    try:
        papermill.execute_notebook(
            notebook,
            str(folder / NOTEBOOK),
            parameters=parameters,
            kernel_name="python3",
            language="python",
            progress_bar=False,
            cwd=str(paths.root()),
            on_cell_start=on_cell_start,
            coalesce_streams=True,  # a progress bar leaves its last state, not each of them
        )
    except papermill.PapermillExecutionError as error:
        return {"ok": False, "kind": "error", "error": f"{error.ename}: {error.evalue}"}
    except DeadKernelError:
        return {"ok": False, "kind": "dead kernel", "error": "the kernel died"}
    except Exception as error:
        traceback.print_exc()  # into the run's log
        return {"ok": False, "kind": "execution", "error": f"{type(error).__name__}: {error}"}
    return {"ok": True}


def _tidy(path: Path, title: str) -> None:
    """Take the machine's paths out of the saved notebook and make its HTML page."""
    import nbformat

    if not path.is_file():
        return
    notebook = nbformat.read(path, as_version=4)
    for name in ("input_path", "output_path"):
        notebook.metadata.get("papermill", {}).pop(name, None)
    files.write(path, nbformat.writes(notebook))
    files.write(path.with_name(PAGE), notebook_html.render(notebook, title))


def _end_with_the_driver() -> None:
    import psutil

    os.read(0, 1)  # returns when the driver's end of the pipe closes
    for process in psutil.Process().children(recursive=True):
        process.kill()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
