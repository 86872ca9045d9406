"""Low-rank adaptation (Hu et al. 2022): fine-tune W x as W x + (alpha / rank) B A x, where only A and B are trained.

B starts at zero, so at first nothing changes. Linear layers and convolutions are served; for a convolution A has its
kernel and B is 1x1. Works on any network, those of diffusers and transformers too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["LowRank", "add", "state"]


class LowRank(nn.Module):
    """A layer with its low-rank change beside it. The layer's own parameters are frozen."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, alpha: float):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        at = {"device": layer.weight.device, "dtype": layer.weight.dtype, "bias": False}
        if isinstance(layer, nn.Linear):
            self.down: nn.Module = nn.Linear(layer.in_features, rank, **at)
            self.up = nn.Linear(rank, layer.out_features, **at)
        else:
            if layer.groups != 1:
                raise ValueError(f"LowRank: got a convolution in {layer.groups} groups, expected one; leave it out.")
            shape = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation")}
            self.down = nn.Conv2d(layer.in_channels, rank, **shape, padding_mode=layer.padding_mode, **at)
            self.up = nn.Conv2d(rank, layer.out_channels, 1, **at)
        nn.init.zeros_(self.up.weight)
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.scale * self.up(self.down(x))


def add(
    network: nn.Module, where: Callable[[str], bool], *, rank: int, alpha: float | None = None
) -> list[nn.Parameter]:
    """Adapt a network in place; returns the parameters to train. All that it had before is frozen.

    where  says by dotted name which linear layers and convolutions are adapted
    alpha  None: rank, so that the change has factor 1

    A's initial values come from torch's global generator. Raises ValueError where no layer is chosen.
    """
    if rank < 1:
        raise ValueError(f"lora.add: got rank {rank}, expected 1 or more.")
    network.requires_grad_(False)
    chosen = [
        name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d) and where(name)
    ]
    if not chosen:
        raise ValueError("lora.add: `where` chose none of the linear layers and convolutions; look at named_modules().")
    trained: list[nn.Parameter] = []
    for name in chosen:
        parent, _, last = name.rpartition(".")
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        adapted = LowRank(layer, rank, rank if alpha is None else alpha)
        setattr(network.get_submodule(parent), last, adapted)
        trained += [*adapted.down.parameters(), *adapted.up.parameters()]
    return trained


def state(network: nn.Module) -> dict[str, Tensor]:
    """The low-rank parts by name, on the CPU; `network.load_state_dict(values, strict=False)` brings them back."""
    parts = {}
    for name, module in network.named_modules():
        if isinstance(module, LowRank):
            for part in ("down", "up"):
                weight = module.get_submodule(part).weight
                assert isinstance(weight, torch.Tensor)
                parts[f"{name}.{part}.weight"] = weight.detach().cpu()
    return parts
