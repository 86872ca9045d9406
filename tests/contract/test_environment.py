"""`pyproject.toml`, the lock, `locks/` and `environment.yml` describe one environment, and it is this one."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import Environment, default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = sorted(ROOT.glob("requirements*.lock"))
PYTHONS = ("3.11", "3.12", "3.13")


@dataclass(frozen=True)
class Pin:
    requirement: Requirement
    hashes: int

    @property
    def name(self) -> str:
        return canonicalize_name(self.requirement.name)

    @property
    def version(self) -> str:
        return next(iter(self.requirement.specifier)).version

    def applies(self, environment: Environment) -> bool:
        return applies(self.requirement, environment)


def read_lock(path: Path) -> list[Pin]:
    """Every logical line of a lock (a requirement continued over its hashes) as a pin."""
    text = re.sub(r"\\\n", " ", path.read_text())
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    return [Pin(Requirement(line.split("--hash")[0].strip()), line.count("--hash=sha256:")) for line in lines]


def environment(python: str) -> Environment:
    """Markers of a 64-bit Linux machine with this Python: where the project is supported."""
    here = default_environment()
    here.update(python_version=python, python_full_version=f"{python}.9", implementation_version=f"{python}.9")
    return here


def applies(requirement: Requirement, environment: Environment, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate({**environment, "extra": extra})


def wanted() -> Iterator[tuple[str, Requirement]]:
    """Direct dependencies with where they are asked for."""
    for text in PROJECT["dependencies"]:
        yield "dependencies", Requirement(text)
    for extra, texts in PROJECT["optional-dependencies"].items():
        for text in texts:
            yield extra, Requirement(text)


LOCKED = read_lock(ROOT / "requirements.lock")


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_every_line_of_a_lock_is_pinned_and_hashed(path: Path) -> None:
    pins = read_lock(path)
    assert pins
    loose = [str(pin.requirement) for pin in pins if [s.operator for s in pin.requirement.specifier] != ["=="]]
    assert not loose, f"{path.name} does not pin {loose}; run make lock"
    bare = [pin.name for pin in pins if not pin.hashes]
    assert not bare, f"{path.name} has no hash for {bare}; run make lock"


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_locks_name_no_index_and_no_address(path: Path) -> None:
    found = re.findall(
        r"^.*(?:://|--(?:extra-)?index-url|--find-links|--trusted-host).*$", path.read_text(), re.MULTILINE
    )
    assert not found, f"{path.name} names where packages come from: {found[:3]}; run make lock"


def test_every_lock_is_a_view_of_the_one_lock() -> None:
    whole = {(pin.name, pin.version) for pin in LOCKED}
    assert ROOT / "requirements.lock" in LOCKS
    assert all({(pin.name, pin.version) for pin in read_lock(path)} <= whole for path in LOCKS)


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_answers_every_direct_dependency_and_extra(python: str) -> None:
    """What `uv pip compile` would find satisfied, checked without an index."""
    here = environment(python)
    for where, requirement in wanted():
        if not applies(requirement, here):
            continue
        pins = [p for p in LOCKED if p.name == canonicalize_name(requirement.name) and p.applies(here)]
        assert len(pins) == 1, f"{requirement} ({where}) has {len(pins)} pins for Python {python}; run make lock"
        assert requirement.specifier.contains(pins[0].version, prereleases=True), (
            f"pyproject.toml asks for {requirement} ({where}), the lock pins {pins[0].version}; run make lock"
        )


def test_the_lock_is_closed_under_what_installed_packages_require() -> None:
    """Every requirement of every installed locked package is answered by the lock, here and now."""
    here = environment(f"{default_environment()['python_version']}")
    pins = {pin.name: pin for pin in LOCKED if pin.applies(here)}
    faults = []
    for distribution in metadata.distributions():
        if canonicalize_name(distribution.metadata["Name"]) not in pins:
            continue
        for text in distribution.requires or []:
            need = Requirement(text)
            if not applies(need, default_environment()):
                continue
            pin = pins.get(canonicalize_name(need.name))
            if pin is None or not need.specifier.contains(pin.version, prereleases=True):
                faults.append(f"{distribution.metadata['Name']} needs {need}, got {pin and pin.version}")
    assert not faults, "\n".join(faults)


def test_installed_versions_are_the_locked_ones() -> None:
    here = default_environment()
    pins = {pin.name: pin.version for pin in LOCKED if pin.applies(here)}
    installed = {canonicalize_name(d.metadata["Name"]): d.version for d in metadata.distributions()}
    other = {
        name: (version, pins[name])
        for name, version in installed.items()
        if name in pins and not Requirement(f"x=={pins[name]}").specifier.contains(version, prereleases=True)
    }
    assert not other, f"installed, but not as locked (installed, locked): {other}; run make setup"
    assert "torch" in installed and "torch" in pins  # the comparison above is not about nothing


@pytest.mark.parametrize("path", sorted((ROOT / "locks").glob("*.txt")), ids=lambda path: path.stem)
def test_lists_of_optional_packages_hold_only_what_the_extra_brings(path: Path) -> None:
    names = {line for line in path.read_text().splitlines() if line and not line.startswith("#")}
    assert path.stem in PROJECT["optional-dependencies"], f"{path.name} belongs to no extra of pyproject.toml"
    assert names and names <= {pin.name for pin in LOCKED}, f"{path.name} names packages that are not in the lock"
    core = {canonicalize_name(need.name) for where, need in wanted() if where != path.stem}
    assert not names & core, f"{path.name} would leave out {names & core}, which the project needs; run make lock"


def test_conda_users_get_the_same_stack() -> None:
    from ruamel.yaml import YAML

    conda = YAML(typ="safe").load((ROOT / "environment.yml").read_text())
    pip = next(entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict))
    plain = [entry for entry in conda["dependencies"] if isinstance(entry, str)]
    assert pip == ["--require-hashes", "-r requirements.lock"], (
        "the Python packages come from the lock and nowhere else"
    )

    python = next(entry.split("=")[1] for entry in plain if entry.startswith("python="))
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(f"{python}.9")
    assert {"cxx-compiler", "make", "pip"} <= set(plain), "the kernels are built by pip with a C++ compiler"
    locked = {pin.name for pin in LOCKED}
    twice = {re.split("[=<>]", entry)[0] for entry in plain} & locked - {"pip"}
    assert not twice, f"environment.yml takes {twice} from conda although the lock pins them"


def test_supported_pythons_are_stated_the_same_everywhere() -> None:
    versions = Requirement(f"python{PROJECT['requires-python']}").specifier
    assert [v for v in ("3.10", *PYTHONS, "3.14") if versions.contains(f"{v}.0")] == list(PYTHONS)
    bootstrap = (ROOT / "pipelines" / "bootstrap.sh").read_text()
    assert "(3, 11) <= sys.version_info[:2] <= (3, 13)" in bootstrap, "bootstrap.sh accepts other Pythons"
