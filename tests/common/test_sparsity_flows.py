"""Schedules of the progressive flows and of gradual pruning, at their landmarks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from common.sparsity import (
    Gradual,
    MDGFExponential,
    MDGFLinear,
    NMConfig,
    SDGFGeometric,
    SDGFStepwise,
    sparsify_,
)


def patterns(recipe, n: int, m: int, steps) -> list[tuple[int, int]]:
    return [(recipe.rule(step, n, m).n, recipe.rule(step, n, m).m) for step in steps]


def test_linear_falls_to_zero_where_fine_tuning_begins():
    flow = MDGFLinear(100, dense=20, fine_tune=30)
    betas = [flow.rule(step, 1, 16).beta for step in (20, 45, 69, 70, 99, 500)]
    assert betas == pytest.approx([1.0, 0.5, 0.02, 0.0, 0.0, 0.0])
    assert flow.rule(19, 1, 16).dense and not flow.rule(20, 1, 16).dense
    assert MDGFLinear(4000, c=8e-4).rule(1250, 1, 16).beta == 0.0, "the authors' 8e-4 a step ends after 1250"


def test_exponential_decays_by_the_authors_eleven():
    flow = MDGFExponential(1100)
    assert flow.rule(0, 1, 16).beta == 1.0
    assert flow.rule(100, 1, 16).beta == pytest.approx(math.exp(-1))
    assert flow.rule(1099, 1, 16).beta == pytest.approx(math.exp(-10.99))
    assert flow.rule(1100, 1, 16).beta == 0.0, "the last mask is hard"
    half_life = next(s for s in range(10000) if MDGFExponential(110_000, c=1e-4).rule(s, 1, 32).beta < 0.5)
    assert half_life == math.ceil(math.log(2) / 1e-4)


def test_stepwise_halves_from_one_less_than_dense():
    flow = SDGFStepwise(50)
    assert flow.stages(1, 16) == [(15, 16), (8, 16), (4, 16), (2, 16), (1, 16)]
    assert patterns(flow, 1, 16, [0, 9, 10, 20, 39, 40, 49, 50]) == [
        (15, 16), (15, 16), (8, 16), (4, 16), (2, 16), (1, 16), (1, 16), (1, 16)
    ]  # fmt: skip
    assert flow.stages(2, 4) == [(3, 4), (2, 4)]
    assert flow.stages(2, 8) == [(7, 8), (4, 8), (2, 8)]
    assert flow.stages(3, 8) == [(7, 8), (4, 8), (3, 8)]
    assert flow.stages(1, 2) == [(1, 2)]
    mean = sum(n / m for n, m in patterns(flow, 1, 16, range(50))) / 50
    assert mean == pytest.approx((15 + 8 + 4 + 2 + 1) / 16 / 5) == 0.375


def test_geometric_keeps_the_density_and_shrinks_the_block():
    flow = SDGFGeometric(48, dense=4, fine_tune=4)
    assert patterns(flow, 1, 16, [3, 4, 13, 14, 24, 34, 43, 44]) == [
        (16, 16), (8, 128), (8, 128), (4, 64), (2, 32), (1, 16), (1, 16), (1, 16)
    ]  # fmt: skip
    assert flow.widest(16) == 128
    assert patterns(SDGFGeometric(4, blocks=(2, 1)), 2, 4, range(4)) == [(4, 8), (4, 8), (2, 4), (2, 4)]


@pytest.mark.parametrize("flow", [MDGFLinear, MDGFExponential, SDGFStepwise, SDGFGeometric])
def test_every_flow_has_its_phases_and_its_gradient(flow):
    recipe = flow(30, dense=10, fine_tune=10, grad_mode="scaled")
    assert all(recipe.rule(step, 2, 8).dense for step in range(10))
    for step in range(20, 40):
        rule = recipe.rule(step, 2, 8)
        assert (rule.n, rule.m, rule.beta, rule.decay, rule.grad_mode) == (2, 8, 0.0, 0.0, "scaled")
    assert flow(30).rule(15, 2, 8).grad_mode == "ste"


def test_cubic_pruning():
    gmp = Gradual(110, start=10)
    assert [gmp.sparsity(step, 2, 16) for step in (0, 10)] == [0.0, 0.0]
    assert gmp.sparsity(60, 2, 16) == pytest.approx(0.875 * (1 - 0.5**3))
    assert [gmp.sparsity(step, 2, 16) for step in (110, 999)] == [0.875, 0.875]
    assert Gradual(110, start=10, every=25).sparsity(84, 2, 16) == gmp.sparsity(60, 2, 16)
    kept = [gmp.rule(step, 2, 16).n for step in range(120)]
    assert kept[0] == 16 and kept[-1] == 2 and kept == sorted(kept, reverse=True)
    assert kept[60] == math.ceil(16 * (1 - gmp.sparsity(60, 2, 16)))


def test_pruned_stays_pruned_under_gradual_pruning():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    handle = sparsify_(model, NMConfig(2, 8, where=["0"], recipe=Gradual(10)))
    masks = []
    for _ in range(12):
        with torch.no_grad():
            model[0].weight.copy_(torch.randn(8, 16))  # whatever the weights do
        handle.step()
        masks.append(handle.masks().get("0", torch.ones(8, 16, dtype=torch.bool)))
    assert all(not (late & ~early).any() for early, late in itertools.pairwise(masks))
    assert masks[-1].sum() == 8 * 16 / 4


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MDGFLinear(10, dense=5, fine_tune=5), "5 dense and 5 fine-tuning of 10"),
        (lambda: MDGFLinear(0), "of 0"),
        (lambda: SDGFStepwise(10, dense=-1), "-1 dense"),
        (lambda: MDGFExponential(10, grad_mode="half"), "grad_mode 'half'"),  # type: ignore[arg-type]
        (lambda: SDGFGeometric(10, blocks=(2, 4, 1)), "falling"),
        (lambda: SDGFGeometric(10, blocks=(4, 2)), "end in 1"),
        (lambda: Gradual(5, start=5), "5 to 5"),
        (lambda: Gradual(5, every=0), "every 0"),
    ],
)
def test_phases_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()
