"""SparseD: sparse attention for diffusion language models (Wang et al., ICLR 2026, arXiv 2509.24014).

A diffusion language model denoises a sequence in T steps, each with attention from every token to every other. Its
patterns differ from head to head but hardly from step to step, and its first steps are fragile. So:

    step   1 .. d - 1    d = floor(skip T)                                   d + 1 .. T
           dense         dense; the pattern is found [isolated selection]    sparse, by that pattern [reuse]

*Isolated selection*: attention weights, averaged over blocks of b x b, decide. Every block of queries keeps the best
share rho of the key blocks of the prompt and, apart from them, the best share rho of those that are being generated,
which early on hold MASK, get little weight, and would not be chosen against the prompt.

The mean weight of a tile is b^-2 times the sum that `kernels.attention.search` finds on the way of a dense attention,
so no step is longer for it than that search. The released code walks over the blocks of queries instead and takes two
softmaxes of each (`by_query_blocks`); where it departs from the paper is a switch of `Compat`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from common.attention.policy import Policy, Site, dense
from kernels import attention
from kernels.attention import BlockMask

if TYPE_CHECKING:
    from common.attention.meter import Meter


@dataclass(frozen=True)
class Compat:
    """What the released code for LLaDA does otherwise (its commit bc77092); all False is the paper.

    head_scale         search logits are divided by sqrt(heads), 32 for LLaDA, instead of sqrt(head dim), 128: twice as
                       large. The path for Dream is right
    one_more           int(rho n) + 1 blocks of n are kept; at rho = 1 that is more than there are, and the code stops
                       with an error where this one keeps all
    two_late           steps are counted from 0 and the pattern is found in number int(T skip) + 1, so that two more
                       are dense
    prompt_against_all the prompt's blocks are those among the best share rho of *all* blocks: more than rho of the
                       prompt where generated blocks rank low, and fewer where they rank high
    own_softmax        the weights of generated keys are those of a softmax over generated keys alone
    """

    head_scale: bool = False
    one_more: bool = False
    two_late: bool = False
    prompt_against_all: bool = False
    own_softmax: bool = False


RELEASED = Compat(True, True, True, True, True)


@dataclass
class SparseD(Policy):
    """SparseD for sequences of one prompt length; every sequence, layer and head has a pattern of its own.

    steps       T, forward passes of a generation
    prompt      tokens of the prompt; all behind them is generation. A block that holds both counts as prompt, as in
                the released code (the paper does not say)
    keep_ratio  rho, the share of key blocks that a block of queries keeps
    skip        share of the steps that stay dense; 0: all are sparse, and the pattern is that of the first
    block_size  b, one of kernels.attention.BLOCK_SIZES
    isolated    False: the best share rho of all blocks alike
    reuse       False: the pattern is found anew in every step

    Raises ValueError for options out of range.
    """

    steps: int
    prompt: int
    keep_ratio: float = 0.3
    skip: float = 0.2
    block_size: int = 128
    isolated: bool = True
    reuse: bool = True
    compat: Compat = Compat()
    patterns: dict[tuple[str, str], BlockMask] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.prompt < 0:
            raise ValueError(
                f"SparseD: got steps {self.steps}, prompt {self.prompt}; expected at least 1 step and a prompt of 0 "
                "tokens or more"
            )
        if not (0 < self.keep_ratio <= 1 and 0 <= self.skip <= 1):
            raise ValueError(
                f"SparseD: got keep_ratio {self.keep_ratio}, skip {self.skip}; expected shares in (0, 1] and [0, 1]. "
                "keep_ratio is what is kept"
            )

    @property
    def dense_steps(self) -> int:
        """d: the last step, from 1, that is dense."""
        return dense_steps(self.steps, self.skip, two_late=self.compat.two_late)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, site: Site, meter: Meter) -> Tensor:
        place, last = (site.layer, site.cfg), self.dense_steps
        if site.step < last:
            with meter.phase("dense"):
                return dense(query, key, value, site)
        if site.step == last or place not in self.patterns or not self.reuse:
            out = self._find(query, key, value, site, meter)
            if site.step == last:
                return out
        pattern = self.patterns[place]
        meter.density(pattern.density())
        with meter.phase("sparse"):
            return attention.block_sparse_attention(
                query, key, value, pattern, block_size=self.block_size, scale=site.scale, key_mask=site.key_mask
            )

    def restart(self) -> None:
        self.patterns.clear()

    def _find(self, query: Tensor, key: Tensor, value: Tensor, site: Site, meter: Meter) -> Tensor:
        """Find and keep the pattern of this site; returns dense attention."""
        options = {"block_size": self.block_size, "key_mask": site.key_mask}
        with meter.phase("search"):
            found = attention.search(query, key, value, scale=site.scale, **options)
            weights, scale = found.scores, site.scale
            if self.compat.head_scale:
                scale = query.shape[1] ** -0.5
                weights = attention.search(query, key, value, scale=scale, **options).scores
            scores = weights
            if self.compat.own_softmax and self.prompt_blocks < scores.shape[-1]:
                own = generated_weights(query, key, value, self.prompt_blocks, scale=scale, **options)
                scores = torch.cat([scores[..., : self.prompt_blocks], own], -1)
        with meter.phase("selection"):
            pattern = self.select(scores, weights)
            self.patterns[site.layer, site.cfg] = pattern
        meter.recall(attention.recall(found.scores, pattern))
        return found.out.to(query.dtype)

    @property
    def prompt_blocks(self) -> int:
        """Key blocks of the prompt, the one that it shares with the generation among them."""
        return -(-self.prompt // self.block_size)

    def select(self, scores: Tensor, weights: Tensor | None = None) -> BlockMask:
        """The pattern by scores [B, H, n, n] of tiles; `weights` of one softmax over all keys, if that is another."""
        if not self.isolated:
            return select(scores, 0, self.keep_ratio, self.compat)
        return select(scores, self.prompt_blocks, self.keep_ratio, self.compat, weights)


def select(
    scores: Tensor, prompt: int, keep_ratio: float, compat: Compat = Compat(), weights: Tensor | None = None
) -> BlockMask:
    """Isolated selection: in each row the best of the first `prompt` key blocks, and the best of the others.

    Args:
        scores: [B, H, nq, nk], larger is kept first.
        prompt: key blocks of the prompt; 0, or all of them: one selection from all.
        keep_ratio: rho; of n blocks round(rho n) are kept, at least one [the paper does not round].
        weights: what the prompt competes by under `compat.prompt_against_all`; the scores if None.
    """
    first, rest = scores[..., :prompt], scores[..., prompt:]
    if compat.prompt_against_all and first.shape[-1] and rest.shape[-1]:
        everything = scores if weights is None else weights
        chosen = _best(everything, keep_ratio, compat)[..., :prompt]
        return BlockMask.of(torch.cat([chosen, _best(rest, keep_ratio, compat)], -1))
    return BlockMask.of(torch.cat([_best(part, keep_ratio, compat) for part in (first, rest)], -1))


def blocks_kept(size: int, keep_ratio: float, *, one_more: bool = False) -> int:
    """How many of `size` blocks are kept."""
    if one_more:
        return min(size, int(keep_ratio * size) + 1)
    return max(min(1, size), math.floor(keep_ratio * size + 0.5))


def dense_steps(steps: int, skip: float, *, two_late: bool = False) -> int:
    """Number of the first `steps` that are dense."""
    return min(steps, int(skip * steps) + (2 if two_late else 0))


def generated_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt: int,
    *,
    block_size: int,
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Weights [B, H, nq, nk - prompt] in tiles of a softmax over the keys behind the first `prompt` blocks alone."""
    start = prompt * block_size
    left = None if key_mask is None else key_mask[:, start:]
    return attention.search(
        query, key[:, :, start:], value[:, :, start:], block_size=block_size, scale=scale, key_mask=left
    ).scores


def by_query_blocks(
    query: Tensor, key: Tensor, prompt: int, keep_ratio: float, *, block_size: int, compat: Compat = RELEASED
) -> BlockMask:
    """The pattern as the released code finds it: a loop over the blocks of queries, for each one softmax over all keys
    and one over those that are generated, each averaged over tiles.

    query, key: [B, H, L, D] with as many heads; prompt: key blocks of the prompt, fewer than there are. The result is
    that of `SparseD` with the same `compat`, up to ties; what it costs is in `passes`.
    """
    scale = query.shape[1 if compat.head_scale else -1] ** -0.5
    rows = []
    for part in query.split(block_size, 2):
        everything = _tile_means(part @ key.mT * scale, block_size)
        scores = everything
        if compat.own_softmax:
            own = _tile_means(part @ key[:, :, prompt * block_size :].mT * scale, block_size)
            scores = torch.cat([everything[..., :prompt], own], -1)
        rows.append(select(scores, prompt, keep_ratio, compat, everything).dense())
    return BlockMask.of(torch.cat(rows, 2))


def passes(blocks: int, prompt: int, *, released: bool) -> float:
    """Products of queries and keys in the step that finds the pattern, in those of one dense attention.

    With `search` the one of the dense attention serves both. The released code takes the dense attention, a product
    with all keys, and another with the generated ones.
    """
    return 2 + (blocks - prompt) / blocks if released else 1.0


def _best(scores: Tensor, keep_ratio: float, compat: Compat) -> Tensor:
    size = scores.shape[-1]
    if not size:
        return scores.bool()
    count = blocks_kept(size, keep_ratio, one_more=compat.one_more)
    return attention.select_blocks(scores, count / size).dense()


def _tile_means(logits: Tensor, block: int) -> Tensor:
    """logits [B, H, b, L] -> mean weights [B, H, 1, blocks]; what a cut-off block lacks counts as 0."""
    weight = logits.softmax(-1, dtype=torch.float32)
    return F.pad(weight, (0, -weight.shape[-1] % block)).unflatten(-1, (-1, block)).mean((2, 4))[:, :, None]
