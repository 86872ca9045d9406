"""SparseD's selection by hand, its steps, the released loop, fixed patterns, and masked diffusion."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from common.attention import Dense, language_attention
from kernels import attention
from papers.sparsed import diffusion, evaluation, method
from papers.sparsed.baselines import Fixed, sink_and_window, window
from papers.sparsed.method import RELEASED, Compat, SparseD


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Model(nn.Module):
    """Two attentions over random vectors of 16 tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.token, self.parts = nn.Embedding(17, 32), nn.ModuleList(nn.Linear(32, 96) for _ in range(2))
        self.head = nn.Linear(32, 17)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = 2 * self.token(tokens)
        for part in self.parts:
            q, k, v = part(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
            x = x + nn.functional.scaled_dot_product_attention(2 * q, k, v).transpose(1, 2).flatten(2)
        return self.head(x)


TOKENS = torch.randint(16, (2, 120), generator=draw())


def run(model: nn.Module, policy, steps: int) -> list[torch.Tensor]:
    with torch.no_grad(), language_attention(model, policy):
        return [model(TOKENS.roll(step, 1)) for step in range(steps)]


# ---------------------------------------------------------------------------------------------------------- selection


def test_prompt_and_generation_get_their_shares_whatever_their_weight():
    scores = torch.tensor([[9.0, 8.0, 7.0, 6.0, 5.0, 0.4, 0.1, 0.3, 0.2]])[None, None]
    kept = method.select(scores, 5, 0.4).dense()[0, 0, 0].tolist()
    assert kept == [True, True, False, False, False, True, False, True, False]
    together = method.select(scores, 0, 0.4).dense()[0, 0, 0].tolist()
    assert together == [True] * 4 + [False] * 5
    assert method.select(scores, 9, 0.4).dense()[0, 0, 0].tolist() == together


def test_each_head_and_sequence_has_its_own_pattern():
    scores = torch.rand(2, 3, 4, 8, generator=draw())
    kept = method.select(scores, 5, 0.4).dense()
    for place in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)).tolist():
        row, found = scores[tuple(place)], kept[tuple(place)]
        assert set(found[:5].nonzero().flatten().tolist()) == set(row[:5].topk(2).indices.tolist())
        assert set(found[5:].nonzero().flatten().tolist()) == {int(row[5:].argmax())}


def test_how_many_blocks_and_steps():
    assert [method.blocks_kept(10, share) for share in (0.01, 0.24, 0.25, 1.0)] == [1, 2, 3, 10]
    assert [method.blocks_kept(10, share, one_more=True) for share in (0.01, 0.24, 0.3, 1.0)] == [1, 3, 4, 10]
    assert method.blocks_kept(0, 0.5) == 0
    assert [method.dense_steps(32, skip) for skip in (0.0, 0.2, 1.0)] == [0, 6, 32]
    assert [method.dense_steps(32, skip, two_late=True) for skip in (0.0, 0.2, 1.0)] == [2, 8, 32]


def test_prompt_against_all_by_hand():
    compat = Compat(prompt_against_all=True)
    low = torch.tensor([[9.0, 8.0, 7.0, 6.0, 0.1, 0.2]])[None, None]
    assert method.select(low, 4, 0.5, compat).dense()[0, 0, 0].tolist() == [True, True, True, False, False, True]
    high = torch.tensor([[0.9, 0.8, 0.7, 0.6, 1.0, 2.0]])[None, None]
    assert method.select(high, 4, 0.5, compat).dense()[0, 0, 0].tolist() == [True, False, False, False, False, True]


@pytest.mark.parametrize("name", [None, *evaluation.SWITCHES, "all"])
def test_the_released_loop_finds_the_same_pattern(name):
    compat = RELEASED if name == "all" else Compat(**{name: True}) if name else Compat()
    assert evaluation.pattern_difference(compat) == 0
    if name in ("head_scale", "own_softmax"):  # 4 heads of 32 here
        query, key, _ = evaluation.made_up()
        options = {"prompt": 11, "keep_ratio": 0.3, "block_size": 32}
        one, other = (method.by_query_blocks(query, key, compat=c, **options).dense() for c in (compat, Compat()))
        assert not torch.equal(one, other)


def test_weights_of_generated_keys_alone():
    query, key, value = evaluation.made_up()
    found = method.generated_weights(query, key, value, 11, block_size=32)
    weight = (query @ key[:, :, 352:].mT / math.sqrt(32)).softmax(-1)
    expected = weight.unflatten(-1, (5, 32)).sum(-1).unflatten(2, (16, 32)).sum(3)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_passes():
    assert evaluation.searched_passes(released=True) == pytest.approx(method.passes(16, 11, released=True))
    assert method.passes(16, 8, released=True) == 2.5 and method.passes(16, 8, released=False) == 1.0


# -------------------------------------------------------------------------------------------------------------- steps


def test_dense_first_then_one_pattern():
    model, plain = Model(), run(Model(), Dense(), 6)
    policy = SparseD(steps=6, prompt=80, keep_ratio=0.3, skip=0.5, block_size=16)
    found = run(model, policy, 6)
    same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, found, strict=True)]
    assert policy.dense_steps == 3 and same == [True, True, True, False, False, False]
    assert set(policy.patterns) == {("0", "0"), ("1", "0")}
    kept = policy.patterns["1", "0"].dense()
    assert kept.shape == (2, 2, 8, 8) and policy.prompt_blocks == 5
    assert (kept[..., :5].sum(-1) == 2).all() and (kept[..., 5:].sum(-1) == 1).all()
    policy.restart()
    assert not policy.patterns


def test_the_pattern_is_that_of_the_last_dense_step_and_stays():
    seen = []

    class Watched(SparseD):
        def select(self, scores, weights=None):
            seen.append(scores.shape)
            return super().select(scores, weights)

    for skip, reuse, searches in ((0.5, True, 2), (0.5, False, 2 * 4), (0.0, True, 2), (0.0, False, 2 * 6)):
        seen.clear()
        run(Model(), Watched(6, 80, 0.3, skip=skip, block_size=16, reuse=reuse), 6)
        assert len(seen) == searches, (skip, reuse)


def test_without_dense_steps_the_first_is_sparse_by_its_own_pattern():
    model, policy = Model(), SparseD(6, 80, 0.3, skip=0.0, block_size=16)
    [found, *_] = run(model, policy, 1)
    x = 2 * model.token(TOKENS)
    q, k, v = model.parts[0](x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
    mask = policy.select(attention.search(2 * q, k, v, block_size=16).scores)
    assert torch.equal(mask.dense(), policy.patterns["0", "0"].dense())
    assert not torch.allclose(found, model(TOKENS), atol=1e-3)


@pytest.mark.parametrize("changes", [{}, {"isolated": False}, {"reuse": False}, {"skip": 0.0}, {"compat": RELEASED}])
def test_rho_one_is_dense(changes):
    policy = SparseD(steps=6, prompt=80, keep_ratio=1.0, block_size=16, **changes)
    for a, b in zip(run(Model(), Dense(), 6), run(Model(), policy, 6), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_options_out_of_range():
    with pytest.raises(ValueError, match="got steps 0"):
        SparseD(0, 10)
    for options in ({"keep_ratio": 0.0}, {"keep_ratio": 1.1}, {"skip": -0.1}):
        with pytest.raises(ValueError, match="expected shares"):
            SparseD(10, 10, **options)


# ---------------------------------------------------------------------------------------------------------- baselines


def test_window_and_sink_by_hand():
    found = window(6, 0.5)
    assert (found.sum(1) == 3).all() and found[3].tolist() == [False, False, True, True, True, False]
    assert found[0].tolist() == [True, True, True, False, False, False]
    sunk = sink_and_window(6, 0.5, 0.2)
    assert (sunk.sum(1) == 3).all() and sunk[:, 0].all()
    assert sunk[5].tolist() == [True, False, False, False, True, True]
    assert torch.equal(sink_and_window(6, 0.1, 0.5), torch.eye(6, dtype=torch.bool))  # its own block comes first


def test_a_fixed_pattern_is_sparse_from_the_first_step():
    model = Model()
    full = run(model, Fixed(lambda n: torch.ones(n, n, dtype=torch.bool), 16), 1)[0]
    torch.testing.assert_close(full, model(TOKENS).detach(), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(run(model, Fixed(lambda n: window(n, 0.3), 16), 1)[0], full, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------- diffusion

MASK = 16


def test_hidden_places_are_candidates_and_every_number_is_as_likely():
    candidates = torch.zeros(400, 20, dtype=torch.bool)
    candidates[:, 5:15] = True
    hidden = diffusion.hide(candidates, draw())
    assert not hidden[~candidates].any()
    assert torch.bincount(hidden.sum(1), minlength=11).tolist() == [0] + [40] * 10  # one draw in each of 400 parts
    rates = hidden[:, 5:15].double().mean(0)
    assert (rates - 0.55).abs().max() < 0.1  # four standard errors of 400 draws


def test_the_loss_is_that_of_llada_in_expectation():
    """Sum over numbers l of the mean cross-entropy of all choices of l, against t integrated."""
    tokens, errors = torch.tensor([[3, 5, 7]]), torch.tensor([1.0, 2.0, 4.0])

    def model(x):
        logits = torch.full((1, 3, 17), -1e9)
        for place, error in enumerate(errors):
            logits[0, place, tokens[0, place]] = 0.0
            logits[0, place, 0] = math.log(math.exp(error) - 1)
        return logits

    hidden = torch.tensor([[True, False, True]])
    assert diffusion.masked_loss(model, tokens, hidden, mask=MASK).item() == pytest.approx(2.5)
    every = torch.ones(1, 3, dtype=torch.bool)
    values = [
        diffusion.masked_loss(model, tokens, diffusion.hide(every, draw(seed)), mask=MASK).item() for seed in range(600)
    ]
    assert sum(values) / 600 == pytest.approx(errors.mean().item(), abs=0.15)


def oracle(order: list[int], truth: torch.Tensor):
    """A model that is right everywhere, and surest at the places first in `order`."""

    def model(tokens):
        logits = torch.zeros(*tokens.shape, 17)
        for rank, place in enumerate(order):
            logits[:, place].scatter_(1, truth[:, place, None], 10.0 - rank)
        model.seen.append((tokens == MASK).sum(1).tolist())
        return logits

    model.seen = []
    return model


def test_the_surest_places_come_first():
    truth = torch.arange(8)[None].repeat(2, 1)
    start = truth.clone()
    start[:, 3:] = MASK
    model = oracle([4, 6, 3, 7, 5], truth)
    assert torch.equal(diffusion.generate(model, start, mask=MASK, steps=3), truth)
    assert model.seen == [[5, 5], [3, 3], [1, 1]]
    model = oracle([7, 6, 5, 4, 3], truth)
    blocks = diffusion.generate(model, start, mask=MASK, steps=4, prompt=4, block_length=2)
    assert torch.equal(blocks, truth) and [row[0] for row in model.seen] == [5, 3, 2, 1]
    with pytest.raises(ValueError, match="masked places"):
        diffusion.generate(model, torch.tensor([[MASK, 1], [1, 1]]), mask=MASK, steps=1)
    with pytest.raises(ValueError, match="1 steps for 2 parts"):
        diffusion.generate(model, start, mask=MASK, steps=1, prompt=4, block_length=2)


def test_a_trajectory_unmasks_the_truth_in_equal_parts():
    truth, hidden = torch.randint(16, (3, 12), generator=draw()), []

    def model(tokens):
        hidden.append(tokens == MASK)
        assert torch.equal(tokens[~hidden[-1]], truth[~hidden[-1]])
        return torch.zeros(*tokens.shape, 17)

    losses = diffusion.trajectory(model, truth, mask=MASK, steps=4, prompt=4, generator=draw())
    assert losses == pytest.approx([math.log(17)] * 4)
    assert [step.sum(1).tolist() for step in hidden] == [[8] * 3, [6] * 3, [4] * 3, [2] * 3]
    assert all((later <= sooner).all() for sooner, later in itertools.pairwise(hidden))
    assert not hidden[0][:, :4].any()


def test_rises_by_hand():
    dense, sparse = [1.0] * 10, [1.5, 1.5, 1, 1, 1, 1, 1, 1, 1.1, 1.2]
    assert evaluation.rises(dense, sparse) == pytest.approx((0.1, 0.03))
