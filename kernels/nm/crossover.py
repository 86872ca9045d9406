"""Where a packed weight is faster than a dense one: a table of measured ratios, and `linear`'s fallback by it.

A weight is taken for the measured one whose number of entries is nearest, in logarithm: in a small one the call takes
longer than the product, and a large one does not fit into the caches.

The table that comes along (`crossover.json`) was measured by `autotune` on one machine for each instruction set it has;
`autotune` measures this machine and keeps its own table, which then goes first. A table is read once, so that a program
takes the same path every time.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import info
from kernels.nm.tensor import NMTensor, pattern

PATTERNS = tuple((n, m, 1) for n, m in ((2, 4), (1, 4), (2, 8), (1, 8), (1, 16), (1, 32))) + tuple(
    (n, m, 32) for n, m in ((2, 4), (2, 8), (1, 8))
)  # n, m, vector
TOKENS = (1, 4, 16, 64, 256)
SIZES = (256, 512, 1024, 2048, 4096)  # rows and columns of a measured weight
UNSIZED = 2048  # of the tables of before there were sizes
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ENOUGH_S = 0.05  # of a measurement, after the warm-up
SHIPPED = Path(__file__).with_name("crossover.json")

# isa: dtype: pattern, as NMTensor names it: rows and columns of the weight: ratios at TOKENS
Table = dict[str, dict[str, dict[str, dict[str, list[float]]]]]


def speedup(
    n: int,
    m: int,
    tokens: int,
    dtype: torch.dtype = torch.float32,
    *,
    shape: tuple[int, int] = (2048, 2048),
    vector: int = 1,
) -> float | None:
    """Measured time of torch's dense linear of `dtype` over that of the packed one, on one thread of a CPU.

    n, m, dtype, shape (O, K) and vector of the weight; tokens: rows of the input, >= 1. Between the measured numbers of
    tokens the smaller of both neighbours counts; a pattern that was not measured is taken for the next denser one that
    was, a size and a vector for the nearest.

    Returns None where nothing is known: another instruction set than the table's, another dtype, or less than a quarter
    of the entries of the smallest weight that was measured (`linear` goes by that one even then). `autotune` helps.
    Raises ValueError where tokens is below 1, or the shape holds nothing.
    """
    if tokens < 1 or min(shape) < 1:
        raise ValueError(
            f"kernels.nm.speedup: got {tokens} tokens and a weight of {list(shape)}; expected 1 or more of each"
        )
    sizes = _sizes(n, m, vector, dtype)
    if sizes and _side(shape) < min(sizes) / 2:
        return None
    return _nearest(sizes, shape, tokens)


def autotune(path: Path | str | None = None, *, sizes: Sequence[int] = SIZES, quick: bool = False) -> Path:
    """Measure packed against dense products on this machine and keep the table.

    path   where; by default the file that `speedup` and `linear` read before the table that comes along
    sizes  rows and columns of the weights
    quick  one repetition: shows that it works

    Returns the file. Takes two minutes; run it on an idle machine. Raises OSError where it cannot be written.
    """
    path = Path(path) if path else machine_file()
    rows: dict[str, dict[str, dict[str, list[float]]]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, dtype in DTYPES.items():
            rows[name] = {
                pattern(*kind): {str(size): _ratios(*kind, dtype, size, quick) for size in sizes} for kind in PATTERNS
            }
    finally:
        torch.set_num_threads(threads)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = (_read(path) or {}) | {_isa(os.environ.get("KERNELS_ISA")): rows}
    unfinished = path.with_suffix(".part")
    in_lines = re.sub(r"\s*\n\s*(?=[\d.\]])", " ", json.dumps(table, indent=1))  # the numbers of a size in one
    unfinished.write_text(in_lines + "\n")
    unfinished.replace(path)
    _table.cache_clear()
    return path


def machine_file() -> Path:
    """The table of this machine: NM_CROSSOVER if set, else in the user's cache folder."""
    named = os.environ.get("NM_CROSSOVER")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named).expanduser() if named else cache / "resparse" / "nm_crossover.json"


def dense_is_faster(packed: NMTensor, tokens: int) -> bool:
    """Whether the table says so; the first time for a pattern it is said aloud."""
    sizes = _sizes(packed.n, packed.m, packed.vector, packed.dtype)
    ratio = _nearest(sizes, packed.shape, max(1, tokens))
    if ratio is None or ratio >= 1:
        return False
    _say(packed.pattern, str(packed.dtype))
    return True


def _sizes(n: int, m: int, vector: int, dtype: torch.dtype) -> dict[int, list[float]] | None:
    """The ratios by size of the weight that are known of a pattern, or of the one it is taken for; none at all where it
    is denser than all that was measured, so that no gain is known, and None where nothing was."""
    rows = _table().get(_isa(os.environ.get("KERNELS_ISA")), {}).get(str(dtype).removeprefix("torch."), {})
    known = {kind: rows[pattern(*kind)] for kind in PATTERNS if pattern(*kind) in rows}
    alike = [kind for kind in known if (kind[2] > 1) == (vector > 1)]
    if not alike:
        return None
    near = min((kind[2] for kind in alike), key=lambda measured: abs(math.log(measured / vector)))
    denser = [kind for kind in alike if kind[2] == near and kind[0] / kind[1] >= n / m]
    if (n, m, near) not in known and not denser:
        return {}
    taken = (n, m, near) if (n, m, near) in known else min(denser, key=lambda kind: kind[0] / kind[1])
    return {int(size): ratios for size, ratios in known[taken].items()}


def _nearest(sizes: dict[int, list[float]] | None, shape: tuple[int, int], tokens: int) -> float | None:
    """The ratio at the nearest size, of `_sizes`."""
    if not sizes:
        return None if sizes is None else 0.0
    ratios = sizes[min(sizes, key=lambda size: abs(math.log(size / _side(shape))))]
    above = next((i for i, count in enumerate(TOKENS) if count >= tokens), len(TOKENS) - 1)
    below = above if TOKENS[above] <= tokens else above - 1
    return min(ratios[below], ratios[above])


def _side(shape: tuple[int, int]) -> float:
    """Of the square weight with so many entries."""
    return math.sqrt(shape[0] * shape[1])


@functools.cache
def _say(name: str, dtype: str) -> None:
    warnings.warn(
        f"kernels.nm.linear: on this machine a dense {dtype} product is faster than {name} at some sizes of the weight "
        "and numbers of tokens; it runs dense there, on the same weight. Measure anew with kernels.nm.autotune(), or "
        "pass dense=False",
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
        found = json.loads(path.read_text())
        return {isa: {dtype: _sized(rows) for dtype, rows in kinds.items()} for isa, kinds in found.items()}
    except FileNotFoundError:
        return None
    except (AttributeError, ValueError):
        raise ValueError(
            f"kernels.nm: {path} is no table of crossovers; remove it, or run kernels.nm.autotune()"
        ) from None


def _sized(rows: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Ratios by pattern and size, also where the table is from before there were sizes."""
    return {name: found if isinstance(found, dict) else {str(UNSIZED): found} for name, found in rows.items()}


def _ratios(n: int, m: int, vector: int, dtype: torch.dtype, size: int, quick: bool) -> list[float]:
    from kernels import nm

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator).to(dtype)
    packed, ratios = nm.pack(weight, n, m, vector=vector), []
    for tokens in TOKENS:
        x = torch.randn(tokens, size, generator=generator).to(dtype)
        ours, dense = _seconds(
            [partial(nm.linear, x, packed, dense=False), partial(torch.nn.functional.linear, x, weight)], quick
        )
        ratios.append(round(dense / ours, 3))
    return ratios


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
