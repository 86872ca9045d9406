"""The arms that are compared and how one of them is trained from scratch. The idea itself is in `method.py`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common import seeds
from common.models.causal_lm import CausalLM
from common.models.gpt import GPT, perplexity
from common.models.stable_diffusion import MissingWeights
from common.training.supervised import NonFiniteError, Schedule, fit
from papers.sst import data, method
from papers.sst.baselines import LowRankLinear, Merging, low_rank_
from papers.sst.settings import Params

__all__ = ["ARMS", "Arm", "best_rate", "build", "fold_", "label", "prepare", "train"]

NO_BAR = partial(tqdm, disable=True)
DIVERGED = 1e6  # the perplexity that is noted for a training that broke


@dataclass(frozen=True)
class Arm:
    """One bar of the comparison: how its layers are made, and for SST what differs from it."""

    label: str
    how: Literal["full", "lora", "relora", "sst"]
    layer: tuple[tuple[str, Any], ...] = ()
    sampling: method.Sampling = "mixed"
    redo: bool = True


ARMS = {
    "full": Arm("full rank", "full"),
    "lora": Arm("LoRA", "lora"),
    "relora": Arm("ReLoRA*", "relora"),
    "sst": Arm("SST", "sst"),
    "true_gradient": Arm("SST, true gradient", "sst", (("enhanced", False),)),
    "random_start": Arm("SST, random start", "sst", (("start", "random"),)),
    "chosen_sigma": Arm("SST, chosen Σ only", "sst", (("all_sigma", False),)),
    "never_again": Arm("SST, one SVD", "sst", redo=False),
    "uniform": Arm("SST, uniform", "sst", sampling="uniform"),
    "top": Arm("SST, largest", "sst", sampling="top"),
}


def label(arm: str) -> str:
    """An arm's name for readers."""
    return ARMS[arm].label


def build(params: Params, vocabulary: int) -> nn.Module:
    """The untrained dense model, from torch's global generator."""
    if params.model:
        return CausalLM(_untrained(params.model)).to(params.device)
    return GPT(
        vocabulary=vocabulary, context=params.context, width=params.width, depth=params.depth, heads=params.heads
    ).to(params.device)


def prepare(
    params: Params, arm: Arm, network: nn.Module, rate: float, seed: int
) -> tuple[Mapping[str, nn.Module], torch.optim.Optimizer, Any]:
    """Give the dense network the layers of an arm: (its layers, its optimizer, what follows a step or None)."""
    if arm.how == "full":
        layers: Mapping[str, nn.Module] = method.in_blocks(network)
    elif arm.how == "sst":
        layers = spectral = method.spectral_(network, params.rank, **dict(arm.layer))
    else:
        layers = low_rank = low_rank_(network, params.rank)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    if arm.how == "sst":
        draw = seeds.generator(seed, "singular vectors")
        options = {"sampling": arm.sampling, "redo": arm.redo, "generator": draw}
        return layers, optimizer, method.Spectral(spectral, optimizer, interval=params.interval, **options)
    if arm.how == "relora":
        return layers, optimizer, Merging(low_rank, optimizer, interval=params.interval)
    return layers, optimizer, None


@seeds.one_thread()
def train(params: Params, name: str, rate: float, seed: int, *, progress: Callable = NO_BAR) -> dict[str, Any]:
    """Train one arm at one peak learning rate. Arms of a seed start from the same weights and see the same windows.

    Returns `perplexity` and `validation`, `losses`, `gradients` (norm over what is trained of the layers, each step),
    `cut` {share of singular values: perplexity without them}, `sigma` (the singular values of the first layer's
    feed-forward, falling), `chosen` (S of the first layer, each iteration; SST alone), `trained` (entries of the layers
    in training at a time), `moments` (entries of Adam's state for them) and `seconds`. A training that broke has the
    perplexity `DIVERGED`.
    """
    seeds.everything(seed, deterministic=False)
    texts, arm = data.corpus(params), ARMS[name]
    network = build(params, len(texts.vocabulary))
    layers, optimizer, keeper = prepare(params, arm, network, rate, seed)
    parameters = [p for layer in layers.values() for key, p in layer.named_parameters() if key != "bias"]
    norms: list[float] = []
    moments = 0

    def after_step(done: int) -> None:
        nonlocal moments
        if done == 1:
            moments = sum(v.numel() for p in parameters for v in optimizer.state[p].values() if v.ndim)
        norms.append(float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])))
        if keeper is not None:
            keeper.after_step(done)

    began, broke = time.perf_counter(), False
    try:
        losses = fit(
            network,
            data.windows(params, texts.train, seed),
            partial(_loss, params),
            optimizer,
            Schedule(params.steps, round(params.warmup * params.steps)),
            after_step=after_step,
            progress=progress,
        )
    except NonFiniteError as error:
        losses, broke = error.losses, True
    fold_(network)
    return {
        **_scores(params, network, texts, broke),
        "losses": losses,
        "gradients": norms,
        "chosen": getattr(keeper, "chosen", []),
        "trained": sum(p.numel() for p in parameters),
        "moments": moments,
        "seconds": time.perf_counter() - began,
    }


def best_rate(tried: Mapping[float, float]) -> float:
    """The learning rate with the lowest validation perplexity."""
    return min(tried, key=lambda rate: tried[rate])


@torch.no_grad()
def fold_(network: nn.Module) -> None:
    """Put plain linear layers with the weights that were trained in place of all others."""
    found = [(n, m) for n, m in network.named_modules() if isinstance(m, method.SpectralLinear | LowRankLinear)]
    for name, layer in found:
        weight = layer.weight.detach()
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None, device=weight.device)
        plain.weight.copy_(weight)
        if layer.bias is not None:
            plain.bias.copy_(layer.bias)
        parent, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, plain)


@torch.no_grad()
def _scores(params: Params, network: nn.Module, texts: Any, broke: bool) -> dict[str, Any]:
    if broke:
        return {
            "perplexity": DIVERGED,
            "validation": DIVERGED,
            "cut": dict.fromkeys(params.cuts, DIVERGED),
            "sigma": [],
        }
    score = partial(perplexity, network, context=params.context, batch=params.batch)
    most = params.test_tokens or None
    layers = method.in_blocks(network)
    widest = next(layer for layer in layers.values() if layer.out_features != layer.in_features)
    found: dict[str, Any] = {
        "perplexity": score(texts.test[:most]),
        "validation": score(texts.validation[:most]),
        "sigma": torch.linalg.svdvals(widest.weight).tolist(),
    }
    weights = {name: layer.weight.clone() for name, layer in layers.items()}
    found["cut"] = {}
    for share in params.cuts:
        for name, layer in layers.items():
            layer.weight.copy_(method.truncated(weights[name], share))
        found["cut"][share] = score(texts.test[:most])
    return found


def _loss(params: Params, network: nn.Module, window: Tensor) -> Tensor:
    window = window.to(params.device)
    with torch.autocast(params.device, torch.bfloat16, enabled=params.autocast):
        logits = network(window[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())


def _untrained(name: str) -> nn.Module:
    """A model of transformers as its configuration describes it, with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise MissingWeights(
            f"the configuration of {name} cannot be loaded ({str(error).splitlines()[0]}). Download it once on a "
            "machine with a connection, or name a folder that holds its config.json."
        ) from error
    return AutoModelForCausalLM.from_config(config)
