from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from common.finetuning import SaraConfig
from common.finetuning.selecting import choose, select, targets


def weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"a": (7, 130), "b": (4, 3, 3, 3), "c": (11,)}
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(32, 10), nn.LayerNorm(10))


def flat(chosen: dict, of: dict[str, Tensor]) -> Tensor:
    """bool of all entries in order."""
    empty = {name: torch.zeros(w.shape, dtype=torch.bool) for name, w in of.items()}
    return torch.cat([chosen[name].mask().flatten() if name in chosen else empty[name].flatten() for name in of])


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 1028), st.sampled_from(["smallest", "largest"]), st.sampled_from([torch.float32, torch.float64]))
def test_the_choice_is_that_of_a_stable_sort(count: int, how, dtype: torch.dtype) -> None:
    given_weights = {name: (w * 8).round() / 8 for name, w in weights(count, dtype).items()}  # many equals
    chosen, _ = choose(given_weights, count, how)
    together = torch.cat([w.flatten().abs() for w in given_weights.values()])
    order = together.sort(stable=True, descending=how == "largest").indices[:count]
    expected = torch.zeros(len(together), dtype=torch.bool).index_fill_(0, order, True)
    assert torch.equal(flat(chosen, given_weights), expected)


def test_bfloat16_beside_float32_is_compared_by_value() -> None:
    mixed = weights() | {"a": weights()["a"].bfloat16()}
    chosen, _ = choose(mixed, 100, "smallest")
    together = torch.cat([w.flatten().abs().float() for w in mixed.values()])
    assert together[flat(chosen, mixed)].max() <= together[~flat(chosen, mixed)].min()


def test_theta_is_an_open_bound_of_what_was_chosen() -> None:
    given_weights = weights()
    chosen, theta = choose(given_weights, 300, "smallest")
    together = torch.cat([w.flatten().abs() for w in given_weights.values()])
    assert torch.equal(flat(chosen, given_weights), together.double() < theta)
    _, least = choose(given_weights, 300, "largest")
    assert int((together >= least).sum()) == 300


def test_random_entries_are_exactly_so_many_spread_evenly_and_repeatable() -> None:
    given_weights = {"a": torch.randn(400, 500), "b": torch.randn(200, 500)}
    first, theta = choose(given_weights, 30_000, "random", seed=1)
    again, _ = choose(given_weights, 30_000, "random", seed=1)
    other, _ = choose(given_weights, 30_000, "random", seed=2)
    assert math.isnan(theta) and sum(s.count for s in first.values()) == 30_000
    assert all(first[name] == again[name] for name in first)
    # hypergeometric: 20,000 expected of the larger one, deviation 77; six deviations
    assert abs(first["a"].count - 20_000) < 465
    both = (first["a"].mask() & other["a"].mask()).sum()
    assert abs(int(both) - 2_000) < 300, "two seeds share a tenth of a tenth"


def test_scores_choose_in_the_place_of_magnitudes() -> None:
    given_weights = weights()
    scores = {name: torch.zeros_like(w) for name, w in given_weights.items()}
    scores["b"][2, 1, 0, 0] = 1
    chosen, _ = choose(given_weights, 1, "largest", scores=scores)
    assert list(chosen) == ["b"] and chosen["b"].positions().tolist() == [2 * 27 + 9]


@pytest.mark.parametrize("count", [0, 1029])
def test_nothing_and_everything_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=r"of 1029 entries would be chosen; expected some and not all"):
        choose(weights(), count, "smallest")


@pytest.mark.parametrize(("threshold", "what"), [(1e-12, "nothing"), (1e6, "everything")])
def test_a_threshold_that_selects_nothing_or_everything_names_one_that_works(threshold: float, what: str) -> None:
    model = network()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=f"selects {what} of .* takes 1%") as error:
        select(model, SaraConfig(threshold, vectors=False))
    usual = float(str(error.value).split(": ")[2].split()[0])
    assert type(model[0]) is nn.Conv2d and before == {name: p.requires_grad for name, p in model.named_parameters()}
    chosen = select(model, SaraConfig(usual, vectors=False))
    # printed with three digits: the threshold is off by up to half a percent
    assert abs(chosen.count - chosen.total // 100) <= 2


def test_a_threshold_is_strict_and_global() -> None:
    model = network()
    model[0].weight.data.flatten()[5] = 0.01
    sparse = select(model, SaraConfig(0.01))
    for entries in sparse.entries:
        assert torch.equal(entries.selection.mask(), entries.weight.abs() < 0.01)
    assert not sparse.entries[0].selection.mask().flatten()[5]


def test_targets_by_suffix_and_by_expression() -> None:
    model = nn.ModuleDict(
        {"up": nn.ModuleDict({"to_q": nn.Linear(4, 4), "to_k": nn.Linear(4, 4)}), "q": nn.Linear(4, 4)}
    )
    names = [t.name for t in targets(model, ["to_q", "q"], vectors=False)]
    assert names == ["up.to_q.weight", "q.weight"]
    assert [t.name for t in targets(model, r"up\..*")] == [
        "up.to_q.weight",
        "up.to_q.bias",
        "up.to_k.weight",
        "up.to_k.bias",
    ]


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        (["to_v"], "matches no module; did you mean 'to_[qk]'"),
        (["norm"], "another kind"),
        ("to_q", "matches none of 2 modules, such as 'up.to_k'; expected an expression of the whole name"),
        ("(", "no regular expression"),
    ],
)
def test_names_that_match_nothing_are_refused(modules, words: str) -> None:
    layers = {"to_q": nn.Linear(4, 4), "to_k": nn.Linear(4, 4), "norm": nn.LayerNorm(4)}
    model = nn.ModuleDict({"up": nn.ModuleDict(layers)})
    with pytest.raises(ValueError, match=words):
        targets(model, modules, vectors=False)


def test_what_cannot_be_served_is_no_target() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.mix = nn.MultiheadAttention(4, 1)
            self.head.weight, self.last = self.words.weight, nn.Linear(4, 4)

    # neither the tied embedding nor the attention's projections, whose weights their module reads by itself
    assert [target.name for target in targets(Tied(), vectors=False)] == ["last.weight"]


def test_a_layer_that_is_used_twice_is_one_target() -> None:
    layer = nn.Linear(4, 4)
    twin = nn.Linear(4, 4)
    twin.weight = layer.weight
    model = nn.Sequential(layer, twin)
    sparse = select(model, SaraConfig(fraction=0.5, vectors=False))
    assert sparse.total == 16 and len(sparse.entries) == 1
    x = torch.randn(3, 4)
    model(x).square().sum().backward()
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    plain.load_state_dict(model.state_dict())
    plain[1].weight = plain[0].weight
    plain(x).square().sum().backward()
    torch.testing.assert_close(sparse.entries[0].gradient(), sparse.entries[0].selection.gather(plain[0].weight.grad))


@pytest.mark.parametrize(
    ("given_config", "words"),
    [
        ({}, "threshold=None and fraction=None"),
        ({"threshold": 1e-3, "fraction": 0.1}, "one of the two"),
        ({"threshold": 0.0}, "more than 0"),
        ({"fraction": 1.0}, "nothing or all"),
        ({"fraction": 0.1, "select": "best"}, "one of"),
        ({"threshold": 0.1, "select": "random"}, "a fraction"),
        ({"fraction": 0.1, "select": "largest", "progressive_at": 0.5}, "still small"),
        ({"fraction": 0.1, "progressive_at": 1.5}, "between 0 and 1"),
        ({"fraction": 0.1, "lambda_rank": -1}, "0 or more"),
        ({"fraction": 0.1, "target_modules": []}, "at least one name"),
        ({"fraction": 0.1, "target_modules": {"to_q"}}, "a list of at least one name"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(given_config: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SaraConfig(**given_config)


def test_other_mistakes_have_their_line() -> None:
    model = network()
    select(model, SaraConfig(fraction=0.1))
    with pytest.raises(ValueError, match="trains chosen entries already"):
        select(model, SaraConfig(fraction=0.1))
    with pytest.raises(ValueError, match="without Linear, Conv2d or Conv1D"):
        select(nn.LayerNorm(4).requires_grad_(False), SaraConfig(fraction=0.1, vectors=False))
    with pytest.raises(TypeError, match=r"torch.float16; expected float32, bfloat16 or float64"):
        select(network().half(), SaraConfig(fraction=0.1))
    broken = network()
    broken[3].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"'3.weight' is not finite"):
        select(broken, SaraConfig(fraction=0.1))
