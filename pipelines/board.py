"""Build the board: judge every claim, write `SCOREBOARD.md`, `scoreboard.json` and the pages under `results/site`.

python -m pipelines.board              write; errors are told and make the exit status 1 (refuted claims do not)
python -m pipelines.board --table      print every claim as well (`resparse board`)
python -m pipelines.board --diff REV   print the verdicts that differ from those of a commit
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from common import files, params, paths, scoreboard
from common.claims import ClaimError
from common.expressions import nearest
from common.paper import PaperError
from common.params import ParamError
from common.scoreboard import Board, Change
from pipelines import site


class BoardError(ValueError):
    """The board cannot be built or compared; the message says what to do."""


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.board", description="Judge every claim; write the board."
    )
    parser.add_argument("--table", action="store_true", help="print every claim")
    parser.add_argument("--diff", metavar="REV", help="print the verdicts that differ from this commit's")
    options = parser.parse_args(argv)
    try:
        return show(table=options.table, diff=options.diff or "")
    except (BoardError, ClaimError, PaperError, ParamError) as error:
        print(f"resparse: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def show(*, table: bool, diff: str = "") -> int:
    """Write the board and print what is asked for; 1 if a verdict is an error, else 0.

    Raises:
        BoardError, ClaimError, PaperError, ParamError: as `build` and `changes`.
    """
    from rich.console import Console

    console = Console()
    board = build()
    if table:
        scoreboard.print_table(board, console)
    elif board.errors or board.refused:
        _print_faults(board)
    if diff:
        _print_changes(changes(diff), diff)
    told = ", ".join(f"{n} {verdict}" for verdict, n in _total(board).items() if n) or "no claim yet"
    print(f"{told}. Read SCOREBOARD.md, or open results/site/index.html")
    return 1 if board.errors else 0


def build() -> Board:
    """Judge everything that `params.yaml` names and write the board's files, each as a whole.

    Raises:
        BoardError, ParamError: `params.yaml` cannot be read, or names a paper or profile that is not there.
        ClaimError, PaperError: a paper's files break their schema.
    """
    profile, papers = _house()
    board = scoreboard.collect(papers, profile)
    files.write(paths.root() / "scoreboard.json", scoreboard.to_json(board))
    files.write(paths.root() / "SCOREBOARD.md", scoreboard.to_markdown(board))
    site.build(board)
    return board


def changes(revision: str) -> list[Change]:
    """The verdicts that differ between `scoreboard.json` of a commit and the one in the working tree.

    Raises:
        BoardError: git does not know the commit, or there is no board in it.
    """
    done = subprocess.run(
        ["git", "show", f"{revision}:./scoreboard.json"], cwd=paths.root(), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["git failed"])[-1]
        raise BoardError(f"no board in commit {revision!r}: {reason}; name a commit that holds scoreboard.json.")
    after = json.loads((paths.root() / "scoreboard.json").read_text(encoding="utf-8"))
    return scoreboard.diff(json.loads(done.stdout), after)


def _house() -> tuple[str, list[str]]:
    """The profile whose results are due, and the papers on the board."""
    profile, papers = params.house()
    missing = [slug for slug in papers if not paths.paper(str(slug)).is_dir()]
    if missing:
        known = [path.name for path in (paths.root() / "papers").iterdir() if (path / "claims.yaml").is_file()]
        raise BoardError(
            f"params.yaml: papers names {missing[0]!r}, no folder of papers/; {nearest(str(missing[0]), known)}"
        )
    if profile not in params.PROFILES:
        raise BoardError(
            f"params.yaml: profile got {profile!r}, expected one of {', '.join(params.PROFILES)}; "
            f"{nearest(str(profile), params.PROFILES)}"
        )
    return profile, papers


def _total(board: Board) -> dict[str, int]:
    return scoreboard.counts([row for entry in board.entries for row in entry.headlines])


def _print_faults(board: Board) -> None:
    for where, names in scoreboard.grouped(board.errors).items():
        print(f"error: {where} ({', '.join(names)})", file=sys.stderr)
    for slug, reason in board.refused.items():
        print(f"refused: {slug} is {reason}", file=sys.stderr)


def _print_changes(found: list[Change], revision: str) -> None:
    print(f"verdicts against {revision}:" if found else f"no verdict differs from {revision}")
    for change in found:
        before, after = change.before or "(absent)", change.after or "(absent)"
        print(f"  {change.paper} {change.id} at {change.profile}: {before} -> {after}")


if __name__ == "__main__":
    sys.exit(main())
