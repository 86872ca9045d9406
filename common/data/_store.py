"""Where a data set's files are on this machine: the cache, the mirror folders, and what was verified already."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.data._download import ChecksumError, DataError, DownloadError, download, file_sha256
from common.data._registry import DataFile, Dataset, dataset, megabytes


class MissingData(DataError, FileNotFoundError):
    """A data set is neither here nor to be had."""


def path(name: str, *, only: str = "*") -> Path:
    """The folder that holds the verified files of the set; downloads what is not on this machine.

    only: a pattern of paths within the set ("dicom_5mm/*"), where a part of it is enough.

    Raises UnknownDataset; ValueError where `only` matches nothing; ChecksumError for a wrong file in a mirror;
    MissingData, DownloadError, DiskFull where the set cannot be had, saying where it was looked for and what to do.
    """
    return locate(name, only=only) or fetch(name, only=only)


def locate(name: str, *, only: str = "*") -> Path | None:
    """The folder that holds the verified files of the set on this machine, or None; never touches the network.

    Raises UnknownDataset; ValueError where `only` matches nothing; ChecksumError for a wrong file in a mirror.
    """
    entry = dataset(name)
    files = _selected(entry, only)
    cached = cache_folder() / "data" / name
    if all(_is_good(cached / file.path, file) for file in files):
        return cached
    for mirror in mirror_folders():
        folder = mirror / name
        if all((folder / file.path).is_file() for file in files):
            for file in files:
                _check_mirrored(folder / file.path, file)
            return folder
    return None


def fetch(name: str, progress: bool = True, *, only: str = "*") -> Path:
    """Download the set into the cache, whatever the mirrors hold; files that are there and right are left alone.

    progress: show one bar on stderr. Raises as `path`.
    """
    entry = dataset(name)
    folder = cache_folder() / "data" / name
    files = _selected(entry, only)
    with _locked(folder):
        wanted = [file for file in files if not _is_good(folder / file.path, file)]
        if underived := [file for file in wanted if file.url is None]:
            raise _missing(entry, underived, None)
        with _bar(entry, wanted, progress) as advance:
            for file in wanted:
                target = folder / file.path
                target.unlink(missing_ok=True)  # wrong or truncated: out of the way before anything can read it
                try:
                    download(file, target, advance)
                except DownloadError as error:
                    raise _missing(entry, [file], error) from error
                _remember(target, file)
    return folder


def cache_folder() -> Path:
    """RESPARSE_CACHE, or `resparse` in the platform's cache folder."""
    if named := os.environ.get("RESPARSE_CACHE"):
        return Path(named).expanduser().absolute()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "resparse"


def mirror_folders() -> list[Path]:
    """The folders of RESPARSE_DATA_MIRROR, absolute, in order."""
    named = os.environ.get("RESPARSE_DATA_MIRROR", "").split(os.pathsep)
    return [Path(folder).expanduser().absolute() for folder in named if folder]


def _selected(entry: Dataset, only: str) -> Sequence[DataFile]:
    files = [file for file in entry.files if fnmatch.fnmatchcase(file.path, only)]
    if not files:
        some = ", ".join(file.path for file in entry.files[:3])
        raise ValueError(f"no file of {entry.name} matches {only!r}; its {len(entry.files)} files are like {some}")
    return files


def _is_good(path: Path, file: DataFile) -> bool:
    """Size now, sha256 now or at an earlier time with the same size and modification time."""
    try:
        status = path.stat()
    except OSError:
        return False
    if status.st_size != file.bytes:
        return False
    if _remembered().get(str(path)) == [file.bytes, status.st_mtime_ns, file.sha256]:
        return True
    if file_sha256(path) != file.sha256:
        return False
    _remember(path, file)
    return True


def _check_mirrored(path: Path, file: DataFile) -> None:
    if _is_good(path, file):
        return
    size = path.stat().st_size
    if size != file.bytes:
        got = f"{size} bytes, expected {file.bytes}"
    else:
        got = f"sha256 {file_sha256(path)}, expected {file.sha256}"
    raise ChecksumError(
        f"{path}: wrong content in a mirror folder: {got}. Copy the file again, or take the folder out of "
        "RESPARSE_DATA_MIRROR; nothing was changed there."
    )


def _memory() -> Path:
    return cache_folder() / "verified.json"


def _remembered() -> dict[str, list]:
    """{path: [bytes, mtime_ns, sha256]} of files verified before. An unreadable memory is an empty one."""
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(_memory().read_text(encoding="utf-8"))
        if isinstance(known, dict):
            return known
    return {}


def _remember(path: Path, file: DataFile) -> None:
    # Two processes may overwrite each other's entry: the loser's file is hashed once more. A cache that cannot be
    # written (read-only home, full disk) costs hashing each time and nothing else.
    with contextlib.suppress(OSError):
        known = _remembered()
        known[str(path)] = [file.bytes, path.stat().st_mtime_ns, file.sha256]
        _memory().parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=_memory().parent, prefix="verified-")
        try:
            with os.fdopen(handle, "w") as stream:
                json.dump(known, stream)
            os.replace(scratch, _memory())
        except OSError:
            os.unlink(scratch)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time fills a set; the others wait and then find it complete."""
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise DataError(
            f"cannot write to the cache {folder}: {error}. Set RESPARSE_CACHE to a folder of yours."
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _bar(entry: Dataset, wanted: Sequence[DataFile], progress: bool):
    from tqdm import tqdm

    total = sum(file.bytes for file in wanted)
    with tqdm(total=total, desc=entry.name, unit="B", unit_scale=True, disable=not (progress and wanted)) as bar:
        yield bar.update


def _missing(entry: Dataset, files: Sequence[DataFile], error: DownloadError | None) -> MissingData:
    looked = [str(cache_folder() / "data" / entry.name), *(str(folder / entry.name) for folder in mirror_folders())]
    get = f"set RESPARSE_DATA_MIRROR to a folder that has {entry.name}/"
    if error:
        why = f"and the download failed: {error}"
        get += f", or run `resparse data fetch {entry.name}` with a network"
    else:
        why = (
            f"and {len(files)} of its files ({files[0].path}, ...) have no address: they were derived ({entry.derived})"
        )
    return MissingData(
        f"data set {entry.name} ({megabytes(entry.bytes)}, licence: {entry.licence}) is not complete in "
        f"{' or '.join(looked)}, {why}\nTo get it, {get}. Source: https://github.com/{entry.repository}"
    )
