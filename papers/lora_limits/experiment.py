"""What is measured: exactness and memory, error against norm and degree, rank against length, and a trained model."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from common import seeds
from common.attention.intercept import Intercept
from common.models import lora
from common.models.causal_lm import CausalLM
from common.models.gpt import next_token_loss
from common.training import long_context
from common.training.long_context import RECIPES
from common.training.supervised import Schedule, fit
from papers.lora_limits import data, method
from papers.lora_limits.settings import Params

__all__ = ["Model", "checks", "degree_needed", "errors", "growth", "heads", "make", "network", "prepare", "ranks"]

NO_BAR = partial(tqdm, disable=True)
TOLERANCES = {"10 %": 0.1, "1 %": 0.01}  # of the rank that is needed
PROBLEMS = 9  # of each seed and norm
CHECKED = 6  # degree at which the two ways to compute are compared
REAL_DEGREES = (2, 4, 8, 16)  # at which a trained model's gradients are approximated


@dataclass(frozen=True)
class Model:
    """A model by its name: `state` of one of ours, None for one of transformers; `sha256` of its weights."""

    name: str
    state: dict[str, Tensor] | None
    sha256: str


# -------------------------------------------------------------------------------------------------------- the numbers


def checks(params: Params, seed: int) -> dict[str, float]:
    """Largest relative differences: `formula`, exact gradients from autograd's; `chained`, from the polynomial's."""
    problem = data.problem(seed, length=params.length, head=params.head, rank=params.rank, norm=params.norms[1])
    chain = partial(method.chained, degree=CHECKED)
    gradients = {
        "exact": method.adapter_gradients(problem, method.dense),
        "polynomial": method.adapter_gradients(problem, method.polynomial(CHECKED)),
        "chained": method.adapter_gradients(problem, chain),
        "autograd": _autograd(problem),
    }
    pairs = {"formula": ("exact", "autograd"), "chained": ("chained", "polynomial")}
    return {name: relative(gradients[ours], gradients[theirs]) for name, (ours, theirs) in pairs.items()}


@seeds.one_thread()
def errors(params: Params, seed: int) -> dict[tuple[float, int], float]:
    """Relative error of the adapters' gradients by chained products, for every norm and degree.

    The median over `PROBLEMS` problems: the norm bounds a problem's largest score, but does not decide the others.
    """
    rows: dict[tuple[float, int], list[float]] = {(norm, n): [] for norm in params.norms for n in params.degrees}
    for norm, part in itertools.product(params.norms, range(PROBLEMS)):
        drawn = seeds.derived(seed, "problem", part)
        problem = data.problem(drawn, length=params.length, head=params.head, rank=params.rank, norm=norm)
        exact = method.adapter_gradients(problem, method.dense)
        for degree in params.degrees:
            chain = partial(method.chained, degree=degree)
            rows[norm, degree].append(relative(method.adapter_gradients(problem, chain), exact))
    return {place: float(np.median(values)) for place, values in rows.items()}


def degree_needed(found: Mapping[tuple[float, int], float], norm: float, accuracy: float) -> float:
    """The least degree whose error is at most `accuracy`; infinity if none of those measured is enough."""
    return min((degree for (at, degree), error in found.items() if at == norm and error <= accuracy), default=math.inf)


def relative(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """The largest over all adapters of |difference| / |exact|, Frobenius norms."""
    return max(((found[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact)


@seeds.one_thread()
def ranks(params: Params, seed: int) -> dict[tuple[str, str, int], int]:
    """The rank that the attention of signs needs, by regime of the norm, tolerance and length."""
    found = {}
    for regime, norm in data.REGIMES.items():
        for length in params.lengths:
            query, key = data.signs(seed, length, norm(length))
            weights = (query @ key.T / query.shape[-1]).softmax(-1)
            for name, tolerance in TOLERANCES.items():
                found[regime, name, length] = method.numerical_rank(weights, tolerance)
    return found


def exponent(lengths: Sequence[int], values: Sequence[float]) -> float:
    """The slope of log value against log length, least squares: 1 is as fast as the length, 0 not at all."""
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def growth(params: Params) -> dict[str, float]:
    """How many times as large the largest tensor of a gradient becomes when the sequence becomes twice as long."""
    sizes: dict[str, list[int]] = {"exact": [], "chained": []}
    for length in (params.length, 2 * params.length):
        problem = data.problem(0, length=length, head=params.head, rank=params.rank, norm=params.norms[1])
        ways = {"exact": method.dense, "chained": partial(method.chained, degree=CHECKED)}
        for name, way in ways.items():
            with _Largest() as largest:
                method.adapter_gradients(problem, way)
            sizes[name].append(largest.size)
    return {name: second / first for name, (first, second) in sizes.items()}


# ------------------------------------------------------------------------------------------------------------- a model


def make(params: Params, *, progress: Callable = NO_BAR) -> dict[str, Tensor]:
    """Train a model that is not kept: for the smoke profile, in seconds."""
    return long_context.train(
        RECIPES[params.model], long_context.corpus(params.dataset), progress=progress
    ).state_dict()


def prepare(params: Params, *, progress: Callable = NO_BAR) -> Model:
    """A model of ours from its checkpoint, trained if it is not there; one of transformers is loaded.

    Raises as `CausalLM.from_pretrained`.
    """
    if params.dataset == "folder":
        content = hashlib.sha256()
        for parameter in _pretrained(params.model, params.device).parameters():
            content.update(parameter.detach().cpu().numpy().tobytes())
        return Model(params.model, None, content.hexdigest())
    name = f"long-context-{params.model}"
    corpus, recipe = long_context.corpus(params.dataset), RECIPES[params.model]
    _, found = long_context.trained(name, recipe, corpus, retrain=params.retrain, progress=progress)
    return Model(params.model, found.state, found.sha256)


def network(params: Params, model: Model) -> nn.Module:
    """A fresh copy of the model on its device."""
    if model.state is None:
        _pretrained.cache_clear()  # the adapters of another seed are in it
        return _pretrained(model.name, params.device)
    vocabulary = len(long_context.corpus(params.dataset).vocabulary)
    return long_context.build(RECIPES[model.name], vocabulary, model.state).to(params.device)


@seeds.one_thread()
def heads(params: Params, model: Model, seed: int) -> dict[str, Any]:
    """Norms of every head of the adapted model, and how well its gradients can be approximated.

    Adapters are added and trained on the text; then passages of the test part are read. Returns `adapter` {"frozen" and
    "adapter": the largest entry of X W* and X (alpha B A / r) of every adapted layer}, and for every head in the order
    of the layers `norm` (the larger of the largest entries of Q and K, on the scale of scores Q K^T / d), `score` (the
    largest |score|), `rank` (the share of the passage's length that its attention's rank needs at 1 %, without the
    causal mask, which no low rank can have) and `error` {degree: relative error of the gradient to the queries}.
    """
    lm = network(params, model)
    seeds.everything(seed, deterministic=False)
    trained = lora.add(lm, lambda name: name.endswith(tuple(params.adapted)), rank=params.rank)
    if params.adapter_steps:
        optimizer = torch.optim.AdamW(trained, lr=params.adapter_rate, weight_decay=0.0)
        batches = data.windows(params, lm, "train", params.adapter_steps, seed)
        loss = partial(_loss, device=params.device)
        fit(lm, batches, loss, optimizer, Schedule(params.adapter_steps, params.adapter_steps // 10), clip=1.0)
    lm.eval()
    (passages,) = data.windows(params, lm, "test", 1, seed)
    found: dict[str, Any] = {"adapter": _adapter_norms(lm, passages.to(params.device))}
    layers = _attentions(lm, passages[:1].to(params.device))
    rows = [_head(*head) for layer in layers for head in zip(*layer, strict=True)]
    return found | {name: [row[name] for row in rows] for name in rows[0]}


def _head(query: Tensor, key: Tensor, value: Tensor, upstream: Tensor) -> dict[str, Any]:
    """What `heads` tells of one head, from [L, D] each; all in float64, scores Q K^T / sqrt(D)."""
    length, size = query.shape
    scores = query @ key.T / math.sqrt(size)
    later = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    largest = max(query.abs().max().item(), key.abs().max().item())
    found = {
        "norm": largest * size**0.25,  # the paper divides by d, not by its root
        "score": scores.abs().max().item(),
        "rank": method.numerical_rank(scores.softmax(-1), TOLERANCES["1 %"]) / length,
    }

    def gradient(weights: Tensor) -> Tensor:
        weights = weights.masked_fill(later, 0.0)
        p = weights / weights.sum(-1, keepdim=True)
        return method.attention_gradients(query, key, value, p, upstream, size**-0.5)[0]

    exact = gradient((scores - scores.amax(-1, keepdim=True)).exp())
    error = {n: ((gradient(method.taylor(scores, n)) - exact).norm() / exact.norm()).item() for n in REAL_DEGREES}
    return {**found, "error": error}


def _attentions(lm: nn.Module, tokens: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Query, key, value and the gradient of the model's loss to the output, [H, L, D] float64 of each attention."""
    caught: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        out = F.scaled_dot_product_attention(query, key, value, enable_gqa=key.shape[1] != query.shape[1], **options)
        out.retain_grad()
        caught.append((query, key, value, out))
        return out

    with Intercept(attend):
        next_token_loss(lm, tokens).backward()
    found = []
    for query, key, value, out in caught:
        assert out.grad is not None
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        query, key, value, upstream = (x[0].detach().double() for x in (query, key, value, out.grad))
        found.append((query, key, value, upstream))
    return found


@torch.no_grad()
def _adapter_norms(lm: nn.Module, tokens: Tensor) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"frozen": [], "adapter": []}

    def look(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, lora.LowRank)
        found["frozen"].append(layer.layer(inputs[0]).abs().max().item())
        found["adapter"].append((layer.scale * layer.up(layer.down(inputs[0]))).abs().max().item())

    hooks = [layer.register_forward_pre_hook(look) for layer in lm.modules() if isinstance(layer, lora.LowRank)]
    lm(tokens)
    for hook in hooks:
        hook.remove()
    return found


def _loss(lm: nn.Module, tokens: Tensor, *, device: str) -> Tensor:
    return next_token_loss(lm, tokens.to(device))


def _autograd(problem: method.Problem) -> dict[str, Tensor]:
    """The gradients as autograd finds them."""
    leaves = {}
    for name in ("query", "key", "value"):
        adapter: method.Adapter = getattr(problem, name)
        for part in ("b", "a"):
            leaves[f"{name}.{part}"] = getattr(adapter, part).clone().requires_grad_()

    def projected(name: str) -> Tensor:
        adapter: method.Adapter = getattr(problem, name)
        return problem.x @ (adapter.frozen + adapter.scale * leaves[f"{name}.b"] @ leaves[f"{name}.a"])

    scores = projected("query") @ projected("key").T / problem.x.shape[-1]
    loss = (scores.softmax(-1) @ projected("value") - problem.y).square().sum() / 2
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


class _Largest(TorchFunctionMode):
    """`size`: elements of the largest tensor that any function or operator of torch inside gave."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else (out,):
            if isinstance(part, Tensor):
                self.size = max(self.size, part.numel())
        return out


@lru_cache(maxsize=1)
def _pretrained(name: str, device: str) -> CausalLM:
    return CausalLM.from_pretrained(name).to(device).eval()
