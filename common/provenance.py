"""Where a result comes from: sources, environment, machine, data, times. Written into git beside every metrics file.

It names no user, no host and no folder of the machine.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from common import files, paths

# What a run itself writes does not make its sources dirty.
# params.yaml says which papers and profile to run, and `dvc exp run -S profile=...` writes it
_WRITTEN_BY_RUNS = ("results", "SCOREBOARD.md", "scoreboard.json", "dvc.lock", "params.yaml")
_SOURCE_SUFFIXES = {".py", ".yaml", ".json", ".cpp", ".h", ".in", ".txt"}
# Instruction sets that decide how fast a kernel can be, x86 and Arm.
_ISA = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16",
        "amx_tile", "amx_int8", "amx_bf16", "asimd", "sve", "sve2")  # fmt: skip


@dataclass
class Clock:
    """When a run began and how busy the machine was then."""

    started: float = field(default_factory=time.time)
    load: tuple[float, float, float] = field(default_factory=os.getloadavg)


def collect(
    slug: str, profile: str, params: Mapping[str, Any], data: Mapping[str, Any], clock: Clock
) -> dict[str, Any]:
    """The provenance of one execution, called at its end from the process that measured.

    `device` begins with the kind of device the process really used, `cuda` or `cpu`. The driver adds `run`, the
    tracked run that produced the files; `restored` is decided later, by whoever reads them (see `restored`).
    """
    finished = time.time()
    return {
        "paper": slug,
        "profile": profile,
        "run": "",
        "device": _device(),
        "params_digest": files.digest([json.dumps(params, sort_keys=True)]),
        "data": dict(data),
        "git": git(),
        "sources_digest": sources_digest(slug),
        "kernels": kernel_info(),
        "environment": environment(),
        "machine": machine(),
        "started": _utc(clock.started),
        "finished": _utc(finished),
        "seconds": round(finished - clock.started, 1),
        "load_average": {"start": _rounded(clock.load), "end": _rounded(os.getloadavg())},
        "peak_memory_mb": _peak_memory_mb(),
    }


def restored(provenance: Mapping[str, Any]) -> bool:
    """Whether these results came from git or from DVC's cache instead of a run in this checkout.

    DVC brings back outputs of an earlier run without running, and a clone has them from git. The tracked run they name
    is then the one that measured them, and may be unknown to the tracking store here.
    """
    return bool(provenance) and _execution(provenance) not in _ledger()


def remember(provenance: Mapping[str, Any]) -> None:
    """Note that this checkout itself produced these results; called by the driver when it publishes them."""
    path = paths.results() / "scratch" / "measured_here.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.write(_execution(provenance) + "\n")


def sources(slug: str) -> list[Path]:
    """The files whose change can change what a paper measures.

    The paper's own Python files (claims, prose and parameters aside), the folders of `common` (its single files
    administrate; `seeds.py` alone draws numbers), and `kernels` without its benchmarks.
    """
    common, kernels = paths.root() / "common", paths.root() / "kernels"
    found = [*paths.paper(slug).glob("*.py"), common / "seeds.py"]
    for folder in (*(path for path in common.glob("*") if path.is_dir()), kernels):
        found += [path for path in folder.rglob("*") if path.suffix in _SOURCE_SUFFIXES and path.name != "bench.py"]
    return sorted(path for path in found if path.is_file() and "__pycache__" not in path.parts)


def sources_digest(slug: str) -> str:
    """A digest of the names and contents of `sources(slug)`; of the notebook its code, not its prose."""
    prose = paths.notebook(slug)
    return files.digest(
        f"{paths.relative(path)} {files.digest(_code_lines(path)) if path == prose else files.sha256(path)}"
        for path in sources(slug)
    )


def git() -> dict[str, Any]:
    """The commit and whether sources differ from it; results and boards that runs write do not count."""
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return {"commit": "", "dirty": None}  # no git, or not a repository: an exported archive
    excluded = [f":(exclude){name}" for name in _WRITTEN_BY_RUNS]
    return {"commit": commit, "dirty": bool(_git("status", "--porcelain", "--", ".", *excluded))}


def kernel_info() -> dict[str, Any]:
    """What `kernels.info()` says, apart from where files lie, or why it cannot say it."""
    try:
        import kernels

        info = dict(kernels.info())
    except Exception as error:  # a missing or stale build must not stop a run that may not need it
        return {"stamp": "", "unavailable": str(error).splitlines()[0] if str(error) else type(error).__name__}
    return {name: value for name, value in info.items() if not (isinstance(value, str) and os.path.isabs(value))}


def environment() -> dict[str, Any]:
    """Python, torch, the lock's hash, and a hash of the packages that are really installed."""
    packages, lock = _packages(), paths.lock()
    return {
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "lock_sha256": files.sha256(lock) if lock.is_file() else "",
        "packages": len(packages),
        "packages_digest": files.digest(packages),
    }


@lru_cache(maxsize=1)
def machine() -> dict[str, Any]:
    """Processor, memory and accelerators, as far as they bear on speed and rounding."""
    model, flags = _cpu()
    torch = sys.modules.get("torch")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch else []
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": model,
        "isa": [name for name in _ISA if name in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads() if torch else None,
        "ram_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": gpus,
    }


@lru_cache(maxsize=1)
def _packages() -> list[str]:
    return sorted({f"{dist.metadata['Name'].lower()}=={dist.version}" for dist in importlib.metadata.distributions()})


def _code_lines(notebook: Path) -> list[str]:
    return [line for line in notebook.read_text().splitlines() if line.strip() and not line.startswith("#")]


def _device() -> str:
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        return f"cuda: {torch.cuda.get_device_name()}"
    return f"cpu: {machine()['cpu']}"


def _cpu() -> tuple[str, set[str]]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), set()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return fields.get("model name", platform.machine()), set(fields.get("flags", fields.get("Features", "")).split())


def _peak_memory_mb() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))  # macOS counts bytes, Linux KiB


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=paths.root(), capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _execution(provenance: Mapping[str, Any]) -> str:
    """One execution's own mark: two runs of one paper never begin in the same microsecond."""
    return " ".join(str(provenance.get(key, "")) for key in ("paper", "profile", "started"))


def _ledger() -> set[str]:
    try:
        return set((paths.results() / "scratch" / "measured_here.txt").read_text().splitlines())
    except OSError:
        return set()


def _utc(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="microseconds")


def _rounded(load: tuple[float, float, float]) -> list[float]:
    return [round(value, 2) for value in load]
