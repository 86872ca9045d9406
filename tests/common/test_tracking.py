"""Tracking: addresses that are refused, stores that are created once, runs that end, servers that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common import processes, provenance, tracking

ROOT = Path(__file__).resolve().parents[2]
SETUP = "from common import tracking; tracking.setup(['toy', 'other'])"


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A house whose store was made by two processes at the same moment."""
    root = tmp_path_factory.mktemp("tracking")
    (root / "papers" / "toy").mkdir(parents=True)
    (root / "papers" / "toy" / "toy.py").write_text("x = 1\n")
    (root / "dvc.yaml").write_text("")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")} | {"PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen([sys.executable, "-c", SETUP], cwd=root, env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=240)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    return root


@pytest.fixture
def store(house: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(house)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return house


@pytest.fixture
def finished(store: Path) -> Path:
    """The folder of a finished run, written by hand."""
    folder = store / "finished"
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    (folder / "figures" / "line.png").write_bytes(b"png")
    (folder / "notebook.html").write_text("<html></html>")
    content = {
        "metrics.json": {
            "params": {"seeds": [0, 1], "note": "x" * 7000},
            "metrics": {
                "psnr@18": {"a b(c)": {"0": 1.0, "1": 3.0}},
                "factor": {"": {"all": 2.0}},
                "lost": {"": {"all": None}},
            },
        },
        "curves.json": {"loss": {"": {"0": {"steps": [0.0, 10.0], "values": [3.0, 1.0]}}}},
        "provenance.json": provenance.collect("toy", "smoke", {}, {"tooth": "aa"}, provenance.Clock()),
    }
    for name, value in content.items():
        (folder / name).write_text(json.dumps(value))
    return folder


def client():
    return tracking._client()


def started(**tags: str) -> tracking.Run:
    run = tracking.Run("toy", "smoke", tags)
    run.start({"rate": 1e-4})
    return run


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("sqlite:///mlflow.db", "a relative path"),
        ("sqlite:///./x/mlflow.db", "a relative path"),
        ("sqlite://", "a relative path"),
        ("mlruns", "a folder"),
        ("./mlruns", "a folder"),
        ("file:///tmp/mlruns", "a folder"),
    ],
)
def test_addresses_that_scatter_are_refused(monkeypatch: pytest.MonkeyPatch, address: str, said: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(tracking.TrackingError, match=said) as caught:
        tracking.uri()
    assert address in str(caught.value) and "Next: unset MLFLOW_TRACKING_URI" in str(caught.value)


@pytest.mark.parametrize(
    "address",
    ["sqlite:////a/b.db", "sqlite:///C:/a/b.db", "http://localhost:5000", "postgresql://u:p@h/db", "databricks"],
)
def test_absolute_addresses_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert tracking.uri() == address


def test_two_at_once_make_one_store_with_one_experiment_each(store: Path) -> None:
    names = sorted(experiment.name for experiment in client().search_experiments())
    assert names == ["Default", "other", "toy"]
    assert (store / "mlflow.db").is_file()
    where = client().get_experiment_by_name("toy").artifact_location
    assert where == (store / "mlartifacts" / "toy").as_uri()


def test_setup_again_changes_nothing_and_revives_a_deleted_experiment(store: Path) -> None:
    before = client().get_experiment_by_name("other").experiment_id
    client().delete_experiment(before)
    assert "2 experiment(s)" in tracking.setup(["toy", "other"])
    after = client().get_experiment_by_name("other")
    assert (after.experiment_id, after.lifecycle_stage) == (before, "active")


def test_a_finished_run_has_a_child_a_seed_and_its_curves_by_step(finished: Path) -> None:
    run = started()
    run.log(finished)
    run.finish("FINISHED")
    parent = client().get_run(run.id)
    assert parent.info.status == "FINISHED" and parent.info.run_name.startswith("toy/smoke/")
    assert {"factor": 2.0, "psnr_at_18/a b_c": 2.0}.items() <= parent.data.metrics.items()  # the mean over seeds
    assert parent.data.params == {"rate": "0.0001"}
    assert {"paper": "toy", "profile": "smoke", "data.tooth": "aa"}.items() <= parent.data.tags.items()
    names = [file.path for file in client().list_artifacts(run.id)]
    assert {"figures", "metrics.json", "notebook.html", "provenance.json"} <= set(names)
    children = client().search_runs([run.experiment], f"tags.`mlflow.parentRunId` = '{run.id}'", order_by=["tags.seed"])
    assert [(c.info.run_name, c.info.status, c.data.metrics["psnr_at_18/a b_c"]) for c in children] == [
        ("seed 0", "FINISHED", 1.0),
        ("seed 1", "FINISHED", 3.0),
    ]
    assert len(children[0].data.params["note"]) == 6000
    curve = client().get_metric_history(children[0].info.run_id, "curves/loss")
    assert [(point.step, point.value) for point in curve] == [(0, 3.0), (10, 1.0)]


def test_by_hand_means_the_tag_interactive(finished: Path) -> None:
    said = tracking.log_interactive("toy", "smoke", finished)
    run = client().get_run(said.rsplit("/", 1)[1])
    assert run.data.tags["interactive"] == "true" and run.info.status == "FINISHED"


def test_environment_variables_of_mlflow_do_not_hijack_the_run(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = started()
    monkeypatch.setenv("MLFLOW_RUN_ID", first.id)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "0")
    second = started()
    assert second.id != first.id and second.experiment == first.experiment
    for run in (first, second):
        run.finish("FINISHED")


def test_samples_are_system_metrics_and_a_heartbeat(store: Path) -> None:
    run = started()
    run.sample(os.getpid())
    data = client().get_run(run.id).data
    assert data.metrics["system/process_memory_usage_megabytes"] > 10
    assert abs(float(data.tags[processes.HEARTBEAT]) - time.time()) < 60
    run.finish("FINISHED")


def test_runs_of_dead_drivers_are_killed_and_others_left(store: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    identity = processes.identity()
    born = identity[processes.PROCESS].split()[1]
    elsewhere = {processes.NAMESPACE: "another boot"}
    old = str(int(time.time()) - processes.SILENT_FOR_S - 60)
    cases = {
        "dead": ({processes.PROCESS: f"{gone.pid} {born}"}, "KILLED"),
        "number given anew": ({processes.PROCESS: f"{os.getpid()} 1.00"}, "KILLED"),
        "alive": ({}, "RUNNING"),
        "silent elsewhere": ({**elsewhere, processes.HEARTBEAT: old}, "KILLED"),
        "beating elsewhere": ({**elsewhere, processes.PROCESS: f"{gone.pid} {born}"}, "RUNNING"),
        "another host": ({processes.HOST: "other", processes.PROCESS: f"{gone.pid} {born}"}, "RUNNING"),
    }
    runs = {name: client().create_run(started_in(), tags={**identity, **tags}) for name, (tags, _) in cases.items()}
    assert "3 run(s) of killed drivers" in tracking.setup(["toy"])
    found = {name: client().get_run(run.info.run_id).info.status for name, run in runs.items()}
    for run in runs.values():
        client().set_terminated(run.info.run_id, "FINISHED")
    assert found == {name: status for name, (_, status) in cases.items()}


def started_in() -> str:
    return client().get_experiment_by_name("toy").experiment_id


def test_a_server_that_is_down_costs_one_line(finished: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")  # the discard port: nobody listens
    began = time.time()
    run = started()
    run.sample(os.getpid())
    run.log(finished)
    run.attach(finished / "metrics.json", note="x")
    run.finish("FINISHED")
    said = capsys.readouterr().err
    assert run.id == "" and run.link == ""
    assert said.count("resparse:") == 1 and "the run goes on" in said and "--relog" in said and "secret" not in said
    assert time.time() - began < 60
    assert tracking.log_interactive("toy", "smoke", finished) == "resparse: not tracked"


def test_a_store_that_fails_half_way_costs_one_line(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = started()
    (finished / "curves.json").write_text("{")
    run.log(finished)
    run.finish("FINISHED")
    assert capsys.readouterr().err.count("MLflow did not get its results") == 1
    assert run.id
    client().set_terminated(run.id, "FAILED")


@pytest.mark.parametrize("name", ["psnr@(18)", "a[b c]", "x%", "µ", "((", "a/b.c:d-e", "/x", "a//b", "z" * 400])
def test_cleaned_names_are_taken_by_mlflow(store: Path, name: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    _validate_metric_name(tracking.clean(name))


def test_names_that_clean_to_the_same_stay_apart(store: Path) -> None:
    run = started()
    tracking._log_metrics(client(), run.id, {"a(b": [(0, 1.0)], "a)b": [(0, 2.0)]})
    run.finish("FINISHED")
    assert sorted(client().get_run(run.id).data.metrics.values()) == [1.0, 2.0]
