"""`make gpu-check` on a machine without a GPU: it says so, and its checks run, and bite, in Triton's interpreter."""

from __future__ import annotations

import ast
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipelines import gpu_check

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("KERNELS_BACKEND", "TRITON_INTERPRET")}
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-m", "pipelines.gpu_check", *arguments],
        cwd=ROOT,
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_it_needs_torch_and_the_kernels_alone() -> None:
    tree = ast.parse((ROOT / "pipelines" / "gpu_check.py").read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    allowed = {"torch", "triton", "kernels", *sys.stdlib_module_names}
    assert {name.split(".")[0] for name in names} <= allowed


def test_without_a_gpu_it_says_one_clear_line(tmp_path: Path) -> None:
    result = run("--folder", str(tmp_path))
    assert result.returncode == gpu_check.NO_GPU, result.stderr
    assert result.stdout.count("\n") == 1 and "sees no CUDA GPU" in result.stdout
    assert not list(tmp_path.iterdir())


def test_the_checks_run_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    result = run("--interpret", "--folder", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "21 of 21 checks hold" in result.stdout
    assert not list(tmp_path.iterdir()), "an interpreter's run is no result of a GPU"


def test_a_wrong_kernel_fails_the_checks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    # the reference stands in for the GPU kernels; then it looks half a pixel beside the scan, and last it raises
    scan = {"parallel": gpu_check.TINY_SCANS["parallel 7x9"]}
    monkeypatch.setattr(gpu_check, "TINY_SCANS", scan)
    monkeypatch.setenv("KERNELS_BACKEND", "reference")
    check = lambda: list(gpu_check._checks(torch.device("cpu"), tiny=True))  # noqa: E731
    assert gpu_check._report_checks(check()) == 0
    right = gpu_check.project

    def beside(image: torch.Tensor, scan: gpu_check.ParallelBeam) -> torch.Tensor:
        moved = gpu_check.ParallelBeam(
            scan.angles_rad, scan.cells, scan.shape, pitch=scan.pitch, pixel=scan.pixel, offset=scan.offset + 0.5
        )
        return right(image, moved)

    monkeypatch.setattr(gpu_check, "project", beside)
    failed = {result.name for result in check() if not result.ok}
    assert {"project against float64", "adjoint", "gradients"} <= failed

    def broken(image: torch.Tensor, scan: gpu_check.ParallelBeam) -> torch.Tensor:
        raise RuntimeError("PTX error")

    monkeypatch.setattr(gpu_check, "project", broken)
    results = check()
    assert gpu_check._report_checks(results) == 1
    assert "PTX error" in capsys.readouterr().out
    assert not next(result for result in results if result.name == "adjoint").ok
    assert next(result for result in results if result.name == "backproject against float64").ok


def test_no_checks_are_no_success() -> None:
    assert gpu_check._report_checks([]) == 1


def test_the_report_is_json_even_with_faults(tmp_path: Path) -> None:
    checks = [
        gpu_check.Check("ct", "a", "b", math.nan, 1.0, "RuntimeError: c"),
        gpu_check.Check("ct", "a", "NaN", 0.5, 1),
    ]
    timings = [gpu_check.Timing("ct", "a", "project", 8, 1.0, 0.9, 1.1, 100.0, 12.0)]
    path = tmp_path / "new" / f"{gpu_check._slug('NVIDIA H200')}.json"
    gpu_check._write(path, {"device": "NVIDIA H200", "checks": checks, "timings": timings})
    assert path.name == "nvidia-h200.json"
    report = json.loads(path.read_text())
    assert [check["ok"] for check in report["checks"]] == [False, True]
    assert report["checks"][0]["value"] is None and report["checks"][1]["name"] == "NaN"
    assert report["timings"][0]["median_ms"] == 1.0
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_quartiles() -> None:
    assert gpu_check._quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert gpu_check._quartiles([5.0, 1.0, 2.0, 3.0, 4.0]) == (2.0, 3.0, 4.0)
