"""Jobs as processes of this machine, a few at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipelines.executors import Job, Outcome

POLL_S = 0.05
GRACE_S = 5.0  # from "please stop" to SIGKILL


def cores() -> int:
    """Cores this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class LocalExecutor:
    """Runs `places` jobs at once, each a process group of its own with an equal share of the cores as threads."""

    places: int

    def __post_init__(self) -> None:
        if self.places < 1:
            raise ValueError(f"got {self.places} jobs at once, expected at least 1; without --jobs: half the cores.")

    def run(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        threads = str(max(1, cores() // self.places))
        waiting, running = list(reversed(jobs)), {}
        try:
            while waiting or running:
                while waiting and len(running) < self.places:
                    job = waiting.pop()
                    running[job.key] = _Process(job, threads)
                time.sleep(POLL_S)
                for key, process in list(running.items()):
                    if process.ended:
                        del running[key]
                        yield process.outcome
        finally:
            _stop(list(running.values()))


class _Process:
    def __init__(self, job: Job, threads: str) -> None:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **job.environment}
        self._key, self._began = job.key, time.perf_counter()
        with job.log.open("wb") as log:
            # A session of its own keeps the terminal's Ctrl-C away: who started the batch decides what is stopped.
            # The open pipe to stdin tells the job when this process is gone.
            self.popen = subprocess.Popen(
                list(job.command),
                cwd=job.folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def ended(self) -> bool:
        return self.popen.poll() is not None

    @property
    def outcome(self) -> Outcome:
        assert self.popen.stdin is not None
        self.popen.stdin.close()
        return Outcome(self._key, self.popen.returncode, round(time.perf_counter() - self._began, 2))


def _stop(processes: Sequence[_Process]) -> None:
    """End the processes and their descendants: a Jupyter kernel lives in a session of its own."""
    import psutil

    family = []
    for process in processes:
        try:
            parent = psutil.Process(process.popen.pid)
            family += [*parent.children(recursive=True), parent]
        except psutil.NoSuchProcess:
            continue
    for process in processes:
        if not process.ended:
            process.popen.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=GRACE_S)
    for survivor in alive:
        try:
            survivor.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=GRACE_S)
    for process in processes:
        assert process.popen.stdin is not None
        process.popen.wait()
        process.popen.stdin.close()
