"""What can be checked of SparseD exactly, and what the released code's departures change."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common import seeds
from common.attention import language_attention
from kernels import attention
from papers.sparsed import experiment, method, models
from papers.sparsed.experiment import State
from papers.sparsed.method import RELEASED, Compat, SparseD
from papers.sparsed.settings import Params

__all__ = [
    "LLADA", "SWITCHES", "compat_table", "extra_steps", "full_difference", "logit_factor", "miscount",
    "pattern_difference", "rises", "searched_passes", "starved",
]  # fmt: skip

SWITCHES = tuple(field.name for field in dataclasses.fields(Compat))
LLADA = (32, 128)  # heads, head dim
LENGTH, PROMPT, BLOCK = 512, 352, 32  # of the heads that are made up here: 16 blocks, 11 of the prompt
PART = 0.2  # of the steps that count as early, and as late


def made_up(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value [1, 4, LENGTH, 32] whose weights differ enough from tile to tile."""
    draw = seeds.generator(seed, "made-up heads")
    query, key, value = (torch.randn(1, 4, LENGTH, 32, generator=draw) for _ in range(3))
    return query + 2 * torch.randn(1, 4, 1, 32, generator=draw), 1.5 * key, value


def full_difference(params: Params, network: nn.Module, windows: Tensor) -> float:
    """Largest difference of the logits under SparseD at rho = 1, in a dense and two sparse steps, to the model's."""
    with torch.no_grad():
        plain = network(windows)
        way = SparseD(3, params.length - params.generated, 1.0, skip=0.4, block_size=params.block_size)
        with language_attention(network, way):
            return max((network(windows) - plain).abs().max().item() for _ in range(3))


def miscount(*, isolated: bool = True) -> float:
    """Rows of a pattern that do not keep their share of prompt and of generated blocks, in 0..1."""
    query, key, value = made_up()
    scores = attention.search(query, key, value, block_size=BLOCK).scores
    scores[..., PROMPT // BLOCK :] /= 100  # what is generated gets little weight, as early on
    way = SparseD(10, PROMPT, 0.3, block_size=BLOCK, isolated=isolated)
    kept, prompt = way.select(scores).dense(), way.prompt_blocks
    sizes = (prompt, scores.shape[-1] - prompt)
    right = [
        part.sum(-1) == method.blocks_kept(size, 0.3) for part, size in zip(kept.split(sizes, -1), sizes, strict=True)
    ]
    return 1 - (right[0] & right[1]).double().mean().item()


def pattern_difference(compat: Compat = RELEASED) -> float:
    """Share of tiles in which the search's pattern and that of the released loop differ, both with `compat`."""
    query, key, value = made_up()
    way = SparseD(1, PROMPT, 0.3, skip=1.0, block_size=BLOCK, compat=compat)
    network = _Head(query, key, value)
    with torch.no_grad(), language_attention(network, way):
        network(query)
        [found] = way.patterns.values()
        there = method.by_query_blocks(query, key, way.prompt_blocks, 0.3, block_size=BLOCK, compat=compat)
    return (found.dense() != there.dense()).double().mean().item()


def searched_passes(*, released: bool) -> float:
    """Products of queries and keys that finding the pattern takes, with the dense attention of that step, counted.

    Of a sequence whose prompt is 11 of 16 blocks. In the search they are those of the dense attention.
    """
    if not released:
        return method.passes(LENGTH // BLOCK, PROMPT // BLOCK, released=False)
    query, key, _ = made_up()
    with FlopCounterMode(display=False) as counter:
        method.by_query_blocks(query, key, PROMPT // BLOCK, 0.3, block_size=BLOCK)
    return 1 + counter.get_total_flops() / (2 * query.shape[1] * LENGTH**2 * query.shape[-1])


def logit_factor(compat: Compat = RELEASED) -> float:
    """By how much LLaDA's search logits are larger than those of its attention."""
    heads, dim = LLADA
    return (dim / heads) ** 0.5 if compat.head_scale else 1.0


def extra_steps(steps: int, skip: float, compat: Compat = RELEASED) -> int:
    """Dense steps of the released code beyond floor(skip T)."""
    return method.dense_steps(steps, skip, two_late=compat.two_late) - int(skip * steps)


def compat_table(
    params: Params, state: State, seed: int, names: Sequence[str] = SWITCHES
) -> dict[str, dict[str, float]]:
    """What each switch alone, and `all` of them, changes in the patterns of the text model at the first step.

    By switch: `changed`, tiles that differ from the paper's over tiles the paper keeps; `density`, share of tiles kept;
    `prompt` and `generated`, shares kept of the tiles of each.
    """
    network, windows = models.build(params, "text", state), experiment.text_batch(params, seed)
    prompt = params.length - params.generated
    windows[:, prompt:] = models.mask_of(params, "text")
    found = {}
    wanted = {"paper": Compat(), **{name: Compat(**{name: True}) for name in names}, "all": RELEASED}
    for name, compat in wanted.items():
        # the step does not matter here, and two of the released code's are dense before it searches
        compat = dataclasses.replace(compat, two_late=False)
        way = SparseD(1, prompt, params.keep_ratio, skip=1.0, block_size=params.block_size, compat=compat)
        with torch.no_grad(), language_attention(network, way):
            network(windows)
            kept = torch.stack([pattern.dense() for pattern in way.patterns.values()])
        found[name] = (kept, way.prompt_blocks)
    paper = found["paper"][0]
    return {
        name: {
            "changed": (kept != paper).sum().item() / paper.sum().item(),
            "density": kept.double().mean().item(),
            "prompt": kept[..., :edge].double().mean().item(),
            "generated": kept[..., edge:].double().mean().item(),
        }
        for name, (kept, edge) in found.items()
    }


def starved(params: Params, state: State, seed: int, *, isolated: bool = False) -> float:
    """Share of the generated tiles that are kept at the first step, over rho; 1 is an even share."""
    network, windows = models.build(params, "text", state), experiment.text_batch(params, seed)
    prompt = params.length - params.generated
    windows[:, prompt:] = models.mask_of(params, "text")
    options = {"skip": 1.0, "block_size": params.block_size, "isolated": isolated}
    way = SparseD(1, prompt, params.keep_ratio, **options)
    with torch.no_grad(), language_attention(network, way):
        network(windows)
        kept = torch.stack([pattern.dense() for pattern in way.patterns.values()])
    return kept[..., way.prompt_blocks :].double().mean().item() / params.keep_ratio


def rises(dense: Sequence[float], sparse: Sequence[float]) -> tuple[float, float]:
    """Rise of the bound, in nats a token, if only the first fifth of the steps is sparse, and if only the last is."""
    part = max(1, round(PART * len(dense)))
    rise = [b - a for a, b in zip(dense, sparse, strict=True)]
    return sum(rise[:part]) / len(rise), sum(rise[-part:]) / len(rise)


class _Head(nn.Module):
    """One attention as a model."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor):
        super().__init__()
        self.key, self.value = key, value

    def forward(self, query: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(query, self.key, self.value)
