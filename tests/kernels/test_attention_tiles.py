"""Block-sparse attention of bfloat16 in tiles, emulated where the processor has no AMX: against the reference."""

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
from kernels.bench import other_isas, with_isa

TILED = [isa for isa in (info()["isa"], *other_isas()) if isa == "amx"] + ["emulated_amx"]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=TILED)
def tiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("KERNELS_ISA", request.param)
    return request.param


def ragged(dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """q, k, v in bfloat16, which keys are there (of the second entry none behind 90), and k, v with NaN elsewhere."""
    q, k, v = made(batch=2, heads=4, dim=dim, dtype=torch.bfloat16)
    present = torch.rand(2, k.shape[2], generator=torch.Generator().manual_seed(2)) < 0.7
    present[1, 90:] = False
    return q, k, v, present, [x.masked_fill(~present[:, None, :, None], torch.nan) for x in (k, v)]


@pytest.mark.parametrize("dim", [1, 40, 64, 130, 256])
@pytest.mark.parametrize("block", A.BLOCK_SIZES)
def test_tiles_attend_to_what_is_kept_and_present(tiled, block, dim):
    q, k, v, present, spoilt = ragged(dim)
    mask = some_mask(q, k, block)
    mask[0, 1, 1] = False
    out, lse = A.block_sparse_attention(q, *spoilt, mask, block_size=block, key_mask=present, return_lse=True)
    expected, expected_lse = exact(q, k, v, mask, block, present)
    assert out.dtype == torch.bfloat16 and (out[0, 1, block : 2 * block] == 0).all()
    assert_near(out, expected, TOLERANCE[torch.bfloat16])
    assert_near(lse, expected_lse, TOLERANCE[torch.float32])


@pytest.mark.parametrize("block", A.BLOCK_SIZES)
def test_tiles_find_the_weight_of_every_tile(tiled, block):
    q, k, v, present, spoilt = ragged(72)
    q = 3 * q  # so that maxima grow on the way
    found = A.search(q, *spoilt, block_size=block, key_mask=present)
    full = torch.ones(1, 1, math.ceil(150 / block), math.ceil(200 / block)).bool()
    expected, lse = exact(q, k, v, full, block, present)
    weights = reference.block_scores(q.double(), k.double(), lse, present, 72**-0.5, block)
    assert_near(found.out, expected, TOLERANCE[torch.bfloat16])
    assert_near(found.lse, lse, TOLERANCE[torch.float32])
    assert_near(found.scores, weights, 5e-6)
    assert_near(A.block_scores(q, spoilt[0], found.lse, block_size=block, key_mask=present), weights, 5e-6)
    assert (A.block_scores(q, k, torch.full_like(lse, -1000.0).float()).isfinite()).all()
    assert (A.block_scores(q, k, torch.full_like(lse, -torch.inf).float()) == 0).all()


@settings(max_examples=30, deadline=None)
@given(
    queries=st.integers(1, 140),
    keys=st.integers(1, 140),
    dim=st.integers(1, 70),
    shape=st.sampled_from([(1, 1, 1), (2, 4, 2), (1, 3, 1)]),
    block=st.sampled_from(A.BLOCK_SIZES),
    scale=st.sampled_from([None, -0.5]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_any_shape_in_tiles(queries, keys, dim, shape, block, scale, share):
    batch, heads, groups = shape
    q, k, v = made(batch, heads, groups, queries, keys, dim, torch.bfloat16)
    mask = some_mask(q, k, block, share)
    options = {"block_size": block, "scale": scale, "return_lse": True}
    out, lse = with_isa("emulated_amx", lambda: A.block_sparse_attention(q, k, v, mask, **options))
    wide = [x.double() for x in (q, k, v)]
    expected, expected_lse = A.block_sparse_attention(*wide, mask, **options)
    # a weight and a result are rounded to 8 bits each; of addends of both signs little may be left, of values up to 5
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=5 * 2**-8)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=6e-6)


@pytest.mark.parametrize("gain", [1e-3, 30.0, 1e4])
def test_scores_of_any_size_in_tiles(tiled, gain):
    q, k, v = made(queries=64, keys=130, dtype=torch.bfloat16)
    q = gain * q
    full = torch.ones(1, 1, 1, 3, dtype=torch.bool)
    out, lse = A.block_sparse_attention(q, k, v, full, return_lse=True)
    expected, expected_lse = exact(q, k, v, full, 64)
    assert_near(out, expected, TOLERANCE[torch.bfloat16] if gain < 1e4 else 0.3)  # as in float32
    assert_near(lse, expected_lse, TOLERANCE[torch.float32])


def test_a_nan_stays_in_its_row_in_tiles(tiled):
    q, k, v = made(dtype=torch.bfloat16)
    q[0, 0, 70, 3] = torch.nan
    out, lse = A.block_sparse_attention(q, k, v, torch.ones(1, 1, 3, 4, dtype=torch.bool), return_lse=True)
    spoilt = torch.zeros(1, 2, 150, dtype=torch.bool)
    spoilt[0, 0, 70] = True
    assert torch.equal(out.isnan().all(-1), spoilt) and torch.equal(lse.isnan(), spoilt)


def test_bits_of_tiles_do_not_depend_on_threads(tiled):
    q, k, v, present, _ = ragged(40)
    mask, found = some_mask(q, k, 32), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        out, lse = A.block_sparse_attention(q, k, v, mask, block_size=32, key_mask=present, return_lse=True)
        found.append([out, lse, *A.search(q, k, v, key_mask=present), A.block_scores(q, k, lse)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_heads_that_do_not_fit_beside_each_other_are_packed_in_turn(tiled):
    q, k, v = made(batch=2, heads=2, groups=1, queries=20, keys=2**16 - 3, dim=250, dtype=torch.bfloat16)
    mask = torch.zeros(2, 2, 1, 1024, dtype=torch.bool)
    mask[..., [0, 700, 1023]] = True
    out, lse = A.block_sparse_attention(q, k, v, mask, return_lse=True)
    kept = mask[0, 0, 0].repeat_interleave(64)[: k.shape[2]]
    expected, expected_lse = exact(q, k[:, :, kept], v[:, :, kept], torch.ones(1, 1, 1, 3).bool(), 64)
    assert_near(out, expected, TOLERANCE[torch.bfloat16])
    assert_near(lse, expected_lse, TOLERANCE[torch.float32])


def test_gradients_after_a_forward_pass_in_tiles(tiled):
    given_ = made(batch=2, heads=4, groups=2, dtype=torch.bfloat16)
    mask, found = some_mask(given_[0], given_[1], 64), []
    for wide in (False, True):
        inputs = [(x.double() if wide else x.clone()).requires_grad_() for x in given_]
        A.block_sparse_attention(*inputs, mask).square().sum().backward()
        found.append([x.grad for x in inputs])
    for narrow, exactly in zip(*found, strict=True):
        assert_near(narrow, exactly, 2 * TOLERANCE[torch.bfloat16])  # the square's slope is of a rounded output too
