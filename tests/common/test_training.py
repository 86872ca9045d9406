"""The training loop: the schedule by its formula, what happens where numbers break, and the same bits for a seed."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import training
from common.training import supervised


def line(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(3, 1)


def regression(steps: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(16, 3, generator=generator)
        yield x, x.sum(dim=1, keepdim=True)


def squared(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(network(batch[0]), batch[1])


def fit(network: nn.Module, batches, steps: int, *, lr: float = 0.1, warmup: int = 0, **options) -> list[float]:
    optimizer = torch.optim.SGD(network.parameters(), lr=lr)
    schedule = training.Schedule(steps, warmup)
    return training.fit(network, batches, squared, optimizer, schedule, **options)


def test_the_schedule_is_linear_and_then_a_cosine():
    schedule = training.Schedule(steps=14, warmup=4)
    assert [schedule.share(s) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert schedule.share(9) == pytest.approx(0.5)
    assert schedule.share(13) == pytest.approx((1 + math.cos(0.9 * math.pi)) / 2)
    with pytest.raises(ValueError, match="0 <= warmup < steps"):
        training.Schedule(3, 3)


def test_each_group_keeps_its_own_peak():
    """One step from zero with gradient -1: the weight is then the learning rate of that step."""
    a, b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    network = nn.ModuleList([a, b])
    for layer in (a, b):
        nn.init.zeros_(layer.weight)
    optimizer = torch.optim.SGD([{"params": a.parameters(), "lr": 0.1}, {"params": b.parameters(), "lr": 0.3}])
    seen = []
    training.fit(
        network,
        itertools.repeat(None),
        lambda net, _: -(net[0].weight + net[1].weight).sum(),
        optimizer,
        training.Schedule(steps=3, warmup=2),
        after_step=lambda done: seen.append((done, a.weight.item(), b.weight.item())),
    )
    rates = [0.5, 1.0, 1.0]
    expected = list(itertools.accumulate(rates))
    assert [done for done, *_ in seen] == [1, 2, 3]
    assert [x for _, x, _ in seen] == pytest.approx([0.1 * e for e in expected])
    assert [x for *_, x in seen] == pytest.approx([0.3 * e for e in expected])


def test_training_learns_and_takes_no_batch_too_many():
    source = regression(61)
    network = line()
    losses = fit(network, source, 60)
    assert len(losses) == 60 and losses[-1] < 0.01 * losses[0]
    assert len(list(source)) == 1
    with pytest.raises(ValueError, match="ended after 5 of 9 steps"):
        fit(line(), regression(5), 9)


def test_a_seed_fixes_every_bit_and_another_changes_them():
    first, again, other = (line() for _ in range(3))
    assert fit(first, regression(10), 10) == fit(again, regression(10), 10)
    assert torch.equal(first.weight, again.weight)
    fit(other, regression(10, seed=1), 10)
    assert not torch.equal(first.weight, other.weight)


def test_a_clipped_gradient_has_the_asked_norm_and_a_small_one_is_left_alone():
    for clip, moved in ((0.5, 0.5), (1e9, None)):
        network, before = line(), line()
        fit(network, regression(1), 1, lr=1.0, clip=clip)
        step = torch.cat([(a - b).flatten() for a, b in zip(network.parameters(), before.parameters(), strict=True)])
        free = line()
        fit(free, regression(1), 1, lr=1.0)
        if moved is None:
            assert torch.equal(network.weight, free.weight)
        else:
            assert step.norm().item() == pytest.approx(moved, rel=1e-4)


@pytest.mark.parametrize("broken", [0, 7, 12])
def test_a_broken_loss_names_the_step_and_gives_back_the_last_kept_state(broken, monkeypatch):
    monkeypatch.setattr(supervised, "KEEP_EVERY", 5)

    def batches():
        for step, (x, y) in enumerate(regression(20)):
            yield (x, torch.full_like(y, math.nan)) if step == broken else (x, y)

    network = nn.Sequential(line(), nn.BatchNorm1d(1))
    states = []
    kept = {0: 0, 7: 5, 12: 10}[broken]

    def watch(done: int) -> None:
        states.append(network[0].weight.detach().clone())

    start = network[0].weight.detach().clone()
    with pytest.raises(
        training.NonFiniteError, match=f"loss is nan in step {broken} of 20.*after {kept} steps"
    ) as caught:
        fit(network, batches(), 20, after_step=watch)
    assert (caught.value.step, caught.value.good_step, len(caught.value.losses)) == (broken, kept, broken)
    assert torch.equal(network[0].weight, [start, *states][kept])
    assert all(value.isfinite().all() for value in network.state_dict().values())


def test_a_gradient_that_is_not_finite_stops_it_too():
    """sqrt has an infinite slope at 0: the loss is fine, the update would not be."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with pytest.raises(training.NonFiniteError, match="gradient is not finite in step 0"):
        training.fit(
            network, itertools.repeat(None), lambda n, _: n.weight.sqrt().sum(), optimizer, training.Schedule(5)
        )
    assert network.weight.item() == 0


def test_accuracy_is_a_percentage_in_evaluation_mode():
    class Echo(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            return F.one_hot(x, 4).float()

    network = Echo().train()
    labels = torch.tensor([0, 1, 2, 3, 3])
    guessed = torch.tensor([0, 1, 2, 3, 0])
    assert training.accuracy(network, zip(guessed.split(2), labels.split(2), strict=True)) == pytest.approx(80)
    assert network.training
    with pytest.raises(ValueError, match="no batch"):
        training.accuracy(network, [])


def test_an_interrupted_training_goes_on_to_the_same_end(monkeypatch, tmp_path):
    monkeypatch.setattr(supervised, "KEEP_EVERY", 5)
    keep, whole, parts = tmp_path / "state.pt", line(), line()

    def adam(network: nn.Module, batches, **options) -> list[float]:
        optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
        return training.fit(network, batches, squared, optimizer, training.Schedule(20, 2), clip=1.0, **options)

    def interrupted():
        yield from itertools.islice(regression(20), 13)
        raise KeyboardInterrupt

    expected = adam(whole, regression(20))
    with pytest.raises(KeyboardInterrupt):
        adam(parts, interrupted(), keep=keep)
    fresh, steps = line(), []
    assert adam(fresh, regression(20), keep=keep, after_step=steps.append) == expected
    assert steps == list(range(11, 21))  # 10 were kept
    assert torch.equal(fresh.weight, whole.weight)
