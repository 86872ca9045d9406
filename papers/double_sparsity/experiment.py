"""The arms: who chooses the tokens, what a seed measures of each, and how long decoding takes."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common import seeds
from common.attention.causal import Reads, Selector, queries_and_keys, sparse_forward
from common.attention.decode import H2O, Quest, Streaming
from common.models.causal_lm import CausalLM
from common.training import long_context
from common.training.long_context import RECIPES, predictions
from papers.double_sparsity import data, method
from papers.double_sparsity.settings import Params

__all__ = ["ARMS", "Model", "evaluate", "importance", "make", "network", "prepare", "selector", "timings"]

NO_BAR = partial(tqdm, disable=True)
ARMS = {
    "ds": "Double Sparsity",
    "ds_4bit": "4-bit labels",
    "ds_128": "as many channels as of 128",
    "ds_q": "channels by |q|",
    "ds_k": "channels by |k|",
    "ds_random": "random channels",
    "ds_released": "as released",
    "ds_dense_first": "first layers dense",
    "exact": "all channels",
    "quest": "Quest",
    "h2o": "H2O",
    "streaming": "StreamingLLM",
}
STATISTICS: dict[str, method.Statistic] = {"ds_q": "q", "ds_k": "k"}
KINDS = ("text", "tasks")  # of calibration


@dataclass(frozen=True)
class Model:
    """A model by its name: `state` of one of ours, None for one of transformers; `sha256` of its weights."""

    name: str
    state: dict[str, Tensor] | None
    sha256: str


def make(params: Params, *, progress: Callable = NO_BAR) -> dict[str, Tensor]:
    """Train a model that is not kept: for the smoke profile, in seconds."""
    return long_context.train(
        RECIPES[params.model], long_context.corpus(params.dataset), progress=progress
    ).state_dict()


def prepare(params: Params, *, progress: Callable = NO_BAR) -> Model:
    """A model of ours from its checkpoint, trained if it is not there; one of transformers is loaded."""
    if params.dataset == "folder":
        content = hashlib.sha256()
        for parameter in _pretrained(params.model, params.device).parameters():
            content.update(parameter.detach().cpu().numpy().tobytes())
        return Model(params.model, None, content.hexdigest())
    recipe, name = RECIPES[params.model], f"long-context-{params.model}"
    _, found = long_context.trained(
        name, recipe, long_context.corpus(params.dataset), retrain=params.retrain, progress=progress
    )
    return Model(params.model, found.state, found.sha256)


def network(params: Params, model: Model) -> nn.Module:
    """The model on its device."""
    if model.state is None:
        return _pretrained(model.name, params.device)
    vocabulary = len(long_context.corpus(params.dataset).vocabulary)
    return long_context.build(RECIPES[model.name], vocabulary, model.state).to(params.device)


def importance(
    params: Params, lm: nn.Module, kind: str, seed: int, statistic: method.Statistic = "qk", *, released: bool = False
) -> list[Tensor]:
    """Channel importance of every layer [H, D] by a calibration text, see `data.calibration`."""
    batches = data.calibration(params, lm, kind, seed)
    found = (queries_and_keys(lm, batch.to(params.device)) for batch in batches)
    return method.calibrate(found, statistic, released=released)


def selector(params: Params, arm: str, ratio: int, scores: dict[str, list[Tensor]], seed: int) -> Selector:
    """What chooses the tokens in an arm, at 1/ratio of the tokens and 1/ratio of the channels."""
    keep = 1 / ratio
    if arm == "quest":
        return Quest(keep=keep, page=params.page)
    if arm == "h2o":
        return H2O(keep=keep)
    if arm == "streaming":
        return Streaming(keep=keep, first=params.first)
    ranked = scores[arm if arm in scores else "ds"]
    size = ranked[0].shape[-1]
    count = min(size, max(1, {"exact": size, "ds_128": 128 // ratio}.get(arm, size // ratio)))
    if arm == "ds_random":
        draw = seeds.generator(seed, "random channels")
        ranked = [torch.rand(part.shape, generator=draw) for part in ranked]
    channels = [method.top_channels(part, count) for part in ranked]
    return method.DoubleSparsity(channels=channels, keep=keep, bits=4 if arm == "ds_4bit" else 16)


@seeds.one_thread()
def evaluate(params: Params, model: Model, seed: int) -> dict[str, Any]:
    """Everything that a seed measures of quality.

    Returns `perplexity` {(arm, ratio): of the second half of passages, given the first}, `skill` {(arm, ratio): {task:
    skill}} and `density` {(arm, ratio): share of the keys read in decoding}, the dense model as ("dense", 1).
    """
    lm = network(params, model)
    kind = "both" if params.tasks else "text"
    scores = {"ds": importance(params, lm, kind, seed)}
    for arm in params.arms:
        if arm in STATISTICS or arm == "ds_released":
            statistic = STATISTICS.get(arm, "qk")
            scores[arm] = importance(params, lm, kind, seed, statistic, released=arm == "ds_released")
    texts = data.passages(params, lm, "test", params.passages, seed)
    batches = {task: data.prompts(params, task, seed) for task in params.tasks}
    found: dict[str, Any] = {"perplexity": {}, "skill": {}, "density": {}}
    for arm, ratio in [("dense", 1), *((arm, ratio) for arm in params.arms for ratio in params.ratios)]:
        chosen = None if arm == "dense" else selector(params, arm, ratio, scores, seed)
        dense = params.dense_layers if arm == "ds_dense_first" else 0
        forward = partial(sparse_forward, lm, selector=chosen, dense_layers=dense)
        found["perplexity"][arm, ratio], found["density"][arm, ratio] = _perplexity(params, forward, texts)
        found["skill"][arm, ratio] = {task: _skill(params, forward, task, batches[task]) for task in params.tasks}
    return found


@seeds.one_thread()
def rankings(params: Params, model: Model, seed: int) -> dict[str, list[Tensor]]:
    """Channel importance by each kind of calibration text, by |q * k|; `again`: the first kind, another draw."""
    lm = network(params, model)
    kinds = KINDS if params.tasks else KINDS[:1]
    found = {kind: importance(params, lm, kind, seed) for kind in kinds}
    return {**found, "again": importance(params, lm, KINDS[0], seed + 1000)}


def timings(params: Params, context: int, batch: int, *, ratio: int = 16) -> list[dict[str, float]]:
    """Seconds of one decoding step of attention, dense and sparse in turn, `repeats` times after one that warms up.

    The best of a few calls each; labels lie ready, as they do in decoding.
    """
    draw = torch.Generator(device=params.device).manual_seed(0)
    shape = (batch, params.heads, context, params.head)
    dtype = torch.float16 if params.device == "cuda" else torch.float32
    key, value = (torch.randn(shape, generator=draw, device=params.device, dtype=dtype) for _ in range(2))
    query = torch.randn(*shape[:2], 1, params.head, generator=draw, device=params.device, dtype=dtype)
    order = torch.rand(params.heads, params.head, generator=draw, device=params.device)
    channels = method.top_channels(order, max(1, params.head // ratio))
    labels = method.labels_of(key, channels).contiguous()
    ways = {
        "dense": lambda: method.decode_dense(query, key, value),
        "sparse": lambda: method.decode(query, key, value, labels, channels, context // ratio),
    }
    found = [{name: _seconds(way, params.device) for name, way in ways.items()} for _ in range(params.repeats + 1)]
    return found[1:]


def _perplexity(params: Params, forward: Callable, texts: Sequence[Tensor]) -> tuple[float, float]:
    """Perplexity of the second halves given the first, and the share of keys read there."""
    prompt, total, count, reads = params.context // 2, 0.0, 0, Reads()
    for tokens in texts:
        tokens = tokens.to(params.device)
        logits, found = forward(tokens, prompt=prompt)
        reads.add(found)
        told, targets = logits[:, prompt:-1].float(), tokens[:, prompt + 1 :]  # what decoding steps say of the next
        total += F.cross_entropy(told.flatten(0, 1), targets.flatten(), reduction="sum").item()
        count += targets.numel()
    return math.exp(total / count), reads.density("decode")


def _skill(params: Params, forward: Callable, task: str, batches: Sequence[Any]) -> float:
    right = []
    for batch in batches:
        logits, _ = forward(batch.tokens.to(params.device), prompt=batch.prompt)
        right.append((predictions(logits).cpu() == batch.tokens)[batch.answers])
    return data.skill(task, torch.cat(right).double().mean().item())


def _seconds(way: Callable[[], Tensor], device: str, calls: int = 5) -> float:
    best = math.inf
    for _ in range(calls):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        way()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


@lru_cache(maxsize=1)
def _pretrained(name: str, device: str) -> CausalLM:
    return CausalLM.from_pretrained(name).to(device).eval()
