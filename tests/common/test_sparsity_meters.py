"""Meters: multiply-accumulates against numbers by hand and torch's counter, mask movement and gradient variance."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common.sparsity import (
    BDWP,
    SRSTE,
    STE,
    Dense,
    Fixed,
    FlopMeter,
    GradientVariance,
    MaskMeter,
    MDGFLinear,
    NMConfig,
    Passes,
    SDGFStepwise,
    sparsify_,
)


def everything(name: str, layer: nn.Module) -> bool:
    return True


def small_net(groups: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    first, second = nn.Conv2d(4, 8, 3, padding=1, stride=2), nn.Conv2d(8, 8, 3, groups=groups)
    return nn.Sequential(first, nn.ReLU(), second, nn.Flatten(), nn.Linear(32, 8))


# images [3, 4, 8, 8]: 16 positions of 8 x 4 x 9, 4 positions of 8 x 4 x 9, one of 8 x 32, each times 3 images
BY_HAND = {"0": 3 * 16 * 8 * 4 * 9, "2": 3 * 4 * 8 * 4 * 9, "4": 3 * 8 * 32}


def test_dense_counts_by_hand():
    model = small_net()
    with FlopMeter(model) as meter:
        model(torch.ones(3, 4, 8, 8)).sum().backward()
    assert {name: count.dense.forward for name, count in meter.layers.items()} == BY_HAND
    total = sum(BY_HAND.values())
    assert meter.dense == meter.sparse == Passes(total, total - BY_HAND["0"], total)  # images need no gradient
    model(torch.ones(3, 4, 8, 8))
    assert meter.dense.forward == total, "closed"


def test_dense_counts_are_those_of_torch():
    """torch counts two operations a multiply-accumulate. (It forgets groups in the weight gradient: there are none.)"""
    model = small_net(groups=1)
    with FlopMeter(model) as meter, FlopCounterMode(display=False) as counter:
        out = model(torch.ones(3, 4, 8, 8))
        forward = counter.get_total_flops()
        out.sum().backward()
    assert forward == 2 * meter.dense.forward
    assert counter.get_total_flops() == 2 * meter.dense.total


def test_two_axes_ask_torch_for_as_much_as_dense():
    """Our own input and weight gradients are counted as torch's are: nothing is computed twice."""
    model = small_net()
    with FlopCounterMode(display=False) as dense:
        model(torch.ones(3, 4, 8, 8)).sum().backward()
    sparsify_(model, NMConfig(1, 4, where=everything, recipe=BDWP()))
    with FlopCounterMode(display=False) as sparse:
        model(torch.ones(3, 4, 8, 8)).sum().backward()
    assert sparse.get_total_flops() == dense.get_total_flops()


def cost(recipe, n: int, m: int, count, *, axis="in", steps: int = 0) -> tuple[float, ...]:
    """Shares of dense of the three passes in a Linear 32 -> 32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32))
    handle = sparsify_(model, NMConfig(n, m, axis=axis, where=everything, recipe=recipe))
    for _ in range(steps):
        handle.step()
    with FlopMeter(model, count) as meter:
        model(torch.randn(5, 32, requires_grad=True)).sum().backward()
    one = 5 * 32 * 32
    assert meter.dense == Passes(one, one, one)
    return tuple(x / one for x in (meter.sparse.forward, meter.sparse.input_gradient, meter.sparse.weight_gradient))


def test_what_kernels_can_skip():
    """(rho + 2)/3 for SR-STE, (2 rho + 1)/3 for two axes: the table of the dossier."""
    assert cost(SRSTE(), 2, 4, "kernels") == (0.5, 1, 1)
    assert sum(cost(SRSTE(), 1, 16, "kernels")) / 3 == pytest.approx(0.6875)
    assert cost(SRSTE(), 2, 4, "kernels", axis="out") == (1, 0.5, 1)
    assert sum(cost(BDWP(), 2, 8, "kernels")) / 3 == 0.5
    assert sum(cost(BDWP(), 1, 16, "kernels")) / 3 == 0.375
    assert cost(Dense(), 2, 4, "kernels") == (1, 1, 1)


def test_what_is_zero():
    assert cost(SRSTE(), 2, 4, "nonzeros") == (0.5, 0.5, 1)
    assert cost(Fixed(), 2, 4, "nonzeros") == (0.5, 0.5, 0.5)
    assert cost(BDWP(), 1, 8, "nonzeros") == (0.125, 0.125, 1)
    assert cost(MDGFLinear(10), 1, 16, "nonzeros", steps=9) == (1, 1, 1), "a little is not zero"
    assert cost(MDGFLinear(10), 1, 16, "nonzeros", steps=10) == (1 / 16, 1 / 16, 1)
    assert cost(SDGFStepwise(10), 1, 16, "nonzeros", steps=2) == (0.5, 0.5, 1)


def test_evaluation_counts_forward_alone():
    model = small_net()
    with FlopMeter(model) as meter, torch.no_grad():
        model(torch.ones(3, 4, 8, 8))
    assert meter.dense == Passes(sum(BY_HAND.values()), 0, 0)
    with pytest.raises(ValueError, match="count 'all'"):
        FlopMeter(model, "all")  # type: ignore[arg-type]


def test_masks_that_move_are_counted_by_hand():
    model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False))
    handle = sparsify_(model, NMConfig(1, 2, where=everything, recipe=STE()))
    steps = [  # of layer 0; layer 1 never moves
        [[2.0, 1, 2, 1], [2, 1, 2, 1]],
        [[1, 2, 2, 1], [2, 1, 2, 1]],  # one group of four flips: two places
        [[1, 2, 1, 2], [2, 1, 2, 1]],  # another
        [[2, 1, 1, 2], [2, 1, 2, 1]],  # the first goes back
    ]
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(steps[0]))
    handle.step()
    meter = MaskMeter(handle)
    for weight in steps:
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor(weight))
        handle.step()
    assert meter.steps == [2, 3, 4, 5]
    assert meter.flips == {"0": [0, 2, 2, 2], "1": [0, 0, 0, 0]}
    assert meter.to_first == {"0": [0, 2, 4, 2], "1": [0, 0, 0, 0]}
    assert meter.sad("0") == [0, 0.25, 0.5, 0.25] and meter.flip_rate("0") == [0, 0.25, 0.25, 0.25]
    assert meter.sad() == [0, 2 / 16, 4 / 16, 2 / 16]


def test_a_dense_phase_counts_as_a_mask_of_ones():
    model = nn.Sequential(nn.Linear(16, 4))
    handle = sparsify_(model, NMConfig(1, 4, where=everything, recipe=MDGFLinear(4, dense=2)))
    meter, seldom = MaskMeter(handle), MaskMeter(handle, every=2)
    for _ in range(4):
        handle.step()
    assert meter.flip_rate() == [0, 0.75, 0, 0] and meter.sad() == [0, 0.75, 0.75, 0.75]
    assert seldom.steps == [2, 4] and seldom.flip_rate() == [0.75, 0]


def test_gradient_variance_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    handle = sparsify_(model, NMConfig(1, 4, where=["0"], recipe=MDGFLinear(4, dense=1)))
    meter = GradientVariance(handle)
    expected = {"kept": [], "pruned": []}
    for step in range(3):
        model(torch.randn(6, 8)).square().sum().backward()
        grad, kept = model[0].weight.grad, handle.masks().get("0", torch.ones(4, 8, dtype=torch.bool))
        expected["kept"].append(grad[kept].var(correction=0).item())
        expected["pruned"].append(grad[~kept].var(correction=0).item() if step else math.nan)
        handle.step()
        model.zero_grad()
    assert meter.steps == [0, 1, 2]
    assert meter.kept["0"] == pytest.approx(expected["kept"], rel=1e-5)
    assert meter.pruned["0"] == pytest.approx(expected["pruned"], rel=1e-5, nan_ok=True)
    first, second = expected["pruned"][1:]
    found = meter.average("pruned", rate=0.5)
    assert math.isnan(found[0]) and found[1:] == pytest.approx([first, (0.25 * first + 0.5 * second) / 0.75], rel=1e-5)


def test_gradient_variance_needs_gradients():
    model = nn.Sequential(nn.Linear(8, 4))
    handle = sparsify_(model, NMConfig(1, 4, where=everything))
    GradientVariance(handle)
    with pytest.raises(RuntimeError, match="before zero_grad"):
        handle.step()
    with pytest.raises(ValueError, match="every 0"):
        MaskMeter(handle, every=0)
