"""Packed N:M products: against the dense product with zeros, on every instruction set, bit for bit on any threads."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import info, nm
from kernels._load import native
from kernels.bench import other_isas, with_isa
from kernels.nm import crossover, reference
from kernels.nm.tensor import from_groups, to_groups

ISAS = [info()["isa"], *other_isas(), "emulated512"]
TILED = [isa for isa in ISAS if isa == "amx"] + ["emulated_amx"]
PATTERNS = (
    (2, 4),
    (1, 4),
    (3, 4),
    (2, 8),
    (1, 8),
    (1, 16),
    (5, 16),
    (1, 32),
    (3, 24),
    (4, 64),
    (2, 3),
    (1, 1),
    (7, 256),
)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("KERNELS_ISA", request.param)
    return request.param


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


def close(found: Tensor, expected: Tensor, terms: int) -> None:
    """Within what float32 sums of that many terms of size 1 can differ by."""
    assert found.shape == expected.shape
    assert float((found.double() - expected).abs().max()) <= 4e-7 * terms + 1e-6 * math.sqrt(terms)


def all_products(
    weight: Tensor, bias: Tensor, x: Tensor, dy: Tensor, n: int, m: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, dx, the gradient of the kept values as a dense matrix, and that of the bias."""
    packed = nm.pack(weight, n, m, dtype=dtype)
    x, bias = x.clone().requires_grad_(), bias.clone().requires_grad_()
    packed.values.requires_grad_()
    y = nm.linear(x, packed, bias)
    y.backward(dy)
    assert packed.values.grad is not None and x.grad is not None and bias.grad is not None
    kept = nm.NMTensor(packed.values.grad, packed.places, packed.shape, n, m).to_dense()
    return y.detach(), x.grad, kept, bias.grad


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"{p[0]}:{p[1]}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_are_those_of_the_dense_weight(isa: str, pattern: tuple[int, int], dtype: torch.dtype) -> None:
    n, m = pattern
    for rows, tokens in ((1, 1), (16, 3), (21, 8), (33, 17), (40, 70)):
        weight, bias, x, dy = made(rows, 3, n, m, tokens)
        weight = weight.to(dtype).float()
        y, dx, kept, db = all_products(weight, bias, x, dy, n, m, dtype)
        exact = weight.double()
        close(y, x.double() @ exact.T + bias.double(), 3 * n)
        close(dx, dy.double() @ exact, rows)
        slope = (dy.double().T @ x.double()) * (weight != 0)
        if dtype == torch.float32:
            close(kept, slope, tokens)
        else:  # gradients are stored as the values are
            assert torch.allclose(kept.double(), slope, rtol=2**-8, atol=1e-5)
        close(db, dy.double().sum(dim=0), tokens)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 50),
    groups=st.integers(1, 9),
    m=st.integers(1, 40),
    tokens=st.integers(1, 150),
    data=st.data(),
)
def test_any_shape(rows: int, groups: int, m: int, tokens: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, m))
    weight, bias, x, dy = made(rows, groups, n, m, tokens, seed=rows)
    y, dx, kept, _ = all_products(weight, bias, x, dy, n, m, torch.float32)
    close(y, x.double() @ weight.double().T + bias.double(), groups * n)
    close(dx, dy.double() @ weight.double(), rows)
    close(kept, (dy.double().T @ x.double()) * (weight != 0), tokens)


def test_bits_do_not_depend_on_threads(isa: str) -> None:
    for tokens in (1, 7, 40, 200):
        weight, bias, x, dy = made(70, 16, 2, 8, tokens)
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(all_products(weight, bias, x, dy, 2, 8, torch.float32))
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_instruction_sets_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias, x, dy = made(64, 16, 2, 8, 33)
    found = []
    for isa in ISAS:
        monkeypatch.setenv("KERNELS_ISA", isa)
        found.append(all_products(weight, bias, x, dy, 2, 8, torch.float32))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"{p[0]}:{p[1]}")
def test_packing_loses_nothing(pattern: tuple[int, int], dtype: torch.dtype) -> None:
    n, m = pattern
    weight = made(37, 5, n, m, 1)[0].to(dtype)
    packed = nm.pack(weight, n, m)
    assert packed.dtype == dtype
    assert torch.equal(packed.to_dense(), weight)
    values, places = to_groups(packed.values, packed.places, m, 37)
    assert torch.equal(reference.unpack(values, places, m), weight)
    assert torch.equal(from_groups(values, 3), packed.values)


def test_the_format_is_the_documented_one() -> None:
    weight = torch.zeros(20, 16)
    weight[3, [1, 6]], weight[11, [0, 7]] = torch.tensor([5.0, 6.0]), torch.tensor([7.0, 8.0])
    packed = nm.pack(weight, 2, 8, weight != 0)
    assert packed.values.shape == (2, 2, 2, 16) and packed.places.shape == (2, 2, 2, 8)
    assert packed.values[0, 0, :, 3].tolist() == [5, 6] and packed.values[0, 0, :, 11].tolist() == [7, 8]
    assert packed.places[0, 0, :, 3].tolist() == [1 | 0 << 4, 6 | 7 << 4]
    assert packed.nbytes == 4 * 2 * 2 * 2 * 16 + 2 * 2 * 2 * 8
    assert nm.pack(torch.randn(16, 64), 1, 32).places.shape == (1, 2, 1, 16)


def test_packing_in_torch_and_in_cpp_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for n, m in PATTERNS:
        weight = made(21, 4, n, m, 1)[0]
        thinned = (weight != 0) & (torch.rand(weight.shape) < 0.7)  # some groups keep fewer
        here = nm.pack(weight, n, m, thinned)
        monkeypatch.setenv("KERNELS_BACKEND", "reference")
        there = nm.pack(weight, n, m, thinned)
        monkeypatch.delenv("KERNELS_BACKEND")
        assert torch.equal(here.values, there.values) and torch.equal(here.places, there.places)
        assert torch.equal(here.to_dense(), weight * thinned)


def test_a_filled_up_group_gets_no_gradient_for_its_zeros() -> None:
    weight, kept = torch.randn(4, 8), torch.zeros(4, 8, dtype=torch.bool)
    kept[:, 2] = True  # one of each first group instead of two, none of the second
    packed = nm.pack(weight, 2, 4, kept)
    packed.values.requires_grad_()
    x = torch.randn(5, 8)
    nm.linear(x, packed).sum().backward()
    assert packed.values.grad is not None
    dense = nm.NMTensor(packed.values.grad, packed.places, packed.shape, 2, 4).to_dense()
    assert torch.equal(dense != 0, kept)
    assert torch.allclose(dense[0, 2], x[:, 2].sum())


def test_straight_through_gives_the_whole_gradient() -> None:
    weight, bias, x, dy = made(24, 4, 2, 4, 9)
    dense = torch.randn(24, 16, requires_grad=True)
    y = nm.linear(x, nm.pack(weight, 2, 4), bias, straight_through=dense)
    y.backward(dy)
    assert dense.grad is not None
    assert torch.allclose(dense.grad, dy.T @ x, atol=1e-5)


def test_gradients_in_float64() -> None:
    packed = nm.pack(torch.randn(5, 16, dtype=torch.float64), 2, 8)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
    kept = packed.values.clone().requires_grad_()

    def function(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        # rows behind the last one hold zeros and stay so
        values = values.where(packed.values != 0, 0)
        return nm.linear(x, nm.NMTensor(values, packed.places, packed.shape, 2, 8), bias)

    assert torch.autograd.gradcheck(function, (x, kept, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_result_has_the_inputs_dtype_and_shape(dtype: torch.dtype) -> None:
    weight, bias, x, _ = made(24, 4, 1, 4, 6)
    y = nm.linear(x.to(dtype).view(2, 3, 16), nm.pack(weight, 1, 4), bias.to(dtype))
    assert y.dtype == dtype and y.shape == (2, 3, 24)
    expected = x.to(dtype).float() @ weight.T + bias.to(dtype).float()
    assert torch.allclose(y.float().view(6, 24), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)
    assert nm.linear(x[0], nm.pack(weight, 1, 4)).shape == (24,)
    assert nm.linear(x[:0], nm.pack(weight, 1, 4)).shape == (0, 24)


def test_any_stride() -> None:
    weight, bias, x, _ = made(24, 4, 2, 4, 20)
    tall = torch.empty(16, 40).T
    tall[::2] = x
    wide = torch.empty(24, 32)
    wide[:, ::2] = weight
    y = nm.linear(tall[::2], nm.pack(wide[:, ::2], 2, 4), bias)
    assert torch.equal(y, nm.linear(x, nm.pack(weight, 2, 4), bias))


def test_nan_and_infinity_pass_through(isa: str) -> None:
    for tokens in (2, 40):
        weight, _, x, _ = made(20, 4, 2, 8, tokens)
        x[1, 5] = math.nan
        y = nm.linear(x, nm.pack(weight, 2, 8))
        assert torch.equal(y[1].isnan(), weight[:, 5] != 0)
        assert not y[0].isnan().any()
    weight[2, 0] = math.nan
    assert nm.linear(torch.ones(1, 32), nm.pack(weight, 2, 8))[0].isnan().nonzero().flatten().tolist() == [2]


# --- bfloat16 in tiles


@pytest.fixture(params=TILED)
def tiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("KERNELS_ISA", request.param)
    return request.param


def halves(rows: int, groups: int, n: int, m: int, tokens: int) -> tuple[nm.NMTensor, Tensor, Tensor, Tensor]:
    """packed and x in bfloat16, bias in float32, and x W^T + bias in float64."""
    weight, bias, x, _ = made(rows, groups, n, m, tokens)
    packed, x = nm.pack(weight.bfloat16(), n, m), x.bfloat16()
    return packed, x, bias, x.double() @ packed.to_dense().double().T + bias.double()


def close_half(found: Tensor, exact: Tensor, terms: int) -> None:
    """Within one rounding to the 8 bits of bfloat16 and what float32 sums can differ by."""
    assert found.dtype == torch.bfloat16 and found.shape == exact.shape
    slack = 4e-7 * terms + 1e-6 * math.sqrt(terms)
    assert bool(((found.double() - exact).abs() <= (exact.abs() + slack) * 2**-8 + slack).all())


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"{p[0]}:{p[1]}")
def test_products_in_tiles_are_those_of_the_dense_weight(tiled: str, pattern: tuple[int, int]) -> None:
    n, m = pattern
    for rows, groups, tokens in ((1, 1, 16), (16, 3, 17), (33, 7, 33), (50, 5, 70)):
        packed, x, bias, exact = halves(rows, groups, n, m, tokens)
        close_half(nm.linear(x, packed, bias), exact, groups * n)
        close_half(nm.linear(x, packed), exact - bias.double(), groups * n)
    assert native().nm_takes_bfloat16(n, m, 16) == (8 * n >= m)
    assert not native().nm_takes_bfloat16(n, m, 15)


def test_more_columns_and_tokens_than_a_task_holds_in_tiles(tiled: str) -> None:
    for n, m, groups, tokens in ((2, 4, 300, 20), (3, 7, 160, 40), (4, 24, 60, 16), (1, 2, 20, 1100)):
        packed, x, bias, exact = halves(40, groups, n, m, tokens)
        close_half(nm.linear(x, packed, bias), exact, groups * n)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 70), groups=st.integers(1, 9), m=st.integers(1, 40), tokens=st.integers(1, 70), data=st.data()
)
def test_any_shape_in_tiles(rows: int, groups: int, m: int, tokens: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, m))
    packed, x, bias, exact = halves(rows, groups, n, m, tokens)
    close_half(with_isa("emulated_amx", lambda: nm.linear(x, packed, bias)), exact, groups * n)


def test_bits_of_tiles_do_not_depend_on_threads(tiled: str) -> None:
    for rows, tokens in ((70, 33), (20, 1100)):
        packed, x, bias, _ = halves(rows, 20, 2, 4, tokens)
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(nm.linear(x, packed, bias))
        assert all(torch.equal(found[0], other) for other in found[1:])


def test_tiles_add_as_the_manual_says(tiled: str) -> None:
    # 16 rows of a weight that keeps all of 32 columns, most of them zero
    def product(weight: dict[int, float], x: dict[int, float], bias: float = 0.0) -> float:
        w, tokens = torch.zeros(16, 32), torch.zeros(16, 32)
        for column in weight:
            w[:, column], tokens[:, column] = weight[column], x[column]
        packed = nm.pack(w.bfloat16(), 1, 1)
        found = nm.linear(tokens.bfloat16(), packed, torch.full((16,), bias)).float()
        assert (found == found[0, 0]).all()
        return found[0, 0].item()

    one = {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}
    assert product({0: 2.0**24, 2: 1.0, 4: -(2.0**24)}, one | {4: 1.0}) == 0  # even columns in their order
    assert product({0: 2.0**24, 1: 1.0, 2: -(2.0**24)}, one) == 1  # odd ones by themselves
    assert product({0: 2.0**24, 1: 3.0, 2: 1.0, 3: 2.0**24}, one, -(2.0**25)) == 4  # 2^24 + (2^24 + 3, rounded to 4)
    assert product({0: 1 + 2**-7}, {0: 1 + 2**-7}, -1 - 2**-6) == 2**-14  # the product itself is exact
    assert product({0: 2.0**-130}, {0: 2.0**100}) == 0  # smaller than a normal number: counts as zero
    assert product({0: 2.0**-64}, {0: 2.0**-64}) == 0


def test_a_nan_spoils_its_token_in_tiles(tiled: str) -> None:
    packed, x, _, _ = halves(20, 4, 2, 8, 40)
    x[1, 5], x[3, 31] = math.nan, math.inf
    y = nm.linear(x, packed)
    assert y[[1, 3]].isnan().any(dim=1).all() and y[1].isnan().all()
    assert y[[i for i in range(40) if i not in (1, 3)]].isfinite().all()


def test_gradients_of_bfloat16_are_those_of_float32(tiled: str) -> None:
    packed, x, bias, _ = halves(40, 6, 2, 4, 33)
    dy = torch.randn(33, 40, generator=torch.Generator().manual_seed(1)).bfloat16()
    dense = packed.to_dense()
    for wide in (torch.float32, torch.bfloat16):
        x, values = x.to(wide).detach().requires_grad_(), packed.values.detach().clone().requires_grad_()
        through, offset = dense.clone().requires_grad_(), bias.clone().requires_grad_()
        found = nm.NMTensor(values, packed.places, packed.shape, 2, 4)
        nm.linear(x, found, offset).backward(dy.to(wide))
        nm.linear(x.detach(), found, straight_through=through).backward(dy.to(wide))
        assert x.grad is not None and x.grad.dtype == wide
        grads = x.grad.bfloat16(), values.grad, offset.grad, through.grad
        if wide == torch.float32:
            expected = grads
        else:
            assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_into_one_graph(dynamic: bool) -> None:
    weight, bias, x, _ = made(24, 4, 2, 4, 12)
    packed = nm.pack(weight, 2, 4)

    def loss(x: Tensor, values: Tensor) -> Tensor:
        y = nm.linear(2 * x, nm.NMTensor(values, packed.places, packed.shape, 2, 4), bias)
        return y.square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for tokens in (12, 7):
        grads = []
        for function in (loss, compiled):
            leaf, values = x[:tokens].clone().requires_grad_(), packed.values.clone().requires_grad_()
            grads.append(torch.autograd.grad(function(leaf, values), (leaf, values)))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# --- errors


def test_errors_say_what_to_do() -> None:
    weight = torch.randn(8, 16)
    packed = nm.pack(weight, 2, 4)
    with pytest.raises(ValueError, match=r"got x of \[3, 12\]; expected \[\.\.\., 16\]"):
        nm.linear(torch.randn(3, 12), packed)
    with pytest.raises(ValueError, match=r"got a bias of \[3\]; expected \[8\]"):
        nm.linear(torch.randn(3, 16), packed, torch.randn(3))
    with pytest.raises(TypeError, match=r"got x of torch\.int64"):
        nm.linear(torch.zeros(3, 16, dtype=torch.int64), packed)
    with pytest.raises(ValueError, match=r"straight_through of \[16, 8\]; expected \[8, 16\]"):
        nm.linear(torch.randn(3, 16), packed, straight_through=weight.T)
    with pytest.raises(ValueError, match="got 5:4; expected 1 <= n <= m <= 256"):
        nm.pack(weight, 5, 4)
    with pytest.raises(ValueError, match="which 3 does not divide"):
        nm.pack(weight, 1, 3)
    with pytest.raises(ValueError, match="16 columns 3 does not divide"):
        nm.pack(weight, 1, 3, torch.ones(8, 16, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"got dtype torch\.int64; expected real"):
        nm.pack(torch.ones(8, 16, dtype=torch.int64), 2, 4)
    with pytest.raises(TypeError, match="complex64"):
        nm.pack(torch.ones(8, 16, dtype=torch.complex64), 2, 4, torch.ones(8, 16, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask \[8, 8\] of torch.bool for a weight \[8, 16\]"):
        nm.pack(weight, 2, 4, torch.ones(8, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="more than 2 of 4 kept"):
        nm.pack(weight, 2, 4, torch.ones(8, 16, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"expected \[O, K\]"):
        nm.pack(torch.randn(2, 8, 16), 2, 4)
    with pytest.raises(ValueError, match=r"expected \[1, 4, 2, 16\] and \[1, 4, 2, 8\]"):
        nm.NMTensor(packed.values[:, :3], packed.places, packed.shape, 2, 4)
    with pytest.raises(TypeError, match=r"places of torch\.int64; expected torch.uint8"):
        nm.NMTensor(packed.values, packed.places.long(), packed.shape, 2, 4)
    with pytest.raises(ValueError, match="got 2:4 on cpu; expected 2:4 on a CUDA device"):
        packed.to_semi_structured()


# --- where it pays


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
    small, wide, shared = (
        nm.pack(torch.randn(rows, columns), 2, 8, vector=vector)
        for rows, columns, vector in ((16, 16, 1), (16384, 512, 1), (16, 16, 32))
    )
    for packed in (small, wide, shared):
        x = torch.randn(1, packed.shape[1])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            y = nm.linear(x, packed)
        assert torch.allclose(y, x @ packed.to_dense().T, atol=1e-5)
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
