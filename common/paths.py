"""Where things are: the one place that knows the repository's root and the layout of `results/`.

Every path is computed from `root()`, so a copy of the repository (a temporary DVC experiment, a test's toy house) is
complete in itself. Paths that are written into committed files go through `relative`.
"""

from __future__ import annotations

from pathlib import Path


def root() -> Path:
    """The repository's root: the nearest folder at or above the working directory that holds `dvc.yaml` and `papers`.

    A notebook opened in JupyterLab works from its own folder, the driver from the root. From anywhere else it is the
    folder above this package.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "dvc.yaml").is_file() and (folder / "papers").is_dir():
            return folder
    return Path(__file__).parents[1]


def relative(path: Path) -> str:
    """`path` as seen from the root, with forward slashes; never an absolute machine path for files of ours."""
    path = Path(path)
    return path.relative_to(root()).as_posix() if path.is_relative_to(root()) else path.name


def paper(slug: str) -> Path:
    """The paper's folder."""
    return root() / "papers" / slug


def notebook(slug: str) -> Path:
    """The paper's percent notebook, the reviewed source."""
    return paper(slug) / f"{slug}.py"


def lock() -> Path:
    """The hash-pinned lock of the environment."""
    return root() / "requirements.lock"


# results in git and DVC: written by the driver, after success alone


def results() -> Path:
    return root() / "results"


def metrics(slug: str, profile: str) -> Path:
    return results() / "metrics" / slug / f"{profile}.json"


def provenance(slug: str, profile: str) -> Path:
    return results() / "provenance" / slug / f"{profile}.json"


def figures(slug: str, profile: str) -> Path:
    return results() / "figures" / slug / profile


def run(slug: str, profile: str) -> Path:
    """Executed notebook, HTML and curves: cached by DVC, ignored by git."""
    return results() / "runs" / slug / profile


def checkpoint(name: str) -> Path:
    """A model that the project trained: kept by DVC, ignored by git."""
    return root() / "checkpoints" / f"{name}.safetensors"


# working space, ignored by git


def scratch(slug: str, profile: str) -> Path:
    """Where a notebook opened by hand writes."""
    return results() / "scratch" / slug / profile


def running(slug: str, profile: str, pid: int) -> Path:
    """Where a driven run writes until it has succeeded."""
    return results() / "scratch" / "running" / slug / f"{profile}-{pid}"


def trial(slug: str, profile: str) -> Path:
    """The latest driven run whose parameters were changed on the command line: kept, but never official."""
    return results() / "scratch" / "trials" / slug / profile


def failed(slug: str, profile: str) -> Path:
    """What the latest failed run left behind."""
    return results() / "scratch" / "failed" / slug / profile


def cells(slug: str, digest: str) -> Path:
    """Finished units of work of one paper under one state of parameters and sources."""
    return results() / "cells" / slug / digest
