"""Does reinforcement learning change few weights? (Mukherjee et al., NeurIPS 2025, arXiv 2505.11711; against it,
RL's Razor, Shenfeld et al., arXiv 2509.04259)

A model theta0 is fine-tuned to theta1. The update's sparsity is the share of weights that stay:

    sparsity = 1 - |{i : |theta1_i - theta0_i| > tolerance}| / n                                 `sparsity`

The paper finds 70 to 95 % after RL and about 10 % after supervised fine-tuning, with weights in bfloat16 and a
tolerance of 1e-5, and takes it for a property of RL. Its critics say that bfloat16 makes it: the format has 8 bits of
precision, so a weight w only changes when it moves by about |w| / 256, and RL's small steps do not get there; in
float32 nearly all weights move. So here weights are kept in three ways [`Weights`], and everything is measured in each:

    float32    as trained
    bfloat16   rounded after every step: what a step does not carry over the next number is lost
    master     a float32 copy is trained, its rounded values are used and compared: small steps add up

RL is GRPO: several answers to each prompt, rewarded by a verifier; the advantage of an answer is its reward among those
to its prompt, and a step raises the probability of answers above the mean [`advantages`, `policy_loss`].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "State",
    "Weights",
    "advantages",
    "changed",
    "density",
    "log_probabilities",
    "overlap",
    "policy_loss",
    "rank_share",
    "rounded",
    "shuffled",
    "smallest",
    "sparsity",
]

State = Mapping[str, Tensor]
Precision = Literal["float32", "bfloat16", "master"]


# ------------------------------------------------------------------------------------------------------------- updates


def rounded(x: Tensor) -> Tensor:
    """To the nearest bfloat16, as float32."""
    return x.bfloat16().float()


def changed(before: State, after: State, tolerance: float = 0.0) -> dict[str, Tensor]:
    """Which weights differ by more than `tolerance`, bool of their shapes.

    Raises ValueError for states of different names.
    """
    if set(before) != set(after):
        odd = sorted(set(before) ^ set(after))[:3]
        raise ValueError(
            f"changed: got states of different names ({', '.join(odd)}, ...); expected the same model twice"
        )
    return {name: (after[name] - before[name]).abs() > tolerance for name in before}


def sparsity(marked: State) -> float:
    """Share of weights that are not marked as changed, over all tensors, 0..1."""
    return 1 - sum(int(part.sum()) for part in marked.values()) / sum(part.numel() for part in marked.values())


def density(before: State, after: State) -> float:
    """|update|_1^2 / (n |update|_2^2), 0..1: the share of weights that carry the update, whatever its size.

    1 where all move equally far, 2/pi where moves are normal, k/n where k move equally and the rest do not. Unlike
    `sparsity` it has no tolerance, and does not change when the update is scaled.
    """
    update = torch.cat([(after[name] - before[name]).flatten() for name in before]).double()
    energy = update.square().sum()
    return 0.0 if energy == 0 else (update.abs().sum().square() / (update.numel() * energy)).item()


def rank_share(before: State, after: State) -> float:
    """Rank of the update over the largest possible, mean over all matrices whose weights changed at all."""
    shares = []
    for name, weight in before.items():
        update = after[name] - weight  # in float32: its last digits are noise, which more precision would count
        if update.ndim == 2 and update.any():
            shares.append(torch.linalg.matrix_rank(update).item() / min(update.shape))
    return sum(shares) / len(shares) if shares else 0.0


def overlap(first: State, second: State) -> float:
    """Share of what `first` marks that `second` marks too; by chance it is the share of all that `second` marks."""
    both = sum(int((first[name] & second[name]).sum()) for name in first)
    return both / max(1, sum(int(part.sum()) for part in first.values()))


def shuffled(values: State, generator: torch.Generator) -> dict[str, Tensor]:
    """Every tensor's entries in a random order."""
    order = {name: torch.randperm(part.numel(), generator=generator) for name, part in values.items()}
    return {name: part.flatten()[order[name]].view_as(part) for name, part in values.items()}


def smallest(values: State, marked: State) -> dict[str, Tensor]:
    """As many weights of each tensor as are marked, those of the least magnitude.

    Small numbers have closer neighbours in bfloat16, so they change more easily, whatever moves them. Where changed
    weights are mostly these, two trainings overlap without a subnetwork that the task has chosen.
    """
    found = {}
    for name, weight in values.items():
        order = weight.abs().flatten().argsort(stable=True)
        chosen = torch.zeros(weight.numel(), dtype=torch.bool)
        chosen[order[: int(marked[name].sum())]] = True
        found[name] = chosen.view_as(weight)
    return found


# ------------------------------------------------------------------------------------------------------------- weights


class Weights:
    """The weights of a network in training, kept in float32 or bfloat16; only those in `mask` are trained.

    precision    see above; in every one the network computes with float32 numbers, rounded ones but for `float32`
    mask         bool by name of parameter, True where trained; None: all

    `trained` are the parameters for an optimizer. After `backward`, `collect` gives them their gradients, and after the
    optimizer's step `store` puts them into the network.
    """

    def __init__(self, network: nn.Module, precision: Precision, mask: State | None = None):
        self._network = dict(network.named_parameters())
        self._mask, self._rounds, self._keeps = mask, precision != "float32", precision == "master"
        self.trained = [nn.Parameter(parameter.detach().clone()) for parameter in self._network.values()]
        self.store()

    def collect(self) -> None:
        for (name, parameter), own in zip(self._network.items(), self.trained, strict=True):
            own.grad = (
                parameter.grad if self._mask is None or parameter.grad is None else parameter.grad * self._mask[name]
            )
            parameter.grad = None

    @torch.no_grad()
    def store(self) -> None:
        for parameter, own in zip(self._network.values(), self.trained, strict=True):
            parameter.copy_(rounded(own) if self._rounds else own)
            if self._rounds and not self._keeps:
                own.copy_(parameter)


# ------------------------------------------------------------------------------------------------------------ learning


def log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of the given tokens [B, T] under logits [B, T, V]: [B, T]."""
    return F.log_softmax(logits, dim=-1).gather(-1, tokens[..., None]).squeeze(-1)


def advantages(rewards: Tensor) -> Tensor:
    """Rewards of a group of answers to each prompt [P, G], less their mean, over their deviation: [P, G].

    A group of equal rewards says nothing: 0.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (rewards.std(dim=1, keepdim=True, correction=0) + 1e-6)


def policy_loss(
    new: Tensor, old: Tensor, advantage: Tensor, *, clip: float | None, reference: Tensor | None = None, kl: float = 0.0
) -> Tensor:
    """GRPO's loss: log-probabilities of the answers' tokens [B, T] now and when they were drawn, advantage [B].

    -min(r A, clip(r, 1 - clip, 1 + clip) A) with r = exp(new - old), without the clipping for None; plus kl times the
    estimate exp(reference - new) - (reference - new) - 1 of the divergence from a reference model.
    """
    ratio, gain = (new - old).exp(), advantage[:, None]
    value = ratio * gain
    if clip is not None:
        value = torch.minimum(value, ratio.clamp(1 - clip, 1 + clip) * gain)
    loss = -value.mean()
    if reference is not None:
        apart = reference - new
        loss = loss + kl * (apart.exp() - apart - 1).mean()
    return loss
