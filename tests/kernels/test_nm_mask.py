"""N:M masks along an axis: the kernel against the specification and against the definition, whatever the layout."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import KernelUnavailable, info, nm
from kernels.bench import other_isas
from kernels.nm import masks, reference

ISAS = [info()["isa"], *other_isas(), "emulated512"]
PATTERNS = [(2, 4), (1, 4), (3, 4), (2, 8), (5, 8), (1, 16), (9, 16), (1, 32), (16, 32), (11, 24), (1, 2), (3, 7)]
LONG = [(3, 65), (33, 66), (50, 100), (99, 100), (7, 1000)]  # groups that are searched one by one


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("KERNELS_ISA", request.param)
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def awkward(*shape: int, seed: int = 0) -> Tensor:
    """Many equal magnitudes of both signs, both zeros, infinities, NaN of several bit patterns, denormal numbers."""
    pool = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, torch.inf, -torch.inf, 0.0, 1e-44, -3e-45])
    odd = torch.tensor([0x7FC00000, 0x7F800001, -1, -0x00400000], dtype=torch.int32).view(torch.float32)
    assert bool(odd.isnan().all())
    pool = torch.cat([pool, odd])
    return pool[torch.randint(len(pool), shape, generator=torch.Generator().manual_seed(seed))]


def specified(weight: Tensor, n: int, m: int, dim: int = -1) -> Tensor:
    return reference.mask(weight.movedim(dim, -1), n, m).movedim(-1, dim)


def defined(weight: np.ndarray, n: int, m: int) -> np.ndarray:
    """Along the last axis: a weight is kept if fewer than n of its group are larger, or equal and before it."""
    unknown = np.isnan(weight)
    magnitude = np.where(unknown, 4e38, np.minimum(np.abs(np.where(unknown, 0, weight), dtype=np.float64), 3.9e38))
    kept = np.zeros(weight.shape, bool)
    for start in range(0, weight.shape[-1], m):
        group = magnitude[..., start : start + m]
        for i in range(group.shape[-1]):
            own = group[..., i : i + 1]
            ahead = (group > own) | ((group == own) & (np.arange(group.shape[-1]) < i))
            kept[..., start + i] = ahead.sum(axis=-1) < n
    return kept


@pytest.mark.parametrize("values", [noise, awkward])
@pytest.mark.parametrize(("n", "m"), [*PATTERNS, *LONG])
def test_it_is_the_specification(n: int, m: int, values, isa: str) -> None:
    for groups in (1, 3, 70):
        for shape in ((1, groups * m), (5, m * min(groups, 3)), (3, 2 * m, 5)):
            weight = values(*shape)
            axis = 1
            kept = nm.mask(weight, n, m, axis)
            assert kept.dtype == torch.bool and kept.shape == weight.shape
            assert torch.equal(kept, specified(weight, n, m, axis)), shape


@pytest.mark.parametrize("values", [noise, awkward])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 8), (4, 8), (3, 5), (70, 90)])
def test_it_and_the_specification_do_what_the_definition_says(n: int, m: int, values, isa: str) -> None:
    weight = values(6, 3 * m + 2)
    expected = torch.from_numpy(defined(weight.numpy(), n, m))
    assert torch.equal(reference.mask(weight, n, m), expected)
    assert torch.equal(nm.mask(weight, n, m, ragged=True), expected)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_shape_stride_and_axis(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(0, 19), min_size=1, max_size=4))
    weight = data.draw(st.sampled_from([noise, awkward]))(*shape, seed=data.draw(st.integers(0, 99)))
    weight = weight.permute(data.draw(st.permutations(range(len(shape)))))
    if data.draw(st.booleans()):
        weight = weight[..., :: data.draw(st.integers(1, 3))]
    if data.draw(st.booleans()):
        weight = weight[None].expand(2, *weight.shape)
    dim = data.draw(st.integers(-weight.ndim, weight.ndim - 1))
    m = data.draw(st.integers(1, 20))
    n = data.draw(st.integers(0, m))
    kept = nm.mask(weight, n, m, dim, ragged=True)
    assert torch.equal(kept, specified(weight, n, m, dim))
    assert kept.sum() == sum(min(n, weight.shape[dim] - i) for i in range(0, weight.shape[dim], m)) * (
        weight.numel() // max(1, weight.shape[dim])
    )


def test_a_mask_lies_in_memory_as_its_weight_does() -> None:
    weight = noise(8, 12, 3, 3)
    for layout in (weight, weight.to(memory_format=torch.channels_last), weight.transpose(0, 1), weight.flatten(1).T):
        assert nm.mask(layout, 2, 4, 1).stride() == layout.stride()


@pytest.mark.parametrize("values", [noise, awkward])
def test_the_same_bits_on_any_number_of_threads(values, threads: None, isa: str) -> None:
    cases = [((300, 512), 2, 4, 1), ((256, 700), 3, 8, 0), ((40, 64, 9, 3), 1, 16, 1), ((97, 999), 40, 80, 1)]
    for shape, n, m, dim in cases:
        weight = values(*shape)
        found = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(nm.mask(weight, n, m, dim, ragged=True))
        assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("m", [1, 4, 6, 100])
def test_all_none_and_nothing(m: int, isa: str) -> None:
    weight = awkward(3, 2 * m, 2)
    assert bool(nm.mask(weight, m, m, 1).all()) and not bool(nm.mask(weight, 0, m, 1).any())
    for shape in ((0, m), (3, 0), (0, 0, m)):
        assert nm.mask(torch.zeros(shape), 1, m).shape == shape
    assert bool(nm.mask(awkward(3, m), m, m + 2, ragged=True).all()), "a group that is shorter than n keeps all"


def test_of_equals_the_first_is_kept(isa: str) -> None:
    for n, m in (*PATTERNS, *LONG):
        kept = nm.mask(torch.full((3, 2 * m), -1.5), n, m).unflatten(1, (2, m))
        assert bool(kept[..., :n].all()) and not bool(kept[..., n:].any())


def test_narrow_and_wide_floats() -> None:
    weight = noise(16, 64)
    assert torch.equal(nm.mask(weight.double(), 2, 4), nm.mask(weight, 2, 4))
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        narrow = weight.to(dtype)
        assert torch.equal(nm.mask(narrow, 2, 4), nm.mask(narrow.float(), 2, 4))
    # float64 that float32 would take for equal
    close = torch.tensor([[1.0, 1.0 + 1e-12, 0.0, 0.0]], dtype=torch.float64)
    assert nm.mask(close, 1, 4).tolist() == [[False, True, False, False]]


def test_backends_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = awkward(16, 64)
    expected = nm.mask(weight, 2, 8)
    called = []
    plain = reference.mask
    monkeypatch.setattr(reference, "mask", lambda *given: called.append(given) or plain(*given))
    monkeypatch.setenv("KERNELS_BACKEND", "reference")
    assert torch.equal(nm.mask(weight, 2, 8), expected) and len(called) == 1
    monkeypatch.setenv("KERNELS_BACKEND", "cpu")
    assert torch.equal(nm.mask(weight, 2, 8), expected) and len(called) == 1
    with pytest.raises(KernelUnavailable, match="expected a float32 tensor on 'cpu'"):
        nm.mask(weight.double(), 2, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1.0]], 1, 1), TypeError, r"got list; expected a torch\.Tensor; use torch\.as_tensor\(weight\)"),
        ((torch.zeros(4, dtype=torch.int64), 2, 4), TypeError, r"got dtype torch\.int64; expected real floating point"),
        ((torch.zeros(4, dtype=torch.bool), 2, 4), TypeError, r"got dtype torch\.bool"),
        ((torch.zeros(4, dtype=torch.complex64), 2, 4), TypeError, r"got dtype torch\.complex64"),
        ((torch.zeros(4), 5, 4), ValueError, r"got 5:4; expected 0 <= n <= m and m >= 1"),
        ((torch.zeros(4), -1, 4), ValueError, r"got -1:4; expected"),
        ((torch.zeros(4), 0, 0), ValueError, r"got 0:0; expected"),
        ((torch.zeros(3, 6), 2, 4), ValueError, r"axis -1 of \[3, 6\] has 6 entries, which 4 does not divide; choose"),
        ((torch.zeros(3, 4), 2, 4, 0), ValueError, r"axis 0 of \[3, 4\] has 3 entries, which 4 does not divide"),
        ((torch.zeros(3, 4), 2, 4, 2), ValueError, r"got axis 2 of a weight \[3, 4\]; expected one of its 2 axes"),
        ((torch.zeros(()), 1, 1), ValueError, r"got axis -1 of a weight \[\]; expected one of its 0 axes"),
    ],
)
def test_wrong_input_is_refused(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"kernels\.nm\.mask: {message}"):
        nm.mask(*arguments)


def test_a_mask_has_no_gradient_and_leaves_its_weight_alone() -> None:
    weight = noise(4, 8).requires_grad_()
    before = weight.detach().clone()
    kept = nm.mask(weight, 2, 4)
    assert not kept.requires_grad and torch.equal(weight, before)


@pytest.mark.parametrize(("dim", "transposable"), [(-1, False), (-2, False), (-1, True)])
def test_opcheck(dim: int, transposable: bool) -> None:
    for score in (noise(8, 12), noise(2, 8, 12).double(), noise(12, 8).T, noise(8, 24)[:, ::2]):
        torch.library.opcheck(masks._mask, (score, 2, 4, dim, transposable))


@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_into_one_graph(dynamic: bool) -> None:
    def layer(weight: Tensor) -> Tensor:
        both = nm.mask(weight, 2, 4, transposable=True)
        return (weight * nm.mask(weight, 2, 4) + weight.T.contiguous().T * nm.mask(weight.T, 1, 8).T + both).sum(dim=0)

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (8, 16):
        weight = noise(rows, 12, seed=rows).requires_grad_()
        expected, found = layer(weight), compiled(weight)
        assert torch.equal(found, expected)
        gradients = [torch.autograd.grad(out.square().sum(), weight)[0] for out in (expected, found)]
        torch.testing.assert_close(*gradients)


def test_vmap_is_a_loop() -> None:
    weight = noise(8, 5, 16)
    for dim, transposable in ((0, False), (1, False), (-1, True)):
        found = torch.vmap(lambda w, d=dim, t=transposable: nm.mask(w, 2, 4, d, transposable=t), in_dims=1)(weight)
        expected = [nm.mask(weight[:, i], 2, 4, dim, transposable=transposable) for i in range(5)]
        assert torch.equal(found, torch.stack(expected))


def test_the_first_call_does_not_import_the_compiler() -> None:
    # torch._dynamo takes seconds, which every notebook would pay
    code = (
        "import sys, torch; from kernels import nm; nm.mask(torch.ones(4, 4, requires_grad=True), 2, 4)\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(bool(info()["sanitized"]), reason="the sanitizers need memory of their own")
def test_an_axis_with_strides_needs_no_copy_of_the_weight() -> None:
    """In a process of its own: masks of 64 MiB of weights add their own 16 MiB and little more."""
    code = """
import torch
from kernels import nm
from kernels.bench import Contender, _extra_mib
weight = torch.ones(512, 64, 16, 32)
for view, dim in ((weight, 3), (weight, 1), (weight.movedim(1, -1), -1), (weight.mT, -1)):
    found = _extra_mib(Contender("ours", lambda: nm.mask(view, 2, 4, dim), ours=True))
    print("none" if found is None else found)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    found = run.stdout.split()
    if "none" in found:
        pytest.skip("this system does not tell the peak of a call")
    assert all(re.fullmatch(r"[\d.]+", word) and 15 < float(word) < 15 + 8 for word in found), found
