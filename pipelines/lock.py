"""Compile `requirements.lock` and the two lists that let a user leave a part of it out (`make lock`).

`requirements.lock` pins the whole stack with hashes and names no index. `locks/nerfstudio.txt` and `locks/peers.txt`
name the packages that only that extra brings; `uv pip install --excludes` reads them, so that a lean installation uses
the very same pins.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"
OPTIONAL = ("nerfstudio", "peers")


def compile_lock(extras: list[str], out: Path, *options: str) -> str:
    """The lock for the project with these extras, for every platform and supported Python; written to `out`."""
    command = ["uv", "pip", "compile", "-q", "pyproject.toml", "-o", str(out), "--universal", "--no-header"]
    command += ["--fork-strategy", "fewest", "--no-emit-index-url", "--no-emit-find-links"]
    # a release a week old is on every mirror, and a bad one has been withdrawn by then
    command += ["--exclude-newer", "7 days", *options]
    command += [word for extra in extras for word in ("--extra", extra)]
    subprocess.run(command, cwd=ROOT, check=True)
    return out.read_text()


def pinned(lock: str) -> set[str]:
    """Names of the packages that a lock pins."""
    return set(re.findall(r"^([A-Za-z0-9._-]+)==", lock, flags=re.MULTILINE))


def main() -> None:
    extras = sorted(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    upgrade = sys.argv[1:]  # for instance --upgrade, or --upgrade-package torch
    lock = compile_lock(extras, LOCK, "--generate-hashes", *upgrade)
    for extra in OPTIONAL:
        with TemporaryDirectory() as folder:
            rest = [e for e in extras if e != extra]
            without = compile_lock(rest, Path(folder, "lock.txt"), "--no-annotate", "-c", str(LOCK))
        only = sorted(pinned(lock) - pinned(without))
        head = f"# Packages that only the extra '{extra}' brings; written by `make lock`.\n"
        (ROOT / "locks" / f"{extra}.txt").write_text(head + "".join(f"{name}\n" for name in only))
        print(f"locks/{extra}.txt: {len(only)} packages")
    print(f"requirements.lock: {len(pinned(lock))} packages")


if __name__ == "__main__":
    main()
