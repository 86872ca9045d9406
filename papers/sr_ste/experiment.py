"""The arms that are compared, and how one of them is built, trained, measured and timed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import seeds, training
from common.data.planted import planted
from common.models.resnet_cifar import ResNetCifar
from common.sparsity import MaskMeter, NMConfig, Sparsity, sparsify_
from common.training.supervised import no_bar
from papers.sr_ste import method
from papers.sr_ste.data import Batch, Folder, InMemory
from papers.sr_ste.settings import Params, parse

POINTS = 100  # of a recorded curve
PLANTED = {"inputs": 128, "outputs": 64, "samples": 512, "noise": 0.3, "correlation": 0.5}
PLANTED_PATTERN, PLANTED_STEPS, PLANTED_BATCH, PLANTED_RATE, PLANTED_START = (1, 8), 400, 32, 0.05, 0.1
PLANTED_DECAYS = {"none": 0.0, "small": 0.03, "moderate": 0.3, "large": 3.0}
TIMED_STEPS = 5


@dataclass(frozen=True)
class Arm:
    """One bar of the comparison: a network, a recipe of `method.recipe`, its pattern and decay.

    `dense` has a pattern too: the one through which its choice is watched.
    """

    network: str
    recipe: str
    pattern: str
    decay: float = 0.0


def arms(params: Params) -> dict[str, Arm]:
    """Every arm by name: `dense`, `sr_ste/2:4`, `ste/2:4`, `by_position/2:4`, `sr_ste/1:8x10` (ten times the decay);
    those of the networks after the first behind the network's name and a slash."""
    main, decay = params.networks[0], params.decay
    found = {"dense": Arm(main, "dense", params.sweep_pattern)}
    found |= {f"sr_ste/{p}": Arm(main, "sr_ste", p, decay) for p in params.sr_ste}
    found |= {f"ste/{p}": Arm(main, "ste", p) for p in params.ste}
    found |= {f"by_position/{p}": Arm(main, "by_position", p, decay) for p in params.by_position}
    found |= {swept(params, x): Arm(main, "sr_ste", params.sweep_pattern, x * decay) for x in params.sweep}
    for network in params.networks[1:]:
        found |= {f"{network}/{name}": replace(found[name], network=network) for name in params.other_arms}
    return found


def swept(params: Params, multiple: float) -> str:
    """The name of the arm with this multiple of the decay at the sweep's pattern; 0 is STE."""
    if multiple == 0:
        return f"ste/{params.sweep_pattern}"
    return f"sr_ste/{params.sweep_pattern}" + ("" if multiple == 1 else f"x{multiple:g}")


def build(params: Params, arm: Arm, *, classes: int, channels: int) -> tuple[nn.Module, Sparsity]:
    """The network of an arm, initialised from torch's global generator, and the handle of its sparse layers.

    Every convolution that m divides is sparse; the stem, with three input channels, and the last layer stay dense.
    """
    if arm.network == "resnet_cifar":
        network: nn.Module = ResNetCifar(width=params.width, depth=params.depth, classes=classes, channels=channels)
    elif arm.network == "resnet20":
        network = ResNetCifar(classes=classes, channels=channels)
    else:
        from torchvision import models

        network = getattr(models, arm.network)(num_classes=classes)
    network.to(params.device)
    n, m = parse(arm.pattern)
    return network, sparsify_(network, NMConfig(n, m, recipe=method.recipe(arm.recipe, arm.decay)))


def partly_dense(params: Params, *, classes: int, channels: int) -> set[str]:
    """The arms of the first network that leave layers dense which others make sparse, for m does not divide them."""
    own = {name: arm for name, arm in arms(params).items() if arm.network == params.networks[0]}
    sparse = {name: len(build(params, arm, classes=classes, channels=channels)[1].layers) for name, arm in own.items()}
    return {name for name, count in sparse.items() if count < max(sparse.values())}


@seeds.one_thread()  # networks as small as ours only lose by a second one, and a GPU has no use for it
def fit(params: Params, arm: Arm, data: InMemory | Folder, seed: int, *, progress: Callable = no_bar) -> dict:
    """Train one arm with one seed and measure it.

    Returns numbers `top1`, `top1_validation` (percent; the second only where images were held out), `sad` (to the first
    choice, a share of the weights), `flips` (changes of the choice, all steps together, for each weight), `violations`
    (groups that keep more than n), `seconds`; and `curves` {name: [(step, value), ...]} of `loss`, `sad`, `flip_rate`.
    """
    seeds.everything(seed, deterministic=False)
    network, handle = build(params, arm, classes=data.classes, channels=data.channels)
    moved = MaskMeter(handle)
    steps = steps_of(params, data)
    started = time.perf_counter()
    losses = training.fit(
        network,
        data.batches(params.batch, steps, seed),
        _loss,
        _optimizer(params, network),
        training.Schedule(steps, round(params.warmup * steps)),
        after_step=lambda _: handle.step(),
        progress=progress,
    )
    seconds = time.perf_counter() - started
    sad, rate = moved.sad(), moved.flip_rate()
    curves = {name: _thinned(row) for name, row in (("loss", losses), ("sad", sad), ("flip_rate", rate))}
    found = {"sad": sad[-1], "flips": sum(rate), "violations": violations(handle), "seconds": seconds, "curves": curves}
    if getattr(data, "validation", None) is not None:
        found["top1_validation"] = training.accuracy(network, data.held_out("validation"))
    return found | {"top1": training.accuracy(network, data.held_out("test"))}


def steps_of(params: Params, data: InMemory | Folder) -> int:
    """Optimiser steps of one training."""
    return params.steps or params.epochs * (len(data) // params.batch)


def violations(handle: Sparsity) -> int:
    """Groups that keep another number than n, over all sparse layers."""
    n, m = handle.config.n, handle.config.m
    by_position = isinstance(handle.recipe, method.ByPosition)
    rows = [mask.flatten(1) if by_position else mask.movedim(1, -1) for mask in handle.masks().values()]
    return sum(int((row.unflatten(-1, (-1, m)).sum(-1) != n).sum()) for row in rows)


@dataclass(frozen=True)
class Search:
    """How a search for the planted teacher's mask ended.

    `recovered` share of the teacher's places, `flips` changes of the choice for each weight, `error` squared distance
    of the sparse weight from the teacher's over the teacher's squared length; both masks, bool [O, K].
    """

    recovered: float
    flips: float
    error: float
    kept: Tensor
    teacher: Tensor


def search_planted(decay: float, seed: int) -> Search:
    """Look for the mask of a planted linear teacher by `method.fit_linear`; the same data for every decay of a seed."""
    n, m = PLANTED_PATTERN
    data = planted(n, m, seed=seed, **PLANTED)
    draw = seeds.generator(seed, "planted search")
    start = PLANTED_START * torch.randn(data.weight.shape, generator=draw)
    chosen = [torch.randint(len(data.inputs), (PLANTED_BATCH,), generator=draw) for _ in range(PLANTED_STEPS)]
    batches = ((data.inputs[rows], data.targets[rows]) for rows in chosen)
    run = method.fit_linear(start, batches, n, m, rate=PLANTED_RATE, decay=decay)
    error = (method.sparse(run.weight, run.kept) - data.weight).square().sum() / data.weight.square().sum()
    return Search(data.recovered(run.kept), run.flips, error.item(), run.kept, data.mask)


def ten_steps(recipe: str, decay: float) -> Tensor:
    """The weight [4, 16] of a sparse linear layer of `common.sparsity`, 2:8, after ten steps of plain SGD on random
    numbers; double precision."""
    start, batches = _random_regression()
    layer = nn.Linear(16, 4, bias=False, dtype=torch.float64)
    layer.weight.data.copy_(start)
    model = nn.ModuleDict({"layer": layer})
    handle = sparsify_(model, NMConfig(2, 8, where=["layer"], recipe=method.recipe(recipe, decay)))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for inputs, targets in batches:
        optimizer.zero_grad()
        (0.5 * (layer(inputs) - targets).square().sum() / len(inputs)).backward()
        optimizer.step()
        handle.step()
    return layer.weight.detach()


def ten_steps_written_out(decay: float) -> Tensor:
    """The same by equations (1) to (3)."""
    start, batches = _random_regression()
    return method.fit_linear(start, batches, 2, 8, rate=0.1, decay=decay).weight


@seeds.one_thread()
def seconds_per_step(params: Params, data: InMemory | Folder) -> dict[str, list[float]]:
    """Seconds of one training step of a `plain` network, with `ste` and with `sr_ste` at 2:4: `repeats` medians each.

    The three take turns, so that what else the machine does meets all of them.
    """
    batch = next(data.batches(params.batch, 1, 0))
    steps = {name: _stepper(params, data, name, batch) for name in ("plain", "ste", "sr_ste")}
    for step in steps.values():
        step()  # warm
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(params.repeats):
        rounds = [{name: _seconds(step) for name, step in steps.items()} for _ in range(TIMED_STEPS)]
        for name, medians in found.items():
            medians.append(statistics.median(taken[name] for taken in rounds))
    return found


def _random_regression() -> tuple[Tensor, list[Batch]]:
    """A start [4, 16] and ten batches of inputs [8, 16] and targets [8, 4], always the same."""
    start, *numbers = torch.randn(11, 16, 16, generator=seeds.generator(0, "ten steps"), dtype=torch.float64)
    return start[:4], [(x[:8], x[8:, :4]) for x in numbers]


def _stepper(params: Params, data: InMemory | Folder, name: str, batch: Batch) -> Callable[[], None]:
    seeds.everything(0, deterministic=False)
    arm = Arm(params.networks[0], "dense" if name == "plain" else name, "2:4", params.decay)
    network, handle = build(params, arm, classes=data.classes, channels=data.channels)
    if name == "plain":
        handle.remove()
    optimizer = _optimizer(params, network)

    def step() -> None:
        optimizer.zero_grad()
        _loss(network, batch).backward()
        optimizer.step()
        if name != "plain":
            handle.step()

    return step


def _seconds(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _loss(network: nn.Module, batch: Batch) -> Tensor:
    device = next(network.parameters()).device
    inputs, labels = (x.to(device, non_blocking=True) for x in batch)
    return F.cross_entropy(network(inputs), labels)


def _optimizer(params: Params, network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        network.parameters(), lr=params.learning_rate, momentum=params.momentum, weight_decay=params.weight_decay
    )


def _thinned(row: list[float]) -> list[tuple[int, float]]:
    """About `POINTS` of the values with their steps (from 1), the last one always among them."""
    stride = max(1, math.ceil(len(row) / POINTS))
    return [(step, row[step - 1]) for step in range(len(row), 0, -stride)][::-1]
