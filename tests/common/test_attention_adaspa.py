"""AdaSpa step by step on queries and keys of our own, against what its text says in plain torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from common.attention import AdaSpa, Meter, Site
from kernels import attention
from kernels.attention import BlockMask

B, H, L, D, BLOCK = 2, 4, 200, 16, 32
TEXT = range(160, 200)  # tiles 5 and 6 of 7
NONE = Site("layer", 1, "cond")
TOLERANCE = 1e-5  # float32, unit variances


def qkv(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries that prefer some keys strongly, so that tiles differ; heads more and more so."""
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, H, L, D, generator=draw) for _ in range(3))
    return q * torch.tensor([0.3, 1.0, 2.0, 4.0])[:, None, None], k, v


def drive(policy: AdaSpa, steps: int, site: Site = NONE, meter: Meter | None = None) -> list[Tensor]:
    """The outputs of a run whose query, key and value change with the step."""
    meter = meter or Meter()
    outputs = []
    for step in range(1, steps + 1):
        here = replace(site, step=step)
        meter.enter(here, 1)
        outputs.append(policy.attend(*qkv(step), here, meter))
    return outputs


def plain(**options: Any) -> AdaSpa:
    return AdaSpa(**{"keep_ratio": 0.3, "search_steps": (2, 4), "block_size": BLOCK, "head_adaptive": False} | options)


def sparse(step: int, mask: BlockMask, key_mask: Tensor | None = None) -> Tensor:
    out = attention.block_sparse_attention(*qkv(step), mask, block_size=BLOCK, key_mask=key_mask)
    assert isinstance(out, Tensor)
    return out


def full(step: int) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(*qkv(step))


def searched(step: int) -> attention.Search:
    return attention.search(*qkv(step), block_size=BLOCK)


def test_the_schedule_is_that_of_the_paper():
    meter = Meter()
    outputs = drive(plain(), 5, meter=meter)
    first = searched(2)
    early = attention.select_blocks(first.scores, 0.3)
    # the second search ranks by the log-sum-exp of the first, and its tiles serve the step itself
    stale = attention.block_scores(*qkv(4)[:2], first.lse, block_size=BLOCK)
    late = attention.select_blocks(stale, 0.3)
    expected = [full(1), full(2), sparse(3, early), sparse(4, late), sparse(5, late)]
    for step, (a, b) in enumerate(zip(outputs, expected, strict=True), 1):
        assert torch.allclose(a, b, atol=TOLERANCE), step
    assert not torch.allclose(outputs[3], sparse(4, early), atol=1e-2)
    assert not torch.equal(late.dense(), attention.select_blocks(searched(4).scores, 0.3).dense())
    assert [entry.step for entry in meter.recalls] == [2, 4]
    assert torch.allclose(meter.recalls[1].recall, attention.recall(stale, late))


def test_without_the_cache_every_search_is_dense_and_exact():
    outputs = drive(plain(refresh_lse="search"), 5)
    late = attention.select_blocks(searched(4).scores, 0.3)
    for a, b in zip(outputs[3:], [full(4), sparse(5, late)], strict=True):
        assert torch.allclose(a, b, atol=TOLERANCE)


def test_heads_of_high_recall_keep_less():
    policy = plain(head_adaptive=True, threshold=0.35)
    drive(policy, 2)
    scores = searched(2).scores
    recalls = attention.recall(scores, attention.select_blocks(scores, 0.3))
    assert bool((recalls > 0.35).any()) and bool((recalls <= 0.35).any())
    expected = attention.select_blocks(scores, attention.head_tiers(recalls, 0.3, threshold=0.35))
    mask = policy._known["layer", "cond"].mask
    assert torch.equal(mask.dense(), expected.dense())
    assert mask.density()[0, 3] < mask.density()[0, 0]


def masks(site: Site, **options: Any) -> Tensor:
    policy = plain(**options)
    drive(policy, 2, site)
    return policy._known["layer", "cond"].mask.dense()


def test_text_is_a_sink_on_top_of_the_budget_or_within():
    site = replace(NONE, text=TEXT)
    sink = attention.text_blocks(L, L, TEXT, block_size=BLOCK)
    top, within = masks(site), masks(site, text_counts=True)
    without = masks(site, text_sink=False)
    assert bool(top[:, :, sink].all()) and bool(within[:, :, sink].all()) and not bool(without[:, :, sink].all())
    assert torch.equal(top, without | sink)
    assert (within[:, :, :5].sum(-1) == 2).all()  # round(0.3 x 7) = 2, both of them text
    assert (without.sum(-1) == 2).all()
    assert (masks(NONE, rule="global").flatten(-2).sum(-1) == 15).all()  # round(0.3 x 49)
    assert (masks(NONE, rule="global").sum(-1) != 2).any()


def test_recall_is_taken_before_or_after_the_sink():
    site, options = replace(NONE, text=TEXT), {"head_adaptive": True, "threshold": 0.6}
    scores = searched(2).scores
    sink = attention.text_blocks(L, L, TEXT, block_size=BLOCK)
    for after in (False, True):
        uniform = attention.select_blocks(scores, 0.3, forced=sink if after else None)
        ratio = attention.head_tiers(attention.recall(scores, uniform), 0.3, threshold=0.6)
        expected = attention.select_blocks(scores, ratio, forced=sink)
        assert torch.equal(masks(site, recall_after_sink=after, **options), expected.dense())
    assert not torch.equal(
        masks(site, recall_after_sink=True, **options), masks(site, recall_after_sink=False, **options)
    )


def test_padded_text_is_kept_or_chosen_like_the_rest():
    present = torch.ones(B, L, dtype=torch.bool)
    present[1, 165:] = False  # of the second prompt, five words: tile 5 alone
    site = replace(NONE, text=TEXT, key_mask=present)
    keep, drop = masks(site), masks(site, padded_text="drop")
    assert bool(keep[:, :, :, 6].all()) and bool(drop[0, :, :, 6].all()) and bool(drop[:, :, :, 5].all())
    assert not bool(drop[1, :, :5, 6].any())  # padding has no weight
    outputs = drive(plain(padded_text="drop"), 3, site)
    assert torch.allclose(outputs[2], sparse(3, BlockMask.of(drop), present), atol=TOLERANCE)


def test_layers_and_guidance_passes_choose_for_themselves_or_together():
    meter, policy = Meter(), plain()
    apart: dict[tuple[str, str], Tensor] = {}
    for layer, cfg, seed in (("a", "cond", 2), ("a", "uncond", 7), ("b", "cond", 8)):
        site = Site(layer, 2, cfg)
        meter.enter(site, 1)
        policy.attend(*qkv(seed), site, meter)
        apart[layer, cfg] = attention.select_blocks(searched(seed).scores, 0.3).dense()
    assert set(policy._known) == set(apart)
    assert all(torch.equal(policy._known[owner].mask.dense(), mask) for owner, mask in apart.items())
    assert not torch.equal(apart["a", "cond"], apart["a", "uncond"])

    shared = plain(share_cfg=True)
    for cfg, seed in (("cond", 2), ("uncond", 7)):
        meter.enter(Site("a", 2, cfg), 1)
        out = shared.attend(*qkv(seed), Site("a", 2, cfg), meter)
        assert torch.allclose(out, full(seed), atol=TOLERANCE)  # the search step is dense for both
    assert torch.equal(shared._known["a", ""].mask.dense(), apart["a", "cond"])


def test_in_a_batch_of_both_passes_the_conditional_half_decides():
    site, policy = Site("layer", 1, "cond_uncond"), plain(share_cfg=True)
    outputs = drive(policy, 4, site)
    mask = policy._known["layer", ""].mask.dense()
    stale = attention.block_scores(*qkv(4)[:2], searched(2).lse, block_size=BLOCK)
    expected = attention.select_blocks(stale[1:], 0.3).dense()
    assert mask.shape[0] == B and torch.equal(mask[:1], expected) and torch.equal(mask[1:], expected)
    assert torch.allclose(outputs[3], sparse(4, BlockMask.of(mask)), atol=TOLERANCE)


def test_a_layer_reached_late_searches_then():
    policy, meter = plain(search_steps=(2,)), Meter()
    outputs = []
    for step in (6, 7):
        site = replace(NONE, step=step)
        meter.enter(site, 1)
        outputs.append(policy.attend(*qkv(step), site, meter))
    assert torch.allclose(outputs[0], full(6), atol=TOLERANCE)
    assert torch.allclose(outputs[1], sparse(7, attention.select_blocks(searched(6).scores, 0.3)), atol=TOLERANCE)


def test_a_restart_forgets_and_a_run_too_short_warns():
    policy, meter, site = plain(), Meter(), replace(NONE, step=3)
    assert not torch.allclose(drive(policy, 3)[2], full(3), atol=1e-2)
    policy.restart()
    meter.enter(site, 2)
    assert torch.allclose(policy.attend(*qkv(3), site, meter), full(3), atol=TOLERANCE)  # it searches anew
    with pytest.warns(UserWarning, match=r"all was dense.*took 1 steps.*due at step 2"):
        policy.close(1)
    policy.close(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ratio": 0.0}, r"got keep_ratio 0\.0; expected a share in \(0, 1\]"),
        ({"keep_ratio": 80}, "sparsity of 0.8 is a keep_ratio of 0.2"),
        ({"search_steps": ()}, "expected one or more"),
        ({"search_steps": (0, 30)}, "the first step of all is 1"),
        ({"search_steps": (30, 10)}, "ascending"),
        ({"block_size": 48}, r"got block_size 48; expected one of 16, 32, 64, 128"),
        ({"rule": "column"}, "got rule 'column'; expected 'row' or 'global'"),
        ({"padded_text": "no"}, "got padded_text 'no'"),
        ({"refresh_lse": True}, "got refresh_lse True; expected 'never' or 'search'"),
        ({"threshold": 1.5}, r"got threshold 1\.5"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdaSpa(**options)
