"""A new paper is a stub that already keeps every rule of the house, and that the board refuses until it has a claim."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common import claims
from pipelines import new_paper
from pipelines.new_paper import NewPaperError
from tests.support.toy_paper import SITE

ROOT = Path(__file__).resolve().parents[2]
HOUSE = """# the profile that plain `dvc repro` runs
profile: smoke

papers: # one line a paper
  - first   # the oldest
"""


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the repository, by links, without its papers and results; it becomes the working directory."""
    for name in ("common", "kernels", "pipelines", "dvc.yaml", "pyproject.toml", "requirements.lock"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("papers", "tests/papers", "tests/contract"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "papers" / "__init__.py").touch()
    shutil.copy(ROOT / "tests" / "contract" / "test_paper.py", tmp_path / "tests" / "contract")
    (tmp_path / "sitecustomize.py").write_text(SITE)
    (tmp_path / "params.yaml").write_text(HOUSE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def python(house: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "MLFLOW_"))}
    environment = {**inherited, "PYTHONPATH": str(house), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=house, env=environment, capture_output=True, text=True, timeout=280)


def test_the_house_gets_one_line_and_keeps_its_comments(house: Path) -> None:
    new_paper.create("second", "Sparse")
    assert (house / "params.yaml").read_text() == HOUSE + "  - second\n"
    new_paper.create("third", "Sparser")
    assert (house / "params.yaml").read_text() == HOUSE + "  - second\n  - third\n"


@pytest.mark.parametrize("text", ["papers: [first]\nprofile: smoke\n", "papers:\n- first\nprofile: smoke\n"])
def test_the_house_keeps_its_style_of_lists(house: Path, text: str) -> None:
    (house / "params.yaml").write_text(text)
    new_paper.create("second", "Sparse")
    longer = text.replace("[first]", "[first, second]").replace("- first\n", "- first\n- second\n")
    assert (house / "params.yaml").read_text() == longer


@pytest.mark.parametrize(
    ("slug", "said"),
    [
        ("my-paper", "perhaps my_paper"),
        ("MyPaper", "perhaps mypaper"),
        ("3dgs", "perhaps dgs"),
        ("a", "2 to 40"),
        ("", "2 to 40"),
        ("../escape", "perhaps escape"),
        ("lambda", "word of Python"),
        ("match", "word of Python"),
        ("random", "word of Python"),
        ("first", "lists 'first' already"),
        ("there", "exists already"),
    ],
)
def test_a_bad_slug_is_refused_and_nothing_is_written(house: Path, slug: str, said: str) -> None:
    (house / "papers" / "there").mkdir()
    before = sorted(house.rglob("*"))
    with pytest.raises(NewPaperError, match=said):
        new_paper.create(slug, "Sparse")
    assert sorted(house.rglob("*")) == before
    assert (house / "params.yaml").read_text() == HOUSE


@pytest.mark.parametrize(("title", "arxiv"), [(" ", ""), ("two\nlines", ""), ("fine", "arXiv:2308.08463")])
def test_a_bad_title_or_number_is_refused(house: Path, title: str, arxiv: str) -> None:
    with pytest.raises(NewPaperError, match="expected one"):
        new_paper.create("second", title, arxiv)
    assert not (house / "papers" / "second").exists()


def test_the_proposed_claim_is_one(house: Path) -> None:
    new_paper.create("second", "Sparse")
    path = house / "papers" / "second" / "claims.yaml"
    _state_the_claim(path)
    assert [claim.id for claim in claims.load(path)] == ["method-beats-raw"]


@pytest.mark.slow
def test_a_stub_keeps_the_contract_and_runs_and_gets_on_the_board_with_its_first_claim(house: Path) -> None:
    title = 'A Title: "quoted", with $dollars, \\ and more words than fit into one line of a file, ' + "so long " * 12
    new_paper.create("second", title, "2308.08463")
    (house / "params.yaml").write_text("profile: smoke\npapers: [second]\n")

    # its notebook is executed below, by the driver itself
    contract = python(house, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not runs_at_smoke", "tests")
    assert contract.returncode == 0, contract.stdout
    assert " passed" in contract.stdout
    for command in (["check"], ["format", "--check"]):
        style = python(house, "-m", "ruff", *command, "--no-cache", "papers", "tests/papers")
        assert style.returncode == 0, style.stdout

    ran = python(house, "-m", "pipelines.cli", "run", "second", "--profile", "smoke")
    assert ran.returncode == 0, ran.stderr
    measured = json.loads((house / "results" / "metrics" / "second" / "smoke.json").read_text())["metrics"]
    assert set(measured["rmse"]) == {"raw", "method"}

    refused = python(house, "-m", "pipelines.cli", "board")
    assert "stub" in refused.stdout + refused.stderr
    assert json.loads((house / "scoreboard.json").read_text())["claims"] == []

    _state_the_claim(house / "papers" / "second" / "claims.yaml")
    about = house / "papers" / "second" / "paper.yaml"
    about.write_text(about.read_text().replace("stub: true", ""))
    assert python(house, "-m", "pipelines.cli", "board").returncode == 0
    rows = json.loads((house / "scoreboard.json").read_text())["claims"]
    assert [row["verdict"] for row in rows if row["profile"] == "smoke"] == ["reproduced"]


def _state_the_claim(path: Path) -> None:
    """Uncomment the claim that the template proposes."""
    lines = [line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith(("# - ", "#   "))]
    path.write_text("\n".join(lines) + "\n")
