"""The record: what is reported is on disk at once, and what makes no sense is refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
from functools import partial
from operator import truediv
from pathlib import Path

import numpy as np
import pytest
import torch

from common import cells, files, interactive, paths
from common.cells import WorkerDied
from common.record import RUN_DIR, Record, RecordError

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Params:
    seeds: list[int]
    dataset: str = "made"
    steps: int = 3


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "papers" / "toy").mkdir(parents=True)
    (tmp_path / "papers" / "toy" / "toy.py").write_text("# %% [markdown]\n# # Prose\n# %%\nx = 1\n")
    (tmp_path / "papers" / "toy" / "method.py").write_text("y = 1\n")
    for name in ("common", "kernels"):
        (tmp_path / name).mkdir()
    (tmp_path / "common" / "seeds.py").write_text("")
    (tmp_path / "dvc.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(RUN_DIR, str(tmp_path / "run"))
    return tmp_path


@pytest.fixture
def record(house: Path) -> Record:
    return Record.open("toy", "smoke", Params([0, 1]))


def lines(record: Record) -> list[dict]:
    return [json.loads(line) for line in (record.folder / "record.jsonl").read_text().splitlines()]


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_metric_is_on_disk_before_the_call_returns(record: Record) -> None:
    record.metric("psnr", 34.2, variant="fbp", seed=1)
    assert [(e["metric"], e["variant"], e["seed"], e["value"]) for e in lines(record)] == [("psnr", "fbp", "1", 34.2)]


@pytest.mark.parametrize(
    "value", [2, 2.0, np.float32(2), np.array(2), torch.tensor(2.0), torch.tensor([2]), np.int64(2)]
)
def test_any_single_number_is_taken(record: Record, value: object) -> None:
    record.metric("x", value)
    record.close()
    assert json.loads((record.folder / "metrics.json").read_text())["metrics"] == {"x": {"": {"all": 2.0}}}


@pytest.mark.parametrize("value", ["2", None, 1j, torch.ones(2), [2.0]])
def test_what_is_no_number_is_refused(record: Record, value: object) -> None:
    with pytest.raises(RecordError, match=r"x: got .*expected one real number"):
        record.metric("x", value)
    assert lines(record) == []


def test_nan_stays_visible_and_fits_json(record: Record, capsys: pytest.CaptureFixture[str]) -> None:
    record.metric("loss", float("nan"), seed=0)
    record.metric("loss", float("-inf"), seed=1)
    assert "metric loss (seed 0) is nan" in capsys.readouterr().err
    record.close()
    content = json.loads((record.folder / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert content["metrics"] == {"loss": {"": {"0": None, "1": None}}}
    assert content["not_finite"] == {"loss (seed 0)": "nan", "loss (seed 1)": "-inf"}


def test_the_same_address_twice_is_refused(record: Record) -> None:
    record.metric("psnr", 1, variant="a", seed=0)
    record.metric("psnr", 1, variant="b", seed=0)
    with pytest.raises(RecordError, match=r"psnr\[a\] \(seed 0\) is already recorded"):
        record.metric("psnr", 2, variant="a", seed=0)
    with pytest.raises(RecordError, match="with and without a seed"):
        record.metric("psnr", 2, variant="a")
    record.curve("loss", [0], [1.0])
    with pytest.raises(RecordError, match="already recorded"):
        record.curve("loss", [0], [1.0])


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": "psnr-18"},
        {"name": "x", "variant": "a]"},
        {"name": "x", "variant": " a"},
        {"name": "x", "seed": 1.5},
        {"name": "x", "seed": True},
    ],
)
def test_an_address_that_no_claim_could_name_is_refused(record: Record, arguments: dict) -> None:
    with pytest.raises(RecordError, match="expected"):
        record.metric(value=1.0, **arguments)


def test_curves_need_a_value_for_each_step(record: Record) -> None:
    with pytest.raises(RecordError, match="2 steps and 1 values"):
        record.curve("loss", [0, 1], [1.0])
    record.curve("loss", [0, 1], [torch.tensor(1.0), float("nan")], seed=3)
    record.metric("x", 1)
    record.close()
    curves = json.loads((record.folder / "curves.json").read_text())
    assert curves == {"loss": {"": {"3": {"steps": [0.0, 1.0], "values": [1.0, None]}}}}


def test_data_of_one_name_has_one_content(record: Record) -> None:
    record.data("tooth", sha256="aa")
    record.data("tooth", sha256="aa")
    with pytest.raises(RecordError, match="got sha256 bb, had aa"):
        record.data("tooth", sha256="bb")


def test_figures_are_bounded_named_and_captioned(record: Record) -> None:
    from matplotlib import image
    from matplotlib.figure import Figure

    figure = Figure(figsize=(30, 2))
    figure.add_subplot().plot([0, 1])
    record.figure("wide", figure, "A line.")
    assert image.imread(record.folder / "figures" / "wide.png").shape[1] <= 1600
    for name, caption, said in [
        ("wide", "x", "already"),
        ("Bad name", "x", "expected lower-case"),
        ("b", " ", "caption"),
    ]:
        with pytest.raises(RecordError, match=said):
            record.figure(name, figure, caption)
    record.metric("x", 1)
    record.close()
    assert json.loads((record.folder / "figures" / "figures.json").read_text()) == {"wide": "A line."}


def test_close_writes_the_proof_last_and_once(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecordError, match="holds no metric"):
        record.close()
    record.metric("x", 1)
    record.data("tooth", sha256="aa")
    written: list[str] = []
    original = files.write
    monkeypatch.setattr(files, "write", lambda path, fill: (written.append(path.name), original(path, fill)))
    record.close()
    assert [name for name in written if name != "progress.json"][-1] == "metrics.json"
    origin = json.loads((record.folder / "provenance.json").read_text())
    assert origin["data"] == {"tooth": "aa"} and origin["interactive"] is False and origin["seconds"] >= 0
    for call in (record.close, lambda: record.metric("y", 1), lambda: record.cell("k", int)):
        with pytest.raises(RecordError, match="is closed"):
            call()


def test_a_driven_run_has_one_record(record: Record) -> None:
    with pytest.raises(RecordError, match="already has a record"):
        Record.open("toy", "smoke", Params([0]))


def test_a_full_disk_loses_no_metric(record: Record, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    record.metric("before", 1)
    with monkeypatch.context() as full:
        full.setattr(Path, "open", no_space)
        record.metric("x", 1)
        record.metric("y", 2)
    said = capsys.readouterr().err
    assert said.count("No space left on device") == 1 and "stay in memory" in said and "Make room" in said
    record.close()
    assert [entry["metric"] for entry in lines(record)] == ["before", "x", "y"]


def test_a_killed_process_loses_nothing_it_reported(house: Path) -> None:
    code = (
        "import os, dataclasses\nfrom common.record import Record\n"
        "P = dataclasses.make_dataclass('P', [('seeds', list[int])], frozen=True)\n"
        "record = Record.open('toy', 'smoke', P([0]))\n"
        "record.metric('x', 1)\nrecord.cell('a', lambda: 1)\nos.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT), RUN_DIR: str(house / "killed")})
    assert done.returncode == -9
    assert '"metric": "x"' in (house / "killed" / "record.jsonl").read_text()
    assert list((house / "results" / "cells" / "toy").glob("*/a.pt"))
    assert not (house / "killed" / "metrics.json").exists()


# cells


def again(
    house: Path, monkeypatch, *, params: Params | None = None, profile: str = "smoke", name: str = "again"
) -> Record:
    monkeypatch.setenv(RUN_DIR, str(house / name))
    return Record.open("toy", profile, params or Params([0, 1]))


def test_a_cell_is_computed_once_also_after_a_restart(house: Path, record: Record, monkeypatch) -> None:
    calls: list[int] = []
    work = lambda: (calls.append(1), torch.arange(3))[1]  # noqa: E731
    assert torch.equal(record.cell("a/1", work), torch.arange(3))
    assert torch.equal(record.cell("a/1", work), torch.arange(3))
    more_seeds = again(house, monkeypatch, params=Params([0, 1, 2]))
    assert torch.equal(more_seeds.cell("a/1", work), torch.arange(3))
    assert len(calls) == 1
    more_seeds.cell("a_1", work)
    assert len(calls) == 2, "keys that differ only in what a file name cannot hold are different keys"
    more_seeds.metric("x", 1)
    more_seeds.close()
    assert json.loads((more_seeds.folder / "provenance.json").read_text())["cells"]["restored"] == 1


@pytest.mark.parametrize("change", ["parameter", "profile", "method", "notebook code", "common", "kernels", "fn"])
def test_a_cell_is_computed_again_when_it_could_differ(house: Path, record: Record, monkeypatch, change: str) -> None:
    record.cell("a", lambda: 1)
    method, notebook = house / "papers" / "toy" / "method.py", house / "papers" / "toy" / "toy.py"
    if change == "method":
        method.write_text("y = 2\n")
    if change == "notebook code":
        notebook.write_text(notebook.read_text() + "z = 1\n")
    if change in ("common", "kernels"):
        (house / change / "ct").mkdir()
        (house / change / "ct" / "new.py").write_text("")
    steps = 4 if change == "parameter" else 3
    other = again(
        house, monkeypatch, params=Params([0], steps=steps), profile="laptop" if change == "profile" else "smoke"
    )
    assert other.cell("a", (lambda: 2 + 0 * steps) if change == "fn" else (lambda: 1)) == (2 if change == "fn" else 1)
    assert other._cells["computed"] == 1 and other._cells["restored"] == 0


def test_a_cell_is_kept_when_only_prose_or_claims_change(house: Path, record: Record, monkeypatch) -> None:
    work = lambda: 1  # noqa: E731
    record.cell("a", work)
    notebook = house / "papers" / "toy" / "toy.py"
    notebook.write_text(notebook.read_text().replace("Prose", "Better prose"))
    (house / "papers" / "toy" / "claims.yaml").write_text("- id: new\n")
    (house / "kernels" / "bench.py").write_text("")
    other = again(house, monkeypatch)
    other.cell("a", work)
    assert other._cells["restored"] == 1


def test_a_helper_changed_in_an_open_notebook_counts() -> None:
    def digest(body: str) -> str:
        space: dict = {"__name__": "__main__"}
        exec(f"def helper():\n    return {body}\ndef work():\n    return helper()\n", space)
        return cells._code_digest(space["work"])

    assert digest("1") == digest("1") != digest("2")


def test_restoring_a_cell_does_not_shift_the_ones_after_it(house: Path, record: Record, monkeypatch) -> None:
    first = lambda: float(torch.rand(()))  # noqa: E731
    second = lambda: float(np.random.rand())  # noqa: E731
    torch.manual_seed(0)
    record.cell("first", first)
    uninterrupted = record.cell("second", second), float(torch.rand(()))
    next(house.glob("results/cells/toy/*/second.pt")).unlink()
    torch.manual_seed(0)
    other = again(house, monkeypatch)
    other.cell("first", first)
    assert (other.cell("second", second), float(torch.rand(()))) == uninterrupted


def test_a_full_disk_while_caching_costs_a_warning_not_the_result(record: Record, monkeypatch, capsys) -> None:
    with monkeypatch.context() as full:
        full.setattr(cells.files, "write", no_space)
        assert record.cell("a", lambda: {"psnr": 30}) == {"psnr": 30}
    said = capsys.readouterr().err
    assert "cannot keep 'a' in results/cells/toy/" in said and "No space left on device" in said and "make room" in said
    assert not list(paths.results().glob("cells/**/*.pt"))


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    target = tmp_path / "metrics.json"
    files.write(target, "old")
    with pytest.raises(OSError, match="No space"):
        files.write(target, no_space)
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_a_damaged_cell_is_computed_again(record: Record, capsys: pytest.CaptureFixture[str]) -> None:
    work = lambda: 1  # noqa: E731
    record.cell("a", work)
    next(paths.results().glob("cells/toy/*/a.pt")).write_bytes(b"half a fi")
    assert record.cell("a", work) == 1
    assert "cannot be read" in capsys.readouterr().err
    assert record._cells["computed"] == 2


def test_an_unwritable_folder_is_one_clear_error(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (house / "blocked").write_text("a file where the folder should be")
    monkeypatch.setenv(RUN_DIR, str(house / "blocked" / "run"))
    with pytest.raises(OSError, match="blocked"):
        Record.open("toy", "smoke", Params([0]))


# progress and notebooks opened by hand


def test_progress_beats_the_heart_and_shows_its_numbers(record: Record, monkeypatch, capsys) -> None:
    monkeypatch.setattr(record, "_beat", 0.0)
    bar = record.progress(range(3), "training")
    for _ in bar:
        bar.set_postfix(loss=torch.tensor(0.12345))
    beat = json.loads((record.folder / "progress.json").read_text())
    assert beat["message"].startswith("training: 1/3") and "loss=0.1235" in capsys.readouterr().out


def test_by_hand_it_writes_to_scratch_and_shows_verdicts(house: Path, monkeypatch, capsys) -> None:
    monkeypatch.delenv(RUN_DIR)
    tracked: list[tuple] = []
    monkeypatch.setattr(interactive, "track", lambda *arguments: tracked.append(arguments))
    (house / "papers" / "toy" / "claims.yaml").write_text(
        '- {id: two, text: It is two., source: ours, kind: invariant, metric: x, expect: "= 2", seeds: 0,\n'
        "   needs: {profile: smoke}}\n"
    )
    for _ in range(2):  # run again: it starts anew and keeps what the last one reported
        record = Record.open("toy", "smoke", Params([0]))
        record.metric("x", 2)
    record.close()
    assert record.folder == house / "results" / "scratch" / "toy" / "smoke" and record.interactive
    assert (record.folder / "record.previous.jsonl").exists() and (record.folder / "metrics.json").exists()
    said = capsys.readouterr().out
    assert "It is two." in said and "reproduced" in said
    assert tracked == [("toy", "smoke", record.folder)]
    assert not (house / "results" / "metrics").exists()


def test_by_hand_a_tracking_failure_is_one_line(house: Path, monkeypatch, capsys) -> None:
    monkeypatch.delenv(RUN_DIR)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///relative.db")
    record = Record.open("toy", "smoke", Params([0]))
    record.metric("x", 2)
    record.close()
    said = capsys.readouterr().out
    assert "this run is not tracked" in said and "relative path" in said


@pytest.mark.parametrize("workers", [1, 2])
def test_many_cells_at_once_are_as_one_after_another(house: Path, record: Record, workers: int) -> None:
    jobs = {f"half of {n}": partial(truediv, n, 2) for n in (3, 1, 2)}
    expected = {"half of 3": 1.5, "half of 1": 0.5, "half of 2": 1.0}
    found = record.cells(jobs, workers=workers)
    assert found == expected and list(found) == list(expected)
    again = Record("toy", "smoke", Params([0, 1]), house / "again", interactive=False)
    assert again.cells({**jobs, "half of 8": partial(truediv, 8, 2)}, workers=workers) == {**expected, "half of 8": 4.0}
    assert again._cells["restored"] == 3 and again._cells["computed"] == 1


def test_workers_are_processes_of_one_thread(record: Record) -> None:
    found = record.cells({"threads": torch.get_num_threads, "process": os.getpid}, workers=2)
    assert found["threads"] == 1 and found["process"] != os.getpid()


def test_a_cell_that_fails_among_many_ends_them_and_keeps_the_finished(house: Path, record: Record) -> None:
    jobs = {"good": partial(truediv, 2, 2), "bad": partial(truediv, 1, 0)}
    record.cells({"good": jobs["good"]}, workers=2)
    again = Record("toy", "smoke", Params([0, 1]), house / "again", interactive=False)
    with pytest.raises(ZeroDivisionError):
        again.cells(jobs, workers=2)
    assert again._cells["restored"] == 1


def test_a_killed_worker_is_one_clear_error(record: Record) -> None:
    with pytest.raises(WorkerDied, match=r"one of doomed was killed.*fewer workers"):
        record.cells({"doomed": os.abort}, workers=2)
    with pytest.raises(RecordError, match="workers: got 0"):
        record.cells({"x": int}, workers=0)
