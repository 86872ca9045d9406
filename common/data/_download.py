"""One file over HTTP: resumed where it stopped, tried again, checked, put in place only when right."""

from __future__ import annotations

import errno
import hashlib
import http.client
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from common.data._registry import DataFile, megabytes

ATTEMPTS = 4
PAUSE_S = 0.5  # before the second attempt; doubled each time
TIMEOUT_S = 30
_CHUNK = 1 << 16
_RESERVE_BYTES = 1 << 20  # a disk filled to its last byte breaks other programs

Advance = Callable[[int], object]


class DataError(RuntimeError):
    """Something is wrong with a data set's files."""


class ChecksumError(DataError):
    """A file's content is not the registered one."""


class DownloadError(DataError):
    """A download failed; what arrived so far is kept as `.part` and continued next time."""


class DiskFull(DataError):
    """There is no room for the file; what arrived so far is removed."""


def download(file: DataFile, target: Path, advance: Advance = lambda count: None) -> None:
    """Put `file` at `target`, by way of `target` + ".part"; `advance` is told the bytes as they arrive.

    A connection lost half-way is taken up by a Range request, up to ATTEMPTS times and again at the next call. Content
    that resumes to a wrong hash is fetched once more from the start.

    Raises ChecksumError, DownloadError, DiskFull; `target` then does not exist.
    """
    assert file.url is not None
    part = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    resumed = part.exists()
    try:
        _fill(file, part, advance)
        digest = file_sha256(part)
        if digest != file.sha256 and resumed:
            part.unlink()
            _fill(file, part, advance)
            digest = file_sha256(part)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        part.unlink(missing_ok=True)
        raise _disk_full(file, target) from error
    if digest != file.sha256:
        part.unlink()
        raise ChecksumError(
            f"{file.url}: wrong content: sha256 {digest}, expected {file.sha256}. Nothing was kept. The upstream file "
            "changed or something on the way replaced it; take the set from a mirror (RESPARSE_DATA_MIRROR)."
        )
    part.replace(target)


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fill(file: DataFile, part: Path, advance: Advance) -> None:
    """Get `part` to the file's full size."""
    if part.exists() and part.stat().st_size > file.bytes:
        part.unlink()
    have = part.stat().st_size if part.exists() else 0
    if shutil.disk_usage(part.parent).free < file.bytes - have + _RESERVE_BYTES:
        raise OSError(errno.ENOSPC, "no space left")
    advance(have)
    failure = "the connection ended early"
    for attempt in range(ATTEMPTS):
        have = part.stat().st_size if part.exists() else 0
        if have == file.bytes and part.exists():
            return
        if attempt:
            time.sleep(PAUSE_S * 2 ** (attempt - 1))
        try:
            _receive(file, part, have, advance)
        except urllib.error.HTTPError as error:
            failure = str(error)
            error.close()
            if error.code == 416:  # the server's file is shorter than our part: start again
                advance(-have)
                part.unlink(missing_ok=True)
            elif error.code < 500 and error.code != 429:
                break  # the server knows the request and refuses it: asking again is of no use
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            failure = f"{type(error).__name__}: {error}"
    have = part.stat().st_size if part.exists() else 0
    if have == file.bytes and part.exists():
        return
    raise DownloadError(
        f"{file.url}: got {have} of {file.bytes} bytes ({failure}). "
        f"{'The part is kept and continued next time. ' if have else ''}Check the network and try again, or set "
        "RESPARSE_DATA_MIRROR to a folder that has the set."
    )


def _receive(file: DataFile, part: Path, have: int, advance: Advance) -> None:
    """One request; appends to `part` from byte `have`, or starts again where the server ignores the range."""
    assert file.url is not None
    # identity: a compressed transfer would make sizes and ranges mean something else
    headers = {"Accept-Encoding": "identity", "User-Agent": "resparse"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with urllib.request.urlopen(urllib.request.Request(file.url, headers=headers), timeout=TIMEOUT_S) as reply:
        continues = have and reply.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if have and not continues:
            advance(-have)
            have = 0
        with part.open("ab" if continues else "wb") as stream:
            while chunk := reply.read(_CHUNK):
                stream.write(chunk)
                advance(len(chunk))
                have += len(chunk)
                if have > file.bytes:
                    break  # longer than registered: the hash will say so
    if have > file.bytes:
        part.unlink()
        raise ChecksumError(f"{file.url}: more than the registered {file.bytes} bytes: not the registered file")


def _disk_full(file: DataFile, target: Path) -> DiskFull:
    free = shutil.disk_usage(target.parent).free
    return DiskFull(
        f"no room for {target}: {megabytes(file.bytes)} needed, {megabytes(free)} free. The part was removed. Free "
        "some space, or set RESPARSE_CACHE to a folder on another disk."
    )
