"""Registry, cache, mirrors and downloads, against a small HTTP server that can misbehave."""

import errno
import hashlib
import os
import shutil
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from common import data
from common.data import _download, _registry, _store

CONTENT = {
    "a.bin": np.random.default_rng(0).bytes(300_000),
    "sub/b.txt": b"second file\n",
}


class Server(ThreadingHTTPServer):
    """Serves CONTENT with ranges; `faults`, one a request: a status, "truncate", "wrong", "long", "other range"."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: list = []
        self.requests: list[tuple[str, str | None]] = []
        self.ranges = True


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.server.requests.append((self.path, wanted))
        fault = self.server.faults.pop(0) if self.server.faults else None
        if isinstance(fault, int):
            self.send_error(fault)
            return
        body = CONTENT[self.path.lstrip("/")]
        if fault == "wrong":
            body = body[::-1]
        if fault == "long":
            body = body + b"more"
        start = 0
        if wanted and self.server.ranges:
            start = 0 if fault == "other range" else int(wanted.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        body = body[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault == "truncate" else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(_download, "PAUSE_S", 0.0)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def entry(server, monkeypatch, tmp_path):
    """A registered set "toy" on the server, an empty cache, no mirrors."""
    base = f"http://127.0.0.1:{server.server_address[1]}/"
    files = tuple(
        data.DataFile(path, len(body), hashlib.sha256(body).hexdigest(), base + path) for path, body in CONTENT.items()
    )
    toy = data.Dataset("toy", "A toy", "nobody/toy", "0" * 40, "CC0", "none", "", files)
    monkeypatch.setattr(_registry, "registry", lambda: {"toy": toy})
    monkeypatch.setenv("RESPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RESPARSE_DATA_MIRROR", raising=False)
    return toy


def assert_complete(folder: Path):
    assert {p: (folder / p).read_bytes() for p in CONTENT} == CONTENT
    assert not list(folder.rglob("*.part"))


def test_downloads_once_and_then_reads_the_cache(server, entry, tmp_path):
    assert data.locate("toy") is None
    folder = data.path("toy")
    assert folder == tmp_path / "cache" / "data" / "toy"
    assert_complete(folder)
    requests = len(server.requests)
    assert data.path("toy") == folder == data.locate("toy")
    assert len(server.requests) == requests == 2


def test_a_lost_connection_is_resumed_where_it_stopped(server, entry):
    server.faults = ["truncate", "truncate"]
    assert_complete(data.fetch("toy", progress=False))
    asked = [wanted for path, wanted in server.requests if path == "/a.bin"]
    assert asked == [None, "bytes=150000-", "bytes=225000-"]


def test_a_part_of_an_earlier_run_is_continued(server, entry):
    server.faults = ["truncate", 404]
    with pytest.raises(data.MissingData, match="404"):
        data.fetch("toy", progress=False)
    folder = data.cache_folder() / "data" / "toy"
    assert not (folder / "a.bin").exists() and (folder / "a.bin.part").stat().st_size == 150_000
    server.requests.clear()
    assert_complete(data.fetch("toy", progress=False))
    assert server.requests[0] == ("/a.bin", "bytes=150000-")


def test_a_server_without_ranges_starts_again(server, entry):
    server.ranges = False
    server.faults = ["truncate"]
    assert_complete(data.fetch("toy", progress=False))


def test_a_server_that_sends_another_range_starts_again(server, entry):
    server.faults = ["truncate", "other range"]
    assert_complete(data.fetch("toy", progress=False))
    assert [path for path, _ in server.requests].count("/a.bin") == 2  # the whole file came with the second reply


def test_server_errors_are_tried_again_and_refusals_are_not(server, entry):
    server.faults = [500, 503]
    assert_complete(data.fetch("toy", progress=False))
    assert [path for path, _ in server.requests].count("/a.bin") == 3


def test_a_dead_server_gives_up_after_some_attempts(server, entry):
    server.faults = [500] * 50
    with pytest.raises(data.MissingData) as caught:
        data.path("toy")
    assert len(server.requests) == _download.ATTEMPTS
    message = str(caught.value)
    for part in ("toy", "CC0", "RESPARSE_DATA_MIRROR", "resparse data fetch toy", "500", "0 of 300000 bytes", "cache"):
        assert part in message, part


def test_a_refusal_is_not_repeated(server, entry):
    server.faults = [403]
    with pytest.raises(data.MissingData, match="403"):
        data.fetch("toy", progress=False)
    assert len(server.requests) == 1


@pytest.mark.parametrize("fault", ["wrong", "long"])
def test_wrong_bytes_are_refused_and_nothing_is_left(server, entry, fault):
    server.faults = [fault]
    with pytest.raises(data.ChecksumError, match=r"a\.bin"):
        data.fetch("toy", progress=False)
    assert not [p for p in data.cache_folder().rglob("*") if p.is_file() and p.name not in (".lock", "verified.json")]
    assert_complete(data.fetch("toy", progress=False))


def test_a_poisoned_part_is_fetched_afresh(server, entry):
    folder = data.cache_folder() / "data" / "toy"
    folder.mkdir(parents=True)
    (folder / "a.bin.part").write_bytes(b"\0" * 1000)
    assert_complete(data.fetch("toy", progress=False))
    assert [wanted for path, wanted in server.requests if path == "/a.bin"] == ["bytes=1000-", None]


def test_a_part_longer_than_the_file_is_fetched_afresh(server, entry):
    folder = data.cache_folder() / "data" / "toy"
    folder.mkdir(parents=True)
    (folder / "a.bin.part").write_bytes(b"\0" * 400_000)
    assert_complete(data.fetch("toy", progress=False))


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_a_damaged_cached_file_is_replaced(server, entry, damage):
    file = data.fetch("toy", progress=False) / "a.bin"
    body = bytearray(CONTENT["a.bin"])
    body[7] ^= 1
    file.write_bytes(body if damage == "flip" else body[:1000])
    assert data.locate("toy") is None
    assert_complete(data.path("toy"))


def test_full_disk_while_writing(server, entry, monkeypatch):
    real_open = Path.open

    def full(self, mode="r", *args, **kwargs):
        stream = real_open(self, mode, *args, **kwargs)
        if self.name.endswith(".part") and mode in ("wb", "ab"):

            class Full:
                def __enter__(self):
                    return self

                def __exit__(self, *exc):
                    stream.close()

                def write(self, chunk):
                    stream.write(chunk[:10])
                    raise OSError(errno.ENOSPC, "No space left on device")

            return Full()
        return stream

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(data.DiskFull, match="RESPARSE_CACHE"):
        data.fetch("toy", progress=False)
    assert not [p for p in data.cache_folder().rglob("a.bin*")]


def test_full_disk_before_the_first_byte(server, entry, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 200_000))
    with pytest.raises(data.DiskFull, match=r"0\.3 MB needed, 0\.2 MB free"):
        data.fetch("toy", progress=False)
    assert not server.requests


def test_the_bar_shows_the_bytes(server, entry, capsys):
    server.faults = ["truncate"]
    data.fetch("toy")
    assert "100%" in capsys.readouterr().err
    data.fetch("toy")
    assert capsys.readouterr().err == ""


def mirror_of(folder: Path) -> Path:
    for path, body in CONTENT.items():
        (folder / "toy" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "toy" / path).write_bytes(body)
    return folder


def test_mirrors_are_used_in_place_and_in_order(server, entry, monkeypatch, tmp_path):
    empty, first, second = tmp_path / "empty", mirror_of(tmp_path / "first"), mirror_of(tmp_path / "second")
    monkeypatch.setenv("RESPARSE_DATA_MIRROR", os.pathsep.join(map(str, (empty, first, second))))
    assert data.path("toy") == first / "toy"
    (first / "toy" / "sub" / "b.txt").unlink()
    assert data.path("toy") == second / "toy"
    assert not server.requests
    assert {p.name for p in (second / "toy").rglob("*")} == {"a.bin", "sub", "b.txt"}


def test_a_mirror_is_hashed_once_and_sized_each_time(entry, monkeypatch, tmp_path):
    mirror = mirror_of(tmp_path / "mirror")
    monkeypatch.setenv("RESPARSE_DATA_MIRROR", str(mirror))
    hashed = []

    def counting(path):
        hashed.append(path.name)
        return _download.file_sha256(path)

    monkeypatch.setattr(_store, "file_sha256", counting)
    data.path("toy")
    data.path("toy")
    assert sorted(hashed) == ["a.bin", "b.txt"]
    big = mirror / "toy" / "a.bin"
    status = big.stat()
    big.write_bytes(CONTENT["a.bin"][:-1])
    os.utime(big, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(data.ChecksumError, match="299999 bytes"):  # the remembered time alone is not trusted
        data.path("toy")
    big.write_bytes(CONTENT["a.bin"])
    os.utime(big, ns=(1, 1))  # touched: looked at again
    data.path("toy")
    assert sorted(hashed) == ["a.bin", "a.bin", "b.txt"]


@pytest.mark.parametrize("body, message", [(b"short", "5 bytes, expected 12"), (b"SECOND FILE\n", "sha256")])
def test_a_wrong_file_in_a_mirror_is_named(entry, monkeypatch, tmp_path, body, message):
    mirror = mirror_of(tmp_path / "mirror")
    monkeypatch.setenv("RESPARSE_DATA_MIRROR", str(mirror))
    data.path("toy")
    (mirror / "toy" / "sub" / "b.txt").write_bytes(body)
    with pytest.raises(data.ChecksumError, match=rf"b\.txt.*{message}"):
        data.path("toy")
    assert (mirror / "toy" / "sub" / "b.txt").read_bytes() == body


def test_derived_files_are_never_asked_for(server, entry, monkeypatch):
    files = (entry.files[0], replace(entry.files[1], url=None))
    monkeypatch.setattr(_registry, "registry", lambda: {"toy": replace(entry, files=files, derived="by hand")})
    with pytest.raises(data.MissingData, match=r"sub/b\.txt.*by hand"):
        data.path("toy")
    assert not server.requests
    folder = data.path("toy", only="a.*")  # the part that can be had
    assert [p.name for p in folder.iterdir() if not p.name.startswith(".")] == ["a.bin"]


def test_only_must_match_something(entry):
    with pytest.raises(ValueError, match=r"a\.bin"):
        data.path("toy", only="*.dcm")


def test_a_cache_that_cannot_be_written_still_reads_mirrors(entry, monkeypatch, tmp_path):
    monkeypatch.setenv("RESPARSE_DATA_MIRROR", str(mirror_of(tmp_path / "mirror")))
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("RESPARSE_CACHE", str(tmp_path / "file" / "cache"))
    assert data.path("toy") == tmp_path / "mirror" / "toy"
    with pytest.raises(data.DataError, match="RESPARSE_CACHE"):
        data.fetch("toy")


def test_two_processes_fetch_side_by_side(server, entry):
    """The lock makes the second wait and find the files: each is asked for once."""
    threads = [threading.Thread(target=data.fetch, args=("toy", False)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_complete(data.cache_folder() / "data" / "toy")
    assert len(server.requests) == 2


def test_unknown_names_get_the_nearest():
    with pytest.raises(data.UnknownDataset, match="ct_sinogram_tooth"):
        data.path("ct_sinogram_tooht")
    with pytest.raises(ValueError, match="resparse data list"):
        data.describe("zzz")


def test_the_registry_is_whole():
    sets = data.registry()
    assert {"ct_phantom_head_philips", "ct_sinogram_tooth", "ct_dicom_small", "ct_volume_head_vtk"} <= set(sets)
    listings = {file.stem for file in (Path(data.__file__).parent / "files").iterdir()}
    assert listings == set(sets)
    for name, entry in sets.items():
        assert entry.name == name and entry.files and entry.title and entry.licence and entry.citation
        assert len(entry.commit) == 40 and entry.repository.count("/") == 1
        for file in entry.files:
            assert len(file.sha256) == 64 and file.bytes > 0 and not Path(file.path).is_absolute()
            assert ".." not in file.path and (file.url is None or file.url.startswith("https://raw.githubusercontent"))
        assert name in data.describe(name) and entry.licence in data.describe(name)
    assert len(sets["ct_phantom_head_philips"].files) == 29
    assert len({entry.sha256 for entry in sets.values()}) == len(sets)


@pytest.mark.parametrize("name", sorted(data.registry()))
def test_the_mirror_beside_the_checkout_has_the_registered_files(real_data, name):
    folder = real_data(name)
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {"SOURCE.md"}
    assert present == {file.path for file in data.registry()[name].files}
