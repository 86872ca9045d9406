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
from pipelines.gpu import attention, ct, masked_grad, nm, report

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
    allowed = {"torch", "triton", "kernels", *sys.stdlib_module_names}
    for path in (ROOT / "pipelines" / "gpu_check.py", *sorted((ROOT / "pipelines" / "gpu").glob("*.py"))):
        tree = ast.parse(path.read_text())
        names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        others = {name for name in names if name.split(".")[0] not in allowed}
        assert others <= {"pipelines.gpu", "pipelines.gpu.report"}, path.name


def test_without_a_gpu_it_says_one_clear_line(tmp_path: Path) -> None:
    result = run("--folder", str(tmp_path))
    assert result.returncode == gpu_check.NO_GPU, result.stderr
    assert result.stdout.count("\n") == 1 and "sees no CUDA GPU" in result.stdout
    assert not list(tmp_path.iterdir())


def test_the_checks_run_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    result = run("--interpret", "--folder", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "134 of 134 checks hold" in result.stdout
    assert not list(tmp_path.iterdir()), "an interpreter's run is no result of a GPU"


def test_a_wrong_projector_fails_the_checks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    # the reference stands in for the GPU kernels; then it looks half a pixel beside the scan, and last it raises
    scan = {"parallel": ct.TINY_SCANS["parallel 7x9"]}
    monkeypatch.setattr(ct, "TINY_SCANS", scan)
    monkeypatch.setenv("KERNELS_BACKEND", "reference")
    check = lambda: list(ct.checks(torch.device("cpu"), tiny=True))  # noqa: E731
    assert report.print_checks(check()) == 0
    right = ct.project

    def beside(image: torch.Tensor, scan: ct.ParallelBeam) -> torch.Tensor:
        moved = ct.ParallelBeam(
            scan.angles_rad, scan.cells, scan.shape, pitch=scan.pitch, pixel=scan.pixel, offset=scan.offset + 0.5
        )
        return right(image, moved)

    monkeypatch.setattr(ct, "project", beside)
    failed = {result.name for result in check() if not result.ok}
    assert {"project against float64", "adjoint", "gradients"} <= failed

    def broken(image: torch.Tensor, scan: ct.ParallelBeam) -> torch.Tensor:
        raise RuntimeError("PTX error")

    monkeypatch.setattr(ct, "project", broken)
    results = check()
    assert report.print_checks(results) == 1
    assert "PTX error" in capsys.readouterr().out
    assert not next(result for result in results if result.name == "adjoint").ok
    assert next(result for result in results if result.name == "backproject against float64").ok


def test_wrong_products_and_masks_fail_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    # the reference stands in again; then each part in turn is a little off
    monkeypatch.setenv("KERNELS_BACKEND", "reference")
    check = lambda: {result.name for result in nm.checks(torch.device("cpu"), tiny=True) if not result.ok}  # noqa: E731
    right, dx, dw, mask = nm.nm.linear, nm.ops.input_gradient, nm.ops.weight_gradient, nm.nm.mask

    def linear(x: torch.Tensor, packed: nm.nm.NMTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return right(x.contiguous(), packed, bias)  # a BLAS rounds differently for other strides

    monkeypatch.setattr(nm.nm, "linear", linear)
    assert not check()
    for module, name, wrong, expected in (
        (nm.nm, "linear", lambda x, p, b=None: linear(x.half().float(), p, b), "linear against float64"),
        (nm.ops, "linear", lambda x, p, *_: linear(x, p).roll(1, -1), "linear of that dtype"),
        (nm.ops, "input_gradient", lambda dy, p: dx(dy, p) * (1 + 1e-5), "input gradient"),
        (nm.ops, "weight_gradient", lambda dy, x, p: dw(dy[:-1], x[:-1], p), "weight gradient"),
        (nm.ops, "input_gradient", lambda dy, p: dx(dy, p).nextafter(torch.tensor(9.0)), "gradients"),
        (nm.ops, "input_gradient", lambda dy, p: dx(dy, p) + 1e-9 * torch.rand(1), "not the same again"),
        (nm.nm, "linear", lambda x, p, b=None: linear(x + x.stride(0) * 1e-3, p, b), "strides"),
        (nm.nm, "mask", lambda w, n, m, dim: mask(w.flip(dim), n, m, dim).flip(dim), "not as specified"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, wrong)
            assert expected in check(), expected


def test_wrong_masked_gradients_fail_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNELS_BACKEND", "reference")
    check = lambda: {result.name for result in masked_grad.checks(torch.device("cpu"), tiny=True) if not result.ok}  # noqa: E731
    ours = masked_grad.masked_grad
    linear, conv2d, adamw = ours.linear, ours.conv2d, ours.adamw_
    assert not check()
    entries = {"chosen entries against float64"}

    def shaky(x: torch.Tensor, *others):
        return linear(x + 1e-3 * torch.rand(1), *others)

    for name, wrong, expected in (
        ("linear", lambda x, w, v, s: linear(x, w * 1.01, v, s), {"input gradient"}),
        ("linear", lambda x, w, v, s: linear(x.roll(1, -1), w, v, s), entries),
        ("linear", shaky, {"not the same again"}),
        ("conv2d", lambda x, w, v, s, b, *m: conv2d(x.flip(-1), w, v, s, b, *m), entries),
        (
            "adamw_",
            lambda w, g, s, m, lr, master: adamw(w, g, s, m, lr=lr * 1.05, master=master),
            {"AdamW as specified"},
        ),
        ("adamw_", lambda w, g, s, m, lr, master: adamw(w, g, s, m, lr=lr), {"AdamW as specified, with a master"}),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(ours, name, wrong)
            assert expected <= check(), expected


def test_wrong_attention_fails_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNELS_BACKEND", "reference")
    monkeypatch.setattr(attention, "TINY", attention.TINY[:1])
    check = lambda: {result.name for result in attention.checks(torch.device("cpu"), tiny=True) if not result.ok}  # noqa: E731
    ours, names = attention.attention, ("block_sparse_attention", "search", "block_scores")
    attend, search, scores = (getattr(ours, name) for name in names)
    assert not check()

    def moved(*arguments, **named):
        out, lse = attend(*arguments, **named)
        return out * 1.05, lse + 1e-4

    def shaky(*arguments, **named):
        out, lse = attend(*arguments, **named)
        return out + 1e-9 * torch.rand(1), lse

    def finite(*arguments, **named):
        out, lse = attend(*arguments, **named)
        return out, lse.clamp_min(-1e30)

    for name, wrong, expected in (
        (names[0], moved, {"output", "LSE", "gradients"}),
        (names[0], shaky, {"not the same again"}),
        (names[0], finite, {"LSE"}),
        (names[0], lambda q, k, v, mask, **named: attend(q, k, v, ~mask, **named), {"output", "LSE", "gradients"}),
        (names[1], lambda q, k, v, **named: search(q * 1.1, k, v, **named), {"searched output", "scores"}),
        (names[2], lambda q, k, lse, **named: scores(q, k, lse + 1e-5, **named), {"scores of a known LSE"}),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(ours, name, wrong)
            assert expected <= check(), expected


def test_no_checks_are_no_success() -> None:
    assert report.print_checks([]) == 1


def test_the_report_is_json_even_with_faults(tmp_path: Path) -> None:
    checks = [report.Check("ct", "a", "b", math.nan, 1.0, "RuntimeError: c"), report.Check("ct", "a", "NaN", 0.5, 1)]
    timings = [report.Timing("ct", "a", "project", 8, 1.0, 0.9, 1.1, 100.0, "Mrays/s", peak_mib=12.0)]
    path = tmp_path / "new" / f"{gpu_check._slug('NVIDIA H200')}.json"
    report.write(path, {"device": "NVIDIA H200", "checks": checks, "timings": timings})
    assert path.name == "nvidia-h200.json"
    written = json.loads(path.read_text())
    assert [check["ok"] for check in written["checks"]] == [False, True]
    assert written["checks"][0]["value"] is None and written["checks"][1]["name"] == "NaN"
    assert written["timings"][0]["median_ms"] == 1.0
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_timings_are_printed_with_what_they_are_held_against(capsys: pytest.CaptureFixture) -> None:
    row = ("nm", "2:4 4096^2", "packed float32", 1, 0.01, 0.009, 0.011, 3800.0, "GB/s")
    report.print_timings([report.Timing(*row, 1.62, "dense float32"), report.Timing(*row)])
    lines = capsys.readouterr().out.splitlines()
    assert "1.62 x dense float32" in lines[-2] and "3800.0 GB/s" in lines[-1] and " x " not in lines[-1]


def test_quartiles() -> None:
    assert report.quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert report.quartiles([5.0, 1.0, 2.0, 3.0, 4.0]) == (2.0, 3.0, 4.0)
