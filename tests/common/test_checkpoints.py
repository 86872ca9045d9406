"""Models of our own: made once, found by their settings, made again where anything differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from common import files, paths
from common.training import checkpoints
from common.training.checkpoints import checkpoint, rounded

SETTINGS = {"data": "sprites", "steps": 3, "sizes": (4, 2)}


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "papers").mkdir()
    (tmp_path / "dvc.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Training:
    """Counts how often it is called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, keep: Path) -> dict[str, torch.Tensor]:
        self.calls += 1
        keep.parent.mkdir(exist_ok=True)
        keep.write_text("half of it")
        draw = torch.Generator().manual_seed(self.calls)
        return {"weight": torch.randn(5, 3, generator=draw).T, "count": torch.tensor(self.calls)}


def test_what_is_read_is_what_was_made(house: Path) -> None:
    train = Training()
    made = checkpoint("a-model", SETTINGS, train)
    read = checkpoint("a-model", SETTINGS, train)
    assert (made.restored, read.restored, train.calls) == (False, True, 1)
    assert made.state.keys() == read.state.keys()
    assert all(torch.equal(made.state[name], read.state[name]) for name in made.state)
    assert made.state["weight"].dtype == torch.float32 and made.state["count"].dtype == torch.int64
    assert torch.equal(made.state["weight"], rounded(made.state)["weight"])
    assert made.sha256 == read.sha256 == files.sha256(house / "checkpoints/a-model.safetensors")
    assert made.path == paths.checkpoint("a-model")
    assert sorted(p.name for p in (house / "checkpoints").iterdir()) == ["a-model.safetensors"]  # nothing unfinished
    with safe_open(made.path, "pt") as stream:
        assert json.loads(stream.metadata()["settings"]) == {**SETTINGS, "sizes": [4, 2]}


def test_other_settings_retrain_and_damage_train_again(house: Path, capsys: pytest.CaptureFixture) -> None:
    train = Training()
    checkpoint("m", SETTINGS, train)
    capsys.readouterr()
    assert not checkpoint("m", {**SETTINGS, "steps": 4}, train).restored
    assert "other settings (steps)" in capsys.readouterr().out
    assert not checkpoint("m", {**SETTINGS, "steps": 4}, train, retrain=True).restored
    path = paths.checkpoint("m")
    path.write_bytes(path.read_bytes()[:50])
    assert not checkpoint("m", {**SETTINGS, "steps": 4}, train).restored
    assert "cannot be read" in capsys.readouterr().out
    assert train.calls == 4


def test_a_killed_training_keeps_its_place_and_the_model_before(house: Path) -> None:
    checkpoint("m", SETTINGS, Training())
    before = paths.checkpoint("m").read_bytes()
    places = []

    def killed(keep: Path) -> dict[str, torch.Tensor]:
        places.append(keep)
        keep.write_text("half of it")
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            checkpoint("m", {"steps": 9}, killed)
    assert paths.checkpoint("m").read_bytes() == before
    assert places[0] == places[1] and places[0].is_file()
    with pytest.raises(KeyboardInterrupt):
        checkpoint("m", {"steps": 10}, killed)
    assert places[2] != places[0]  # another training's state is not gone on from


def test_bad_names_settings_and_sizes_are_told(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="lower-case words"):
        checkpoint("../x", SETTINGS, Training())
    with pytest.raises(ValueError, match="no JSON"):
        checkpoint("x", {"data": object()}, Training())
    with pytest.raises(ValueError, match="no JSON"):
        checkpoint("x", {"rate": float("nan")}, Training())
    monkeypatch.setattr(checkpoints, "LARGEST", 10)
    with pytest.raises(ValueError, match="expected at most"):
        checkpoint("x", SETTINGS, Training())
    assert not paths.checkpoint("x").exists()
