"""For tests of kernels.nm: weights with inputs, and a fixture: no table of crossovers but the test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.nm import crossover, reference


@pytest.fixture(autouse=True)
def packed_always(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No table but an empty one, so that it is the kernels that run; and the threads as they were."""
    monkeypatch.setenv("NM_CROSSOVER", str(tmp_path / "table.json"))
    monkeypatch.setattr(crossover, "SHIPPED", tmp_path / "none.json")
    crossover._table.cache_clear()
    crossover._say.cache_clear()
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    crossover._table.cache_clear()
    crossover._say.cache_clear()


def made(rows: int, groups: int, n: int, m: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight with zeros [O, K], bias, x [T, K], dy [T, O]."""
    generator = torch.Generator().manual_seed(seed)
    weight, bias, x, dy = (
        torch.randn(shape, generator=generator)
        for shape in ((rows, groups * m), (rows,), (tokens, groups * m), (tokens, rows))
    )
    return weight * reference.mask(weight, n, m), bias, x, dy
