"""The pipeline's own behaviour: the real dvc.yaml and .dvcignore, in a small repository whose runs take no time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import toy_paper
from ruamel.yaml import YAML

from common import params, paths, provenance

ROOT = Path(__file__).resolve().parents[2]

RUN = """
import pathlib, sys
slug, profile = sys.argv[1], sys.argv[3]
if pathlib.Path(f"papers/{slug}/method.py").read_text() == "broken":
    sys.exit("broken")
for folder in ("runs", "figures"):
    path = pathlib.Path(f"results/{folder}/{slug}/{profile}/file.txt")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{slug} {profile}")
for folder in ("metrics", "provenance"):
    path = pathlib.Path(f"results/{folder}/{slug}/{profile}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"x": 1}')
with open("runs.log", "a") as log:
    log.write(f"{slug}-{profile}\\n")
"""

BOARD = """
import pathlib
found = sorted(str(path) for path in pathlib.Path("results/metrics").glob("*/*.json"))
pathlib.Path("SCOREBOARD.md").write_text("\\n".join(found) + pathlib.Path("papers/a/claims.yaml").read_text())
pathlib.Path("scoreboard.json").write_text("{}")
pathlib.Path("results/site").mkdir(exist_ok=True)
pathlib.Path("results/site/index.html").write_text("")
"""

# which runs DVC would do again after each of some edits, asked in one process because DVC is slow to start
STATUS = """
import json, pathlib
from dvc.repo import Repo
found = {}
for name in json.loads(pathlib.Path("cases.json").read_text()):
    path = pathlib.Path(name)
    before = path.read_bytes() if path.exists() else None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("edited")
    found[name] = [stage for stage in Repo(".").status() if stage.startswith("run@")]
    path.unlink() if before is None else path.write_bytes(before)
print(json.dumps(found))
"""


def dvc(house: Path, *arguments: str, succeeds: bool = True) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(house), "DVC_NO_ANALYTICS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "dvc", *arguments]
    done = subprocess.run(command, cwd=house, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode == 0) == succeeds, done.stdout + done.stderr
    return done.stdout + done.stderr


def git(house: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=house, check=True, capture_output=True)


def ran(house: Path) -> list[str]:
    """The runs since the last call."""
    log = house / "runs.log"
    lines = log.read_text().split() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    house = tmp_path_factory.mktemp("dvc") / "house"
    stage = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]["run"]
    content = {
        "pipelines/run.py": RUN,
        "pipelines/board.py": BOARD,
        "pipelines/__init__.py": "",
        "sitecustomize.py": toy_paper.SITE,
    }
    content |= {"params.yaml": "profile: smoke\npapers: [a, b]\n", ".gitignore": "results/runs\nruns.log\n"}
    for dependency in stage["deps"]:
        if "${" not in dependency:
            content[dependency if "." in dependency else f"{dependency}/source.py"] = "x = 1"
    for slug in ("a", "b"):
        content |= {f"papers/{slug}/{name}": "" for name in (f"{slug}.py", "method.py", "claims.yaml", "a.ipynb")}
        content[f"papers/{slug}/params.yaml"] = "base: {n: 1}\nsmoke: {m: 1}\nlaptop: {m: 2}\npaper: {m: 3}\n"
    for name, text in content.items():
        (house / name).parent.mkdir(parents=True, exist_ok=True)
        (house / name).write_text(text)
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, house / name)
    git(house, "init")
    dvc(house, "init", "-q")
    dvc(house, "config", "core.analytics", "false")
    dvc(house, "repro")
    assert sorted(ran(house)) == ["a-smoke", "b-smoke"]
    git(house, "add", "-A")
    git(house, "commit", "-m", "smoke")
    return house


@pytest.fixture
def house(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "house", symlinks=True)
    return tmp_path / "house"


def test_nothing_changed_nothing_runs(house: Path) -> None:
    dvc(house, "repro")
    assert ran(house) == []


def test_claims_prose_boards_and_tests_train_nothing(house: Path) -> None:
    names = ["claims.yaml", "paper.yaml", "a.ipynb", "README.md"]
    others = ["kernels/ct/bench.py", "common/metrics/__pycache__/x.pyc", "common/claims.py", "tests/test_x.py"]
    for name in (*(f"papers/a/{name}" for name in names), *others):
        (house / name).parent.mkdir(parents=True, exist_ok=True)
        (house / name).write_text("edited")
    (house / "pipelines" / "board.py").write_text(BOARD + "# edited")
    dvc(house, "repro")
    assert ran(house) == []
    assert (house / "SCOREBOARD.md").read_text().endswith("edited"), "the board read the new claims"


def test_what_measures_runs_again_and_nothing_else(house: Path) -> None:
    cases = {
        "papers/a/method.py": {"run@a-smoke"},
        "papers/a/a_new_module.py": {"run@a-smoke"},
        "common/metrics/source.py": {"run@a-smoke", "run@b-smoke"},
        "common/seeds.py": {"run@a-smoke", "run@b-smoke"},
        "kernels/ct/cpu.cpp": {"run@a-smoke", "run@b-smoke"},
    }
    (house / "cases.json").write_text(json.dumps(list(cases)))
    dvc_status = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STATUS], cwd=house, capture_output=True, text=True, timeout=120
    )
    assert dvc_status.returncode == 0, dvc_status.stderr
    assert {name: set(stages) for name, stages in json.loads(dvc_status.stdout).items()} == cases


def test_parameters_of_another_profile_run_nothing(house: Path) -> None:
    path = house / "papers" / "a" / "params.yaml"
    path.write_text(path.read_text().replace("paper: {m: 3}", "paper: {m: 4}"))
    dvc(house, "repro")
    assert ran(house) == []
    path.write_text(path.read_text().replace("base: {n: 1}", "base: {n: 2}"))
    dvc(house, "repro")
    assert ran(house) == ["a-smoke"]


def test_another_profile_lives_beside_the_first(house: Path) -> None:
    before = (house / "results" / "metrics" / "a" / "smoke.json").stat().st_mtime_ns
    dvc(house, "exp", "run", "-S", "profile=laptop", "-S", "papers/a/params.yaml:laptop.m=7")
    assert sorted(ran(house)) == ["a-laptop", "b-laptop"]
    board = (house / "SCOREBOARD.md").read_text()
    assert all(f"results/metrics/{slug}/{profile}.json" in board for slug in "ab" for profile in ("smoke", "laptop"))
    assert (house / "results" / "runs" / "a" / "smoke" / "file.txt").exists()
    assert (house / "results" / "metrics" / "a" / "smoke.json").stat().st_mtime_ns == before
    stages = YAML(typ="safe").load(house / "dvc.lock")["stages"]
    assert {f"run@{slug}-{profile}" for slug in "ab" for profile in ("smoke", "laptop")} <= set(stages)
    (house / "params.yaml").write_text("profile: smoke\npapers: [a, b]\n")
    dvc(house, "repro")
    assert ran(house) == [], "back at smoke everything is still there"


def test_a_failing_paper_stops_neither_the_other_nor_the_board(house: Path) -> None:
    (house / "papers" / "a" / "method.py").write_text("broken")
    (house / "common" / "metrics" / "source.py").write_text("x = 2")
    dvc(house, "repro", "-k", succeeds=False)
    assert ran(house) == ["b-smoke"]
    dvc(house, "repro", "-s", "scoreboard")
    board = (house / "SCOREBOARD.md").read_text()
    assert "results/metrics/b/smoke.json" in board and "results/metrics/a/smoke.json" not in board


def test_one_paper_can_be_run_by_its_name(house: Path) -> None:
    (house / "common" / "metrics" / "source.py").write_text("x = 2")
    dvc(house, "repro", "run@b-smoke")
    assert ran(house) == ["b-smoke"]


def test_the_pipeline_depends_on_what_provenance_calls_sources() -> None:
    """Else an edit could change results and DVC would not notice."""
    stage = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]["run"]
    for slug in params.house()[1]:
        dependencies = [dependency.replace("${item.paper}", slug) for dependency in stage["deps"]]
        missing = [
            name
            for name in map(paths.relative, provenance.sources(slug))
            if not any(name == dependency or name.startswith(f"{dependency}/") for dependency in dependencies)
        ]
        assert not missing, f"add to the deps of `run` in dvc.yaml: {missing}"


def test_every_metrics_file_is_one_of_a_papers_profiles() -> None:
    for path in (ROOT / "results" / "metrics").glob("*/*.json"):
        assert path.stem in params.PROFILES
        assert json.loads(path.read_text())["paper"] == path.parent.name
