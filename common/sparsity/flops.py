"""Multiply-accumulates of training, by pass and with the densities of N:M: counted where they happen, by forward hooks.

Of a Linear on T tokens: forward T I O, input gradient T I O, weight gradient T I O. Of a Conv2d with P positions of its
output: P O I/groups kh kw each. Two ways to count what sparsity saves:

    `kernels`   what N:M kernels can skip: a product is charged n/m where its weight is n:m along the axis that it
                contracts (forward: in; input gradient: out), and 1 elsewhere. SR-STE then costs (n/m + 2)/3 of dense
                training, two axes or a transposable mask (2 n/m + 1)/3
    `nonzeros`  every product with a zero weight is free, and so is the gradient of a weight that takes none: what an
                ideal machine could skip, and how the progressive gradient flows are compared

While beta > 0 nothing is zero, so nothing is saved.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.sparsity.layers import NMLayer

__all__ = ["FlopMeter", "Passes", "densities"]

Counting = Literal["kernels", "nonzeros"]


@dataclass
class Passes:
    """Multiply-accumulates of the three passes; two floating-point operations each."""

    forward: float = 0.0
    input_gradient: float = 0.0
    weight_gradient: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.input_gradient + self.weight_gradient

    def __add__(self, other: Passes) -> Passes:
        return Passes(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass
class Count:
    """One layer's sums: as sparse as it was, and what a dense layer would have taken."""

    sparse: Passes = field(default_factory=Passes)
    dense: Passes = field(default_factory=Passes)


class FlopMeter:
    """Counts every Linear and Conv2d of a model, whatever its input's size, until `close`; also a context manager.

    A forward pass without gradients counts as forward alone. With them its backward is counted too: the input gradient
    where the input needs one, the weight gradient where the weight does. Each layer is charged by the rule in force at
    that pass. Products of activations (attention scores) and everything elementwise are not counted.
    """

    def __init__(self, model: nn.Module, count: Counting = "kernels"):
        if count not in ("kernels", "nonzeros"):
            raise ValueError(f"FlopMeter: got count {count!r}; expected 'kernels' or 'nonzeros'")
        self.counting: Counting = count
        self.layers: dict[str, Count] = {}
        self._hooks = []
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                self.layers[name] = Count()
                self._hooks.append(module.register_forward_hook(self._hook(self.layers[name])))

    @property
    def sparse(self) -> Passes:
        """What all layers took so far."""
        return sum((count.sparse for count in self.layers.values()), Passes())

    @property
    def dense(self) -> Passes:
        """What they would have taken as dense layers."""
        return sum((count.dense for count in self.layers.values()), Passes())

    def close(self) -> None:
        """Stop counting."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> FlopMeter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _hook(self, count: Count) -> Any:
        def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            weight = layer.weight
            assert isinstance(weight, Tensor)
            macs = float(output.numel() * math.prod(weight.shape[1:]))
            training = torch.is_grad_enabled()
            need_x, need_weight = training and inputs[0].requires_grad, training and weight.requires_grad
            done = Passes(macs, macs * need_x, macs * need_weight)
            shares = densities(layer, self.counting)
            count.dense += done
            count.sparse += Passes(*(a * b for a, b in zip(astuple(done), astuple(shares), strict=True)))

        return add


def densities(layer: nn.Module, count: Counting = "kernels") -> Passes:
    """The share of each pass that the layer's rule leaves, 0..1: 1 everywhere for a dense layer."""
    if not isinstance(layer, NMLayer) or layer.kept is None or layer.rule.beta > 0:
        return Passes(1.0, 1.0, 1.0)
    rule = layer.rule
    density = rule.n / rule.m
    if count == "kernels":
        forward, back = layer.axis == "in" or rule.both_axes, layer.axis == "out" or rule.both_axes
        return Passes(density if forward else 1.0, density if back else 1.0, 1.0)
    back = density if layer.back is None else float(layer.back.float().mean())
    return Passes(density, back, density if rule.grad_mode == "scaled" else 1.0)
