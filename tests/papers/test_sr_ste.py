"""SR-STE's method: the equations by hand, groups by hand, and what the pull does and does not touch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.data.planted import planted
from common.sparsity import NMConfig, sparsify_
from papers.sr_ste import experiment, method


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------- equations


def test_choice_is_the_largest_of_each_group_of_input_channels():
    weight = torch.tensor([[3.0, -4.0, 1.0, 2.0], [0.0, 0.5, -0.1, 0.2]])
    assert method.choose(weight, 1, 2).tolist() == [[False, True, False, True], [False, True, False, True]]
    assert method.choose(weight, 2, 4).tolist() == [[True, True, False, False], [False, True, False, True]]
    kernel = torch.stack([weight, weight.flip(1)], dim=-1)[..., None]  # [2, 4, 2, 1]: two kernel positions
    kept = method.choose(kernel, 1, 2)
    assert torch.equal(kept[:, :, 0, 0], method.choose(weight, 1, 2))
    assert torch.equal(kept[:, :, 1, 0], method.choose(weight.flip(1), 1, 2))


def test_the_pull_shrinks_what_is_left_out_and_touches_nothing_else():
    weight, gradient = normal(4, 8), normal(4, 8, seed=1)
    kept = method.choose(weight, 2, 4)
    plain = method.ste(weight, gradient, rate=0.1)
    pulled = method.sr_ste(weight, kept, gradient, rate=0.1, decay=0.5)
    assert torch.equal(pulled[kept], plain[kept])
    torch.testing.assert_close(pulled[~kept], plain[~kept] - 0.05 * weight[~kept])
    assert torch.equal(method.sr_ste(weight, kept, gradient, rate=0.1, decay=0.0), plain)


def test_sad_counts_the_places_that_differ():
    before = torch.tensor([[True, False, True, False]])
    assert method.sad(before, before) == 0
    assert method.sad(before, ~before) == 4
    assert method.sad(before, torch.tensor([[True, True, False, False]])) == 2


def test_least_squares_follows_its_gradient():
    """One step against autograd through the sparse weight, with the gradient handed on unchanged."""
    weight, x, y = normal(3, 8), normal(5, 8, seed=1), normal(5, 3, seed=2)
    used = method.sparse(weight, method.choose(weight, 1, 4)).requires_grad_()
    (0.5 * (x @ used.T - y).square().sum() / 5).backward()
    run = method.fit_linear(weight, [(x, y)], 1, 4, rate=0.1, decay=0.0)
    torch.testing.assert_close(run.weight, weight - 0.1 * used.grad)
    assert len(run.choices) == 2
    assert run.flips == method.sad(*run.choices) / 24


def test_the_dense_limit_is_ordinary_regression():
    data = planted(4, 4, inputs=8, outputs=3, samples=200, seed=0, noise=0.0)
    run = method.fit_linear(torch.zeros(3, 8), [(data.inputs, data.targets)] * 400, 4, 4, rate=0.3, decay=1.0)
    torch.testing.assert_close(run.weight, data.weight, atol=1e-4, rtol=0)
    assert run.flips == 0


# ------------------------------------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize("name", ["ste", "sr_ste"])
def test_layers_give_the_weights_of_the_equations(name):
    decay = 0.3 if name == "sr_ste" else 0.0
    difference = experiment.ten_steps(name, decay) - experiment.ten_steps_written_out(decay)
    assert difference.abs().max() < 1e-12
    assert (experiment.ten_steps(name, decay) - experiment.ten_steps_written_out(0.1)).abs().max() > 1e-3


def test_a_watched_network_trains_as_a_dense_one():
    x, y = normal(16, 8), normal(16, 4, seed=1)
    weights = []
    for watched in (False, True):
        layer = nn.Linear(8, 4)
        with torch.no_grad():
            layer.weight.copy_(normal(4, 8, seed=2))
            layer.bias.zero_()
        model = nn.ModuleDict({"layer": layer})
        config = NMConfig(1, 4, where=["layer"], recipe=method.recipe("dense"))
        handle = sparsify_(model, config) if watched else None
        for _ in range(5):
            loss = (layer(x) - y).square().mean()
            (gradient,) = torch.autograd.grad(loss, layer.weight)
            with torch.no_grad():
                layer.weight.sub_(0.1 * gradient)
            if handle:
                handle.step()
        weights.append(layer.weight.detach().clone())
        if handle:
            assert torch.equal(handle.masks()["layer"], method.choose(layer.weight.detach(), 1, 4))
    assert torch.equal(*weights)


def test_groups_along_positions_take_neighbours_as_they_lie_in_memory():
    layer = nn.Conv2d(4, 1, (1, 3), bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(12.0).view(1, 4, 1, 3))
    model = nn.ModuleDict({"conv": layer})
    handle = sparsify_(model, NMConfig(1, 4, where=["conv"], recipe=method.recipe("by_position")))
    kept = handle.masks()["conv"].flatten().nonzero().flatten()
    assert kept.tolist() == [3, 7, 11], "the last of each four, across input channels"
    assert experiment.violations(handle) == 0


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ValueError, match="expected one of dense, ste"):
        method.recipe("srste")


# -------------------------------------------------------------------------------------------------- the released code


def test_released_groups_of_a_small_kernel_by_hand():
    """Two filters of one position with three channels, six weights in groups of two: 01 | 2 3 | 45."""
    found = method.released_groups((2, 3, 1, 1), 2)
    assert found.positions == found.filters == pytest.approx(1 / 3)
    found = method.released_groups((2, 3, 1, 2), 2)  # 01 | 23 | 45 || 67 | 89 | ..: only positions are crossed
    assert (found.positions, found.filters) == (pytest.approx(1 / 3), 0)


def test_released_groups_of_resnets_stem():
    found = method.released_groups((64, 3, 7, 7), 4)
    assert found.positions == 1
    assert found.filters == pytest.approx(48 / 2352)  # 147 weights a filter: three of four borders cut a group
    with pytest.raises(ValueError, match="multiple of m = 5"):
        method.released_groups((64, 3, 7, 7), 5)


# ------------------------------------------------------------------------------------------------------------ planted


def test_a_moderate_pull_finds_the_teacher_and_too_much_freezes_the_first_guess():
    found = {name: experiment.search_planted(decay, seed=7) for name, decay in experiment.PLANTED_DECAYS.items()}
    assert found["moderate"].recovered > 0.98 > found["none"].recovered > found["large"].recovered
    assert found["none"].flips > found["small"].flips > found["moderate"].flips > found["large"].flips
    assert found["moderate"].error < 0.1 * found["none"].error
    assert (found["large"].kept & found["large"].teacher).sum() / found["large"].teacher.sum() == pytest.approx(
        found["large"].recovered
    )
