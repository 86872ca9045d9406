"""Sparse attention in causal language models: what each query may read is a `Selector`'s choice, and is counted.

    logits, reads = sparse_forward(model, tokens, Quest(keep=0.1), prompt=500)
    print(reads.density("decode"))

Prompt and answer go through the model in one forward pass. A query before `prompt` belongs to the prefill, every later
one is a decoding step: under a causal mask it computes what it would one token at a time, given the same tokens. So a
selector of the decode phase leaves the prompt's own attention dense, and one of the prefill phase leaves the answer's.

Attention is computed with a mask, which is right and not fast. Counted are the keys that a kernel would have to read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.attention.intercept import Intercept
from common.attention.run import AttentionNotReached

__all__ = ["CausalSite", "Phase", "Reads", "Rows", "Selector", "attention_rows", "queries_and_keys", "sparse_forward"]

Phase = Literal["prefill", "decode"]
Rows = Callable[[int, int], Tensor]
CHUNK = 1024  # queries whose mask is held at once


@dataclass(frozen=True)
class CausalSite:
    """Where an attention happens.

    layer    number of the attention in the forward pass, from 0
    prompt   queries from here on are decoding steps
    scale    of the scores
    """

    layer: int
    prompt: int
    scale: float


class Selector(ABC):
    """Which keys each query reads, in the phase it is made for. It remembers nothing from one forward pass to another.

    A selector may look at nothing that its phase does not have: in the prefill at all of the prompt, in a decoding step
    at this query and at all keys up to it.
    """

    phase: Phase

    @abstractmethod
    def plan(self, query: Tensor, key: Tensor, site: CausalSite) -> Rows:
        """Look at query and key [B, H, L, D], the keys repeated for grouped queries, as attention gets them.

        Returns rows(start, stop) -> bool [B, H, stop - start, L]: what the queries start..stop-1 may read, keys after a
        query included or not; they are never read. Asked for queries of the phase alone, in rising order.
        """


@dataclass
class Reads:
    """Keys read and readable, by (phase, layer): one for each pair of a query and a key that a head of keys has to be
    read for; queries of a group that share the head of keys read a key once."""

    kept: dict[tuple[Phase, int], int] = field(default_factory=lambda: defaultdict(int))
    possible: dict[tuple[Phase, int], int] = field(default_factory=lambda: defaultdict(int))

    def density(self, phase: Phase) -> float:
        """Share of the readable keys that were read in this phase, over all layers, those left dense included."""
        kept, possible = (sum(n for (p, _), n in part.items() if p == phase) for part in (self.kept, self.possible))
        if not possible:
            raise ValueError(f"Reads: got no query in the phase {phase!r}; expected one that has queries")
        return kept / possible

    def add(self, other: Reads) -> None:
        """Count what another forward pass read too."""
        for mine, theirs in ((self.kept, other.kept), (self.possible, other.possible)):
            for place, count in theirs.items():
                mine[place] += count


@torch.no_grad()
def sparse_forward(
    model: nn.Module, tokens: Tensor, selector: Selector | None, *, prompt: int, dense_layers: int = 0
) -> tuple[Tensor, Reads]:
    """The model's output for tokens [B, L], with attention by the selector, and what was read.

    Args:
        model: one that attends causally through torch's scaled_dot_product_attention (in transformers:
            attn_implementation="sdpa"), over the whole sequence (use_cache=False).
        selector: None leaves everything dense and counts.
        prompt: tokens of the prompt, in 1..L; L for a prefill alone.
        dense_layers: the first so many attentions stay dense.

    Raises:
        ValueError: for a prompt that does not fit, masks, attention in both directions, or dropout.
        AttentionNotReached: if no attention came by.
    """
    if not 1 <= prompt <= tokens.shape[1]:
        raise ValueError(f"sparse_forward: got a prompt of {prompt} in {tokens.shape[1]} tokens; expected 1 to all")
    reads = Reads()

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        site = CausalSite(layer, prompt, scale)
        return _attend(query, key, value, site, None if layer < dense_layers else selector, reads)

    return _caught(model, tokens, attend), reads


@torch.no_grad()
def queries_and_keys(model: nn.Module, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Query [B, H, L, D] and key [B, G, L, D] of every attention, in their order, as it gets them (rotated)."""
    found: list[tuple[Tensor, Tensor]] = []

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        found.append((query, key))
        return _dense(query, key, value, scale)

    _caught(model, tokens, attend)
    return found


def attention_rows(query: Tensor, key: Tensor, scale: float, start: int, stop: int) -> Tensor:
    """Dense causal attention of the queries start..stop-1 over the first `stop` keys: float32 [B, H, n, stop]."""
    scores = scale * query[:, :, start:stop].float() @ key[:, :, :stop].float().mT
    return scores.masked_fill(~_causal(start, stop, query.device), -torch.inf).softmax(-1)


def _caught(model: nn.Module, tokens: Tensor, attend: Callable[[int, Tensor, Tensor, Tensor, float], Tensor]) -> Tensor:
    def caught_attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        layer = caught.calls - 1
        _check(layer, query, key, **options)
        scale = options["scale"]
        return attend(layer, query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)

    with Intercept(caught_attention) as caught:
        out = model(tokens)
    if not caught.calls:
        raise AttentionNotReached(
            f"{type(model).__name__}: its forward pass called torch's scaled_dot_product_attention not once; expected "
            "it to; load models of transformers with attn_implementation='sdpa'"
        )
    return out


def _check(
    layer: int, query: Tensor, key: Tensor, *, attn_mask: Any, dropout_p: float, is_causal: bool, **_: Any
) -> None:
    if attn_mask is not None or not is_causal:
        raise ValueError(
            f"attention {layer}: got {'a mask' if attn_mask is not None else 'attention in both directions'}; expected "
            "causal attention over texts of one length, without padding"
        )
    if dropout_p or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"attention {layer}: got {query.shape[2]} queries, {key.shape[2]} keys, dropout {dropout_p}; expected one "
            "sequence without a cache (use_cache=False) and a model in evaluation mode"
        )


def _attend(
    query: Tensor, key: Tensor, value: Tensor, site: CausalSite, selector: Selector | None, reads: Reads
) -> Tensor:
    """Attention with the selector's rows in its phase and dense ones elsewhere; [B, H, L, D]."""
    length, groups = query.shape[2], key.shape[1]
    parts: dict[Phase, tuple[int, int]] = {"prefill": (0, site.prompt), "decode": (site.prompt, length)}
    for phase, (start, stop) in parts.items():
        pairs = sum(range(start + 1, stop + 1)) * len(query) * groups
        reads.possible[phase, site.layer] += pairs
        if selector is None or phase != selector.phase:
            reads.kept[phase, site.layer] += pairs
    if selector is None:
        return _dense(query, key, value, site.scale)
    repeated = key.repeat_interleave(query.shape[1] // groups, dim=1)
    values = value.repeat_interleave(query.shape[1] // groups, dim=1)
    rows, outputs = selector.plan(query, repeated, site), []
    for phase, (first, last) in parts.items():
        if phase == "prefill" and selector.phase != phase:
            outputs.append(_dense(query[:, :, :last], key[:, :, :last], value[:, :, :last], site.scale))
            continue
        for start, stop in _chunks(first, last):
            mask = _causal(start, stop, query.device)
            if selector.phase == phase:
                mask = rows(start, stop)[..., :stop] & mask
                reads.kept[phase, site.layer] += int(mask.unflatten(1, (groups, -1)).any(2).sum())
            part = query[:, :, start:stop], repeated[:, :, :stop], values[:, :, :stop]
            outputs.append(F.scaled_dot_product_attention(*part, attn_mask=mask, scale=site.scale))
    return torch.cat(outputs, dim=2)


def _dense(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)


def _chunks(first: int, last: int) -> Iterator[tuple[int, int]]:
    for start in range(first, last, CHUNK):
        yield start, min(start + CHUNK, last)


def _causal(start: int, stop: int, device: torch.device) -> Tensor:
    """bool [stop - start, stop]: which of the first `stop` keys the queries start..stop-1 can see."""
    return torch.arange(stop, device=device) <= torch.arange(start, stop, device=device)[:, None]
