"""`make bench`: how fast the compiled kernels are beside the peers a user would pick instead, on this machine.

    python -m kernels.bench [op] [--quick] [--out results/bench.json]

All implementations of a case run in one process, in turns, after a warm-up: round by round, every other round in
reverse, so that a machine that slows down slows all of them. Times are of one call with its whole batch; a ratio is the
baseline's time an image over the implementation's, taken within a round, as median and quartiles over the rounds. CPU
time is of all threads. Memory is what the call adds to the process at its peak, its result included. An op named on the
command line replaces its own rows in the file, the other ops' rows stay. Leave the machine alone meanwhile.

What is timed is told by `kernels/<op>/bench.py`: `cases(quick)` yields one `Case` after the other and may clean up what
a case needs when it is resumed; `PEERS` names the distributions whose versions belong to the numbers.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported late, see `main`
    from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
OPS = sorted(path.parent.name for path in Path(__file__).parent.glob("*/bench.py"))

CASE_S = 15.0  # a case stops after the round in which it has taken this long
ROUNDS = (3, 25)  # but not before the first number, and after the second at the latest
SAMPLE_S = 0.05  # short calls are repeated within a round until they take this long together
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

Row = dict[str, Any]


@dataclass(frozen=True)
class Contender:
    """One implementation of a case: `run` makes one call, on `threads` threads of torch, for `batch` images.

    `run` is None where a peer is missing; `note` then says so. `result` makes of what `run` returned what `Case.exact`
    returns, or is None where the two are not to be compared (`note` says why). `ours`: its memory is of interest.
    """

    name: str
    run: Callable[[], Any] | None
    result: Callable[[Any], Tensor] | None = None
    threads: int = 1
    batch: int = 1
    note: str = ""
    ours: bool = False


@dataclass(frozen=True)
class Case:
    """A problem and who solves it. `baseline` is a contender's name, `exact` the float64 result, slow to get.

    `data_bytes`: input and output of one image. `work`: how many elementary steps the problem takes whoever solves it,
    where they can be counted (for splatting, pairs of a Gaussian and a pixel that it changes).
    """

    name: str
    call: str
    contenders: Sequence[Contender]
    baseline: str
    exact: Callable[[], Tensor]
    data_bytes: int
    work: int | None = None


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints a table and writes the file; returns the exit code, 1 where our own kernels cannot run."""
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description="Time the kernels and their peers.")
    parser.add_argument("op", nargs="?", help=f"one of {', '.join(OPS)}; without it all")
    parser.add_argument("--quick", action="store_true", help="tiny inputs, one round: shows that the program works")
    parser.add_argument("--out", type=Path, help="the JSON file; default results/bench.json, with --quick none")
    options = parser.parse_args(arguments)
    if options.op and options.op not in OPS:
        near = difflib.get_close_matches(options.op, OPS, 1, cutoff=0)[0]
        parser.error(f"unknown op {options.op!r}; expected one of {', '.join(OPS)}; did you mean {near!r}?")
    out = options.out or (None if options.quick else ROOT / "results" / "bench.json")
    if out:
        _read(out)  # a file that cannot be continued should not show after minutes of measuring
    os.environ["KERNELS_BACKEND"] = "cpu"
    # read once, when torch is imported: threads that wait must not spin into the next implementation's CPU time
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from kernels import KernelUnavailable
    from kernels._load import native

    try:
        native()
    except KernelUnavailable as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    for op in [options.op] if options.op else OPS:
        module = import_module(f"kernels.{op}.bench")
        facts = _facts(module.PEERS)
        rows = list(_rows(op, module.cases(options.quick), options.quick))
        if out:
            _write(out, op, rows, facts | {"quick": options.quick})
    if out:
        print(f"\nwritten: {out}")
    return 0


def missing(name: str, package: str) -> Contender:
    """The row of a peer that is not installed."""
    return Contender(name, None, note=f"{package} is not installed: make setup-peers")


def other_isas() -> list[str]:
    """Instruction sets that this host runs beside the one in use; none if KERNELS_ISA has chosen."""
    from kernels._load import native

    if os.environ.get("KERNELS_ISA"):
        return []
    module = native()
    found = [isa for isa in module.info()["isas_compiled"] if not isa.startswith("emulated") and _runs(module, isa)]
    return [isa for isa in found if isa != module.info()["isa"]]


def with_isa(isa: str, run: Callable[[], Any]) -> Any:
    """What `run` returns with this instruction set."""
    before = os.environ.get("KERNELS_ISA")
    os.environ["KERNELS_ISA"] = isa
    try:
        return run()
    finally:
        del os.environ["KERNELS_ISA"]
        if before is not None:
            os.environ["KERNELS_ISA"] = before


def _runs(module: Any, isa: str) -> bool:
    try:
        return with_isa(isa, module.info)["isa"] == isa
    except RuntimeError:  # this processor lacks it
        return False


def _rows(op: str, cases: Iterable[Case], quick: bool) -> Iterator[Row]:
    for case in cases:
        work = "" if case.work is None else f", {case.work / 1e6:.1f} M steps"
        print(f"\n{op}  {case.call}, {case.name}: {case.data_bytes / 2**20:.1f} MiB{work}; ratios to {case.baseline}")
        print(f"  {'implementation':22}{'threads':>8}{'batch':>6}{'ms':>10}{'quartiles':>20}{'CPU ms':>10}", end="")
        print(f"{'ratio':>9}{'quartiles':>16}{'error':>9}{'+MiB':>7}{'M steps/s':>11}", flush=True)
        for row in measure(op, case, 1 if quick else None):
            print(_line(row), flush=True)
            yield row


def measure(op: str, case: Case, rounds: int | None = None) -> list[Row]:
    """The rows of a case, one for each contender, in their order; `rounds`: as many as that, whatever they take."""
    present = [c for c in case.contenders if c.run]
    exact = case.exact().double()
    differences = [_difference(c, exact) for c in present]  # the warm-up, too
    calls = [1 if rounds else max(1, round(SAMPLE_S / _sample(c, 1)[0])) for c in present]
    samples: list[list[tuple[float, float]]] = [[] for _ in present]
    start = time.perf_counter()
    while not _enough(len(samples[0]), time.perf_counter() - start, rounds):
        order = range(len(present))
        for i in order if len(samples[0]) % 2 == 0 else reversed(order):
            samples[i].append(_sample(present[i], calls[i]))
    base = next(([(s[0] / c.batch) for s in samples[i]] for i, c in enumerate(present) if c.name == case.baseline), [])
    measured = {
        id(c): _times(samples[i], base, c.batch) | {"difference": differences[i], "extra_mib": _extra_mib(c)}
        for i, c in enumerate(present)
    }
    unmeasured = dict.fromkeys(next(iter(measured.values()), {})) | {"spread": {}}
    return [
        {"op": op, "case": case.name, "call": case.call, "implementation": c.name, "threads": c.threads}
        | {"batch": c.batch}
        | measured.get(id(c), unmeasured)
        | {"data_mib": c.batch * case.data_bytes / 2**20, "baseline": case.baseline, "note": c.note, "work": case.work}
        for c in case.contenders
    ]


def _enough(done: int, seconds: float, rounds: int | None) -> bool:
    if rounds:
        return done >= rounds
    least, most = ROUNDS
    return done >= most or (done >= least and seconds > CASE_S)


def _sample(contender: Contender, calls: int) -> tuple[float, float]:
    """Wall and CPU seconds a call, means over `calls` of them."""
    import torch

    assert contender.run is not None
    torch.set_num_threads(contender.threads)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        contender.run()
    return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls


def _times(samples: list[tuple[float, float]], base: list[float], batch: int) -> Row:
    """Milliseconds a call and ratios to `base`, wall seconds an image of the same rounds."""
    wall, cpu = (_quartiles([1e3 * sample[i] for sample in samples]) for i in (0, 1))
    ratio = _quartiles([b / (s[0] / batch) for b, s in zip(base, samples, strict=True)]) if base else (None,) * 3
    return {
        "wall_ms": wall[1],
        "cpu_ms": cpu[1],
        "ratio": ratio[1],
        "ratio_low": ratio[0],
        "ratio_high": ratio[2],
        "rounds": len(samples),
        "spread": {"wall_ms": [wall[0], wall[2]], "cpu_ms": [cpu[0], cpu[2]]},
    }


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def _difference(contender: Contender, exact: Tensor) -> float | None:
    """Relative L2 distance from the float64 result."""
    import torch

    assert contender.run is not None
    torch.set_num_threads(contender.threads)
    out = contender.run()
    if contender.result is None:
        return None
    return float((contender.result(out).double() - exact).norm() / exact.norm())


def _extra_mib(contender: Contender) -> float | None:
    """What one call adds to the resident memory at its peak; None where Linux does not say, or it is not ours.

    The C library first gives back what earlier calls have freed, or the call would reuse it unseen; then the kernel
    forgets the old peak (proc(5), clear_refs). Good to some 0.2 MiB.
    """
    import ctypes

    import torch

    if not contender.ours or contender.run is None:
        return None
    torch.set_num_threads(contender.threads)
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_kib("VmRSS")
        kept = contender.run()
        peak = _status_kib("VmHWM")
    except (OSError, AttributeError):
        return None
    del kept  # the result counts, so it lives until here
    return (peak - before) / 1024


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _line(row: Row) -> str:
    start = f"  {row['implementation']:22}{row['threads']:>8}{row['batch']:>6}"
    if not row["spread"]:
        return f"{start}  {row['note']}"
    low, high = row["spread"]["wall_ms"]
    line = f"{start}{row['wall_ms']:>10.3f}{f'{low:.4g}..{high:.4g}':>20}{row['cpu_ms']:>10.3f}"
    spread = "" if row["ratio"] is None else f"{row['ratio_low']:.3g}..{row['ratio_high']:.3g}"
    line += f"{'' if row['ratio'] is None else format(row['ratio'], '.3g'):>9}{spread:>16}"
    line += f"{'' if row['difference'] is None else format(row['difference'], '.0e'):>9}"
    line += f"{'' if row['extra_mib'] is None else format(row['extra_mib'], '.1f'):>7}"
    rate = "" if row["work"] is None else format(row["work"] * row["batch"] / row["wall_ms"] / 1e3, ".0f")
    return f"{line}{rate:>11}  {row['note']}".rstrip()


def _facts(peers: Iterable[str]) -> dict[str, Any]:
    """The machine and what ran on it; no path, no host, no user."""
    import kernels

    git = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "cpu": _cpu(),
        "cores": CORES,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "numpy", *peers)},
        "kernels": {name: value for name, value in kernels.info().items() if name != "binary"},
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "commit": commit.stdout.strip() or None,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _summary(facts: dict[str, Any]) -> str:
    """The facts that a reader of the table needs, in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    isa, load, day = facts["kernels"]["isa"], facts["load_average"][0], facts["measured"][:10]
    machine = f"{facts['cpu']}, {isa}, {facts['cores']} cores, load {load} at the start"
    return f"{machine}; {versions}; commit {facts['commit']}, {day}"


def _read(path: Path) -> dict[str, Any]:
    """What the file holds, nothing if it is not there."""
    try:
        found = json.loads(path.read_text())
        return {"runs": dict(found["runs"]), "rows": list(found["rows"])}
    except FileNotFoundError:
        return {"runs": {}, "rows": []}
    except (ValueError, KeyError, TypeError):
        raise SystemExit(
            f"bench: {path} holds something else than benchmarks; remove it or name another --out"
        ) from None


def _write(path: Path, op: str, rows: list[Row], facts: dict[str, Any]) -> None:
    """Put the rows of an op into the file, which is whole at any moment; each op keeps the facts of its own run."""
    before = _read(path)
    runs = {name: run for name, run in (before["runs"] | {op: facts}).items() if name in OPS}
    kept = [row for row in before["rows"] if row["op"] in OPS and row["op"] != op]
    report = {f"machine ({name})": _summary(run) for name, run in sorted(runs.items())}
    report |= {"runs": runs, "rows": sorted(kept + rows, key=lambda row: row["op"])}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".json.part")
    partial.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    partial.replace(path)


if __name__ == "__main__":
    from kernels.bench import main  # the same module, under the name by which the ops' benchmarks import it

    sys.exit(main())
