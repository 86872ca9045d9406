"""What every test shares: few threads, the data mirror beside the checkout, stores and caches of its own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_scratch: list[Path] = []


def pytest_configure() -> None:
    # before torch is imported by any test module: OpenMP reads its variable once
    os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))
    # waiting threads sleep instead of spinning: a busy host otherwise makes small parallel loops 10-50 times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    mirror = ROOT.parent / "shared" / "data"
    if mirror.is_dir():
        os.environ.setdefault("RESPARSE_DATA_MIRROR", str(mirror))
    scratch = Path(tempfile.mkdtemp(prefix="resparse-tests-"))
    _scratch.append(scratch)
    os.environ["RESPARSE_CACHE"] = str(scratch / "cache")
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{scratch / 'mlflow.db'}"


def pytest_unconfigure() -> None:
    for folder in _scratch:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """real_data(name) -> folder of a registered set found on this machine; skips the test where there is none."""
    from common import data

    def find(name: str) -> Path:
        folder = data.locate(name)
        if folder is None:
            looked = os.environ.get("RESPARSE_DATA_MIRROR", "unset")
            pytest.skip(f"data set {name} is not on this machine (RESPARSE_DATA_MIRROR: {looked})")
        return folder

    return find
