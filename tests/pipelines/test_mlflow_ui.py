"""MLflow's own pages, in a real browser, on a store that our tracking wrote: what a user sees after `make ui`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import browser
import pytest

from common import paths, tracking
from common.record import RUN_DIR, Record

chromium = browser.chromium
pytestmark = pytest.mark.slow
# MLflow 3 opens on its pages for language models; this is what its switch "Model training" puts into the address.
TRAINING = "workflowType=machine_learning"
PATIENCE_S = 240  # the server imports for half a minute, longer on a busy machine


@dataclass
class Params:
    seeds: list[int]
    dataset: str


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server over a store with one run of the paper `toy`, which has two seeds."""
    house = tmp_path_factory.mktemp("house")
    for folder in ("papers/toy", "common", "kernels"):
        (house / folder).mkdir(parents=True)
    (house / "dvc.yaml").write_text("stages: {}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(house)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{house / 'mlflow.db'}")
        patch.setenv(RUN_DIR, str(house / "run"))
        _track(house / "run")
        log = (house / "server.log").open("w")
        port = _free_port()
        command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", tracking.uri(), "--port", str(port)]
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--workers", "1"],
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", process, house / "server.log")
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)  # the session of this server alone: its workers go with it
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(20)
            log.close()


def test_the_runs_table_shows_the_run_by_its_name(server: str, chromium) -> None:
    with browser.Visit(chromium, 1400) as visit:
        visit.page.goto(f"{server}/#/experiments/{_experiment(server)}/runs?{TRAINING}")
        row = visit.page.get_by_role("row").filter(has_text="toy/smoke/")
        row.first.wait_for(state="visible", timeout=60_000)
        assert visit.page.get_by_text("3 matching runs").is_visible()  # the run and one child a seed
        assert not [fault for fault in visit.faults if "network" in fault]
        if folder := os.environ.get("RESPARSE_SCREENSHOTS"):
            visit.page.screenshot(path=Path(folder) / "mlflow-runs.png")


def test_the_run_page_shows_its_metrics_and_parameters(server: str, chromium) -> None:
    run = _search(server, "attributes.run_name LIKE 'toy/%'")[0]
    with browser.Visit(chromium, 1400) as visit:
        visit.page.goto(f"{server}/#/experiments/{_experiment(server)}/runs/{run['info']['run_id']}?{TRAINING}")
        for text in ("psnr/ours", "adjoint_error", "dataset", "made up"):
            visit.page.get_by_text(text, exact=False).first.wait_for(state="visible", timeout=60_000)
        if folder := os.environ.get("RESPARSE_SCREENSHOTS"):
            visit.page.screenshot(path=Path(folder) / "mlflow-run.png")


def test_seeds_are_children_of_the_run(server: str) -> None:
    parent = _search(server, "attributes.run_name LIKE 'toy/%'")[0]["info"]["run_id"]
    children = _search(server, f"tags.`mlflow.parentRunId` = '{parent}'")
    assert sorted(run["info"]["run_name"] for run in children) == ["seed 0", "seed 1"]


def _track(folder: Path) -> None:
    record = Record.open("toy", "smoke", Params(seeds=[0, 1], dataset="made up"))
    for seed in (0, 1):
        record.metric("psnr", 30.0 + seed, variant="ours", seed=seed)
        record.curve("loss", [0, 1, 2], [3.0, 2.0, 1.5], seed=seed)
    record.metric("adjoint_error", 3e-7)
    record.close()
    said = tracking.log_folder("toy", "smoke", folder, {})
    assert "tracked" in said and "not tracked" not in said, said
    assert paths.root() == folder.parent


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"MLflow's server did not come up within {PATIENCE_S} s:\n{log.read_text()[-2000:]}")


def _search(server: str, query: str) -> list[dict]:
    found = _post(server, "runs/search", {"experiment_ids": [_experiment(server)], "filter": query})
    return found.get("runs", [])


def _experiment(server: str) -> str:
    found = _post(server, "experiments/search", {"max_results": 10, "filter": "name = 'toy'"})
    return found["experiments"][0]["experiment_id"]


def _post(server: str, path: str, content: dict) -> dict:
    request = urllib.request.Request(
        f"{server}/api/2.0/mlflow/{path}", json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)
