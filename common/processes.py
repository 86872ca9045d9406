"""Processes of runs: whether a driver is still alive, and what a run uses."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

HOST, NAMESPACE, PROCESS, HEARTBEAT = "resparse.host", "resparse.namespace", "resparse.process", "resparse.heartbeat"
SILENT_FOR_S = 600  # a process that cannot be looked at is dead when its heartbeat is older than this


def identity() -> dict[str, str]:
    """Tags by which a later process on this host sees whether this one is still alive, without naming the host."""
    import psutil

    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        boot = ""
    return {
        HOST: _short(platform.node()),
        NAMESPACE: _short(boot),
        PROCESS: f"{os.getpid()} {psutil.Process().create_time():.2f}",
        HEARTBEAT: str(int(time.time())),
    }


def is_dead(tags: Mapping[str, str]) -> bool:
    """Whether the process on this host that set these tags is gone."""
    import psutil

    if tags.get(NAMESPACE) != identity()[NAMESPACE]:  # before a reboot, or in another container
        return time.time() - float(tags.get(HEARTBEAT, 0)) > SILENT_FOR_S
    pid, _, born = tags.get(PROCESS, "0 0").partition(" ")
    try:
        return abs(psutil.Process(int(pid)).create_time() - float(born)) > 1.0  # the number may have been given anew
    except psutil.NoSuchProcess:
        return True


def usage(pid: int) -> dict[str, float]:
    """What the machine, the process tree under `pid` and the GPUs use now, under the names MLflow's dashboard knows."""
    import psutil

    memory = psutil.virtual_memory()
    values = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": memory.percent,
    }
    with contextlib.suppress(psutil.Error):
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        values["system/process_memory_usage_megabytes"] = sum(process.memory_info().rss for process in tree) / 1e6
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=index,utilization.gpu,memory.used", "--format=csv,noheader,nounits"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=5, check=False)
        for line in done.stdout.splitlines():
            index, utilization, used = (part.strip() for part in line.split(","))
            values[f"system/gpu_{index}_utilization_percentage"] = float(utilization)
            values[f"system/gpu_{index}_memory_usage_megabytes"] = float(used) * 2**20 / 1e6
    return values


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
