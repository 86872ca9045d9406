"""What data sets there are: `registry.yaml` (words) and `files/<name>.txt` (hashes, sizes, upstream paths)."""

from __future__ import annotations

import difflib
import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from urllib.parse import quote

_HERE = Path(__file__).parent
_KEYS = {"title", "repository", "commit", "licence", "citation"}


class UnknownDataset(ValueError):
    """No data set of that name is registered."""


@dataclass(frozen=True)
class DataFile:
    """One file of a set: its path there, its content, the address of the identical upstream file (None: derived)."""

    path: str
    bytes: int
    sha256: str
    url: str | None


@dataclass(frozen=True)
class Dataset:
    """A registered data set. `derived` says how the files without an address were made ("" where there are none)."""

    name: str
    title: str
    repository: str
    commit: str
    licence: str
    citation: str
    derived: str
    files: tuple[DataFile, ...]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def sha256(self) -> str:
        """One digest for the whole set: of the lines `sha256  path`, in order of path."""
        lines = sorted(f"{file.path}\n{file.sha256}" for file in self.files)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@functools.cache
def registry() -> Mapping[str, Dataset]:
    """All registered data sets by name, read-only. Raises ValueError where the registry's own files are wrong."""
    from ruamel.yaml import YAML

    entries = YAML(typ="safe").load((_HERE / "registry.yaml").read_text(encoding="utf-8"))
    return MappingProxyType({name: _dataset(name, entry) for name, entry in entries.items()})


def dataset(name: str) -> Dataset:
    """The data set of that name; UnknownDataset with the nearest name otherwise."""
    sets = registry()
    if name not in sets:
        near = difflib.get_close_matches(name, sets, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UnknownDataset(f"unknown data set {name!r}.{hint} `resparse data list` shows all {len(sets)} names.")
    return sets[name]


def describe(name: str) -> str:
    """A few lines for people: what it is, size, licence, source, citation. Raises UnknownDataset."""
    entry = dataset(name)
    derived = [file for file in entry.files if file.url is None]
    lines = [
        f"{entry.name}: {entry.title}",
        f"  files     {len(entry.files)}, {megabytes(entry.bytes)}",
        f"  licence   {entry.licence}",
        f"  source    https://github.com/{entry.repository}/tree/{entry.commit}",
        f"  cite      {entry.citation}",
    ]
    if derived:
        lines.append(f"  derived   not downloadable: {len(derived)} of the files; {entry.derived}")
    return "\n".join(lines)


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def _dataset(name: str, entry: dict[str, str]) -> Dataset:
    listing = _HERE / "files" / f"{name}.txt"
    if unknown := (set(entry) - _KEYS - {"derived"}) | (_KEYS - set(entry)):
        raise ValueError(f"registry.yaml: {name}: keys {sorted(unknown)} are missing or unknown")
    base = f"https://raw.githubusercontent.com/{entry['repository']}/{entry['commit']}/"
    files = []
    for line in listing.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        sha256, size, path, upstream = line.split("\t")
        if upstream == "-":
            url = None
        else:
            url = upstream if upstream.startswith("https://") else base + quote(upstream)
        files.append(DataFile(path, int(size), sha256, url))
    if any(file.url is None for file in files) and not entry.get("derived"):
        raise ValueError(
            f"registry.yaml: {name} has files without an upstream path but does not say how they were derived"
        )
    return Dataset(name=name, files=tuple(files), **{"derived": "", **entry})
