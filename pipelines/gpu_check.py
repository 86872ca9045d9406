"""`make gpu-check`: are the Triton kernels right on this machine's GPU, and how fast?

    python -m pipelines.gpu_check [--interpret] [--folder results/gpu] [--repeats 30]

Compares each kernel with its float64 reference on many inputs, then times it, and writes `<folder>/<device>.json` and a
readable table on the screen. Needs Python, torch, Triton, NumPy and a CUDA GPU, nothing else. Exit code: 0 all checks
hold, 1 some do not, 2 there is no GPU. `--interpret` runs the checks on tiny inputs in Triton's interpreter on the CPU,
without timings and without a file: it shows that this program works, not that a GPU does.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from pipelines.gpu import attention, ct, masked_grad, nm
from pipelines.gpu.report import Check, print_checks, print_timings, write

ROOT = Path(__file__).resolve().parent.parent
NO_GPU = 2
OPS = (ct, nm, attention, masked_grad)


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
        return print_checks(list(_checks(torch.device("cpu"), tiny=True)))
    os.environ.pop("TRITON_INTERPRET", None)
    if not torch.cuda.is_available():
        print(f"gpu-check: torch {torch.__version__} sees no CUDA GPU, so nothing was checked; try --interpret")
        return NO_GPU
    device = torch.device("cuda", torch.cuda.current_device())
    checks = list(_checks(device, tiny=False))
    code = print_checks(checks)
    timings = [timing for op in OPS for timing in op.timings(device, options.repeats)] if code == 0 else []
    print_timings(timings)
    path = options.folder / f"{_slug(torch.cuda.get_device_name(device))}.json"
    write(path, {**_machine(device), "ok": code == 0, "checks": checks, "timings": timings})
    print(f"\nwritten: {path}")
    return code


def _checks(device: torch.device, tiny: bool) -> Iterator[Check]:
    for op in OPS:
        yield from op.checks(device, tiny)


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


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
