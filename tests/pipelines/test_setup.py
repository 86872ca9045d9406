"""Setting up the tracking store before anything runs."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from pipelines import setup


@pytest.fixture(autouse=True)
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "papers").mkdir()
    (tmp_path / "dvc.yaml").write_text("")
    (tmp_path / "params.yaml").write_text("profile: smoke\npapers: [toy, other]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def test_it_makes_the_store_and_an_experiment_a_paper(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert setup.main() == 0
    assert capsys.readouterr().out == f"resparse: tracking store sqlite:///{house}/mlflow.db: 2 experiment(s)\n"
    with sqlite3.connect(house / "mlflow.db") as store:
        names = {name for (name,) in store.execute("select name from experiments")}
    assert names == {"Default", "toy", "other"}


def test_a_relative_address_is_an_error(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    assert setup.main() == 1
    assert "a relative path" in capsys.readouterr().err


def test_a_server_that_is_down_is_a_warning(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://u:secret@127.0.0.1:9")
    assert setup.main() == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "runs go on without it" in said and "secret" not in said
