"""Where the cells of a batch are executed: `local` processes now, another `Executor` for a cluster.

A job is a command that writes its own result, so that an executor moves no Python objects: it starts commands, waits,
and tells how each ended. That is all that SLURM (submitit) or ray would have to do too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Job:
    """One command to execute; `log` receives its output, `environment` is added to the executor's own."""

    key: str
    command: Sequence[str]
    folder: Path
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a job ended: exit status (negative: killed by that signal), wall-clock seconds."""

    key: str
    status: int
    seconds: float


class Executor(Protocol):
    """Executes jobs; the caller keeps results, tells the user and decides what to start."""

    def run(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        """Start all jobs as places become free, yield each as it ends, in any order.

        A job that crashes is an outcome, never an exception. When the caller closes the iterator, or an exception
        passes through it (Ctrl-C), every running job and all its children are stopped before it returns.
        """
        ...
