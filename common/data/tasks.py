"""Questions about long prompts, generated: what sparse attention over a long context is tried on.

Four tasks over one vocabulary of 128 tokens, in the manner of RULER and The Sparse Frontier (arXiv 2504.17768), small
enough for models of a million parameters: every name and every answer is one token, and each prompt has several
questions. A sequence is

    [task] prompt, filled to its end by distractors [ASK] | question answer question answer ...

The part behind the bar is `queries` times a question of one token (`filter`: two), its answer, and `gap` tokens that
say nothing, so that questions that need different places of the prompt can stand apart. A causal model predicts each
answer from what stands before it; a masked-diffusion model sees MASK in its place.

    retrieve   pairs `key value`, each key once        `key`: its value
    track      `SET a value`, `SET b a`, `SET c b`     `c`: the value at the start of its chain
    common     words of eight groups                   `group`: its most common word
    filter     `CHAPTER label event event ...`         `label event`: whether it does not happen in that chapter (NO)
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

__all__ = ["TASKS", "VOCABULARY", "Score", "TaskBatch", "draw", "score"]

VOCABULARY = 128
PAD, MASK, ASK, SET, CHAPTER, YES, NO = range(7)
MARKS = {"retrieve": 8, "track": 9, "common": 10, "filter": 11}  # the first token says which task it is
TASKS = tuple(MARKS)
GROUPS = range(16, 24)  # of words, for `common`
VALUES = range(24, 48)  # what keys and variables hold, and the labels of chapters
WORDS = range(48, 112)  # keys, variables, words, events; group g has WORDS[8 g : 8 g + 8]
FILLER = range(112, 128)  # says nothing

GROUP_SIZE = len(WORDS) // len(GROUPS)
WINNER = 0.3  # share of a group's places that its most common word takes; three times as much as any other


@dataclass(frozen=True)
class TaskBatch:
    """`tokens` int64 [B, L] with the answers in place; `answers` bool [B, L], where they are; `prompt` the number of
    tokens up to and with the last ASK, the same in every sequence."""

    task: str
    tokens: Tensor
    answers: Tensor
    prompt: int

    def masked(self, mask: int = MASK) -> Tensor:
        """The tokens with `mask` in the place of every answer."""
        return self.tokens.masked_fill(self.answers, mask)


@dataclass(frozen=True)
class Score:
    """`exact` share of sequences whose answers are all right, `token` share of right answers; both in 0..1."""

    exact: float
    token: float


def draw(
    task: str,
    *,
    length: int,
    batch: int,
    generator: Generator,
    queries: int = 8,
    hops: int = 2,
    gap: int = 0,
    announce: bool = False,
) -> TaskBatch:
    """A batch of sequences of exactly `length` tokens, no padding; the same for the same state of the generator.

    Args:
        task: one of `TASKS`.
        queries: questions asked of each prompt; for `common` at most 8, for `filter` also the number of chapters.
        hops: of `track`: a chain is a variable that gets a value and so many others, each set to the one before.
        gap: filler behind each answer.
        announce: all questions stand once more at the prompt's end, `... ASK question question ... ASK`, as they do in
            benchmarks; methods that thin out a prompt once, before the first answer, may look at them there.

    Raises ValueError for an unknown task, or a length in which so many questions have no room.
    """
    if task not in MARKS:
        raise ValueError(f"tasks.draw: got task {task!r}; expected one of {', '.join(TASKS)}")
    if batch < 1 or queries < 1 or hops < 0 or gap < 0:
        raise ValueError(
            f"tasks.draw: got batch={batch}, queries={queries}, hops={hops}, gap={gap}; expected at least 1, 1, 0 and 0"
        )
    size = (3 if task == "filter" else 2) + gap  # of a question, its answer and the gap
    extra = queries * (size - gap - 1) + 1 if announce else 0
    room = length - 2 - queries * size - extra  # without the mark and ASK
    chance = random.Random(int(torch.randint(2**62, (), generator=generator)))
    makers: dict[str, Callable[[], tuple[list[int], list[list[int]]]]] = {
        "retrieve": lambda: _retrieve(room, queries, chance),
        "track": lambda: _track(room, queries, hops, chance),
        "common": lambda: _common(room, queries, chance),
        "filter": lambda: _filter(room, queries, chance),
    }
    rows = []
    for _ in range(batch):
        prompt, asked = makers[task]()
        once_more = [*itertools.chain(*(one[:-1] for one in asked)), ASK] if announce else []
        behind = [[*question, *chance.choices(FILLER, k=gap)] for question in asked]
        rows.append([MARKS[task], *prompt, ASK, *once_more, *itertools.chain(*behind)])
    answers = torch.zeros(batch, length, dtype=torch.bool)
    answers[:, length - 1 - gap - torch.arange(queries) * size] = True
    return TaskBatch(task, torch.tensor(rows), answers, room + 2 + extra)


def score(batch: TaskBatch, predicted: Tensor) -> Score:
    """Of predictions int64 [B, L], of which only the places of answers are looked at.

    Raises ValueError for another shape.
    """
    if predicted.shape != batch.tokens.shape:
        raise ValueError(f"tasks.score: got {list(predicted.shape)}; expected {list(batch.tokens.shape)}")
    right = predicted.cpu() == batch.tokens
    exact = (right | ~batch.answers).all(dim=1).float().mean()
    return Score(exact.item(), right[batch.answers].float().mean().item())


Made = tuple[list[int], list[list[int]]]  # the prompt, and each question with its answer last


def _retrieve(room: int, queries: int, chance: random.Random) -> Made:
    pairs = min(len(WORDS), room // 3)
    _require(pairs >= queries, "retrieve", f"{queries} pairs among distractors", room)
    keys = chance.sample(WORDS, pairs)
    value = {key: chance.choice(VALUES) for key in keys}
    prompt = _scattered([[key, value[key]] for key in keys], room, chance)
    return prompt, [[key, value[key]] for key in chance.sample(keys, queries)]


def _track(room: int, queries: int, hops: int, chance: random.Random) -> Made:
    links = hops + 1  # statements, and variables, of a chain
    chains = min(len(WORDS) // links, room // (3 * links))
    _require(chains * links >= queries, "track", f"{queries} variables in chains of {links}", room)
    names = chance.sample(WORDS, chains * links)
    value: dict[int, int] = {}
    statements: list[list[list[int]]] = []
    for start in range(0, len(names), links):
        chain = names[start : start + links]
        root = chance.choice(VALUES)
        value |= dict.fromkeys(chain, root)
        statements.append([[SET, to, of] for to, of in zip(chain, [root, *chain], strict=False)])
    order = [chain for chain in range(chains) for _ in range(links)]
    chance.shuffle(order)  # chains run through each other, each in its own order
    following = [iter(chain) for chain in statements]
    prompt = _scattered([next(following[chain]) for chain in order], room, chance, ordered=True)
    return prompt, [[name, value[name]] for name in chance.sample(names, queries)]


def _common(room: int, queries: int, chance: random.Random) -> Made:
    count = len(GROUPS)
    _require(queries <= count and room >= 2 * count, "common", f"{queries} of {count} groups, two words each", room)
    prompt, winners = [], {}
    for place, group in enumerate(GROUPS):
        words = list(WORDS[place * GROUP_SIZE : (place + 1) * GROUP_SIZE])
        chance.shuffle(words)
        size = room // count + (place < room % count)
        often = max(2, round(WINNER * size))
        others = [words[1 + i % (GROUP_SIZE - 1)] for i in range(size - often)]
        prompt += [words[0]] * often + others
        winners[group] = words[0]
    chance.shuffle(prompt)
    return prompt, [[group, winners[group]] for group in chance.sample(GROUPS, queries)]


def _filter(room: int, queries: int, chance: random.Random) -> Made:
    least = 4 * queries  # CHAPTER, label and two events
    _require(queries <= len(VALUES) and room >= least, "filter", f"{queries} chapters of 4 tokens or more", room)
    event, *others = chance.sample(WORDS, len(WORDS))
    labels = chance.sample(VALUES, queries)
    without = set(chance.sample(labels, (queries + chance.randint(0, 1)) // 2))
    prompt = []
    for place, label in enumerate(labels):
        events = chance.choices(others, k=room // queries + (place < room % queries) - 2)
        if label not in without:
            events[chance.randrange(len(events))] = event
        prompt += [CHAPTER, label, *events]
    asked = chance.sample(labels, queries)
    return prompt, [[label, event, NO if label in without else YES] for label in asked]


def _scattered(units: list[list[int]], room: int, chance: random.Random, *, ordered: bool = False) -> list[int]:
    """The units, at random places between filler, as `room` tokens; in their order, or in any."""
    gaps = room - sum(map(len, units))
    places = [True] * len(units) + [False] * gaps
    chance.shuffle(places)
    if not ordered:
        chance.shuffle(units)
    rest = iter(units)
    return list(itertools.chain(*(next(rest) if unit else [chance.choice(FILLER)] for unit in places)))


def _require(fits: bool, task: str, what: str, room: int) -> None:
    if not fits:
        raise ValueError(
            f"tasks.draw: {task} needs {what}, and its prompt has {room} tokens; give a greater length or fewer queries"
        )
