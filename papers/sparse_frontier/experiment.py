"""One cell of the grid: a model, a task, a length and a seed, with every method at every strength."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import seeds
from common.attention.causal import Reads, Selector, sparse_forward
from common.data import tasks
from common.models.causal_lm import CausalLM
from common.training import long_context
from common.training.long_context import RECIPES, predictions
from papers.sparse_frontier import data
from papers.sparse_frontier.method import Shape, selector
from papers.sparse_frontier.settings import Params

__all__ = ["Model", "evaluate", "evaluate_blocks", "make", "network", "prepare", "shape"]

NO_BAR = partial(tqdm, disable=True)


@dataclass(frozen=True)
class Model:
    """A model by its name: `state` of one of ours, None for one of transformers; `sha256` of its weights."""

    name: str
    state: dict[str, Tensor] | None
    sha256: str


def make(params: Params, name: str, *, progress: Callable = NO_BAR) -> dict[str, Tensor]:
    """Train a model that is not kept: for the smoke profile, in seconds."""
    return long_context.train(RECIPES[name], long_context.corpus(params.dataset), progress=progress).state_dict()


def prepare(params: Params, name: str, *, progress: Callable = NO_BAR) -> Model:
    """A model of ours from its checkpoint, trained if it is not there; one of transformers is loaded."""
    if params.dataset == "words":
        content = hashlib.sha256()
        for parameter in _pretrained(name, params.device).parameters():
            content.update(parameter.detach().cpu().numpy().tobytes())
        return Model(name, None, content.hexdigest())
    _, found = long_context.trained(
        f"long-context-{name}",
        RECIPES[name],
        long_context.corpus(params.dataset),
        retrain=params.retrain,
        progress=progress,
    )
    return Model(name, found.state, found.sha256)


def network(params: Params, model: Model) -> tuple[nn.Module, data.Encode | None]:
    """The model on its device, and how it reads text (None: it reads tokens of the tasks)."""
    if model.state is None:
        loaded = _pretrained(model.name, params.device)
        return loaded, loaded.encode
    vocabulary = len(long_context.corpus(params.dataset).vocabulary)
    return long_context.build(RECIPES[model.name], vocabulary, model.state).to(params.device), None


def shape(params: Params, model: Model) -> Shape:
    """The sizes that the costs of a model depend on."""
    if model.state is None:
        config = network(params, model)[0].network.config  # type: ignore[union-attr]
        heads, width = config.num_attention_heads, config.hidden_size
        head = getattr(config, "head_dim", None) or width // heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        sizes = (config.num_hidden_layers, heads, groups, head, config.intermediate_size, config.vocab_size)
        return Shape(width, *sizes)
    recipe = RECIPES[model.name]
    head, hidden = recipe.width // recipe.heads, long_context.RATIO * recipe.width
    vocabulary = len(model.state["head.weight"])
    return Shape(recipe.width, recipe.depth, recipe.heads, recipe.heads, head, hidden, vocabulary, gated=False)


@seeds.one_thread()
def evaluate(params: Params, model: Model, task: str, length: int, seed: int) -> dict[str, Any]:
    """Skill of the dense model, and of every method at every strength, on the same prompts.

    Returns `dense` and `points` {method: [(strength, realised sparsity, skill)]}; see `data.skill`.
    """
    lm, encode = network(params, model)
    batches, use = data.prompts(params, task, length, seed, encode), params.of_methods(task)
    measure = partial(_measure, lm, batches, task, params.device)
    points = {}
    for name in params.methods:
        strengths = params.coverages if name == "flex_prefill" else [1 - s for s in params.sparsities]
        points[name] = [(strength, *measure(selector(name, strength, use))) for strength in strengths]
    return {"dense": measure(None)[1], "points": points}


@seeds.one_thread()
def evaluate_blocks(params: Params, model: Model, task: str, length: int, seed: int) -> dict[str, Any]:
    """Block-Sparse with blocks of other sizes: `dense`, and `points` {size of the block: [as in `evaluate`]}."""
    lm, encode = network(params, model)
    batches, use = data.prompts(params, task, length, seed, encode), params.of_methods(task)
    measure = partial(_measure, lm, batches, task, params.device)
    points = {}
    for size in params.blocks:
        other = dataclasses.replace(use, block=size)
        points[str(size)] = [(1 - s, *measure(selector("block", 1 - s, other))) for s in params.sparsities]
    return {"dense": measure(None)[1], "points": points}


def _measure(
    lm: nn.Module, batches: list[tasks.TaskBatch], task: str, device: str, method: Selector | None
) -> tuple[float, float]:
    """Realised sparsity in the method's phase, and skill, over all batches."""
    reads, right = Reads(), []
    for batch in batches:
        logits, found = sparse_forward(lm, batch.tokens.to(device), method, prompt=batch.prompt)
        reads.add(found)
        right.append((predictions(logits).cpu() == batch.tokens)[batch.answers])
    accuracy = torch.cat(right).double().mean().item()
    return 1 - reads.density(method.phase if method else "decode"), data.skill(task, accuracy)


@lru_cache(maxsize=1)
def _pretrained(name: str, device: str) -> CausalLM:
    return CausalLM.from_pretrained(name).to(device).eval()
