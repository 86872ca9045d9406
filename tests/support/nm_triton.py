"""Triton kernels of N:M in a process of their own, interpreted on the CPU or compiled for a chip that is not there."""

from __future__ import annotations

import os
import subprocess
import sys

# In a process of its own: Triton reads TRITON_INTERPRET when it decorates the kernels. New memory is filled with NaN,
# so that what a kernel does not write is seen.
COMMON = """
import json, torch
from kernels import KernelUnavailable, _dispatch, nm
from kernels.nm import crossover, ops, reference
torch.use_deterministic_algorithms(True)
generator = torch.Generator().manual_seed(0)
noise = lambda *shape: torch.randn(*shape, generator=generator)
def error(found, exact):
    assert found.shape == exact.shape
    return float((found.detach().double() - exact).norm() / exact.norm())
def packed_of(rows, columns, n, m, dtype):
    weight = noise(rows, columns)
    weight = (weight * reference.mask(weight, n, m)).to(dtype)
    return weight.double(), nm.pack(weight, n, m, weight != 0)
"""


def run(code: str, **environment: str) -> str:
    """The last line that a program prints."""
    result = subprocess.run(
        [sys.executable, "-c", "import os\n" + code],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([".", os.environ.get("PYTHONPATH", "")])} | environment,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.splitlines()[-1]


def interpreted(code: str) -> str:
    """The last line of a program that begins with COMMON, its kernels interpreted."""
    return run(COMMON + code, TRITON_INTERPRET="1", KERNELS_BACKEND="triton")
