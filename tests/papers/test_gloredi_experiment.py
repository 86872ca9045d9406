"""GloReDi's arms: equal size, paired seeds, what a teacher may and may not change, and training that can be resumed."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch

from common import cells
from common import params as parameters
from papers.gloredi import data, experiment
from papers.gloredi.settings import Params


def tiny(**changes) -> Params:
    small = {"size": 16, "train_images": 4, "full_views": 36, "views": [9], "main_views": 9, "steps": 12, "bank": 4}
    return dataclasses.replace(parameters.load(Params, "gloredi", "smoke"), **(small | changes))


@cache
def training() -> data.TripleSet:
    return data.TripleSet(tiny(), "train")


def fit(name: str, seed: int = 0, **changes) -> dict:
    params = tiny(**changes)
    return experiment.fit(params, experiment.arms(params)[name], training(), 9, seed)


def student(result: dict) -> dict[str, torch.Tensor]:
    return {name: value for name, value in result["state"].items() if name.startswith("student")}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_arms_have_equal_size_at_laptop_scale():
    params = parameters.load(Params, "gloredi", "laptop")
    sizes = {
        name: experiment.parameter_count(experiment.build(params, arm)) for name, arm in experiment.arms(params).items()
    }
    assert max(sizes.values()) <= 1.03 * min(sizes.values()), sizes


def test_a_seed_fixes_the_training_and_another_changes_it():
    assert equal(fit("fourier")["state"], fit("fourier")["state"])
    assert not equal(fit("fourier")["state"], fit("fourier", seed=1)["state"])


def test_a_teacher_changes_the_student_through_the_distillation_losses_alone():
    """Paired seeds rest on this: with zero weights the arm with a teacher is the arm without."""
    without = student(fit("fourier"))
    assert equal(student(fit("gloredi", w_distill=0.0, w_contrast=0.0)), without)
    assert not equal(student(fit("rdd")), without)


def test_full_view_teacher_sees_the_target():
    assert not equal(fit("full_teacher")["state"], fit("gloredi")["state"])
    everything = data.TripleSet(tiny(teacher_factor=4), "train")  # 4 x 9 views: all of them
    assert torch.equal(*everything.batch([0], 9)[1:])


def test_the_released_schedule_ends_where_its_last_stage_would_begin():
    assert fit("released", steps=50)["curves"]["pixel"][-1][0] == 46  # 47 of 50 steps: 141 of 150 epochs
    assert fit("gloredi", steps=50)["curves"]["pixel"][-1][0] == 49


def test_contrast_runs_in_the_arms_that_have_it():
    assert max(value for _, value in fit("gloredi")["curves"]["bpc"]) > 0
    for arm in ("rdd", "released"):
        assert max(value for _, value in fit(arm)["curves"]["bpc"]) == 0


def test_epochs_replace_steps():
    result = fit("fourier", steps=0, epochs=3)  # 3 passes over 4 images, 2 at a time
    assert [step for step, _ in result["curves"]["pixel"]] == list(range(6))


def test_restored_network_reconstructs_as_the_trained_one():
    params, result = tiny(), fit("gloredi")
    network = experiment.restore(params, experiment.arms(params)["gloredi"], result["state"])
    images = training().batch([0, 1, 2], 9).sparse
    together, one_by_one = (experiment.reconstruct(network, images, chunk=n) for n in (3, 1))
    assert together.shape == (3, 1, 16, 16)
    torch.testing.assert_close(together, one_by_one)


def test_a_finished_training_is_not_repeated(tmp_path, monkeypatch):
    result = fit("fourier")
    (tmp_path / "papers").mkdir()
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path)
    store, calls = cells.Store("gloredi", "digest"), []

    def train() -> dict:
        calls.append(1)
        return result

    first, _, restored = store.get("fourier-9-seed0", train, tell=lambda message: None)
    again, _, restored_again = store.get("fourier-9-seed0", train, tell=lambda message: None)
    assert (len(calls), restored, restored_again) == (1, False, True)
    assert equal(first["state"], again["state"]) and first["curves"] == again["curves"]


@pytest.mark.parametrize("arm", ["unet", "plain", "fourier", "gloredi"])
def test_every_network_learns(arm):
    losses = [value for _, value in fit(arm, steps=60)["curves"]["pixel"]]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
