"""Masked gradients on a GPU without a GPU: numbers in Triton's interpreter, and compilation for real chips."""

from __future__ import annotations

import importlib.util
import json

import pytest
from masked_grad_triton import ADAMW, COMMON, COMPILE, EDGES, LAYERS
from nm_triton import run

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (it has no build for this platform)"
)


def interpreted(code: str) -> str:
    return run(COMMON + code, TRITON_INTERPRET="1", KERNELS_BACKEND="triton")


def test_interpreted_gradients_agree_with_float64() -> None:
    errors = json.loads(interpreted(LAYERS))
    assert len(errors) == 15
    assert max(errors) < 1e-6, errors  # float32 sums of at most 132 products, exact ones of bfloat16


def test_nan_and_nothing_to_sum() -> None:
    assert interpreted(EDGES) == "passed"


def test_the_interpreted_update_is_the_specification() -> None:
    assert interpreted(ADAMW) == "passed"


def test_the_kernels_compile_for_a_gpu(tmp_path) -> None:
    from triton.backends import backends

    if "nvidia" not in backends:
        pytest.skip("this build of Triton has no NVIDIA backend")
    assert run(COMPILE, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0") == "compiled"
