"""Masks of tiles, and which tiles are chosen."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention import BlockMask, head_tiers, recall, select_blocks, text_blocks


def drawn(*shape: int, share: float = 0.4, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(0, 5), st.integers(0, 20)),
    share=st.sampled_from([0.0, 0.4, 1.0]),
)
def test_a_mask_comes_back_from_its_bits_and_lists(shape, share):
    dense = drawn(*shape, share=share)
    mask = BlockMask.of(dense)
    assert torch.equal(mask.dense(), dense)
    starts, columns = mask.lists()
    rows = dense.flatten(0, 2)
    for row in range(len(rows)):
        assert columns[starts[row] : starts[row + 1]].tolist() == rows[row].nonzero().flatten().tolist()
    assert starts[-1] == dense.sum()


def test_a_bit_a_tile_is_stored():
    mask = BlockMask.of(drawn(1, 2, 100, 1000))
    assert mask.bits.nbytes == 2 * 100 * 125
    assert mask.lists() is mask.lists(), "found once"


def test_masks_are_joined_and_met():
    one, other = drawn(1, 2, 3, 9), drawn(1, 2, 3, 9, seed=1)
    assert torch.equal((BlockMask.of(one) | BlockMask.of(other)).dense(), one | other)
    assert torch.equal((BlockMask.of(one) & BlockMask.of(other)).dense(), one & other)
    torch.testing.assert_close(BlockMask.of(one).density(), one.float().mean((-2, -1)))
    with pytest.raises(ValueError, match="same shape"):
        _ = BlockMask.of(one) | BlockMask.of(other[..., :8])


def test_what_is_no_mask_is_refused():
    with pytest.raises(TypeError, match="expected bool"):
        BlockMask.of(torch.ones(1, 1, 2, 2))
    with pytest.raises(ValueError, match="at most 65536"):
        BlockMask.of(torch.ones(1, 1, 1, 65537, dtype=torch.bool))


def scores(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_by_rows_every_row_keeps_its_best():
    found = scores(2, 3, 5, 10)
    mask = select_blocks(found, 0.3).dense()
    assert (mask.sum(-1) == 3).all()
    assert (found.masked_fill(~mask, torch.inf).amin(-1) > found.masked_fill(mask, 0).amax(-1)).all()


def test_globally_the_best_of_a_head_are_kept():
    found = scores(1, 2, 5, 10)
    mask = select_blocks(found, 0.3, rule="global").dense()
    assert (mask.sum((-2, -1)) == 15).all()
    assert (mask.sum(-1) != 3).any(), "rows differ"
    assert (found.masked_fill(~mask, torch.inf).amin((-2, -1)) > found.masked_fill(mask, 0).amax((-2, -1))).all()


def test_a_row_keeps_one_at_least_and_of_equals_the_first():
    mask = select_blocks(torch.ones(1, 1, 2, 10), 0.01).dense()
    assert mask[0, 0].tolist() == [[True] + [False] * 9] * 2


def test_heads_may_keep_different_shares():
    mask = select_blocks(scores(1, 2, 4, 10), torch.tensor([0.1, 0.5])).dense()
    assert mask.sum(-1)[0, 0].tolist() == [1] * 4 and mask.sum(-1)[0, 1].tolist() == [5] * 4


def test_forced_tiles_come_on_top_or_use_the_budget():
    forced = torch.zeros(4, 10, dtype=torch.bool)
    forced[:, 9] = True
    found = scores(1, 1, 4, 10)
    found[..., 9] = 0
    assert (select_blocks(found, 0.3, forced=forced).dense().sum(-1) == 4).all()
    counted = select_blocks(found, 0.3, forced=forced, forced_count=True).dense()
    assert (counted.sum(-1) == 3).all() and counted[..., 9].all()


def test_recall_is_the_share_of_the_weight():
    found = torch.tensor([[[[4.0, 1.0], [3.0, 2.0]]]])
    mask = BlockMask.of(torch.tensor([[[[True, False], [True, False]]]]))
    assert recall(found, mask).item() == pytest.approx(0.7)
    assert recall(5 * found, mask).item() == pytest.approx(0.7), "an old LSE changes nothing"
    with pytest.raises(ValueError, match="expected one shape"):
        recall(found[..., :1], mask)


def test_tiers_are_those_of_the_paper():
    found = head_tiers(torch.tensor([0.95, 0.5, 0.9, 0.6, 0.7, 0.3]), 0.2)
    torch.testing.assert_close(found, torch.tensor([0.1, 0.3, 0.1, 0.2, 0.2, 0.3]))
    assert found.mean().item() == pytest.approx(0.2)


@pytest.mark.parametrize("ratio", [0.2, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("above", [0, 2, 3, 5, 7])
def test_tiers_keep_the_mean_and_stay_within_one(ratio, above):
    recalls = torch.full((2, 7), 0.5)
    recalls[:, :above] = 0.9
    found = head_tiers(recalls, ratio)
    torch.testing.assert_close(found.mean(-1), torch.full((2,), ratio))
    assert (found <= 1).all() and (found > 0).all()
    assert ((found != ratio).sum(-1) == (0 if ratio == 1 else 2 * min(above, 3))).all()


def test_text_takes_its_rows_and_columns():
    found = text_blocks(300, 300, range(250, 300))
    assert found.shape == (5, 5)
    expected = torch.zeros(5, 5, dtype=torch.bool)
    expected[3:] = expected[:, 3:] = True
    assert torch.equal(found, expected)
    assert not text_blocks(300, 300, range(0)).any()


def test_what_cannot_be_chosen_is_refused():
    with pytest.raises(ValueError, match=r"sparsity of 0\.8 is a keep_ratio of 0\.2"):
        select_blocks(scores(1, 1, 2, 2), 0.0)
    with pytest.raises(ValueError, match="'row' or 'global'"):
        select_blocks(scores(1, 1, 2, 2), 0.5, rule="column")
    with pytest.raises(ValueError, match="query, key blocks"):
        select_blocks(scores(2, 2), 0.5)
    with pytest.raises(ValueError, match=r"share in \(0, 1\]"):
        head_tiers(torch.ones(2), 1.5)
    with pytest.raises(ValueError, match="expected it to lie within"):
        text_blocks(100, 100, range(90, 120))
