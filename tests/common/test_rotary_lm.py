"""The rotary language model: what a position sees, what rotation does, grouped heads, and that policies reach it."""

from __future__ import annotations

import pytest
import torch

from common.attention import Dense, language_attention
from common.models.rotary_lm import RotaryLM
from common.models.transformer import Attention, rotate


def tiny(**changes) -> RotaryLM:
    torch.manual_seed(0)
    return RotaryLM(**{"vocabulary": 11, "width": 16, "depth": 2, "heads": 2, "causal": False} | changes)


def tokens(length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(11, (3, length), generator=torch.Generator().manual_seed(seed))


def test_a_causal_model_does_not_see_ahead_and_the_other_does():
    whole = tokens()
    for causal, near in ((True, 0), (True, 3), (False, 0), (False, 3)):
        model = tiny(causal=causal, near=near)
        other = whole.clone()
        other[:, -1] = (other[:, -1] + 1) % 11
        same = torch.isclose(model(whole)[:, :-1], model(other)[:, :-1], atol=1e-6).all()
        assert bool(same) == causal
        assert model(whole).shape == (3, 12, 11)


def test_a_token_starts_with_those_before_it():
    model, x = tiny(near=2), tokens()
    assert model.near is not None and model.near.in_features == 32
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(x)
    vectors = model.token(x)
    one, two = model.near.weight.split(16, dim=1)
    expected = vectors[:, 5] + vectors[:, 4] @ one.T + vectors[:, 3] @ two.T
    torch.testing.assert_close(seen[0][:, 5], expected)
    torch.testing.assert_close(seen[0][:, 0], vectors[:, 0])  # nothing stands before the first
    assert model(x[:, :1]).shape == (3, 1, 11)


def test_order_matters_and_distance_alone_counts():
    model, x = tiny(), tokens()
    assert not torch.allclose(model(x.flip(1)).flip(1), model(x), atol=1e-3)
    q, k = torch.randn(2, 1, 16, dtype=torch.float64)  # one query and one key, wherever they stand
    turned_q, turned_k = rotate(q.expand(30, 16)), rotate(k.expand(30, 16))
    products = turned_q @ turned_k.T
    for shift in (0, 1, 7):
        torch.testing.assert_close(products.diagonal(shift), products[0, shift].expand(30 - shift))
    assert products[0, 1:].sub(products[0, 0]).abs().min() > 1e-6


def test_rotation_by_hand_keeps_length():
    x = torch.tensor([[1.0, 10.0, 2.0, 20.0]] * 3, dtype=torch.float64)
    found = rotate(x)
    assert torch.equal(found[0], x[0])
    one, slow = torch.tensor(2.0, dtype=torch.float64), torch.tensor(0.02, dtype=torch.float64)
    expected = [one.cos() - 2 * one.sin(), 10 * slow.cos() - 20 * slow.sin()]
    torch.testing.assert_close(found[2, :2], torch.stack(expected))
    torch.testing.assert_close(found.norm(dim=-1), x.norm(dim=-1))


def test_query_heads_share_keys():
    torch.manual_seed(0)
    layer, x = Attention(24, 4, causal=True, key_heads=2, rotary=True), torch.randn(2, 7, 24)
    assert layer.key.out_features == layer.value.out_features == 12 and layer.query.out_features == 24
    q, k, v = (part(x).unflatten(-1, (-1, 6)).transpose(1, 2) for part in (layer.query, layer.key, layer.value))
    q, k, v = rotate(q), rotate(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    weight = (q @ k.mT / 6**0.5).masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    torch.testing.assert_close(layer(x), layer.out((weight @ v).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("key_heads", [None, 1])
def test_policies_reach_every_layer(key_heads):
    model, x = tiny(key_heads=key_heads), tokens()
    with torch.no_grad(), language_attention(model, Dense()) as run:
        assert torch.equal(model(x), model(x))
    assert run.report().calls["dense"] == 4


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="vocabulary=0"):
        tiny(vocabulary=0)
    with pytest.raises(ValueError, match="even width of a head"):
        tiny(width=6)
    with pytest.raises(ValueError, match="heads=2, key_heads=3"):
        tiny(key_heads=3)
    with pytest.raises(ValueError, match=r"\[12\]; expected \[B, L\]"):
        tiny()(tokens()[0])
