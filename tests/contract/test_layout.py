"""The house keeps its order: what may import what, what a bare machine can import, and what a file may hold."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ("kernels", "common", "papers", "pipelines")  # each may import those before it and itself
LARGEST_PYTHON_FILE = 20 * 1024


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Every (line, dotted name) that the source imports, at its top or inside a function.

    `from a.b import c` gives `a.b.c`: a rule about modules has to look at prefixes.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "."  # relative: stays inside the package
            else:
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def upward(layer: str, source: str) -> list[tuple[int, str]]:
    above = LAYERS[LAYERS.index(layer) + 1 :]
    return [(line, name) for line, name in imports(source) if name.split(".")[0] in (*above, "tests")]


def importers(package: str, *folders: str) -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for path in python_files(*folders)
        if any(name.split(".")[0] == package for _, name in imports(path.read_text()))
    }


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_run_one_way(layer: str) -> None:
    found = [
        f"{p.relative_to(ROOT)}:{line}: {name}"
        for p in python_files(layer)
        for line, name in upward(layer, p.read_text())
    ]
    assert not found, f"kernels <- common <- papers <- pipelines; these run against it: {found}"


def test_the_import_rule_bites() -> None:
    inside = "def f():\n    from common import params\n"
    assert upward("kernels", inside) == [(2, "common.params")]
    assert upward("common", inside) == []
    assert upward("common", "import papers.gloredi.method") == [(1, "papers.gloredi.method")]


def test_no_paper_imports_another() -> None:
    for path in python_files("papers"):
        own = path.relative_to(ROOT).parts[1]
        others = [name for _, name in imports(path.read_text()) if re.match(rf"papers\.(?!{own}(\.|$))", name)]
        assert not others, f"{path.relative_to(ROOT)} imports {others}; what two papers share belongs in common/"


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("mlflow", r"common/tracking\.py"),
        ("nerfstudio", r"pipelines/nerfstudio_method\.py"),
        ("diffusers", r"common/(models/.*|attention/dispatcher\.py)"),
    ],
)
def test_a_package_stays_in_its_place(package: str, allowed: str) -> None:
    found = {path for path in importers(package, *LAYERS) if not re.fullmatch(allowed, path)}
    assert not found, f"only {allowed} may import {package}, not {sorted(found)}"


def test_kernels_need_torch_and_numpy_alone() -> None:
    # bench.py times the peers beside ours; gpu.py asks a library that serves CUDA, if it is there
    others = {path for path in python_files("kernels") if path.name in ("bench.py", "gpu.py")}
    allowed = {"torch", "numpy", "triton", "kernels", "", *sys.stdlib_module_names}
    for path in set(python_files("kernels")) - others:
        other = [f"{line}: {name}" for line, name in imports(path.read_text()) if name.split(".")[0] not in allowed]
        assert not other, f"{path.relative_to(ROOT)} imports {other}"


def test_tests_have_unique_names_and_no_packages() -> None:
    files = python_files("tests")
    assert not [path for path in files if path.name == "__init__.py"]
    names = [path.name for path in files]
    assert not {name for name in names if names.count(name) > 1}


def test_no_python_file_is_too_large() -> None:
    sizes = {p.relative_to(ROOT).as_posix(): p.stat().st_size for p in python_files(*LAYERS, "tests")}
    large = {name: size for name, size in sizes.items() if size > LARGEST_PYTHON_FILE}
    assert not large, f"more than {LARGEST_PYTHON_FILE} bytes; split by what a reader looks for: {large}"


def test_no_tracked_file_holds_a_path_of_somebodys_machine() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    pattern = re.compile(
        rf"(?<![\w.])(?:/(?:work|home|root|Users)/\w|[A-Z]:\\\\?Users)|{re.escape(str(ROOT))}(?![\w-])"
    )
    found = []
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.is_file() and path.suffix not in {".png", ".lock"} and path != Path(__file__).resolve():
            text = path.read_bytes().decode("utf-8", errors="replace")
            found += [f"{name}: {match[0]}" for match in pattern.finditer(text)]
    assert not found, f"{found[:10]}; write paths relative to the root (common.paths.relative)"


def bare_packages() -> set[str]:
    """Distributions of a machine with torch, triton and numpy: these and what they require."""
    known: set[str] = set()
    waiting = ["torch", "numpy", "triton"]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in known:
            continue
        known.add(name)
        try:
            needs = metadata.distribution(name).requires or []
        except metadata.PackageNotFoundError:
            continue
        waiting += [
            need.name for need in map(Requirement, needs) if not need.marker or need.marker.evaluate({"extra": ""})
        ]
    return known


def blocked_modules() -> list[str]:
    """Top-level modules installed here that a bare machine lacks."""
    bare = bare_packages() | {"resparse"}
    installed = metadata.packages_distributions()
    return sorted(module for module, owners in installed.items() if not bare & {canonicalize_name(o) for o in owners})


BARE_IMPORT = """
import importlib, json, sys
blocked = set(json.loads(sys.argv[1]))
class Bare:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r} on a bare machine", name=name)
sys.meta_path.insert(0, Bare())
import torch
faults = {}
for name in json.loads(sys.argv[2]):
    try:
        importlib.import_module(name)
    except Exception as error:
        faults[name] = f"{type(error).__name__}: {error}"
print(json.dumps({"faults": faults, "cuda": torch.cuda.is_initialized()}))
"""


def import_bare(modules: list[str]) -> dict:
    command = [sys.executable, "-W", "ignore", "-c", BARE_IMPORT, json.dumps(blocked_modules()), json.dumps(modules)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_common_and_kernels_import_on_a_bare_machine() -> None:
    # `make gpu-check` runs where there is torch and Triton and nothing else
    modules = [*(module_name(path) for path in python_files("kernels", "common")), "pipelines.gpu_check"]
    assert {"mlflow", "scipy", "yaml", "ruamel", "matplotlib"} <= set(blocked_modules()), "the blocker lets through"
    result = import_bare(modules)
    assert not result["faults"], f"import these packages where they are used: {result['faults']}"
    assert not result["cuda"], "an import starts CUDA"
