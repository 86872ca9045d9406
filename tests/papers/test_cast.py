"""CAST's method against its update rule written out, its masks and factors by hand, AST as described and released."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from common.models.gpt import GPT
from kernels import nm
from papers.cast import method
from papers.cast.baselines import AST, SLoRB, attach_slorb
from papers.cast.method import AdamS

RULES = {"lr": 0.01, "decay": 0.3, "steps": 20, "n": 2, "m": 4, "betas": (0.8, 0.9)}


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parameter(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=draw(seed), dtype=torch.float64))


def gradients(count: int, *shape: int) -> list[Tensor]:
    return [torch.randn(*shape, generator=draw(100 + i), dtype=torch.float64) for i in range(count)]


def run(optimizer: torch.optim.Optimizer, weight: nn.Parameter, grads: list[Tensor]) -> Tensor:
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    return weight.detach().clone()


def by_the_book(theta: Tensor, grads: list[Tensor], *, refresh: int = 10, second: str = "modified") -> Tensor:
    """Algorithm 1, entry by entry in plain Python."""
    lr, decay, total, (b1, b2) = RULES["lr"], RULES["decay"], RULES["steps"], RULES["betas"]
    theta = theta.clone()
    mean, square = torch.zeros_like(theta), torch.zeros_like(theta)
    kept = torch.ones_like(theta)
    for t, grad in enumerate(grads):
        if t % refresh == 0:
            kept = nm.mask(theta, 2, 4)
        for place in torch.cartesian_prod(*(torch.arange(size) for size in theta.shape)).tolist():
            i = tuple(place)
            mean[i] = b1 * mean[i] + (1 - b1) * grad[i]
            alpha = t / total
            tilde = mean[i] if kept[i] else (1 - alpha) * mean[i] + alpha * decay * math.copysign(1, theta[i])
            of = tilde if second == "modified" else grad[i]
            square[i] = b2 * square[i] + (1 - b2) * of**2
            theta[i] -= lr * tilde / (1 - b1 ** (t + 1)) / (math.sqrt(square[i] / (1 - b2 ** (t + 1))) + 1e-8)
    return theta


# ---------------------------------------------------------------------------------------------------------- optimizer


@pytest.mark.parametrize("refresh", [1, 3, 10])
@pytest.mark.parametrize("second", ["modified", "gradient"])
def test_the_update_is_the_algorithm_written_out(refresh, second):
    weight, grads = parameter(3, 8), gradients(15, 3, 8)
    expected = by_the_book(weight.detach(), grads, refresh=refresh, second=second)
    optimizer = AdamS([weight], refresh=refresh, second_moment=second, **RULES)
    torch.testing.assert_close(run(optimizer, weight, grads), expected)


def test_parameters_out_of_scope_get_plain_adam():
    ours, theirs, grads = parameter(5), parameter(5), gradients(12, 5)
    optimizer = AdamS([parameter(2, 4)], [ours], **RULES)
    adam = torch.optim.Adam([theirs], lr=RULES["lr"], betas=RULES["betas"])
    torch.testing.assert_close(run(optimizer, ours, grads), run(adam, theirs, grads))


def test_the_first_step_has_no_pull_and_the_pull_is_linear_in_time():
    weight, mean = torch.tensor([[-2.0, 1.0, 0.0, 3.0]]), torch.full((1, 4), 0.1)
    kept = torch.tensor([[True, False, False, True]])
    optimizer = AdamS([parameter(1, 4)], **RULES)
    assert torch.equal(optimizer.direction(weight, mean, kept, 0), mean)
    torch.testing.assert_close(
        optimizer.direction(weight, mean, kept, 10), torch.tensor([[0.1, 0.05 + 0.15, 0.05, 0.1]])
    )
    torch.testing.assert_close(optimizer.direction(-weight, mean, kept, 20)[0, 1], torch.tensor(-0.3))
    everywhere = AdamS([parameter(1, 4)], selective=False, **RULES)
    torch.testing.assert_close(everywhere.direction(weight, mean, kept, 20), 0.3 * weight.sign())


def test_the_pull_never_enters_the_running_mean():
    weight = parameter(4, 8)
    optimizer = AdamS([weight], **RULES)
    before = weight.detach().abs()
    run(optimizer, weight, [torch.zeros(4, 8, dtype=torch.float64)] * 20)
    assert not optimizer.state[weight]["mean"].any()
    kept = optimizer.kept(weight)
    assert torch.equal(weight.detach().abs()[kept], before[kept])
    assert (weight.detach().abs()[~kept] < before[~kept]).all()


def test_masks_are_sought_at_the_start_of_every_tenth_step():
    weight = parameter(8, 16)
    optimizer, seen = AdamS([weight], **(RULES | {"lr": 0.3, "decay": 0.0})), []
    for grad in gradients(21, 8, 16):
        start, weight.grad = nm.mask(weight, 2, 4), grad
        optimizer.step()
        seen.append((start, optimizer.kept(weight)))
    for step, (_, kept) in enumerate(seen):
        assert torch.equal(kept, seen[step // 10 * 10][0])  # what its last refresh found at the start
    assert not torch.equal(seen[0][1], seen[10][1]) and not torch.equal(seen[10][1], seen[20][1])


def test_it_goes_on_from_a_checkpoint_as_if_nothing_had_happened():
    whole, grads = parameter(4, 8), gradients(18, 4, 8)
    expected = run(AdamS([whole], **RULES), whole, grads)
    weight = parameter(4, 8)
    first = AdamS([weight], **RULES)
    run(first, weight, grads[:7])  # between two refreshes, so the mask itself has to survive
    second = AdamS([weight], **RULES)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert torch.equal(run(second, weight, grads[7:]), expected)


def test_half_precision_and_odd_widths_are_refused():
    with pytest.raises(ValueError, match=r"bfloat16; expected float32.*autocast"):
        AdamS([nn.Parameter(torch.zeros(2, 4, dtype=torch.bfloat16))], **RULES)
    with pytest.raises(ValueError, match=r"\[2, 6\]; expected its last axis in multiples of 4"):
        AdamS([parameter(2, 6)], **RULES)


def test_pruned_weights_arrive_at_zero_if_they_can_travel_far_enough():
    """The pull moves a weight by about lr a step: enough steps empty the pruned half, too few do not."""
    left = {}
    for headroom in (4.0, 0.02):
        weight = nn.Linear(16, 32, bias=False)
        torch.manual_seed(0)
        nn.init.normal_(weight.weight)
        shares = [(1 + math.cos(math.pi * t / 200)) / 2 for t in range(200)]
        rate = headroom * weight.weight.abs().mean().item() / method.reach(shares.__getitem__, 200)
        optimizer = AdamS([weight.weight], lr=rate, decay=1e-3, steps=200, n=2, m=4, betas=(0.9, 0.99))
        for step, grad in enumerate(torch.randn(200, 32, 16, generator=draw()) * 1e-3):
            optimizer.param_groups[0]["lr"] = rate * shares[step]
            weight.weight.grad = grad
            optimizer.step()
        left[headroom] = method.remaining({"layer": weight}, 2, 4)
    assert left[4.0] < 0.01 < 0.1 < left[0.02]


def test_reach_by_hand():
    assert method.reach(lambda step: 1.0, 4) == pytest.approx(0 + 1 / 4 + 2 / 4 + 3 / 4)
    assert method.reach(lambda step: 2.0 * (step == 3), 4) == pytest.approx(1.5)


# ---------------------------------------------------------------------------------------------------------------- masks


def test_the_printed_threshold_keeps_too_many_on_ties():
    weight = torch.tensor([[1.0, -1.0, 1.0, 0.5], [3.0, 2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert method.mask(weight, 2, 4).sum(1).tolist() == [2, 2, 2]
    assert method.mask(weight, 2, 4, ties="threshold").sum(1).tolist() == [3, 2, 4]
    distinct = torch.randn(6, 16, generator=draw())
    assert torch.equal(method.mask(distinct, 1, 4), method.mask(distinct, 1, 4, ties="threshold"))


# ------------------------------------------------------------------------------------------------------- weight scaling


def scaled(groups: int = 2) -> dict[str, nn.Linear]:
    torch.manual_seed(0)
    layers = {"one": nn.Linear(16, 3), "two": nn.Linear(8, 4, bias=False)}
    method.scale_(layers, 4, groups)
    return layers


def test_each_factor_multiplies_its_part_of_a_row():
    layers = scaled()
    layer, theta = layers["one"], method.raw(layers["one"]).detach().clone()
    assert torch.equal(layer.weight, theta)  # factors start at one
    factors = layer.parametrizations.weight[0].scale
    assert factors.shape == (3, 2)
    with torch.no_grad():
        factors[1, 0], factors[2, 1] = 5.0, 7.0
    expected = theta.clone()
    expected[1, :8] *= 5
    expected[2, 8:] *= 7
    torch.testing.assert_close(layer.weight, expected)


def test_factors_are_out_of_scope_and_raw_weights_in_it():
    model = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4))
    layers = {"0": model[0]}
    method.scale_(layers, 4)
    others = method.out_of_scope(model, layers)
    assert {tuple(p.shape) for p in others} == {(4, 2), (4,)} and len(others) == 4
    assert all(p is not method.raw(model[0]) for p in others)


def test_finalising_prunes_exactly_and_folds_without_a_change():
    layers = scaled()
    with torch.no_grad():
        for layer in layers.values():
            layer.parametrizations.weight[0].scale.uniform_(0.5, 3.0)
            method.raw(layer).mul_(method.mask(method.raw(layer), 2, 4))
    x = torch.randn(5, 16, generator=draw())
    before = layers["one"](x)
    masks = method.finalize_(layers, 2, 4)
    torch.testing.assert_close(layers["one"](x), before)
    for name, layer in layers.items():
        assert type(layer) is nn.Linear and set(layer.state_dict()) <= {"weight", "bias"}
        assert torch.equal(layer.weight != 0, masks[name])
        assert set(masks[name].unflatten(1, (-1, 4)).sum(-1).flatten().tolist()) == {2}


def test_the_mask_of_the_scaled_weights_is_that_of_the_raw_ones():
    layers = scaled()
    with torch.no_grad():
        layers["one"].parametrizations.weight[0].scale.uniform_(-3.0, 3.0)
    layer = layers["one"]
    assert torch.equal(method.mask(layer.weight, 2, 4), method.mask(method.raw(layer), 2, 4))


def test_parts_that_cut_a_group_are_refused():
    with pytest.raises(ValueError, match=r"layer has 12 inputs; expected multiples of 8"):
        method.scale_({"layer": nn.Linear(12, 3)}, 4, 2)


def test_scope_is_the_linear_layers_of_the_blocks():
    model = GPT(vocabulary=7, context=8, width=16, depth=2, heads=2)
    found = method.in_blocks(model)
    assert len(found) == 12 and all(name.startswith("blocks.") for name in found)
    with pytest.raises(ValueError, match=r"no nn.Linear inside an nn.ModuleList"):
        method.in_blocks(nn.Sequential(nn.Linear(2, 2)))


def test_remaining_by_hand():
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[4.0, -2.0, 1.0, 0.5]])
    assert method.remaining({"layer": layer}, 2, 4) == pytest.approx(0.75 / 3.0)
    assert method.remaining({"layer": layer}, 1, 4) == pytest.approx((3.5 / 3) / 4.0)


# -------------------------------------------------------------------------------------------------------- distillation


def test_the_loss_is_a_mixture_and_vanishes_where_it_should():
    student, teacher = torch.randn(2, 5, 7, generator=draw()), torch.randn(2, 5, 7, generator=draw(1))
    targets = torch.randint(7, (2, 5), generator=draw())
    entropy = nn.functional.cross_entropy(student.flatten(0, 1), targets.flatten())
    p, q = teacher.softmax(-1), student.softmax(-1)
    divergence = (p * (p / q).log()).sum(-1).mean()
    for eta in (0.0, 1 / 3, 1.0):
        found = method.distillation(student, teacher, targets, eta=eta)
        torch.testing.assert_close(found, eta * divergence + (1 - eta) * entropy)
    assert method.distillation(teacher, teacher, targets, eta=1.0).abs() < 1e-6
    warm_p, warm_q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    warm = (warm_p * (warm_p / warm_q).log()).sum(-1).mean() * 4
    torch.testing.assert_close(method.distillation(student, teacher, targets, eta=1.0, temperature=2.0), warm)


def test_the_teacher_gets_no_gradient():
    student, teacher = (torch.randn(3, 4, generator=draw(i)).requires_grad_() for i in range(2))
    method.distillation(student, teacher, torch.tensor([0, 1, 2]), eta=0.5).backward()
    assert student.grad is not None and teacher.grad is None


def test_gradient_scale_by_hand():
    one, two = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(3))
    one.grad, two.grad = torch.tensor([3.0]), torch.tensor([1.0, 1.0, 1.0])
    assert method.gradient_scale([one, two]) == pytest.approx(math.sqrt(12 / 4))
    with pytest.raises(ValueError, match="call backward"):
        method.gradient_scale([nn.Parameter(torch.zeros(2))])


# ------------------------------------------------------------------------------------------------------------------ AST


def test_ast_pulls_pruned_weights_and_the_released_code_pushes_all():
    weight = torch.tensor([[2.0, -2.0, 1.0, -1.0]])
    kept, mean = torch.tensor([[True, True, False, False]]), torch.zeros(1, 4)
    shared = {"lr": 0.1, "decay": 0.5, "steps": 100, "n": 2, "m": 4}
    described, released = (AST([parameter(1, 4)], released=flag, **shared) for flag in (False, True))
    torch.testing.assert_close(described.direction(weight, mean, kept, 80), torch.tensor([[0.0, 0.0, 0.5, -0.5]]))
    torch.testing.assert_close(described.direction(weight, mean, kept, 5)[0, 2], torch.tensor(0.5 * 5 / 25))
    # Integer masks: ~1 = -2 for kept, ~0 = -1 for pruned, as in torch
    assert (~torch.tensor([1, 0], dtype=torch.int32)).tolist() == [-2, -1]
    torch.testing.assert_close(released.direction(weight, mean, kept, 80), torch.tensor([[-2.0, 2.0, -0.5, 0.5]]))


def test_the_low_rank_branch_starts_with_the_mean_of_what_was_lost():
    torch.manual_seed(0)
    layer = nn.Linear(32, 6, bias=False)
    kept = nm.mask(layer.weight, 2, 4)
    branch = SLoRB(layer.weight, kept)
    lost = layer.weight.detach().masked_fill(kept, 0.0)
    x = torch.randn(4, 2, generator=draw()).repeat_interleave(16, dim=1)  # constant on each block of 16 inputs
    torch.testing.assert_close(branch(x), x @ lost.T)  # where it makes up for the pruning exactly
    assert branch.project.numel() + branch.restore.numel() == 2 * 32 + 2 * 6
    before = layer(x)
    detach = attach_slorb(layer, kept)
    torch.testing.assert_close(layer(x), before + x @ lost.T)
    detach()
    assert torch.equal(layer(x), before)
    with pytest.raises(ValueError, match="24 inputs; expected multiples of 16"):
        SLoRB(torch.zeros(2, 24), torch.ones(2, 24, dtype=torch.bool))
