"""AdaSpa (Xia et al., arXiv 2502.21079): search rarely and exactly, attend sparsely in between.

step  1 .. t1-1   t1                        t1+1 ..          t2                          t2+1 ..
      dense       dense, LSE, tile scores   tiles of t1      scores with the LSE of t1,  tiles of t2
                                                             their tiles used at once
"""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from common.attention.policy import Policy, Site, dense
from kernels import attention
from kernels.attention import BlockMask

if TYPE_CHECKING:
    from common.attention.meter import Meter

__all__ = ["AdaSpa"]


@dataclass
class AdaSpa(Policy):
    """AdaSpa with all that its text leaves open as an option.

    keep_ratio         share of tiles kept, in (0, 1]: the paper's sparsity s is 1 - keep_ratio
    search_steps       T_s, counted from 1: the output of the first is dense still, so (10, 30) gives ten dense steps.
                       What the paper writes as {0, 30} in its study of lengths is (1, 30) here
    block_size         tokens a side of a tile, one of kernels.attention.BLOCK_SIZES. The text says 64; the kernel it
                       cites takes multiples of 128 only
    rule               "row": the same number of tiles in every row (section 4.3); "global": the best of a head
                       wherever they lie (equation 14)
    head_adaptive      three levels of sparsity by the heads' recall (section 4.4), or one for all
    threshold          recall above which a head counts as easy
    text_sink          whether every tile with text in it is kept
    text_counts        whether those tiles use up the budget, or come on top of it
    recall_after_sink  whether the recall that ranks heads is that of the tiles with the text's among them
    padded_text        "keep": padding counts as text in the sink; "drop": tiles that hold nothing of the text but
                       padding are chosen like any other
    share_cfg          whether the conditional pass decides for the unconditional one too. Passes made one after the
                       other follow the one that comes first; in a batch of both it is the second half
    refresh_lse        "never": later searches use the LSE of the first (the paper's cache). "search": each is a fused
                       search again, whose output is dense (the paper's row without the cache)

    A layer that is first reached after the first search step (Wan 2.2 changes transformers midway) searches then.

    Raises ValueError for options out of range.
    """

    keep_ratio: float = 0.2
    search_steps: tuple[int, ...] = (10, 30)
    block_size: int = 64
    rule: Literal["row", "global"] = "row"
    head_adaptive: bool = True
    threshold: float = 0.8
    text_sink: bool = True
    text_counts: bool = False
    recall_after_sink: bool = True
    padded_text: Literal["keep", "drop"] = "keep"
    share_cfg: bool = False
    refresh_lse: Literal["never", "search"] = "never"
    _known: dict[tuple[str, str], _Choice] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.search_steps = tuple(self.search_steps)
        steps = self.search_steps
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(
                f"AdaSpa: got keep_ratio {self.keep_ratio}; expected a share in (0, 1]. It is what is kept: the "
                "paper's sparsity of 0.8 is a keep_ratio of 0.2"
            )
        if not steps or steps[0] < 1 or any(b <= a for a, b in itertools.pairwise(steps)):
            raise ValueError(
                f"AdaSpa: got search_steps {steps}; expected one or more, ascending; the first step of all is 1"
            )
        if self.block_size not in attention.BLOCK_SIZES:
            raise ValueError(
                f"AdaSpa: got block_size {self.block_size}; expected one of "
                f"{', '.join(map(str, attention.BLOCK_SIZES))}"
            )
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"AdaSpa: got threshold {self.threshold}; expected a recall from 0 to 1")
        for name, values in _CHOICES.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"AdaSpa: got {name} {getattr(self, name)!r}; expected {' or '.join(map(repr, values))}"
                )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, site: Site, meter: Meter) -> Tensor:
        choice = self._known.get(self._owner(site))
        if site.step < self.search_steps[0] or (choice is not None and choice.dense_at == site.step):
            with meter.phase("dense"):
                return dense(query, key, value, site)
        due = choice is None or (site.step in self.search_steps and choice.made_at < site.step)
        if choice is None or (due and self.refresh_lse == "search"):
            return self._search(query, key, value, site, meter)
        if due:
            choice = self._search_again(query, key, choice.lse, site, meter)
        meter.density(choice.density)
        with meter.phase("sparse"):
            out = attention.block_sparse_attention(
                query,
                key,
                value,
                choice.mask,
                block_size=self.block_size,
                scale=site.scale,
                key_mask=site.key_mask,
            )
        return out

    def restart(self) -> None:
        self._known.clear()

    def close(self, steps: int) -> None:
        if steps < self.search_steps[0]:
            warnings.warn(
                f"AdaSpa: all was dense: the last generation took {steps} steps and the first search was due at step "
                f"{self.search_steps[0]}; search earlier, e.g. search_steps=({max(1, steps // 5)},)",
                stacklevel=2,
            )

    def _search(self, query: Tensor, key: Tensor, value: Tensor, site: Site, meter: Meter) -> Tensor:
        """Fused search: dense output, the LSE to keep, and the tiles of the steps to come."""
        with meter.phase("search"):
            found = attention.search(
                query, key, value, block_size=self.block_size, scale=site.scale, key_mask=site.key_mask
            )
        lse = self._deciding(found.lse, site)
        self._choose(self._deciding(found.scores, site), lse, site, query.shape[2], meter, dense_at=site.step)
        return found.out.to(query.dtype)

    def _search_again(self, query: Tensor, key: Tensor, lse: Tensor, site: Site, meter: Meter) -> _Choice:
        """LSE-cached search: tiles for this very step, at the price of half an attention."""
        mask = site.key_mask
        with meter.phase("search"):
            scores = attention.block_scores(
                self._deciding(query, site),
                self._deciding(key, site),
                lse,
                block_size=self.block_size,
                scale=site.scale,
                key_mask=None if mask is None else self._deciding(mask, site),
            )
        return self._choose(scores, lse, site, query.shape[2], meter, dense_at=None)

    def _choose(
        self, scores: Tensor, lse: Tensor, site: Site, length: int, meter: Meter, *, dense_at: int | None
    ) -> _Choice:
        """Select tiles by their scores and remember them."""
        with meter.phase("selection"):
            forced = self._forced(site, length, scores.device)
            options = {"rule": self.rule, "forced_count": self.text_counts}
            ratio: float | Tensor = self.keep_ratio
            if self.head_adaptive:
                sink = forced if self.recall_after_sink else None
                uniform = attention.select_blocks(scores, ratio, forced=sink, **options)
                recalls = attention.recall(scores, uniform)
                ratio = attention.head_tiers(recalls, self.keep_ratio, threshold=self.threshold)
            mask = attention.select_blocks(scores, ratio, forced=forced, **options)
            recall = attention.recall(scores, mask)
            if self._halved(site):
                mask = BlockMask.of(torch.cat([mask.dense()] * 2))
            choice = _Choice(mask, lse, mask.density(), site.step, dense_at)
            self._known[self._owner(site)] = choice
        meter.recall(recall)
        return choice

    def _forced(self, site: Site, length: int, device: torch.device) -> Tensor | None:
        """bool [B or 1, 1, nq, nk]: the tiles of the text sink."""
        if not self.text_sink or not len(site.text):
            return None
        texts = [site.text]
        if self.padded_text == "drop" and site.key_mask is not None:
            present = self._deciding(site.key_mask, site)[:, site.text.start : site.text.stop]
            texts = [_filled(site.text, row) for row in present.tolist()]
        sinks = [
            attention.text_blocks(length, length, text, block_size=self.block_size, device=device) for text in texts
        ]
        return torch.stack(sinks)[:, None]

    def _owner(self, site: Site) -> tuple[str, str]:
        """Whose choice serves this site."""
        return site.layer, "" if self.share_cfg else site.cfg

    def _halved(self, site: Site) -> bool:
        return self.share_cfg and site.cfg == BATCHED

    def _deciding(self, tensor: Tensor, site: Site) -> Tensor:
        """The batch entries that decide: the conditional half of a batch that holds both."""
        return tensor.chunk(2)[1] if self._halved(site) else tensor


@dataclass(frozen=True)
class _Choice:
    """Tiles of a layer and CFG pass: `density` [B or 1, H] of the mask; `dense_at` the step of the fused search that
    made it, whose output is dense."""

    mask: BlockMask
    lse: Tensor
    density: Tensor
    made_at: int
    dense_at: int | None


BATCHED = "cond_uncond"  # what diffusers' pipelines call a pass whose batch is [unconditional, conditional]
_CHOICES = {"rule": ("row", "global"), "padded_text": ("keep", "drop"), "refresh_lse": ("never", "search")}


def _filled(text: range, present: list[bool]) -> range:
    """The range from the first to the last text token that is no padding."""
    places = [place for place, there in zip(text, present, strict=True) if there]
    return range(places[0], places[-1] + 1) if places else range(0)
