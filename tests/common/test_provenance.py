"""Provenance: what it holds, what it must never hold, and which files count as sources."""

from __future__ import annotations

import getpass
import json
import platform
import subprocess
from pathlib import Path

import pytest

from common import paths, provenance

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    files = {
        "dvc.yaml": "",
        "papers/toy/toy.py": "# %% [markdown]\n# # Prose\n# %%\nx = 1\n",
        "papers/toy/method.py": "",
        "papers/toy/claims.yaml": "",
        "common/seeds.py": "",
        "common/record.py": "",
        "common/metrics/image.py": "",
        "common/data/registry.yaml": "",
        "kernels/ct/cpu.cpp": "",
        "kernels/ct/bench.py": "",
        "kernels/ct/__pycache__/x.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_sources_are_what_can_change_a_measurement(house: Path) -> None:
    assert [paths.relative(path) for path in provenance.sources("toy")] == [
        "common/data/registry.yaml",
        "common/metrics/image.py",
        "common/seeds.py",
        "kernels/ct/cpu.cpp",
        "papers/toy/method.py",
        "papers/toy/toy.py",
    ]


def test_the_digest_of_sources_sees_code_and_not_prose(house: Path) -> None:
    notebook = house / "papers" / "toy" / "toy.py"
    before = provenance.sources_digest("toy")
    notebook.write_text(notebook.read_text().replace("Prose", "Better prose"))
    assert provenance.sources_digest("toy") == before
    notebook.write_text(notebook.read_text().replace("x = 1", "x = 2"))
    changed = provenance.sources_digest("toy")
    (house / "kernels" / "ct" / "cpu.cpp").rename(house / "kernels" / "ct" / "cpu2.cpp")
    assert len({before, changed, provenance.sources_digest("toy")}) == 3


def test_it_names_no_user_host_or_folder() -> None:
    origin = provenance.collect("gloredi", "smoke", {"a": 1}, {"tooth": "aa"}, provenance.Clock())
    text = json.dumps(origin)
    assert not [name for name in (str(ROOT), str(Path.home()), platform.node()) if name and name in text]
    user = getpass.getuser()
    assert f'"{user}"' not in text and f"/{user}/" not in text
    assert {"run", "device", "git", "kernels", "environment", "machine", "data", "params_digest"} <= set(origin)
    assert origin["device"].startswith(("cpu: ", "cuda: ")) and origin["machine"]["cores"] >= 1
    assert len(origin["environment"]["lock_sha256"]) == 64 and origin["environment"]["packages"] > 50


def test_params_have_a_digest_of_their_own() -> None:
    first, same, other = (
        provenance.collect("gloredi", "smoke", values, {}, provenance.Clock())["params_digest"]
        for values in ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 1, "b": 3})
    )
    assert first == same != other


def test_sources_are_dirty_and_results_are_not(house: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=house, check=True, capture_output=True)

    assert provenance.git() == {"commit": "", "dirty": None}
    git("init")
    git("add", "-A")
    git("commit", "-m", "one")
    assert len(provenance.git()["commit"]) == 40 and provenance.git()["dirty"] is False
    (house / "results").mkdir()
    (house / "results" / "x.json").write_text("{}")
    (house / "dvc.lock").write_text("x")
    (house / "params.yaml").write_text("profile: laptop\n")
    assert provenance.git()["dirty"] is False
    (house / "papers" / "toy" / "params.yaml").write_text("x")
    assert provenance.git()["dirty"] is True


def test_results_are_restored_unless_measured_here(house: Path) -> None:
    origin = provenance.collect("toy", "smoke", {}, {}, provenance.Clock())
    assert provenance.restored(origin)
    provenance.remember(origin)
    assert not provenance.restored(origin)
    assert provenance.restored({**origin, "started": "2020-01-01"}), "an older run of the same paper is another one"


def test_the_root_is_found_from_a_notebooks_folder(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(house / "papers" / "toy")
    assert paths.root() == house
    monkeypatch.chdir("/")
    assert paths.root() == ROOT
    assert paths.relative(Path("/elsewhere/secret/x.txt")) == "x.txt"
