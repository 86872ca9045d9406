"""Progressive gradient flow: equations against the shared layers, the cost of a schedule, and how arms are trained."""

from __future__ import annotations

import dataclasses
from functools import cache
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from common import params as parameters
from common.data import text
from common.sparsity import FlopMeter, NMConfig, sparsify_
from papers.progressive_gradient_flow import data, evaluation, experiment, method
from papers.progressive_gradient_flow.settings import Params


def tiny(**changes) -> Params:
    loaded = parameters.load(Params, "progressive_gradient_flow", "smoke")
    return dataclasses.replace(loaded, **({"steps": 12, "batch": 16, "probe": 4} | changes))


@cache
def digits() -> data.Task:
    return data.image_task(tiny())


SCHEDULE = method.Schedule(100, 10, 20, blocks=(8, 4, 2, 1))


@pytest.mark.parametrize("pattern", [(1, 16), (2, 8), (2, 4), (1, 32)], ids=str)
def test_the_shared_schedules_are_the_equations(pattern):
    n, m = pattern
    arms = method.recipes(SCHEDULE)
    for step in range(120):
        s, rules = step - 10, {name: recipe.rule(step, n, m) for name, recipe in arms.items()}
        flows = [rules[name] for name in ("linear", "exponential", "stepwise", "geometric")]
        if s < 0:
            assert all(rule.dense for rule in flows)
            continue
        if s >= 70:
            assert all((rule.n, rule.m, rule.beta) == (n, m, 0.0) for rule in flows)
            continue
        assert rules["linear"].beta == pytest.approx(method.linear(s, 5.5 / 70))
        assert rules["exponential"].beta == pytest.approx(method.exponential(s, 11 / 70))
        assert (rules["stepwise"].n, rules["stepwise"].m) == method.stage(method.stepwise(n, m), s, 70)
        assert (rules["geometric"].n, rules["geometric"].m) == method.stage(method.geometric(n, m), s, 70)
        assert rules["sr_ste"].decay == 2e-4 and (rules["sr_ste"].n, rules["sr_ste"].m) == (n, m)


def test_both_mask_flows_let_the_same_pass():
    """The areas under beta over many steps: 1/(2c) with twice the c S."""
    arms = method.recipes(method.Schedule(10_000))
    area = {name: sum(arms[name].rule(s, 1, 16).beta for s in range(10_000)) for name in ("linear", "exponential")}
    assert area["linear"] == pytest.approx(area["exponential"], rel=2e-3)


def test_the_released_stages_end_before_the_pattern():
    arms = method.recipes(method.Schedule(400))
    kept = [arms["stepwise_released"].rule(step, 1, 16).n for step in range(401)]
    assert [kept[step] for step in (0, 99, 100, 200, 300, 399, 400)] == [15, 15, 8, 4, 2, 2, 1]


@pytest.mark.parametrize("grad_mode", ["ste", "scaled"])
def test_equations_and_layers_train_the_same_weights(grad_mode):
    assert evaluation.difference_to_layers(grad_mode, seed=1) < 1e-12


def test_a_teacher_is_found():
    found = evaluation.one_layer(evaluation.teacher(0), 0, "exponential")
    assert found[0] < 0.5 < 0.9 < found[-1], "chance is 1/16"


def test_half_life_is_that_of_the_schedule():
    beta = [method.exponential(s, 0.01) for s in range(100)]
    assert next(s for s, value in enumerate(beta) if value < 0.5) == evaluation.half_life(0.01) == 70


@pytest.mark.parametrize("arm", ["sr_ste", "linear", "exponential", "stepwise", "geometric", "stepwise_released"])
def test_cost_is_what_a_meter_counts_while_it_trains(arm):
    recipe = method.recipes(method.Schedule(20, 4, 4, blocks=(2, 1)))[arm]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32))
    handle = sparsify_(model, NMConfig(1, 16, where=["0"], recipe=recipe))
    with FlopMeter(model, "nonzeros") as meter:
        for _ in range(20):
            model(torch.randn(4, 32, requires_grad=True)).sum().backward()
            handle.step()
    expected = method.share_of_dense(recipe, 1, 16, 20)
    assert meter.sparse.total / meter.dense.total == pytest.approx(expected)


def test_products_by_hand():
    """One block of width 32 on 16 patches of 2 x 2 grey pixels: embedding 4 -> 32, attention, feed-forward, head."""
    params = tiny()
    embedding, attention, feed_forward, head = 16 * 4 * 32, 4 * 16 * 32 * 32, 2 * 16 * 32 * 128, 32 * 10
    dense = 2 * embedding + 3 * (attention + feed_forward + head)  # images need no gradient
    assert experiment.products(params, digits(), "dense", "1:16", 10) == 10 * dense
    sparse = 2 * embedding + 3 * (attention + head) + (2 / 16 + 1) * feed_forward
    assert experiment.products(params, digits(), "sr_ste", "1:16", 10) == pytest.approx(10 * sparse)


def test_long_training_takes_as_many_products():
    params = tiny(steps=1000)
    steps = experiment.steps_of(params, digits(), experiment.LONG, "1:16")
    assert 1000 < steps < 3000
    spent = experiment.products(params, digits(), experiment.LONG, "1:16", steps)
    allowed = experiment.products(params, digits(), "exponential", "1:16", 1000)
    assert spent == pytest.approx(allowed, rel=1e-3)
    assert experiment.steps_of(tiny(steps=0, epochs=2), digits(), "sr_ste", "1:16") == 180  # 1437 images, 16 a batch


def test_arms_of_a_seed_share_weights_and_batches():
    params, starts, firsts = tiny(), [], []
    for arm in ("sr_ste", "geometric", "dense"):
        with mock.patch.object(experiment, "fit", wraps=experiment.fit) as fit:
            fit.side_effect = lambda network, batches, *rest, **options: (
                starts.append({k: v.clone() for k, v in network.state_dict().items()}),
                firsts.append(next(iter(batches))[0]),
                [0.0],
            )[-1]
            with mock.patch.object(experiment, "_mean", return_value=0.0):
                experiment.train(params, digits(), arm, "1:16", 3)
    assert all(torch.equal(starts[0][k], other[k]) for other in starts[1:] for k in starts[0])
    assert all(torch.equal(firsts[0], other) for other in firsts[1:])


@pytest.mark.parametrize("arm", ["dense", "exponential", "stepwise_scaled", experiment.LONG])
def test_a_training_reports_what_it_measured(arm):
    result = experiment.train(tiny(), digits(), arm, "1:4", 0)
    again = experiment.train(tiny(), digits(), arm, "1:4", 0)
    assert result["score"] == again["score"] and result["curves"]["loss"] == again["curves"]["loss"]
    assert 0 <= result["score"] <= 100 and result["exact"] == 1.0
    assert result["steps"] == (12 if arm != experiment.LONG else result["steps"])
    steps, values = result["curves"]["variance_pruned"]
    assert steps[:3] == [0, 4, 8] and len(values) == len(steps)
    assert np.isnan(result["variance_pruned"]) == (arm == "dense")
    assert result["curves"]["flip_rate"][0][:3] == [4, 8, 12]


def test_text_is_learned_too():
    """abcabc...: after each letter only one can come, so the perplexity falls from 3 to 1."""
    params = tiny(text="markov", steps=60, text_learning_rate=1e-2)
    task = data.task_of(params, "text")
    assert isinstance(task, data.Text) and task.score(task.network()) == pytest.approx(27, rel=0.1)
    letters = torch.arange(900) % 3
    task.corpus = text.Corpus("abc", letters, letters[:90], letters[:90], ("a", "b", "c"))
    assert experiment.train(params, task, "exponential", "1:4", 0)["score"] < 1.2


def test_every_profile_names_arms_that_there_are():
    for profile in parameters.PROFILES:
        params = parameters.load(Params, "progressive_gradient_flow", profile)
        arms = [arm for _, arm, _ in experiment.runs(params)]
        assert set(arms) <= set(experiment.LABELS)
        for arm in arms:
            experiment.recipe_of(params, arm, 1000)


@pytest.fixture
def imagenet(tmp_path) -> str:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(4):
                pixels = np.random.default_rng(index).integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{index}.JPEG")
    return str(tmp_path)


def test_the_paper_profile_trains_on_a_folder(imagenet):
    """ViT-B/16 itself is too large for a test; a shallow one has the same names."""
    from torchvision.models import VisionTransformer

    def shallow(**options):
        return VisionTransformer(
            image_size=224, patch_size=56, num_layers=1, num_heads=2, hidden_dim=64, mlp_dim=128, **options
        )

    loaded = parameters.load(Params, "progressive_gradient_flow", "paper", {"data_dir": imagenet})
    params = dataclasses.replace(loaded, device="cpu", batch=4, epochs=0, steps=3, probe=1, warmup=0.0)
    with mock.patch("torchvision.models.vit_b_16", shallow):
        task = data.image_task(params)
        x, target = next(task.batches(0, 1))
        assert x.shape == (4, 3, 224, 224) and torch.allclose(target.sum(1), torch.ones(4))
        assert "RandAugment" in repr(task.train.transform) and "RandAugment" not in repr(task.test.transform)
        result = experiment.train(params, task, "exponential", "1:16", 0)
        steps = experiment.steps_of(dataclasses.replace(params, steps=0, epochs=5), task, "sr_ste", "1:16")
    assert result["exact"] == 1.0 and result["score"] in (0.0, 12.5, 25.0, 37.5, 50.0, 62.5, 75.0, 87.5, 100.0)
    assert steps == 10 and task.provenance()[0] == "imagenet"


def test_mixup_blends_pairs():
    x, target = torch.arange(4.0)[:, None], torch.eye(4)
    mixed, blended = data._mixed(x, target, 0.5, np.random.default_rng(0))
    share = float(blended[0, 0])
    assert 0 < share < 1 and torch.allclose(mixed, share * x + (1 - share) * x.flip(0))
    assert data._mixed(x, target, 0.0, np.random.default_rng(0))[0] is x


def test_missing_imagenet_says_what_to_do(tmp_path):
    params = parameters.load(Params, "progressive_gradient_flow", "paper", {"data_dir": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match="root="):
        data.image_task(params)
