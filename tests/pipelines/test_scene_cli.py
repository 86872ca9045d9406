"""`resparse scene`: what is printed of a folder, and that mistakes are one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from toy_scenes import IMAGES, write_colmap_binary, write_images
from typer.testing import CliRunner

from common.splatting import photos
from pipelines import cli

ROOT = Path(__file__).resolve().parents[2]
NAMES = [name for _, name, _, _ in IMAGES]


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["scene", *arguments], env={"COLUMNS": "200", "TERM": "dumb"})


def resparse(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines.cli", "scene", *arguments]
    return subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=120)


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    write_colmap_binary(tmp_path / "sparse" / "0")
    write_images(tmp_path / "images", NAMES)
    return tmp_path


@pytest.mark.parametrize("command", ["pose", "info"])
def test_the_commands_explain_themselves(command: str) -> None:
    done = invoke(command, "--help")
    assert done.exit_code == 0 and f"scene {command}" in done.stdout and len(done.stdout.splitlines()) > 8


def test_info_says_what_was_recognised(scene: Path) -> None:
    done = invoke("info", str(scene), "--views", "2")
    assert done.exit_code == 0, done.output
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert lines["layout"] == "colmap" and lines["size"] == "16 x 12"
    assert lines["train"] == "2: b.png, sub/d.png" and lines["test"] == "1: a.png"
    assert lines["points"].startswith("none that two training views saw")


def test_info_counts_points_and_gives_their_depths(scene: Path) -> None:
    done = invoke("info", str(scene))
    assert "1 seen by two training views or more, at depths 4 to 4" in done.stdout  # point 9, of b and c


def test_info_of_a_real_scene(real_data: Any) -> None:
    done = invoke("info", str(real_data("scene_fern_llff")), "--factor", "8", "--views", "3")
    assert "llff" in done.stdout and "504 x 378" in done.stdout and "1256 seen by two training views" in done.stdout
    assert "image001.png, image010.png, image019.png" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "nowhere"), "nowhere: no such folder."),
        (("info", "tests"), "tests: no scene in it; expected transforms_train.json (Blender)"),
        (("pose", "tests"), "tests: 0 photographs; expected two or more"),
    ],
)
def test_a_mistake_is_answered_with_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = resparse(*arguments)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"resparse: {message}") and len(done.stderr.splitlines()) == 1
    assert not (ROOT / "tests_scene").exists()


def test_pose_hands_over_what_was_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The work itself is tested in tests/common/test_splatting_photos.py."""
    calls = []

    def stand_in(folder: Path, out: Path, **options: Any) -> Path:
        options.pop("progress")("3 of 3 pairs match")
        calls.append((folder, out, options))
        return out

    monkeypatch.setattr(photos, "pose_photos", stand_in)
    place = tmp_path / "kitchen"
    done = invoke("pose", str(place), "--train", "a, b", "--max-size", "800", "--camera-model", "OPENCV")
    expected = {"train": ["a", "b"], "max_size": 800, "camera_model": "OPENCV"}
    assert calls == [(place, tmp_path / "kitchen_scene", expected)]
    assert "3 of 3 pairs match" in done.stdout and f"resparse scene info {tmp_path / 'kitchen_scene'}" in done.stdout
    invoke("pose", str(place), "--out", str(tmp_path / "other"))
    assert calls[1][1:] == (
        tmp_path / "other",
        {"train": None, "max_size": 1600, "camera_model": "SIMPLE_RADIAL"},
    )
