"""N:M whose rows share their places in vectors: masks, the format, products on the CPU, and the kernel for a GPU."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nm_triton import interpreted, run
from torch import Tensor

from kernels import nm
from kernels.nm import crossover, reference
from kernels.nm.tensor import to_groups

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (it has no build for this platform)"
)

# n, m, vector, rows, groups, tokens: last vectors cut short, one token and many, groups of more than sixteen
CASES = (
    (2, 4, 16, 37, 9, 1),
    (2, 8, 32, 70, 5, 17),
    (1, 16, 64, 64, 3, 40),
    (3, 24, 128, 20, 2, 3),
    (1, 1, 16, 33, 5, 2),
    (5, 32, 256, 300, 2, 5),
)


@pytest.fixture(autouse=True)
def packed_always(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NM_CROSSOVER", str(tmp_path / "none.json"))
    monkeypatch.setattr(crossover, "_table", dict)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor, terms: int) -> None:
    """Within what float32 sums of that many terms of size 1 can differ by."""
    assert found.shape == expected.shape
    assert float((found.double() - expected).abs().max()) <= 4e-7 * terms + 1e-6 * math.sqrt(terms)


# --- masks


def by_hand(weight: Tensor, n: int, m: int, vector: int) -> Tensor:
    """Vector by vector and group by group: the n largest sums, of equals the first."""
    kept = torch.zeros(weight.shape, dtype=torch.bool)
    for row in range(0, weight.shape[0], vector):
        rows = slice(row, row + vector)
        for first in range(0, weight.shape[1], m):
            sums = weight[rows, first : first + m].abs().sum(0).tolist()
            for place in sorted(range(len(sums)), key=lambda place: -sums[place])[:n]:
                kept[rows, first + place] = True
    return kept


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_mask_keeps_the_columns_with_the_largest_sums(case: tuple[int, ...]) -> None:
    n, m, vector, rows, groups, _ = case
    # whole numbers, so that sums are exact in any order, and many are equal
    weight = noise(rows, groups * m).mul(3).round()
    expected = by_hand(weight, n, m, vector)
    assert torch.equal(nm.mask(weight, n, m, vector=vector), expected)
    assert torch.equal(nm.mask(weight.bfloat16(), n, m, 1, vector=vector), expected)
    deep = torch.stack([weight, -2 * weight], dim=-1)  # as a convolution's: each position by itself
    assert torch.equal(nm.mask(deep, n, m, 1, vector=vector), torch.stack([expected, expected], dim=-1))
    tall = weight.T.contiguous().T
    assert nm.mask(tall, n, m, vector=vector).stride() == tall.stride()


def test_awkward_masks() -> None:
    weight = torch.ones(20, 8)
    weight[3, 6] = math.nan  # counts as larger than everything
    assert nm.mask(weight, 1, 4, vector=16)[:16].nonzero()[:, 1].unique().tolist() == [0, 6]
    ragged = nm.mask(noise(20, 7), 2, 4, vector=16, ragged=True)
    assert ragged.sum(1).tolist() == [4] * 20
    assert nm.mask(noise(0, 8), 1, 4, vector=16).shape == (0, 8)
    assert torch.equal(nm.mask(noise(20, 8), 1, 4, vector=1), nm.mask(noise(20, 8), 1, 4))


# --- the format


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_packing_loses_nothing(dtype: torch.dtype) -> None:
    for n, m, vector, rows, groups, _ in CASES:
        weight = noise(rows, groups * m).to(dtype)
        weight = weight * nm.mask(weight, n, m, vector=vector)
        packed = nm.pack(weight, n, m, vector=vector)
        assert packed.dtype == dtype and packed.pattern == f"{n}:{m}x{vector}"
        assert torch.equal(packed.to_dense(), weight)
        assert torch.equal(replace(packed, values=packed.values.requires_grad_()).to_dense(), weight)
        values, places = to_groups(packed.values, packed.places, m, rows, vector)
        assert torch.equal(reference.unpack(values, places, m), weight)
        assert packed.to(dtype=torch.float64).vector == vector


def test_the_format_is_the_documented_one_and_smaller() -> None:
    weight = torch.zeros(20, 16)
    weight[:16, [1, 6]], weight[16:, [9, 15]] = torch.tensor([5.0, 6.0]), torch.tensor([7.0, 8.0])
    packed = nm.pack(weight, 2, 8, weight != 0, vector=16)
    assert packed.values.shape == (20, 2, 2) and packed.places.shape == (2, 2, 2)
    assert packed.places.tolist() == [[[1, 6], [0, 0]], [[0, 0], [1, 7]]]
    assert packed.values[0].tolist() == [[5, 6], [0, 0]] and packed.values[19].tolist() == [[0, 0], [7, 8]]
    assert packed.nbytes == 4 * 20 * 2 * 2 + 2 * 2 * 2
    assert nm.pack(noise(64, 64), 2, 8, vector=64).nbytes < nm.pack(noise(64, 64), 2, 8).nbytes


def test_groups_that_keep_fewer() -> None:
    weight, kept = noise(20, 8), torch.zeros(20, 8, dtype=torch.bool)
    kept[:, 2] = True  # one of each first group instead of two, none of the second
    packed = nm.pack(weight, 2, 4, kept, vector=16)
    packed.values.requires_grad_()
    assert torch.equal(packed.to_dense(), weight * kept)
    x = noise(5, 8, seed=1)
    nm.linear(x, packed).sum().backward()
    assert packed.values.grad is not None
    slope = replace(packed, values=packed.values.grad).to_dense()
    assert torch.equal(slope != 0, kept)
    assert torch.allclose(slope[:, 2], x[:, 2].sum())


# --- products on the CPU


def products(case: tuple[int, ...], dtype: torch.dtype) -> list[tuple[Tensor, Tensor, int]]:
    """y, dx, and the gradients of the kept values and the bias: found, expected, and how many terms they add up."""
    n, m, vector, rows, groups, tokens = case
    weight, bias = noise(rows, groups * m), noise(rows, seed=1)
    weight = (weight * nm.mask(weight, n, m, vector=vector)).to(dtype)
    packed, exact = nm.pack(weight, n, m, weight != 0, vector=vector), weight.double()
    x, dy = noise(tokens, groups * m, seed=2).requires_grad_(), noise(tokens, rows, seed=3)
    for leaf in (packed.values, bias):
        leaf.requires_grad_()
    y = nm.linear(x, packed, bias)
    y.backward(dy)
    assert packed.values.grad is not None and x.grad is not None and bias.grad is not None
    assert packed.values.grad.dtype == dtype
    kept = replace(packed, values=packed.values.grad).to_dense()
    x64, dy64 = x.detach().double(), dy.double()
    return [
        (y.detach(), x64 @ exact.T + bias.detach().double(), groups * n),
        (x.grad, dy64 @ exact, rows),
        (kept, dy64.T @ x64 * (exact != 0), tokens),
        (bias.grad, dy64.sum(0), tokens),
    ]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_are_those_of_the_dense_weight(
    case: tuple[int, ...], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KERNELS_BACKEND", backend)
    for found, expected, terms in products(case, torch.float32):
        close(found, expected, terms)


def test_products_of_bfloat16_values() -> None:
    y, dx, kept, _ = products(CASES[1], torch.bfloat16)
    close(*y)
    close(*dx)
    # gradients are stored as the values are
    assert torch.allclose(kept[0].double(), kept[1], rtol=2**-8, atol=1e-5)


def test_gradients_in_float64_and_straight_through() -> None:
    packed = nm.pack(noise(20, 16).double(), 2, 8, vector=16)
    x, bias = noise(3, 16).double().requires_grad_(), noise(20).double().requires_grad_()
    kept = packed.values.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, v, b: nm.linear(x, replace(packed, values=v), b), (x, kept, bias))
    dense, dy = noise(20, 16).requires_grad_(), noise(9, 20)
    tokens = noise(9, 16, seed=5)
    nm.linear(tokens, nm.pack(dense.detach(), 2, 4, vector=16), straight_through=dense).backward(dy)
    assert dense.grad is not None and torch.allclose(dense.grad, dy.T @ tokens, atol=1e-5)


def test_shapes_strides_and_nan() -> None:
    weight = noise(40, 32)
    packed = nm.pack(weight, 2, 8, vector=16)
    x = noise(6, 32, seed=1)
    y = nm.linear(x, packed)
    assert torch.equal(nm.linear(x.T.contiguous().T, packed), y)
    assert nm.linear(x.bfloat16().view(2, 3, 32), packed).dtype == torch.bfloat16
    assert nm.linear(x[0], packed).shape == (40,) and nm.linear(x[:0], packed).shape == (0, 40)
    x[1, 5] = math.nan  # meets those that keep the column
    found = nm.linear(x, packed).isnan()
    assert torch.equal(found[1], packed.to_dense()[:, 5] != 0) and not found[[0, 2, 3, 4, 5]].any()


def test_it_compiles_into_one_graph() -> None:
    packed, x = nm.pack(noise(40, 32), 2, 8, vector=16), noise(6, 32, seed=1)

    def loss(x: Tensor, values: Tensor) -> Tensor:
        weight = nm.NMTensor(values, packed.places, packed.shape, 2, 8, 16)
        return nm.linear(2 * x, weight).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    grads = []
    for function in (loss, compiled):
        leaf, values = x.clone().requires_grad_(), packed.values.clone().requires_grad_()
        grads.append(torch.autograd.grad(function(leaf, values), (leaf, values)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_errors_say_what_to_do() -> None:
    weight = noise(40, 32)
    for call in (nm.mask, nm.pack):
        with pytest.raises(ValueError, match=r"got vectors of 8 rows; expected one of \(1, 16, 32, 64, 128, 256\)"):
            call(weight, 2, 8, vector=8)
    with pytest.raises(ValueError, match="differs within 16 rows; expected the same columns"):
        nm.pack(weight, 2, 8, nm.mask(weight, 2, 8), vector=16)
    with pytest.raises(ValueError, match="more than 2 of 8 kept"):
        nm.pack(weight, 2, 8, torch.ones(40, 32, dtype=torch.bool), vector=16)
    with pytest.raises(ValueError, match="transposable=True with vectors of 16"):
        nm.mask(noise(32, 32), 2, 8, transposable=True, vector=16)
    with pytest.raises(ValueError, match="first axis of a weight"):
        nm.mask(weight, 2, 8, 0, vector=16)
    packed = nm.pack(weight, 2, 8, vector=16)
    with pytest.raises(ValueError, match=r"expected \[40, 4, 2\] and \[2, 4, 2\] for a 2:8x32 weight"):
        replace(packed, vector=32)
    with pytest.raises(ValueError, match="got vectors of 7 rows"):
        replace(packed, vector=7)


# --- the kernel for a GPU

PRODUCTS = """
from dataclasses import replace
from kernels.nm import vectors_triton
errors = []
# n, m, vector, rows, groups, tokens: a vector in two programs; loops long enough to be split; slots that end in a step
for n, m, vector, rows, groups, tokens in [
    (2, 4, 16, 37, 9, 1), (2, 8, 32, 70, 80, 17), (1, 16, 64, 130, 17, 40), (3, 24, 256, 300, 11, 150),
    (1, 1, 16, 5, 70, 3),
]:
    for dtype in (torch.float32, torch.bfloat16):
        weight = noise(rows, groups * m)
        weight = (weight * nm.mask(weight, n, m, vector=vector)).to(dtype)
        exact, packed = weight.double(), nm.pack(weight, n, m, weight != 0, vector=vector)
        x, dy, bias = noise(tokens, groups * m), noise(tokens, rows), noise(rows)
        leaves = [x, bias, packed.values]
        for leaf in leaves:
            leaf.requires_grad_()
        y = nm.linear(x, packed, bias)
        y.backward(dy)
        x64, dy64 = x.detach().double(), dy.double()
        errors.append(error(y, x64 @ exact.T + bias.detach().double()))
        errors.append(error(nm.linear(x, packed), x64 @ exact.T))
        assert error(x.grad, dy64 @ exact) < 1e-6
        kept = replace(packed, values=packed.values.grad).to_dense()
        assert error(kept, dy64.T @ x64 * (exact != 0)) < (1e-6 if dtype == torch.float32 else 2**-7)
        if dtype == torch.bfloat16:  # as on CUDA, where a bfloat16 x is left as it is
            narrow = x.detach().bfloat16()
            found = ops.linear(narrow, packed, bias.detach(), None)
            assert found.dtype == torch.bfloat16
            # its last bit, which the interpreter cuts off where a GPU rounds it
            assert error(found, narrow.double() @ exact.T + bias.detach().double()) < 2**-7
x = noise(20, 32)
packed = nm.pack(noise(40, 32), 2, 8, vector=16)
assert nm.linear(x[:0], packed).shape == (0, 40)
x[1, 5] = torch.nan
found = nm.linear(x, packed).isnan()
assert torch.equal(found[1], packed.to_dense()[:, 5] != 0) and int(found.sum()) == int(found[1].sum())
print(json.dumps(errors))
"""

COMPILE = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.nm import vectors_triton as kernels
SINGLE, HALF = "*fp32", "*bf16"
def check(capability, weight, data, vector, tokens, n=2, m=8, instruction="mma.sync"):
    constants = {"N": n, "M": m, "INTERPRETED": False, "BIASED": True}
    constants |= kernels.tile_of(vector, tokens, weight == data == HALF)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    pointers = {"inputs": data, "values": weight, "places": "*u8", "bias": SINGLE, "out": data}
    names = kernels._kernel.arg_names
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name] != "constexpr"}
    source = ASTSource(kernels._kernel, signature, {(names.index(k),): v for k, v in constants.items()}, aligned)
    code = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm
    assert instruction in code["ptx"], "no tensor cores"
    assert "cp.async" in code["ptx"], "the gathered inputs are not loaded ahead"
    assert ("math.fma" in code["ttgir"]) == (weight == SINGLE or data == SINGLE), "long sums inside the tensor cores"
    assert not re.search(r"\\b(atom|red)\\.", code["ptx"]), "atomics: not repeatable"
    assert ".f64" not in code["ptx"], "float64 by mistake"
check(90, HALF, HALF, 64, 4096, instruction="wgmma.mma_async")
check(90, HALF, HALF, 256, 4096, instruction="wgmma.mma_async")
check(90, SINGLE, SINGLE, 64, 4096, instruction="mma")
check(80, HALF, HALF, 128, 4096)
check(80, HALF, SINGLE, 32, 64)
check(80, SINGLE, SINGLE, 16, 1, 3, 24)
print("compiled")
"""


@needs_triton
def test_interpreted_products_agree_with_float64() -> None:
    errors = json.loads(interpreted(PRODUCTS))
    assert len(errors) == 20 and max(errors) < 1e-6, errors


@needs_triton
def test_the_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    from triton.backends import backends

    if "nvidia" not in backends:
        pytest.skip("this build of Triton has no NVIDIA backend")
    assert run(COMPILE, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0") == "compiled"
