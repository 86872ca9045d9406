"""What a batch came to: mean and spread over seeds for each metric, variant and swept value; as table, JSON and CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import files
from pipelines.batch import Batch, BatchError

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Line:
    """One metric of one variant at one choice of the swept values; `std` is the sample's, None for a single value."""

    metric: str
    variant: str
    swept: Mapping[str, str]
    mean: float
    std: float | None
    n: int


def rows(batch: Batch) -> list[dict[str, Any]]:
    """The rows of the batch's cells that have one, in the order of the plan."""
    return [row for row in map(batch.row, batch.cells) if row is not None]


def lines(found: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Means over the cells that are done. A value that was not finite is left out, and so is missing from `n`."""
    groups: dict[tuple[str, str, tuple[tuple[str, str], ...]], list[float]] = {}
    order = list(dict.fromkeys(tuple(row["swept"].items()) for row in found))
    for row in found:
        for metric, variant, value in _values(row):
            group = groups.setdefault((metric, variant, tuple(row["swept"].items())), [])
            group += [] if value is None else [value]
    named = list(dict.fromkeys((metric, variant) for metric, variant, _ in groups))
    ordered = sorted(groups, key=lambda group: (named.index(group[:2]), order.index(group[2])))
    return [_line(group, groups[group]) for group in ordered if groups[group]]


def write(batch: Batch, command: str) -> list[Path]:
    """Write `summary.json` and `cells.csv` into the batch's folder; returns the two paths.

    command: what to type to run this batch again.
    """
    found = rows(batch)
    states = [row["status"] for row in found]
    summary = {
        "paper": batch.slug,
        "profile": batch.profile,
        "command": command,
        "cells": {"planned": len(batch.cells), "done": states.count("done"), "failed": states.count("failed")},
        "table": [asdict(line) for line in lines(found)],
        "errors": {row["key"]: row["error"] for row in found if row["status"] == "failed"},
    }
    targets = [batch.folder / "summary.json", batch.folder / "cells.csv"]
    files.write_json(targets[0], summary)
    files.write(targets[1], to_csv(found))
    return targets


def to_csv(found: Sequence[Mapping[str, Any]]) -> str:
    """One line a cell, metric and variant; a failed cell has one line with its error."""
    axes = list(dict.fromkeys(axis for row in found for axis in row["swept"]))
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["cell", "status", *axes, "seed", "metric", "variant", "value", "seconds", "error"])
    for row in found:
        start = [row["key"], row["status"], *(row["swept"].get(axis, "") for axis in axes), row["seed"]]
        end = [row["seconds"], row["error"]]
        for metric, variant, value in list(_values(row)) or [("", "", "")]:
            writer.writerow([*start, metric, variant, "nan" if value is None else value, *end])
    return stream.getvalue()


def print_table(batch: Batch, console: Console, *, show: Sequence[str] = ()) -> None:
    """Print mean ± std for the metrics named in `show` (all if empty), then the errors.

    Raises BatchError for a metric that no cell recorded.
    """
    from rich.markup import escape
    from rich.table import Table

    found = rows(batch)
    told = lines(found)
    _require_known(show, sorted({line.metric for line in told}))
    if told:
        table = Table("metric", "variant", *told[0].swept, show_edge=False)
        table.add_column("mean ± std over seeds", justify="right")
        table.add_column("n", justify="right")
        for line in told:
            if not show or line.metric in show:
                spread = "" if line.std is None else f" ± {line.std:.2g}"
                place = [escape(text) for text in (line.metric, line.variant, *line.swept.values())]
                table.add_row(*place, f"{line.mean:.5g}{spread}", str(line.n))
        console.print(table)
    for row in found:
        if row["status"] == "failed":
            console.print(f"[bold red]failed[/] {escape(row['key'])}: {escape(row['error'])}", soft_wrap=True)


def _values(row: Mapping[str, Any]) -> Iterator[tuple[str, str, float | None]]:
    for metric, variants in row["metrics"].items():
        for variant, columns in variants.items():
            for value in columns.values():
                yield metric, variant, value


def _line(group: tuple[str, str, tuple[tuple[str, str], ...]], values: Sequence[float]) -> Line:
    std = statistics.stdev(values) if len(values) > 1 else None
    return Line(group[0], group[1], dict(group[2]), statistics.fmean(values), std, len(values))


def _require_known(show: Sequence[str], known: Sequence[str]) -> None:
    from common.params import suggest

    for name in show:
        if name not in known:
            options = ", ".join(known) or "(no metric)"
            raise BatchError(f"got --show {name}, expected one of {options}.{suggest(name, known)}")
