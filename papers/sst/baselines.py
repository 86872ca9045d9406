"""What SST is compared with at equal rank: LoRA and ReLoRA*, both from scratch, in place of every linear layer.

LoRA (Hu et al. 2021) leaves W as it was drawn and trains W + B A. ReLoRA* (Lialin et al. 2023, without its dense start,
as SST's authors use it) adds B A to W every so often and begins with new A and B = 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papers.sst import method

__all__ = ["LowRankLinear", "Merging", "low_rank_"]


class LowRankLinear(nn.Module):
    """y = x (W + B A)^T + b; W [O, I] frozen, B [O, r] from zero, A [r, I] uniform within sqrt(1 / I) [LoRA]."""

    def __init__(self, layer: nn.Linear, rank: int):
        super().__init__()
        outputs, inputs = layer.weight.shape
        self.bias = layer.bias
        self.base: Tensor
        self.register_buffer("base", layer.weight.detach().clone())
        self.down = nn.Parameter(self.base.new_empty(rank, inputs))
        self.up = nn.Parameter(self.base.new_zeros(outputs, rank))
        self._draw()

    @property
    def weight(self) -> Tensor:
        """W + B A [O, I], differentiable."""
        return self.base + self.up @ self.down

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base, self.bias) + F.linear(F.linear(x, self.down), self.up)

    @torch.no_grad()
    def merge_(self) -> None:
        """W <- W + B A; B = 0 and a new A. The layer computes what it did, but the gradient of A is now zero."""
        self.base.copy_(self.weight)
        self.up.zero_()
        self._draw()

    def _draw(self) -> None:
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))


def low_rank_(model: nn.Module, rank: int) -> dict[str, LowRankLinear]:
    """Replace the linear layers in blocks, in place; they compute the same."""
    layers: dict[str, LowRankLinear] = {}
    for name, layer in method.in_blocks(model).items():
        parent, _, leaf = name.rpartition(".")
        layers[name] = LowRankLinear(layer, rank)
        setattr(model.get_submodule(parent), leaf, layers[name])
    return layers


class Merging:
    """ReLoRA*'s restarts: call `after_step` after every update of `optimizer`."""

    def __init__(self, layers: Mapping[str, LowRankLinear], optimizer: torch.optim.Optimizer, *, interval: int):
        self.layers, self.optimizer, self.interval = layers, optimizer, interval

    def after_step(self, done: int) -> None:
        """`done`: updates so far."""
        if done % self.interval:
            return
        for layer in self.layers.values():
            layer.merge_()
            for factor in (layer.up, layer.down):
                self.optimizer.state.pop(factor, None)
