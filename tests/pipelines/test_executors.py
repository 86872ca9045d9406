"""Jobs end in any way they like; the executor tells how, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipelines.executors import Job
from pipelines.executors.local import LocalExecutor, cores


def job(tmp_path: Path, key: str, code: str, **environment: str) -> Job:
    return Job(key, [sys.executable, "-c", code], tmp_path, tmp_path / "logs" / f"{key}.txt", environment)


def outcomes(executor: LocalExecutor, jobs: list[Job]) -> dict[str, int]:
    return {outcome.key: outcome.status for outcome in executor.run(jobs)}


def test_every_end_is_an_outcome(tmp_path: Path) -> None:
    jobs = [
        job(tmp_path, "good", "print('fine')"),
        job(tmp_path, "bad", "raise SystemExit(3)"),
        job(tmp_path, "killed", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"),
        job(tmp_path, "crashed", "import ctypes; ctypes.string_at(0)"),
    ]
    assert outcomes(LocalExecutor(2), jobs) == {
        "good": 0,
        "bad": 3,
        "killed": -signal.SIGKILL,
        "crashed": -signal.SIGSEGV,
    }
    assert (tmp_path / "logs" / "good.txt").read_text() == "fine\n"


def test_no_more_jobs_at_once_than_places_and_no_fewer(tmp_path: Path) -> None:
    code = "import time; a = time.time(); time.sleep(0.5); print(a, time.time())"
    list(LocalExecutor(2).run([job(tmp_path, str(number), code) for number in range(4)]))
    spans = [tuple(map(float, (tmp_path / "logs" / f"{n}.txt").read_text().split())) for n in range(4)]
    together = [sum(begin <= moment < end for begin, end in spans) for moment, _ in spans]
    assert max(together) == 2


def test_jobs_share_the_cores(tmp_path: Path) -> None:
    code = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['COLOUR'])"
    list(LocalExecutor(1).run([job(tmp_path, "alone", code, COLOUR="red")]))
    list(LocalExecutor(2 * cores()).run([job(tmp_path, "crowded", code, COLOUR="red")]))
    assert (tmp_path / "logs" / "alone.txt").read_text().split() == [str(cores()), "red"]
    assert (tmp_path / "logs" / "crowded.txt").read_text().split() == ["1", "red"]


def test_closing_stops_jobs_and_their_children_in_sessions_of_their_own(tmp_path: Path) -> None:
    """As a Jupyter kernel is one: the terminal's signals do not reach it. Both refuse to go at the first asking."""
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    child = f"{stubborn} time.sleep(300)"
    parent = f"import subprocess, sys; {stubborn} p = subprocess.Popen([sys.executable, '-c', {child!r}], "
    parent += "start_new_session=True); print(p.pid, flush=True); time.sleep(300)"
    running = LocalExecutor(2).run([job(tmp_path, "parent", parent), job(tmp_path, "short", "pass")])
    assert next(running).key == "short"
    log = tmp_path / "logs" / "parent.txt"
    deadline = time.time() + 30
    while not log.read_text() and time.time() < deadline:
        time.sleep(0.05)
    started = int(log.read_text())
    time.sleep(0.5)  # the child needs a moment to refuse the signal
    running.close()  # type: ignore[attr-defined]
    assert not psutil.pid_exists(started) or psutil.Process(started).status() == psutil.STATUS_ZOMBIE
    assert not [
        p
        for p in psutil.Process(os.getpid()).children(recursive=True)
        if p.status() != psutil.STATUS_ZOMBIE and "time.sleep(300)" in str(p.cmdline())
    ]


def test_a_job_hears_when_its_executor_is_gone(tmp_path: Path) -> None:
    """The pipe to stdin closes with the executor's process, however it ends."""
    listener = job(tmp_path, "listener", "import sys; sys.stdin.read(); open('heard', 'w').close()")
    driver = "import sys; from pathlib import Path; from pipelines.executors import Job; "
    driver += "from pipelines.executors.local import LocalExecutor; "
    driver += f"list(LocalExecutor(1).run([Job('x', {list(listener.command)!r}, Path({str(tmp_path)!r}), "
    driver += f"Path({str(tmp_path / 'log.txt')!r}))]))"
    process = psutil.Popen([sys.executable, "-c", driver], cwd=Path(__file__).resolve().parents[2])
    deadline = time.time() + 30
    while not process.children() and time.time() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    while not (tmp_path / "heard").exists() and time.time() < deadline:
        time.sleep(0.05)
    assert (tmp_path / "heard").exists()


def test_no_places_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        LocalExecutor(0)
