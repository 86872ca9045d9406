"""Diffusion: schedule, sampler, training, control branch and low-rank adaptation."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from common.models import lora
from common.models.denoiser import ControlBranch, Controlled, Denoiser
from common.models.diffusion import EMA, Schedule, ddim, epsilon_loss, sdedit, times, train


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shaken(network: nn.Module) -> nn.Module:
    """The network with random values where it starts at zero, as if it had been trained."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def small(seed: int = 0) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser(width=8, depth=2)


# -------------------------------------------------------------------------------------------------------- the sampler


def test_cosine_schedule_falls_from_one_to_nearly_nothing():
    schedule = Schedule.cosine(1000)
    assert schedule.steps == 1000 and schedule.signal[0] == 1
    assert (schedule.signal.diff() <= 0).all() and 0 < schedule.signal[-1] < 1e-3
    half = math.cos(math.pi / 2 * (0.5 + 0.008) / 1.008) ** 2 / math.cos(math.pi / 2 * 0.008 / 1.008) ** 2
    assert float(schedule.at(500)) == pytest.approx(half, rel=1e-5)


def test_times_make_the_last_part_of_the_steps():
    schedule = Schedule.cosine(1000)
    executed = times(schedule, 50, 0.2)
    assert executed == [200, 180, 160, 140, 120, 100, 80, 60, 40, 20, 0]  # 10 of 50
    assert len(times(schedule, 50)) == 51 and times(schedule, 50, 0.0) == [0]
    for steps, strength in ((0, 0.5), (50, 1.5), (2000, 0.5)):
        with pytest.raises(ValueError, match="times"):
            times(schedule, steps, strength)


def exact(image: Tensor, schedule: Schedule):
    """The predictor of a distribution with a single image."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        a = schedule.at(t)
        return (x - a.sqrt() * image) / (1 - a).sqrt()

    return predict


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_with_the_exact_predictor_every_sample_is_the_image(eta: float):
    schedule, image = Schedule.cosine(), torch.rand(2, 3, 8, 8, generator=generator()) * 2 - 1
    start = torch.randn(image.shape, generator=generator(1))
    found = ddim(exact(image, schedule), start, schedule, times(schedule, 20), eta=eta, generator=generator(2))
    torch.testing.assert_close(found, image, atol=1e-4, rtol=0)


def test_ddim_with_eta_one_has_the_posterior_variance_of_ddpm():
    """One step of unit-variance data: the exact predictor is sqrt(1 - a) x, and the result has unit variance again."""
    schedule = Schedule.cosine()

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return (1 - schedule.at(t)).sqrt() * x

    x = torch.randn(1, 1, 400, 400, generator=generator())
    for eta in (0.0, 1.0):
        found = ddim(predict, x, schedule, [500, 480], eta=eta, generator=generator(3))
        a, b = float(schedule.at(500)), float(schedule.at(480))
        sigma = eta * math.sqrt((1 - b) / (1 - a) * (1 - a / b))
        kept = math.sqrt(a * b) + math.sqrt((1 - a) * (1 - b - sigma**2))
        assert float(found.var()) == pytest.approx(kept**2 + sigma**2, rel=0.02)  # 160,000 samples


def test_sdedit_at_strength_zero_is_the_identity():
    image = torch.rand(2, 3, 8, 8, generator=generator())

    def never(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("nothing is to be denoised")

    found = sdedit(never, image, Schedule.cosine(), strength=0.0, steps=50, generator=generator(), eta=1.0, limit=1.0)
    assert torch.equal(found, image)


def test_sdedit_forgets_more_of_the_input_the_stronger_it_is():
    schedule, image, prior = Schedule.cosine(), torch.full((1, 3, 8, 8), 0.5), torch.full((1, 3, 8, 8), -0.5)

    def halfway(x: Tensor, t: Tensor) -> Tensor:  # pulls half of the way to the prior's image
        a = schedule.at(t)
        guess = 0.5 * (prior + x / a.sqrt())
        return (x - a.sqrt() * guess) / (1 - a).sqrt()

    moved = [
        float(
            (sdedit(halfway, image, schedule, strength=s, steps=50, generator=generator(), eta=0.0) - image)
            .abs()
            .mean()
        )
        for s in (0.1, 0.3, 0.6)
    ]
    assert moved[0] < moved[1] < moved[2]


def test_the_hook_sees_every_step_and_may_change_the_image():
    seen = []

    def hook(x: Tensor, t: int) -> Tensor:
        seen.append(t)
        return torch.zeros_like(x) if t == 0 else x

    schedule, image = Schedule.cosine(), torch.ones(1, 3, 8, 8)
    found = sdedit(
        exact(image, schedule), image, schedule, strength=0.1, steps=50, generator=generator(), after_step=hook
    )
    assert seen == [80, 60, 40, 20, 0] and not found.any()


def test_ddim_refuses_what_it_cannot_do():
    schedule, x = Schedule.cosine(), torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match="fall"):
        ddim(exact(x, schedule), x, schedule, [10, 20])
    with pytest.raises(ValueError, match="generator"):
        ddim(exact(x, schedule), x, schedule, [20, 10], eta=1.0)


# --------------------------------------------------------------------------------------------------------- the networks


def test_a_new_denoiser_predicts_nothing_and_knows_the_time_once_trained():
    network, x, t = small(), torch.rand(2, 3, 12, 8), torch.tensor([10, 500])
    assert not network(x, t).any()
    shaken(network)
    assert network(x, t).shape == x.shape
    assert not torch.allclose(network(x, t), network(x, t.flip(0)))
    with pytest.raises(ValueError, match="multiples of 4"):
        network(torch.rand(1, 3, 10, 8), t[:1])


def test_control_changes_nothing_at_the_start_and_learns():
    network = shaken(small())
    control = ControlBranch(network)
    x, t, condition = torch.rand(2, 3, 8, 8), torch.tensor([10, 500]), torch.rand(2, 3, 8, 8)
    alone, both = network(x, t), Controlled(network, control)
    assert torch.equal(both(x, t, condition), alone)
    both(x, t, condition).square().sum().backward()
    moved = {name for name, p in control.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"outputs.0.weight", "outputs.2.weight"} <= moved  # zero convolutions learn from the first step on
    shaken(control)
    assert not torch.allclose(both(x, t, condition), alone)
    assert torch.equal(both(x, t, condition, 0.0), alone)
    assert not torch.allclose(both(x, t, condition), both(x, t, 1 - condition))


def test_control_takes_conditions_of_another_shape_through_a_hint():
    network = shaken(small())
    control = ControlBranch(network, hint=nn.Sequential(nn.Upsample(scale_factor=4), nn.Conv2d(5, 8, 1)))
    residuals = control(torch.rand(1, 3, 8, 8), torch.tensor([3]), torch.rand(1, 5, 1, 1))
    assert [list(r.shape) for r in residuals] == [[1, 8, 4, 4], [1, 16, 2, 2], [1, 16, 2, 2]]


# ----------------------------------------------------------------------------------------------- low-rank adaptation


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(6, 5, 3, stride=2, padding=1)])
def test_low_rank_starts_as_the_layer_and_adds_a_change_of_that_rank(layer: nn.Linear | nn.Conv2d):
    x = torch.rand(2, 6, 6, 6) if isinstance(layer, nn.Conv2d) else torch.rand(2, 6)
    adapted = lora.LowRank(layer, 2, alpha=4)
    assert torch.equal(adapted(x), layer(x))
    nn.init.normal_(adapted.up.weight)
    change = adapted(x) - layer(x)
    torch.testing.assert_close(change, 2 * adapted.up(adapted.down(x)))
    if isinstance(layer, nn.Linear):
        eye = torch.eye(6)
        assert torch.linalg.matrix_rank(adapted(eye) - layer(eye), tol=1e-5) == 2


def test_only_chosen_layers_adapt_and_only_their_new_parameters_train():
    network = shaken(small())
    before = {name: p.clone() for name, p in network.named_parameters()}
    trained = lora.add(network, lambda name: "query" in name or name.endswith("first.2"), rank=2)
    assert {id(p) for p in network.parameters() if p.requires_grad} == {id(p) for p in trained}
    x, t = torch.rand(1, 3, 8, 8), torch.tensor([100])
    expected = network(x, t)
    result = train(
        network,
        lambda net, draw: (net(x, t) - 1).square().mean(),
        steps=5,
        learning_rate=1e-2,
        seed=0,
        parameters=trained,
    )
    assert not torch.allclose(result.network(x, t), expected) and result.losses[-1] < result.losses[0]
    for name, value in before.items():
        place = name if name in dict(network.named_parameters()) else name.replace(".weight", ".layer.weight")
        place = place if place in dict(network.named_parameters()) else name.replace(".bias", ".layer.bias")
        assert torch.equal(network.get_parameter(place), value), name
    fresh = shaken(small())
    lora.add(fresh, lambda name: "query" in name or name.endswith("first.2"), rank=2)
    fresh.load_state_dict(lora.state(network), strict=False)
    assert torch.equal(fresh.eval()(x, t), network(x, t))


def test_adapting_nothing_is_an_error():
    with pytest.raises(ValueError, match="none"):
        lora.add(small(), lambda name: False, rank=2)


# ------------------------------------------------------------------------------------------------------------- training


def batch_loss(schedule: Schedule):
    images = torch.rand(6, 3, 8, 8, generator=generator(5)) * 2 - 1

    def loss(network: nn.Module, draw: torch.Generator) -> Tensor:
        chosen = torch.randint(len(images), (4,), generator=draw)
        return epsilon_loss(network, images[chosen], schedule, draw)

    return loss


def fitted(steps: int, **options):
    torch.manual_seed(0)
    network = Denoiser(width=8, depth=2)
    return train(network, batch_loss(Schedule.cosine()), steps=steps, learning_rate=2e-3, seed=0, ema=0.9, **options)


def test_training_lowers_the_loss_and_repeats_bit_for_bit():
    first, second = fitted(60), fitted(60)
    assert sum(first.losses[-10:]) < 0.9 * sum(first.losses[:10])  # 1 at the start: the prediction is 0
    assert first.losses == second.losses
    for a, b in zip(first.network.parameters(), second.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_resumed_training_is_the_one_that_never_stopped(tmp_path: Path):
    whole, kept = fitted(12), tmp_path / "network.pt"

    def until_nine(iterable, title):
        class Bar(list):
            def set_postfix(self, **values):
                pass

            def __iter__(self):
                for step in iterable:
                    if step == 9:
                        raise KeyboardInterrupt
                    yield step

        return Bar()

    with pytest.raises(KeyboardInterrupt):
        fitted(12, checkpoint=kept, progress=until_nine)
    rest = fitted(12, checkpoint=kept)
    assert rest.losses == whole.losses
    for a, b in zip(rest.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_loss_that_is_not_finite_ends_the_training():
    with pytest.raises(FloatingPointError, match="step 1"):
        train(small(), lambda net, draw: torch.tensor(math.nan), steps=2, learning_rate=1e-3, seed=0)


def test_the_running_mean_follows_slowly_and_soon_forgets_the_start():
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    mean = EMA(network, 0.99)
    nn.init.ones_(network.weight)
    mean.update()
    assert float(mean.network.weight) == pytest.approx(1 - 2 / 11)
    for _ in range(20):
        mean.update()
    assert 0.99 < float(mean.network.weight) <= 1
