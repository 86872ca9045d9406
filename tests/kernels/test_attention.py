"""Block-sparse attention: against the reference and torch's own attention, on every instruction set."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import TOLERANCE, assert_near, exact, made, some_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import attention as A
from kernels import info
from kernels.attention import reference
from kernels.bench import other_isas

ISAS = [info()["isa"], *other_isas(), "emulated512"]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("KERNELS_ISA", request.param)
    return request.param


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------------------ forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", A.BLOCK_SIZES)
def test_kept_tiles_alone_are_attended_to(isa, block, dtype):
    q, k, v = made(dtype=dtype)
    mask = some_mask(q, k, block)
    out, lse = A.block_sparse_attention(q, k, v, mask, block_size=block, return_lse=True)
    expected, expected_lse = exact(q, k, v, mask, block)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_near(out, expected, TOLERANCE[dtype])
    assert_near(lse, expected_lse, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dim", [1, 8, 40, 64, 96, 128, 256])
def test_at_full_density_it_is_torchs_attention(isa, dim):
    q, k, v = made(heads=4, groups=2, dim=dim)
    full = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    out = A.block_sparse_attention(q, k, v, full)
    peer = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert_near(out, peer, TOLERANCE[torch.float32])


@settings(max_examples=40, deadline=None)
@given(
    queries=st.integers(1, 200),
    keys=st.integers(1, 200),
    dim=st.integers(1, 40),
    shape=st.sampled_from([(1, 1, 1), (2, 4, 2), (1, 3, 1)]),
    block=st.sampled_from(A.BLOCK_SIZES),
    broadcast=st.booleans(),
    share=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_any_shape(queries, keys, dim, shape, block, broadcast, share):
    batch, heads, groups = shape
    q, k, v = made(batch, heads, groups, queries, keys, dim)
    mask = some_mask(q, k, block, share, 1 if broadcast else None, 1 if broadcast else None)
    out, lse = A.block_sparse_attention(q, k, v, mask, block_size=block, return_lse=True)
    expected, expected_lse = exact(q, k, v, mask.expand(batch, -1, -1, -1), block)
    # of one query or key little may be left of addends of size one: the error is theirs, so it is absolute
    torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=3e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=3e-6)


def test_rows_without_a_tile_give_zero_and_minus_infinity(isa):
    q, k, v = made()
    mask = some_mask(q, k, 64)
    mask[0, 1, 1] = False
    out, lse = A.block_sparse_attention(q, k, v, mask, return_lse=True)
    assert (out[0, 1, 64:128] == 0).all() and (lse[0, 1, 64:128] == -torch.inf).all()
    assert lse[0, 1, :64].isfinite().all() == mask[0, 1, 0].any()


def test_padding_is_not_read_whatever_it_holds(isa):
    q, k, v = made(batch=2)
    present = torch.rand(2, 200, generator=torch.Generator().manual_seed(2)) < 0.7
    present[1, 90:] = False
    mask = some_mask(q, k, 64)
    spoilt = [x.masked_fill(~present[:, None, :, None], torch.nan) for x in (k, v)]
    out, lse = A.block_sparse_attention(q, *spoilt, mask, key_mask=present, return_lse=True)
    expected, expected_lse = exact(q, k, v, mask, 64, present)
    assert_near(out, expected, TOLERANCE[torch.float32])
    assert_near(lse, expected_lse, TOLERANCE[torch.float32])


def test_a_nan_stays_in_its_row(isa):
    q, k, v = made()
    q[0, 0, 70, 3] = torch.nan
    out, lse = A.block_sparse_attention(q, k, v, torch.ones(1, 1, 3, 4, dtype=torch.bool), return_lse=True)
    spoilt = torch.zeros(1, 2, 150, dtype=torch.bool)
    spoilt[0, 0, 70] = True
    assert torch.equal(out.isnan().all(-1), spoilt) and torch.equal(lse.isnan(), spoilt)


@pytest.mark.parametrize("gain", [1e-3, 30.0, 1e4])
def test_scores_of_any_size(isa, gain):
    q, k, v = made(queries=64, keys=130)
    q = gain * q
    full = torch.ones(1, 1, 1, 3, dtype=torch.bool)
    out, lse = A.block_sparse_attention(q, k, v, full, return_lse=True)
    expected, expected_lse = exact(q, k, v, full, 64)
    # a score of thousands has a spacing of 1e-4 and more in float32, and its exponential that relative error
    slack = 3e-7 * gain * 50
    assert_near(out, expected, max(TOLERANCE[torch.float32], slack) if gain < 1e4 else 0.3)
    assert_near(lse, expected_lse, TOLERANCE[torch.float32])


def test_threads_do_not_change_a_bit():
    q, k, v = made(batch=2, heads=4)
    mask = some_mask(q, k, 64)
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = A.block_sparse_attention(*inputs, mask, return_lse=True)
        out.square().sum().backward()
        found.append([out, lse, *(x.grad for x in inputs), *A.search(q, k, v), A.block_scores(q, k, lse)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_layouts_of_any_stride():
    q, k, v = made()
    crossed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    mask = some_mask(q, k, 64)
    assert torch.equal(A.block_sparse_attention(*crossed, mask), A.block_sparse_attention(q, k, v, mask))


# ---------------------------------------------------------------------------------------------------------- gradients


def test_gradients_of_the_formulas():
    q, k, v = (x.requires_grad_() for x in made(heads=2, groups=1, queries=20, keys=35, dim=3, dtype=torch.float64))
    mask = torch.tensor([[[[True, False, True], [False, True, True]], [[True, True, True], [True, False, False]]]])

    def run(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = A.block_sparse_attention(*inputs, mask, block_size=16, return_lse=True)
        return out, lse

    assert torch.autograd.gradcheck(run, (q, k, v))


@pytest.mark.parametrize(("block", "dtype"), [(64, torch.float32), (128, torch.bfloat16), (16, torch.float32)])
def test_gradients_of_the_kernel(isa, block, dtype):
    given_ = made(batch=2, heads=4, groups=2, dtype=dtype)
    present = torch.rand(2, 200, generator=torch.Generator().manual_seed(2)) < 0.8
    mask = some_mask(given_[0], given_[1], block)
    mask[0, 0, 0] = False
    draw = torch.Generator().manual_seed(3)
    weights = torch.randn(2, 4, 150, 64, generator=draw), torch.randn(2, 4, 150, generator=draw)
    found = []
    for wide in (False, True):
        inputs = [(x.double() if wide else x.clone()).requires_grad_() for x in given_]
        options = {"block_size": block, "key_mask": present, "return_lse": True}
        out, lse = A.block_sparse_attention(*inputs, mask, **options)
        reached = lse > -torch.inf
        ((out * weights[0]).sum() + lse.where(reached, 0).mul(weights[1]).sum()).backward()
        found.append([x.grad for x in inputs])
    for narrow, exactly in zip(*found, strict=True):
        assert narrow.dtype == dtype
        assert_near(narrow, exactly, TOLERANCE[dtype])
    assert (found[0][1].mT[..., ~present[0]][0] == 0).all(), "padding has no gradient"


# ------------------------------------------------------------------------------------------------------------- search


@pytest.mark.parametrize("block", A.BLOCK_SIZES)
def test_search_finds_the_weight_of_every_tile(isa, block):
    q, k, v = made(heads=4)
    q = 3 * q  # so that maxima grow on the way
    present = torch.rand(1, 200, generator=torch.Generator().manual_seed(2)) < 0.8
    found = A.search(q, k, v, block_size=block, key_mask=present)
    expected, lse = exact(
        q, k, v, torch.ones(1, 1, math.ceil(150 / block), math.ceil(200 / block)).bool(), block, present
    )
    weights = reference.block_scores(q.double(), k.double(), lse, present, 64**-0.5, block)
    assert_near(found.out, expected, 5e-6)
    assert_near(found.lse, lse, TOLERANCE[torch.float32])
    assert_near(found.scores, weights, 5e-6)
    sizes = torch.tensor([min(block, 150 - first) for first in range(0, 150, block)], dtype=torch.float32)
    torch.testing.assert_close(found.scores.sum(-1), sizes.expand(1, 4, -1), rtol=1e-5, atol=0)


def test_scores_by_the_exact_lse_are_those_of_the_search(isa):
    q, k, v = made(heads=4, groups=2)
    found = A.search(q, k, v)
    assert_near(A.block_scores(q, k, found.lse), found.scores, 2e-6)


def test_an_old_lse_ranks_the_same_if_it_is_shifted_evenly():
    q, k, v = made(queries=256, keys=512)
    found = A.search(q, k, v)
    older = A.block_scores(q, k, found.lse - 0.7)
    assert_near(older, math.exp(0.7) * found.scores, 2e-6)
    assert torch.equal(A.select_blocks(older, 0.3).bits, A.select_blocks(found.scores, 0.3).bits)


def test_an_lse_that_is_far_too_small_does_not_overflow(isa):
    q, k, _ = made()
    scores = A.block_scores(q, k, torch.full((1, 2, 150), -1000.0))
    assert scores.isfinite().all() and (scores > 1e30).all()
    nothing = torch.full((1, 2, 150), -torch.inf)
    assert (A.block_scores(q, k, nothing) == 0).all()


# -------------------------------------------------------------------------------------------------- tracing, the op


def test_it_survives_torch_compile():
    q, k, v = made()
    mask = A.BlockMask.of(some_mask(q, k, 64))
    mask.lists()
    compiled = torch.compile(lambda *x: A.block_sparse_attention(*x, mask).sin(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), A.block_sparse_attention(q, k, v, mask).sin())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck itself reads it
def test_the_op_is_registered_as_torch_expects():
    q, k, v = (x.requires_grad_() for x in made(queries=20, keys=30, dim=4))
    lists = A.BlockMask.of(some_mask(q, k, 16)).lists()
    inputs = (q, k, v, *lists, 1, 2, 16, 0.5, None)
    torch.library.opcheck(torch.ops.resparse.attention.default, inputs)
    detached = [x.detach() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.resparse.attention_search.default, (*detached, 16, 0.5, None))


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda q, k, v, m: ((q[0], k, v, m), {}), ValueError, r"\[batch, heads, length, head dim\]"),
        (lambda q, k, v, m: ((q, k[..., :8], v, m), {}), ValueError, "a divisor of 2"),
        (lambda q, k, v, m: ((q, k, v[:, :, :9], m), {}), ValueError, "expected the same shape"),
        (lambda q, k, v, m: ((q, k.double(), v, m), {}), TypeError, "one dtype and device"),
        (lambda q, k, v, m: ((q.int(), k.int(), v.int(), m), {}), TypeError, "expected torch.float32 or torch.float64"),
        (lambda q, k, v, m: ((q, k, v, m), {"block_size": 48}), ValueError, "expected one of 16, 32, 64, 128"),
        (lambda q, k, v, m: ((q, k, v, m), {"block_size": 128}), ValueError, r"expected \[1 or 1, 2 or 1, 2, 2\]"),
        (lambda q, k, v, m: ((q, k, v, m[0]), {}), ValueError, "batch or 1, heads or 1"),
        (lambda q, k, v, m: ((q, k, v, m.float()), {}), TypeError, "expected bool"),
        (lambda q, k, v, m: ((q, k, v, m), {"key_mask": torch.ones(1, 3).bool()}), ValueError, r"bool \[1, 200\]"),
        (lambda q, k, v, m: ((q.repeat(1, 1, 1, 5),) + (k.repeat(1, 1, 1, 5),) * 2 + (m,), {}), ValueError, "1 to 256"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, message):
    q, k, v = made()
    arguments, options = change(q, k, v, some_mask(q, k, 64))
    with pytest.raises(error, match=message):
        A.block_sparse_attention(*arguments, **options)


def test_an_lse_of_another_length_is_refused():
    q, k, _ = made()
    with pytest.raises(ValueError, match=r"expected \[1, 2, 150\]"):
        A.block_scores(q, k, torch.zeros(1, 2, 149))
