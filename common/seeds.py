"""Randomness: explicit generators first, the global ones for libraries that know nothing better.

A result is the same from run to run for a given seed, thread count and machine. Across machines and thread counts sums
are added up in another order; that difference belongs to the noise that seeds measure.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import Iterator

import numpy as np
import torch


def everything(seed: int, *, deterministic: bool = True) -> torch.Generator:
    """Seed `random`, NumPy's legacy state and torch on every device; return a CPU generator of its own with that seed.

    deterministic: ask torch for deterministic algorithms (a warning, not an error, where an operation has none), for
        cuDNN without its timing search, and for the cuBLAS workspace this needs.

    Raises ValueError for a seed outside [0, 2**32).
    """
    _check(seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first cuBLAS handle is made
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    return torch.Generator().manual_seed(seed)


def generator(seed: int, *labels: str | int, device: str | torch.device = "cpu") -> torch.Generator:
    """An independent stream for one purpose: `generator(seed, "noise", view)`.

    Streams of the same seed with different labels share nothing, so drawing more of one does not move another. Arms of
    a comparison that use the same labels draw the same numbers.
    """
    return torch.Generator(device=device).manual_seed(derived(seed, *labels))


def derived(seed: int, *labels: str | int) -> int:
    """The seed in [0, 2**32) of the stream `labels`, for libraries that take an integer."""
    _check(seed)
    text = "/".join([str(int(seed)), *(f"{type(label).__name__}:{label}" for label in labels)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread: the same bits on any number of cores.

    Many small operations also end sooner: waking a second thread for each costs more than it brings, above all on a
    busy host, where it can take ten times as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def isolated(label: str) -> Iterator[None]:
    """Inside, the global generators start from a state of their own, derived from `label`; after it, all is as before.

    Work done inside neither sees nor moves what happens outside, so leaving it out changes nothing else.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        start = derived(0, "isolated", label)
        random.seed(start)
        np.random.seed(start)
        torch.manual_seed(start)
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def _check(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise TypeError(f"seed is {seed!r} ({type(seed).__name__}); expected an int, for example params.seeds[0]")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}; expected 0 <= seed < 2**32, which NumPy can hold")
