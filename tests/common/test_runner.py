"""The runner: notebooks that cannot be driven are refused, runs that did not prove themselves are not believed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import psutil
import pytest
import toy_paper

from common import notebook_html, runner

VALUES = {"seeds": [0, 1], "dataset": "made", "rate": 1e-4, "fault": "none"}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_paper.build(tmp_path_factory.mktemp("runner") / "house")


@pytest.fixture
def execute(house: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    monkeypatch.chdir(house)
    # somebody else's kernel of the same name, which must not be the one that runs
    wrong = house / "jupyter" / "kernels" / "python3" / "kernel.json"
    wrong.parent.mkdir(parents=True, exist_ok=True)
    wrong.write_text(json.dumps({"argv": ["/nowhere/python"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(house / "jupyter"))
    folder = house / "results" / "scratch" / re.sub(r"\W+", "-", request.node.name)

    def execute(tick=lambda pid, message: None, **values) -> Path:
        runner.execute_notebook("toy", "smoke", {**VALUES, **values}, folder, tick=tick)
        return folder

    execute.folder = folder
    return execute


@pytest.fixture
def notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy paper's notebook in a house of its own that no test runs."""
    house = toy_paper.build(tmp_path / "house")
    monkeypatch.chdir(house)
    monkeypatch.syspath_prepend(str(house))
    return house / "papers" / "toy" / "toy.py"


def test_a_run_leaves_record_notebook_and_page(execute) -> None:
    messages: list[str] = []
    folder = execute(tick=lambda pid, message: messages.append(message))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["params"] == VALUES and metrics["metrics"]["doubled"]["all in"] == {"0": 0.0002, "1": 2.0002}
    assert messages[0] == "starting" and any(message.startswith("cell ") for message in messages)
    notebook = nbformat.read(folder / "notebook.ipynb", as_version=4)
    injected = [cell.source for cell in notebook.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    assert len(injected) == 1 and "rate = 0.0001" in injected[0] and "seeds = [0, 1]" in injected[0]
    assert str(folder) not in (folder / "notebook.ipynb").read_text(), "no machine path in the saved notebook"
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    bars = [output.text for output in outputs if output.output_type == "stream"]
    assert len(bars) == 1 and bars[0].count("doubling") == 1 and "2/2" in bars[0], "a bar leaves its last state"
    page = (folder / "notebook.html").read_text()
    assert "<script" not in page.lower() and not re.findall(r"""(?:src|href)=["']?https?:""", page)
    assert 'alt="y = 2 x"' in page and "data:image/png;base64" in page
    assert (folder / "resolved.yaml").read_text().startswith("profile: smoke\n")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("raise", r"^toy: ZeroDivisionError: on purpose \(in cell 8 of 9, under 'Trouble'\)$"),
        ("kill", r"^toy: the kernel died in cell 8 of 9, under 'Trouble'\. The run used \d+% of the machine's memory"),
        ("crash", r"the kernel died .* crashed in compiled code \(Fatal Python error: Segmentation fault\)"),
        ("silent", r"ended without metrics\.json.*expected it to call record\.close\(\)"),
    ],
)
def test_a_run_that_fails_says_where_and_why(execute, fault: str, said: str) -> None:
    with pytest.raises(runner.RunFailed, match=said) as caught:
        execute(fault=fault, seeds=[])
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    assert not (execute.folder / "metrics.json").exists()
    assert '"metric": "begun"' in (execute.folder / "record.jsonl").read_text(), "what was measured is still there"
    assert (execute.folder / "notebook.ipynb").exists() and (execute.folder / "notebook.html").exists()


def test_an_interrupted_driver_leaves_no_process_behind(execute) -> None:
    family: set[psutil.Process] = set()

    class Enough(Exception):
        pass

    def tick(pid: int, message: str) -> None:
        family.update([psutil.Process(pid), *psutil.Process(pid).children(recursive=True)])
        if "hanging" in message:
            raise Enough

    with pytest.raises(Enough):
        execute(tick=tick, fault="hang", seeds=[])
    assert len(family) >= 2, "the notebook's process and its kernel"
    assert not [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def test_the_toy_notebook_passes_the_check(notebook: Path) -> None:
    assert runner.parameter_names(notebook) == ["profile", "seeds", "dataset", "rate", "fault"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("rate = None\n", "raet = None\n", "lacks rate and has raet, which Params does not Did you mean 'rate'"),
        ("rate = None\n", "", "lacks rate"),
        ('profile = "smoke"\n', "", "lacks profile"),
        ("rate = None\n", "rate = None\nprint(1)\n", r"`print\(1\)`; expected only name = value"),
        ('tags=["parameters"]', "", "got 0 cells tagged `parameters`"),
    ],
)
def test_a_notebook_that_does_not_fit_its_dataclass_is_refused(
    notebook: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, said: str
) -> None:
    import dataclasses

    fields = [(name, object) for name in VALUES]
    monkeypatch.setattr(runner.params, "settings", lambda slug: dataclasses.make_dataclass("Params", fields))
    runner.check("toy")
    text = notebook.read_text()
    assert text.count(old) == 1
    notebook.write_text(text.replace(old, new))
    with pytest.raises(runner.NotebookError, match=said.replace("not Did", "not Did")):
        runner.check("toy")


def page(source: str) -> str:
    return notebook_html.render(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(source)]), "A title")


def test_formulas_are_drawn_and_prices_and_code_are_not() -> None:
    assert 'alt="a_1^2"' in page("Take $a_1^2$.")
    assert "text-align:center" in page("$$\\frac{a}{b}$$") and 'alt="\\frac{a}{b}"' in page("$$\\frac{a}{b}$$")
    assert "<img" not in page("It costs 5$ or 6$, `$x$` and\n```\n$y$\n```")
    assert "<code>\\unknowncommand{x}</code>" in page("See $\\unknowncommand{x}$.")


def test_the_page_has_its_title() -> None:
    assert "<title>A title</title>" in page("x")
