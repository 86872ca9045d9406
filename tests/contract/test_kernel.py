"""The contract of a kernel: one room for each op with its reference, its benchmark, its documented public functions."""

from __future__ import annotations

import ast
import inspect
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
# every folder of kernels/ that is a package; simd/ holds C++ for all of them
OPS = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/__init__.py"))
NEEDED = ("__init__.py", "reference.py", "bench.py", "cpu.cpp")
# what runs on a GPU: kernels of ours, the library that does it already, or plain torch where that is enough
GPU_FILES = {"triton": "triton.py", "gsplat": "gpu.py", "reference": "reference.py"}
HEAVY = ("scipy", "mlflow", "matplotlib", "pandas", "skimage", "triton", "torch._dynamo", "kernels._native")


@pytest.fixture(params=OPS)
def op(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def module(op: str) -> ModuleType:
    return import_module(f"kernels.{op}")


def test_the_ops_are_found() -> None:
    assert "ct" in OPS


def test_the_room_is_complete(op: str) -> None:
    missing = [name for name in NEEDED if not (ROOT / "kernels" / op / name).is_file()]
    assert not missing, f"kernels/{op} lacks {missing}; see the list of files in its neighbours"


def test_the_dispatch_table_knows_it(op: str) -> None:
    import torch

    from kernels import _dispatch

    assert op in _dispatch.TABLE, f"add {op!r} to kernels._dispatch.TABLE"
    rows = _dispatch.TABLE[op]
    assert set(rows.values()) <= {*_dispatch.BACKENDS, *GPU_FILES}
    assert rows[("cpu", torch.float32)] == _dispatch.CPU
    assert (ROOT / "kernels" / op / GPU_FILES[rows[("cuda", torch.float32)]]).is_file()


def test_everything_public_is_documented(module: ModuleType) -> None:
    assert module.__doc__, f"{module.__name__} has no docstring"
    names = module.__all__
    assert list(names) == sorted(names), "__all__ is not in order"
    for name in names:
        thing = getattr(module, name)
        assert inspect.getdoc(thing), f"{module.__name__}.{name} has no docstring"
    functions = [getattr(module, n) for n in names if inspect.isfunction(getattr(module, n))]
    assert functions, f"{module.__name__} exports no function"
    for function in functions:
        text = inspect.getdoc(function) or ""
        for word in ("Returns", "Raises"):
            assert word in text, f"{module.__name__}.{function.__name__} does not say what it {word.lower()}"


def test_the_reference_has_the_public_functions_in_plain_torch(op: str) -> None:
    reference = import_module(f"kernels.{op}.reference")
    assert reference.__doc__ and reference.__all__
    public = set(import_module(f"kernels.{op}").__all__)
    assert set(reference.__all__) <= public, "the reference's functions carry the names of those they specify"
    tree = ast.parse(inspect.getsource(reference))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    }
    assert imported <= {"__future__", "torch", "numpy", "kernels", *sys.stdlib_module_names}
    assert "_native" not in inspect.getsource(reference), "a reference that calls the kernel specifies nothing"


def test_an_unknown_backend_is_an_error(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from kernels import _dispatch

    monkeypatch.setenv("KERNELS_BACKEND", "nonsense")
    with pytest.raises(ValueError, match=r"KERNELS_BACKEND is 'nonsense'; expected one of reference, cpu, triton; did"):
        _dispatch.backend_for(torch.device("cpu"), torch.float32, op)
    sources = [path.read_text() for path in (ROOT / "kernels" / op).glob("*.py")]
    assert any("backend_for(" in source for source in sources), f"kernels.{op} does not ask the table"


def loaded_by(modules: list[str]) -> dict:
    """What a fresh Python has loaded after importing these, beyond what torch alone loads, and whether CUDA started."""
    code = (
        "import sys, json, torch\nbefore = set(sys.modules)\n"
        + "".join(f"import {name}\n" for name in modules)
        + "print(json.dumps({'new': sorted(set(sys.modules) - before), 'cuda': torch.cuda.is_initialized()}))"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def heavy(names: list[str]) -> list[str]:
    return [name for name in names if any(name == module or name.startswith(f"{module}.") for module in HEAVY)]


def test_importing_is_light() -> None:
    found = loaded_by(["kernels", *(f"kernels.{op}" for op in OPS)])
    assert not heavy(found["new"]), "import these where they are used"
    assert not found["cuda"], "an import starts CUDA"


def test_the_check_of_imports_bites() -> None:
    assert "scipy" in heavy(loaded_by(["scipy"])["new"])
