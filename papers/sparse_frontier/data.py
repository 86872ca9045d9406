"""The prompts: questions about generated texts, as tokens of our own models or in English for others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common.data import tasks
from common.data.tasks import TaskBatch
from common.training.long_context import questions
from papers.sparse_frontier.settings import Params

__all__ = ["CHANCE", "prompts", "skill", "spelled"]

# What guessing gets: 24 values, eight words of a group, yes or no.
CHANCE = {"retrieve_one": 1 / 24, "retrieve": 1 / 24, "track": 1 / 24, "common": 1 / 8, "filter": 1 / 2}

Encode = Callable[[str], Tensor]


def prompts(params: Params, task: str, length: int, seed: int, encode: Encode | None) -> list[TaskBatch]:
    """The test prompts of a task in batches of `params.rows`; in English, one a batch, with `encode` of a tokenizer."""
    asked = 1 if task == "retrieve_one" else 8
    drawn = questions(task.removesuffix("_one"), length, params.prompts, seed, queries=asked)
    rows = 1 if encode else params.rows
    parts = zip(drawn.tokens.split(rows), drawn.answers.split(rows), strict=True)
    batches = [TaskBatch(drawn.task, tokens, answers, drawn.prompt) for tokens, answers in parts]
    return [spelled(batch, encode) for batch in batches] if encode else batches


def skill(task: str, accuracy: float) -> float:
    """Accuracy with guessing taken off: 0 by chance, 1 if all is right."""
    return (accuracy - CHANCE[task]) / (1 - CHANCE[task])


def spelled(batch: TaskBatch, encode: Encode) -> TaskBatch:
    """One sequence of a task in English, by a tokenizer; each token of the task is a piece of text of its own."""
    if len(batch.tokens) != 1:
        raise ValueError(f"spelled: got {len(batch.tokens)} sequences; expected one, for their lengths will differ")
    pieces = [encode(piece) for piece in _pieces(batch.task, batch.tokens[0].tolist())]
    answers = [torch.full((len(piece),), bool(a)) for piece, a in zip(pieces, batch.answers[0], strict=True)]
    prompt = sum(len(piece) for piece in pieces[: batch.prompt])
    return TaskBatch(batch.task, torch.cat(pieces)[None], torch.cat(answers)[None], prompt)


_TOLD = {
    "retrieve": "Keep these values in mind.",
    "track": "Follow these assignments.",
    "common": "Count these words, which belong to groups.",
    "filter": "These chapters list events.",
}
_FILLER = " The grass is green."
_NOUNS = ["apple", "river", "stone", "cloud", "table", "horse", "light", "paper"]


def _pieces(task: str, tokens: Sequence[int]) -> list[str]:
    """A piece of text for every token of a sequence of the task."""
    fixed = {tasks.MARKS[task]: _TOLD[task], tasks.ASK: "\nQuestions:", tasks.SET: "\nSet", tasks.CHAPTER: "\nChapter"}
    fixed |= {tasks.YES: " yes", tasks.NO: " no", **dict.fromkeys(tasks.FILLER, _FILLER)}
    pieces, after_set = [], 0  # tokens since SET: the variable, then what it is set to
    for token in tokens:
        after_set = 0 if token == tasks.SET else after_set + 1
        if token in fixed:
            pieces.append(fixed[token])
        elif token in tasks.GROUPS:
            pieces.append(f"\nThe most common word of group {_NOUNS[token - tasks.GROUPS[0]]} is")
        elif token in tasks.VALUES:
            pieces.append(f" {token - tasks.VALUES[0] + 10}")
        elif task == "retrieve":
            pieces.append(f"\nThe value of {_word(token)} is")
        elif task == "track" and after_set != 2:
            pieces.append(f"{'' if after_set == 1 else chr(10)} {_word(token)} =")
        else:
            pieces.append(f" {_word(token)}")
    return pieces


def _word(token: int) -> str:
    """A name for a word: its group, so that the common one of a group can be asked for, and a number."""
    place = token - tasks.WORDS[0]
    return f"{_NOUNS[place // tasks.GROUP_SIZE]}{place % tasks.GROUP_SIZE}"
