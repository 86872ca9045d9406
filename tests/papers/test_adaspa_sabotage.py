"""Every claim of AdaSpa can be turned by a one-line change of the method or the data.

What is exact is run as it is. Claims about attention are judged on planted heads, whose pattern is known, through the
functions that judge the trained model's. Claims that compare videos go through the same scoring with videos of a known
quality: an arm is a video with some noise, and the sabotage takes away what names it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
from torch import Tensor

from common import claims
from common import params as parameters
from common.paths import root
from common.testing import assert_sabotage_turns
from kernels import attention
from papers.adaspa import cost, data, evaluation, experiment, method, network, patterns, planted
from papers.adaspa.settings import Params

CLAIMS = {claim.id: claim for claim in claims.load(root() / "papers/adaspa/claims.yaml")}
SEEDS = (0, 1, 2)
GRID, TEXT = (8, 8, 8), 16
# Noise in each arm's videos; an order that suits the claims' honest side, no measurement.
NOISE = {
    "kernel": 1e-6, "adaspa": 0.02, "no_tiers": 0.03, "no_cache": 0.0205, "search_10": 0.025, "search_10_20_30": 0.021,
    "warmup_0": 0.08, "warmup_2": 0.06, "warmup_5": 0.04, "block_64": 0.04, "global_rule": 0.03, "no_sink": 0.05,
    "window": 0.06, "minference": 0.07, "svg": 0.05, "fixed": 0.03,
}  # fmt: skip

Metrics = dict[str, dict[str, dict[str, float]]]
Pair = Callable[[], tuple[Metrics, Metrics]]


def everywhere(metric: str, **variants: float) -> Metrics:
    return {metric: {name: {"all": value} for name, value in variants.items()}}


def seeded(values: Sequence[float]) -> dict[str, float]:
    return {str(seed): float(value) for seed, value in enumerate(values)}


@cache
def settings() -> Params:
    """The smoke profile, but with steps to look at as in the laptop's."""
    smoke = parameters.load(Params, "adaspa", "smoke")
    return dataclasses.replace(smoke, look_at=[3, 1, 8, 12], block_size=16, keep_ratio=0.2)


# ------------------------------------------------------------------------------------------------- run as they are


def differences(sabotaged: str | None = None) -> Metrics:
    """The exact checks; the sabotage changes one function of the method."""
    original = {name: getattr(method, name) for name in ("tile_weights", "select")}
    changed = {
        "tile_weights": lambda q, k, lse, block: original["tile_weights"](q, k, lse + 0.01, block),
        "select": lambda weights, keep, sink: original["select"](weights, keep - 0.05, sink),
    }
    with pytest.MonkeyPatch.context() as patch:
        if sabotaged:
            patch.setattr(method, sabotaged, changed[sabotaged])
        return everywhere("difference", **evaluation.exactness())


def shifted(errors: Callable[[float], float]) -> Metrics:
    return everywhere("changed_by_shift", **{"5": errors(5.0)})


def mean_keep(*, given_only: bool) -> Metrics:
    """The sabotage gives the poor heads more and takes nothing from the rich."""

    def tiers(recalls: Tensor, keep_ratio: float, **options: float) -> Tensor:
        return attention.select.head_tiers(recalls, keep_ratio, **options).clamp(min=keep_ratio)

    with pytest.MonkeyPatch.context() as patch:
        if given_only:
            patch.setattr(attention, "head_tiers", tiers)
        kinds = [evaluation.kinds_of_heads(settings(), seed) for seed in SEEDS]
    return {
        "planted_mean_keep": {"": seeded([sum(row["keep"] for row in found.values()) / len(found) for found in kinds])}
    }


def planted_heads(**strengths: tuple[float, float, float, float]) -> Metrics:
    """Heads of the kinds; the sabotage takes the pattern away."""
    big = dataclasses.replace(settings(), planted_grid=[8, 32, 32], timing_block=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planted, "_STRENGTH", planted._STRENGTH | strengths)
        found = [evaluation.kinds_of_heads(big, seed) for seed in SEEDS]
    return {
        f"planted_{name}": {kind: seeded([row[kind][name] for row in found]) for kind in planted.KINDS}
        for name in ("recall", "window")
    }


def densities(window: float) -> Metrics:
    """Random weights will do: the number of tiles does not depend on them."""
    params, rows = settings(), {}
    state = network.build(params).state_dict()
    for arm, keep in (("adaspa", params.keep_ratio), ("window", window)):
        changed = dataclasses.replace(params, keep_ratio=keep)
        rows[arm] = seeded([experiment.generate(changed, arm, seed, state)["density"] for seed in SEEDS[:2]])
    return {"density": rows}


def flops(blocks: int) -> Metrics:
    tokens, scale = 119_056, blocks / cost.HUNYUAN["blocks"]
    attended = cost.STEPS * cost.attention_flops(tokens) * scale / 1e15
    return everywhere("pflop", attention=attended, all=attended + cost.STEPS * cost.linear_flops(tokens) / 1e15)


# ------------------------------------------------------------------------------------------------- on planted heads


@cache
def look(kinds: tuple[str, ...], seed: int, wobble: float = 0.0) -> patterns.Look:
    """What `patterns.Tap` sees of planted heads, whose queries wobble from step to step."""
    heads = planted.planted(GRID, TEXT, head_dim=32, kinds=kinds, seed=seed, piece=16)
    draw = torch.Generator().manual_seed(seed + int(1000 * wobble))
    query = heads.query * (1 + wobble * torch.randn(heads.query.shape[:3], generator=draw)[..., None])
    first = attention.search(heads.query, heads.key, heads.value, block_size=16)
    now = attention.search(query, heads.key, heads.value, block_size=16)
    stale = attention.block_scores(query, heads.key, first.lse, block_size=16)
    return patterns.Look(now.scores[0], now.lse[0], stale[0])


def along(seed: int, *, kept: bool) -> dict[int, patterns.Look]:
    """A generation whose pattern is kept, or is another one after the search."""
    kinds = ("tiles", "diagonals")
    later = {step: look(kinds, seed if kept else seed + 10 * step, 0.02) for step in (8, 12)}
    return {1: look(kinds, seed), 3: look(kinds, seed)} | later


def spread(*, by_head: bool) -> Metrics:
    """Recall that differs between heads; the sabotage makes it differ between steps instead."""
    found = []
    for seed in SEEDS:
        steps = [("tiles", "diffuse")] * 2 if by_head else [("tiles", "tiles"), ("diffuse", "diffuse")]
        looks = {number: look(kinds, seed) for number, kinds in enumerate(steps)}
        found.append(evaluation.steadiness(settings(), looks))
    return {"recall": {name: seeded([row[name] for row in found]) for name in ("heads", "steps")}}


def keeping(*, kept: bool) -> Metrics:
    rows = []
    for seed in SEEDS:
        by_step = evaluation.stability(settings(), along(seed, kept=kept))
        rows.append(
            {name: sum(row[name] for row in by_step.values()) / len(by_step) for name in next(iter(by_step.values()))}
        )
    return {name: {"": seeded([row[name] for row in rows])} for name in ("retention", "agreement", "correlation")}


def stale_rows() -> Metrics:
    """The sabotage chooses by weights whose rows are off by errors of their own."""
    changed = [evaluation.noise_changes(1.0, tokens=512, seed=seed) for seed in SEEDS]
    return {"agreement": {"": seeded([1 - share for share in changed])}}


def transferred(*, elsewhere: bool) -> Metrics:
    """The sabotage lets every generation have the same pattern."""
    rows = {"this_one": [], "other_prompt": [], "other_noise": []}
    for seed in SEEDS:
        own = along(seed, kept=True)
        rows["this_one"].append(evaluation.transfer(settings(), own, own))
        for place, name in enumerate(("other_prompt", "other_noise")):
            other = along(seed + 100 * (place + 1), kept=True) if elsewhere else own
            rows[name].append(evaluation.transfer(settings(), own, other))
    return {"transfer": {name: seeded(values) for name, values in rows.items()}}


def in_families(kind: str, *, random_tiles: bool = False) -> Metrics:
    """Best patterns of a planted head; the sabotage plants columns or diagonals instead, or takes any tiles."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        if random_tiles:
            choose = patterns.choose
            patch.setattr(patterns, "choose", lambda scores, keep: choose(torch.rand_like(scores), keep))
        for seed in SEEDS:
            heads = planted.planted(GRID, 0, head_dim=32, kinds=(kind,), seed=seed, piece=16)
            torch.manual_seed(seed)
            found.append(evaluation.families([patterns.best_recalls(heads.query, heads.key, [0.1], [16])]))
    return {"family": {name: seeded([row[name] for row in found]) for name in found[0]}}


def in_sizes(first: int, second: int) -> Metrics:
    """Tiles of 16 against 64 where the pattern is pieces of 16; the sabotage names one for the other."""
    rows = {"tiles16/0.1": [], "tiles64/0.1": []}
    for seed in SEEDS:
        heads = planted.planted(GRID, 0, head_dim=32, kinds=("tiles",), seed=seed, piece=16)
        recalls = patterns.best_recalls(heads.query, heads.key, [0.1], [16, 64])
        for name, size in zip(rows, (first, second), strict=True):
            rows[name].append(recalls[f"tiles{size}/0.1"].item())
    return {"family": {name: seeded(values) for name, values in rows.items()}}


# ------------------------------------------------------------------------------------------------- at a known quality


@cache
def true_video(seed: int) -> tuple[Tensor, data.Caption]:
    return data.sprites(8, 32, 1, seed)


@cache
def scored(noise: float) -> list[dict[str, float]]:
    """By seed, of a video that differs from the dense one by so much."""
    rows = []
    for seed in SEEDS:
        video, words = true_video(seed)
        draw = torch.Generator().manual_seed(seed)
        made = video + noise * (1 + 0.01 * seed) * torch.randn(video.shape, generator=draw)
        rows.append(evaluation.arm_metrics(made[None], video[None], [words], same=False))
    return rows


def arms(**sabotaged: float) -> Metrics:
    values = {arm: [row["psnr"] for row in scored(noise)] for arm, noise in (NOISE | sabotaged).items()}
    return {"psnr": {arm: seeded(row) for arm, row in values.items()}}


def over(arm: str, other: str) -> Pair:
    """`arm` is claimed to be nearer than `other`; the sabotage makes it what it would be without its own part."""
    return lambda: (arms(), arms(**{arm: NOISE[other] + 0.01}))


def published(wanted: float, off: float) -> Metrics:
    return {"psnr": {"adaspa": seeded([wanted + off + 0.02 * seed for seed in SEEDS])}}


def flickers(amount: float) -> Metrics:
    """The sabotage lets the brightness of every other frame jump."""
    rows: dict[str, list[float]] = {"dense": [], "warmup_0": []}
    for seed in SEEDS:
        video, words = true_video(seed)
        jumping = video + amount * (torch.arange(video.shape[1]) % 2)[:, None, None]
        for arm, made in (("dense", video), ("warmup_0", jumping)):
            rows[arm].append(evaluation.arm_metrics(made[None], video[None], [words], same=True)["flicker"])
    return {"flicker": {arm: seeded(values) for arm, values in rows.items()}}


def following(*, moving: bool) -> Metrics:
    """The sabotage gives a video without its sprites."""
    rows: dict[str, list[float]] = {"dense": [], "adaspa": []}
    for seed in SEEDS:
        video, words = true_video(seed)
        other = video + 0.05 * torch.randn(video.shape, generator=torch.Generator().manual_seed(seed))
        for arm, made in (("dense", video), ("adaspa", other if moving else torch.full_like(video, -0.8))):
            rows[arm].append(evaluation.arm_metrics(made[None], video[None], [words], same=True)["follows"])
    return {"follows": {arm: seeded(values) for arm, values in rows.items()}}


# ------------------------------------------------------------------------------------------------- cost


def predicted(sparse: float, *, search: float = 1.5, scores: float = 0.5, grows: bool = True) -> Metrics:
    """A generation's speed from costs of one head, two rounds; the sabotage has a kernel that skips nothing, or a
    search that costs as much as it saves."""
    rows: dict[str, list[float]] = {}
    shares = []
    for number in range(2):
        costs = {"sparse": sparse * (1 + 0.01 * number), "search": search, "scores": scores}
        for tokens in (4096, 16_384, 119_056):
            share = cost.share(tokens if grows else 119_056 // tokens * 4096)
            rows.setdefault(str(tokens), []).append(cost.speedup(share, costs, (10, 30)))
        share = cost.share(119_056)
        rows.setdefault("uncached", []).append(cost.speedup(share, costs, (10, 30), cached=False))
        rows.setdefault("24s", []).append(cost.speedup(cost.share(357_000), costs | {"sparse": sparse / 2}, (1, 30)))
        shares.append(cost.search_share(share, costs, (10, 30)))
    return {"speedup": {name: seeded(row) for name, row in rows.items()}, "search_share": {"": seeded(shares)}}


def walls(dense: float, adaspa: float, no_cache: float) -> Metrics:
    """Seconds on the authors' scale; the sabotage has sparse attention that takes as long as dense."""
    spread_ = {"dense": dense, "adaspa": adaspa, "no_cache": no_cache}
    return {"wall": {arm: seeded([value * (1 + 0.001 * seed) for seed in SEEDS]) for arm, value in spread_.items()}}


SABOTAGE: dict[str, Pair] = {
    # exact
    "the-fused-search-is-exact": lambda: (differences(), differences("tile_weights")),
    "the-cached-search-is-exact": lambda: (differences(), differences("tile_weights")),
    "the-policy-is-the-method": lambda: (differences(), differences("select")),
    "a-common-shift-of-lse-changes-nothing": lambda: (
        shifted(evaluation.row_shift_changes),
        shifted(lambda amount: evaluation.noise_changes(amount, tokens=512)),
    ),
    "uneven-errors-of-lse-do": lambda: (
        everywhere("changed_by_noise", **{"0.3": evaluation.noise_changes(0.3)}),
        everywhere("changed_by_noise", **{"0.3": evaluation.noise_changes(0.0)}),
    ),
    "tiers-keep-the-mean": lambda: (mean_keep(given_only=False), mean_keep(given_only=True)),
    "equal-budgets": lambda: (densities(0.2), densities(0.4)),
    "planted-columns-are-found": lambda: (planted_heads(), planted_heads(columns=(0.0, 0.0, 0.0, 0.0))),
    "a-window-misses-planted-tiles": lambda: (planted_heads(), planted_heads(tiles=planted._STRENGTH["diagonals"])),
    "attention-dominates": lambda: (flops(60), flops(20)),
    "all-of-it": lambda: (flops(60), flops(20)),
    # planted
    "recall-differs-by-head-not-by-step": lambda: (spread(by_head=True), spread(by_head=False)),
    "lse-is-stable": lambda: (keeping(kept=True), keeping(kept=False)),
    "a-cached-lse-chooses-the-same": lambda: (keeping(kept=True), stale_rows()),
    "tiles-keep-over-steps": lambda: (keeping(kept=True), keeping(kept=False)),
    "tiles-do-not-serve-another-prompt": lambda: (transferred(elsewhere=True), transferred(elsewhere=False)),
    "tiles-do-not-serve-other-noise": lambda: (transferred(elsewhere=True), transferred(elsewhere=False)),
    "tiles-beat-columns": lambda: (in_families("tiles"), in_families("columns")),
    "tiles-beat-diagonals": lambda: (in_families("tiles"), in_families("tiles", random_tiles=True)),
    "tiles-beat-columns-and-diagonals": lambda: (in_families("tiles"), in_families("columns")),
    "larger-tiles-hold-less": lambda: (in_sizes(16, 64), in_sizes(64, 16)),
    # at a known quality
    "hunyuan-psnr": lambda: (published(29.07, 0.0), published(29.07, -2.0)),
    "hunyuan-over-svg": over("adaspa", "svg"),
    "hunyuan-over-minference": over("adaspa", "minference"),
    "hunyuan-tiers": over("adaspa", "no_tiers"),
    "over-svg": over("adaspa", "svg"),
    "over-minference": over("adaspa", "minference"),
    "over-a-window": over("adaspa", "window"),
    "over-an-offline-search": over("adaspa", "fixed"),
    "tiers-help": over("adaspa", "no_tiers"),
    "the-cache-costs-no-quality": over("adaspa", "no_cache"),
    "a-second-search-helps": over("adaspa", "search_10"),
    "more-searches-do-not": over("adaspa", "search_10_20_30"),
    "dense-steps-first-help": over("warmup_5", "warmup_0"),
    "without-them-it-flickers-no-more": lambda: (flickers(0.0), flickers(0.3)),
    "rows-beat-a-global-choice": over("adaspa", "global_rule"),
    "the-text-sink-helps": over("adaspa", "no_sink"),
    "small-tiles-are-better": over("adaspa", "block_64"),
    "captions-are-followed-alike": lambda: (following(moving=True), following(moving=False)),
    "far-above-the-floor": lambda: (arms(), arms(kernel=0.02)),
    # cost
    "hunyuan-speed": lambda: (walls(3213.76, 1810.23, 1877.13), walls(3213.76, 3213.76, 3213.76)),
    "hunyuan-cache-speed": lambda: (walls(3213.76, 1810.23, 1877.13), walls(3213.76, 1877.13, 1810.23)),
    "speed-at-the-papers-length": lambda: (predicted(0.2), predicted(1.0)),
    "the-cache-saves-time": lambda: (predicted(0.2), predicted(0.2, scores=1.5)),
    "searching-is-cheap": lambda: (predicted(0.2), predicted(0.2, search=6.0)),
    "longer-videos-gain-more": lambda: (predicted(0.2), predicted(0.2, grows=False)),
    "four-times-at-24-seconds": lambda: (predicted(0.2), predicted(1.0)),
}


def test_every_claim_has_a_sabotage():
    assert set(SABOTAGE) == set(CLAIMS)


@pytest.mark.parametrize("name", SABOTAGE)
def test_sabotage_turns_the_verdict(name):
    assert_sabotage_turns(CLAIMS[name], *SABOTAGE[name]())
