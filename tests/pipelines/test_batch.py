"""Batches: every cell a row, whatever happens to it; a restart skips what is done, a stop leaves nothing half-made."""

from __future__ import annotations

import csv
import io
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from common import params
from pipelines import batch as batches
from pipelines import batch_report
from pipelines.batch import Batch, BatchError, Cell
from pipelines.executors import Job, Outcome
from tests.support import toy_paper

CLI = "pipelines.cli"


def cell(key: str, seed: int = 0, **swept: str) -> Cell:
    return Cell(key, seed, swept, {"seeds": [seed]})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root for results, without a paper in it."""
    (tmp_path / "papers").mkdir()
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


class FakeExecutor:
    """Ends jobs as told, in order; a row in `writes` is written by the 'worker' first."""

    def __init__(self, statuses: dict[str, int], writes: dict[str, str] | None = None, stop_after: int = 99) -> None:
        self.statuses, self.writes, self.stop_after = statuses, writes or {}, stop_after
        self.ran: list[str] = []

    def run(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        for number, job in enumerate(jobs):
            if number == self.stop_after:
                raise KeyboardInterrupt
            asked = json.loads(Path(job.command[-1]).read_text())
            self.ran.append(job.key)
            Path(asked["folder"]).mkdir(parents=True)
            job.log.parent.mkdir(parents=True, exist_ok=True)
            job.log.write_text("starting\nout of luck\n")
            if job.key in self.writes:
                Path(asked["row"]).parent.mkdir(parents=True, exist_ok=True)
                Path(asked["row"]).write_text(self.writes[job.key])
            yield Outcome(job.key, self.statuses.get(job.key, 0), 1.5)


def done(key: str, metrics: dict[str, Any] | None = None, **swept: str) -> str:
    row = {"key": key, "status": "done", "seed": 0, "swept": swept, "metrics": metrics or {}, "error": "", "seconds": 1}
    return json.dumps(row)


def ignore(*_: Any) -> None:
    pass


def test_a_worker_that_dies_is_a_row_with_its_signal_and_last_words(folder: Path) -> None:
    batch = Batch("toy", "smoke", "b", (cell("a"), cell("b")))
    told = {}
    executor = FakeExecutor({"a": -9, "b": 0}, {"b": done("b")})
    batches.execute(batch, executor, tell=lambda cell, row: told.update({cell.key: row["status"]}))
    assert told == {"a": "failed", "b": "done"}
    row = json.loads((folder / "results/batch/toy/b/cells/a.json").read_text())
    assert "SIGKILL" in row["error"] and "out of luck" in row["error"]
    assert row["params"] == {"seeds": [0]} and row["seconds"] == 1.5


def test_a_restart_skips_done_cells_and_tries_failed_and_damaged_ones_again(folder: Path) -> None:
    batch = Batch("toy", "smoke", "b", (cell("good"), cell("bad"), cell("torn"), cell("new")))
    rows = folder / "results/batch/toy/b/cells"
    rows.mkdir(parents=True)
    (rows / "good.json").write_text(done("good"))
    (rows / "bad.json").write_text(done("bad").replace("done", "failed"))
    (rows / "torn.json").write_text(done("torn")[:20])
    executor = FakeExecutor({}, {key: done(key) for key in ("bad", "torn", "new")})
    batches.execute(batch, executor, tell=ignore)
    assert executor.ran == ["bad", "torn", "new"]
    again = FakeExecutor({})
    assert batches.execute(batch, again, tell=ignore) == [] and again.ran == []


def test_ctrl_c_keeps_rows_and_removes_what_is_unfinished(folder: Path) -> None:
    batch = Batch("toy", "smoke", "b", (cell("first"), cell("second"), cell("third")))
    executor = FakeExecutor({}, {"first": done("first")}, stop_after=1)
    (batch.folder / "cells").mkdir(parents=True)
    (batch.folder / "cells" / ".second.json.ab.tmp").touch()
    batch.run_folder(batch.cells[1]).mkdir(parents=True)
    with pytest.raises(batches.Interrupted):
        batches.execute(batch, executor, tell=ignore)
    assert [path.name for path in (batch.folder / "cells").iterdir()] == ["first.json"]
    assert [path.name for path in (batch.folder / "runs").iterdir()] == ["first"]
    assert not (batch.folder / "jobs").exists()


def test_two_processes_on_one_batch_are_refused(folder: Path) -> None:
    batch = Batch("toy", "smoke", "b", (cell("a"),))
    with batches._alone(batch), pytest.raises(BatchError, match="another process is running"):
        batches.execute(batch, FakeExecutor({}), tell=ignore)
    batches.execute(batch, FakeExecutor({}, {"a": done("a")}), tell=ignore)  # the lock is gone with its holder


def test_the_table_is_the_mean_and_sample_deviation_over_seeds(folder: Path) -> None:
    values = {"36": [1.0, 2.0, 4.0], "18": [5.0, None, 7.0]}
    cells, writes = [], {}
    for views, column in values.items():
        for seed, value in enumerate(column):
            key = f"v{views}s{seed}"
            cells.append(cell(key, seed, views=views))
            metrics = {"psnr": {"unet": {str(seed): value}, "fbp": {"all": 3.0}}}
            writes[key] = done(key, metrics, views=views)
    batch = Batch("toy", "smoke", "b", (*cells, cell("gone", 9, views="36")))
    batches.execute(batch, FakeExecutor({"gone": -11}, writes), tell=ignore)
    lines = {(line.variant, line.swept["views"]): line for line in batch_report.lines(batch_report.rows(batch))}
    assert (lines["unet", "36"].mean, lines["unet", "36"].n) == (pytest.approx(7 / 3), 3)
    assert lines["unet", "36"].std == pytest.approx(statistics.stdev([1.0, 2.0, 4.0]))
    assert (lines["unet", "18"].mean, lines["unet", "18"].n) == (6.0, 2)  # a value that is not finite does not count
    assert lines["fbp", "18"].std == 0.0

    summary, table = batch_report.write(batch, "resparse batch toy")
    told = json.loads(summary.read_text())
    assert told["cells"] == {"planned": 7, "done": 6, "failed": 1}
    assert "SIGSEGV" in told["errors"]["gone"]
    found = list(csv.DictReader(io.StringIO(table.read_text())))
    assert [(r["views"], r["value"]) for r in found if r["variant"] == "unet"][3:] == [
        ("18", "5.0"),
        ("18", "nan"),
        ("18", "7.0"),
    ]
    assert [row["status"] for row in found if row["cell"] == "gone"] == ["failed"]


def test_the_printed_table_can_be_narrowed_to_known_metrics(folder: Path) -> None:
    from rich.console import Console

    metrics = {"psnr": {"unet": {"0": 31.25}}, "ssim": {"unet": {"0": 0.5}}}
    batch = Batch("toy", "smoke", "b", (cell("a"),))
    batches.execute(batch, FakeExecutor({}, {"a": done("a", metrics)}), tell=ignore)
    console = Console(width=100, record=True, file=io.StringIO())
    batch_report.print_table(batch, console, show=["psnr"])
    text = console.export_text()
    assert "31.25" in text and "ssim" not in text
    with pytest.raises(BatchError, match="Did you mean 'psnr'"):
        batch_report.print_table(batch, console, show=["psrn"])


def test_the_plan_crosses_values_with_seeds_and_names_cells_by_content() -> None:
    batch = batches.plan("gloredi", "smoke", seeds="0..3", sweeps=["views=18,36", "clamp=true,false"])
    assert len(batch.cells) == len({cell.key for cell in batch.cells}) == 4 * 2 * 2
    first = batch.cells[0]
    assert (first.seed, dict(first.swept)) == (0, {"views": "18", "clamp": "True"})
    assert (first.values["views"], first.values["seeds"], first.values["clamp"]) == ([18], [0], True)
    assert first.key.startswith("views=18-clamp=True-seed0-")

    more = batches.plan("gloredi", "smoke", seeds="0..4", sweeps=["views=18,36", "clamp=true,false"])
    assert {cell.key for cell in batch.cells} < {cell.key for cell in more.cells}, "more seeds keep the finished ones"
    other = batches.plan("gloredi", "smoke", seeds="0..3", sweeps=["views=18,36", "clamp=true,false", "steps=7"])
    assert not {cell.key[-10:] for cell in batch.cells} & {cell.key[-10:] for cell in other.cells}


def test_without_seeds_the_profile_says_which() -> None:
    batch = batches.plan("gloredi", "smoke")
    cls = params.settings("gloredi")
    assert [cell.seed for cell in batch.cells] == params.load(cls, "gloredi", "smoke").seeds
    assert batch.name == "smoke"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"sweeps": ["seeds=0,1"]}, "--seeds 0..7"),
        ({"sweeps": ["views=18", "views=36"]}, "views=a,b"),
        ({"seeds": "0,0"}, "each once"),
        ({"name": "../elsewhere"}, "batch name"),
    ],
)
def test_what_cannot_be_crossed_is_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(BatchError, match=said):
        batches.plan("gloredi", "smoke", **arguments)


@pytest.mark.parametrize("sweep", ["vievs=18", "views=many", "views"])
def test_what_is_no_parameter_is_refused_before_anything_runs(sweep: str) -> None:
    with pytest.raises(params.ParamError):
        batches.plan("gloredi", "smoke", sweeps=[sweep])


@pytest.mark.slow
def test_a_batch_from_the_command_line(tmp_path: Path) -> None:
    """One good and one killed cell, in real kernels: two rows, one of them with its error."""
    root = toy_paper.build(tmp_path / "house")
    command = [CLI, "batch", "toy", "--profile", "smoke", "--jobs", "2"]
    first = toy_paper.run(root, *command, "--seeds", "3", "--set", "fault=none,kill")
    assert first.returncode == 1, first.stderr
    home = root / "results" / "batch" / "toy" / "smoke"
    rows = {row["swept"]["fault"]: row for row in (json.loads(p.read_text()) for p in home.glob("cells/*.json"))}
    assert (rows["none"]["status"], rows["kill"]["status"]) == ("done", "failed")
    assert rows["none"]["metrics"]["doubled"]["all in"] == {"3": pytest.approx(2 * (3 + 1e-4))}
    assert "kernel died" in rows["kill"]["error"] and "kernel died" in first.stdout + first.stderr
    assert not (root / "results" / "metrics").exists(), "a batch publishes nothing"

    told = list(csv.DictReader(io.StringIO((home / "cells.csv").read_text())))
    assert {row["fault"] for row in told if row["error"]} == {"kill"}
    _assert_tracked_with_children(root, batches_=1, children=1)


def _assert_tracked_with_children(root: Path, batches_: int, children: int) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("toy")
    assert experiment
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "batch" in run.data.tags and "cell" not in run.data.tags]
    cells = [run for run in runs if "cell" in run.data.tags]
    assert (len(parents), len(cells)) == (batches_, children)
    assert {run.data.tags["mlflow.parentRunId"] for run in cells} == {run.info.run_id for run in parents}
    assert {run.info.status for run in runs} == {"FINISHED"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopping_the_batch_stops_its_kernels(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C ends it in order; after SIGKILL, which nobody can answer, workers and kernels end by themselves."""
    root = toy_paper.build(tmp_path / "house")
    started = toy_paper.start(root, CLI, "batch", "toy", "--profile", "smoke", "--seeds", "0", "--set", "fault=hang")
    home = root / "results" / "batch" / "toy" / "smoke"
    try:
        _wait_for(lambda: any("hanging" in path.read_text() for path in home.glob("runs/*/progress.json")))
        family = psutil.Process(started.pid).children(recursive=True)
        assert len(family) >= 3, "a worker, the notebook's process, a kernel"
        started.send_signal(number)
        said, _ = started.communicate(timeout=60)
        _, alive = psutil.wait_procs(family, timeout=30)
        assert not alive
    finally:
        started.kill()
    assert not list(home.glob("cells/*"))
    if number == signal.SIGINT:
        assert started.returncode == 130
        assert "0 of 1 cells done" in said and "To go on: resparse batch toy" in said and "Traceback" not in said
        assert not list(home.glob("runs/*")) and not (home / "jobs").exists()


def _wait_for(condition: Any, seconds: float = 180) -> None:
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, "it never came to that"
        time.sleep(0.1)


def test_planning_imports_no_tracking() -> None:
    """Workers import this module: they must stay able to run where mlflow is not."""
    code = "import sys, pipelines.batch; raise SystemExit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=toy_paper.ROOT, timeout=120).returncode == 0
