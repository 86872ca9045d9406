"""What CAST is compared with among trained methods: AST, its predecessor, with its low-rank branch.

AST (Huang et al., AAAI 2025, arXiv 2407.20584): SR-STE whose pull on the pruned weights grows over the first part of
the training and stays out of Adam's running mean. Read in the released code (Apache-2.0, thu-ml/Adaptive-Sparse-Trainer
at 553f2ec); nothing of it is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papers.cast.method import AdamS

__all__ = ["AST", "AST_BETAS", "AST_ETA", "AST_TEMPERATURE", "SLoRB", "attach_slorb"]

AST_BETAS = (0.9, 0.95)
AST_ETA, AST_TEMPERATURE = 0.67, 2.0  # of its distillation
ANNEAL = 0.25  # share of the steps over which the pull grows: 10000 of 40000 in the authors' command
SLORB_BLOCK = 16  # inputs that share one column of the low-rank branch


class AST(AdamS):
    """Adam whose update of a pruned weight also holds lambda_t theta, lambda_t growing from 0 to `decay`.

    The forward pass is masked by the layers (STE); the mask here is the same. Second moments are taken of the whole
    update, as the code does.

    released    what the code computes. Its masks are integers, and `~mask` of 0 and 1 is -1 and -2: the pull has the
                wrong sign, so pruned weights grow, and kept ones grow twice as fast.
    """

    def __init__(self, *args: Any, released: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.released = released

    def direction(self, weight: Tensor, mean: Tensor, kept: Tensor, step: int) -> Tensor:
        pull = self.decay * min(1.0, step / (ANNEAL * self.total)) * weight
        if self.released:
            return mean - pull * (1 + kept.to(weight.dtype))
        return torch.where(kept, mean, mean + pull)


class SLoRB(nn.Module):
    """The branch x -> (x P^T) S^T beside a sparse layer: P [K/16, K] sums blocks of inputs, S [O, K/16] starts with the
    mean of what was pruned in each block. Both are trained. It adds an eighth to a half-pruned layer's parameters."""

    def __init__(self, weight: Tensor, kept: Tensor):
        super().__init__()
        columns = weight.shape[1]
        if columns % SLORB_BLOCK:
            raise ValueError(f"SLoRB: got a weight with {columns} inputs; expected multiples of {SLORB_BLOCK}")
        lost = weight.detach().masked_fill(kept, 0.0).unflatten(1, (-1, SLORB_BLOCK)).mean(dim=2)
        block = torch.arange(columns, device=weight.device) // SLORB_BLOCK
        self.project = nn.Parameter(F.one_hot(block).T.to(weight.dtype).contiguous())
        self.restore = nn.Parameter(lost)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.project), self.restore)


def attach_slorb(layer: nn.Linear, kept: Tensor) -> Callable[[], None]:
    """Add the branch to a layer's output; returns a function that takes it off again."""
    layer.add_module("slorb", SLoRB(layer.weight, kept))
    hook = layer.register_forward_hook(lambda layer, args, output: output + layer.slorb(args[0]))

    def detach() -> None:
        hook.remove()
        del layer.slorb

    return detach
