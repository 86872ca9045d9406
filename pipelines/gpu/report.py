"""A measured number and its limit, a time and what it is held against; how both are taken, printed and kept."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Check:
    """One measured number and the limit it must stay under; `fault` is the error where there is no number."""

    op: str
    case: str
    name: str
    value: float
    limit: float
    fault: str = ""

    @property
    def ok(self) -> bool:
        return not self.fault and self.value <= self.limit


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call, whole batch: median and quartiles over the repeats.

    rate      of work at the median, in `unit`
    ratio     how many times faster than `beside`, of the medians
    peak_mib  of all that lay on the GPU meanwhile
    """

    op: str
    case: str
    call: str
    batch: int
    median_ms: float
    low_ms: float
    high_ms: float
    rate: float
    unit: str
    ratio: float | None = None
    beside: str = ""
    peak_mib: float | None = None


def measured(op: str, case: str, name: str, measure: Callable[[], float], limit: float) -> Check:
    """The check of what `measure` returns; if it raises, a failed check."""
    try:
        return Check(op, case, name, measure(), limit)
    except Exception as error:  # whatever a compiler or driver throws belongs in the report, not in front of it
        return Check(op, case, name, math.nan, limit, f"{type(error).__name__}: {str(error).strip()[:400]}")


def error(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact|, of Euclidean norms; exact is float64."""
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def call_times(call: Callable[[], Any], repeats: int) -> list[float]:
    """Milliseconds of each call on the GPU's clock, as Python launches it, after calls that compile and warm up."""
    for _ in range(5):
        call()
    return _times(call, repeats)


def graph_times(calls: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Milliseconds a call, of a CUDA graph that makes all the calls one after the other: no launches from Python.

    Calls on different data, together larger than the cache, are not served by it.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # capture wants everything compiled and allocated
        for _ in range(2):
            calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    return [time / len(calls) for time in _times(graph.replay, repeats)]


def quartiles(times: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, median, high


def print_checks(checks: Sequence[Check]) -> int:
    """Prints every check; 0 if all hold, else 1."""
    for check in checks:
        verdict = "ok  " if check.ok else "FAIL"
        print(f"{verdict}  {check.op}  {check.case:42} {check.name:30} {check.value:9.2e}  limit {check.limit:.0e}")
        if check.fault:
            print(f"      {check.fault}")
    failed = sum(not check.ok for check in checks)
    print(f"\n{len(checks) - failed} of {len(checks)} checks hold")
    return 1 if failed or not checks else 0


def print_timings(timings: Sequence[Timing]) -> None:
    """Prints every timing."""
    if not timings:
        print("no timings: wrong results are not worth timing")
        return
    print(f"\n{'':4}{'case':22}{'call':26}{'batch':>6}{'median ms':>11}{'quartiles':>18}{'rate':>15}  ")
    for t in timings:
        spread = f"{t.low_ms:.4f}..{t.high_ms:.4f}"
        print(f"{t.op:4}{t.case:22}{t.call:26}{t.batch:>6}{t.median_ms:>11.4f}{spread:>18}", end="")
        print(f"{t.rate:>8.1f} {t.unit:8}", end="")
        print(f"{t.ratio:6.2f} x {t.beside}" if t.ratio is not None else "")


def write(path: Path, report: dict[str, Any]) -> None:
    """The report as JSON, whole or not at all; its `checks` and `timings` become rows."""

    def row(check: Check) -> dict[str, Any]:
        return asdict(check) | {"ok": check.ok, "value": check.value if math.isfinite(check.value) else None}

    rows = {
        "checks": [row(check) for check in report["checks"]],
        "timings": [asdict(timing) for timing in report["timings"]],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".json.part")
    partial.write_text(json.dumps(report | rows, indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def _times(call: Callable[[], Any], repeats: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]
