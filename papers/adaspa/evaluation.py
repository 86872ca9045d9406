"""From what was computed to the numbers that claims are judged by; every value is of one seed or of none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from common import seeds
from common.attention import AdaSpa, Meter, Site
from kernels import attention
from papers.adaspa import cost, data, method, patterns, planted, quality
from papers.adaspa.settings import Params

__all__ = [
    "arm_metrics", "costs_at", "exactness", "families", "kinds_of_heads", "noise_changes", "row_shift_changes",
    "stability", "steadiness", "transfer",
]  # fmt: skip


def steadiness(params: Params, looks: Mapping[int, patterns.Look]) -> dict[str, float]:
    """Recall of the best tiles at the keep ratio: its spread over heads (of their means) and over steps."""
    table = torch.stack(
        [patterns.held(patterns.choose(look.scores, params.keep_ratio), look.scores) for look in looks.values()]
    )  # [steps, heads]
    return {
        "mean": table.mean().item(),
        "heads": table.mean(0).std(correction=0).item(),
        "steps": table.std(0, correction=0).mean().item(),
    }


def stability(params: Params, looks: Mapping[int, patterns.Look]) -> dict[int, dict[str, float]]:
    """By step after the search: what became of the LSE and of the choice of tiles, means over heads.

    correlation, within   of the LSE, see `patterns.lse_drift`
    retention             weight in the tiles of the search over that in the best tiles of this step
    agreement             share of tiles that a search with the cached LSE has in common with a fresh one
    """
    first = params.look_at[0]
    before = looks[first]
    chosen = patterns.choose(before.scores, params.keep_ratio)
    found = {}
    for step, look in looks.items():
        if step <= first:
            continue
        best, stale = (patterns.choose(scores, params.keep_ratio) for scores in (look.scores, look.stale))
        drift = patterns.lse_drift(before.lse, look.lse, params.block_size)
        found[step] = {name: value.mean().item() for name, value in drift.items()} | {
            "retention": (patterns.held(chosen, look.scores) / patterns.held(best, look.scores)).mean().item(),
            "agreement": patterns.agreement(stale, best).mean().item(),
        }
    return found


def transfer(params: Params, own: Mapping[int, patterns.Look], other: Mapping[int, patterns.Look]) -> float:
    """Weight that tiles searched in another generation hold in this one's later steps, over that of its best tiles."""
    first = params.look_at[0]
    chosen = patterns.choose(other[first].scores, params.keep_ratio)
    later = [look for step, look in own.items() if step > first]
    kept = [
        patterns.held(chosen, look.scores) / patterns.held(patterns.choose(look.scores, params.keep_ratio), look.scores)
        for look in later
    ]
    return torch.stack(kept).mean().item()


def families(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Mean recall over heads and steps of each family at each density."""
    return {name: torch.stack([row[name] for row in rows]).mean().item() for name in rows[0]}


def arm_metrics(videos: Tensor, dense: Tensor, prompts: Sequence[data.Caption], *, same: bool) -> dict[str, float]:
    """Fidelity to the dense videos [P, 3, F, S, S] (not for the dense ones themselves), flicker, and the share of
    sprites that follow their caption; means over the prompts."""
    found = {"flicker": _mean([quality.flicker(video) for video in videos])}
    if not same:
        pairs = [quality.fidelity(video, other) for video, other in zip(videos, dense, strict=True)]
        found |= {name: _mean([pair[name] for pair in pairs]) for name in ("psnr", "ssim")}
    followed = [x for video, words in zip(videos, prompts, strict=True) for x in quality.follows(video, words)]
    if followed:
        found["follows"] = _mean(followed)
    return found


# ---- exact checks


def exactness(*, length: int = 200, block: int = 16, seed: int = 0) -> dict[str, float]:
    """Differences between the kernels and `method.py` on random heads with text at their end.

    search   tile weights of the fused search, which takes one pass, against two passes: largest difference over the
             largest weight
    cached   the same under the LSE of earlier queries
    policy   largest difference of outputs of `common.attention.AdaSpa` over steps that drift, against `method.attend`
    """
    steps, draw = (2, 4), seeds.generator(seed, "exactness")
    start = 2 * torch.randn(3, 1, 4, length, 32, generator=draw)
    moments = [start + 0.2 * step * torch.randn(start.shape, generator=draw) for step in range(6)]
    query, key, value = moments[0]
    later = moments[1][0]
    _, lse = method.dense_attention(query, key, value)
    fused = attention.search(query, key, value, block_size=block).scores
    cached = attention.block_scores(later, key, lse, block_size=block)
    text = range(length - 20, length)
    policy, memory, worst = AdaSpa(keep_ratio=0.3, search_steps=steps, block_size=block), method.Memory(), 0.0
    meter = Meter()
    for step, (q, k, v) in enumerate(moments, start=1):
        site = Site("layer", step, "0", text)
        meter.enter(site, 1)
        ours = policy.attend(q, k, v, site, meter)
        told = method.attend(memory, step, q, k, v, search_steps=steps, keep_ratio=0.3, block=block, text=text)
        worst = max(worst, (ours - told).abs().max().item())
    return {
        "search": _relative(fused, method.tile_weights(query, key, lse, block)),
        "cached": _relative(cached, method.tile_weights(later, key, lse, block)),
        "policy": worst,
    }


def row_shift_changes(shift: float, *, seed: int = 0) -> float:
    """Share of tiles chosen otherwise when every row's cached LSE is off by the same amount: none should be."""
    query, key, value = torch.randn(3, 1, 2, 256, 32, generator=seeds.generator(seed, "shift"))
    found = attention.search(query, key, value, block_size=16)
    stale = attention.block_scores(query, key, found.lse + shift, block_size=16)
    return _changed(stale, found.scores)


def noise_changes(deviation: float, *, tokens: int = 4096, seed: int = 0) -> float:
    """The same for errors that differ from row to row, normal with this deviation, on attention without structure."""
    draw = seeds.generator(seed, "noise")
    query, key, value = torch.randn(3, 1, 1, tokens, 64, generator=draw)
    found = attention.search(query, key, value, block_size=64)
    error = deviation * torch.randn(found.lse.shape, generator=draw)
    return _changed(attention.block_scores(query, key, found.lse + error, block_size=64), found.scores)


def _relative(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).abs().max() / exact.max()).item()


def _changed(scores: Tensor, exact: Tensor, keep_ratio: float = 0.2) -> float:
    chosen, wanted = (attention.select_blocks(x, keep_ratio).dense()[0] for x in (scores, exact))
    return 1 - patterns.agreement(wanted, chosen).mean().item()


# ---- planted heads


def kinds_of_heads(params: Params, seed: int) -> dict[str, dict[str, float]]:
    """By kind of planted head: `recall` of the best tiles at the keep ratio, what head tiers let it `keep`, and the
    recall of `window` tiles, as many."""
    heads = planted.planted(tuple(params.planted_grid), params.planted_text, head_dim=64, seed=seed)
    block = params.timing_block
    found = attention.search(heads.query, heads.key, heads.value, block_size=block)
    mask = attention.select_blocks(found.scores, params.keep_ratio)
    recalls = attention.recall(found.scores, mask)
    keep = attention.head_tiers(recalls, params.keep_ratio)
    place = torch.arange(mask.shape[-1])
    near = -(place[:, None] - place).abs().float()
    window = attention.recall(found.scores, attention.select_blocks(near.expand(found.scores.shape), params.keep_ratio))
    return {
        kind: {"recall": recalls[0, i].item(), "keep": keep[0, i].item(), "window": window[0, i].item()}
        for i, kind in enumerate(planted.KINDS)
    }


# ---- cost


def costs_at(measured: Mapping[str, Any], keep: float) -> list[dict[str, float]]:
    """For each round of what `cost.measure` gave, `sparse`, `search` and `scores` in units of a dense attention."""
    return [
        {"sparse": row[f"sparse/{keep:g}"], "search": row["search"], "scores": row["scores"]}
        for row in cost.ratios(measured["seconds"])
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
