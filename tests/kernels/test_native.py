"""The compiled module: what it tells of itself, which binaries are refused, and that all instruction sets agree."""

from __future__ import annotations

import _ctypes
import importlib.machinery
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

import kernels
from kernels import KernelUnavailable, _load
from kernels.ct import FanBeam, ParallelBeam, backproject, project

ROOT = Path(__file__).resolve().parents[2]
SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]
COMPILED = _load.native().info()["isas_compiled"]


def runnable(isa: str) -> bool:
    """What Linux says, not what our own code finds out."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    wide = ["avx512f", "avx512dq", "avx512bw", "avx512vl"]
    tiles = [*wide, "avx512_bf16", "amx_tile", "amx_bf16"]
    needed = {"avx2": ["avx2", "fma"], "avx512": wide, "amx": tiles}.get(isa, [])
    return all(re.search(rf"\b{flag}\b", flags) for flag in needed)


ISAS = [isa for isa in COMPILED if runnable(isa)]
LANES = [isa for isa in ISAS if isa != "emulated_amx"]  # the projector knows no tiles: these lanes again

# --- what it tells ----------------------------------------------------------------------------------------------------


def test_info_tells_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KERNELS_ISA", raising=False)
    monkeypatch.setenv("KERNELS_BACKEND", "cpu")
    found = kernels.info()
    expected = "backend binary compiler isa isas_compiled openmp reason sanitized stamp threads"
    assert sorted(found) == expected.split()
    assert {"portable", "emulated512", "emulated_amx"} <= set(found["isas_compiled"])
    assert found["isa"] == [isa for isa in ("portable", "avx2", "avx512", "amx") if isa in ISAS][-1], "not the widest"
    assert found["threads"] == torch.get_num_threads() and found["backend"] == "cpu"
    assert found["stamp"] == _load.source_stamp() and found["openmp"] >= 201511
    assert re.fullmatch(r"(GNU|Clang|AppleClang) [\d.]+", found["compiler"])
    assert Path(found["binary"]).is_file() and found["reason"] is None and isinstance(found["sanitized"], bool)


@pytest.mark.parametrize("isa", COMPILED)
def test_an_instruction_set_can_be_forced_where_the_processor_has_it(isa: str, monkeypatch) -> None:
    monkeypatch.setenv("KERNELS_ISA", isa)
    if runnable(isa):
        assert kernels.info()["isa"] == isa
    else:
        with pytest.raises(RuntimeError, match=rf"KERNELS_ISA is {isa}, which this processor lacks; the widest .* is"):
            kernels.info()
        with pytest.raises(RuntimeError, match=r"unset KERNELS_ISA"):
            project(torch.zeros(4, 4), ParallelBeam.uniform(2, 4, (4, 4)))


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNELS_ISA", "avx1024")
    with pytest.raises(RuntimeError, match=rf"KERNELS_ISA is avx1024; expected one of {', '.join(COMPILED)}, or unset"):
        kernels.info()


# --- which binaries are refused ---------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the module is looked for next; nothing is loaded yet."""
    monkeypatch.setenv("KERNELS_NATIVE", str(tmp_path))
    monkeypatch.setattr(_load, "_loaded", None)
    return tmp_path


def refused() -> str:
    """The message of the refusal, which `info` gives as its reason instead of raising."""
    with pytest.raises(KernelUnavailable) as caught:
        _load.native()
    found = kernels.info()
    assert found["reason"] == str(caught.value) and found["binary"] is found["isa"] is None
    assert "make kernels" in found["reason"] or "KERNELS_NATIVE" in found["reason"]
    return found["reason"]


def test_no_binary(elsewhere: Path) -> None:
    reason = refused()
    assert f"no _native*.so for Python {sysconfig.get_python_version()} in {elsewhere}" in reason


def test_the_binary_of_another_python_is_none_of_ours(elsewhere: Path) -> None:
    (elsewhere / "_native.cpython-39-x86_64-linux-gnu.so").write_bytes(b"")
    assert "are not there" in refused()


def test_a_file_that_is_no_library(elsewhere: Path) -> None:
    (elsewhere / f"_native{SUFFIX}").write_bytes(b"\x7fELF and then nonsense")
    assert "do not load" in refused()


def test_a_module_that_is_not_ours(elsewhere: Path) -> None:
    shutil.copy(_ctypes.__file__, elsewhere / f"_native{SUFFIX}")
    assert "probably built for another Python or torch" in refused()


def test_a_folder_that_is_not_there(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNELS_NATIVE", str(elsewhere / "gone"))
    assert "which is no folder; expected the build folder" in refused()


# in a process of its own: a library that was loaded stays loaded
STALE = """
import json, shutil, sys
from pathlib import Path
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
sys.path.insert(0, sys.argv[1])
from kernels import KernelUnavailable, _load
folder = Path(sys.argv[1]) / "kernels"
assert Path(_load.__file__).parent == folder
def outcome():
    try:
        return _load.native().stamp
    except KernelUnavailable as error:
        return str(error)
def changed(name, text):
    path = folder / name
    before = path.read_text() if path.exists() else None
    path.write_text(text + (before or ""))
    found = outcome()
    path.unlink() if before is None else path.write_text(before)
    return found
edits = ["ct/cpu.cpp", "simd/isa.h", "stamp.h.in", "CMakeLists.txt", "ct/a_new_file.cpp"]
stale = {name: changed(name, "// edited\\n") for name in edits}
print(json.dumps({"stale": stale, "python": changed("ct/reference.py", "# edited\\n"), "same": outcome()}))
"""


def test_a_binary_of_other_sources_is_stale(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    binary = Path(_load.native().__file__)
    result = subprocess.run(
        [sys.executable, "-c", STALE, str(tmp_path)],
        env=os.environ | {"KERNELS_NATIVE": str(binary.parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout)
    stamp = _load.source_stamp()
    for name, message in found["stale"].items():
        assert re.match(rf"stale binary: .* stamp {stamp}, .* have [0-9a-f]{{16}}; run `make kernels`", message), name
    assert found["python"] == found["same"] == stamp


# --- all instruction sets agree ---------------------------------------------------------------------------------------


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_scan(seed: int) -> ParallelBeam | FanBeam:
    """Any angles, offsets and proportions; sizes round the widths of vectors and tiles; every third source is close."""
    draw = np.random.default_rng(seed)
    most = 250 if seed % 10 == 9 else 90
    shape = (int(draw.integers(1, most)), int(draw.integers(1, most)))
    if seed % 2 == 0:
        shape = (shape[0], shape[0])  # square images are shared out by their symmetry
    cells = int(draw.integers(1, 2 * most))
    angles = [*draw.uniform(-7, 7, 4), 0.0, np.pi / 4, np.pi / 2, *(draw.uniform(0, 1.5) + np.pi / 2 * np.arange(4))]
    lengths = {"pixel": draw.uniform(0.5, 2), "pitch": draw.uniform(0.3, 3)}
    if draw.random() < 0.6:
        lengths |= {"offset": draw.uniform(-9, 9), "axis": draw.uniform(-4, 4)}
    if seed % 4 < 2:
        return ParallelBeam(angles, cells, shape, **lengths)
    reach = lengths["pixel"] * (np.hypot(*shape) / 2 + 1)
    near = reach * draw.uniform(1, 1.05) + 0.01 if seed % 3 == 0 else reach * draw.uniform(1.2, 4)
    return FanBeam(angles, cells, shape, source_axis=near, axis_detector=draw.uniform(0, 3) * reach, **lengths)


FIXED = {
    # far more tiles than a block of a view's cells meets
    "parallel, large": ParallelBeam.uniform(31, 368, (251, 251), pitch=0.9),
    "fan, large": FanBeam.uniform(60, 322, (224, 224), source_axis=448.0, axis_detector=224.0, pitch=1.5),
    "parallel": ParallelBeam.uniform(20, 150, (101, 101)),
    "parallel, moved": ParallelBeam.uniform(11, 190, (67, 131), pitch=0.7, pixel=0.8, offset=0.21, axis=-0.4),
    "parallel, beside the image": ParallelBeam.uniform(9, 60, (40, 40), offset=45.0),
    "fan": FanBeam.uniform(20, 150, (101, 101), source_axis=202.0, axis_detector=101.0, pitch=1.5),
    "fan, moved": FanBeam.uniform(
        11, 190, (131, 67), source_axis=150.0, axis_detector=80.0, pitch=1.3, offset=0.3, axis=0.8
    ),
    "fan, source beside the image": FanBeam.uniform(13, 150, (48, 48), source_axis=34.5, axis_detector=20.0),
}
SCANS = FIXED | {f"random {seed}": random_scan(seed) for seed in range(60)}


def both_ways(scan: ParallelBeam | FanBeam, threads: int) -> tuple[torch.Tensor, torch.Tensor]:
    batch = 3 if scan.shape[0] < 60 else 1
    x, y = noise(batch, *scan.shape, seed=1), noise(batch, *scan.sinogram_shape, seed=2)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return project(x, scan), backproject(y, scan)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", [isa for isa in LANES if isa != "portable"])
def test_instruction_sets_agree_whatever_the_threads(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNELS_BACKEND", "cpu")
    for name, scan in SCANS.items():
        monkeypatch.setenv("KERNELS_ISA", "portable")
        portable = both_ways(scan, 1)
        assert all(map(torch.equal, portable, both_ways(scan, 2))), f"{name}: portable bits depend on the threads"
        monkeypatch.setenv("KERNELS_ISA", isa)
        wide = both_ways(scan, 1)
        for threads in (2, 5):
            assert all(map(torch.equal, wide, both_ways(scan, threads))), f"{name}: bits depend on {threads} threads"
        for found, expected in zip(wide, portable, strict=True):
            assert (found - expected).norm() <= 2e-6 * expected.norm(), f"{name}: {isa} against portable"


MARGIN = 4096


def surrounded(data: torch.Tensor, by: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A contiguous copy inside a longer run of `by`, and that run."""
    run = torch.full((data.numel() + 2 * MARGIN,), by)
    inside = run[MARGIN:-MARGIN].view(data.shape)
    inside.copy_(data)
    return inside, run


@pytest.mark.parametrize("isa", LANES)
@pytest.mark.parametrize("name", FIXED)
def test_nothing_beside_the_arrays_is_read_or_written(isa: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # what reads a little too far gets NaN, what writes too far is seen; the sanitizers look closer (make test-sanitize)
    monkeypatch.setenv("KERNELS_ISA", isa)
    scan, native = FIXED[name], _load.native()
    beam = "fan" if isinstance(scan, FanBeam) else "parallel"
    image, sinogram = noise(2, *scan.shape, seed=1), noise(2, *scan.sinogram_shape, seed=2)
    for way, data, out in (("project", image, sinogram), ("backproject", sinogram, image)):
        function = getattr(native, f"ct_{beam}_{way}")
        expected = torch.empty_like(out)
        function(data, scan.angles, expected, *scan.lengths_mm, 2)
        (data, _), (found, run) = surrounded(data, by=torch.nan), surrounded(out, by=7.0)
        function(data, scan.angles, found, *scan.lengths_mm, 2)
        assert torch.equal(found, expected)
        assert run[:MARGIN].eq(7).all() and run[-MARGIN:].eq(7).all()


# --- without a compiler or a Python that fits -------------------------------------------------------------------------


@pytest.fixture
def bootstrap(tmp_path: Path):
    """bootstrap(**tools) -> what `make setup` says first, on a machine that has these programs (name: shell script)."""
    (tmp_path / "pipelines").mkdir()
    shutil.copy(ROOT / "pipelines" / "bootstrap.sh", tmp_path / "pipelines")
    (tmp_path / "requirements.lock").write_text("")
    (tmp_path / "bin").mkdir()
    for name in ("bash", "cut", "dirname", "env", "head", "rm", "sed", "sha256sum", "sort", "xargs"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or name)

    def run(**tools: str) -> str:
        for name, script in tools.items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        environment = {"PATH": str(tmp_path / "bin"), "PYTHON": "python3", "CXX": "c++"}
        command = [str(tmp_path / "pipelines" / "bootstrap.sh")]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert result.returncode == 1, result.stderr
        assert result.stderr.startswith("resparse: ") and result.stderr.count("\n") == 1, result.stderr
        assert not (tmp_path / ".venv").exists()
        return result.stderr

    return run


GOOD_PYTHON = f'exec "{sys.executable}" "$@"'
OLD_PYTHON = '[ "$1" = --version ] && echo "Python 3.9.1"; [ "$1" = --version ]'


def test_no_compiler_is_one_clear_line(bootstrap) -> None:
    assert "no C++ compiler ('c++' not found)" in bootstrap(python3=GOOD_PYTHON)


def test_a_compiler_that_is_too_old_is_one_clear_line(bootstrap) -> None:
    said = bootstrap(python3=GOOD_PYTHON, **{"c++": "echo 8.3.0"})
    assert "'c++' is version 8; GCC 9 or Clang 9 is the oldest" in said and "CXX=" in said


def test_no_python_that_fits_is_one_clear_line(bootstrap) -> None:
    said = bootstrap(python3=OLD_PYTHON)
    assert "no Python 3.11, 3.12 or 3.13 among 'python3' (found: Python 3.9.1)" in said and "make PYTHON=" in said
