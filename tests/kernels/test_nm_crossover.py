"""Where packed products pay: the table of measured ratios, and `linear`'s fallback by it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nm_tables import made, packed_always  # noqa: F401  (a fixture of every test)

from kernels import info, nm
from kernels.nm import crossover


def table(path: Path, ratios: list[float]) -> None:
    path.write_text(json.dumps({info()["isa"]: {"float32": {"2:4": ratios, "1:8": [2 * r for r in ratios]}}}))
    crossover._table.cache_clear()


def test_speedup_reads_the_table(tmp_path: Path) -> None:
    assert nm.speedup(2, 4, 1) is None
    table(tmp_path / "table.json", [1.5, 2.0, 0.5, 1.2, 1.4])
    assert [nm.speedup(2, 4, tokens) for tokens in (1, 2, 4, 9, 16, 64, 1000)] == [1.5, 1.5, 2.0, 0.5, 0.5, 1.2, 1.4]
    assert nm.speedup(1, 8, 1) == 3.0
    assert nm.speedup(1, 4, 1) == 1.5  # not measured: as the next denser pattern
    assert nm.speedup(3, 4, 1) == 0.0  # denser than all that was measured
    assert nm.speedup(2, 4, 1, torch.bfloat16) is None
    with pytest.raises(ValueError, match=r"got 0 tokens and a weight of \[2048, 2048\]"):
        nm.speedup(2, 4, 0)
    with pytest.raises(ValueError, match=r"a weight of \[0, 8\]"):
        nm.speedup(2, 4, 1, shape=(0, 8))
    for broken in ("{", "[1]", '{"avx2": 1}'):
        (tmp_path / "table.json").write_text(broken)
        crossover._table.cache_clear()
        with pytest.raises(ValueError, match="is no table of crossovers"):
            nm.speedup(2, 4, 1)


def sized_table(path: Path) -> None:
    sizes = {"256": [0.25] * 5, "1024": [0.9, 1.1, 2.0, 2.0, 2.0], "4096": [3.0] * 5}
    vectors = {"2:8x32": {"1024": [0.5] * 5, "4096": [4.0] * 5}}
    path.write_text(json.dumps({info()["isa"]: {"float32": {"2:8": sizes} | vectors}}))
    crossover._table.cache_clear()


def test_speedup_goes_by_the_nearest_size_and_vector(tmp_path: Path) -> None:
    sized_table(tmp_path / "table.json")
    shapes = [(256, 256), (64, 2048), (128, 128), (512, 600), (1024, 1024), (2000, 2000), (2100, 2100), (9000, 9000)]
    assert [nm.speedup(2, 8, 1, shape=shape) for shape in shapes] == [0.25, 0.25, 0.25, 0.9, 0.9, 0.9, 3.0, 3.0]
    assert nm.speedup(2, 8, 1, shape=(127, 127)) is None  # less than a quarter of what was measured
    assert nm.speedup(2, 8, 8, shape=(1024, 1024)) == 1.1
    assert [nm.speedup(1, 8, 1, shape=(4096, 4096), vector=vector) for vector in (1, 16, 256)] == [3.0, 4.0, 4.0]
    assert nm.speedup(2, 4, 1, vector=32) == 0.0  # denser than all vectors that were measured
    table(tmp_path / "table.json", [1.5, 2.0, 0.5, 1.2, 1.4])  # of before there were sizes: of 2048 x 2048
    assert nm.speedup(2, 4, 1, shape=(1024, 1024)) == nm.speedup(2, 4, 1, shape=(8192, 8192)) == 1.5
    assert nm.speedup(2, 4, 1, shape=(512, 512)) is None and nm.speedup(2, 4, 1, vector=32) is None


def test_small_weights_run_dense_where_large_ones_run_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sized_table(tmp_path / "table.json")
    taken = []
    monkeypatch.setattr(crossover, "dense_is_faster", asked(taken))
    draw = torch.Generator().manual_seed(0)
    small, wide, shared = (
        nm.pack(torch.randn(rows, columns, generator=draw), 2, 8, vector=vector)
        for rows, columns, vector in ((16, 16, 1), (16384, 512, 1), (16, 16, 32))
    )
    for packed in (small, wide, shared):
        x = torch.randn(1, packed.shape[1], generator=draw)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            y = nm.linear(x, packed)
        exact = x.double() @ packed.to_dense().double().T
        assert torch.allclose(y.double(), exact, atol=1e-4)  # float32 sums of 128 terms
        assert len(said) == (packed is not wide)
        assert taken.pop() == (packed is not wide)
        assert not said or f"is faster than {packed.pattern} at some sizes of the weight" in str(said[0].message)


def test_linear_runs_dense_where_that_is_faster_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table(tmp_path / "table.json", [2.0, 2.0, 0.5, 2.0, 2.0])
    weight, bias, x, _ = made(24, 4, 2, 4, 16)
    packed = nm.pack(weight, 2, 4)
    taken = []
    monkeypatch.setattr(crossover, "dense_is_faster", asked(taken))
    with pytest.warns(UserWarning, match="a dense torch.float32 product is faster than 2:4"):
        y = nm.linear(x, packed, bias)
    assert torch.equal(y, torch.nn.functional.linear(x, weight, bias)) and taken == [True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nm.linear(x, packed, bias)  # said once
        nm.linear(x, packed, bias, dense=False)
        assert taken == [True, True]
        nm.linear(x[:1], packed, bias)
    assert taken == [True, True, False]


def asked(answers: list[bool]) -> Callable[[nm.NMTensor, int], bool]:
    """`dense_is_faster`, which notes what it said."""
    ask = crossover.dense_is_faster
    return lambda packed, tokens: answers.append(ask(packed, tokens)) or answers[-1]


def test_gradients_are_the_same_where_it_runs_dense() -> None:
    weight, bias, x, dy = made(24, 4, 2, 8, 9)
    found = []
    for dense in (False, True):
        leaf, packed = x.clone().requires_grad_(), nm.pack(weight, 2, 8)
        packed.values.requires_grad_()
        nm.linear(leaf, packed, bias, dense=dense).backward(dy)
        found.append((leaf.grad, packed.values.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_autotune_keeps_a_table_for_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    old = {"2:4": [1.0] * 5}
    path.write_text(json.dumps({"another": {"float32": old}}))  # what is known of other instruction sets stays
    assert nm.autotune(sizes=(64, 128), quick=True) == path
    tables = json.loads(path.read_text())
    assert tables["another"]["float32"] == {"2:4": {"2048": [1.0] * 5}}
    found = tables[info()["isa"]]
    assert set(found) == {"float32", "bfloat16"}
    assert set(found["float32"]) == {"2:4", "1:4", "2:8", "1:8", "1:16", "1:32", "2:4x32", "2:8x32", "1:8x32"}
    for sizes in found["float32"].values():
        assert set(sizes) == {"64", "128"}
        assert all(len(ratios) == len(crossover.TOKENS) and min(ratios) > 0 for ratios in sizes.values())
    assert nm.speedup(2, 4, 1, shape=(64, 64)) == found["float32"]["2:4"]["64"][0]
    assert nm.speedup(2, 4, 1, shape=(100, 128), vector=64) == found["float32"]["2:4x32"]["128"][0]
