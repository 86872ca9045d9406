"""What this checkout and this machine have, for `resparse info` and for bug reports. Names no host and no user."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import metadata

from common import params, paths, provenance

PACKAGES = ("torch", "triton", "numpy", "papermill", "jupytext", "dvc", "mlflow", "nerfstudio", "astra-toolbox")


def facts() -> Iterator[tuple[str, str]]:
    """(name, value) pairs; what is missing or broken is a value too, never an error."""
    yield "resparse", _checkout()
    yield "profile, papers", _house()
    machine, environment = provenance.machine(), provenance.environment()
    yield "python", f"{environment['python']}, {environment['packages']} packages"
    yield "packages", ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    yield "machine", f"{machine['system']}, {machine['cpu']}, {machine['cores']} cores, {machine['ram_gb']} GB"
    yield "threads", str(_threads())
    yield "GPU", ", ".join(_gpus()) or "none that torch can use"
    yield from _kernels()
    yield from _data()
    yield "tracking", _tracking()


def _checkout() -> str:
    git = provenance.git()
    state = {True: ", with changes", False: "", None: ""}[git["dirty"]]
    return f"{_version('resparse')}, commit {git['commit'][:10] or 'unknown (no git)'}{state}, in {paths.root()}"


def _house() -> str:
    try:
        profile, papers = params.house()
    except params.ParamError as error:
        return str(error)
    return f"{profile}: {', '.join(papers)}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _kernels() -> Iterator[tuple[str, str]]:
    found = provenance.kernel_info()
    if not found.get("isa"):
        yield "kernels", f"not usable: {found.get('reason') or found.get('unavailable') or 'no compiled module'}"
        return
    yield "kernels", f"{found['isa']} in use, compiled for {', '.join(found['isas_compiled'])}, by {found['compiler']}"
    forced = found.get("backend")
    yield "", f"stamp {found['stamp']}, OpenMP {found['openmp']}{f', KERNELS_BACKEND={forced}' if forced else ''}"


def _data() -> Iterator[tuple[str, str]]:
    from common import data

    here = [name for name in data.registry() if presence(name) == "here"]
    yield "data", f"{len(here)} of {len(data.registry())} sets are here: {', '.join(here) or 'none'}"
    mirrors = os.pathsep.join(str(folder) for folder in data.mirror_folders())
    yield "", f"cache {data.cache_folder()}, mirrors {mirrors or 'none (RESPARSE_DATA_MIRROR)'}"


def presence(name: str) -> str:
    """`here` if the data set lies on this machine, `damaged` if it does but a file is wrong, else `-`."""
    from common import data

    try:
        return "here" if data.locate(name) else "-"
    except data.DataError:
        return "damaged"


def _tracking() -> str:
    from common import tracking

    try:
        return tracking.uri()
    except tracking.TrackingError as error:
        return str(error)
