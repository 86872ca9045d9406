"""Long-context tasks: every answer is found again in the prompt by code that shares nothing with the generator."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from common.data import tasks
from common.data.tasks import ASK, CHAPTER, FILLER, GROUP_SIZE, GROUPS, MARKS, MASK, NO, SET, VALUES, WORDS, YES


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def split(task: str, row: list[int]) -> tuple[list[int], list[list[int]]]:
    """The prompt between mark and ASK, and the questions with their answers."""
    assert row[0] == MARKS[task]
    middle = row.index(ASK)
    size, behind = 3 if task == "filter" else 2, row[middle + 1 :]
    return row[1:middle], [behind[i : i + size] for i in range(0, len(behind), size)]


def retrieve(prompt, question):
    places = [i for i, token in enumerate(prompt) if token == question[0]]
    assert len(places) == 1
    return prompt[places[0] + 1]


def track(prompt, question):
    known = {}
    for i, token in enumerate(prompt):
        if token == SET:
            name, of = prompt[i + 1 : i + 3]
            known[name] = of if of in VALUES else known[of]  # a variable is set before it is used
    return known[question[0]]


def common(prompt, question):
    group = GROUPS.index(question[0])
    found = Counter(word for word in prompt if WORDS.index(word) // GROUP_SIZE == group).most_common(2)
    assert len(found) == 1 or found[0][1] > found[1][1]
    return found[0][0]


def chapters(prompt, question):
    label, event = question
    starts = [i for i, token in enumerate(prompt) if token == CHAPTER]
    mine = [prompt[i + 2 : end] for i, end in zip(starts, [*starts[1:], None], strict=True) if prompt[i + 1] == label]
    assert len(mine) == 1
    return YES if event in mine[0] else NO


ORACLES = {"retrieve": retrieve, "track": track, "common": common, "filter": chapters}


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize(("length", "queries"), [(64, 4), (129, 8), (512, 8)])
def test_every_answer_follows_from_the_prompt(task, length, queries):
    batch = tasks.draw(task, length=length, batch=12, generator=generator(length), queries=queries)
    assert batch.tokens.shape == batch.answers.shape == (12, length)
    assert batch.answers.sum(1).tolist() == [queries] * 12 and not batch.answers[:, : batch.prompt].any()
    for row, places in zip(batch.tokens.tolist(), batch.answers.tolist(), strict=True):
        prompt, questions = split(task, row)
        assert len(prompt) == batch.prompt - 2 and len(questions) == queries
        assert len({tuple(question[:-1]) for question in questions}) == queries  # none is asked twice
        assert [question[-1] for question in questions] == [t for t, p in zip(row, places, strict=True) if p]
        for *question, answer in questions:
            assert ORACLES[task](prompt, question) == answer
    assert batch.tokens.min() > MASK and batch.tokens.max() < tasks.VOCABULARY


@pytest.mark.parametrize("hops", [0, 1, 3])
def test_chains_have_as_many_hops_as_asked_for(hops):
    batch = tasks.draw("track", length=256, batch=4, generator=generator(), hops=hops)
    for row in batch.tokens.tolist():
        depth = {}
        for i, token in enumerate(row):
            if token == SET:
                depth[row[i + 1]] = 0 if row[i + 2] in VALUES else depth[row[i + 2]] + 1
        counts = Counter(depth.values())
        assert sorted(counts) == list(range(hops + 1)) and len(set(counts.values())) == 1


def test_the_most_common_word_leads_clearly_and_about_half_of_the_chapters_lack_the_event():
    batch = tasks.draw("common", length=512, batch=1, generator=generator())
    counts = sorted(Counter(split("common", batch.tokens[0].tolist())[0]).values())
    assert len(counts) == len(WORDS) and min(counts[-8:]) >= 2.5 * max(counts[:-8])
    batch = tasks.draw("filter", length=256, batch=64, generator=generator(), queries=7)
    lacking = (batch.tokens == NO).sum(1)
    assert set(lacking.tolist()) == {3, 4}


def test_nothing_but_needles_tells_the_answer():
    """Values do not depend on their keys, or on where they stand: over many prompts their shares are chance."""
    batch = tasks.draw("retrieve", length=96, batch=400, generator=generator())
    told = batch.tokens[batch.answers]
    expected = len(told) / len(VALUES)
    counts = torch.stack([(told == value).sum() for value in VALUES]).double()
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 49.7  # 0.1 % of draws exceed it at 23 degrees of freedom
    first = batch.tokens[:, 1:-17]
    filler = (first >= FILLER.start).double().mean(0)
    assert (filler[5:-5] - filler.mean()).abs().max() < 0.12  # four standard errors of 400 draws, a little more


@pytest.mark.parametrize("task", tasks.TASKS)
def test_the_same_generator_draws_the_same(task):
    one, two, other = (tasks.draw(task, length=80, batch=3, generator=generator(s), queries=4) for s in (1, 1, 2))
    assert torch.equal(one.tokens, two.tokens) and not torch.equal(one.tokens, other.tokens)
    shared = generator(1)
    first, second = (tasks.draw(task, length=80, batch=3, generator=shared, queries=4) for _ in range(2))
    assert torch.equal(first.tokens, one.tokens) and not torch.equal(first.tokens, second.tokens)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_questions_can_stand_apart(task):
    size = 3 if task == "filter" else 2
    batch = tasks.draw(task, length=120, batch=3, generator=generator(), queries=4, gap=3)
    assert batch.tokens.shape == (3, 120) and batch.prompt == 120 - 4 * (size + 3)
    behind = batch.tokens[:, batch.prompt :].unflatten(1, (4, -1))
    assert (behind[..., size:] >= FILLER.start).all() and (behind[..., :size] < FILLER.start).all()
    assert torch.equal(behind[..., size - 1], batch.tokens[batch.answers].view(3, 4))
    for row, questions in zip(batch.tokens.tolist(), behind[..., :size].tolist(), strict=True):
        prompt = row[1 : batch.prompt - 1]
        assert [ORACLES[task](prompt, question[:-1]) for question in questions] == [q[-1] for q in questions]


def test_scores_by_hand():
    batch = tasks.draw("retrieve", length=64, batch=4, generator=generator(), queries=4)
    hidden = batch.masked()
    assert torch.equal(hidden == MASK, batch.answers) and torch.equal(batch.tokens == hidden, ~batch.answers)
    assert tasks.score(batch, batch.tokens) == tasks.Score(1.0, 1.0)
    assert tasks.score(batch, hidden) == tasks.Score(0.0, 0.0)
    wrong = batch.tokens.clone()
    wrong[0, -1], wrong[1, 3] = MASK, MASK  # one answer, and a token that nobody asks for
    assert tasks.score(batch, wrong) == tasks.Score(0.75, 15 / 16)
    with pytest.raises(ValueError, match=r"got \[4, 63\]; expected \[4, 64\]"):
        tasks.score(batch, batch.tokens[:, 1:])


def test_bad_requests_say_what_to_change():
    with pytest.raises(ValueError, match="got task 'sort'; expected one of retrieve"):
        tasks.draw("sort", length=64, batch=1, generator=generator())
    with pytest.raises(ValueError, match="batch=0"):
        tasks.draw("track", length=64, batch=0, generator=generator())
    for task in tasks.TASKS:
        with pytest.raises(ValueError, match=f"{task} needs .* greater length or fewer queries"):
            tasks.draw(task, length=24, batch=1, generator=generator(), queries=8)
