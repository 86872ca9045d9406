"""Where a packed weight is faster than a dense one: a table of measured ratios, and `linear`'s fallback by it.

The table that comes along (`crossover.json`) was measured by `autotune` on one machine for each instruction set it has;
`autotune` measures this machine and keeps its own table, which then goes first. A table is read once, so that a program
takes the same path every time.
"""

from __future__ import annotations

import functools
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from kernels import info

PATTERNS = ((2, 4), (1, 4), (2, 8), (1, 8), (1, 16), (1, 32))
TOKENS = (1, 4, 16, 64, 256)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ENOUGH_S = 0.05  # of a measurement, after the warm-up
SHIPPED = Path(__file__).with_name("crossover.json")

Table = dict[str, dict[str, dict[str, list[float]]]]  # isa: dtype: "n:m": ratios at TOKENS


def speedup(n: int, m: int, tokens: int, dtype: torch.dtype = torch.float32) -> float | None:
    """Measured time of torch's dense linear of `dtype` over that of the packed one, on one thread of a CPU.

    n, m, dtype of the weight; tokens: rows of the input, >= 1. Between the measured numbers of tokens the smaller of
    both neighbours counts; a pattern that was not measured is taken for the next denser one that was.

    Returns None where nothing is known: another instruction set than the table's, or another dtype. `autotune` helps.
    Raises ValueError where tokens is below 1.
    """
    if tokens < 1:
        raise ValueError(f"kernels.nm.speedup: got {tokens} tokens; expected 1 or more")
    rows = _table().get(_isa(os.environ.get("KERNELS_ISA")), {}).get(str(dtype).removeprefix("torch."), {})
    denser = [(kept / of, f"{kept}:{of}") for kept, of in PATTERNS if kept / of >= n / m and f"{kept}:{of}" in rows]
    exact = f"{n}:{m}"
    if exact not in rows and not denser:
        return 0.0 if rows else None  # denser than all that was measured: no gain is known
    ratios = rows[exact if exact in rows else min(denser)[1]]
    above = next((i for i, count in enumerate(TOKENS) if count >= tokens), len(TOKENS) - 1)
    below = above if TOKENS[above] <= tokens else above - 1
    return min(ratios[below], ratios[above])


def autotune(path: Path | str | None = None, *, size: int = 2048, quick: bool = False) -> Path:
    """Measure packed against dense products of a size x size weight on this machine and keep the table.

    path   where; by default the file that `speedup` and `linear` read before the table that comes along
    quick  one repetition: shows that it works

    Returns the file. Takes half a minute; run it on an idle machine. Raises OSError where it cannot be written.
    """
    path = Path(path) if path else machine_file()
    rows: dict[str, dict[str, list[float]]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, dtype in DTYPES.items():
            rows[name] = {f"{n}:{m}": [_ratio(n, m, t, dtype, size, quick) for t in TOKENS] for n, m in PATTERNS}
    finally:
        torch.set_num_threads(threads)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = (_read(path) or {}) | {_isa(os.environ.get("KERNELS_ISA")): rows}
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(table, indent=1) + "\n")
    partial.replace(path)
    _table.cache_clear()
    return path


def machine_file() -> Path:
    """The table of this machine: NM_CROSSOVER if set, else in the user's cache folder."""
    named = os.environ.get("NM_CROSSOVER")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named).expanduser() if named else cache / "resparse" / "nm_crossover.json"


def dense_is_faster(n: int, m: int, tokens: int, dtype: torch.dtype) -> bool:
    """Whether the table says so; the first time for a pattern it is said aloud."""
    ratio = speedup(n, m, max(1, tokens), dtype)
    if ratio is None or ratio >= 1:
        return False
    _say(n, m, str(dtype))
    return True


@functools.cache
def _say(n: int, m: int, dtype: str) -> None:
    warnings.warn(
        f"kernels.nm.linear: on this machine a dense {dtype} product is faster than {n}:{m} at some numbers of tokens; "
        "it runs dense there, on the same weight. Measure anew with kernels.nm.autotune(), or pass dense=False",
        stacklevel=4,
    )


@functools.cache
def _isa(_asked: str | None) -> str:
    return str(info()["isa"])


@functools.cache
def _table() -> Table:
    return (_read(SHIPPED) or {}) | (_read(machine_file()) or {})


def _read(path: Path) -> Table | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        raise ValueError(
            f"kernels.nm: {path} is no table of crossovers; remove it, or run kernels.nm.autotune()"
        ) from None


def _ratio(n: int, m: int, tokens: int, dtype: torch.dtype, size: int, quick: bool) -> float:
    from kernels import nm

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator).to(dtype)
    x = torch.randn(tokens, size, generator=generator).to(dtype)
    packed = nm.pack(weight, n, m)
    ours, dense = _seconds(
        [lambda: nm.linear(x, packed, dense=False), lambda: torch.nn.functional.linear(x, weight)], quick
    )
    return round(dense / ours, 3)


def _seconds(runs: Iterable[Callable[[], Tensor]], quick: bool) -> list[float]:
    """The shortest time of each, measured in turn; the shortest because others only ever add to it."""
    runs = list(runs)
    best = [float("inf")] * len(runs)
    start = time.perf_counter()
    for run in runs:
        run()
    while True:
        for i, run in enumerate(runs):
            before = time.perf_counter()
            run()
            best[i] = min(best[i], time.perf_counter() - before)
        if quick or time.perf_counter() - start > len(runs) * ENOUGH_S:
            return best
