"""Gaussians that come and go: nothing is lost or mixed up on the way, and the rules are those of 3DGS and MCMC."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.splatting.cameras import Camera, intrinsics
from common.splatting.model import FIELDS, Gaussians
from common.splatting.population import Population
from common.splatting.strategies import DefaultStrategy, MCMCStrategy, Strategy


def some_gaussians(count: int, seed: int = 0) -> Gaussians:
    """In front of `camera()`, about 0.1 wide."""
    g = torch.Generator().manual_seed(seed)
    return Gaussians(
        torch.randn(count, 3, generator=g) * 0.5 + torch.tensor([0.0, 0.0, 3.0]),
        torch.randn(count, 3, generator=g) * 0.3 + math.log(0.1),
        torch.randn(count, 4, generator=g),
        torch.randn(count, generator=g),
        torch.randn(count, 1, 3, generator=g),
        torch.randn(count, 3, 3, generator=g) * 0.1,
    )


def camera() -> Camera:
    return Camera(torch.eye(4), intrinsics(48, 36, fov_x_rad=0.9), 48, 36)


def trained(count: int = 20, extent: float = 1.0) -> Population:
    """A population whose Adam moments and statistics can be told apart Gaussian by Gaussian."""
    population = Population(some_gaussians(count), extent)
    for _ in range(2):
        for name in FIELDS:
            parameter = getattr(population.model, name)
            parameter.grad = torch.arange(1.0, parameter.numel() + 1).view_as(parameter)
        population.optimizer.step()
        population.optimizer.zero_grad()
    population.statistic("number")[:] = torch.arange(count)
    return population


def moments(population: Population, name: str) -> dict[str, Tensor]:
    state = population.optimizer.state[getattr(population.model, name)]
    return {key: state[key].clone() for key in ("exp_avg", "exp_avg_sq")}


def seen_by(population: Population, gradients: Tensor, radii: Tensor, *, packed: bool = False) -> dict[str, Any]:
    """The rasterizer's meta for one camera: gradients [N, 2] in pixels, radii [N]."""
    means2d = torch.zeros(1, len(population), 2)
    both = radii[None, :, None].expand(1, -1, 2).int()
    meta = {"width": 48, "height": 36, "n_cameras": 1, "gaussian_ids": None, "radii": both, "means2d": means2d}
    means2d.grad = gradients[None]
    if packed:
        ids = radii.nonzero()[:, 0]
        chosen = torch.zeros(len(ids), 2)
        chosen.grad = gradients[ids]
        meta |= {"gaussian_ids": ids, "radii": both[0, ids], "means2d": chosen}
    return meta


def test_strategies_keep_the_interface() -> None:
    assert isinstance(DefaultStrategy(), Strategy) and isinstance(MCMCStrategy(), Strategy)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_change_keeps_parameters_moments_and_statistics_together(data: st.DataObject) -> None:
    population = trained(9)
    before = population.model.values()
    old = {name: moments(population, name) for name in FIELDS}
    source = torch.tensor(data.draw(st.lists(st.integers(0, 8), min_size=1, max_size=20)))
    fresh = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(source), max_size=len(source))))
    moved = torch.randn(int(fresh.sum()), 3)
    population.change(source, fresh, means=moved)

    assert len(population) == len(source)
    for name in FIELDS:
        parameter = getattr(population.model, name)
        expected = before[name][source]
        if name == "means":
            expected[fresh] = moved
        assert torch.equal(parameter.detach(), expected), name
        assert population.group(name)["params"] == [parameter]
        for key, value in moments(population, name).items():
            kept = old[name][key][source]
            kept[fresh] = 0
            assert torch.equal(value, kept), (name, key)
    assert torch.equal(population.statistic("number"), source.float())
    assert len(population.optimizer.state) == len(FIELDS)  # nothing is left of the old parameters


def test_a_mask_keeps_and_training_goes_on() -> None:
    population = trained(10)
    keep = torch.arange(10) % 3 != 0
    expected = population.model.values()["means"][keep]
    population.change(keep)
    assert torch.equal(population.model.means.detach(), expected)
    steps = [float(population.optimizer.state[getattr(population.model, name)]["step"]) for name in FIELDS]
    assert steps == [2.0] * len(FIELDS)
    population.group("means")["lr"] = 0.1
    population.model.means.sum().backward()
    population.optimizer.step()
    assert bool((population.model.means.detach() != expected).all())


def test_a_population_comes_back_bit_for_bit() -> None:
    population, other = trained(12), Population(some_gaussians(5), 7.0)
    other.restore(population.state())
    assert other.extent == population.extent
    assert torch.equal(other.statistic("number"), population.statistic("number"))
    for each in (population, other):
        each.group("means")["lr"] = 0.1
        each.model.means.square().sum().backward()
        each.optimizer.step()
    assert torch.equal(population.model.means, other.model.means)


def test_without_extent_there_is_no_unit_of_length() -> None:
    with pytest.raises(ValueError, match=r"TrainSettings\.extent"):
        Population(some_gaussians(3), 0.0)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_averaged_over_the_views_that_see_a_gaussian(packed: bool) -> None:
    population, strategy = trained(4), DefaultStrategy()
    gradients = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 4.0], [9.0, 9.0]])
    strategy.after_backward(1, population, seen_by(population, gradients, torch.tensor([5, 5, 5, 0]), packed=packed))
    strategy.after_backward(2, population, seen_by(population, gradients, torch.tensor([5, 0, 5, 0]), packed=packed))
    # pixels -> half the image: 24 and 18
    expected = torch.tensor([48.0, 18.0, 2 * math.hypot(3 * 24, 4 * 18), 0.0])
    assert torch.allclose(population.statistic("gradient"), expected)
    assert torch.equal(population.statistic("seen"), torch.tensor([2.0, 1.0, 2.0, 0.0]))


def test_the_largest_radius_counts_where_radii_count() -> None:
    population, strategy = trained(2), DefaultStrategy(scale2d_until=100)
    for radius in (6, 24, 12):
        strategy.after_backward(1, population, seen_by(population, torch.zeros(2, 2), torch.tensor([radius, 0])))
    assert torch.equal(population.statistic("radius"), torch.tensor([0.5, 0.0]))


def grown(strategy: DefaultStrategy, population: Population, gradient: Tensor) -> dict[str, Tensor]:
    """The population after a refinement at which the Gaussians had these mean gradients; returns what was before."""
    before = population.model.values() | {"number": population.statistic("number").clone()}
    population.statistic("gradient")[:] = gradient
    population.statistic("seen")[:] = 1
    strategy.after_update(600, population, torch.Generator().manual_seed(0))
    return before


def test_small_ones_are_duplicated_large_ones_split_and_the_rest_stays() -> None:
    population = trained(6)
    population.model.opacity_logits.data.fill_(0.0)
    population.model.log_scales.data[:3] = math.log(0.005)  # below 0.01 of the extent
    population.model.log_scales.data[3:] = math.log(0.05)
    old = moments(population, "means")
    before = grown(DefaultStrategy(), population, torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 1.0]))

    after = population.model.values()
    assert len(population) == 6 + 1 + 2
    stay = [0, 1, 2, 3]
    for name in FIELDS:
        assert torch.equal(after[name][:4], before[name][stay])
        assert torch.equal(after[name][4], before[name][1])  # the duplicate
    assert torch.equal(moments(population, "means")["exp_avg"][:4], old["exp_avg"][stay])
    assert bool((moments(population, "means")["exp_avg"][4:] == 0).all())
    parts = slice(5, 9)  # of 4, 5, 4, 5
    assert torch.allclose(after["log_scales"][parts], before["log_scales"][[4, 5, 4, 5]] - math.log(1.6))
    assert torch.equal(after["opacity_logits"][parts], before["opacity_logits"][[4, 5, 4, 5]])
    distance = (after["means"][parts] - before["means"][[4, 5, 4, 5]]).norm(dim=1)
    assert bool((distance > 0).all()) and float(distance.max()) < 6 * 0.05  # six standard deviations
    assert all(bool((population.statistic(name) == 0).all()) for name in ("gradient", "seen", "radius"))
    assert population.statistic("number").tolist() == [0, 1, 2, 3, 1, 4, 5, 4, 5]  # somebody else's stays


def test_parts_of_a_split_are_drawn_from_the_gaussian() -> None:
    """Offsets of many parts have the covariance of the Gaussian that was split."""
    count = 4000
    quaternion, scales = torch.tensor([0.3, -0.8, 0.4, 1.1]), torch.tensor([0.3, 0.1, 0.02])
    model = Gaussians(
        torch.zeros(count, 3),
        scales.log().expand(count, 3),
        quaternion.expand(count, 4),
        torch.zeros(count),
        torch.zeros(count, 1, 3),
        torch.zeros(count, 0, 3),
    )
    population = Population(model, 1.0)
    grown(DefaultStrategy(), population, torch.ones(count))
    offsets = population.model.means.detach()
    assert len(offsets) == 2 * count
    w, x, y, z = (quaternion / quaternion.norm()).tolist()
    rotation = torch.tensor(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    along = offsets @ rotation / scales  # standard normal in the Gaussian's own axes
    # of 8000 draws, means and covariances scatter by 1/sqrt(8000) = 0.011
    assert float(along.mean(dim=0).abs().max()) < 0.06
    assert float((along.T @ along / len(along) - torch.eye(3)).abs().max()) < 0.08


def test_growth_stops_at_the_limit_and_the_largest_gradients_go_first() -> None:
    population = trained(6)
    population.model.opacity_logits.data.fill_(0.0)
    population.model.log_scales.data.fill_(math.log(0.005))
    before = grown(DefaultStrategy(most=8), population, torch.tensor([1.0, 5.0, 2.0, 6.0, 3.0, 4.0]))
    assert torch.equal(population.model.means.detach()[6:], before["means"][[1, 3]])
    full = trained(6)
    full.model.opacity_logits.data.fill_(0.0)
    grown(DefaultStrategy(most=6), full, torch.ones(6))
    assert len(full) == 6


def test_faint_ones_go_and_huge_ones_after_the_first_reset() -> None:
    def left(step: int) -> list[float]:
        population = trained(5)
        population.model.opacity_logits.data.fill_(0.0)
        population.model.opacity_logits.data[1] = -6.0  # 0.0025
        population.model.log_scales.data.fill_(math.log(0.05))
        population.model.log_scales.data[3, 1] = math.log(0.2)  # above 0.1 of the extent
        numbers = population.model.means.detach()[:, 0].tolist()
        DefaultStrategy(reset_every=1000).after_update(step, population, torch.Generator())
        return [numbers.index(x) for x in population.model.means.detach()[:, 0].tolist()]

    assert left(700) == [0, 2, 3, 4]
    assert left(1100) == [0, 2, 4]
    assert left(701) == [0, 1, 2, 3, 4]  # not a multiple of 100
    assert left(500) == [0, 1, 2, 3, 4]  # not after `first`
    assert left(15_000) == [0, 1, 2, 3, 4]  # not before `until`


def test_a_reset_lowers_opacities_and_forgets_their_moments() -> None:
    population = trained(5)
    population.model.opacity_logits.data[:] = torch.tensor([-8.0, -4.0, 0.0, 2.0, 5.0])
    means = moments(population, "means")
    DefaultStrategy(first=5000).after_update(3000, population, torch.Generator())
    opacities = population.model.opacity_logits.detach().sigmoid()
    ceiling = 0.01  # twice prune_opacity
    assert torch.allclose(opacities, torch.tensor([-8.0, -4.0, 0.0, 2.0, 5.0]).sigmoid().clamp_max(ceiling))
    assert all(bool((value == 0).all()) for value in moments(population, "opacity_logits").values())
    assert torch.equal(moments(population, "means")["exp_avg"], means["exp_avg"])


def test_growing_waits_after_a_reset() -> None:
    population = trained(4)
    population.statistic("gradient")[:] = 1
    population.statistic("seen")[:] = 1
    strategy = DefaultStrategy(reset_every=1000, pause_after_reset=200)
    strategy.after_update(1100, population, torch.Generator())
    assert len(population) == 4
    strategy.after_update(1200, population, torch.Generator())
    assert len(population) > 4


def test_revised_opacity_leaves_two_parts_as_opaque_as_one() -> None:
    population = trained(3)
    population.model.opacity_logits.data.fill_(1.0)
    grown(DefaultStrategy(revised_opacity=True), population, torch.ones(3))
    parts = population.model.opacity_logits.detach().sigmoid()
    assert torch.allclose(1 - (1 - parts[:3]) * (1 - parts[3:]), torch.tensor(1.0).sigmoid().expand(3), atol=1e-6)


@pytest.mark.parametrize("radii", [False, True])
def test_growing_and_pruning_are_gsplats(radii: bool) -> None:
    """The same numbers as gsplat's own strategy from the same random stream."""
    theirs = pytest.importorskip("gsplat.strategy", reason="gsplat is not installed (it comes with nerfstudio)")
    population = trained(60)
    population.model.log_scales.data.add_(torch.linspace(-3, 1, 60)[:, None])
    g = torch.Generator().manual_seed(5)
    gradient, radius = torch.rand(60, generator=g) * 4e-4, torch.rand(60, generator=g) * 0.05
    values = population.model.values()
    names = {"log_scales": "scales", "opacity_logits": "opacities"}
    params = torch.nn.ParameterDict({names.get(name, name): value.clone() for name, value in values.items()})
    optimizers = {name: torch.optim.Adam([{"params": p, "name": name}]) for name, p in params.items()}
    state = {"grad2d": gradient.clone(), "count": torch.ones(60), "scene_scale": 1.0, "radii": radius.clone()}
    limits: dict[str, Any] = {"grow_scale2d": 0.04, "prune_scale2d": 0.045} if radii else {}
    until = 10_000 if radii else 0
    gsplat = theirs.DefaultStrategy(prune_opa=0.2, refine_scale2d_stop_iter=until, **limits)
    torch.manual_seed(7)
    gsplat._grow_gs(params, optimizers, state, 4000)
    gsplat._prune_gs(params, optimizers, state, 4000)

    population.statistic("radius")[:] = radius
    population.statistic("gradient")[:] = gradient
    population.statistic("seen")[:] = 1
    ours = DefaultStrategy(prune_opacity=0.2, scale2d_until=until, **limits)
    ours.after_update(4000, population, torch.Generator().manual_seed(7))
    assert 0 < len(population) != 60
    for name in FIELDS:
        found, expected = population.model.values()[name], params[names.get(name, name)].detach()
        assert found.shape == expected.shape, name
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6), name


def picture(population: Population) -> Tensor:
    return population.model.render(camera()).image.detach()


def test_relocation_hardly_changes_the_picture() -> None:
    population = trained(40)
    population.model.opacity_logits.data.clamp_(-1.0, 2.0)
    population.model.opacity_logits.data[30:] = -5.5  # 0.0041: below min_opacity
    before, dead = picture(population), population.model.means.detach()[30:].clone()
    MCMCStrategy(noise=0.0, growth=0.0).after_update(600, population, torch.Generator().manual_seed(0))
    assert len(population) == 40
    moved = population.model.means.detach()[30:]
    assert bool((moved != dead).any(dim=1).all())
    hosts = population.model.means.detach()[:30]
    assert bool((moved[:, None] == hosts).all(dim=-1).any(dim=1).all())
    after = picture(population)
    # copies share a contribution so that their sum is the same in the middle and nearly so elsewhere
    assert float((after - before).abs().mean()) < 0.01
    # whereas without the correction the change is several times as large
    population.model.opacity_logits.data[:30] = trained(40).model.opacity_logits.data[:30].clamp(-1.0, 2.0)
    population.model.log_scales.data[:30] = trained(40).model.log_scales.data[:30]
    assert float((picture(population) - before).abs().mean()) > 2 * float((after - before).abs().mean())


def test_relocated_ones_and_their_hosts_start_with_new_moments() -> None:
    population = trained(8)
    population.model.opacity_logits.data.fill_(0.0)
    population.model.opacity_logits.data[5] = -7.0
    MCMCStrategy(noise=0.0, growth=0.0).after_update(600, population, torch.Generator().manual_seed(0))
    new = (moments(population, "means")["exp_avg"] == 0).all(dim=1)
    assert bool(new[5]) and int(new.sum()) == 2
    host = int((population.model.means.detach() == population.model.means.detach()[5]).all(dim=1).nonzero()[0, 0])
    assert bool(new[host])
    a, b = population.model.opacity_logits.detach().sigmoid()[[5, host]].tolist()
    assert a == pytest.approx(b) and 1 - (1 - a) ** 2 == pytest.approx(0.5, abs=1e-5)


def test_the_number_grows_by_a_twentieth_to_the_cap() -> None:
    population = trained(100)
    population.model.opacity_logits.data.fill_(0.0)
    strategy, counts = MCMCStrategy(most=118, noise=0.0), []
    for step in (500, 550, 600, 700, 800, 900):
        strategy.after_update(step, population, torch.Generator().manual_seed(step))
        counts.append(len(population))
    assert counts == [100, 100, 105, 110, 115, 118]
    strategy.after_update(25_000, population, torch.Generator())
    assert len(population) == 118


def test_noise_moves_faint_ones_along_their_shape_and_leaves_opaque_ones() -> None:
    population = trained(200)
    population.model.log_scales.data[:] = torch.tensor([0.3, 0.03, 0.03]).log()
    population.model.quats.data[:] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    population.model.opacity_logits.data[:100] = -8.0
    population.model.opacity_logits.data[100:] = 3.0
    population.group("means")["lr"] = 1e-5
    before = population.model.means.detach().clone()
    MCMCStrategy().after_update(1, population, torch.Generator().manual_seed(0))
    moved = population.model.means.detach() - before
    assert float(moved[100:].abs().max()) < 1e-6
    spread = moved[:100].std(dim=0)
    # noise * lr * covariance: 5e5 * 1e-5 * 0.09 = 0.45 along the long axis; 100 draws scatter by 7 %
    fade = torch.sigmoid(100 * (1 - torch.tensor(-8.0).sigmoid() - 0.995))
    assert float(spread[0]) == pytest.approx(0.45 * float(fade), rel=0.3)
    assert float(spread[0] / spread[1]) == pytest.approx(100, rel=0.5)


def test_when_all_are_dead_nothing_moves() -> None:
    population = trained(5)
    population.model.opacity_logits.data.fill_(-9.0)
    before = population.model.means.detach().clone()
    MCMCStrategy(noise=0.0, growth=0.0).after_update(600, population, torch.Generator())
    assert torch.equal(population.model.means.detach(), before)
