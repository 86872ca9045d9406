"""`resparse new <slug>`: the folder of a new paper, a stub that runs and passes the contract tests at once.

The stub re-measures nothing, and says so: `stub: true` in its paper.yaml keeps it off the board until it has a claim.
"""

from __future__ import annotations

import datetime
import json
import keyword
import re
import shutil
import sys
import textwrap
from pathlib import Path
from string import Template

from common import files, paths

TEMPLATES = Path(__file__).parent / "templates"
_FOLDER = ("settings.py", "method.py", "paper.yaml", "claims.yaml", "params.yaml")


class NewPaperError(ValueError):
    """A slug, title or arXiv number that cannot be used: what, got, expected, next step."""


def create(slug: str, title: str, arxiv: str = "") -> list[Path]:
    """Write the paper's folder and its sabotage test, and add it to `papers:` in the root's params.yaml.

    Returns the files written or changed. Raises NewPaperError before anything is written.
    """
    _require_slug(slug)
    _require_free(slug)
    if not title.strip() or "\n" in title:
        raise NewPaperError(f"got the title {title!r}, expected one line of text; give it with --title '...'")
    if arxiv and not re.fullmatch(r"\d{4}\.\d{4,5}", arxiv):
        raise NewPaperError(f"got the arXiv number {arxiv!r}, expected one such as 2308.08463; leave it out if none.")
    house = _house_with(slug)
    texts = _render(slug, title.strip(), arxiv)

    folder, test = paths.paper(slug), _sabotage_test(slug)
    building = folder.with_name(f".{slug}.new")  # renamed when complete: a paper is there as a whole or not at all
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    for name, text in texts.items():
        (building / name).write_text(text, encoding="utf-8")
    building.rename(folder)
    files.write(test, _fill("sabotage.py", slug=slug))
    files.write(paths.root() / "params.yaml", house)
    return [*(folder / name for name in texts), test, paths.root() / "params.yaml"]


def _require_slug(slug: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]{1,39}", slug):
        proposal = re.sub(r"\W+", "_", slug.lower()).strip("_").lstrip("0123456789_")[:40]
        hint = f"; perhaps {proposal}" if len(proposal) > 1 else ""
        raise NewPaperError(
            f"got the slug {slug!r}, expected 2 to 40 lower-case letters, digits and '_' that begin with a letter, "
            f"because it becomes a Python package{hint}."
        )
    if keyword.iskeyword(slug) or keyword.issoftkeyword(slug) or slug in sys.stdlib_module_names:
        raise NewPaperError(
            f"got the slug {slug!r}, which is a word of Python, expected a name of its own; perhaps {slug}_paper."
        )


def _require_free(slug: str) -> None:
    for path in (paths.paper(slug), _sabotage_test(slug)):
        if path.exists():
            raise NewPaperError(
                f"{paths.relative(path)} exists already, expected a new slug; choose another name, or remove it first."
            )


def _sabotage_test(slug: str) -> Path:
    return paths.root() / "tests" / "papers" / f"test_{slug}_sabotage.py"


def _render(slug: str, title: str, arxiv: str) -> dict[str, str]:
    words = {
        "slug": slug,
        "heading": textwrap.shorten(title, 110, placeholder=" …"),  # one line of a Python file
        "quoted_title": json.dumps(title, ensure_ascii=False),  # a JSON string is a YAML string too
        "quoted_arxiv": json.dumps(arxiv),
        "year": f"20{arxiv[:2]}" if arxiv else str(datetime.date.today().year),
    }
    notebook = _fill("notebook.py", **words)
    return {
        "__init__.py": "",
        f"{slug}.py": notebook,
        f"{slug}.ipynb": _paired(notebook),
        **{name: _fill(name, **words) for name in _FOLDER},
    }


def _fill(name: str, **words: str) -> str:
    return Template((TEMPLATES / f"{name}.in").read_text(encoding="utf-8")).substitute(words)


def _paired(notebook: str) -> str:
    import jupytext

    return jupytext.writes(jupytext.reads(notebook, fmt="py:percent"), fmt="ipynb")


def _house_with(slug: str) -> str:
    """The root's params.yaml with one more paper; every comment and line of it stays."""
    import io

    from ruamel.yaml import YAML

    path = paths.root() / "params.yaml"
    text = path.read_text(encoding="utf-8")
    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, 4096
    if re.search(r"^ +- ", text, flags=re.MULTILINE):
        yaml.indent(mapping=2, sequence=4, offset=2)
    content = yaml.load(text)
    if not isinstance(content, dict) or not isinstance(content.get("papers"), list):
        raise NewPaperError(f"{paths.relative(path)} has no list `papers:`, expected one; restore it with git.")
    if slug in content["papers"]:
        raise NewPaperError(f"{paths.relative(path)} lists {slug!r} already, expected a new slug; choose another name.")
    content["papers"].append(slug)
    stream = io.StringIO()
    yaml.dump(content, stream)
    return stream.getvalue()
