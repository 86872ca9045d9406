"""Loads the compiled module `kernels._native`, once, and refuses one that does not belong to these sources.

Where it is looked for, first hit wins: the folder KERNELS_NATIVE if set, else beside this file, then wherever the
package was installed. Environment: KERNELS_NATIVE (folder of another build, e.g. build/sanitize), KERNELS_ISA
(portable, avx2, avx512, amx or, for tests, emulated512 and emulated_amx: the instruction set), KERNELS_BACKEND (see
`kernels._dispatch`).
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

_HERE = Path(__file__).resolve().parent
_STAMPED = (".cpp", ".h", ".in")
_loaded: ModuleType | None = None


class KernelUnavailable(ImportError):
    """No compiled module that fits: the message says what to do."""


def native() -> ModuleType:
    """The compiled module; loads it on the first call.

    Raises KernelUnavailable if there is none, if it was built from other sources, or if it cannot be loaded.
    """
    global _loaded
    if _loaded is None:
        _loaded = _open(_find())
    return _loaded


def info() -> dict[str, Any]:
    """What runs here: isa, isas_compiled, threads, compiler, stamp, openmp, sanitized, backend, binary, reason.

    Never raises for a missing or stale binary: `binary` is then None and `reason` says why. Raises RuntimeError for a
    KERNELS_ISA that is unknown or that this processor lacks.
    """
    import torch

    out: dict[str, Any] = {
        "isa": None,
        "isas_compiled": [],
        "threads": torch.get_num_threads(),
        "compiler": None,
        "stamp": None,
        "openmp": None,
        "sanitized": False,
        "backend": os.environ.get("KERNELS_BACKEND") or None,
        "binary": None,
        "reason": None,
    }
    try:
        module = native()
    except KernelUnavailable as error:
        return out | {"reason": str(error)}
    return out | module.info() | {"binary": module.__file__}


def source_stamp(folder: Path = _HERE) -> str | None:
    """Hash of the C++ and CMake sources under `folder`, as CMakeLists.txt computes it; None if there are none."""
    sources = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and (path.suffix in _STAMPED or path.name == "CMakeLists.txt")
    )
    if "CMakeLists.txt" not in sources:
        return None
    listing = "".join(f"{name} {hashlib.sha256((folder / name).read_bytes()).hexdigest()}\n" for name in sources)
    return hashlib.sha256(listing.encode()).hexdigest()[:16]


def _find() -> Path:
    named = os.environ.get("KERNELS_NATIVE")
    if named:
        folder = Path(named).expanduser()
        if not folder.is_dir():
            raise KernelUnavailable(
                f"KERNELS_NATIVE is {named!r}, which is no folder; expected the build folder that holds "
                "_native*.so; unset it to use the installed build"
            )
        folders = [folder]
    else:
        folders = [_HERE, *(Path(sysconfig.get_path(name)) / "kernels" for name in ("platlib", "purelib"))]
    for folder in folders:
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            if (folder / f"_native{suffix}").is_file():
                return folder / f"_native{suffix}"
    looked = ", ".join(str(folder) for folder in dict.fromkeys(folders))
    raise KernelUnavailable(
        f"the compiled kernels are not there: no _native*.so for Python {sysconfig.get_python_version()} in {looked}; "
        "run `make kernels` in the repository (needs a C++17 compiler), or set KERNELS_BACKEND=reference"
    )


def _open(path: Path) -> ModuleType:
    import torch  # noqa: F401  (its OpenMP runtime serves our module too: see CMakeLists.txt)

    spec = importlib.util.spec_from_file_location("kernels._native", path)
    assert spec is not None and spec.loader is not None, "an extension suffix always has a loader"
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise KernelUnavailable(
            f"the compiled kernels do not load: {error}; {path} was probably built for another Python or torch; "
            "run `make kernels`"
        ) from error
    expected = source_stamp()
    if expected is not None and module.stamp != expected:
        raise KernelUnavailable(
            f"stale binary: {path} was built from sources with stamp {module.stamp}, the sources beside it have "
            f"{expected}; run `make kernels`"
        )
    sys.modules["kernels._native"] = module
    return module
