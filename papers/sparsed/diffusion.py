"""Masked diffusion of language, as LLaDA does it (Nie et al. 2025): the loss, the generation, and the loss of a step.

Forwards, every token turns into MASK with probability t; a model that sees both sides predicts what was there.
Backwards, from all MASK, each of T steps predicts every place and keeps the predictions it is surest of.

A `model` maps tokens int64 [B, L] to logits [B, L, V], of the tokens at their own places.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

__all__ = ["generate", "hide", "masked_loss", "trajectory"]

Model = Callable[[Tensor], Tensor]


def hide(candidates: Tensor, generator: Generator) -> Tensor:
    """Which of the candidates bool [B, L] are masked for a training step: of n of a row l, l uniform in 1..n."""
    count, rows = candidates.sum(1), len(candidates)
    draw = (torch.randperm(rows, generator=generator) + torch.rand(rows, generator=generator)) / rows  # even in 0..1
    return _order(candidates, generator) < (draw * count).long()[:, None] + 1


def masked_loss(model: Model, tokens: Tensor, hidden: Tensor, *, mask: int) -> Tensor:
    """Mean over rows of the mean cross-entropy of what is hidden, in nats.

    With `hide` that is in expectation LLaDA's loss, t uniform and the sum of cross-entropies over t n, a bound on the
    negative log-likelihood of a candidate, without the variance of small t.

    tokens: int64 [B, L]; hidden: bool [B, L], at least one in each row.
    """
    logits = model(tokens.masked_fill(hidden, mask))[hidden]
    count = hidden.sum(1)
    share = (1.0 / count).repeat_interleave(count)
    return (F.cross_entropy(logits.float(), tokens[hidden], reduction="none") * share).sum() / len(tokens)


@torch.no_grad()
def generate(model: Model, tokens: Tensor, *, mask: int, steps: int, prompt: int = 0, block_length: int = 0) -> Tensor:
    """Replace every MASK in `steps` forward passes: low-confidence remasking, always the likeliest token.

    Args:
        tokens: int64 [B, L], as many MASK in each row; what else is given stays.
        prompt, block_length: 0, or the length of the parts that the places from `prompt` on are generated in, one
            after the other (semi-autoregressive), each in an equal share of the steps.

    Returns:
        int64 [B, L] without MASK.

    Raises ValueError for rows with unequal numbers of MASK, or more parts than steps.
    """
    length, counts = tokens.shape[1], (tokens == mask).sum(1)
    if bool((counts != counts[0]).any()):
        raise ValueError(f"generate: got rows with {counts.tolist()} masked places; expected as many in each")
    size = block_length or length - prompt
    ends = [*range(prompt + size, length, size), length]
    if steps < len(ends):
        raise ValueError(f"generate: got {steps} steps for {len(ends)} parts; expected a step for each or more")
    tokens, rows = tokens.clone(), torch.arange(len(tokens), device=tokens.device)[:, None]
    for number, end in enumerate(ends):
        turns = (number + 1) * steps // len(ends) - number * steps // len(ends)
        for turn in range(turns):
            masked = tokens == mask
            masked[:, end:] = False
            left = int(masked.sum(1).max())
            chance, best = model(tokens).float().softmax(-1).max(-1)
            surest = chance.masked_fill(~masked, -1.0).topk(-(-left // (turns - turn)), 1).indices
            tokens[rows, surest] = torch.where(masked[rows, surest], best[rows, surest], tokens[rows, surest])
    return tokens


@torch.no_grad()
def trajectory(
    model: Model, tokens: Tensor, *, mask: int, steps: int, prompt: int, generator: Generator
) -> list[float]:
    """Mean cross-entropy of what is masked, in nats, in each of `steps` steps that unmask the true tokens.

    All behind the prompt is masked at first; each step unmasks an equal share, in a random order. The mean over the
    steps bounds the negative log-likelihood of a token as generation in so many steps sees it.

    tokens: int64 [B, L]; the order is drawn once for all rows by `generator`, so that several models see the same.
    """
    candidates = torch.zeros_like(tokens, dtype=torch.bool)
    candidates[:, prompt:] = True
    order, count, losses = _order(candidates.cpu(), generator).to(tokens.device), tokens.shape[1] - prompt, []
    for step in range(steps):
        hidden = candidates & (order >= step * count // steps)
        logits = model(tokens.masked_fill(hidden, mask))[hidden]
        losses.append(F.cross_entropy(logits.float(), tokens[hidden]).item())
    return losses


def _order(candidates: Tensor, generator: Generator) -> Tensor:
    """Place of each candidate in a random order of its row, from 0; other places come after them."""
    noise = torch.rand(candidates.shape, generator=generator).masked_fill(~candidates, 2.0)
    return noise.argsort(1).argsort(1)
