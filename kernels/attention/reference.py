"""Block-sparse attention in plain torch: the specification. Every score of the L x L matrix is held at once.

Shapes: q [B, H, Lq, D], k and v [B, G, Lk, D] with H a multiple of G (grouped queries), keep bool [B, H, Lq, Lk] by
token, scale a number. LSE is the natural logarithm of a row's sum of exp(scale q k) over what it may attend to.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["block_scores", "block_sparse_attention", "search"]


def block_sparse_attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, H, Lq, D] and LSE [B, H, Lq]. A row that keeps nothing gives 0 and -inf."""
    scores = logits(q, k, scale).masked_fill(~keep, -torch.inf)
    lse = scores.logsumexp(-1)
    return _weights(scores, lse) @ repeated(v, q), lse


def search(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense attention [B, H, Lq, D], its LSE [B, H, Lq], and the weight in every tile [B, H, nq, nk]."""
    keep = torch.ones(len(q), 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    out, lse = block_sparse_attention(q, k, v, keep if key_mask is None else keep & key_mask[:, None, None, :], scale)
    return out, lse, block_scores(q, k, lse, key_mask, scale, block)


def token_mask(mask: Tensor, key_mask: Tensor | None, lengths: tuple[int, int], block: int) -> Tensor:
    """bool [B, H, Lq, Lk] of a tile mask [B or 1, H or 1, nq, nk] and which keys are there, bool [B, Lk]."""
    keep = mask.repeat_interleave(block, -2).repeat_interleave(block, -1)[..., : lengths[0], : lengths[1]]
    return keep if key_mask is None else keep & key_mask[:, None, None, :]


def logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale q k [B, H, Lq, Lk]."""
    return scale * (q @ repeated(k, q).mT)


def repeated(k: Tensor, q: Tensor) -> Tensor:
    """Each head of k [B, G, L, D] as often as query heads share it: [B, H, L, D]."""
    return k.repeat_interleave(q.shape[1] // k.shape[1], 1)


def gradients(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of q, k and v from those of the output and the LSE: with P the weights,

    dV = P' dO,   dS = P (dO V' - sum(dO O) + dLSE),   dQ = scale dS K,   dK = scale dS' Q.
    """
    weights = _weights(logits(q, k, scale).masked_fill(~keep, -torch.inf), lse)
    shift = (d_out * out).sum(-1) - d_lse
    d_scores = scale * weights * (d_out @ repeated(v, q).mT - shift[..., None])
    dk, dv = d_scores.mT @ q, weights.mT @ d_out
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    return d_scores @ repeated(k, q), dk.unflatten(1, groups).sum(2), dv.unflatten(1, groups).sum(2)


def block_scores(q: Tensor, k: Tensor, lse: Tensor, key_mask: Tensor | None, scale: float, block: int) -> Tensor:
    """Sums of exp(scale q k - LSE) over each tile: [B, H, nq, nk]. With the exact LSE a row of tokens sums to 1; one
    whose LSE is -inf counts nothing."""
    scores = logits(q, k, scale).masked_fill((lse == -torch.inf)[..., None], -torch.inf)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], -torch.inf)
    weights = _weights(scores, lse)
    rows, columns = -weights.shape[-2] % block, -weights.shape[-1] % block
    padded = torch.nn.functional.pad(weights, (0, columns, 0, rows))
    return padded.unflatten(-1, (-1, block)).sum(-1).unflatten(-2, (-1, block)).sum(-2)


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - LSE); zero where a row keeps nothing."""
    return (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
