"""One-shot pruning: exact counts, Wanda by hand, SparseGPT against least squares, and what a bad call is told."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from common.sparsity.criteria import Pattern, inputs_as_matrix, prune_, sparsegpt
from kernels import nm

TWO_FOUR = Pattern(2, 4)
ALL = ["*"]  # by default the last layer is left alone


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlated(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Inputs [tokens, width] that share a few directions, and whose sizes differ by a hundred."""
    mixed = torch.randn(tokens, width // 4, generator=draw(seed)) @ torch.randn(width // 4, width, generator=draw(1))
    noise = torch.randn(tokens, width, generator=draw(seed + 2))
    return (mixed + 0.3 * noise) * torch.logspace(-1, 1, width)[torch.randperm(width, generator=draw(3))]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8))


class Block(nn.Module):
    """A residual block with two branches from the same input; kwargs only, as transformers' models like it."""

    def __init__(self, width: int):
        super().__init__()
        self.left, self.right = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.left(x)) * self.right(x)


class Residual(nn.Module):
    def __init__(self, width: int = 16, depth: int = 2, vocabulary: int = 12):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def groups_kept(mask: Tensor, m: int) -> set[int]:
    return set(mask.unflatten(-1, (-1, m)).sum(-1).flatten().tolist())


# ------------------------------------------------------------------------------------------------------ exact counts


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (2, 8), (1, 8), (3, 8), (4, 4)])
def test_every_group_keeps_exactly_n(method, n, m):
    model = network()
    before = copy.deepcopy(model)
    masks = prune_(model, n, m, method=method, calibration=[correlated(64, 16)], progress=False, where=ALL)
    assert list(masks) == ["0", "2", "4"]
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        assert mask.dtype == torch.bool and mask.shape == weight.shape
        assert groups_kept(mask, m) == {n}
        assert torch.equal(weight != 0, mask)
        if method != "sparsegpt":
            assert torch.equal(weight[mask], before.get_submodule(name).weight[mask])


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_a_share_of_zeros_is_exact(method, sparsity):
    model = nn.Sequential(nn.Linear(40, 8))
    masks = prune_(model, sparsity=sparsity, method=method, calibration=[correlated(99, 40)], progress=False, where=ALL)
    assert (~masks["0"]).sum().item() == round(sparsity * 40) * 8
    if method == "wanda":  # which compares within a row
        assert set((~masks["0"]).sum(1).tolist()) == {round(sparsity * 40)}


def test_equal_weights_keep_exactly_n_too():
    model = nn.Sequential(nn.Linear(8, 3))
    nn.init.ones_(model[0].weight)
    masks = prune_(model, 2, 4, method="magnitude", where=ALL)
    assert torch.equal(masks["0"], torch.tensor([True, True, False, False] * 2).expand(3, 8))


# ------------------------------------------------------------------------------------------------------ by hand


def test_magnitude_and_wanda_by_hand():
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    inputs = torch.tensor([[0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 2.0, 4.0]])  # column norms 1, sqrt 2, sqrt 8, 5
    scores = {"magnitude": [0, 1], "wanda": [2, 3]}  # Wanda: 4, 4.24, 5.66, 5
    for method, kept in scores.items():
        model = nn.Sequential(copy.deepcopy(layer))
        mask = prune_(model, 2, 4, method=method, calibration=[inputs[:1], inputs[1:]], progress=False, where=ALL)["0"]
        assert mask.nonzero()[:, 1].tolist() == kept


def test_wanda_of_a_convolution_sums_over_its_patches():
    """Checked against the layer itself: its response to one weight alone has the norm that Wanda takes."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 2, 3, stride=2, padding=1, bias=False)
    image = torch.randn(2, 4, 7, 6, generator=draw())
    norms = torch.empty(4, 3, 3)
    for place in torch.cartesian_prod(torch.arange(4), torch.arange(3), torch.arange(3)).tolist():
        alone = torch.zeros(1, 4, 3, 3)
        alone[(0, *place)] = 1.0
        norms[tuple(place)] = nn.functional.conv2d(image, alone, stride=2, padding=1).norm()
    expected = nm.mask((conv.weight.detach() * norms).abs(), 2, 4, dim=1)
    model = nn.Sequential(conv)
    assert torch.equal(
        prune_(model, 2, 4, method="wanda", calibration=[image], progress=False, where=ALL)["0"], expected
    )
    assert set(expected.sum(1).flatten().tolist()) == {2}


@pytest.mark.parametrize(
    "options",
    [{"padding": 1}, {"padding": "same", "dilation": 2}, {"padding": "valid"}, {"padding": (0, 2)}]
    + [{"padding": 1, "padding_mode": mode} for mode in ("reflect", "circular", "replicate")],
)
def test_a_layer_is_its_matrix_times_its_inputs(options):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, (3, 2), bias=False, **options)
    image = torch.randn(2, 3, 8, 9, generator=draw())
    matrix = conv.weight.permute(0, 2, 3, 1).flatten(1)
    expected = conv(image).movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(inputs_as_matrix(conv, image) @ matrix.T, expected, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------ SparseGPT


def test_with_a_diagonal_hessian_nothing_is_updated():
    weight, size = torch.randn(6, 16, generator=draw()), torch.rand(16, generator=draw(1)) + 0.1
    pruned, mask = sparsegpt(weight, size.square().diag(), TWO_FOUR, damping=0.0)
    assert torch.equal(mask, nm.mask(weight * size, 2, 4))
    torch.testing.assert_close(pruned, weight.where(mask, 0.0))
    evenly, as_large = sparsegpt(weight, torch.eye(16), TWO_FOUR)
    assert torch.equal(as_large, nm.mask(weight, 2, 4))
    torch.testing.assert_close(evenly, weight.where(as_large, 0.0))


def output_error(inputs: Tensor, dense: Tensor, pruned: Tensor) -> float:
    return (inputs.double() @ (dense - pruned).double().T).square().sum().item()


def least_squares(inputs: Tensor, dense: Tensor, mask: Tensor) -> Tensor:
    """The best weights on a given mask, row by row: min ||X (w - v)|| over v that are zero outside it."""
    inputs, best = inputs.double(), torch.zeros_like(dense, dtype=torch.float64)
    for row, kept in enumerate(mask):
        best[row, kept] = torch.linalg.lstsq(inputs[:, kept], inputs @ dense[row].double()).solution
    return best


@pytest.mark.parametrize("block", [4, 8, 128])
@pytest.mark.parametrize("pattern", [TWO_FOUR, Pattern(1, 4), Pattern(2, 8), Pattern(sparsity=0.6)])
def test_error_lies_between_least_squares_and_no_update(pattern, block):
    inputs, weight = correlated(200, 24), torch.randn(6, 24, generator=draw(5))
    pruned, mask = sparsegpt(weight, inputs.T @ inputs, pattern, damping=0.0, block=block)
    found = output_error(inputs, weight, pruned)
    assert found < output_error(inputs, weight, weight.where(mask, 0.0))
    assert found > output_error(inputs, weight, least_squares(inputs, weight, mask)) * (1 - 1e-9)


def test_where_everything_pruned_lies_left_it_is_the_least_squares_solution():
    """Optimal brain surgery in closed form: the columns to the right of all pruned ones take over all they can."""
    inputs, weight = correlated(200, 8), torch.randn(5, 8, generator=draw(6))
    weight[:, :4] *= 1e-3  # so that 4:8 prunes the first half
    pruned, mask = sparsegpt(weight, inputs.T.double() @ inputs.double(), Pattern(4, 8), damping=0.0)
    assert not mask[:, :4].any()
    torch.testing.assert_close(pruned.double(), least_squares(inputs, weight, mask), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (2, 8)])
def test_on_correlated_inputs_sparsegpt_beats_wanda_beats_magnitude(seed, n, m):
    inputs, errors = correlated(256, 64, seed), {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 32, bias=False))
        dense = model[0].weight.detach().clone()
        prune_(model, n, m, method=method, calibration=inputs.split(64), progress=False, where=ALL)
        errors[method] = output_error(inputs, dense, model[0].weight.detach())
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]


def test_the_size_of_a_block_changes_the_work_but_hardly_the_result():
    """Groups of m are chosen column by column, so for n:m the blocks only reorder sums."""
    inputs, weight = correlated(200, 32), torch.randn(6, 32, generator=draw(5))
    whole, kept = sparsegpt(weight, inputs.T @ inputs, TWO_FOUR)
    for block in (3, 8, 20):
        other, mask = sparsegpt(weight, inputs.T @ inputs, TWO_FOUR, block=block)
        assert torch.equal(mask, kept)
        torch.testing.assert_close(other, whole)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_dead_inputs_are_pruned_first_and_crash_nothing(method):
    inputs = correlated(64, 16)
    inputs[:, [1, 2, 5]] = 0.0
    model = nn.Sequential(nn.Linear(16, 6))
    model[0].weight.data += 10.0  # large, but they meet no input
    mask = prune_(model, 2, 4, method=method, calibration=[inputs], progress=False, where=ALL)["0"]
    assert not mask[:, [1, 2, 5]].any()
    assert torch.isfinite(model[0].weight).all()
    silent = nn.Sequential(nn.Linear(16, 6))
    assert groups_kept(
        prune_(silent, 2, 4, method=method, calibration=[torch.zeros(3, 16)], progress=False, where=ALL)["0"], 4
    ) == {2}
    assert torch.isfinite(silent[0].weight).all()


def test_fewer_tokens_than_inputs_need_damping():
    weight, inputs = torch.randn(3, 16, generator=draw()), correlated(5, 16)
    assert torch.isfinite(sparsegpt(weight, inputs.T @ inputs, TWO_FOUR)[0]).all()
    with pytest.raises(ValueError, match=r"not positive definite.*damping"):
        sparsegpt(weight, inputs.double().T @ inputs.double(), TWO_FOUR, damping=-0.01)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_half_precision_is_pruned_as_float32(method):
    inputs, masks = correlated(64, 16).bfloat16(), {}
    for kind in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        layer = nn.Linear(16, 8, bias=False)
        layer.weight.data = layer.weight.data.bfloat16().to(kind)
        model = nn.Sequential(layer)
        masks[kind] = prune_(model, 2, 4, method=method, calibration=[inputs.to(kind)], progress=False, where=ALL)["0"]
        assert layer.weight.dtype == kind
    assert torch.equal(masks[torch.bfloat16], masks[torch.float32])


# ------------------------------------------------------------------------------------------------------ whole models


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_later_layers_are_judged_by_what_pruned_earlier_ones_let_through(method):
    inputs = correlated(64, 16)
    model = network()
    prune_(model, 1, 4, method=method, calibration=[inputs], progress=False, where=ALL)
    by_hand = network()
    prune_(by_hand, 1, 4, method=method, calibration=[inputs], where=["0"], progress=False)
    hidden = by_hand[1](by_hand[0](inputs)).detach()
    second = nn.Sequential(by_hand[2])
    prune_(second, 1, 4, method=method, calibration=[hidden], progress=False, where=ALL)
    torch.testing.assert_close(model[2].weight, second[0].weight)
    at_once = network()  # judged by the dense first layer: another result, or this test would see nothing
    prune_(at_once, 1, 4, method=method, calibration=[inputs], where=["2"], progress=False)
    assert not torch.equal(at_once[2].weight != 0, model[2].weight != 0)


def test_layers_of_a_block_are_watched_together():
    model, calls = Residual(), []
    for number, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    tokens = torch.randint(0, 12, (4, 9), generator=draw())
    masks = prune_(model, 2, 4, calibration=[{"tokens": tokens[:2]}, {"tokens": tokens[2:]}], progress=False)
    assert list(masks) == ["blocks.0.left", "blocks.0.right", "blocks.1.left", "blocks.1.right"]
    # One batch shows the order. Then each block in turn sees both, and no pass goes further than it must.
    assert calls == [0, 1] + [0, 1] * 2 + [0, 1] * 2


def test_batches_are_tensors_tuples_or_mappings():
    tokens = torch.randint(0, 12, (4, 9), generator=draw())
    results = []
    for batch in (tokens, (tokens,), [tokens], {"tokens": tokens}):
        model = Residual()
        prune_(model, 2, 4, calibration=[batch], progress=False, where=ALL)
        results.append(model.blocks[1].right.weight.detach())
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_the_model_comes_back_in_the_mode_it_was_in():
    model = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.Linear(16, 8))
    model[1].eval()
    prune_(model, 2, 4, calibration=[correlated(32, 16)], progress=False, where=ALL)
    assert model.training and model[0].training and not model[1].training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model[0].weight.requires_grad


def test_a_bar_shows_every_batch_and_every_layer(capsys):
    model = network()
    layers = len(prune_(model, 2, 4, calibration=[correlated(32, 16)] * 3, where=ALL))
    shown = capsys.readouterr().out
    assert "wanda: 100%" in shown and f" {3 * layers + layers}/{3 * layers + layers} " in shown  # each a block
    prune_(network(), 2, 4, calibration=[correlated(32, 16)], progress=False, where=ALL)
    assert capsys.readouterr().out == ""


def test_layers_are_chosen_by_glob_by_predicate_or_by_what_m_divides():
    def chosen(**options) -> list[str]:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 16), nn.Linear(16, 8))
        return list(prune_(model, 2, 4, method="magnitude", **options))

    assert chosen() == ["1", "3"]  # the first convolution has 3 channels, and the last layer is the head
    assert chosen(where=["1", "4"]) == ["1", "4"]
    assert chosen(where=["[2-9]"]) == ["3", "4"]
    assert chosen(where=lambda name, layer: isinstance(layer, nn.Linear)) == ["3", "4"]


# ------------------------------------------------------------------------------------------------------ bad calls


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 2, "m": 4}, r"wanda got no calibration; expected batches.*magnitude"),
        ({"n": 2, "m": 4, "calibration": []}, "got no calibration"),
        ({"n": 5, "m": 4}, "got 5:4; expected 1 <= n <= m"),
        ({"n": 0, "m": 4}, "got 0:4"),
        ({"n": 2}, "expected n and m, or a sparsity"),
        ({"n": 2, "m": 4, "sparsity": 0.5}, "expected n and m, or a sparsity"),
        ({}, "expected n and m, or a sparsity"),
        ({"sparsity": 1.0}, "sparsity 1.0; expected 0 <= sparsity < 1"),
        ({"n": 2, "m": 4, "method": "random"}, "method 'random'; expected one of magnitude, wanda, sparsegpt"),
        ({"n": 2, "m": 5, "where": ["0"]}, r"0 has 16 inputs, which m = 5 does not divide.*where="),
        ({"n": 2, "m": 4, "where": ["0", "head"]}, r"named 'head'; expected patterns for 0, 2, 4"),
        ({"n": 2, "m": 64}, "no layer is left"),
        ({"n": 2, "m": 4, "where": lambda *_: False}, "no layer is left"),
    ],
)
def test_a_bad_call_says_what_to_do_and_changes_nothing(options, message):
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        prune_(model, **options)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_are_named(bad):
    inputs = correlated(8, 16)
    inputs[3, 4] = bad
    with pytest.raises(ValueError, match="input of 0 is not finite in calibration batch 1"):
        prune_(network(), 2, 4, calibration=[correlated(8, 16), inputs], progress=False, where=ALL)


def test_weights_that_are_not_finite_are_named():
    model = network()
    model[2].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="2 has weights that are not finite"):
        prune_(model, 2, 4, method="magnitude", where=ALL)


def test_a_layer_that_no_batch_reaches_is_named():
    model = network()
    model.add_module("unused", nn.Module())
    model.unused.layer = nn.Linear(8, 8)
    model.unused.forward = lambda x: x
    with pytest.raises(ValueError, match=r"never reaches unused.layer.*where="):
        prune_(model, 2, 4, calibration=[correlated(8, 16)], progress=False, where=ALL)


def test_a_grouped_convolution_is_for_magnitude_alone():
    model = nn.Sequential(nn.Conv2d(16, 16, 3, groups=2))
    with pytest.raises(ValueError, match=r"0 is a convolution in 2 groups.*magnitude"):
        prune_(model, 2, 4, calibration=[torch.randn(1, 16, 5, 5)], progress=False, where=ALL)
    assert set(prune_(model, 2, 4, method="magnitude", where=ALL)["0"].sum(1).flatten().tolist()) == {4}
