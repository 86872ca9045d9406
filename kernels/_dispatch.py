"""Which implementation of an op runs: one table, no silent fallback.

An op declares its backends; the device and dtype of the input choose, and the environment variable `KERNELS_BACKEND`
(reference, cpu or triton) forces one.
"""

import difflib
import importlib.util
import os

import torch
from torch import Tensor

FORCE = "KERNELS_BACKEND"
REFERENCE, CPU, TRITON = "reference", "cpu", "triton"
BACKENDS = (REFERENCE, CPU, TRITON)

# device and dtype of the input -> backend; float64 is for checking gradients, which the specification does best
TABLE = {
    ("cpu", torch.float32): CPU,
    ("cuda", torch.float32): TRITON,
    ("cpu", torch.float64): REFERENCE,
    ("cuda", torch.float64): REFERENCE,
}


def backend_for(tensor: Tensor, op: str) -> str:
    """The backend that serves `op` on this tensor: reference, cpu or triton.

    Raises TypeError for a dtype, RuntimeError for a device that no backend serves or a forced backend that cannot,
    ValueError for an unknown `KERNELS_BACKEND`.
    """
    forced = os.environ.get(FORCE, "")
    if forced and forced not in BACKENDS:
        near = difflib.get_close_matches(forced, BACKENDS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{FORCE} is {forced!r}, expected one of {', '.join(BACKENDS)}{hint}")
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: got {tensor.dtype}, expected torch.float32 or torch.float64; convert it with .float()")
    device = tensor.device.type
    backend = forced or TABLE.get((device, tensor.dtype))
    if backend is None:
        raise RuntimeError(
            f"{op}: no backend for device {device!r}, expected cpu or cuda; move the tensor there, or set {FORCE}=reference"
        )
    if backend != REFERENCE and tensor.dtype != torch.float32:
        raise TypeError(
            f"{op}: {FORCE}={backend} serves torch.float32 only, got {tensor.dtype}; unset it, or use .float()"
        )
    if backend == CPU and device != "cpu":
        raise RuntimeError(
            f"{op}: {FORCE}=cpu got a tensor on {device!r}, expected one on the CPU; use .cpu(), or unset it"
        )
    if backend == TRITON:
        _require_triton(op, device)
    return backend


def _require_triton(op: str, device: str) -> None:
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            f"{op}: the GPU kernel needs Triton, which is not installed; pip install triton, or set {FORCE}=reference"
        )
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"{op}: {FORCE}=triton got a tensor on the CPU, expected one on a GPU; use .cuda(), or set "
            "TRITON_INTERPRET=1 before Python starts to run the kernel in Triton's slow interpreter"
        )
