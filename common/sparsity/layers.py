"""Sparse layers: torch's Linear and Conv2d with masks beside the dense weight.

A layer is made sparse by changing its class in place. The parameter stays the dense `weight` under its own name, so
initialisation, optimisers, hooks, shared layers and checkpoints stay what they were.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.sparsity import ops
from common.sparsity.rules import Axis, Masks, Rule
from kernels.nm.tensor import pattern

__all__ = ["NMConv2d", "NMLayer", "NMLinear"]

BUFFERS = ("kept", "back", "order", "factor")  # not persistent: they move with the layer and stay out of state_dict


class NMLayer(nn.Module):
    """What both kinds of layer share: the rule of this step, and the masks that it found.

    kept     bool of the weight's shape, or None while the layer is dense: E
    back     bool, or None where the input gradient takes the forward's weight
    factor   E + beta (1 - E), in the weight's dtype
    """

    weight: Tensor
    rule: Rule
    axis: Axis
    kept: Tensor | None
    back: Tensor | None
    order: Tensor | None
    factor: Tensor | None

    @property
    def masks(self) -> Masks | None:
        """The masks in force; None while the layer is dense."""
        return None if self.kept is None else Masks(self.kept, self.back, self.order)

    def apply_rule(self, rule: Rule, masks: Masks | None) -> None:
        """Set what the next forward and backward pass do."""
        changed = masks is None or masks.kept is not self.kept or rule.beta != self.rule.beta
        self.rule = rule
        self.kept, self.back, self.order = masks or (None, None, None)
        if changed and self.kept is not None:
            factor = self.kept.to(self.weight.dtype)
            self.factor = factor if rule.beta == 0 else torch.add(factor, 1 - factor, alpha=rule.beta)  # 1 where kept
        elif changed:
            self.factor = None

    def weights(self) -> tuple[Tensor, Tensor | None]:
        """W~ of the forward pass, and the weight of the input gradient where that is another."""
        if self.factor is None:
            return self.weight, None
        effective = ops.masked(self.weight, self.factor, decay=self.rule.decay, scaled=self.rule.grad_mode == "scaled")
        return effective, None if self.back is None else self.weight.detach() * self.back

    def extra_repr(self) -> str:
        rule = self.rule
        about = "dense" if rule.dense else f"{pattern(rule.n, rule.m, rule.vector)} along {self.axis}"
        return f"{super().extra_repr()}, {about}"


class NMLinear(NMLayer, nn.Linear):
    """A Linear whose weight [O, I] is N:M along I (axis `in`) or O (`out`)."""

    def forward(self, input: Tensor) -> Tensor:
        weight, back = self.weights()
        if back is None:
            return F.linear(input, weight, self.bias)
        return ops.linear(input, weight, back, self.bias)


class NMConv2d(NMLayer, nn.Conv2d):
    """A Conv2d whose weight [O, I/groups, kh, kw] is N:M over the channels at each kernel position."""

    def forward(self, input: Tensor) -> Tensor:
        weight, back = self.weights()
        if back is None:
            return self._conv_forward(input, weight, self.bias)
        padding = self.padding
        if isinstance(padding, str) or self.padding_mode != "zeros":
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, mode=mode), (0, 0)
        return ops.conv2d(input, weight, back, self.bias, self.stride, padding, self.dilation, self.groups)


SPARSE: dict[type[nn.Module], type[NMLayer]] = {nn.Linear: NMLinear, nn.Conv2d: NMConv2d}
DENSE = {sparse: dense for dense, sparse in SPARSE.items()}


def make_sparse(layer: nn.Module, rule: Rule, axis: Axis) -> NMLayer:
    """Change a Linear or Conv2d in place; it stays dense until `apply_rule` gives it masks."""
    layer.__class__ = SPARSE[type(layer)]
    assert isinstance(layer, NMLayer)
    for name in BUFFERS:
        layer.register_buffer(name, None, persistent=False)
    layer.rule, layer.axis = rule, axis
    return layer


def make_dense(layer: NMLayer) -> None:
    """Change a sparse layer back in place; the dense weight stays as it is."""
    for name in BUFFERS:
        delattr(layer, name)
    del layer.rule, layer.axis
    layer.__class__ = DENSE[type(layer)]  # pyright: ignore[reportAttributeAccessIssue]
