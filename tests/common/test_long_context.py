"""The model for long prompts: what it reads, that it learns, that it is the same model again, announced questions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from common import paths
from common.data import tasks, text
from common.data.text import Corpus
from common.training import long_context
from common.training.long_context import Recipe, predictions, questions

TINY = Recipe(32, 1, 2, 1e-2, ((64, 2, 6), (80, 1, 2)))


def corpus() -> Corpus:
    return text.markov(2000, vocabulary=10)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_announced_questions_stand_before_the_answers_once_more(task: str) -> None:
    batch = questions(task, 128, 3, seed=1)
    size = 2 if task == "filter" else 1
    assert batch.tokens.shape == (3, 128)
    behind = batch.tokens[:, batch.prompt :].unflatten(1, (8, size + 1))
    announced = batch.tokens[:, batch.prompt - 8 * size - 1 : batch.prompt - 1].unflatten(1, (8, size))
    assert torch.equal(announced, behind[..., :-1])
    marks = batch.tokens[:, [batch.prompt - 8 * size - 2, batch.prompt - 1]]
    assert (marks == tasks.ASK).all()
    assert torch.equal(batch.tokens[batch.answers], behind[..., -1].flatten())
    assert torch.equal(batch.tokens, questions(task, 128, 3, seed=1).tokens)
    assert not torch.equal(batch.tokens, questions(task, 128, 3, seed=2).tokens)


def test_predictions_stand_where_their_tokens_do() -> None:
    logits = torch.nn.functional.one_hot(torch.tensor([[3, 1, 2]]), 5).float()
    assert predictions(logits).tolist() == [[0, 3, 1]]


def test_batches_hold_every_task_and_the_text_at_rising_lengths() -> None:
    batches = list(long_context._batches(TINY, corpus()))
    assert [tuple(batch.tokens.shape) for batch in batches] == [(10, 64)] * 6 + [(5, 80)] * 2
    first = batches[0]
    assert first.tokens[:8, 0].tolist() == [tasks.MARKS[task] for task in long_context.DRAWN for _ in range(2)]
    assert (first.tokens[8:] >= long_context.TEXT).all() and (first.tokens[:8] < long_context.TEXT).all()
    assert first.answers.sum(1).tolist() == [8] * 8 + [0] * 2
    roomy = list(long_context._batches(dataclasses.replace(TINY, stages=((96, 1, 4),)), corpus()))
    assert [batch.answers.sum(1).tolist() for batch in roomy] == [[8] * 4 + [0]] * 3 + [[1, 1, 8, 8, 0]]
    assert ((roomy[0].tokens == tasks.ASK).sum(1) == torch.tensor([2, 2, 2, 2, 0])).all()  # announced


def test_the_loss_is_that_of_answers_and_half_that_of_the_text() -> None:
    class Uniform(torch.nn.Module):
        def forward(self, tokens):
            return torch.zeros(*tokens.shape, long_context.TEXT + 10)

    batch = next(long_context._batches(TINY, corpus()))
    expected = 1.5 * torch.tensor(float(long_context.TEXT + 10)).log()
    torch.testing.assert_close(long_context._loss(Uniform(), batch), expected)


def test_training_lowers_the_loss_and_gives_the_same_model_again() -> None:
    recipe = dataclasses.replace(TINY, stages=((64, 4, 30),))
    first, again = (long_context.train(recipe, corpus()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    other = long_context.train(dataclasses.replace(recipe, seed=1), corpus())
    assert not torch.equal(first.head.weight, other.head.weight)
    batch = next(long_context._batches(dataclasses.replace(recipe, seed=2), corpus()))
    fresh = long_context.build(recipe, 10)
    with torch.no_grad():
        assert long_context._loss(first, batch) < long_context._loss(fresh, batch) - 0.3


def test_a_model_is_kept_by_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "checkpoint", lambda name: tmp_path / f"{name}.safetensors")
    model, found = long_context.trained("a-model", TINY, corpus())
    same, restored = long_context.trained("a-model", TINY, corpus())
    assert not found.restored and restored.restored and found.sha256 == restored.sha256
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens), same(tokens)) and not model.training
    _, other = long_context.trained("a-model", dataclasses.replace(TINY, rate=2e-2), corpus())
    assert not other.restored


def test_recipes_without_stages_are_refused() -> None:
    with pytest.raises(ValueError, match=r"stages \(\); expected some of"):
        dataclasses.replace(TINY, stages=())
    assert {"large", "small"} <= set(long_context.RECIPES)
