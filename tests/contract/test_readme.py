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


def test_the_times_of_splatting_are_the_measured_ones() -> None:
    found = {
        (row["case"], "naive" if row["implementation"] == "naive torch" else row["threads"]): row
        for row in committed("results/bench.json")["rows"]
        if row["op"] == "splat" and row["implementation"] in ("ours avx2", "naive torch")
    }
    rows = table_rows("Gaussians")
    assert {row[0] for row in rows} == {case for case, _ in found}
    for case, *cells in rows:
        naive = found.get((case, "naive"))
        two = found[case, 2]
        times = [found[case, 1]["wall_ms"], two["wall_ms"], naive["wall_ms"] if naive else None]
        ratios = [two[name] for name in ("ratio", "ratio_low", "ratio_high")] if naive else []
        rate = two["work"] / two["wall_ms"] / 1e3
        wanted = [*[[] if time is None else [time] for time in times], ratios, [rate]]
        printed = [[float(x) for x in re.findall(r"[\d.]+\d|\d+", cell.replace("..", " "))] for cell in cells]
        assert printed == [[float(f"{value:.2g}") for value in values] for values in wanted], case


def test_the_speeds_of_packed_weights_are_the_measured_ones() -> None:
    found = {
        (*row["case"].split(" ", 1), row["implementation"]): row
        for row in committed("results/bench.json")["rows"]
        if row["op"] == "nm" and row["call"] == "linear" and row["threads"] == 1
    }
    rows = table_rows("kept")
    assert {row[0] for row in rows} == {pattern for pattern, *_ in found}
    columns = [
        ("4096^2 x 1", "ours float32"),
        ("4096^2 x 1", "ours bfloat16"),
        ("4096^2 x 1", "dense bfloat16"),
        ("1024^2 x 256", "ours float32"),
        ("1024^2 x 256", "dense bfloat16"),
    ]
    for pattern, saved, *cells in rows:
        assert float(saved) == float(found[pattern, "4096^2 x 1", "ours float32"]["note"].split()[0])
        for (case, implementation), cell in zip(columns, cells, strict=True):
            row = found[pattern, case, implementation]
            wanted = [float(f"{row[name]:.2g}") for name in ("ratio", "ratio_low", "ratio_high")]
            assert [float(x) for x in re.findall(r"[\d.]+\d|\d+", cell.replace("..", " "))] == wanted, pattern


def test_the_speeds_of_attention_are_the_measured_ones() -> None:
    found = {
        (row["case"], row["implementation"]): row
        for row in committed("results/bench.json")["rows"]
        if row["op"] == "attention"
    }
    rows = table_rows("head dim, kept")
    assert len(rows) == 6
    for what, *cells in rows:
        dim, density = what.split(", ")
        columns = [(dtype, name) for dtype in ("float32", "bfloat16") for name in ("ours", "FlexAttention")]
        for (dtype, name), cell in zip(columns, cells, strict=True):
            row = found[f"16384 x {dim} {dtype}, density {density}", name]
            wanted = [float(f"{row[key]:.2g}") for key in ("ratio", "ratio_low", "ratio_high")]
            assert [float(x) for x in re.findall(r"[\d.]+\d|\d+", cell.replace("..", " "))] == wanted, (what, dtype)


def test_the_scoreboard_is_the_committed_one() -> None:
    claims = committed("scoreboard.json")["claims"]
    for paper, scale, *printed in table_rows("paper"):
        at = {"paper": re.findall(r"papers/(\w+)", paper)[0], "profile": re.findall(r"`(\w+)`", scale)[0]}
        verdicts = [claim["verdict"] for claim in claims if at.items() <= claim.items()]
        wanted = [verdicts.count(name) for name in ("reproduced", "refuted", "inconclusive", "not tested")]
        assert [int(number) for number in printed] == wanted and sum(wanted) == len(verdicts), at
