from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from common.finetuning.methods import METHODS, WITHOUT_BUDGET, Attached, attach, ranks
from common.models.lora import LowRank


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.GroupNorm(2, 16),
        nn.SiLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=4),
        nn.Flatten(),
        nn.Linear(256, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def batch() -> Tensor:
    return torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def train(made: Attached, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        made.optimizer.zero_grad()
        loss = (made.model(batch()) - 1).square().mean()
        loss.backward()
        made.optimizer.step()
        losses.append(loss.item())
    return losses


def made_with(method: str, budget: int = 1500, **more) -> Attached:
    return attach(network(), method, lr=5e-3, budget=None if method in WITHOUT_BUDGET else budget, **more)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_from_the_model_and_learns(method: str) -> None:
    made = made_with(method)
    with torch.no_grad():
        # DoRA divides by a norm and multiplies by it again
        torch.testing.assert_close(made.model(batch()), network()(batch()), rtol=1e-5, atol=1e-6)
    losses = train(made, 15)
    assert losses[-1] < 0.97 * losses[0]
    if made.advance:
        assert method == "lt-sft"
        made = made.advance()
        with torch.no_grad():
            assert torch.equal(made.model(batch()), network()(batch())), "rewound"
        assert train(made, 15)[-1] < 0.97 * losses[0]


@pytest.mark.parametrize("method", [name for name in METHODS if name not in WITHOUT_BUDGET])
def test_the_budget_is_met(method: str) -> None:
    made = made_with(method)
    if made.advance:
        made = made.advance()
    if method in ("lora", "dora"):
        assert 1500 - 74 < made.trainable <= 1500, "the cheapest rank is that of the last layer: 64 + 10"
    else:
        assert made.trainable == 1500
    start = {name: value.clone() for name, value in made.model.state_dict().items()}
    train(made, 3)
    changed = sum(int((value != start[name]).sum()) for name, value in made.model.state_dict().items())
    # LoRA's A does not move in its first step; a chosen entry with a gradient of exactly zero still decays
    assert 0.9 * made.trainable <= changed <= made.trainable


@pytest.mark.parametrize(("method", "extreme"), [("sara", "smallest"), ("largest", "largest")])
def test_magnitude_is_global_and_by_matrix_it_is_not(method: str, extreme: str) -> None:
    made = made_with(method)
    start = dict(network().named_parameters())
    moved = {name: value != start[name] for name, value in _trained(made).items()}
    together = torch.cat([value.abs().flatten() for value in start.values()])
    chosen = torch.cat([mask.flatten() for mask in moved.values()])
    if extreme == "smallest":
        assert together[chosen].max() <= together[~chosen].min()
    else:
        assert together[chosen].min() >= together[~chosen].max()


@pytest.mark.parametrize("method", ["super-tuning", "shira"])
def test_each_matrix_has_its_share(method: str) -> None:
    start = dict(network().named_parameters())
    moved = {name: value != start[name] for name, value in _trained(made_with(method)).items()}
    matrices = {name: value for name, value in start.items() if value.ndim > 1}
    share = 1500 / sum(value.numel() for value in matrices.values())
    assert not any(mask.any() for name, mask in moved.items() if name not in matrices)
    for name, value in matrices.items():
        assert abs(int(moved[name].sum()) - share * value.numel()) <= 1
        if method == "super-tuning":
            assert value[moved[name]].abs().min() >= value[~moved[name]].abs().max()


def _trained(made: Attached) -> dict[str, Tensor]:
    """A step with decay moves every chosen entry and no other one."""
    made.optimizer.zero_grad()
    for group in made.optimizer.param_groups:
        group["weight_decay"] = 0.5
    (made.model(batch()) - 1).square().mean().backward()
    made.optimizer.step()
    names = [name for name, _ in network().named_parameters()]
    return {name: made.model.state_dict()[name] for name in names}


def test_lt_sft_keeps_what_moved_most() -> None:
    made = made_with("lt-sft")
    start = {name: value.clone() for name, value in made.model.named_parameters()}
    train(made, 5)
    moved = {name: (value.detach() - start[name]).abs() for name, value in made.model.named_parameters()}
    assert made.advance is not None
    second = made.advance()
    entries = second.optimizer.sparse.entries  # pyright: ignore
    together = torch.cat([moved[e.name].flatten() for e in entries])
    chosen = torch.cat([e.selection.mask().flatten() for e in entries])
    assert int(chosen.sum()) == 1500 and together[chosen].min() >= together[~chosen].max()


def test_difffit_trains_vectors_and_scales_alone() -> None:
    made = made_with("difffit")
    start = {name: value.clone() for name, value in made.model.state_dict().items()}
    train(made, 3)
    changed = {name for name, value in made.model.state_dict().items() if not torch.equal(value, start[name])}
    assert changed and not {name for name in changed if start[name].ndim > 1}
    assert {"0.scale", "3.scale", "5.scale", "7.scale"} <= changed
    assert made.trainable == sum(start[name].numel() for name in start if start[name].ndim < 2)


@pytest.mark.parametrize("budget", [74, 400, 1500, 9000])
@pytest.mark.parametrize("magnitude", [False, True])
def test_ranks_are_even_and_what_is_left_buys_none(budget: int, magnitude: bool) -> None:
    layers = {"a": nn.Conv2d(3, 16, 3), "b": nn.Linear(256, 64), "c": nn.Linear(64, 10)}
    sizes = {"a": (16, 27), "b": (64, 256), "c": (10, 64)}
    if magnitude and budget == 74:
        with pytest.raises(ValueError, match="buys no rank"):
            ranks({"b": layers["b"]}, 74, magnitude=True)
        return
    found = ranks(layers, budget, magnitude=magnitude)
    spent = sum(rank * sum(sizes[name]) + magnitude * sizes[name][0] for name, rank in found.items())
    assert spent <= budget and all(rank <= min(sizes[name]) for name, rank in found.items())
    open_ranks = [found.get(name, 0) for name, size in sizes.items() if found.get(name, 0) < min(size)]
    for name, size in sizes.items():
        if found.get(name, 0) < min(size):
            next_one = sum(size) + (size[0] if magnitude and name not in found else 0)
            assert budget - spent < next_one, "another rank would have fitted"
    assert open_ranks == [] or budget < 1000 or max(open_ranks) - min(open_ranks) <= 8


@pytest.mark.parametrize("method", ["lora", "dora", "random", "shira"])
def test_what_is_drawn_is_the_seeds_and_nobody_elses(method: str) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)

    def end(seed: int) -> dict[str, Tensor]:
        made = made_with(method, seed=seed)
        train(made, 2)
        return dict(made.model.state_dict())

    first, again, other = end(1), end(1), end(2)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items() if name in other)
    model = network()
    torch.manual_seed(5)
    attach(model, method, lr=1e-3, budget=1500)
    assert torch.equal(torch.rand(3), expected), "the global generator is left alone"


def test_lora_adapts_what_it_can_and_only_what_is_meant() -> None:
    made = made_with("lora")
    adapted = {name for name, module in made.model.named_modules() if isinstance(module, LowRank)}
    assert adapted <= {"0", "5", "7"}, "a convolution in groups is left out"
    made = attach(network(), "lora", lr=1e-3, budget=500, target_modules=["7"])
    assert {name for name, module in made.model.named_modules() if isinstance(module, LowRank)} == {"7"}
    assert made.trainable == 444, "six ranks of 74"


@pytest.mark.parametrize(
    ("method", "budget", "words"),
    [
        ("best", 10, "unknown method 'best'; expected one of full, sara"),
        ("sara", None, "expected a number of parameters"),
        ("full", 10, "None: it trains what it trains"),
        ("sara", 0, "some and not all"),
        ("shira", 10**6, "some, not all"),
        ("lora", 20, "buys no rank at all|buys no rank; expected 43 or more"),
    ],
)
def test_mistakes_have_their_line_and_leave_the_model(method: str, budget: int | None, words: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=words):
        attach(model, method, lr=1e-3, budget=budget)
    assert all(p.requires_grad for p in model.parameters()) and type(model[0]) is nn.Conv2d
