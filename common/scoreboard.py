"""The board: every claim of every paper at every profile, as rows, as JSON, as Markdown, and as a table to print.

Rows come from the claims, not from the results, so a measurement that is missing stands there as a row. What is written
to files depends on the committed results alone: no clock, no machine, so an unchanged board is an unchanged file.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from common import claims, paper, paths, provenance
from common.claims import ERROR, NOT_TESTED, VERDICTS, Claim, Verdict
from common.params import PROFILES

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SIGNS = {"reproduced": "✔", "refuted": "✘", "inconclusive": "≈", "not tested": "–", "error": "!"}
_COLORS = {"reproduced": "green", "refuted": "red", "inconclusive": "yellow", "not tested": "dim", "error": "bold red"}
_SHOWN = 6  # significant digits that files keep: enough to read, few enough to be the same on every machine


@dataclass(frozen=True)
class Row:
    """One claim at one profile, as `scoreboard.json` holds it; numbers are None where nothing was measured."""

    paper: str
    id: str
    text: str
    kind: str
    claimed: str
    expect: str
    profile: str
    seeds: int
    measured: float | None
    low: float | None
    high: float | None
    verdict: str
    reason: str
    device: str
    run: str


@dataclass(frozen=True)
class Entry:
    """One paper on the board: its description, its claims, their rows, and what is known of each measured profile."""

    paper: paper.Paper
    claims: tuple[Claim, ...]
    rows: tuple[Row, ...]
    provenance: Mapping[str, Mapping[str, Any]]  # profile -> provenance, measured profiles only
    restored: tuple[str, ...] = ()  # profiles whose results were not measured in this checkout

    def at(self, claim_id: str, profile: str) -> Row:
        return next(row for row in self.rows if (row.id, row.profile) == (claim_id, profile))

    def headline(self, claim_id: str) -> Row:
        """The claim at the highest profile that says anything; untested everywhere: at the profile it needs."""
        rows = [row for row in self.rows if row.id == claim_id]
        told = [row for row in rows if row.verdict != NOT_TESTED]
        if told:
            return max(told, key=lambda row: PROFILES.index(row.profile))
        return self.at(claim_id, next(claim for claim in self.claims if claim.id == claim_id).needs.profile)

    def lower(self, claim_id: str) -> list[Row]:
        """What the profiles below the headline say, the highest first."""
        top = PROFILES.index(self.headline(claim_id).profile)
        rows = (self.at(claim_id, profile) for profile in reversed(PROFILES[:top]))
        return [row for row in rows if row.verdict != NOT_TESTED]

    @property
    def headlines(self) -> list[Row]:
        return [self.headline(claim.id) for claim in self.claims]


@dataclass(frozen=True)
class Board:
    """All papers; `refused` gives the reason for each paper that has no place on the board yet."""

    entries: tuple[Entry, ...]
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> list[Row]:
        return [row for entry in self.entries for row in entry.rows]

    @property
    def errors(self) -> list[Row]:
        return [row for row in self.rows if row.verdict == ERROR]


def collect(slugs: Iterable[str], due: str) -> Board:
    """Judge every claim of the papers `slugs` by the results under `common.paths.root()`.

    Args:
        due: the profile whose results must be there; a missing one is an error, at other profiles it is not tested.

    A stub (`stub: true` in paper.yaml, no claim) is refused and takes no row.

    Raises:
        ClaimError, PaperError: a paper's files break their schema, or a paper that is no stub has no claim.
    """
    entries, refused = [], {}
    for slug in slugs:
        about = paper.load(paths.paper(slug) / "paper.yaml")
        if about.stub:
            refused[slug] = "a stub: give it a claim in claims.yaml and remove `stub: true` from paper.yaml"
            continue
        entries.append(_entry(about, claims.load(paths.paper(slug) / "claims.yaml"), due))
    return Board(tuple(entries), refused)


def to_json(board: Board) -> str:
    """`scoreboard.json`: the rows, and under `built` which execution each measured profile comes from."""
    built = {
        f"{entry.paper.slug}/{profile}": {"run": origin.get("run", ""), "commit": _commit(origin)}
        for entry in board.entries
        for profile, origin in entry.provenance.items()
    }
    content = {"claims": [asdict(row) for row in board.rows], "built": built}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def to_markdown(board: Board) -> str:
    """`SCOREBOARD.md`: counts a paper, then a table a paper with lower profiles and reasons beside each verdict."""
    lines = [
        "# Scoreboard",
        "",
        "Each claim at the highest profile measured, lower ones below its verdict. *Measured* is the mean over seeds "
        "with its 95 % interval: inside the expectation is reproduced, outside refuted, across it inconclusive. "
        "Written by `dvc repro`; the same with figures is in [results/site](results/site/index.html).",
        "",
        "| paper | " + " | ".join(f"{SIGNS[verdict]} {verdict}" for verdict in VERDICTS) + " |",
        "|---" * (len(VERDICTS) + 1) + "|",
    ]
    for entry in board.entries:
        numbers = " | ".join(str(number or "") for number in counts(entry.headlines).values())
        lines.append(f"| [{_cell(entry.paper.title)}](papers/{entry.paper.slug}) | {numbers} |")
    for entry in board.entries:
        lines += ["", f"## {entry.paper.title}", ""]
        for profile, origin in entry.provenance.items():
            lines.append(f"- `{profile}`: {origin.get('device', '')}, commit `{_commit(origin)}`")
        lines += [""] * bool(entry.provenance)
        lines += ["| claim | claimed | expected | measured (95 %) | seeds | profile | verdict |", "|---" * 7 + "|"]
        lines += [_markdown_row(entry, claim) for claim in entry.claims]
    for slug, reason in board.refused.items():
        lines += ["", f"Refused: `{slug}` is {reason}."]
    return "\n".join(lines) + "\n"


def counts(rows: Sequence[Row]) -> dict[str, int]:
    """How many rows have each verdict, all verdicts named."""
    found = Counter(row.verdict for row in rows)
    return {verdict: found[verdict] for verdict in VERDICTS}


def measured(row: Row) -> str:
    """The measurement as text: `0.83 (0.61 to 1.05)`, or a dash."""
    if row.measured is None:
        return "–"
    if row.low is None or row.low == row.high:
        return f"{row.measured:.4g}"
    return f"{row.measured:.4g} ({row.low:.4g} to {row.high:.4g})"


@dataclass(frozen=True)
class Change:
    """One claim at one profile whose verdict differs between two boards; an absent row's verdict is empty."""

    paper: str
    id: str
    profile: str
    before: str
    after: str


def diff(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """The verdicts that differ between two parsed `scoreboard.json`, in the newer one's order, removed rows last."""
    old, new = _verdicts(before), _verdicts(after)
    keys = [*new, *(key for key in old if key not in new)]
    return [Change(*key, old.get(key, ""), new.get(key, "")) for key in keys if old.get(key) != new.get(key)]


def grouped(rows: Iterable[Row]) -> dict[str, list[str]]:
    """Claim ids by what is told of them: one missing run is one message, not one for each of its claims."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(f"{row.paper} at {row.profile}: {row.reason}", []).append(row.id)
    return groups


def print_table(board: Board, console: Console | None = None) -> None:
    """Print one line a claim that was tested, the others in one sentence, then errors and refusals with reasons."""
    from rich.console import Console
    from rich.markup import escape

    console = console or Console()
    for entry in board.entries:
        console.print(_table(entry))
        for profile, names in _untested(entry).items():
            console.print(f"[dim]not tested, needs a run at {profile}:[/] {', '.join(names)}")
        told = ", ".join(f"{number} {verdict}" for verdict, number in counts(entry.headlines).items() if number)
        restored = "; * restored: measured elsewhere, came with git or DVC's cache" if entry.restored else ""
        console.print(f"[dim]{told}{restored}[/]\n")
    for where, names in grouped(board.errors).items():
        console.print(f"[bold red]error[/] {escape(where)} ({', '.join(names)})")
    for slug, reason in board.refused.items():
        console.print(f"[yellow]refused[/] {slug}: {escape(reason)}")


def _table(entry: Entry) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=escape(entry.paper.title),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE,
        padding=(0, 1),
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("claim", overflow="fold")
    for name in ("expected", "measured"):
        table.add_column(name, overflow="fold")
    table.add_column("seeds", justify="right", no_wrap=True)
    for name in ("profile", "verdict"):
        table.add_column(name, no_wrap=True)
    for row in entry.headlines:
        if row.verdict == NOT_TESTED:
            continue
        mark = "*" if row.profile in entry.restored and row.measured is not None else ""
        verdict = f"[{_COLORS[row.verdict]}]{SIGNS[row.verdict]} {row.verdict}[/]"
        seeds = str(row.seeds or "–")
        table.add_row(row.id, escape(row.expect), measured(row), seeds, row.profile + mark, verdict)
    return table


def _untested(entry: Entry) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in entry.headlines:
        if row.verdict == NOT_TESTED:
            found.setdefault(row.profile, []).append(row.id)
    return found


def _entry(about: paper.Paper, found: Sequence[Claim], due: str) -> Entry:
    rows: dict[tuple[str, str], tuple[Claim, Verdict]] = {}
    origins, restored = {}, []
    for profile in PROFILES:
        metrics, origin = _results(about.slug, profile)
        if metrics is not None:
            origins[profile] = origin
            if provenance.restored(origin):
                restored.append(profile)
        for claim in found:
            rows[claim.id, profile] = claim, claims.judge(claim, metrics, origin, profile, due=profile == due)
    verdicts = {key: verdict for key, (_, verdict) in rows.items()}
    ordered = [
        _row(claim, verdicts[claim.id, profile], _stand_in(claim, found, verdicts))
        for claim in found
        for profile in PROFILES
    ]
    return Entry(about, tuple(found), tuple(ordered), origins, tuple(restored))


def _results(slug: str, profile: str) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Metrics (None without a usable file) and provenance; `status` says what became of a run that left no metrics."""
    content = _read(paths.metrics(slug, profile))
    if "metrics" in content:
        return content["metrics"], _read(paths.provenance(slug, profile))
    if content:
        return None, {"status": "the metrics file is unreadable"}
    if paths.failed(slug, profile).is_dir():
        return None, {"status": "the run failed"}
    if any(not _alive(folder.name) for folder in paths.running(slug, profile, 0).parent.glob(f"{profile}-*")):
        return None, {"status": "the run is unfinished or was killed"}
    return None, {}


def _alive(folder: str) -> bool:
    """Whether the driver that owns a running folder, `<profile>-<process id>`, still exists."""
    try:
        os.kill(int(folder.rpartition("-")[2]), 0)
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return True


def _read(path: Any) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        return {"unreadable": True}
    return content if isinstance(content, dict) else {"unreadable": True}


def _row(claim: Claim, verdict: Verdict, stand_in: str) -> Row:
    reason = verdict.reason + (stand_in if verdict.verdict == NOT_TESTED else "")
    return Row(
        paper=claim.paper,
        id=claim.id,
        text=claim.text,
        kind=claim.kind,
        claimed=claim.claimed,
        expect=claim.expect or str(claim.band),
        profile=verdict.profile,
        seeds=verdict.seeds,
        measured=_short(verdict.measured),
        low=_short(verdict.low),
        high=_short(verdict.high),
        verdict=verdict.verdict,
        reason=reason,
        device=verdict.device,
        run=verdict.run,
    )


def _stand_in(claim: Claim, found: Sequence[Claim], verdicts: Mapping[tuple[str, str], Verdict]) -> str:
    """What smaller claims say in this claim's place; their verdict never becomes its own."""
    told = []
    for other in found:
        if other.proxy_of == claim.id:
            tested = [verdicts[other.id, profile] for profile in PROFILES]
            tested = [verdict for verdict in tested if verdict.verdict != NOT_TESTED]
            last = f"{tested[-1].verdict} at {tested[-1].profile}" if tested else "not tested either"
            told.append(f"; its small stand-in {other.id}: {last}")
    return "".join(told)


def _markdown_row(entry: Entry, claim: Claim) -> str:
    row = entry.headline(claim.id)
    stands_in = f" · stands in for {claim.proxy_of} ({claim.scale})" if claim.proxy_of else ""
    about = f"{_cell(claim.text)}<br><sub>{claim.id} · {_cell(claim.source + stands_in)}</sub>"
    verdict = f"{SIGNS[row.verdict]} **{row.verdict}**"
    if row.verdict != claims.REPRODUCED:
        verdict += f"<br><sub>{_cell(row.reason)}</sub>"
    for other in entry.lower(claim.id):
        verdict += f"<br><sub>{other.profile}: {SIGNS[other.verdict]} {other.verdict}, {measured(other)}</sub>"
    cells = (about, _cell(row.claimed), _cell(row.expect), measured(row), str(row.seeds or "–"), row.profile, verdict)
    return "| " + " | ".join(cells) + " |"


def _cell(text: str) -> str:
    """Text that stays inside its cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{_SHOWN}g}")


def _commit(origin: Mapping[str, Any]) -> str:
    git = origin.get("git") or {}
    return str(git.get("commit", ""))[:7] + ("+changes" if git.get("dirty") else "")


def _verdicts(board: Mapping[str, Any]) -> dict[tuple[str, str, str], str]:
    return {(row["paper"], row["id"], row["profile"]): row["verdict"] for row in board.get("claims", [])}
