"""On a CUDA device gsplat does the work. Any of its versions from 1.4 on, with what they differ in made plain."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from kernels._load import KernelUnavailable

__all__ = ["rasterization"]

# the most that one Gaussian covers is compiled into gsplat
ALPHA_MAX = {True: 0.99, False: 0.999}  # from 1.6 on, before


def rasterization(*args: Any, alpha_max: float, **options: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """gsplat.rasterization with the arguments of `kernels.splat.rasterization`.

    Raises KernelUnavailable where gsplat is not installed, ValueError for an option that the installed version lacks.
    """
    try:
        import gsplat
    except ImportError as error:
        raise KernelUnavailable(
            "kernels.splat: a CUDA tensor needs gsplat, which is not installed; run `pip install gsplat`, move the "
            "tensors to the CPU, or set KERNELS_BACKEND=reference"
        ) from error
    major, minor = (int(part) for part in gsplat.__version__.split(".")[:2])
    compiled = ALPHA_MAX[(major, minor) >= (1, 6)]
    if alpha_max != compiled:
        raise ValueError(
            f"kernels.splat: got alpha_max {alpha_max} on CUDA; expected {compiled}, which gsplat "
            f"{gsplat.__version__} has compiled in; leave it at that, or render on the CPU"
        )
    known = inspect.signature(gsplat.rasterization).parameters
    given = {name: value for name, value in options.items() if name in known}
    for name in options.keys() - known.keys():
        if options[name] not in (None, False):
            raise ValueError(
                f"kernels.splat: got {name}={options[name]!r}, which gsplat {gsplat.__version__} does not have"
            )
    return gsplat.rasterization(*args, **given)
