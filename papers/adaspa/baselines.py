"""What AdaSpa is compared with: other ways to choose as many tiles, after as many dense steps.

All keep the same share of tiles by the same kernel, with every tile that holds text on top; they differ in which they
keep and in how they come to know it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from common import seeds
from common.attention import Meter, Policy, Site, dense
from kernels import attention
from kernels.attention import BlockMask

__all__ = ["Fixed", "MInference", "SparseVideoGen", "Window"]

PROBES = 64  # queries that MInference and Sparse VideoGen look at


@dataclass
class _Sparse(Policy):
    """Dense for `warmup` steps, then the tiles that `tiles` says."""

    keep_ratio: float = 0.2
    warmup: int = 10
    block_size: int = 64

    def attend(self, query: Tensor, key: Tensor, value: Tensor, site: Site, meter: Meter) -> Tensor:
        if site.step <= self.warmup:
            with meter.phase("dense"):
                return dense(query, key, value, site)
        with meter.phase("selection"):
            mask = self.tiles(query, key, value, site)
        return self.sparse(query, key, value, mask, site, meter)

    def sparse(self, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, site: Site, meter: Meter) -> Tensor:
        meter.density(mask.density())
        with meter.phase("sparse"):
            return attention.block_sparse_attention(
                query, key, value, mask, block_size=self.block_size, scale=site.scale, key_mask=site.key_mask
            )

    @abstractmethod
    def tiles(self, query: Tensor, key: Tensor, value: Tensor, site: Site) -> BlockMask:
        """The tiles of this attention."""

    def best(self, scores: Tensor, site: Site) -> BlockMask:
        """The tiles of highest score [B, H, n, n] in every row, and those of the text."""
        return attention.select_blocks(scores, self.keep_ratio, forced=self.sink(scores, site))

    def sink(self, scores: Tensor, site: Site) -> Tensor:
        length = max(site.text.stop, self.length(site))
        return attention.text_blocks(length, length, site.text, block_size=self.block_size, device=scores.device)

    def length(self, site: Site) -> int:
        frames, rows, columns = site.grid or (0, 0, 0)
        return frames * rows * columns + len(site.text)

    def near(self, length: int, device: torch.device) -> Tensor:
        """[1, 1, n, n]: the nearer the diagonal the higher."""
        place = torch.arange(-(-length // self.block_size), device=device)
        return -(place[:, None] - place).abs().float()[None, None]


class Window(_Sparse):
    """The tiles nearest to the diagonal, for all heads alike: neighbours in the order frames, rows, columns."""

    def tiles(self, query: Tensor, key: Tensor, value: Tensor, site: Site) -> BlockMask:
        return self.best(self.near(query.shape[2], query.device), site)


@dataclass
class Fixed(_Sparse):
    """Tiles found beforehand on another prompt or seed, by layer: an offline search."""

    found: Mapping[str, BlockMask] | None = None

    def tiles(self, query: Tensor, key: Tensor, value: Tensor, site: Site) -> BlockMask:
        assert self.found is not None
        return self.found[site.layer]


class MInference(_Sparse):
    """Columns and diagonals, estimated anew in every attention from the last video queries (Jiang et al. 2024).

    A column's weight, or a diagonal's, is the sum of the attention of these queries in it; a tile counts as the better
    of its two, and the best tiles of the head are kept. The last queries of a video see diagonals on one side alone,
    so those of both sides go by their distance.
    """

    def tiles(self, query: Tensor, key: Tensor, value: Tensor, site: Site) -> BlockMask:
        length, block = query.shape[2], self.block_size
        last = length - len(site.text)
        first = max(0, last - PROBES)
        weights = _rows(query[:, :, first:last], key, site)  # [B, H, probes, L]
        n = -(-length // block)
        column = _by_tile(weights, block).sum(-2)  # [B, H, n]
        at = torch.arange(length, device=query.device) // block
        distance = (at[first:last, None] - at).abs()  # [probes, L], in tiles
        diagonal = torch.zeros(*weights.shape[:2], n, device=query.device)
        diagonal.index_add_(2, distance.flatten(), weights.flatten(2))
        place = torch.arange(n, device=query.device)
        by_distance = diagonal[..., (place[:, None] - place).abs()]
        scores = torch.maximum(column[..., None, :].expand_as(by_distance), by_distance)
        return attention.select_blocks(scores, self.keep_ratio, rule="global", forced=self.sink(scores, site))


class SparseVideoGen(_Sparse):
    """Each head is spatial or temporal, decided anew in every attention on a few queries (Xi et al. 2025).

    A spatial head sees the frames around its own and the first one: a window in the order frames, rows, columns. A
    temporal head sees its place and those around it in all frames: a window in the order rows, columns, frames, for
    which the tokens are put in that order. The kind whose output is nearer to the dense one on random queries wins.
    """

    def attend(self, query: Tensor, key: Tensor, value: Tensor, site: Site, meter: Meter) -> Tensor:
        if site.step <= self.warmup:
            return super().attend(query, key, value, site, meter)
        with meter.phase("selection"):
            spatial, temporal = self.tiles(query, key, value, site), self._temporal(query, site)
            order = self._order(query.shape[2], site)
            is_temporal = self._decide(query, key, value, site, spatial, temporal, order)  # [B, H]
            moved = [torch.where(is_temporal[..., None, None], x[:, :, order], x) for x in (query, key, value)]
            mask = BlockMask.of(torch.where(is_temporal[..., None, None], temporal.dense(), spatial.dense()))
        out = self.sparse(*moved, mask, site, meter)
        return torch.where(is_temporal[..., None, None], out[:, :, order.argsort()], out)

    def tiles(self, query: Tensor, key: Tensor, value: Tensor, site: Site) -> BlockMask:
        """Those of a spatial head."""
        assert site.grid is not None
        scores = self.near(query.shape[2], query.device).clone()
        first_frame = -(-site.grid[1] * site.grid[2] // self.block_size)
        scores[..., :first_frame] = 1.0
        return self.best(scores, site)

    def _temporal(self, query: Tensor, site: Site) -> BlockMask:
        return self.best(self.near(query.shape[2], query.device), site)

    def _order(self, length: int, site: Site) -> Tensor:
        """Places of tokens when the frame changes fastest; the text, behind the video, stays where it is."""
        assert site.grid is not None
        video = length - len(site.text)
        places = torch.arange(video).unflatten(0, site.grid).permute(1, 2, 0).flatten()
        return torch.cat([places, torch.arange(video, length)])

    def _decide(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        site: Site,
        spatial: BlockMask,
        temporal: BlockMask,
        order: Tensor,
    ) -> Tensor:
        """bool [B, H]: whether the temporal tiles come nearer to the dense output."""
        draw = seeds.generator(site.step, "probes", site.layer)
        video = query.shape[2] - len(site.text)
        rows = torch.randperm(video, generator=draw)[:PROBES]
        weights = _rows(query[:, :, rows], key, site)
        exact, block, back = weights @ value, self.block_size, order.argsort()
        errors = []
        for mask, places in ((spatial, torch.arange(query.shape[2])), (temporal, back)):
            at = places // block  # the tile in which a token lies
            kept = weights * mask.dense()[:, :, at[rows]][..., at]
            found = kept @ value / kept.sum(-1, keepdim=True).clamp_min(1e-20)
            errors.append((found - exact).square().mean((-2, -1)))
        return errors[1] < errors[0]


def _rows(query: Tensor, key: Tensor, site: Site) -> Tensor:
    """Attention of some queries [B, H, R, D] to all keys: [B, H, R, L], rows sum to 1."""
    scale = query.shape[-1] ** -0.5 if site.scale is None else site.scale
    logits = query.float() @ key.float().mT * scale
    if site.key_mask is not None:
        logits = logits.masked_fill(~site.key_mask[:, None, None], -torch.inf)
    return logits.softmax(-1)


def _by_tile(weights: Tensor, block: int) -> Tensor:
    """Sums over blocks of the last axis, the last of which may be short."""
    return torch.nn.functional.pad(weights, (0, -weights.shape[-1] % block)).unflatten(-1, (-1, block)).sum(-1)
