"""The GPU kernels without a GPU: their numbers in Triton's interpreter, and their compilation for real chips."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (it has no build for this platform)"
)

# in a process of its own: Triton reads TRITON_INTERPRET when it decorates the kernels
INTERPRET = """
import json, math, torch
import ct_oracle
from kernels.ct import FanBeam, ParallelBeam, backproject, project
scans = [
    ParallelBeam((0.0, 0.3, math.pi / 4, math.pi / 2, -2.2), 17, (12, 17)),
    ParallelBeam((0.4, 2.0, 3.0), 15, (17, 9), pitch=0.45, pixel=0.9, offset=0.3, axis=-0.7),
    FanBeam.uniform(5, 19, (12, 17), source_axis=30.0, axis_detector=15.0, pitch=1.5),
    FanBeam.uniform(3, 12, (9, 6), source_axis=6.5, axis_detector=4.0, pitch=2.0, pixel=0.9, offset=0.4, axis=0.8),
]
generator = torch.Generator().manual_seed(0)
errors = []
for scan in scans:
    a = torch.from_numpy(ct_oracle.matrix(scan))
    x = torch.randn(3, *scan.shape, generator=generator)
    y = torch.randn(3, *scan.sinogram_shape, generator=generator)
    for found, exact in (
        (project(x, scan).flatten(1), x.double().flatten(1) @ a.T),
        (backproject(y, scan).flatten(1), y.double().flatten(1) @ a),
    ):
        errors.append(float((found - exact).norm() / exact.norm()))
    x[1, 3, 4] = math.nan
    spread = project(x, scan).isnan().flatten(1).sum(1).tolist()
    assert spread[0] == spread[2] == 0 < spread[1] < scan.views * scan.cells, spread
print(json.dumps(errors))
"""

# Triton compiles for a chip that is not there: types, shapes and PTX are checked, the run is not
COMPILE = """
import json, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.ct import triton as kernels
def compile(function, fan, capability, **constants):
    constants |= {"FAN": fan, "IMAGES": 2}
    pointers = {"scan": "*fp64", "planes": "*fp32", "sinogram": "*fp32", "out": "*fp32", "pixel": "fp32"}
    names = function.arg_names
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    values = {(names.index(n),): value for n, value in constants.items()}
    return triton.compile(ASTSource(function, signature, values), target=GPUTarget("cuda", capability, 32)).asm["ptx"]
for fan in (False, True):
    for capability in (80, 90):
        forward = compile(kernels._project_kernel, fan, capability, CELLS=128)
        back = compile(kernels._backproject_kernel, fan, capability, PIXELS=128, REACH=3)
        assert ".f64" in forward and ".f64" in back, "positions are no longer float64"
        assert "atom." not in forward and "atom." not in back and "red." not in back, "atomics: not repeatable"
print("compiled")
"""


def run(code: str, **environment: str) -> str:
    path = os.pathsep.join(["tests/support", "."])
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"PYTHONPATH": path} | environment,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.splitlines()[-1]


def test_the_interpreted_kernels_agree_with_the_oracle() -> None:
    errors = json.loads(run(INTERPRET, TRITON_INTERPRET="1", KERNELS_BACKEND="triton"))
    assert len(errors) == 8
    assert max(errors) < 1e-6, errors


def test_the_kernels_compile_for_a_gpu(tmp_path) -> None:
    from triton.backends import backends

    if "nvidia" not in backends:
        pytest.skip("this build of Triton has no NVIDIA backend")
    assert run(COMPILE, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0") == "compiled"


def test_cells_in_reach_covers_every_pixel() -> None:
    # against the dense matrix: the longest run of cells between the first and the last that see a pixel in a view
    import ct_oracle
    import numpy as np

    from kernels.ct.triton import cells_in_reach

    for name, scan in ct_oracle.SCANS.items():
        seen = ct_oracle.matrix(scan).reshape(scan.views, scan.cells, -1) > 1e-9
        first, last = seen.argmax(1), scan.cells - 1 - seen[:, ::-1].argmax(1)
        needed = int(np.where(seen.any(1), last - first + 1, 0).max())
        bound = cells_in_reach(scan.lengths_mm, *scan.shape, scan.cells)
        assert needed <= bound, name
        if "close source" not in name:  # there the bound gives up and takes all cells
            assert bound <= needed + 3, name
