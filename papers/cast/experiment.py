"""The arms that are compared, and how one of them is made: pretrained once a seed, then pruned, trained or both."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common import seeds
from common.models.causal_lm import CausalLM
from common.models.gpt import GPT, next_token_loss, perplexity
from common.sparsity import STE, Gradual, NMConfig, sparsify_
from common.sparsity.criteria import prune_
from common.training.supervised import Schedule, fit
from papers.cast import data, method
from papers.cast.baselines import AST, AST_BETAS, AST_ETA, AST_TEMPERATURE, attach_slorb
from papers.cast.settings import Params

__all__ = ["ARMS", "Arm", "build", "learning_rate", "make", "pretrain", "steps_of"]

NO_BAR = partial(tqdm, disable=True)
LOOKS = 20  # times that a training's weights are looked at
BINS = torch.linspace(-7, 1, 81)  # of log10 |theta|
MEASURED = 8  # batches of the gradient's scale


@dataclass(frozen=True)
class Arm:
    """One bar of the comparison.

    how        criterion of common.sparsity.criteria (one-shot), or dense, gradual, ast, adams (trained)
    distil     the loss: plain cross-entropy, CAST's or AST's distillation
    changes    of the optimizer
    """

    label: str
    how: Literal["magnitude", "wanda", "sparsegpt", "dense", "gradual", "ast", "adams"]
    distil: Literal["", "cast", "ast"] = ""
    scaling: bool = False
    slorb: bool = False
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def one_shot(self) -> bool:
        return self.how in ("magnitude", "wanda", "sparsegpt")


ARMS = {
    "magnitude": Arm("magnitude", "magnitude"),
    "wanda": Arm("Wanda", "wanda"),
    "sparsegpt": Arm("SparseGPT", "sparsegpt"),
    "dense": Arm("dense, trained on", "dense"),
    "gmp": Arm("GMP", "gradual"),
    "gmp_kd": Arm("GMP + CAST's loss", "gradual", "cast"),
    "ast": Arm("AST", "ast", "ast"),
    "ast_released": Arm("AST as released", "ast", "ast", changes=(("released", True),)),
    "ast_slorb": Arm("AST + SLoRB", "ast", "ast", slorb=True),
    "cast": Arm("CAST", "adams", "cast", scaling=True),
    "no_kd": Arm("CAST - distillation", "adams", scaling=True),
    "no_scaling": Arm("CAST - scaling", "adams", "cast"),
    "no_decay": Arm("CAST - L1", "adams", "cast", scaling=True, changes=(("decay", 0.0),)),
    "uniform": Arm("CAST, L1 on all", "adams", "cast", scaling=True, changes=(("selective", False),)),
    "gradient_moment": Arm("CAST, v from g²", "adams", "cast", scaling=True, changes=(("second_moment", "gradient"),)),
    "srste": Arm("CAST by SR-STE", "ast", "cast", scaling=True),
}


def build(params: Params, vocabulary: int, state: dict[str, Tensor] | None = None) -> nn.Module:
    """The model, dense: the small GPT with `state` or fresh from torch's global generator, or one of transformers."""
    if params.model:
        return CausalLM.from_pretrained(params.model).to(params.device)
    network = GPT(
        vocabulary=vocabulary, context=params.context, width=params.width, depth=params.depth, heads=params.heads
    )
    if state is not None:
        network.load_state_dict(state)
    return network.to(params.device)


@seeds.one_thread()
def pretrain(params: Params, seed: int, *, progress: Callable = NO_BAR) -> dict[str, Any]:
    """The dense model of a seed, and what is measured on it before anything is pruned.

    Returns `state` (None for a model of transformers), `losses`, `perplexity`, `second` (None where not asked for),
    `decay` (root mean square of the gradient's entries in scope) and `magnitude` (mean |theta| in scope).
    """
    seeds.everything(seed, deterministic=False)
    texts = data.corpus(params)
    network = build(params, len(texts.vocabulary))
    losses: list[float] = []
    if not params.model:
        optimizer = torch.optim.Adam(network.parameters(), lr=params.pretrain_rate)
        schedule = Schedule(params.pretrain_steps, params.pretrain_steps // 20)
        batches = data.windows(params, texts.train, params.pretrain_steps, seed, "pretraining")
        loss = partial(_loss, params, None, Arm("", "dense"))
        losses = fit(network, batches, loss, optimizer, schedule, clip=params.clip, progress=progress)
    weights = [layer.weight for layer in method.in_blocks(network).values()]
    scale = 0.0
    for window in data.windows(params, texts.train, MEASURED, seed, "gradient scale"):
        network.zero_grad()
        next_token_loss(network, window.to(params.device)).backward()
        scale += method.gradient_scale(weights) / MEASURED
    return {
        "state": None if params.model else {name: value.cpu() for name, value in network.state_dict().items()},
        "losses": losses,
        **_scores(params, network, texts),
        "decay": scale,
        "magnitude": sum(w.abs().sum().item() for w in weights) / sum(w.numel() for w in weights),
    }


def learning_rate(params: Params, start: dict[str, Any]) -> float:
    """The peak of CAST's: as set, or such that a full training can move a pruned weight `headroom` mean magnitudes."""
    reach = method.reach(_schedule(params, params.steps).share, params.steps)
    return params.learning_rate or params.headroom * start["magnitude"] / reach


def steps_of(params: Params, budget: float) -> int:
    """Steps of a training with this share of the full one."""
    return max(1, round(budget * params.steps))


@seeds.one_thread()
def make(
    params: Params,
    name: str,
    pattern: str,
    budget: float,
    start: dict[str, Any],
    seed: int,
    *,
    progress: Callable = NO_BAR,
) -> dict[str, Any]:
    """Make one arm from the pretrained model of a seed. Arms of a seed see the same windows in the same order.

    Returns `perplexity`, `second`, `seconds`; for trained arms `losses` and `remaining` [(step, share)], see
    `method.remaining`; for arms of AdamS also `before` (perplexity before the final pruning) and `sizes` {step: counts
    of log10 |theta| in `BINS`}.
    """
    seeds.everything(seed, deterministic=False)
    texts, arm = data.corpus(params), ARMS[name]
    network = build(params, len(texts.vocabulary), start["state"])
    layers = method.in_blocks(network)
    n, m = (int(part) for part in pattern.split(":"))
    began = time.perf_counter()
    found: dict[str, Any] = {}
    if arm.one_shot:
        count = -(-params.calibration // params.batch)
        looked_at = data.windows(params, texts.train, count, seed, "calibration")
        calibration = [window[:, :-1].to(params.device) for window in looked_at]
        prune_(network, n, m, method=arm.how, calibration=calibration, where=list(layers), progress=False)  # type: ignore[arg-type]
    else:
        training = _prepare(params, arm, network, layers, n, m, steps_of(params, budget), start)
        found = _train(params, arm, training, network, layers, n, m, texts.train, seed, progress)
        if arm.how == "adams":
            found["before"] = _scores(params, network, texts)["perplexity"]
        training.finish()
    return {**found, **_scores(params, network, texts), "seconds": time.perf_counter() - began}


@dataclass
class _Training:
    """What an arm brings to the loop: its optimizer, what follows each step, and what ends it."""

    optimizer: torch.optim.Optimizer
    steps: int
    teacher: nn.Module | None
    after_step: Callable[[], None]
    finish: Callable[[], object]


def _prepare(
    params: Params,
    arm: Arm,
    network: nn.Module,
    layers: dict[str, nn.Linear],
    n: int,
    m: int,
    steps: int,
    start: dict[str, Any],
) -> _Training:
    teacher = copy.deepcopy(network).eval().requires_grad_(False) if arm.distil else None
    rate, betas = learning_rate(params, start), (params.beta1, params.beta2)
    if arm.how in ("dense", "gradual"):
        adam = torch.optim.Adam(network.parameters(), lr=params.adam_factor * rate, betas=betas)
        if arm.how == "dense":
            return _Training(adam, steps, teacher, _nothing, _nothing)
        recipe = Gradual(end=max(1, round(params.gmp_end * steps)), every=params.refresh)
        handle = sparsify_(network, NMConfig(n, m, where=list(layers), recipe=recipe, refresh=params.refresh))
        return _Training(adam, steps, teacher, handle.step, partial(handle.remove, keep="zeros"))
    shared: dict[str, Any] = {"lr": rate, "steps": steps, "n": n, "m": m, "refresh": params.refresh}
    decay = params.decay or start["decay"]
    if arm.how == "adams":
        if arm.scaling:
            method.scale_(layers, m, params.groups)
        weights = [method.raw(layer) for layer in layers.values()]
        others = method.out_of_scope(network, layers)
        options = {**shared, "betas": betas, "decay": decay, **dict(arm.changes)}
        return _Training(
            method.AdamS(weights, others, **options), steps, teacher, _nothing, partial(method.finalize_, layers, n, m)
        )
    handle = sparsify_(network, NMConfig(n, m, where=list(layers), recipe=STE(), refresh=params.refresh))
    if arm.slorb:
        for name, layer in layers.items():
            attach_slorb(layer, handle.masks()[name])
    if arm.scaling:
        method.scale_(layers, m, params.groups)
    weights = [method.raw(layer) for layer in layers.values()]
    pull = params.ast_decay or decay / start["magnitude"]
    options = {**shared, "lr": params.ast_factor * rate, "betas": AST_BETAS, "decay": pull, **dict(arm.changes)}
    optimizer = AST(weights, method.out_of_scope(network, layers), **options)

    def finish() -> None:
        method.fold_(layers)
        handle.remove(keep="zeros")

    return _Training(optimizer, steps, teacher, handle.step, finish)


def _train(
    params: Params,
    arm: Arm,
    training: _Training,
    network: nn.Module,
    layers: dict[str, nn.Linear],
    n: int,
    m: int,
    tokens: Tensor,
    seed: int,
    progress: Callable,
) -> dict[str, Any]:
    remaining: list[tuple[int, float]] = []
    sizes: dict[int, list[int]] = {}

    def look(done: int) -> None:
        if done % max(1, training.steps // LOOKS) == 0 or done == training.steps:
            remaining.append((done, method.remaining(layers, n, m)))
            if arm.how == "adams":
                sizes[done] = _sizes(layers)

    def after_step(done: int) -> None:
        training.after_step()
        look(done)

    look(0)
    losses = fit(
        network,
        data.windows(params, tokens, training.steps, seed, "training"),
        partial(_loss, params, training.teacher, arm),
        training.optimizer,
        _schedule(params, training.steps),
        clip=params.clip,
        after_step=after_step,
        progress=progress,
    )
    return {"losses": losses, "remaining": remaining, "sizes": sizes}


def _schedule(params: Params, steps: int) -> Schedule:
    """Warm-up and cosine to zero; a shorter training has a shorter warm-up."""
    return Schedule(steps, params.warmup * steps // params.steps)


def _loss(params: Params, teacher: nn.Module | None, arm: Arm, network: nn.Module, window: Tensor) -> Tensor:
    """The arm's loss on windows [B, context + 1]."""
    window = window.to(params.device)
    tokens, targets = window[:, :-1], window[:, 1:]
    with torch.autocast(params.device, torch.bfloat16, enabled=params.autocast):
        logits = network(tokens)
        if teacher is None:
            return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        with torch.no_grad():
            told = teacher(tokens)
    eta, temperature = (AST_ETA, AST_TEMPERATURE) if arm.distil == "ast" else (params.eta, 1.0)
    return method.distillation(logits, told, targets, eta=eta, temperature=temperature)


def _scores(params: Params, network: nn.Module, texts: Any) -> dict[str, float | None]:
    """Perplexities on the test text and, where asked for, on the second text."""
    second = data.second_text(params, texts)
    score = partial(perplexity, network, context=params.context, batch=params.batch)
    return {
        "perplexity": score(data.test_text(params, texts)),
        "second": None if second is None else score(second),
    }


@torch.no_grad()
def _sizes(layers: dict[str, nn.Linear]) -> list[int]:
    """Counts of log10 |theta| in `BINS`; what lies outside counts in the first or last bin."""
    weights = torch.cat([method.raw(layer).flatten() for layer in layers.values()]).cpu()
    size = weights.abs().clamp_min(1e-30).log10().clamp(BINS[0].item(), BINS[-1].item() - 1e-4)
    return torch.histogram(size, BINS).hist.int().tolist()


def _nothing() -> None:
    pass
