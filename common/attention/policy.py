"""What decides how an attention is computed, apart from how it gets hold of it.

A policy sees query, key and value of one attention and the `Site` it belongs to, and returns the output. It is written
once and runs in every model that `video_attention` and `language_attention` reach.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from common.attention.meter import Meter

__all__ = ["Dense", "Policy", "Site", "dense"]


@dataclass(frozen=True)
class Site:
    """Where and when an attention happens.

    layer     dotted name of the attention module, from the pipeline down (`transformer.blocks.3.attn1`)
    step      denoising step of this generation, counted from 1 as in the papers
    cfg       which pass of classifier-free guidance: the name the pipeline gives it (`cond`, `uncond`, or `cond_uncond`
              for both in one batch, the unconditional half first), else the number of the call within the step, from 0
    text      places of the text tokens in the sequence, padding included; empty where attention is over video alone
    grid      (frames, rows, columns) of video tokens, in this order in the sequence; None for a language model
    key_mask  bool [B, L], False for keys that are padding; None if there is none
    scale     of the scores; None for 1/sqrt(head dim)
    """

    layer: str
    step: int
    cfg: str
    text: range = range(0)
    grid: tuple[int, int, int] | None = None
    key_mask: Tensor | None = None
    scale: float | None = None


class Policy(ABC):
    """How self-attention is computed. One object serves one run; what it remembers is kept by layer and CFG pass."""

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, site: Site, meter: Meter) -> Tensor:
        """The output [B, H, L, D] of an attention, for query [B, H, L, D], key and value [B, G, L, D].

        What takes time goes into `with meter.phase(name):`, with "dense", "search", "selection" and "sparse" for what
        those words say; `meter.density` and `meter.recall` note what was chosen.
        """

    def restart(self) -> None:  # noqa: B027  (a policy without memory has nothing to forget)
        """Forget everything: another generation begins, with another prompt or seed."""

    def close(self, steps: int) -> None:  # noqa: B027
        """The run ended well; its last generation took so many steps. The place to warn of what never happened."""


class Dense(Policy):
    """Attention as it was, measured: the baseline, and the share of attention in the time."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, site: Site, meter: Meter) -> Tensor:
        with meter.phase("dense"):
            return dense(query, key, value, site)


def dense(query: Tensor, key: Tensor, value: Tensor, site: Site) -> Tensor:
    """torch's attention, called as diffusers calls it: bit for bit the model without us."""
    mask = None if site.key_mask is None else site.key_mask[:, None, None, :]
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=site.scale, enable_gqa=grouped)
