"""The life of a run, as a user starts it: what becomes official, and what every kind of trouble leaves behind."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import toy_paper

from common import paths
from pipelines import run as driver

NOWHERE = "http://127.0.0.1:9"  # the discard port: nobody listens


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A house with one finished run."""
    root = toy_paper.build(tmp_path_factory.mktemp("run") / "house")
    done = toy_paper.run(root, "pipelines.run", "toy", "--profile", "smoke")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("resparse: toy/smoke finished: results/runs/toy/smoke, make ui: #/experiments/")
    return root


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def official(root: Path) -> dict[str, bytes]:
    """Every file under results/ outside the working space."""
    files = (path for path in (root / "results").rglob("*") if path.is_file())
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in files
        if path.relative_to(root).parts[1] in ("metrics", "provenance", "figures", "runs")
    }


def tracked(root: Path) -> dict[str, tuple[str, dict[str, str]]]:
    """Run id -> (status, tags) of the parent runs, read without MLflow."""
    with sqlite3.connect(root / "mlflow.db") as store:
        runs = store.execute("select run_uuid, status from runs").fetchall()
        tags = {run: dict(store.execute("select key, value from tags where run_uuid = ?", (run,))) for run, _ in runs}
    return {run: (status, tags[run]) for run, status in runs if "mlflow.parentRunId" not in tags[run]}


def tracked_so_far(root: Path) -> dict[str, tuple[str, dict[str, str]]]:
    """The same while drivers may still be making the store."""
    try:
        return tracked(root) if (root / "mlflow.db").exists() else {}
    except sqlite3.OperationalError:  # a table is not there yet, or locked
        return {}


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 240) -> Any:
    end = time.time() + seconds
    while time.time() < end:
        if found := condition():
            return found
        time.sleep(0.2)
    raise AssertionError(f"{what} did not happen within {seconds} s")


def hanging(root: Path, driver_pid: int) -> bool:
    folder = root / "results" / "scratch" / "running" / "toy" / f"smoke-{driver_pid}"
    try:
        return "hanging" in (folder / "progress.json").read_text()
    except OSError:
        return False


def test_a_finished_run_is_official_and_tracked(house: Path) -> None:
    results = house / "results"
    assert read(results / "metrics" / "toy" / "smoke.json")["metrics"]["factor"] == {"": {"all": 2.0}}
    assert {path.name for path in (results / "figures" / "toy" / "smoke").iterdir()} == {"line.png", "figures.json"}
    left = {path.name for path in (results / "runs" / "toy" / "smoke").iterdir()}
    assert {"notebook.ipynb", "notebook.html", "curves.json", "resolved.yaml"} <= left
    assert not left & {"cell.json", "outcome.json", "progress.json", "job.json", "log.txt"}
    assert not list((results / "scratch" / "running" / "toy").iterdir())
    origin = read(results / "provenance" / "toy" / "smoke.json")
    status, tags = tracked(house)[origin["run"]]
    assert status == "FINISHED" and tags["mlflow.runName"] == "toy/smoke/no-git"
    text = json.dumps(origin)
    assert str(house) not in text and str(Path.home()) not in text


def test_a_failed_run_touches_nothing_official(house: Path) -> None:
    before = official(house)
    done = toy_paper.run(house, "pipelines.run", "toy", "--profile", "smoke", "--set", "fault=raise", "--set", "seeds=")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("resparse: toy")]
    assert said == [
        "resparse: toy: ZeroDivisionError: on purpose (in cell 8 of 9, under 'Trouble'). The partial notebook and "
        "everything measured: results/scratch/failed/toy/smoke."
    ]
    assert official(house) == before
    left = {path.name for path in (house / "results" / "scratch" / "failed" / "toy" / "smoke").iterdir()}
    assert {"notebook.ipynb", "notebook.html", "record.jsonl", "log.txt", "error.txt"} <= left
    failed = [(run, tags) for run, (status, tags) in tracked(house).items() if status == "FAILED"]
    assert len(failed) == 1 and "on purpose" in failed[0][1]["mlflow.note.content"]
    assert (house / "mlartifacts" / "toy" / failed[0][0] / "artifacts" / "notebook.html").is_file()


def test_a_trial_without_a_tracking_server_runs_and_is_not_official(house: Path) -> None:
    before = official(house)
    arguments = ("pipelines.run", "toy", "--profile", "smoke", "--set", "rate=2", "--set", "seeds=0..2")
    done = toy_paper.run(house, *arguments, MLFLOW_TRACKING_URI=NOWHERE)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith("toy/smoke  ")]  # how far it is
    assert len(said) == 1 and "MLflow did not get this run" in said[0] and "--relog" in said[0]
    assert "official results are as they were" in done.stdout and official(house) == before
    trial = read(house / "results" / "scratch" / "trials" / "toy" / "smoke" / "metrics.json")
    assert trial["params"]["rate"] == 2.0 and set(trial["metrics"]["doubled"]["all in"]) == {"0", "1", "2"}


def test_a_run_can_be_logged_again(house: Path) -> None:
    before, runs = official(house), set(tracked(house))
    done = toy_paper.run(house, "pipelines.run", "toy", "--profile", "smoke", "--relog")
    assert done.returncode == 0 and done.stdout.startswith("resparse: tracked, see")
    (new,) = set(tracked(house)) - runs
    assert tracked(house)[new][0] == "FINISHED" and tracked(house)[new][1]["relogged"] == "true"
    assert official(house) == before
    never = toy_paper.run(house, "pipelines.run", "toy", "--profile", "laptop", "--relog")
    assert never.returncode == 1 and "expected a finished run. Next: python -m pipelines.run toy" in never.stderr


def test_stopped_and_killed_drivers_beginning_at_once_on_a_fresh_store(tmp_path: Path) -> None:
    root = toy_paper.build(tmp_path / "house")
    arguments = ("pipelines.run", "toy", "--profile", "smoke", "--set", "fault=hang", "--set", "seeds=1")
    stopped, killed = toy_paper.start(root, *arguments), toy_paper.start(root, *arguments)
    try:
        for process in (stopped, killed):
            wait_for(lambda pid=process.pid: hanging(root, pid), "the notebook's last cell")
        wait_for(lambda: len(tracked_so_far(root)) == 2, "two tracked runs")
        families = [psutil.Process(process.pid).children(recursive=True) for process in (stopped, killed)]
        assert all(len(family) >= 2 for family in families), "the notebook's process and its kernel"
        stopped.send_signal(signal.SIGTERM)
        killed.kill()
        said = stopped.communicate(timeout=60)[0]
        killed.communicate(timeout=60)
        wait_for(lambda: not any(child.is_running() for family in families for child in family), "the kernels' end")
    finally:
        for process in (stopped, killed):
            process.kill()
    assert stopped.returncode == 128 + signal.SIGTERM
    assert "resparse: toy: stopped by SIGTERM. The partial notebook" in said
    assert not official(root)
    assert sorted(status for status, _ in tracked(root).values()) == ["KILLED", "RUNNING"]
    assert len({tags["mlflow.runName"] for _, tags in tracked(root).values()}) == 1
    with sqlite3.connect(root / "mlflow.db") as store:
        homes = store.execute("select distinct e.name from runs r join experiments e using (experiment_id)").fetchall()
    assert homes == [("toy",)], "none in Default"
    done = toy_paper.run(root, "pipelines.setup")
    assert done.returncode == 0 and "1 run(s) of killed drivers marked KILLED" in done.stdout
    assert {status for status, _ in tracked(root).values()} == {"KILLED"}
    left = root / "results" / "scratch" / "running" / "toy" / f"smoke-{killed.pid}" / "record.jsonl"
    assert '"metric": "doubled"' in left.read_text(), "what the killed driver's notebook had measured"
    assert len(list((root / "results" / "cells" / "toy").glob("*/seed1.pt"))) == 1


@pytest.mark.parametrize(
    ("arguments", "more", "said"),
    [
        (["tyo"], {}, "no paper 'tyo'"),
        (["toy", "--profile", "smok"], {}, "Did you mean 'smoke'?"),
        (["toy", "--set", "raet=1"], {}, "Did you mean 'rate'?"),
        (["toy", "--set", "rate=fast"], {}, "got 'fast', expected float"),
        (["toy"], {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}, "a relative path"),
        (["toy"], {"PYTHONPATH": str(toy_paper.ROOT)}, "imports the code of another checkout"),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(house: Path, arguments: list[str], more: dict, said: str) -> None:
    if "PYTHONPATH" in more:  # as an editable installation does: the working directory does not come first
        more = {**more, "PYTHONSAFEPATH": "1"}
    done = toy_paper.run(house, "pipelines.run", *arguments, **more)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("resparse: ") and done.stderr.count("\n") == 1 and said in done.stderr
    assert not list((house / "results" / "scratch" / "running" / "toy").iterdir())


def test_results_that_cannot_be_written_are_one_line(tmp_path: Path) -> None:
    root = toy_paper.build(tmp_path / "house")
    (root / "results").write_text("a file where the folder should be")
    done = toy_paper.run(root, "pipelines.run", "toy", MLFLOW_TRACKING_URI=NOWHERE)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "results" in done.stderr


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder that could be published, and an older official result."""
    (tmp_path / "papers").mkdir()
    (tmp_path / "dvc.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "metrics/toy/smoke.json": "old",
        "runs/toy/smoke/x": "old",
        "figures/toy/smoke/x": "old",
    }.items():
        (paths.results() / name).parent.mkdir(parents=True)
        (paths.results() / name).write_text(text)
    folder = paths.running("toy", "smoke", 1)
    (folder / "figures").mkdir(parents=True)
    (folder / "figures" / "new.png").write_text("new")
    (folder / "metrics.json").write_text("new")
    (folder / "provenance.json").write_text('{"started": "now"}')
    return folder


def test_publishing_replaces_folders_as_a_whole(ready: Path) -> None:
    assert driver._publish("toy", "smoke", ready, "abc") == paths.run("toy", "smoke")
    assert paths.metrics("toy", "smoke").read_text() == "new" and not ready.exists()
    assert read(paths.provenance("toy", "smoke"))["run"] == "abc"
    assert [path.name for path in paths.figures("toy", "smoke").iterdir()] == ["new.png"]
    assert [path.name for path in paths.figures("toy", "smoke").parent.iterdir()] == ["smoke"], "no litter"
    assert not (paths.run("toy", "smoke") / "x").exists()


def test_a_full_disk_while_publishing_keeps_the_old_and_the_new(ready: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        Path(target).mkdir()
        (Path(target) / "half").write_text("")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(OSError, match="No space"):
        driver._publish("toy", "smoke", ready, "abc")
    assert paths.metrics("toy", "smoke").read_text() == "old"
    assert [path.name for path in paths.figures("toy", "smoke").parent.rglob("*")] == ["smoke", "x"]
    assert (ready / "metrics.json").read_text() == "new", "what was measured is still in the run's folder"


def test_what_killed_drivers_left_is_moved_away(ready: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = paths.running("toy", "laptop", gone.pid)
    left.mkdir(parents=True)
    (left / "record.jsonl").write_text("measured")
    driver._clear_dead(left.parent)
    assert (paths.failed("toy", "laptop") / "record.jsonl").read_text() == "measured"
    assert not left.exists() and ready.exists(), "process 1 is alive"
