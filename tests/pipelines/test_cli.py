"""The `resparse` command: a thin door, quick to open, that answers mistakes with one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipelines import cli

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ["run", "board", "batch", "new", "bench", "info", "data list", "data fetch", "data path"]


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})


def resparse(*arguments: str, cwd: Path = ROOT, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    environment = {**os.environ, **more}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_the_command_opens_quickly() -> None:
    """Help must not wait for what only the commands need."""
    code = "import sys, pipelines.cli; print(*{'torch', 'mlflow', 'numpy', 'pandas', 'papermill'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    done = invoke(*command.split(), "--help")
    assert done.exit_code == 0
    assert f"{command.split()[-1]}" in done.stdout and len(done.stdout.splitlines()) > 5


def test_the_list_of_commands_is_complete() -> None:
    text = invoke("--help").stdout
    assert all(command.split()[0] in text for command in COMMANDS)


def test_what_the_help_says_of_papermill_is_true(tmp_path: Path) -> None:
    """Lists go by -y, numbers by -p: `-p seeds '[0]'` would arrive as text."""
    assert "-y 'seeds: [0, 1]'" in " ".join(invoke("batch", "--help").stdout.split())
    options = ["-p", "learning_rate", "1e-3", "-p", "profile", "smoke", "-y", "seeds: [0, 1]"]
    prepared = tmp_path / "out.ipynb"
    papermill = [sys.executable, "-m", "papermill", str(ROOT / "papers/gloredi/gloredi.ipynb"), str(prepared)]
    subprocess.run([*papermill, "-k", "python3", "--prepare-only", *options], cwd=ROOT, check=True, timeout=120)
    import nbformat

    cells = nbformat.read(prepared, as_version=4).cells
    injected = next(cell.source for cell in cells if "injected-parameters" in cell.metadata.get("tags", []))
    values: dict[str, Any] = {}
    exec(injected, values)
    assert (values["seeds"], values["learning_rate"], values["profile"]) == ([0, 1], 1e-3, "smoke")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "gloredy"], "Did you mean 'gloredi'?"),
        (["run", "gloredi", "--profile", "smok"], "Did you mean 'smoke'?"),
        (["run", "gloredi", "--profile", "smoke", "--set", "vievs=18"], "Did you mean 'views'?"),
        (["batch", "gloredi", "--profile", "smoke", "--set", "stepz=1,2"], "Did you mean 'steps'?"),
        (["new", "my-paper"], "perhaps my_paper"),
        (["data", "fetch", "ct_dicom_smal"], "Did you mean 'ct_dicom_small'?"),
        (["board", "--diff", "no-such-commit"], "no-such-commit"),
    ],
)
def test_a_mistake_is_answered_with_one_line(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["resparse", *arguments])
    from pipelines import board

    monkeypatch.setattr(board, "build", lambda: board.Board((), {}))  # a test writes no official board
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    told = capsys.readouterr().err
    assert stopped.value.code == 1
    assert said in told and told.startswith("resparse: ") and "Traceback" not in told
    assert told.count("\n") == 1


def test_debug_shows_where_a_mistake_comes_from() -> None:
    done = resparse("--debug", "run", "gloredy")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ParamError" in done.stderr


def test_a_fault_of_ours_is_not_dressed_up_as_a_mistake_of_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_a_mistyped_command_is_named() -> None:
    done = invoke("bach")
    assert done.exit_code == 2 and "batch" in done.output


def test_relog_and_set_exclude_each_other() -> None:
    done = invoke("run", "gloredi", "--relog", "--set", "views=18")
    assert done.exit_code == 2 and "--relog" in done.output


def test_info_says_what_is_here_and_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RESPARSE_DATA_MIRROR", raising=False)
    done = invoke("info")
    assert done.exit_code == 0, done.output
    for name in ("commit", "smoke: gloredi", "torch", "kernels", "sets are here", "tracking"):
        assert name in done.stdout
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///relative.db")
    assert "relative path" in " ".join(invoke("info").stdout.split())


def test_data_list_and_path(real_data: Any) -> None:
    folder = real_data("ct_dicom_small")
    assert "ct_sinogram_tooth" in invoke("data", "list").stdout
    detail = invoke("data", "list", "ct_dicom_small").stdout
    assert "licence" in detail and "3dd31e5cc835b3f2" in detail
    assert invoke("data", "path", "ct_dicom_small").stdout.strip() == str(folder)


def test_data_path_of_a_missing_set_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RESPARSE_DATA_MIRROR", raising=False)
    monkeypatch.setenv("RESPARSE_CACHE", str(tmp_path))
    done = invoke("data", "path", "ct_dicom_small")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "resparse data fetch ct_dicom_small" in done.stderr


def test_run_and_bench_hand_over_what_was_typed_and_what_came_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines import run

    asked: list[Any] = []
    monkeypatch.setattr(run, "run", lambda *arguments: asked.append(arguments) or 3)
    monkeypatch.setattr(run, "relog", lambda *arguments: asked.append(arguments) or 0)
    monkeypatch.setattr(subprocess, "call", lambda command, cwd: asked.append(tuple(command[1:])) or 4)
    assert invoke("run", "gloredi", "-p", "laptop", "--set", "views=18", "--set", "steps=7").exit_code == 3
    assert invoke("run", "gloredi", "--relog").exit_code == 0
    assert invoke("bench", "ct").exit_code == 4 and invoke("bench").exit_code == 4
    assert asked == [
        ("gloredi", "laptop", ["views=18", "steps=7"]),
        ("gloredi", "smoke"),
        ("-m", "kernels.bench", "ct"),
        ("-m", "kernels.bench"),
    ]
