"""A small GPT: a causal pre-norm transformer with learned positions (Radford et al. 2019), its loss and perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models.transformer import Block

__all__ = ["GPT", "next_token_loss", "perplexity"]


class GPT(nn.Module):
    """tokens [B, L] int64 in 0..vocabulary-1, L <= context -> logits [B, L, vocabulary] of the token after each.

    Args:
        context: the most positions it can see.
        ratio: width of the feed-forward's hidden layer over `width`.
        tied: the head shares the token embedding's weight, as in GPT-2.

    For the names of its weight matrices see `transformer.py`; the head is `head`. Weights start at N(0, 0.02²), those
    that end a shortcut divided by sqrt(2 depth), biases at 0 [GPT-2].
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        context: int = 128,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        ratio: int = 4,
        tied: bool = False,
    ):
        super().__init__()
        if min(vocabulary, context, depth, ratio) < 1:
            raise ValueError(
                f"GPT: got vocabulary={vocabulary}, context={context}, depth={depth}, ratio={ratio}; expected each to "
                "be at least 1."
            )
        self.context = context
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, ratio, causal=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                ends_shortcut = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth) if ends_shortcut else 0.02)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.ndim != 2 or tokens.shape[1] > self.context:
            raise ValueError(
                f"GPT: got tokens of shape {list(tokens.shape)}; expected [B, L] with L of at most {self.context}. "
                "Cut them into windows."
            )
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]  # [B, L, width]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def next_token_loss(network: nn.Module, window: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each token given those before it: window [B, L + 1] int64 -> scalar."""
    logits = network(window[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())


@torch.no_grad()
def perplexity(
    network: nn.Module,
    tokens: Tensor,
    *,
    context: int,
    batch: int = 32,
    progress: Callable[[Sequence[Tensor]], Iterable[Tensor]] | None = None,
) -> float:
    """exp of the mean cross-entropy over a text, tokens [T], cut into windows of context + 1 that meet in one token.

    Every token after the first is predicted once, from between 1 and `context` tokens before it; a last window that is
    not full is left out. In evaluation mode, on the network's device; `progress` draws a bar over the batches. Raises
    ValueError for too short a text.
    """
    if tokens.ndim != 1 or len(tokens) <= context:
        raise ValueError(f"perplexity: got tokens {list(tokens.shape)}; expected [T] with T > context = {context}.")
    windows = tokens.unfold(0, context + 1, context)  # [W, context + 1]
    device, was_training = next(network.parameters()).device, network.training
    network.eval()
    parts = progress(windows.split(batch)) if progress else windows.split(batch)
    total = sum(next_token_loss(network, part.long().to(device)).item() * len(part) for part in parts)
    network.train(was_training)
    return math.exp(total / len(windows))
