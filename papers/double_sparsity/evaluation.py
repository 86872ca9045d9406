"""What the claims read, beyond what a seed measures of quality: checks on generated attention, bytes, rankings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from common.attention.causal import CausalSite
from papers.double_sparsity import data, method
from papers.double_sparsity.method import Cache, Statistic
from papers.double_sparsity.settings import Params

__all__ = ["bytes_read", "found_channels", "quality", "recall", "released_is_last", "same_as_dense", "static"]

HEADLINE = 16  # 1/16 of the tokens and 1/16 of the channels
LLAMA_HEAD = 128
PLANTED = 4  # channels that matter in generated attention
DRAWS = 8  # of generated attention, eight heads each
Row = tuple[str, str, int, float]  # metric, variant, seed, value


def found_channels(statistic: Statistic) -> float:
    """Share of the planted channels that a ranking by the statistic finds, mean over draws; see `data.planted`."""
    found = []
    for draw in range(DRAWS):
        query, key, outliers = data.planted(draw, outliers=PLANTED)
        (scores,) = method.calibrate([[(query, key)]], statistic)
        found.append(method.overlap(method.top_channels(scores, PLANTED), outliers))
    return sum(found) / DRAWS


def recall(statistic: Statistic, *, ratio: int = HEADLINE) -> float:
    """Share of the exact best keys of the last query that labels of the planted attention's channels find too, mean
    over draws."""
    found = []
    for draw in range(DRAWS):
        query, key, _ = data.planted(draw, outliers=PLANTED)
        (scores,) = method.calibrate([[(query, key)]], statistic)
        length, size = key.shape[2:]
        asked, channels = query[:, :, -1:], method.top_channels(scores, size // ratio)
        labels = method.labels_of(asked, channels) @ method.labels_of(key, channels).mT
        best = [part.topk(length // ratio, dim=-1).indices[0, :, 0] for part in (labels, asked @ key.mT)]
        found.append(method.overlap(*best))
    return sum(found) / DRAWS


def released_is_last(seed: int) -> dict[str, float]:
    """How far a calibration over three texts is from that over the last of them alone, largest difference of a score:
    `described` averages over all texts, `released` keeps the last."""
    batches = [[data.planted(seed + i)[:2]] for i in range(3)]
    (last,) = method.calibrate(batches[-1:])
    found = {}
    for name in ("described", "released"):
        (scores,) = method.calibrate(batches, released=name == "released")
        found[name] = (scores - last).abs().max().item()
    return found


def same_as_dense(seed: int) -> dict[str, float]:
    """Largest differences of one decoding step: `all`, with every channel and token, from dense attention; `selector`,
    with few, from attention under the mask of `method.DoubleSparsity`, which quality is measured with."""
    query, key, _ = data.planted(seed, length=200)
    value = torch.randn(key.shape, generator=torch.Generator().manual_seed(seed))
    (scores,) = method.calibrate([[(query, key)]])
    last, found = query[:, :, -1:], {}
    every = method.top_channels(scores, key.shape[-1])
    full = method.decode(last, key, value, method.labels_of(key, every), every, key.shape[2])
    found["all"] = (full - method.decode_dense(last, key, value)).abs().max().item()
    few = method.top_channels(scores, key.shape[-1] // HEADLINE)
    step = method.decode(last, key, value, method.labels_of(key, few), few, -(-key.shape[2] // HEADLINE))
    chosen = method.DoubleSparsity(channels=[few], keep=1 / HEADLINE)
    length = key.shape[2]
    mask = chosen.plan(query, key, CausalSite(0, length - 1, 1.0))(length - 1, length)
    masked = torch.nn.functional.scaled_dot_product_attention(last, key, value, attn_mask=mask)
    found["selector"] = (step - masked).abs().max().item()
    return found


def bytes_read(length: int, *, ratio: int = HEADLINE) -> Iterator[tuple[str, float]]:
    """(what, dense bytes over sparse bytes) of a head of Llama's size: how much faster reading less can be at most."""
    cache, channels, tokens = Cache(length, LLAMA_HEAD), LLAMA_HEAD // ratio, length // ratio
    yield "16-bit labels", cache.dense() / cache.sparse(channels, tokens)
    yield "4-bit labels", cache.dense() / cache.sparse(channels, tokens, bits=4)
    yield "4-bit labels without scales", cache.dense() / cache.sparse(channels, tokens, bits=4, scales=False)


def static(rankings: Mapping[str, Sequence[Tensor]], ratio: int) -> dict[str, float]:
    """Overlap of the best D / ratio channels, by pair of calibration texts, mean over heads; and by chance."""
    size = rankings["text"][0].shape[-1]
    count = max(1, size // ratio)
    best = {kind: [method.top_channels(part, count) for part in scores] for kind, scores in rankings.items()}
    found = {"chance": count / size}
    for other in (kind for kind in best if kind != "text"):
        pairs = [method.overlap(a, b) for a, b in zip(best["text"], best[other], strict=True)]
        found[f"text/{other}"] = sum(pairs) / len(pairs)
    return found


def quality(params: Params, found: Mapping[int, dict[str, Any]]) -> Iterator[Row]:
    """Perplexity, skill by task and mean, what a decoding step read; by arm, ratio and seed."""
    for seed, parts in found.items():
        for (arm, ratio), value in parts["perplexity"].items():
            name = "dense" if arm == "dense" else f"{arm}/{ratio}"
            yield "perplexity", name, seed, value
            yield "density", name, seed, parts["density"][arm, ratio]
            by_task = parts["skill"][arm, ratio]
            for task, skill in by_task.items():
                yield "skill", f"{name}/{task}", seed, skill
            if by_task:
                yield "skill", f"{name}/mean", seed, sum(by_task.values()) / len(by_task)
