"""Selectors of causal attention by hand, what they leave alone, and that what they read is what is counted."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.attention import AttentionNotReached
from common.attention import causal as causal_module
from common.attention.causal import CausalSite, Selector, attention_rows, queries_and_keys, sparse_forward
from common.attention.decode import H2O, AdaSnapKV, Quest, SnapKV, Streaming, budgets, top
from common.attention.prefill import BlockSparse, FlexPrefill, VerticalSlash, line_scores, lines_kept

L, P, H, D = 40, 30, 4, 8
SNAP = {"window": 6, "pool": 3, "first": 1, "last": 2}
LINES = {"window": 6, "first": 1, "last": 2}
SITE = CausalSite(layer=0, prompt=P, scale=D**-0.5)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TinyLM(nn.Module):
    """Two causal attentions through torch, `groups` heads of keys."""

    def __init__(self, groups: int = H, causal: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.groups, self.causal = groups, causal
        self.embed = nn.Embedding(11, H * D)
        self.layers = nn.ModuleList(nn.Linear(H * D, (H + 2 * groups) * D) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            split = layer(x).unflatten(-1, (-1, D)).transpose(1, 2).split([H, self.groups, self.groups], dim=1)
            mixed = F.scaled_dot_product_attention(*split, is_causal=self.causal, enable_gqa=self.groups != H)
            x = x + mixed.transpose(1, 2).flatten(2)
        return x


def tokens(batch: int = 2, length: int = L) -> Tensor:
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(1))


EVERYTHING: dict[str, Selector] = {
    "vertical_slash": VerticalSlash(keep=1.0, **LINES),
    "flex": FlexPrefill(coverage=1.0, least=P, **LINES),
    "block": BlockSparse(keep=1.0, block=4),
    "snap": SnapKV(keep=1.0, **SNAP),
    "ada": AdaSnapKV(keep=1.0, floor=0.2, **SNAP),
    "quest": Quest(keep=1.0, page=4),
    "h2o": H2O(keep=1.0),
    "streaming": Streaming(keep=1.0, first=1),
}
LITTLE: dict[str, Selector] = {
    "vertical_slash": VerticalSlash(keep=0.2, **LINES),
    "flex": FlexPrefill(coverage=0.3, least=2, **LINES),
    "block": BlockSparse(keep=0.3, block=4),
    "snap": SnapKV(keep=0.2, **SNAP),
    "ada": AdaSnapKV(keep=0.2, floor=0.2, **SNAP),
    "quest": Quest(keep=0.3, page=4),
    "h2o": H2O(keep=0.2),
    "streaming": Streaming(keep=0.2, first=1),
}


# ------------------------------------------------------------------------------------------------- the forward pass


@pytest.mark.parametrize("name", EVERYTHING)
@pytest.mark.parametrize("groups", [H, 2])
def test_a_selector_that_keeps_everything_changes_nothing(name: str, groups: int) -> None:
    model, x = TinyLM(groups), tokens()
    out, reads = sparse_forward(model, x, EVERYTHING[name], prompt=P)
    torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)  # sums in another order
    assert reads.density("prefill") == reads.density("decode") == 1


@pytest.mark.parametrize("name", LITTLE)
def test_only_queries_of_the_phase_are_thinned_and_earlier_ones_never_see_it(name: str) -> None:
    model, x = TinyLM(), tokens()
    selector, dense = LITTLE[name], model(x)
    out, reads = sparse_forward(model, x, selector, prompt=P)
    assert reads.density(selector.phase) < 0.75
    assert reads.density("decode" if selector.phase == "prefill" else "prefill") == 1
    changed = (out - dense).abs().amax((0, 2)) > 1e-4
    assert changed[P:].any()
    if selector.phase == "decode":
        assert not changed[:P].any()


@pytest.mark.parametrize("name", ["quest", "h2o", "streaming", "snap"])
def test_a_decoding_step_looks_at_nothing_after_it(name: str) -> None:
    """What is teacher-forced in one pass is what one token at a time would give."""
    model, x = TinyLM(), tokens()
    whole, _ = sparse_forward(model, x, LITTLE[name], prompt=P)
    for stop in (P + 1, P + 4, L - 1):
        part, _ = sparse_forward(model, x[:, :stop], LITTLE[name], prompt=P)
        torch.testing.assert_close(part, whole[:, :stop], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LITTLE)
def test_cutting_the_queries_into_chunks_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = TinyLM(), tokens()
    expected, counted = sparse_forward(model, x, LITTLE[name], prompt=P)
    monkeypatch.setattr(causal_module, "CHUNK", 7)
    found, reads = sparse_forward(model, x, LITTLE[name], prompt=P)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert reads == counted


def test_dense_layers_and_no_selector_are_counted_in_full() -> None:
    model, x = TinyLM(groups=2), tokens()
    out, reads = sparse_forward(model, x, None, prompt=P)
    torch.testing.assert_close(out, model(x))
    assert sum(reads.possible.values()) == 2 * 2 * 2 * L * (L + 1) // 2  # sequences, layers, heads of keys
    _, reads = sparse_forward(model, x, LITTLE["streaming"], prompt=P, dense_layers=1)
    assert reads.kept["decode", 0] == reads.possible["decode", 0]
    assert reads.kept["decode", 1] < reads.possible["decode", 1]
    twice = causal_module.Reads()
    twice.add(reads)
    twice.add(reads)
    assert twice.density("decode") == reads.density("decode")
    assert twice.kept["decode", 1] == 2 * reads.kept["decode", 1]


def test_grouped_queries_read_a_key_once() -> None:
    class Own(Selector):
        """Query head h reads key h alone."""

        phase = "decode"

        def plan(self, query, key, site):
            return lambda a, b: torch.eye(H, L, dtype=torch.bool)[None, :, None].expand(len(query), -1, b - a, -1)

    _, reads = sparse_forward(TinyLM(groups=2), tokens(), Own(), prompt=P)
    assert reads.kept["decode", 0] == 2 * 2 * (L - P) * 2  # sequences, heads of keys, queries, keys of two queries


def test_queries_and_keys_are_those_that_attention_gets() -> None:
    found = queries_and_keys(TinyLM(groups=2), tokens())
    assert [(tuple(q.shape), tuple(k.shape)) for q, k in found] == [((2, H, L, D), (2, 2, L, D))] * 2


def test_what_cannot_be_served_is_refused() -> None:
    with pytest.raises(ValueError, match=f"a prompt of {L + 1} in {L} tokens"):
        sparse_forward(TinyLM(), tokens(), None, prompt=L + 1)
    with pytest.raises(ValueError, match="both directions"):
        sparse_forward(TinyLM(causal=False), tokens(), None, prompt=P)
    with pytest.raises(AttentionNotReached, match="sdpa"):
        sparse_forward(nn.Embedding(11, 4), tokens(), None, prompt=P)
    with pytest.raises(ValueError, match="no query in the phase 'decode'"):
        sparse_forward(TinyLM(), tokens(), None, prompt=L)[1].density("decode")
    faults = [lambda: Quest(keep=0.0, page=4), lambda: Quest(keep=0.5, page=0), lambda: H2O(keep=2.0)]
    faults += [lambda: Streaming(keep=0.5, first=-1), lambda: SnapKV(keep=0.5, **(SNAP | {"pool": 2}))]
    faults += [lambda: AdaSnapKV(keep=0.5, floor=1.5, **SNAP), lambda: BlockSparse(keep=0.5, block=0)]
    faults += [lambda: VerticalSlash(keep=1.5, **LINES), lambda: FlexPrefill(coverage=0, least=1, **LINES)]
    for fault in faults:
        with pytest.raises(ValueError, match=r"got .*expected"):
            fault()


# ------------------------------------------------------------------------------------------------------------ prefill


def whole_mask(selector: Selector, query: Tensor, key: Tensor, start: int = 0, stop: int = P) -> Tensor:
    """What the queries may read, [B, H, n, P or L], as attention would use it."""
    seen = torch.arange(stop) <= torch.arange(start, stop)[:, None]
    return selector.plan(query, key, SITE)(start, stop)[..., :stop] & seen


def test_line_scores_are_sums_of_attention_along_lines() -> None:
    query, key = draw(2, H, L, D), draw(2, H, L, D, seed=1)
    vertical, slash = line_scores(query, key, SITE.scale, P, 6)
    weights = attention_rows(query, key, SITE.scale, P - 6, P)
    torch.testing.assert_close(vertical, weights.sum(-2))
    for distance in range(P):
        there = [(i, P - 6 + i - distance) for i in range(6) if P - 6 + i - distance >= 0]
        expected = sum((weights[..., i, j] for i, j in there), torch.zeros(2, H))
        torch.testing.assert_close(slash[..., distance], expected)


def test_attention_rows_are_softmax_over_the_past() -> None:
    query, key = draw(1, 1, L, D), draw(1, 1, L, D, seed=1)
    found = attention_rows(query, key, 0.5, 3, 5)
    for i, row in zip((3, 4), found[0, 0], strict=True):
        expected = (0.5 * key[0, 0, : i + 1] @ query[0, 0, i]).softmax(0)
        torch.testing.assert_close(row[: i + 1], expected)
        assert not row[i + 1 :].any()


def test_pairs_on_lines_are_counted_once() -> None:
    draws = torch.rand(2, 5, 3, P, generator=torch.Generator().manual_seed(0)) < 0.2
    vertical, slash = draws
    i, j = torch.arange(P)[:, None], torch.arange(P)
    mask = (vertical[:, :, None] | slash[:, :, (i - j).clamp(min=0)]) & (j <= i)
    assert torch.equal(lines_kept(vertical, slash), mask.sum((-2, -1)))


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
def test_vertical_slash_uses_up_its_budget_evenly(keep: float) -> None:
    query, key = draw(1, H, L, D), draw(1, H, L, D, seed=1)
    mask = whole_mask(VerticalSlash(keep=keep, **LINES), query, key)
    density = mask.double().sum((-2, -1)).mean() / (P * (P + 1) / 2)
    assert keep - 2 * (2 * P) / (P * (P + 1)) <= density <= keep  # one more line of each kind would be too much
    assert mask[..., 0].all() and mask.diagonal(dim1=-2, dim2=-1).all() and mask.diagonal(-1, -2, -1).all()


def test_vertical_slash_finds_a_planted_line() -> None:
    query, key = 0.1 * draw(1, 1, L, D), 0.1 * draw(1, 1, L, D, seed=1)
    query[..., 0], key[..., 0], key[:, :, 17, 0] = 3.0, 0.0, 9.0  # every query attends to key 17
    mask = whole_mask(VerticalSlash(keep=0.35, **LINES), query, key)
    assert mask[0, 0, 17:, 17].all()


def test_coverage_takes_more_where_attention_is_spread() -> None:
    query, key = draw(1, 2, L, D), draw(1, 2, L, D, seed=1)
    query[:, 0] *= 0.01  # head 0 attends evenly, head 1 to little
    query[:, 1] *= 4
    kept = whole_mask(FlexPrefill(coverage=0.5, least=1, **LINES), query, key).sum((-2, -1))[0]
    assert kept[0] > kept[1]
    more = whole_mask(FlexPrefill(coverage=0.9, least=1, **LINES), query, key).sum((-2, -1))[0]
    assert (more > kept).all()


def test_coverage_is_held_by_the_fewest_lines() -> None:
    selector = FlexPrefill(coverage=0.7, least=1, window=1, first=1, last=1)
    scores = torch.tensor([[[0.05, 0.5, 0.15, 0.3]]])
    assert selector._covering(scores, 1).tolist() == [[[True, True, False, True]]]  # 0.5 + 0.3, and the first
    least = FlexPrefill(coverage=0.1, least=3, window=1, first=1, last=1)
    assert least._covering(scores, 1).sum() == 4


def test_blocks_are_judged_by_their_means() -> None:
    query, key = 0.01 * draw(1, 1, L, D), 0.01 * draw(1, 1, L, D, seed=1)
    query[:, :, 24:28, 2], key[:, :, 8:12, 2] = 3.0, 3.0
    mask = whole_mask(BlockSparse(keep=0.65, block=4), query, key)
    assert mask[0, 0, 24:28, 8:12].all()
    blocks = F.max_pool2d(F.pad(mask.float(), (0, 2, 0, 2))[0], 4)[0]
    counts = blocks.sum(-1)
    n = len(blocks)
    assert torch.equal(counts, torch.arange(1, n + 1).clamp(max=int(counts.max())).float())
    assert counts.sum() <= 0.65 * n * (n + 1) / 2 < torch.arange(1, n + 1).clamp(max=int(counts.max()) + 1).sum()
    assert blocks[:, 0].all() and blocks.diagonal().all()


# ------------------------------------------------------------------------------------------------------------- decode


def test_snapkv_keeps_what_the_end_of_the_prompt_attends_to() -> None:
    query, key = 0.1 * draw(1, H, L, D), 0.1 * draw(1, H, L, D, seed=1)
    query[:, :, P - 6 : P, 0], key[:, :, 13, 0] = 4.0, 4.0
    mask = whole_mask(SnapKV(keep=0.2, **SNAP), query, key, P, L)
    kept = mask[0, 0, 0, :P].nonzero().flatten().tolist()
    assert {0, 12, 13, 14, P - 2, P - 1} == set(kept)  # pooled over its neighbours; 0.2 of 30 keys
    assert mask[0, 0, -1, P:].all()  # all that was decoded
    assert (mask[..., :P].sum(-1) == 6).all()


def test_heads_compete_for_the_keys_of_a_layer() -> None:
    query, key = draw(1, H, L, D), draw(1, H, L, D, seed=1)
    query[:, 0] *= 6  # its attention has high peaks, which win; heads of even attention keep their floor
    query[:, 1:] *= 0.01
    counts = whole_mask(AdaSnapKV(keep=0.4, floor=0.5, **SNAP), query, key, P, L)[0, :, 0, :P].sum(-1)
    assert counts.sum() == H * 12
    assert counts[0] > 12 and (counts >= 6).all()
    even = whole_mask(AdaSnapKV(keep=0.4, floor=1.0, **SNAP), query, key, P, L)
    assert torch.equal(even, whole_mask(SnapKV(keep=0.4, **SNAP), query, key, P, L))


def test_the_bound_of_a_page_is_never_below_its_scores() -> None:
    query, key = draw(1, H, L, D), draw(1, H, L, D, seed=1)
    mask = whole_mask(Quest(keep=0.3, page=4), query, key, P, L)
    for head, i in itertools.product(range(H), range(P, L)):
        complete = i // 4
        pages = key[0, head, : 4 * complete].unflatten(0, (complete, 4))
        q = query[0, head, i]
        bound = torch.maximum(q * pages.amin(1), q * pages.amax(1)).sum(-1)
        assert (bound >= (pages @ q).amax(1) - 1e-5).all()
        wanted = set(bound.topk(math.ceil(0.3 * (i + 1) / 4) - 1).indices.tolist()) | {complete}
        found = {place // 4 for place in mask[0, head, i - P].nonzero().flatten().tolist()}
        assert found == wanted


def test_pages_of_one_key_are_the_exact_choice() -> None:
    query, key = draw(1, H, L, D), draw(1, H, L, D, seed=1)
    mask = whole_mask(Quest(keep=0.25, page=1), query, key, P, L)
    scores = query[0, 0, -1] @ key[0, 0].T
    best = set(scores[:-1].topk(10 - 1).indices.tolist()) | {L - 1}
    assert set(mask[0, 0, -1].nonzero().flatten().tolist()) == best


def test_h2o_is_half_heavy_and_half_recent() -> None:
    query, key = draw(1, 1, L, D), draw(1, 1, L, D, seed=1)
    mask = whole_mask(H2O(keep=0.25), query, key, P, L)[0, 0]
    weights = attention_rows(query, key, SITE.scale, 0, L)[0, 0]
    for i in range(P, L):
        total = math.ceil(0.25 * (i + 1))
        recent = set(range(i + 1 - (total - total // 2), i + 1))
        before = weights[:i].sum(0)
        heavy = [j for j in before.argsort(descending=True).tolist() if j <= i and j not in recent][: total // 2]
        assert set(mask[i - P].nonzero().flatten().tolist()) == recent | set(heavy)


def test_streaming_by_hand() -> None:
    mask = whole_mask(Streaming(keep=0.25, first=2), draw(1, 1, L, D), draw(1, 1, L, D), P, L)[0, 0]
    assert mask[-1].nonzero().flatten().tolist() == [0, 1, *range(L - 8, L)]
    assert mask[0].nonzero().flatten().tolist() == [0, 1, *range(P + 1 - 6, P + 1)]


def test_budgets_are_rounded_up_and_free_of_rounding_errors() -> None:
    assert budgets(0.1, 9, 12, torch.device("cpu")).tolist() == [1, 2, 2]
    assert budgets(1 / 3, 8, 9, torch.device("cpu")).tolist() == [3]


def test_top_takes_the_first_of_equals() -> None:
    assert top(torch.tensor([1.0, 2.0, 2.0, 2.0]), torch.tensor(2)).tolist() == [False, True, True, False]
