"""Compiled operations with readable twins: one folder an op, `info()` to see what runs."""

from __future__ import annotations

from kernels._load import KernelUnavailable, info

__all__ = ["KernelUnavailable", "info"]
