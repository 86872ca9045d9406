"""The arms that are compared: how one is built, trained and checked; and what the method costs and does, exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import seeds, training
from common.sparsity import FlopMeter, NMConfig, Passes, Sparsity, sparsify_
from common.training.supervised import no_bar
from papers.bdwp import method, networks
from papers.bdwp.data import CLASSES_OF, SET_OF, SIZE_OF, Batch, Folder, InMemory
from papers.bdwp.settings import Params, parse

POINTS = 100  # of a recorded curve
COUNTED_ANYWAY = ("resnet9", "vgg19", "resnet18", "resnet50")  # the published ones whose shape is known
REGRESSION = {"inputs": 16, "hidden": 16, "outputs": 8}  # of the comparison with the equations, at 2:8


@dataclass(frozen=True)
class Arm:
    """One bar of the comparison: a network, a recipe of `method.recipe`, its pattern."""

    network: str
    recipe: str
    pattern: str


def arms(params: Params) -> dict[str, Arm]:
    """Every arm by name: `dense`, `bdwp/2:8`; those of the networks after the first as `vit/dense`, `vit/bdwp/2:8`."""
    first, *others = params.networks
    wanted = [(first, "", arm) for arm in ("dense", *params.arms)]
    wanted += [(network, f"{network}/", arm) for network in others for arm in params.other_arms]
    found = {}
    for network, prefix, arm in wanted:
        recipe, _, pattern = arm.partition("/")
        found[prefix + arm] = Arm(network, recipe, pattern or params.pattern)
    return found


def build(params: Params, arm: Arm, data: InMemory | Folder) -> tuple[nn.Module, Sparsity]:
    """The network of an arm, initialised from torch's global generator, and the handle of its sparse layers.

    Every layer that m divides along both axes is sparse; the first, with its three channels, and the last stay dense.
    """
    network = networks.build(params, arm.network, classes=data.classes, channels=data.channels, size=data.size)
    network.to(params.device)
    return network, sparse(params, arm, network)


def sparse(params: Params, arm: Arm, network: nn.Module) -> Sparsity:
    """Make a network an arm's, in place."""
    n, m = parse(arm.pattern)
    decay = params.vit_decay if arm.network == "vit" else params.decay
    chosen = _both_axes(network, m)
    return sparsify_(network, NMConfig(n, m, where=chosen, recipe=method.recipe(arm.recipe, decay)))


@seeds.one_thread()  # networks as small as ours only lose by a second one, and a GPU has no use for it
def fit(
    params: Params,
    arm: Arm,
    data: InMemory | Folder,
    seed: int,
    *,
    keep: bool = False,
    progress: Callable = no_bar,
) -> dict:
    """Train one arm with one seed and measure it.

    Returns `top1` (percent), `illegal` (shares of groups that the forward pass and the input gradient cannot use),
    `seconds`, `loss` [(step, value), ...] and, where asked to `keep` it, the network's `state`.
    """
    seeds.everything(seed, deterministic=False)
    network, handle = build(params, arm, data)
    steps = steps_of(params, arm, data)
    started = time.perf_counter()
    losses = training.fit(
        network,
        data.batches(params.batch, steps, seed),
        loss,
        _optimizer(params, arm, network),
        training.Schedule(steps, round(params.warmup * steps)),
        after_step=lambda _: handle.step(),
        progress=progress,
    )
    found = {"seconds": time.perf_counter() - started, "loss": _thinned(losses), "illegal": illegal(handle)}
    if keep:
        found["state"] = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}
    return found | {"top1": training.accuracy(network, data.tested())}


def steps_of(params: Params, arm: Arm, data: InMemory | Folder) -> int:
    """Optimiser steps of one training."""
    epochs = params.vit_epochs if arm.network == "vit" else params.epochs
    return params.steps or epochs * (len(data) // params.batch)


def loss(network: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of a batch, moved to the network's device."""
    device = next(network.parameters()).device
    inputs, labels = (x.to(device, non_blocking=True) for x in batch)
    return F.cross_entropy(network(inputs), labels)


def illegal(handle: Sparsity) -> dict[str, float]:
    """The share of groups with more than n weights, mean over the sparse layers: of the `forward` pass along the input
    channels, and of the `backward` pass along the output channels, in the order that the recipe puts these in. Empty
    for a dense network."""
    n, m = handle.config.n, handle.config.m
    sparse_layers = [layer for layer in handle.layers.values() if layer.masks is not None]
    found: dict[str, list[float]] = {"forward": [], "backward": []} if sparse_layers else {}
    for layer in sparse_layers:
        assert layer.masks is not None
        kept, back, order = layer.masks
        back = kept if back is None else back
        back = back if order is None else back[order.to(back.device)]
        found["forward"].append(method.illegal_groups(kept, n, m, dim=1))
        found["backward"].append(method.illegal_groups(back, n, m, dim=0))
    return {name: sum(row) / len(row) for name, row in found.items()}


# ------------------------------------------------------------------------------------------ the layers, the equations


def ten_steps(recipe: str, decay: float) -> Tensor:
    """The weights of a perceptron of sparse layers, 2:8, after ten steps of plain SGD on random numbers: both, flat, in
    double precision."""
    starts, batches = _random_regression()
    layers = [nn.Linear(start.shape[1], start.shape[0], bias=False, dtype=start.dtype) for start in starts]
    for layer, start in zip(layers, starts, strict=True):
        layer.weight.data.copy_(start)
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1])
    handle = sparsify_(model, NMConfig(2, 8, where=["0", "2"], recipe=method.recipe(recipe, decay)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for inputs, targets in batches:
        optimizer.zero_grad()
        (0.5 * (model(inputs) - targets).square().sum() / len(inputs)).backward()
        optimizer.step()
        handle.step()
    return torch.cat([layer.weight.detach().flatten() for layer in layers])


def ten_steps_written_out(decay: float) -> Tensor:
    """The same by equations (1) to (6)."""
    (first, second), batches = _random_regression()
    found = method.fit_perceptron(first, second, batches, 2, 8, rate=0.1, decay=decay)
    return torch.cat([weight.flatten() for weight in found])


def _random_regression() -> tuple[tuple[Tensor, Tensor], list[Batch]]:
    """Two starts and ten batches of eight, always the same."""
    inputs, hidden, outputs = REGRESSION.values()
    draw = seeds.generator(0, "ten steps")

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    starts = normal(hidden, inputs) / inputs**0.5, normal(outputs, hidden) / hidden**0.5
    return starts, [(normal(8, inputs), normal(8, outputs)) for _ in range(10)]


# ---------------------------------------------------------------------------------------------- multiply-accumulates


@dataclass(frozen=True)
class Counted:
    """Multiply-accumulates of one training step on one image: of the whole network, and of its sparse layers alone."""

    whole: Passes
    whole_dense: Passes
    layers: Passes
    layers_dense: Passes

    @property
    def share(self) -> float:
        """Of the whole network's dense ones, its dense first and last layer included."""
        return self.whole.total / self.whole_dense.total

    @property
    def layers_share(self) -> float:
        """Of the sparse layers' dense ones."""
        return self.layers.total / self.layers_dense.total


def counted_networks(params: Params) -> list[str]:
    """Networks whose multiply-accumulates are counted: those of this run, and the published ones."""
    return list(dict.fromkeys([*params.networks, *COUNTED_ANYWAY]))


def count(params: Params, name: str, data: InMemory | Folder) -> dict[str, Counted]:
    """By recipe and pattern (`sr_ste/2:8`) for SR-STE and BDWP: hooks count, nothing is computed.

    data gives the shape of this run's own networks; a published one is counted on its own set's.
    """
    shape = {"classes": data.classes, "channels": data.channels, "size": data.size}
    if name in COUNTED_ANYWAY:
        shape = {"classes": CLASSES_OF[SET_OF[name]], "channels": 3, "size": SIZE_OF[SET_OF[name]]}
    with torch.device("meta"):
        network = networks.build(params, name, **shape)
        image = torch.empty(1, shape["channels"], shape["size"], shape["size"])
    found = {}
    for pattern in params.counted:
        for recipe in ("sr_ste", "bdwp"):
            handle = sparse(params, Arm(name, recipe, pattern), network)
            with FlopMeter(network) as meter:
                network(image)
            layers = [meter.layers[layer] for layer in handle.layers]
            found[f"{recipe}/{pattern}"] = Counted(
                meter.sparse,
                meter.dense,
                sum((layer.sparse for layer in layers), Passes()),
                sum((layer.dense for layer in layers), Passes()),
            )
            handle.remove()
    return found


def _both_axes(network: nn.Module, m: int) -> Callable[[str, nn.Module], bool]:
    """Chooses the layers that m divides along both axes, but the last one: the same in every arm."""
    plain = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    fits = [name for name, layer in plain.items() if not any(size % m for size in layer.weight.shape[:2])]
    chosen = set(fits) - {list(plain)[-1]}
    return lambda name, _: name in chosen


def _optimizer(params: Params, arm: Arm, network: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum; AdamW for the vision transformer, which SGD hardly trains."""
    if arm.network == "vit":
        return torch.optim.AdamW(network.parameters(), lr=params.vit_learning_rate, weight_decay=params.weight_decay)
    return torch.optim.SGD(
        network.parameters(), lr=params.learning_rate, momentum=params.momentum, weight_decay=params.weight_decay
    )


def _thinned(row: list[float]) -> list[tuple[int, float]]:
    """About `POINTS` of the values with their steps (from 1), the last one always among them."""
    stride = max(1, math.ceil(len(row) / POINTS))
    return [(step, row[step - 1]) for step in range(len(row), 0, -stride)][::-1]
