"""The board as static pages: `results/site/index.html` and one page a paper.

They load nothing from the network and need no script; figures stay where they are and are shown from `../figures`. All
text that comes from a paper's files is escaped.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import files, params, paths, scoreboard
from common.claims import NOT_TESTED
from common.scoreboard import Board, Entry
from pipelines.site.plot import interval_plot

_HERE = Path(__file__).parent
_PROFILES = {
    "smoke": "generated data, under a minute on two cores",
    "laptop": "real data, under half an hour on two cores without a GPU",
    "paper": "the authors' data and schedule on one CUDA GPU",
}
_VERDICTS = {
    "reproduced": "the 95 % interval over seeds lies inside the expectation",
    "refuted": "it lies outside",
    "inconclusive": "it reaches across the border, or there are too few seeds",
    "not tested": "no run meets what the claim needs; the reason says how to get one",
    "error": "the measurement is missing or cannot answer the claim",
}


def build(board: Board) -> list[Path]:
    """Write the pages of `board` afresh under `results/site`; returns them, the index first."""
    site = paths.results() / "site"
    environment = _environment()
    # A page of a paper that has left the board would otherwise stay.
    shutil.rmtree(site, ignore_errors=True)
    pages = {"index.html": environment.get_template("index.html").render(**_index(board))}
    for entry in board.entries:
        page = environment.get_template("paper.html").render(**_paper(entry))
        pages[f"{entry.paper.slug}.html"] = page
    for name, page in pages.items():
        files.write(site / name, page)
    return [site / name for name in pages]


def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        css=Markup((_HERE / "style.css").read_text(encoding="utf-8")),
        signs=scoreboard.SIGNS,
        verdict_meanings=_VERDICTS,
        profile_meanings=_PROFILES,
        measured=scoreboard.measured,
    )
    environment.filters.update(slug=lambda text: text.replace(" ", "-"), url=_address)
    return environment


def _index(board: Board) -> dict[str, Any]:
    cards = [
        {
            "paper": entry.paper,
            "counts": scoreboard.counts(entry.headlines),
            "profiles": list(entry.provenance),
            "figure": _cover(entry),
        }
        for entry in board.entries
    ]
    total = scoreboard.counts([row for entry in board.entries for row in entry.headlines])
    return {
        "cards": cards,
        "total": total,
        "refused": board.refused,
        "errors": scoreboard.grouped(board.errors),
        "tables": [*_tables(paths.results() / "bench.json"), *_gpu_tables()],
    }


def _paper(entry: Entry) -> dict[str, Any]:
    stories = []
    for claim in entry.claims:
        row = entry.headline(claim.id)
        others = [entry.at(claim.id, profile) for profile in params.PROFILES if profile != row.profile]
        stories.append({"claim": claim, "row": row, "others": others, "plot": interval_plot(claim, row)})
    return {
        "paper": entry.paper,
        "tested": [story for story in stories if story["row"].verdict != NOT_TESTED],
        "untested": [story for story in stories if story["row"].verdict == NOT_TESTED],
        "counts": scoreboard.counts(entry.headlines),
        "figures": _figures(entry),
        "runs": [_run(entry, profile, origin) for profile, origin in entry.provenance.items()],
    }


def _cover(entry: Entry) -> dict[str, Any] | None:
    """The figure that stands for the paper: the one it names as `cover`, at the highest profile, else the first."""
    figures = [figure for group in _figures(entry) for figure in group["figures"]]
    return next((f for f in figures if f["name"] == entry.paper.cover), figures[0] if figures else None)


def _figures(entry: Entry) -> list[dict[str, Any]]:
    """The figures of each measured profile, the highest first."""
    groups = []
    for profile in reversed(list(entry.provenance)):
        folder = paths.figures(entry.paper.slug, profile)
        captions = _json(folder / "figures.json") or {}
        figures = [
            {
                "name": name,
                "src": f"../figures/{entry.paper.slug}/{profile}/{name}.png",
                "caption": str(caption),
                "size": _png_size(folder / f"{name}.png"),
            }
            for name, caption in captions.items()
            if (folder / f"{name}.png").is_file()
        ]
        if figures:
            groups.append({"profile": profile, "figures": figures})
    return groups


def _run(entry: Entry, profile: str, origin: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader wants to know of one execution; an unknown part is left out."""
    machine, git, environment = origin.get("machine") or {}, origin.get("git") or {}, origin.get("environment") or {}
    content = _json(paths.metrics(entry.paper.slug, profile)) or {}
    seeds = content.get("params", {}).get("seeds", [])
    facts = {
        "device": origin.get("device"),
        "machine": ", ".join(
            str(part)
            for part in (
                machine.get("system"),
                machine.get("cores") and f"{machine['cores']} cores",
                machine.get("ram_gb") and f"{machine['ram_gb']:g} GB",
            )
            if part
        ),
        "took": _duration(origin.get("seconds")),
        "finished": str(origin.get("finished", ""))[:16].replace("T", " "),
        "seeds": ", ".join(map(str, seeds)),
        "data": ", ".join(origin.get("data") or ()) or "generated",
        "commit": str(git.get("commit", ""))[:12] + (" with uncommitted changes" if git.get("dirty") else ""),
        "software": ", ".join(f"{name} {environment[name]}" for name in ("python", "torch") if name in environment),
        "tracked run": origin.get("run"),
    }
    notebook = paths.run(entry.paper.slug, profile) / "notebook.html"
    return {
        "profile": profile,
        "facts": {name: value for name, value in facts.items() if value},
        "notebook": f"../runs/{entry.paper.slug}/{profile}/notebook.html" if notebook.is_file() else "",
    }


def _gpu_tables() -> list[dict[str, Any]]:
    return [table for path in sorted((paths.results() / "gpu").glob("*.json")) for table in _tables(path)]


def _tables(path: Path) -> list[dict[str, Any]]:
    """Each list of records in a results file as a table: `{name, about, columns, rows}`; other values are its notes."""
    content = _json(path)
    if not content:
        return []
    parts = content if isinstance(content, dict) else {"": content}
    about = {name: value for name, value in parts.items() if isinstance(value, str | int | float)}
    tables = []
    for name, value in parts.items():
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            scalars = (str, int, float, bool)
            columns = list(dict.fromkeys(key for row in value for key in row if isinstance(row[key], scalars)))
            rows = [[_shown(row.get(column)) for column in columns] for row in value]
            title = f"{path.stem}: {name}" if name else path.stem
            tables.append({"name": title, "about": about, "columns": columns, "rows": rows})
    return tables


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _png_size(path: Path) -> tuple[int, int]:
    """Width and height from the PNG's header: the page can then leave the room before the picture is loaded."""
    header = path.read_bytes()[:24]
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _address(value: Any) -> str:
    """Only web addresses become links; anything else in a paper's files stays text."""
    text = str(value)
    return text if text.startswith(("https://", "http://")) else ""
