"""How far the cheap input gradients are from the exact ones, on the same weights and the same images.

A layer alone, dy of the dense network in all cases:

    energy    |W_back|^2 / |W|^2                    what the backward view keeps of the dense weight
    dense     cos(W_back^T dy, W^T dy)              against the gradient that dense training would hand on
    own       cos(W_back^T dy, W_forward^T dy)      against the gradient of the sparse network that is really run

and the whole network, where the layers' errors meet:

    network   cosine of all sparse layers' dW with those of the same forward pass and an exact backward pass
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import seeds
from common.sparsity import Masks, Rule
from papers.bdwp import experiment, method, networks
from papers.bdwp.data import Batch, Folder, InMemory
from papers.bdwp.experiment import Arm
from papers.bdwp.settings import Params, parse

COMPARED = ("bdwp", "bi_mask", "transposable")
IMAGES = 250


@dataclass(frozen=True)
class Fidelity:
    """Of one recipe on one network; `by_layer` is `network` for each sparse layer, from the first to the last."""

    energy: float
    dense: float
    own: float
    network: float
    by_layer: list[float]


@seeds.one_thread()
def compare(params: Params, data: InMemory | Folder, state: dict[str, Tensor]) -> dict[str, Fidelity]:
    """`COMPARED` at the pattern of `params` on the first network with these weights, and the first test images."""
    inputs, labels = next(data.tested())
    batch = inputs[:IMAGES], labels[:IMAGES]
    signals = _signals(params, data, state, batch)
    found = {}
    for name in COMPARED:
        rows = [_alone(params, name, signal) for signal in signals]
        energy, dense, own = (sum(values) / len(rows) for values in zip(*rows, strict=True))
        exact, cheap = (_weight_gradients(params, data, state, batch, name, exact=e) for e in (True, False))
        by_layer = [cosine(a, b) for a, b in zip(exact, cheap, strict=True)]
        whole = cosine(*(torch.cat([gradient.flatten() for gradient in row]) for row in (exact, cheap)))
        found[name] = Fidelity(energy, dense, own, whole, by_layer)
    return found


def cosine(a: Tensor, b: Tensor) -> float:
    """Of two tensors of one shape, as vectors, in double precision."""
    return F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


@dataclass(frozen=True)
class _Signal:
    """A layer of the dense network, the shape of its input and the gradient of its output."""

    layer: nn.Module
    shape: torch.Size
    dy: Tensor

    def hand_on(self, weight: Tensor) -> Tensor:
        """The gradient of the input by this weight."""
        if isinstance(self.layer, nn.Linear):
            return self.dy @ weight
        assert isinstance(self.layer, nn.Conv2d)
        layer = self.layer
        return nn.grad.conv2d_input(self.shape, weight, self.dy, layer.stride, layer.padding)  # pyright: ignore


def _signals(params: Params, data: InMemory | Folder, state: dict[str, Tensor], batch: Batch) -> list[_Signal]:
    arm = Arm(params.networks[0], "dense", params.pattern)
    network, handle = experiment.build(params, arm, data)
    network.load_state_dict(state)
    chosen = list(handle.layers)
    handle.remove()
    signals: dict[str, _Signal] = {}

    def listen(name: str) -> None:
        def heard(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(lambda dy: signals.update({name: _Signal(layer, inputs[0].shape, dy)}))

        network.get_submodule(name).register_forward_hook(heard)

    for name in chosen:
        listen(name)
    experiment.loss(network, batch).backward()
    return [signals[name] for name in chosen]


@torch.no_grad()
def _alone(params: Params, recipe: str, signal: _Signal) -> tuple[float, float, float]:
    """`energy`, `dense` and `own` of a layer."""
    n, m = parse(params.pattern)
    weight = signal.layer.weight
    assert isinstance(weight, Tensor)
    masks: Masks = method.recipe(recipe, 0.0).masks(weight, Rule(n, m, both_axes=True), "in", 0, None)
    forward = weight * masks.kept
    backward = forward if masks.back is None else weight * masks.back
    handed = signal.hand_on(backward)
    energy = (backward.double().square().sum() / weight.double().square().sum()).item()
    return energy, cosine(handed, signal.hand_on(weight)), cosine(handed, signal.hand_on(forward))


def _weight_gradients(
    params: Params, data: InMemory | Folder, state: dict[str, Tensor], batch: Batch, recipe: str, *, exact: bool
) -> list[Tensor]:
    """dL/dW~ of every sparse layer under a recipe without its pull; `exact`: the forward view hands gradients on."""
    arm = Arm(params.networks[0], recipe, params.pattern)
    params = replace(params, decay=0.0, vit_decay=0.0)
    network = networks.build(params, arm.network, classes=data.classes, channels=data.channels, size=data.size)
    network.load_state_dict(state)
    handle = experiment.sparse(params, arm, network.to(params.device))
    for layer in handle.layers.values():
        if exact and layer.masks is not None:
            layer.apply_rule(layer.rule, layer.masks._replace(back=None))
    experiment.loss(network, batch).backward()
    gradients = [layer.weight.grad for layer in handle.layers.values()]
    return [gradient for gradient in gradients if gradient is not None]
