"""Queries and keys of any length whose attention is known: the heads of a video model without the model.

    logit(i, j) = time(i, j) + place(i, j) + topic(i, j) + sink(j) + noise

time and place fall with the distance of frames, rows and columns (random Fourier features of a Gaussian kernel); a
topic ties pieces of the video to random other pieces; a sink draws all queries to a few tokens, the text among them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from common import seeds

__all__ = ["KINDS", "Heads", "planted"]

KINDS = ("columns", "diagonals", "tiles", "diffuse")
_STRENGTH = {  # of time, place, topic, sink
    "columns": (0.0, 0.0, 0.0, 9.0),
    "diagonals": (5.0, 7.0, 0.0, 2.0),
    "tiles": (0.0, 0.0, 11.0, 2.0),
    "diffuse": (0.5, 0.5, 0.0, 0.5),
}  # logits; a softmax over L keys needs about log L to single one out


@dataclass(frozen=True)
class Heads:
    """query, key, value [1, H, L, D] of one step; text: places of the text, at the end."""

    query: Tensor
    key: Tensor
    value: Tensor
    text: range


def planted(
    grid: tuple[int, int, int],
    text: int,
    *,
    head_dim: int,
    kinds: tuple[str, ...] = KINDS,
    seed: int,
    noise: float = 1.0,
    piece: int = 512,
) -> Heads:
    """Heads of these kinds over frames x rows x columns video tokens and `text` tokens behind them.

    Args:
        head_dim: at least 32, in multiples of 8.
        noise: standard deviation of the noise's logits.
        piece: tokens of one topic.

    Raises ValueError for a kind that is unknown or a head_dim that does not fit.
    """
    unknown = set(kinds) - set(KINDS)
    if unknown or head_dim < 32 or head_dim % 8:
        raise ValueError(
            f"planted: got kinds {kinds} and head_dim {head_dim}; expected kinds among {', '.join(KINDS)} and a head "
            "dim of at least 32 in multiples of 8"
        )
    video = math.prod(grid)
    length = video + text
    draw = seeds.generator(seed, "planted")
    queries, keys = [], []
    for kind in kinds:
        time, place, topic, sink = (math.sqrt(strength) for strength in _STRENGTH[kind])
        quarter = head_dim // 4
        near = _near(grid, length, quarter, (time, place), draw)
        to, of = _topics(length, video, quarter, piece, topic, draw)
        draws = _sinks(length, video, draw) * sink
        constant = torch.full((length, 1), sink)
        rest = head_dim - 2 * quarter - 1
        spread = math.sqrt(noise) / rest**0.25
        q, k = (torch.randn(length, rest, generator=draw) * spread for _ in range(2))
        queries.append(torch.cat([near, to, constant, q], -1))
        keys.append(torch.cat([near, of, draws[:, None], k], -1))
    value = torch.randn(1, len(kinds), length, head_dim, generator=draw)
    scale = head_dim**0.25  # attention divides by its square
    return Heads(torch.stack(queries)[None] * scale, torch.stack(keys)[None] * scale, value, range(video, length))


def _near(
    grid: tuple[int, int, int], length: int, width: int, strengths: tuple[float, float], draw: torch.Generator
) -> Tensor:
    """[L, width] whose products fall with distance: cos and sin of random frequencies, half time and half place."""
    frames, rows, columns = grid
    at = torch.stack(
        torch.meshgrid(torch.arange(frames), torch.arange(rows), torch.arange(columns), indexing="ij"), -1
    ).flatten(0, 2)
    found = torch.zeros(length, width)
    half = width // 2
    for part, (axes, strength, reach) in enumerate(
        zip(((0,), (1, 2)), strengths, (max(1.0, frames / 8), max(1.0, rows / 8)), strict=True)
    ):
        frequencies = torch.randn(len(axes), half // 2, generator=draw) / reach
        phase = at[:, list(axes)].float() @ frequencies
        features = torch.cat([phase.cos(), phase.sin()], -1) * strength / math.sqrt(half // 2)
        found[: len(at), part * half : part * half + features.shape[1]] = features
    return found


def _topics(
    length: int,
    video: int,
    width: int,
    piece: int,
    strength: float,
    draw: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Queries and keys [L, width]: each piece of the video looks for the topic of another, drawn at random."""
    count = -(-video // piece)
    topics = torch.nn.functional.normalize(torch.randn(count, width, generator=draw), dim=-1)
    other = torch.randperm(count, generator=draw)
    of = torch.arange(video) // piece
    query, key = torch.zeros(length, width), torch.zeros(length, width)
    query[:video], key[:video] = topics[other[of]] * strength, topics[of] * strength
    return query, key


def _sinks(length: int, video: int, draw: torch.Generator) -> Tensor:
    """[L]: 1 for the text and for one video token in a thousand, 0 for the others."""
    found = (torch.rand(length, generator=draw) < 1e-3).float()
    found[video:] = 1.0
    return found
