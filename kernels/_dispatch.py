"""Which implementation of an op runs: one table, and no silent fallback.

The device and the dtype of the input choose. The environment variable KERNELS_BACKEND (reference, cpu or triton) forces
one; a forced backend that cannot serve the input raises and says why.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import os

import torch

from kernels._load import KernelUnavailable, native

FORCE = "KERNELS_BACKEND"
REFERENCE, CPU, TRITON = BACKENDS = ("reference", "cpu", "triton")
GSPLAT = "gsplat"  # no kernel of ours: what serves CUDA where a well-kept library does it already

# op -> the backend that runs for (device type, dtype) when none is forced. `cpu` is the compiled C++ module, `triton`
# the GPU kernels; float64 is for checking gradients, and the readable reference does that best.
TABLE: dict[str, dict[tuple[str, torch.dtype], str]] = {
    "attention": {
        ("cpu", torch.float32): CPU,
        ("cuda", torch.float32): TRITON,
        ("cpu", torch.float64): REFERENCE,
        ("cuda", torch.float64): REFERENCE,
    },
    "ct": {
        ("cpu", torch.float32): CPU,
        ("cuda", torch.float32): TRITON,
        ("cpu", torch.float64): REFERENCE,
        ("cuda", torch.float64): REFERENCE,
    },
    "masked_grad": {
        ("cpu", torch.float32): CPU,
        ("cuda", torch.float32): TRITON,
        ("cpu", torch.float64): REFERENCE,
        ("cuda", torch.float64): REFERENCE,
    },
    "nm": {
        ("cpu", torch.float32): CPU,
        ("cuda", torch.float32): TRITON,
        ("cpu", torch.float64): REFERENCE,
        ("cuda", torch.float64): REFERENCE,
    },
    "splat": {
        ("cpu", torch.float32): CPU,
        ("cuda", torch.float32): GSPLAT,
        ("cpu", torch.float64): REFERENCE,
        ("cuda", torch.float64): REFERENCE,
    },
    "ssim": {
        ("cpu", torch.float32): CPU,
        ("cuda", torch.float32): REFERENCE,
        ("cpu", torch.float64): REFERENCE,
        ("cuda", torch.float64): REFERENCE,
    },
}


def backend_for(device: torch.device, dtype: torch.dtype, op: str) -> str:
    """The backend that runs `op` (a key of TABLE) on such tensors: reference, cpu, triton or gsplat.

    Raises TypeError for a dtype the op does not take; ValueError for an unknown KERNELS_BACKEND; KernelUnavailable
    where no backend serves the device, where the forced one does not serve this input, or where it is not installed.
    The message says what to install or to set.
    """
    rows = TABLE[op]
    if (device.type, dtype) not in rows and dtype not in (dtypes := list(dict.fromkeys(dtype for _, dtype in rows))):
        names = " or ".join(map(str, dtypes))
        raise TypeError(f"kernels.{op}: got dtype {dtype}; expected {names}; convert the input, e.g. with .float()")
    backend = _forced() or rows.get((device.type, dtype))
    if backend is None:
        devices = ", ".join(sorted({name for name, kind in rows if kind == dtype}))
        raise KernelUnavailable(
            f"kernels.{op}: got a tensor on {device.type!r}; expected one of: {devices}; move it with .to(...), or set "
            f"{FORCE}=reference to run the slow specification there"
        )
    if backend == CPU:
        _check_serves(backend, op, device, dtype, device.type == "cpu" and dtype != torch.float64)
        native()
    elif backend == TRITON and TRITON not in rows.values():
        raise KernelUnavailable(
            f"kernels.{op}: got {FORCE}=triton, and there are no Triton kernels of this op; unset {FORCE}: on CUDA it "
            f"runs {rows[('cuda', dtype)]}"
        )
    elif backend == TRITON:
        interpreted = device.type == "cpu" and _interprets()
        _check_serves(backend, op, device, dtype, (device.type == "cuda" or interpreted) and dtype != torch.float64)
        _require_triton(op)
    return backend


def refuse_forced(backend: str, op: str, got: str, expected: str) -> None:
    """For a call that the op's `backend` does not serve and the reference does: raises KernelUnavailable if forced."""
    if _forced() == backend:
        raise KernelUnavailable(
            f"kernels.{op}: {FORCE}={backend} got {got}; expected {expected}; unset {FORCE}, or set {FORCE}=reference: "
            "then the reference runs"
        )


def _forced() -> str | None:
    name = os.environ.get(FORCE)
    if name and name not in BACKENDS:
        near = difflib.get_close_matches(name, BACKENDS, 1, cutoff=0)[0]
        raise ValueError(
            f"{FORCE} is {name!r}; expected one of {', '.join(BACKENDS)}; did you mean {near!r}? Unset it to let the "
            "input's device choose"
        )
    return name or None


def _check_serves(backend: str, op: str, device: torch.device, dtype: torch.dtype, serves: bool) -> None:
    if serves:
        return
    where = {
        CPU: "a float32 tensor on 'cpu'",
        TRITON: "a float32 tensor on 'cuda' (or on 'cpu' if TRITON_INTERPRET=1 was set before Python started: slow)",
    }[backend]
    raise KernelUnavailable(
        f"kernels.{op}: {FORCE}={backend} got {dtype} on {device.type!r}; expected {where}; move or convert the input, "
        f"unset {FORCE}, or set {FORCE}=reference"
    )


@functools.cache
def _require_triton(op: str) -> None:
    if importlib.util.find_spec("triton") is None:
        raise KernelUnavailable(
            f"kernels.{op}: the GPU kernels need Triton, which is not installed; expected triton>=3.6; run "
            f"`pip install triton`, or set {FORCE}=reference"
        )


def _interprets() -> bool:
    # the value Triton itself reads when its functions are decorated
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
