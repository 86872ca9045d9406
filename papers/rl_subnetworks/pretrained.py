"""Published models before and after a fine-tuning: how many weights differ."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.models.stable_diffusion import MissingWeights

__all__ = ["Pair", "compare"]


@dataclass(frozen=True)
class Pair:
    """sparsity by tolerance, rank of the update over the largest possible, and the sha256 of the later model."""

    sparsity: dict[float, float]
    rank: float
    sha256: str


def compare(before: str, after: str, tolerances: Sequence[float], *, device: str = "cpu") -> Pair:
    """Two models of transformers, by name or folder, in bfloat16, as the authors' script compares them.

    The rank is the mean over two matrices of the middle layer; more would take hours.

    Raises MissingWeights where one is neither here nor to be downloaded, and ValueError where they are not the same
    architecture; weights of the vocabulary are compared as far as both have them.
    """
    first, second = _weights(before), _weights(after)
    if set(first) != set(second):
        odd = sorted(set(first) ^ set(second))[:3]
        raise ValueError(f"{before} and {after} have other weights ({', '.join(odd)}, ...); expected one architecture")
    kept, total, content = dict.fromkeys(tolerances, 0), 0, hashlib.sha256()
    for name, weight in first.items():
        other = second[name]
        content.update(other.view(torch.int16).numpy().tobytes())
        rows = min(len(weight), len(other))  # a fine-tuning may have added tokens
        moved = (other[:rows].float() - weight[:rows].float()).abs()
        total += moved.numel()
        for tolerance in tolerances:
            kept[tolerance] += int((moved <= tolerance).sum())
    shares = {tolerance: count / total for tolerance, count in kept.items()}
    return Pair(shares, _rank(first, second, device), content.hexdigest())


def _rank(first: dict[str, Tensor], second: dict[str, Tensor], device: str) -> float:
    names = [name for name, weight in first.items() if weight.ndim == 2 and ".layers." in name]
    chosen = names[len(names) // 2 : len(names) // 2 + 2]
    shares = []
    for name in chosen:
        update = (second[name].float() - first[name].float()).to(device)
        shares.append(torch.linalg.matrix_rank(update).item() / min(update.shape))
    return sum(shares) / len(shares)


def _weights(name: str) -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM

    try:
        network = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    except (OSError, ValueError) as error:
        raise MissingWeights(
            f"{name} cannot be loaded ({str(error).splitlines()[0]}). Download it once on a machine with a connection, "
            "or name a folder that holds it in the layout of transformers."
        ) from error
    return {key: parameter.detach().contiguous() for key, parameter in network.named_parameters()}
