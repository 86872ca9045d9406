"""Sorting, a task that a verifier can reward: `d d d d d d | s s s s s s`, the digits and then the digits in order.

Answers can be written in two alphabets. The base model has nearly always seen the first one, so demonstrations in the
second are right and yet far from what it would say: off its policy.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from papers.rl_subnetworks.method import log_probabilities

__all__ = ["VOCABULARY", "demonstrations", "prompts", "rewards", "sample"]

DIGITS = 10
BAR = 2 * DIGITS  # digits in the first alphabet are 0..9, in the second 10..19
VOCABULARY = BAR + 1
# Of what the base model learns from: the share in the second alphabet, and of answers that are any digits
RARE, CARELESS = 0.05, 0.5


def prompts(count: int, digits: int, generator: Generator) -> Tensor:
    """Digits and a bar, int64 [count, digits + 1]."""
    drawn = torch.randint(DIGITS, (count, digits), generator=generator)
    return torch.cat([drawn, torch.full((count, 1), BAR)], dim=1)


def demonstrations(asked: Tensor, rare: Tensor | float) -> Tensor:
    """The right answers to prompts [B, n + 1]: [B, n], in the second alphabet where `rare` [B, 1] is 1."""
    return asked[:, :-1].sort(dim=1).values + (DIGITS * torch.as_tensor(rare)).long()


def written(asked: Tensor, generator: Generator) -> Tensor:
    """Answers as the base model's text has them [B, n]: some in the second alphabet, many careless."""
    rare, careless = (torch.rand(len(asked), 1, generator=generator) < share for share in (RARE, CARELESS))
    any_digits = torch.randint(DIGITS, (len(asked), asked.shape[1] - 1), generator=generator)
    return torch.where(careless, any_digits + DIGITS * rare, demonstrations(asked, rare))


def rewards(asked: Tensor, answers: Tensor) -> Tensor:
    """1 where an answer [B, n] is right, in either alphabet, else 0: [B]."""
    right = asked[:, :-1].sort(dim=1).values == answers % DIGITS
    return (right & (answers < BAR)).all(dim=1).float()


@torch.no_grad()
def sample(network: nn.Module, asked: Tensor, generator: Generator) -> Tensor:
    """Answers [B, n] drawn from the model, token by token."""
    tokens = asked
    for _ in range(asked.shape[1] - 1):
        shares = network(tokens)[:, -1].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(shares, 1, generator=generator)], dim=1)
    return tokens[:, asked.shape[1] :]


def answer_log_probabilities(network: nn.Module, asked: Tensor, answers: Tensor) -> Tensor:
    """Of the tokens of answers [B, n] to prompts [B, n + 1] under the model: [B, n]."""
    logits = network(torch.cat([asked, answers[:, :-1]], dim=1))[:, asked.shape[1] - 1 :]
    return log_probabilities(logits, answers)
