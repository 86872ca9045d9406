"""Sparse layers: what they compute forward and backward, by formula; how they come and go."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.sparsity import (
    BDWP,
    SRSTE,
    STE,
    BiMask,
    Dense,
    Fixed,
    Gradual,
    MDGFExponential,
    MDGFLinear,
    NMConfig,
    NMConv2d,
    NMLinear,
    Recipe,
    SDGFGeometric,
    SDGFStepwise,
    Transposable,
    sparsify_,
)
from kernels import nm

DECAY = 0.3  # large enough to be seen
HARD: list[Recipe] = [STE(), SRSTE(DECAY), Fixed(), BDWP(DECAY), BiMask(DECAY, candidates=4), Gradual(1)]
SOFT: list[Recipe] = [MDGFLinear(4, c=0.25), MDGFLinear(4, c=0.25, grad_mode="scaled"), MDGFExponential(4, c=0.5)]


def everything(name: str, layer: nn.Module) -> bool:
    return True


def linear(recipe: Recipe, n: int = 1, m: int = 4, steps: int = 0, **config):
    """A Linear 16 -> 12 in float64, its handle after some steps, and an input."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12)).double()
    handle = sparsify_(model, NMConfig(n, m, where=everything, recipe=recipe, **config))
    for _ in range(steps):
        handle.step()
    return model, handle, torch.randn(5, 3, 16, dtype=torch.float64, requires_grad=True)


def factors(recipe: Recipe, step: int, weight: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, float]:
    """f, g and lambda of the formulas, written out again."""
    rule = recipe.rule(step, 1, 4)
    f = kept.double() + rule.beta * (~kept).double()
    return f, f if rule.grad_mode == "scaled" else torch.ones_like(f), rule.decay


@pytest.mark.parametrize("recipe", [*HARD, *SOFT], ids=repr)
def test_linear_follows_the_formulas(recipe: Recipe):
    step = 2
    model, handle, x = linear(recipe, steps=step)
    layer, grad = handle.layers["0"], torch.randn(5, 3, 12, dtype=torch.float64)
    model(x).backward(grad)

    weight, kept = layer.weight.detach(), layer.kept
    assert kept is not None and layer.weight.grad is not None and x.grad is not None
    f, g, decay = factors(recipe, step, weight, kept)
    back = weight * f if layer.back is None else weight * layer.back
    bias = layer.bias
    torch.testing.assert_close(model(x), F.linear(x, f * weight, bias))
    torch.testing.assert_close(x.grad, grad @ back)
    plain = grad.flatten(0, 1).T @ x.detach().flatten(0, 1)
    torch.testing.assert_close(layer.weight.grad, g * plain + decay * (~kept) * weight)
    torch.testing.assert_close(bias.grad, grad.sum((0, 1)))


def test_transposable_follows_the_formulas():
    model, handle, x = linear(Transposable(DECAY), n=2)
    layer, grad = handle.layers["0"], torch.randn(5, 3, 12, dtype=torch.float64)
    model(x).backward(grad)
    kept = layer.kept
    assert kept is not None
    assert (kept.unflatten(1, (-1, 4)).sum(-1) == 2).all() and (kept.unflatten(0, (-1, 4)).sum(1) == 2).all()
    torch.testing.assert_close(x.grad, grad @ (layer.weight.detach() * kept))


def test_a_dense_recipe_is_the_dense_layer():
    model, handle, x = linear(Dense())
    weight = handle.layers["0"].weight
    assert torch.equal(model(x), F.linear(x, weight, model[0].bias)) and handle.masks() == {}


def test_scaled_gradients_are_those_of_autograd():
    """With g = f and no decay the layer is f * W to autograd, so finite differences must agree."""
    model, handle, x = linear(MDGFExponential(4, c=0.5, grad_mode="scaled"), steps=2)
    weight = handle.layers["0"].weight

    def loss(values: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"0.weight": values}, (x.detach(),))

    assert torch.autograd.gradcheck(loss, (weight.detach().clone().requires_grad_(),))


CONVOLUTIONS = {
    "plain": dict(kernel_size=3),
    "strided": dict(kernel_size=3, stride=2, padding=1),
    "dilated": dict(kernel_size=(3, 1), dilation=2, padding=(2, 1)),
    "same": dict(kernel_size=3, padding="same"),
    "reflecting": dict(kernel_size=3, padding=1, padding_mode="reflect"),
    "grouped": dict(kernel_size=3, groups=2, bias=False),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("recipe", [SRSTE(DECAY), BDWP(DECAY)], ids=repr)
def test_convolution_follows_the_formulas(name: str, recipe: Recipe):
    """Against torch's own convolutions: one with the forward's weight, one with the backward's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 12, **CONVOLUTIONS[name])).double()  # type: ignore[arg-type]
    plain = copy.deepcopy(model)
    handle = sparsify_(model, NMConfig(1, 2, where=everything, recipe=recipe))
    layer = handle.layers["0"]
    weight, kept = layer.weight.detach(), layer.kept
    assert isinstance(layer, NMConv2d) and kept is not None
    for dim in [1] if layer.back is None else [1, 0]:
        mask = kept if dim == 1 else layer.back
        assert mask is not None and (mask.unflatten(dim, (-1, 2)).sum(dim + 1) == 1).all()

    x = torch.randn(2, 8, 7, 6, dtype=torch.float64, requires_grad=True)
    out = model(x)
    grad = torch.randn_like(out)
    out.backward(grad)
    found_x, found_weight = x.grad, layer.weight.grad
    plain[0].weight.data = weight * kept
    x.grad = None
    torch.testing.assert_close(out, plain(x))
    plain(x).backward(grad)
    torch.testing.assert_close(found_weight, plain[0].weight.grad + DECAY * (~kept) * weight)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, plain[0].bias.grad)
    if layer.back is not None:
        x.grad = None
        plain[0].weight.data = weight * layer.back
        plain(x).backward(grad)
    torch.testing.assert_close(found_x, x.grad)


def test_frozen_inputs_and_weights_get_no_gradient():
    model, handle, x = linear(BDWP())
    handle.layers["0"].weight.requires_grad_(False)
    model(x.detach()).sum().backward()
    assert x.grad is None and handle.layers["0"].weight.grad is None and model[0].bias.grad is not None


@pytest.mark.parametrize("recipe", [SRSTE(), BDWP()], ids=repr)
def test_bfloat16_autocast_trains(recipe: Recipe):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 4))
    handle = sparsify_(model, NMConfig(2, 4, where=everything, recipe=recipe))
    x = torch.randn(2, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    out.float().square().mean().backward()
    gradients = {name: layer.weight.grad for name, layer in handle.layers.items()}
    model.zero_grad()
    model(x).square().mean().backward()
    for name, layer in handle.layers.items():
        narrow, wide = gradients[name], layer.weight.grad
        assert narrow is not None and wide is not None and narrow.dtype == torch.float32
        assert (narrow - wide).norm() < 0.05 * wide.norm()  # bfloat16 has 8 bits: 0.4 % a product, some products deep


RECIPES: list[Recipe] = [
    *HARD,
    MDGFLinear(6, dense=1, fine_tune=2),
    MDGFExponential(6, grad_mode="scaled"),
    SDGFStepwise(6, dense=1, fine_tune=1),
    SDGFGeometric(6, blocks=(4, 2, 1)),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=repr)
@pytest.mark.parametrize("axis", ["in", "out"])
def test_every_group_keeps_n_in_every_step(recipe: Recipe, axis):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    handle = sparsify_(model, NMConfig(1, 4, axis=axis, where=everything, recipe=recipe))
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    dim = 1 if axis == "in" else 0
    for step in range(8):
        rule = recipe.rule(step, 1, 4)
        for name in () if rule.dense else handle.layers:
            kept = handle.masks()[name]
            assert (kept.unflatten(dim, (-1, rule.m)).sum(dim + 1) == rule.n).all(), step
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
        handle.step()
        optimizer.zero_grad()
    assert recipe.rule(8, 1, 4).n == 1


def test_bi_masks_backward_mask_is_part_of_the_forward_mask():
    _, handle, _ = linear(BiMask(candidates=20))
    layer = handle.layers["0"]
    kept, back, order = layer.kept, layer.back, layer.order
    assert kept is not None and back is not None and order is not None
    assert not (back & ~kept).any()
    assert (back[order].unflatten(0, (-1, 4)).sum(1) <= 1).all()
    _, few, _ = linear(BiMask(candidates=0))
    first = few.layers["0"]
    assert first.back is not None
    weight = layer.weight.detach().abs()
    assert (weight * back).sum() > (weight * first.back).sum(), "twenty orders beat the one that is there"


def test_only_due_steps_seek_masks():
    model, handle, _ = linear(STE(), refresh=3)
    first = handle.masks()["0"]
    changed = []
    for _ in range(6):
        with torch.no_grad():
            handle.layers["0"].weight.copy_(torch.randn(12, 16))
        handle.step()
        changed.append(not torch.equal(handle.masks()["0"], first))
        first = handle.masks()["0"]
    assert changed == [False, False, True, False, False, True]
    assert sum(p.numel() for p in model.parameters()) == 12 * 16 + 12


def test_names_parameters_and_state_stay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.Flatten(), nn.Linear(8, 4))
    model.add_module("copy", model[2])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    identities = {name: id(value) for name, value in model.named_parameters()}
    handle = sparsify_(model, NMConfig(2, 4, recipe=SRSTE()))
    assert list(handle.layers) == ["2"] and isinstance(model[2], NMConv2d) and model.get_submodule("copy") is model[2]
    assert set(handle.skipped) == {"0", "4"} and "3 input channels" in handle.skipped["0"]
    assert list(model.state_dict()) == list(before)
    assert {name: id(value) for name, value in model.named_parameters()} == identities
    handle.remove()
    assert type(model[2]) is nn.Conv2d and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert "kept" not in dir(model[2]) and torch.equal(
        model[2](torch.ones(1, 8, 4, 4)), _plain(before)(torch.ones(1, 8, 4, 4))
    )


def _plain(state: dict[str, Tensor]) -> nn.Conv2d:
    layer = nn.Conv2d(8, 8, 3, bias=False)
    layer.load_state_dict({"weight": state["2.weight"]})
    return layer


@pytest.mark.parametrize("recipe", [SRSTE(), Dense(), MDGFExponential(100, dense=50), SDGFStepwise(100)], ids=repr)
def test_removal_with_zeros_leaves_the_final_pattern(recipe: Recipe):
    """Also from the middle of a schedule."""
    model, handle, x = linear(recipe, steps=3)
    weight = model[0].weight.detach().clone()
    handle.remove(keep="zeros")
    kept = nm.mask(weight, 1, 4)
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, torch.where(kept, weight, 0.0))
    assert model(x).shape == (5, 3, 12)


def test_what_is_finalised_stays():
    model, handle, x = linear(MDGFLinear(100), steps=1)
    handle.finalize_()
    out, kept = model(x), handle.masks()["0"]
    with torch.no_grad():
        handle.layers["0"].weight[~kept] += 100.0
    handle.step()
    torch.testing.assert_close(model(x), out)


def test_masks_can_be_given_and_are_kept():
    model, handle, x = linear(Fixed(), n=2)
    mask = torch.tensor([True, False, False, True]).repeat(12, 4)
    handle.set_masks({"0": mask})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = model[0].weight.detach().clone()
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
        handle.step()
        optimizer.zero_grad()
    assert torch.equal(handle.masks()["0"], mask)
    changed = model[0].weight.detach() != before
    assert torch.equal(changed, mask), "pruned weights get no gradient"


def test_a_checkpoint_goes_on_where_it_stopped():
    def run(handle, model, steps):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(steps):
            model(torch.ones(2, 16).double()).square().sum().backward()
            optimizer.step()
            handle.step()
            optimizer.zero_grad()

    recipe = Gradual(6, every=2)
    model, handle, _ = linear(recipe, refresh=2)
    run(handle, model, 3)
    saved = copy.deepcopy((model.state_dict(), handle.state_dict()))
    run(handle, model, 4)
    other, again, _ = linear(recipe, refresh=2)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    run(again, other, 4)
    assert torch.equal(handle.masks()["0"], again.masks()["0"]) and torch.equal(model[0].weight, other[0].weight)


def test_a_transformer_encoder_layer_is_not_bypassed():
    """In evaluation torch fuses this layer and reads the weights themselves; the masks must still count."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 16)
    handle = sparsify_(model, NMConfig(1, 4, where=["linear?"]))
    with torch.no_grad():
        trained, evaluated = model.train()(x), model.eval()(x)
    torch.testing.assert_close(trained, evaluated)
    handle.remove()
    assert not model.linear1._forward_pre_hooks
    with torch.no_grad():
        assert not torch.allclose(model.eval()(x), evaluated, atol=1e-4)


def test_a_model_that_is_one_layer_and_moves():
    model = nn.Linear(8, 4)
    handle = sparsify_(model, NMConfig(1, 4, where=everything))
    assert isinstance(model, NMLinear) and "1:4 along in" in repr(model)
    assert model.to(torch.float64)(torch.ones(1, 8).double()).dtype == torch.float64
    copied = copy.deepcopy(model)
    assert torch.equal(copied(torch.ones(1, 8).double()), model(torch.ones(1, 8).double()))
    assert list(handle.layers) == [""]


def errors():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
    whole = nn.Sequential(nn.Linear(8, 8))
    whole[0].weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int32), requires_grad=False)
    wavy = nn.Sequential(nn.Linear(8, 8, dtype=torch.complex64))
    return [
        (model, dict(where=["0"]), ValueError, "4 does not divide its 6 input channels"),
        (model, dict(where=["layers.*"]), ValueError, "unknown layer 'layers.*'"),
        (model, dict(where=["1"]), ValueError, "'1' is of type ReLU"),
        (model, dict(where=lambda name, layer: False), ValueError, "no layer is chosen"),
        (nn.Sequential(nn.Linear(8, 8)), dict(), ValueError, "0: the last layer"),
        (model, dict(where=["2"], recipe=SDGFGeometric(8)), ValueError, "32 does not divide"),
        (nn.Linear(8, 6), dict(where=everything, recipe=BDWP()), ValueError, "6 output channels"),
        (nn.Conv2d(8, 8, 1, groups=4), dict(where=everything, axis="out"), ValueError, "its 2 output channels"),
        (whole, dict(where=everything), TypeError, "torch.int32"),
        (wavy, dict(where=everything), TypeError, "torch.complex64"),
        (
            nn.Conv2d(8, 8, 1),
            dict(where=everything, vector=16),
            ValueError,
            "a convolution, and vectors are",
        ),
    ]


@pytest.mark.parametrize("model, config, kind, message", errors())
def test_a_choice_that_cannot_be_is_one_clear_line(model, config, kind, message):
    before = [type(module) for module in model.modules()]
    with pytest.raises(kind, match=message.replace("*", r"\*")) as caught:
        sparsify_(model, NMConfig(2, 4, **config))
    assert "\n" not in str(caught.value) and [type(module) for module in model.modules()] == before


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(n=5, m=4), "got 5:4"),
        (dict(n=0, m=4), "got 0:4"),
        (dict(n=2, m=4, axis="up"), "axis 'up'"),
        (dict(n=2, m=4, refresh=0), "refresh 0"),
        (dict(n=2, m=4, recipe="srste"), "recipe 'srste'"),
        (dict(n=2, m=4, vector=8), r"got vector 8; expected one of \(1, 16, 32"),
        (dict(n=2, m=4, vector=16, axis="out"), "vector 16 with axis 'out'"),
        (dict(n=2, m=4, vector=16, recipe=BDWP()), "and BDWP; expected axis 'in' and a recipe of one mask"),
    ],
)
def test_a_configuration_that_cannot_be(config, message):
    with pytest.raises((ValueError, TypeError), match=message):
        NMConfig(**config)


VECTORS: list[Recipe] = [STE(), SRSTE(DECAY), Gradual(2), MDGFLinear(4, c=0.25), SDGFStepwise(4)]


@pytest.mark.parametrize("recipe", VECTORS, ids=repr)
def test_vectors_of_outputs_keep_the_same_inputs_all_the_way(recipe: Recipe):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 40))
    handle = sparsify_(model, NMConfig(1, 4, where=everything, recipe=recipe, vector=16))
    seen = []
    for _ in range(5):
        with torch.no_grad():
            model[0].weight.add_(0.05 * torch.randn_like(model[0].weight))
        handle.step()
        seen.append(handle.masks()["0"])
        assert all(torch.equal(seen[-1][row], seen[-1][row // 16 * 16]) for row in range(40))
    rule = handle.layers["0"].rule
    assert (rule.n, rule.m, rule.vector) == (1, 4, 16) and "1:4x16 along in" in repr(model[0])
    if not isinstance(recipe, Gradual):  # whose pruned weights stay pruned
        assert torch.equal(seen[-1], nm.mask(model[0].weight.detach(), 1, 4, vector=16))
    handle.finalize_()
    assert torch.equal(handle.masks()["0"], seen[-1])


def test_a_mask_that_differs_within_a_vector_is_refused():
    model = nn.Sequential(nn.Linear(16, 40))
    handle = sparsify_(model, NMConfig(1, 4, where=everything, recipe=Fixed(), vector=16))
    with pytest.raises(ValueError, match="of '0' differs within 16 rows"):
        handle.set_masks({"0": nm.mask(torch.randn(40, 16), 1, 4)})
    handle.set_masks({"0": nm.mask(torch.randn(40, 16), 1, 4, vector=16)})


def test_masks_that_do_not_fit_are_refused():
    _, handle, _ = linear(Fixed())
    kept = handle.masks()["0"]
    for masks, message in [
        ({"00": kept}, "no sparse layer '00'.*did you mean '0'"),
        ({"0": kept.T}, r"bool \[16, 12\]; expected bool \[12, 16\]"),
        ({"0": kept.float()}, "float32"),
        ({"0": torch.ones_like(kept)}, "keeps 4 of 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            handle.set_masks(masks)
    assert torch.equal(handle.masks()["0"], kept)
    with pytest.raises(ValueError, match="seeks its own masks"):
        linear(STE())[1].set_masks({"0": kept})
    with pytest.raises(ValueError, match="'0'"):
        handle.load_state_dict({"steps": 1, "masks": {}})
    with pytest.raises(ValueError, match="keep 'half'"):
        handle.remove(keep="half")  # type: ignore[arg-type]
