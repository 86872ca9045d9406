"""LoRA's limits by hand: features, chains, ranks, norms of problems, what is counted, settings, and real models."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from common import params as parameters
from common.models.stable_diffusion import MissingWeights
from common.training import long_context
from common.training.long_context import RECIPES, build
from papers.lora_limits import data, evaluation, experiment, method
from papers.lora_limits.settings import Params


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tiny(**changes) -> Params:
    small = {"length": 24, "lengths": [16, 32], "degrees": [1, 2, 4], "adapter_steps": 2, "context": 32, "passages": 2}
    return dataclasses.replace(parameters.load(Params, "lora_limits", "smoke"), **(small | changes))


def untrained(params: Params) -> experiment.Model:
    torch.manual_seed(0)
    state = build(RECIPES["tiny"], len(long_context.corpus(params.dataset).vocabulary)).state_dict()
    return experiment.Model("tiny", state, "")


# ---------------------------------------------------------------------------------------------------------- the method


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("degree", [0, 1, 3, 6])
def test_features_multiply_to_the_polynomial(size: int, degree: int) -> None:
    query, key = draw(7, size), draw(9, size, seed=1)
    left, right = method.features(query, degree), method.features(key, degree)
    assert left.shape == (7, math.comb(size + degree, degree))
    torch.testing.assert_close(left @ right.T, method.taylor(query @ key.T / size, degree))


def test_taylor_is_the_series() -> None:
    scores = torch.tensor([-2.0, 0.0, 0.5, 3.0], dtype=torch.float64)
    torch.testing.assert_close(method.taylor(scores, 3), 1 + scores + scores**2 / 2 + scores**3 / 6)
    torch.testing.assert_close(method.taylor(scores, 40), scores.exp())


@pytest.mark.parametrize("norm", [0.5, 3.0])
def test_gradients_are_those_of_autograd(norm: float) -> None:
    problem = data.problem(3, length=20, head=3, rank=2, norm=norm)
    exact = method.adapter_gradients(problem, method.dense)
    theirs = experiment._autograd(problem)
    assert set(exact) == set(theirs) and len(exact) == 6
    for name, value in theirs.items():
        torch.testing.assert_close(exact[name], value)


@pytest.mark.parametrize("degree", [1, 4])
def test_the_chain_is_the_polynomial(degree: int) -> None:
    query, key, value, y = (draw(15, 3, seed=seed) for seed in range(4))
    chained = method.chained(query, key, value, y=y, degree=degree)
    for ours, theirs in zip(chained, method.polynomial(degree)(query, key, value, y=y), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_rank_is_eckart_and_young() -> None:
    values = torch.tensor([4.0, 3.0, 1.0, 0.1], dtype=torch.float64)
    left, right = torch.linalg.qr(draw(6, 4))[0], torch.linalg.qr(draw(5, 4, seed=1))[0]
    matrix = left @ values.diag() @ right.T
    for tolerance, rank in ((0.001, 4), (0.05, 3), (0.25, 2), (0.7, 1)):
        assert method.numerical_rank(matrix, tolerance) == rank
        lost = values[rank:].square().sum().sqrt() / values.norm()
        assert lost <= tolerance < values[rank - 1 :].square().sum().sqrt() / values.norm()


# ------------------------------------------------------------------------------------------------------------ the data


def test_problems_have_their_norm() -> None:
    problem = data.problem(0, length=30, head=4, rank=2, norm=1.7)
    query, key, _ = problem.projected()
    assert query.abs().max().item() == pytest.approx(1.7) and key.abs().max().item() == pytest.approx(1.7)
    frozen, adapted = problem.query.norms(problem.x)
    assert 0 < frozen <= 5 and adapted > 0.1
    again = data.problem(0, length=30, head=4, rank=2, norm=1.7)
    assert torch.equal(problem.x, again.x) and not torch.equal(
        problem.x, data.problem(1, length=30, head=4, rank=2, norm=1).x
    )


def test_signs_are_as_large_as_they_may_be() -> None:
    query, key = data.signs(0, 64, 2.5)
    assert query.shape == key.shape == (64, 12)
    assert (query.abs() == 2.5).all() and (key.abs() == 2.5).all() and abs(query.mean().item()) < 0.5
    assert [norm(1000) < method.threshold(1000) for norm in data.REGIMES.values()] == [True, True, False, False]


# --------------------------------------------------------------------------------------------------- what is measured


def test_growth_sees_squares() -> None:
    found = experiment.growth(tiny(length=80))
    assert found["exact"] == pytest.approx(4) and found["chained"] == pytest.approx(2)


def test_exponent_is_the_slope() -> None:
    assert experiment.exponent([64, 128, 256], [64**0.3, 128**0.3, 256**0.3]) == pytest.approx(0.3)


def test_a_degree_that_is_not_reached_is_infinite() -> None:
    found = {(1.0, 2): 1e-2, (1.0, 4): 1e-4, (2.0, 2): 1.0, (2.0, 4): 0.1}
    assert experiment.degree_needed(found, 1.0, 1e-3) == 4
    assert experiment.degree_needed(found, 2.0, 1e-3) == math.inf


def test_ranks_count_the_attention_of_signs() -> None:
    params = tiny()
    found = experiment.ranks(params, 0)
    query, key = data.signs(0, 32, data.REGIMES["at"](32))
    weights = np.exp((query @ key.T / query.shape[1]).numpy())
    values = np.linalg.svd(weights / weights.sum(1, keepdims=True), compute_uv=False)
    lost = np.sqrt(np.cumsum(values[::-1] ** 2)[::-1] / np.sum(values**2))  # when all from here on are dropped
    assert found["at", "10 %", 32] == int((lost > 0.1).sum())
    named = {(metric, variant) for metric, variant, _ in evaluation.of_ranks(params, found)}
    assert ("exponent", "below/1 %") in named and len(named) == 3 * 4 * 2


def test_heads_are_measured_after_their_adapters() -> None:
    params = tiny()
    found = experiment.heads(params, untrained(params), 0)
    assert len(found["adapter"]["frozen"]) == 6 and min(found["adapter"]["adapter"]) > 0
    assert len(found["norm"]) == len(found["error"]) == 4  # two layers of two heads
    errors = [found["error"][0][degree] for degree in experiment.REAL_DEGREES]
    assert errors[-1] < 1e-3 < errors[0]
    assert found == experiment.heads(params, untrained(params), 0)
    still = experiment.heads(dataclasses.replace(params, adapter_steps=0), untrained(params), 0)
    assert max(still["adapter"]["adapter"]) == 0


def test_bad_settings_are_refused() -> None:
    for changes, message in (({"norms": [1.0]}, "norms: got"), ({"degrees": [4, 2]}, "degrees: got")):
        with pytest.raises(ValueError, match=message):
            tiny(**changes)


# ---------------------------------------------------------------------------------------------------------- real models


def test_a_model_of_transformers_is_measured_on_own_texts(tmp_path: Path) -> None:
    from tiny_pretrained import write_language_models

    root = write_language_models(tmp_path)
    for name in ("train.txt", "test.txt"):
        (root / name).write_text((root / "text.txt").read_text())
    params = tiny(
        dataset="folder", data_dir=str(root), model=str(root / "llama"), adapted=["q_proj", "k_proj", "v_proj"]
    )
    model = experiment.prepare(params)
    assert model.state is None and len(model.sha256) == 64
    first, again = (experiment.heads(params, model, 0) for _ in range(2))
    assert len(first["norm"]) == 8 and first == again, "a second seed starts from the model as it was"


def test_missing_texts_and_weights_are_named(tmp_path: Path) -> None:
    params = tiny(dataset="folder", model=str(tmp_path / "nowhere"))
    with pytest.raises(MissingWeights, match="nowhere cannot be loaded"):
        experiment.prepare(params)
    lm = experiment.network(tiny(), untrained(tiny()))
    with pytest.raises(FileNotFoundError, match="data_dir is empty"):
        data.windows(params, lm, "test", 1, 0)
    with pytest.raises(FileNotFoundError, match=r"test\.txt does not exist"):
        data.windows(dataclasses.replace(params, data_dir=str(tmp_path)), lm, "test", 1, 0)
