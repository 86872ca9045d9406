"""The way to gsplat on CUDA devices, with a stand-in for gsplat: which arguments reach it, and what is refused."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from kernels import KernelUnavailable, _dispatch
from kernels.splat import gpu


def install(monkeypatch: pytest.MonkeyPatch, version: str) -> list[dict[str, Any]]:
    """A gsplat of that version whose rasterization notes its calls."""
    calls: list[dict[str, Any]] = []

    def rasterization(means: Any, packed: bool = True, covars: Any = None) -> str:
        calls.append({"means": means, "packed": packed, "covars": covars})
        return "drawn"

    module = ModuleType("gsplat")
    module.__version__, module.rasterization = version, rasterization  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gsplat", module)
    return calls


def test_cuda_tensors_go_to_gsplat() -> None:
    assert _dispatch.backend_for(torch.device("cuda"), torch.float32, "splat") == _dispatch.GSPLAT


def test_options_that_gsplat_has_are_handed_on_and_empty_ones_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(monkeypatch, "1.5.3")
    assert gpu.rasterization("means", alpha_max=0.999, packed=False, segmented=False, with_ut=None) == "drawn"
    assert calls == [{"means": "means", "packed": False, "covars": None}]


def test_an_option_that_this_version_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(monkeypatch, "1.4.0")
    with pytest.raises(ValueError, match=r"got with_ut=True, which gsplat 1\.4\.0 does not have"):
        gpu.rasterization("means", alpha_max=0.999, with_ut=True)
    assert not calls


@pytest.mark.parametrize(("version", "compiled", "other"), [("1.5.3", 0.999, 0.99), ("1.6.0", 0.99, 0.999)])
def test_alpha_max_is_what_gsplat_has_compiled_in(
    monkeypatch: pytest.MonkeyPatch, version: str, compiled: float, other: float
) -> None:
    install(monkeypatch, version)
    assert gpu.rasterization("means", alpha_max=compiled) == "drawn"
    with pytest.raises(ValueError, match=rf"got alpha_max {other} on CUDA; expected {compiled}"):
        gpu.rasterization("means", alpha_max=other)


def test_without_gsplat_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gsplat", None)
    with pytest.raises(KernelUnavailable, match="pip install gsplat"):
        gpu.rasterization("means", alpha_max=0.999)


def test_forcing_triton_says_that_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNELS_BACKEND", "triton")
    with pytest.raises(KernelUnavailable, match="no Triton kernels of this op"):
        _dispatch.backend_for(torch.device("cuda"), torch.float32, "splat")
