"""SST: the decomposition, its gradients, what is drawn when, the arms, the layout of real models."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from common import params as parameters
from common import seeds
from common.models.stable_diffusion import MissingWeights
from papers.sst import baselines, data, evaluation, experiment, method
from papers.sst.settings import Params


def tiny(**changes) -> Params:
    small = {"length": 1500, "width": 16, "depth": 1, "context": 8, "rank": 2, "steps": 12, "batch": 4, "interval": 3}
    return dataclasses.replace(parameters.load(Params, "sst", "smoke"), **(small | changes))


def drawer() -> torch.Generator:
    return seeds.generator(0, "test")


# ------------------------------------------------------------------------------------------------ the layer


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5)])
def test_decomposition_gives_the_weight_back(shape):
    weight = torch.randn(shape, generator=drawer(), dtype=torch.float64)
    left, sigma, right = method.decompose(weight)
    assert left.shape == (shape[0], min(shape)) and right.shape == (shape[1], min(shape))
    torch.testing.assert_close(method.compose(left, sigma, right), weight)
    assert (sigma.diff() <= 0).all()


def test_half_of_the_chance_is_even():
    sigma = torch.tensor([3.0, 1.0, 0.0, 0.0])
    torch.testing.assert_close(method.probability(sigma), torch.tensor([0.5, 0.25, 0.125, 0.125]))
    torch.testing.assert_close(method.probability(torch.zeros(4)), torch.full((4,), 0.25))


def test_large_values_are_drawn_more_often_but_none_never():
    sigma, draw = torch.tensor([8.0, 1.0, 1.0, 0.0]), drawer()
    counts = torch.zeros(4)
    for iteration in range(2000):
        counts[method.choose(sigma, 1, "mixed", iteration, draw)] += 1
    # a binomial share of 2000 draws has a standard deviation of at most 0.012
    torch.testing.assert_close(counts / 2000, torch.tensor([0.525, 0.175, 0.175, 0.125]), atol=0.04, rtol=0)


@pytest.mark.parametrize("sampling", ["mixed", "proportional", "uniform", "top", "sequential"])
def test_what_is_chosen_is_r_different_indices(sampling):
    for sigma in (torch.arange(7.0), torch.zeros(7)):  # with sizes that fell to zero too
        for iteration in range(5):
            chosen = method.choose(sigma, 3, sampling, iteration, drawer())
            assert len(set(chosen.tolist())) == 3 and chosen.min() >= 0 and chosen.max() < 7


def test_gradients_are_those_of_the_formula():
    dense = evaluation.layer()
    spectral = method.SpectralLinear(dense, 4)
    spectral.swap_("mixed", 1, drawer())
    upstream = torch.randn(dense.weight.shape, generator=drawer(), dtype=torch.float64)
    spectral.weight.backward(upstream)
    left, _, right = method.decompose(dense.weight.detach())
    chosen = spectral.chosen
    torch.testing.assert_close(spectral.chosen_left.grad, upstream @ right[:, chosen])
    torch.testing.assert_close(spectral.chosen_right.grad, upstream.T @ left[:, chosen])
    torch.testing.assert_close(spectral.sigma.grad, (left.T @ upstream @ right).diagonal())


def test_the_true_gradient_passes_gradcheck():
    spectral = method.SpectralLinear(evaluation.layer(5, 4), 2, enhanced=False)

    def weight(sigma, left, right):
        return method.Compose.apply(spectral.left, sigma, spectral.right, left, right, spectral.chosen, False, None)

    inputs = [
        p.detach().clone().requires_grad_() for p in (spectral.sigma, spectral.chosen_left, spectral.chosen_right)
    ]
    assert torch.autograd.gradcheck(weight, inputs)


def test_steps_leave_unit_vectors_and_sizes_that_are_not_negative():
    dense = evaluation.layer()
    spectral = method.SpectralLinear(dense, 4)
    with torch.no_grad():
        spectral.sigma.sub_(1.0)
        spectral.chosen_left.mul_(3)
    spectral.project_()
    assert spectral.sigma.min() == 0
    torch.testing.assert_close(spectral.chosen_left.norm(dim=0), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("start", ["svd", "random"])
def test_no_event_changes_what_the_layer_computes(start):
    dense = evaluation.layer()
    x, target = evaluation.inputs_and_targets(dense)
    spectral = method.SpectralLinear(copy.deepcopy(dense), 4, start=start)
    torch.testing.assert_close(spectral(x), dense(x))
    evaluation._train(spectral, x, target, steps=10)
    before = spectral(x)
    assert (before - dense(x)).abs().max() > 0.01  # something was learned, or the rest proves nothing
    for event in (lambda: spectral.swap_("mixed", 1, drawer()), spectral.decompose_):
        event()
        torch.testing.assert_close(spectral(x), before)


def test_only_the_chosen_sizes_learn_where_asked():
    dense = evaluation.layer()
    spectral = method.SpectralLinear(dense, 4, all_sigma=False)
    evaluation._loss(spectral, *evaluation.inputs_and_targets(dense)).backward()
    assert (spectral.sigma.grad[4:] == 0).all() and (spectral.sigma.grad[:4] != 0).all()


def test_a_rank_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"rank=17.*expected 1\.\.16"):
        method.SpectralLinear(evaluation.layer(), 17)
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        method.in_blocks(nn.Linear(2, 2))


# ------------------------------------------------------------------------------------------------ the training


def test_vectors_change_on_time_and_lose_their_moments():
    network = experiment.build(tiny(), 10)
    layers = method.spectral_(network, 2)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    keeper = method.Spectral(layers, optimizer, interval=3, sampling="sequential", generator=drawer())
    assert keeper.round == 8  # 16 singular values, two at a time
    window = torch.randint(10, (4, 9), generator=drawer())
    first = next(iter(layers.values()))
    for done in range(1, 25):
        optimizer.zero_grad()
        experiment._loss(tiny(), network, window).backward()
        optimizer.step()
        keeper.after_step(done)
        assert (first.chosen_left in optimizer.state) == (done % 3 != 0)
        assert (first.sigma in optimizer.state) == (done != 24)
    assert keeper.chosen[:3] == [[0, 1], [2, 3], [4, 5]] and len(keeper.chosen) == 9
    assert first.orthogonality_error() < 1e-5  # decomposed again after a round; float32


def test_relora_merges_and_lora_does_not():
    layer = nn.Linear(6, 5)
    low_rank = baselines.LowRankLinear(layer, 2)
    torch.testing.assert_close(low_rank.weight, layer.weight.detach())
    with torch.no_grad():
        low_rank.up.normal_()
    before, x = low_rank.weight.detach(), torch.randn(3, 6)
    out = low_rank(x)
    low_rank.merge_()
    torch.testing.assert_close(low_rank.base, before)
    torch.testing.assert_close(low_rank(x), out)
    assert (low_rank.up == 0).all()


@pytest.mark.parametrize("arm", list(experiment.ARMS))
def test_every_arm_trains_and_repeats_itself(arm):
    first, again = (experiment.train(tiny(), arm, 1e-2, 0) for _ in range(2))
    assert first["losses"] == again["losses"] and first["perplexity"] == again["perplexity"]
    assert len(first["losses"]) == len(first["gradients"]) == 12
    assert first["losses"][-1] < first["losses"][0]
    assert first["moments"] == 2 * first["trained"]
    assert set(first["cut"]) == set(tiny().cuts)


def test_arms_of_a_seed_start_alike():
    starts = {experiment.train(tiny(), arm, 1e-2, 0)["losses"][0] for arm in ("full", "lora", "relora", "sst", "top")}
    # the decomposition rounds in float32
    assert max(starts) - min(starts) < 1e-4


def test_trained_entries_are_as_counted():
    params = tiny()
    pairs = [tuple(layer.weight.shape) for layer in method.in_blocks(experiment.build(params, 10)).values()]
    for arm in ("full", "lora", "sst"):
        expected = sum(method.trained(*pair, params.rank, arm) for pair in pairs)
        assert experiment.train(params, arm, 1e-2, 0)["trained"] == expected


def test_folding_leaves_plain_layers_that_compute_the_same():
    network = experiment.build(tiny(), 10)
    layers = method.spectral_(network, 2)
    for layer in layers.values():
        layer.swap_("mixed", 1, drawer())
    tokens = torch.randint(10, (2, 8), generator=drawer())
    before = network(tokens)
    experiment.fold_(network)
    assert all(type(layer) is nn.Linear for layer in method.in_blocks(network).values())
    torch.testing.assert_close(network(tokens), before, atol=1e-5, rtol=1e-5)


def test_a_training_that_breaks_is_noted_and_not_chosen():
    broken = experiment.train(tiny(), "full", 1e30, 0)
    assert broken["perplexity"] == experiment.DIVERGED
    assert experiment.best_rate({1e30: broken["validation"], 1e-2: 9.0}) == 1e-2


def test_cutting_off_singular_values_lowers_the_rank():
    weight = torch.randn(8, 6, generator=drawer())
    assert torch.linalg.matrix_rank(method.truncated(weight, 0.5)) == 3
    torch.testing.assert_close(method.truncated(weight, 0.0), weight, atol=1e-5, rtol=1e-5)


def test_correlation_of_what_it_should_be():
    assert evaluation.correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert evaluation.correlation([1, 2, 3], [3, 2, 1, 9]) == pytest.approx(-1)


# ------------------------------------------------------------------------------------------------ real models


@pytest.fixture
def opt(tmp_path: Path) -> Path:
    """A tiny OPT with its tokenizer, and a text, in one folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import OPTConfig, PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["the", "cat", "sat", "on", "a", "mat", ".", "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "ffn_dim": 32, "num_attention_heads": 2, "vocab_size": 8}
    OPTConfig(**sizes, max_position_embeddings=32, word_embed_proj_dim=16).save_pretrained(tmp_path)
    (tmp_path / "train.txt").write_text("the cat sat on a mat . " * 200)
    (tmp_path / "test.txt").write_text("a cat sat on the mat . " * 5)
    return tmp_path


def test_a_model_of_transformers_trains_from_scratch(opt):
    given = {"data_dir": str(opt), "model": str(opt)}
    loaded = parameters.load(Params, "sst", "paper", given)
    params = dataclasses.replace(loaded, device="cpu", context=8, rank=2, steps=30, batch=4, interval=5, autocast=False)
    texts = data.corpus(params)
    assert texts.name == "own_text" and len(texts.vocabulary) == 8
    found = experiment.train(params, "sst", 1e-2, 0)
    assert found["losses"][-1] < found["losses"][0] and len(found["chosen"]) == 7


def test_what_is_missing_says_what_to_do(tmp_path):
    params = parameters.load(Params, "sst", "paper", {"data_dir": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match=r"train\.txt and test\.txt"):
        data.corpus(params)
    nowhere = str(tmp_path / "nothing")
    with pytest.raises(MissingWeights, match="config"):
        experiment.build(dataclasses.replace(params, model=nowhere), 10)
    with pytest.raises(MissingWeights, match="tokenizer"):
        data.tokenizer(nowhere)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"arms": ["full", "sst"]}, "lora, relora"), ({"tuning_seed": 0}, "one of the seeds"), ({"rates": []}, "rates")],
)
def test_settings_that_make_no_sense_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        tiny(**change)
