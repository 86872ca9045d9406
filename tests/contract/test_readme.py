"""What the README prints is what the committed results say."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def committed(path: str) -> dict:
    """A JSON file as of the last commit: runs of one's own may have written it anew since."""
    found = subprocess.run(["git", "show", f"HEAD:{path}"], cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(f"{path} is in no commit here, so there is nothing to compare the README with")
    return json.loads(found.stdout)


def table_rows(first_column: str) -> list[list[str]]:
    """The rows, cell by cell, of the README's table whose head begins with this column."""
    tables = re.findall(r"(?:^\|.*\n)+", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    for table in tables:
        rows = [
            [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]
            for line in table.splitlines()
        ]
        if rows[0][0] == first_column:
            return rows[2:]
    raise AssertionError(f"README.md has no table that begins with {first_column!r}; its tables: {len(tables)}")


def test_the_speeds_are_the_measured_ones() -> None:
    measured = {
        (row["case"].split()[0], row["threads"], row["call"]): (row["ratio"], row["ratio_low"], row["ratio_high"])
        for row in committed("results/bench.json")["rows"]
        if row["case"].endswith("512^2/720") and row["implementation"] == "ours avx2" and row["batch"] == 1
    }
    printed = {}
    for (beam, threads), row in zip(
        [("parallel", 1), ("parallel", 2), ("fan", 1), ("fan", 2)], table_rows(""), strict=True
    ):
        for call, cell in zip(("project", "backproject"), row[1:], strict=True):
            printed[beam, threads, call] = tuple(float(x) for x in re.findall(r"[\d.]+\d|\d+", cell.replace("..", " ")))
    for key, values in printed.items():
        assert values == tuple(float(f"{value:.2g}") for value in measured[key]), key


def test_the_scoreboard_is_the_committed_one() -> None:
    claims = committed("scoreboard.json")["claims"]
    for paper, scale, *printed in table_rows("paper"):
        at = {"paper": re.findall(r"papers/(\w+)", paper)[0], "profile": re.findall(r"`(\w+)`", scale)[0]}
        verdicts = [claim["verdict"] for claim in claims if at.items() <= claim.items()]
        wanted = [verdicts.count(name) for name in ("reproduced", "refuted", "inconclusive", "not tested")]
        assert [int(number) for number in printed] == wanted and sum(wanted) == len(verdicts), at
