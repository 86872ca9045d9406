"""`make gpu-check`: are the Triton kernels right on this machine's GPU, and how fast?

    python -m pipelines.gpu_check [--interpret] [--folder results/gpu] [--repeats 30]

Compares each kernel with its float64 reference on many inputs, then times it, and writes `<folder>/<device>.json` and a
readable table on the screen. Needs Python, torch, Triton, NumPy and a CUDA GPU, nothing else. Exit code: 0 all checks
hold, 1 some do not, 2 there is no GPU. `--interpret` runs the checks on tiny inputs in Triton's interpreter on the CPU,
without timings and without a file: it shows that this program works, not that a GPU does.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import ct
from kernels.ct import FanBeam, ParallelBeam, backproject, project, reference

ROOT = Path(__file__).resolve().parent.parent
NO_GPU = 2
Scan = ParallelBeam | FanBeam

# float32 sums of some thousand terms, one after the other; positions are good to 1e-7 pixel
WORST_ERROR = 2e-6
WORST_DEFECT = 1e-6


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
    """Milliseconds a call, whole batch: median and quartiles over the repeats; million rays a second at the median."""

    op: str
    case: str
    call: str
    batch: int
    median_ms: float
    low_ms: float
    high_ms: float
    mrays_per_s: float
    peak_mib: float


def main(arguments: list[str] | None = None) -> int:
    """Runs the checks, prints the tables, returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.gpu_check", description="Check and time GPU kernels.")
    parser.add_argument("--interpret", action="store_true", help="tiny checks on the CPU, in Triton's interpreter")
    parser.add_argument("--folder", type=Path, default=ROOT / "results" / "gpu", help="where the JSON file goes")
    parser.add_argument("--repeats", type=int, default=30, help="timed calls for each case")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}; expected 1 or more")
    os.environ["KERNELS_BACKEND"] = "triton"
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, which the first kernel call does
        return _report_checks(list(_checks(torch.device("cpu"), tiny=True)))
    os.environ.pop("TRITON_INTERPRET", None)
    if not torch.cuda.is_available():
        print(f"gpu-check: torch {torch.__version__} sees no CUDA GPU, so nothing was checked; try --interpret")
        return NO_GPU
    device = torch.device("cuda", torch.cuda.current_device())
    checks = list(_checks(device, tiny=False))
    code = _report_checks(checks)
    timings = list(_ct_timings(device, options.repeats)) if code == 0 else []
    _report_timings(timings)
    path = options.folder / f"{_slug(torch.cuda.get_device_name(device))}.json"
    _write(path, {**_machine(device), "ok": code == 0, "checks": checks, "timings": timings})
    print(f"\nwritten: {path}")
    return code


def _checks(device: torch.device, tiny: bool) -> Iterator[Check]:
    scans = TINY_SCANS if tiny else {**TINY_SCANS, **SCANS}
    for case, scan in scans.items():
        for batch in (3,) if tiny else (1, 3, 9):  # 9: a whole block of images and a ragged one
            if batch == 9 and scan.shape[0] > 256:
                continue  # the reference would take minutes
            yield from _ct_checks(device, f"{case}, batch {batch}", scan, batch)


# --- kernels.ct -------------------------------------------------------------------------------------------------------

MIXED = (0.0, 0.3, math.pi / 4, -2.2)

TINY_SCANS: dict[str, Scan] = {
    "parallel 7x9": ParallelBeam(MIXED, 12, (7, 9), pitch=0.9, pixel=1.1, offset=0.3, axis=-0.7),
    "fan 8x5": FanBeam(
        MIXED, 11, (8, 5), source_axis=22.0, axis_detector=9.0, pitch=1.4, pixel=0.9, offset=0.4, axis=0.8
    ),
    "one pixel": ParallelBeam(MIXED, 1, (1, 1)),
}

P512 = ParallelBeam.uniform(720, 736, (512, 512))
F512 = FanBeam.uniform(720, 736, (512, 512), source_axis=1024.0, axis_detector=512.0, pitch=1.5)
P256 = ParallelBeam.uniform(180, 368, (256, 256))
F256 = FanBeam.uniform(180, 368, (256, 256), source_axis=512.0, axis_detector=256.0, pitch=1.5)
LENGTHS = {"pixel": 0.8, "offset": 0.21, "axis": -0.4}

SCANS: dict[str, Scan] = {
    "parallel 512^2/720": P512,
    "fan 512^2/720": F512,
    "parallel 131x257, moved": ParallelBeam.uniform(61, 391, (131, 257), pitch=0.7, **LENGTHS),
    "fan 257x131, moved": FanBeam.uniform(
        61, 391, (257, 131), source_axis=170.0, axis_detector=90.0, pitch=1.3, **LENGTHS
    ),
    "fan, source beside the image": FanBeam.uniform(13, 200, (64, 64), source_axis=45.6, axis_detector=20.0),
    "parallel, fine cells": ParallelBeam.uniform(13, 700, (64, 64), pitch=0.15),
    "parallel, coarse cells": ParallelBeam.uniform(13, 30, (64, 64), pitch=4.0),
}


def _ct_checks(device: torch.device, case: str, scan: Scan, batch: int) -> Iterator[Check]:
    """Every check of a scan; one that raises becomes a failed check, and the others still run."""
    # white noise: smooth images hide errors of position
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(batch, *scan.shape, generator=generator).to(device)
    sinogram = torch.randn(batch, *scan.sinogram_shape, generator=generator).to(device)
    measures: dict[str, tuple[Callable[[Scan, Tensor, Tensor], float], float]] = {
        "project against float64": (_projection_error, WORST_ERROR),
        "backproject against float64": (_backprojection_error, WORST_ERROR),
        "adjoint": (_adjoint_defect, WORST_DEFECT),
        "gradients": (_gradient_error, 0.0),
        "not the same again": (_unrepeated, 0.0),
        "strides": (_stride_error, 0.0),
        "NaN that spreads or vanishes": (_nan_leaks, 0.0),
    }
    for name, (measure, limit) in measures.items():
        try:
            yield Check("ct", case, name, measure(scan, image, sinogram), limit)
        except Exception as error:  # whatever a compiler or driver throws belongs in the report, not in front of it
            yield Check("ct", case, name, math.nan, limit, f"{type(error).__name__}: {str(error).strip()[:400]}")


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def _projection_error(scan: Scan, image: Tensor, sinogram: Tensor) -> float:
    return _error(project(image, scan), reference.project(image.double(), scan))


def _backprojection_error(scan: Scan, image: Tensor, sinogram: Tensor) -> float:
    return _error(backproject(sinogram, scan), reference.backproject(sinogram.double(), scan))


def _adjoint_defect(scan: Scan, image: Tensor, sinogram: Tensor) -> float:
    ax, aty = project(image, scan).double(), backproject(sinogram, scan).double()
    difference = (ax * sinogram.double()).sum() - (image.double() * aty).sum()
    return float(difference.abs() / (ax.norm() * sinogram.double().norm()))


def _gradient_error(scan: Scan, image: Tensor, sinogram: Tensor) -> float:
    """Autograd, once and twice, gives what the two functions give."""
    x, y = image.clone().requires_grad_(), sinogram.clone().requires_grad_()
    (first,) = torch.autograd.grad((project(x, scan) * y).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((first * image).sum(), y)
    once, twice = first.detach() - backproject(sinogram, scan), second - project(image, scan)
    return float(torch.maximum(once.abs().max(), twice.abs().max()))


def _unrepeated(scan: Scan, image: Tensor, sinogram: Tensor) -> float:
    """How many values differ when the same calls run again."""
    forward = project(image, scan) != project(image, scan)
    back = backproject(sinogram, scan) != backproject(sinogram, scan)
    return float(forward.sum() + back.sum())


def _stride_error(scan: Scan, image: Tensor, sinogram: Tensor) -> float:
    forward = project(image.mT.contiguous().mT, scan) - project(image, scan)
    back = backproject(sinogram.mT.contiguous().mT, scan) - backproject(sinogram, scan)
    return float(torch.maximum(forward.abs().max(), back.abs().max()))


def _nan_leaks(scan: Scan, image: Tensor, sinogram: Tensor) -> float:
    """Cells that see a NaN pixel and are not NaN, and cells far from it, or of other images, that are."""
    row, column = scan.shape[0] // 2, scan.shape[1] // 3
    pixel, around = torch.zeros_like(image[:1]), torch.zeros_like(image[:1])
    pixel[0, row, column] = 1
    around[0, max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3] = 1
    image = image.clone()
    image[0, row, column] = math.nan
    found = project(image, scan).isnan()
    lost = (project(pixel, scan) > 1e-3 * scan.pixel) & ~found[:1]
    spread = (project(around, scan) == 0) & found[:1]
    return float(lost.sum() + spread.sum() + found[1:].sum())


def _ct_timings(device: torch.device, repeats: int) -> Iterator[Timing]:
    cases: dict[str, Scan] = {
        "parallel 512^2/720": P512,
        "parallel 256^2/180": P256,
        "fan 512^2/720": F512,
        "fan 256^2/180": F256,
    }
    for case, scan in cases.items():
        for batch in (1, 8, 32):
            image = torch.randn(batch, *scan.shape, device=device)
            sinogram = torch.randn(batch, *scan.sinogram_shape, device=device)
            rays = batch * scan.views * scan.cells
            for call, data in (("project", image), ("backproject", sinogram)):
                torch.cuda.reset_peak_memory_stats(device)
                times = _time(getattr(ct, call), data, scan, repeats)
                low, median, high = _quartiles(times)
                peak = torch.cuda.max_memory_allocated(device) / 2**20
                yield Timing("ct", case, call, batch, median, low, high, rays / median / 1e3, peak)


# --- timing and reporting ---------------------------------------------------------------------------------------------


def _time(function: Callable[..., Tensor], data: Tensor, scan: Scan, repeats: int) -> list[float]:
    """Milliseconds of each call on the GPU's clock, after calls that compile and warm up."""
    for _ in range(5):
        function(data, scan)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        function(data, scan)
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _quartiles(times: list[float]) -> tuple[float, float, float]:
    if len(times) == 1:
        return times[0], times[0], times[0]
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, median, high


def _report_checks(checks: list[Check]) -> int:
    """Prints every check; 0 if all hold, else 1."""
    for check in checks:
        verdict = "ok  " if check.ok else "FAIL"
        print(f"{verdict}  {check.op}  {check.case:42} {check.name:30} {check.value:9.2e}  limit {check.limit:.0e}")
        if check.fault:
            print(f"      {check.fault}")
    failed = sum(not check.ok for check in checks)
    print(f"\n{len(checks) - failed} of {len(checks)} checks hold")
    return 1 if failed or not checks else 0


def _report_timings(timings: list[Timing]) -> None:
    if not timings:
        print("no timings: wrong results are not worth timing")
        return
    print(f"\n{'':4}{'scan':22}{'call':13}{'batch':>5}{'median ms':>11}{'quartiles':>20}{'Mrays/s':>10}{'MiB':>8}")
    for t in timings:
        spread = f"{t.low_ms:.3f}..{t.high_ms:.3f}"
        print(f"{t.op:4}{t.case:22}{t.call:13}{t.batch:>5}{t.median_ms:>11.3f}{spread:>20}", end="")
        print(f"{t.mrays_per_s:>10.0f}{t.peak_mib:>8.0f}")


def _machine(device: torch.device) -> dict[str, Any]:
    import triton

    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": torch.cuda.get_device_name(device),
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": head.stdout.strip() or None,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _write(path: Path, report: dict[str, Any]) -> None:
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


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
