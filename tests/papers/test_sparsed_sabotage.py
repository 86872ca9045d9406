"""Every claim of SparseD can be turned by a one-line change of the method or the data.

What is exact is run as it is. Claims about answers and losses are run on models that are made by hand to need one far
place of the prompt for each answer, so that what a selection finds or misses decides; the sabotage selects the least
important tiles, or looks elsewhere in every step. Times and the published numbers go through the same scoring and
judging with values in their place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import claims, seeds
from common import params as parameters
from common.data import tasks
from common.paths import root
from common.testing import assert_sabotage_turns
from kernels import attention
from papers.sparsed import evaluation, experiment, method, models, timing
from papers.sparsed.method import RELEASED, Compat, SparseD
from papers.sparsed.settings import Params

CLAIMS = {claim.id: claim for claim in claims.load(root() / "papers/sparsed/claims.yaml")}
SEEDS = (0, 1, 2)
SELECT = SparseD.select
SYMBOLS, MASK, SHIFT = 12, 12, 160  # of the text that is repeated: generation is the start of the prompt again

Pair = Callable[[], tuple[dict, dict]]


def everywhere(metric: str, **variants: float) -> dict:
    return {metric: {name: {"all": value} for name, value in variants.items()}}


def plain(metric: str, value: float) -> dict:
    return {metric: {"": {"all": value}}}


def seeded(values: list[float]) -> dict[str, float]:
    return {str(seed): value for seed, value in enumerate(values)}


def patched(target: object, name: str, value: object, run: Callable[[], dict]) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, value)
        return run()


# ------------------------------------------------------------------------------------------------------ run as they are


class Half(SparseD):
    """Keeps half of what it is asked to keep."""

    def __post_init__(self):
        self.keep_ratio /= 2


@cache
def trained() -> dict[str, Tensor]:
    """A text model with sharp attention; it need know nothing."""
    torch.manual_seed(0)
    state = models.build(small(), "text").state_dict()
    return {name: 6 * value if name.endswith("query.weight") else value for name, value in state.items()}


def small() -> Params:
    base = parameters.load(Params, "sparsed", "smoke")
    return dataclasses.replace(base, length=256, generated=96, block_size=16, windows=2)


def full() -> dict:
    network = models.build(small(), "text", trained())
    return plain("full_difference", evaluation.full_difference(small(), network, experiment.text_batch(small(), 0)))


def found_by(compat: Compat) -> dict:
    loop = method.by_query_blocks
    there = partial(_loop, loop, compat)
    return patched(
        method, "by_query_blocks", there, lambda: plain("pattern_difference", evaluation.pattern_difference())
    )


def _loop(loop: Callable, switches: Compat, *args, **options):
    return loop(*args, **(options | {"compat": switches}))


def multiplied(compat: Compat) -> dict:
    loop = partial(_loop, method.by_query_blocks, compat)
    run = partial(evaluation.searched_passes, released=True)
    released = patched(method, "by_query_blocks", loop, lambda: {"value": run()})["value"]
    return everywhere("passes", released=released, search=evaluation.searched_passes(released=False))


def table(metric: str, compat: Callable = Compat) -> dict:
    """By switch, a value a seed; the sabotage makes switches that switch nothing."""

    def run() -> dict:
        rows = [evaluation.compat_table(small(), trained(), seed) for seed in SEEDS]
        return {metric: {name: seeded([row[name][metric[7:]] for row in rows]) for name in rows[0]}}

    return patched(evaluation, "Compat", compat, run)


def prompts_share(compat: Compat) -> dict:
    """Of made-up heads whose generated keys get little weight."""
    shares = {"paper": [], "prompt_against_all": []}
    for seed in SEEDS:
        query, key, value = evaluation.made_up(seed)
        scores = attention.search(query, key, value, block_size=32).scores
        scores[..., 11:] /= 100
        for name, switches in (("paper", Compat()), ("prompt_against_all", compat)):
            kept = method.select(scores, 11, 0.3, switches).dense()[..., :11]
            shares[name].append(kept.double().mean().item())
    return {"compat_prompt": {name: seeded(values) for name, values in shares.items()}}


def starving(*, isolated: bool) -> dict:
    shares = {"isolated": [], "together": []}
    for seed in SEEDS:
        query, key, value = evaluation.made_up(seed)
        scores = attention.search(query, key, value, block_size=32).scores
        scores[..., 11:] /= 100
        for name, apart in (("isolated", True), ("together", isolated)):
            way = SparseD(10, 352, 0.3, block_size=32, isolated=apart)
            shares[name].append(way.select(scores).dense()[..., 11:].double().mean().item() / 0.3)
    return {"generated_share": {name: seeded(values) for name, values in shares.items()}}


# ----------------------------------------------------------------------------------------------------- models by hand


class Lookup(nn.Module):
    """Answers `retrieve`: each token that stands behind a word looks for where else that word stands."""

    def forward(self, tokens: Tensor) -> Tensor:
        before = F.pad(tokens[:, :-1], (1, 0))
        code = F.one_hot(before, tasks.VOCABULARY).float()
        asks = ((before >= tasks.WORDS.start) & (before < tasks.WORDS.stop)).float()[..., None]
        held = F.one_hot(tokens, tasks.VOCABULARY).float()
        query, key, value = (part[:, None] for part in (200 * asks * code, code, held))
        found = F.scaled_dot_product_attention(query, key, value)[:, 0]
        found[..., tasks.MASK] = -1.0
        return found


class Echo(nn.Module):
    """Says what stands SHIFT places before; `restless`: in every pass it looks somewhere else."""

    def __init__(self, shift: int = SHIFT, *, restless: bool = False):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.code = F.normalize(torch.randn(512, 64, generator=draw), dim=-1)
        self.shift, self.restless, self.calls = shift, restless, 0

    def forward(self, tokens: Tensor) -> Tensor:
        place = torch.arange(tokens.shape[1])
        there = (place - self.shift - (37 * self.calls if self.restless else 0)) % tokens.shape[1]
        self.calls += 1
        held = F.one_hot(tokens, 64).float()
        query, key = (self.code[at].expand(len(tokens), -1, -1) for at in (there, place))
        found = F.scaled_dot_product_attention(*(x[:, None] for x in (150 * query, key, held)))[:, 0]
        return 8 * found[..., : SYMBOLS + 1]


def asked() -> Params:
    base = parameters.load(Params, "sparsed", "smoke")
    changes = {"tasks": ["retrieve"], "prompts": 8, "length": 256, "queries": 8, "gap": 6, "block_size": 16}
    return dataclasses.replace(base, generated=96, steps=10, windows=2, **changes)


def echoed(params: Params, seed: int) -> Tensor:
    draw = seeds.generator(seed, "echo")
    prompt = torch.randint(SYMBOLS, (params.windows, SHIFT), generator=draw)
    return torch.cat([prompt, prompt[:, : params.length - SHIFT]], 1)


def answered(*arms: tuple[str, float | None]) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "build", lambda *_: Lookup())
        rows = {
            arm if ratio is None else f"{arm}/{ratio:g}": [
                experiment.answer(asked(), None, arm, ratio, seed)["retrieve"]["token"] for seed in SEEDS
            ]
            for arm, ratio in arms
        }
    return {"accuracy": {name: seeded(values) for name, values in rows.items()}}


def read(*arms: str, network: Callable[[], nn.Module] = Echo) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        _reading(patch, network)
        rows = {
            arm: [experiment.text_losses(asked(), None, arm, None, seed)["losses"] for seed in SEEDS] for arm in arms
        }
    return {"text_loss": {name: seeded([sum(row) / len(row) for row in values]) for name, values in rows.items()}}


def looked(network: Callable[[], nn.Module]) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        _reading(patch, network)
        found = [experiment.observe(asked(), None, seed) for seed in SEEDS]
    return {
        "similar": {
            "mean": seeded([row["similar"].mean().item() for row in found]),
            "worst head": seeded([row["similar"].mean(0).min().item() for row in found]),
        },
        "held": {
            "own": seeded([row["best"].mean().item() for row in found]),
            "reused": seeded([row["held"].mean().item() for row in found]),
        },
    }


def _reading(patch: pytest.MonkeyPatch, network: Callable[[], nn.Module]) -> None:
    patch.setattr(models, "build", lambda *_: network())
    patch.setattr(models, "mask_of", lambda *_: MASK)
    patch.setattr(experiment, "text_batch", echoed)


def worst(when: Callable[[SparseD], bool] = lambda way: True) -> Callable:
    """A selection of the least important tiles, by the policies that `when` names."""

    def select(self: SparseD, scores: Tensor, weights: Tensor | None = None):
        if not when(self):
            return SELECT(self, scores, weights)
        return SELECT(self, -scores, None if weights is None else -weights)

    return select


@cache
def honest(run: Callable[[], dict]) -> dict:
    """Computed once, however many claims are judged by it."""
    return run()


def misled(run: Callable[[], dict], when: Callable[[SparseD], bool] = lambda way: True) -> dict:
    return patched(SparseD, "select", worst(when), run)


def rising(*, backwards: bool) -> dict:
    """Losses whose first steps are the fragile ones; the sabotage reads the steps from their end."""
    found = {"early": [], "late": []}
    for seed in SEEDS:
        dense, sparse = [1.0] * 10, [1.3 + 0.01 * seed, 1.2, *[1.05] * 6, 1.02, 1.01]
        early, late = evaluation.rises(dense, sparse[::-1] if backwards else sparse)
        found["early"].append(early)
        found["late"].append(late)
    return {"rise": {name: seeded(values) for name, values in found.items()}}


# ---------------------------------------------------------------------------------- times and the published numbers

TIMES = {"dense": 1.0, "search": 1.15, "select": 0.02, "sparse": 0.4, "released": 8.0}  # no measurement


def timed(**changes: float) -> dict:
    rows = [{name: value * (1 + 0.01 * seed) for name, value in (TIMES | changes).items()} for seed in range(5)]
    gains = {
        name: [timing.generation_speedup(row, 128, 0.2, released=released) for row in rows]
        for name, released in (("search", False), ("released", True))
    }
    return {
        "longest_seconds": {name: seeded([row[name] for row in rows]) for name in TIMES},
        "longest_speedup": {name: seeded(values) for name, values in gains.items()},
    }


def gained(place: str, value: float) -> dict:
    return {"speedup": {f"released/{place}": seeded([value * (1 + 0.01 * (seed - 2)) for seed in range(5)])}}


def published(arm: str, value: float) -> dict:
    return {"accuracy": {arm: seeded([value + 0.1 * (seed - 1) for seed in SEEDS])}}


def both(name: str, pair: Pair) -> dict[str, Pair]:
    """A claim at full scale and its stand-in."""
    pair = cache(pair)
    return {name: pair, f"{name}-small": pair}


def scored(name: str, arm: str, value: float) -> dict[str, Pair]:
    """The sabotage asks for one text more than the answer has, in a tenth of the prompts."""
    return {f"llada-ruler-4k-{name}": lambda: (published(arm, value), published(arm, value * 0.95))}


def half_at_least(size: int, keep_ratio: float, *, one_more: bool = False) -> int:
    return max(1, size // 2)


def _all(blocks: int, **_: float) -> Tensor:
    return torch.ones(blocks, blocks, dtype=torch.bool)


def _nothing(**_: bool) -> Compat:
    return Compat()


ASKED = partial(answered, ("dense", None), ("sparsed", None), ("sparsed", 0.5))
AGAINST = partial(answered, ("sparsed", None), ("window", None), ("streaming", None))
PARTS = partial(answered, ("sparsed", None), ("no_skip", None), ("no_reuse", None), ("no_isolation", None))
RATIOS = partial(answered, ("sparsed", 0.5), ("sparsed", 0.2), ("sparsed", 0.05))
READ = partial(read, "dense", "sparsed")
RESTLESS = partial(Echo, restless=True)
STREAMED = partial(read, "streaming", "sparsed")
STILL, MOVED = partial(looked, Echo), partial(looked, RESTLESS)
TABLE = {name: (partial(table, name), partial(table, name, _nothing)) for name in ("compat_density", "compat_changed")}

SABOTAGE: dict[str, Pair] = {
    # exact
    "rho-one-is-dense": lambda: (full(), patched(evaluation, "SparseD", Half, full)),
    "both-parts-get-their-share": lambda: (
        plain("miscount", evaluation.miscount()),
        plain("miscount", evaluation.miscount(isolated=False)),
    ),
    "the-search-finds-the-released-pattern": lambda: (found_by(RELEASED), found_by(Compat())),
    "one-product-instead-of-more-than-two": lambda: (multiplied(RELEASED), multiplied(Compat())),
    "llada-searches-with-logits-twice-too-large": lambda: (
        plain("logit_factor", evaluation.logit_factor()),
        plain("logit_factor", evaluation.logit_factor(Compat())),
    ),
    "released-stays-dense-two-steps-longer": lambda: (
        plain("extra_steps", evaluation.extra_steps(128, 0.2)),
        plain("extra_steps", evaluation.extra_steps(128, 0.2, Compat())),
    ),
    "released-keeps-more-than-rho": lambda: (honest(TABLE["compat_density"][0]), honest(TABLE["compat_density"][1])),
    "released-scale-changes-the-pattern": lambda: (
        honest(TABLE["compat_changed"][0]),
        honest(TABLE["compat_changed"][1]),
    ),
    "own-softmax-changes-the-pattern": lambda: (honest(TABLE["compat_changed"][0]), honest(TABLE["compat_changed"][1])),
    "released-prompt-gets-more": lambda: (prompts_share(Compat(prompt_against_all=True)), prompts_share(Compat())),
    "generated-blocks-would-starve": lambda: (starving(isolated=False), starving(isolated=True)),
    # models by hand
    **both("lossless", lambda: (honest(ASKED), misled(ASKED))),
    "lossless-at-half": lambda: (honest(ASKED), misled(ASKED)),
    **both("beats-streaming", lambda: (honest(AGAINST), misled(AGAINST))),
    **both("beats-window", lambda: (honest(AGAINST), misled(AGAINST))),
    **both("skip-helps", lambda: (honest(PARTS), misled(PARTS))),
    **both("reuse-is-free", lambda: (honest(PARTS), misled(PARTS, lambda way: not way.reuse))),
    **both("isolation-helps", lambda: (honest(PARTS), misled(PARTS, lambda way: not way.isolated))),
    **both("saturates", lambda: (honest(RATIOS), misled(RATIOS, lambda way: way.keep_ratio < 0.3))),
    **both("collapses", lambda: (honest(RATIOS), patched(method, "blocks_kept", half_at_least, RATIOS))),
    **both("patterns-stay", lambda: (honest(STILL), honest(MOVED))),
    **both("rare-heads-change", lambda: (honest(STILL), honest(MOVED))),
    "reuse-keeps-the-weight": lambda: (honest(STILL), honest(MOVED)),
    **both("early-steps-are-fragile", lambda: (rising(backwards=False), rising(backwards=True))),
    "text-loses-little": lambda: (honest(READ), misled(READ)),
    "text-beats-streaming": lambda: (
        honest(STREAMED),
        patched(experiment, "sink_and_window", _all, partial(misled, STREAMED)),
    ),
    "text-isolation-helps": lambda: (
        misled(partial(read, "no_isolation", "sparsed"), lambda way: not way.isolated),
        misled(partial(read, "no_isolation", "sparsed")),
    ),
    # times
    "the-search-is-quicker-than-the-loop": lambda: (timed(), timed(search=10.0)),
    "a-released-build-costs-dense-steps": lambda: (timed(), timed(released=0.5)),
    "sparse-attention-is-quicker": lambda: (timed(), timed(sparse=1.2)),
    "the-search-serves-short-generations": lambda: (timed(), timed(search=10.0)),
    "attention-gains-at-64k-in-128-steps": lambda: (gained("65536/128", 1.25), gained("65536/128", 1.0)),
    "attention-gains-at-64k-in-1024-steps": lambda: (gained("65536/1024", 1.48), gained("65536/1024", 1.0)),
    "no-gain-at-4k": lambda: (gained("4096/128", 0.92), gained("4096/128", 1.2)),
    # the published numbers
    **scored("dense", "dense", 90.45),
    **scored("sparsed", "sparsed", 90.89),
    **scored("no-skip", "no_skip", 87.91),
    **scored("no-reuse", "no_reuse", 90.82),
    **scored("no-isolation", "no_isolation", 90.53),
}


def test_every_claim_has_a_sabotage():
    assert set(SABOTAGE) == set(CLAIMS)


@pytest.mark.parametrize("name", SABOTAGE)
def test_sabotage_turns_the_verdict(name):
    assert_sabotage_turns(CLAIMS[name], *SABOTAGE[name]())
