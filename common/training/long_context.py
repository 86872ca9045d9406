"""A small causal language model that answers questions about long prompts and continues Shakespeare.

What papers on sparse attention are tried on where no large model is at hand: one RotaryLM learns three tasks of
`common.data.tasks` and tiny Shakespeare by characters at once, at rising lengths. Tokens below `tasks.VOCABULARY` are
the tasks', those after it the text's characters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import seeds
from common.data import tasks, text
from common.data.text import Corpus
from common.models.rotary_lm import RotaryLM
from common.training.checkpoints import Checkpoint, checkpoint
from common.training.supervised import Schedule, fit, no_bar

__all__ = [
    "RECIPES",
    "TEXT",
    "Recipe",
    "build",
    "corpus",
    "predictions",
    "questions",
    "text_tokens",
    "train",
    "trained",
]

TEXT = tasks.VOCABULARY  # the number of the text's first character
TEXT_WEIGHT = 0.5  # of its loss; that of the answers has weight 1
BETAS, DECAY, CLIP = (0.9, 0.98), 0.01, 1.0
NEAR, RATIO = 2, 2  # see RotaryLM
HOPS = 1  # from a variable to its value, at `track`
# In each batch: what small models learn soon, and retrieving twice, on which tracking builds. `filter` they do not.
DRAWN = ("retrieve", "retrieve", "track", "common")
GENERATED, GENERATED_TOKENS = 20_000, 10  # length and vocabulary of the made-up language
ROOMY = 96  # tokens from which on a prompt has room to announce its questions


@dataclass(frozen=True)
class Recipe:
    """A model and its training.

    width, depth, heads   of the RotaryLM
    rate      peak learning rate of AdamW: warm-up over a twentieth of the steps, then a cosine to zero
    stages    (length, rows, steps): so many steps on sequences of this length, `rows` of each of `DRAWN` and of the
              text. There are eight questions; from `ROOMY` tokens on they are announced, and `retrieve` has one alone
              in every fourth step
    seed      of the initial weights and of all that is drawn
    """

    width: int
    depth: int
    heads: int
    rate: float
    stages: tuple[tuple[int, int, int], ...]
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.stages or any(len(stage) != 3 or min(stage) < 1 for stage in self.stages):
            raise ValueError(f"Recipe: got stages {self.stages}; expected some of (length, rows, steps), each above 0")


# `large` and `small` take about five minutes each on one core; the others take seconds and learn nothing to speak of
LENGTHS = ((48, 16, 600), (96, 8, 300), (256, 3, 350), (512, 2, 400))
RECIPES = {
    "large": Recipe(64, 3, 2, 3e-3, LENGTHS),
    "small": Recipe(64, 2, 2, 3e-3, LENGTHS),
    "tiny": Recipe(32, 2, 2, 5e-3, ((64, 4, 20),)),
    "tinier": Recipe(32, 1, 2, 5e-3, ((64, 4, 20),)),
}


@dataclass(frozen=True)
class _Batch:
    """tokens [B, L]; the loss at `answers` bool [B, L] has weight 1, that at the tokens of the text `TEXT_WEIGHT`."""

    tokens: Tensor
    answers: Tensor


def build(recipe: Recipe, vocabulary: int, state: dict[str, Tensor] | None = None) -> RotaryLM:
    """The model for a text of `vocabulary` characters, with `state` or fresh from torch's global generator."""
    sizes = {"width": recipe.width, "depth": recipe.depth, "heads": recipe.heads}
    model = RotaryLM(vocabulary=TEXT + vocabulary, causal=True, near=NEAR, ratio=RATIO, **sizes)
    if state is not None:
        model.load_state_dict(state)
    return model.eval()


def trained(
    name: str, recipe: Recipe, corpus: Corpus, *, retrain: bool = False, progress: Callable = no_bar
) -> tuple[RotaryLM, Checkpoint]:
    """The model of this name and recipe, read from `checkpoints/` or trained and kept there."""
    settings = {**asdict(recipe), "text": corpus.name, "near": NEAR, "ratio": RATIO, "hops": HOPS, "drawn": DRAWN}
    found = checkpoint(
        name, settings, lambda path: train(recipe, corpus, progress=progress, keep=path).state_dict(), retrain=retrain
    )
    return build(recipe, len(corpus.vocabulary), found.state), found


@seeds.one_thread()
def train(recipe: Recipe, corpus: Corpus, *, progress: Callable = no_bar, keep: Path | None = None) -> RotaryLM:
    """Train a model by the recipe on the tasks and on the corpus's training split; see `fit` for `keep`."""
    with seeds.isolated(f"long context {recipe.seed}"):
        model = build(recipe, len(corpus.vocabulary))
    steps = sum(count for _, _, count in recipe.stages)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, betas=BETAS, weight_decay=DECAY)
    schedule = Schedule(steps, steps // 20)
    fit(model, _batches(recipe, corpus), _loss, optimizer, schedule, clip=CLIP, progress=progress, keep=keep)
    return model.eval()


def corpus(dataset: str) -> Corpus:
    """The text that the models read besides the tasks: Shakespeare for `shakespeare`, else a made-up language.

    Raises as `data.path`.
    """
    return text.shakespeare() if dataset == "shakespeare" else text.markov(GENERATED, vocabulary=GENERATED_TOKENS)


def questions(task: str, length: int, batch: int, seed: int, *, queries: int = 8) -> tasks.TaskBatch:
    """Test prompts [batch, length] of a task, announced as in the training; the same for the same arguments."""
    draw = seeds.generator(seed, "questions", task, length, queries)
    return tasks.draw(task, length=length, batch=batch, generator=draw, queries=queries, hops=HOPS, announce=True)


def predictions(logits: Tensor) -> Tensor:
    """The likeliest token at each place given those before it, int64 [B, L]; the first place gets its own zero."""
    return F.pad(logits[:, :-1].argmax(-1), (1, 0))


def text_tokens(tokens: Tensor) -> Tensor:
    """Characters of a corpus as the model's tokens."""
    return tokens + TEXT


def _batches(recipe: Recipe, corpus: Corpus) -> Iterator[_Batch]:
    draw = seeds.generator(recipe.seed, "long context")
    text = text_tokens(corpus.train)
    for length, rows, steps in recipe.stages:
        roomy = length >= ROOMY
        make = partial(tasks.draw, length=length, batch=rows, generator=draw, hops=HOPS, announce=roomy)
        for step in range(steps):
            one = {"retrieve"} if roomy and step % 4 == 3 else set()
            drawn = [make(task, queries=1 if task in one else 8) for task in DRAWN]
            parts = [(part.tokens, part.answers) for part in drawn]
            starts = torch.randint(len(text) - length + 1, (rows, 1), generator=draw)
            passages = text[starts + torch.arange(length)]
            parts.append((passages, torch.zeros_like(passages, dtype=torch.bool)))
            yield _Batch(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _loss(model: nn.Module, batch: _Batch) -> Tensor:
    """Mean cross-entropy of the answers, and of the text, in nats."""
    logits, targets = model(batch.tokens)[:, :-1], batch.tokens[:, 1:]
    answers, text = batch.answers[:, 1:], targets >= TEXT
    of_answers = F.cross_entropy(logits[answers], targets[answers])
    return of_answers + TEXT_WEIGHT * F.cross_entropy(logits[text], targets[text])
