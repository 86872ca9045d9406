"""Which entries of a weight are trained: two bytes an entry."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

TILE = 128  # rows and columns of a tile; a place within one takes 14 bits
MOST = 2**31 - 1  # entries: tile pointers are int32


@dataclass(frozen=True, eq=False)
class Selection:
    """Chosen entries of a weight of `shape`, seen as a matrix [O, everything else] (one row if it has one dimension).

    The matrix is cut into tiles of 128 x 128, the last ones smaller. Entries come tile by tile, tiles from left to
    right and then down, and inside a tile likewise: this is the order of values, gradients and moments.

    offsets  int16 [k], 128 row + column within the tile: 0 .. 16383
    starts   int32 [tiles + 1], where the entries of each tile begin

    Make one with `from_mask` or `from_positions`.
    """

    shape: tuple[int, ...]
    offsets: Tensor
    starts: Tensor

    def __post_init__(self) -> None:
        rows, columns = tiles(self.shape)
        found = (self.offsets.dtype, self.starts.dtype, tuple(self.starts.shape), self.offsets.ndim)
        if found != (torch.int16, torch.int32, (rows * columns + 1,), 1) or self.offsets.device != self.starts.device:
            raise ValueError(
                f"Selection: got offsets {self.offsets.dtype} {list(self.offsets.shape)} and starts "
                f"{self.starts.dtype} {list(self.starts.shape)} for a weight of {list(self.shape)}; expected int16 [k] "
                f"and int32 [{rows * columns + 1}] on one device; make one with Selection.from_mask"
            )
        if not _in_order(self):  # a kernel would write elsewhere
            raise ValueError(
                f"Selection: got offsets or starts that do not fit a weight of {list(self.shape)}; expected starts "
                "that grow from 0 to k, and in each tile growing offsets within the weight; make one with "
                "Selection.from_mask"
            )

    @classmethod
    def from_mask(cls, mask: Tensor) -> Selection:
        """The entries where `mask`, bool of the weight's shape, is True; on its device.

        Raises TypeError if it is not bool, ValueError for more than 2^31 - 1 of them.
        """
        if mask.dtype != torch.bool:
            raise TypeError(
                f"Selection.from_mask: got {mask.dtype}; expected torch.bool, e.g. weight.abs() < threshold"
            )
        return _bucketed(mask.reshape(-1).nonzero()[:, 0], tuple(mask.shape))

    @classmethod
    def from_positions(cls, positions: Tensor, shape: tuple[int, ...]) -> Selection:
        """The entries at these places [k] of the flattened weight of `shape`, each once, in any order (int32, int64).

        Raises TypeError for another dtype, ValueError for places outside, repeated ones, or more than 2^31 - 1.
        """
        if positions.dtype not in (torch.int32, torch.int64) or positions.ndim != 1:
            raise TypeError(
                f"Selection.from_positions: got {positions.dtype} {list(positions.shape)}; expected int64 [k]"
            )
        positions, size = positions.long().sort().values, math.prod(shape)
        if len(positions) and not 0 <= int(positions[0]) <= int(positions[-1]) < size:
            raise ValueError(
                f"Selection.from_positions: got {int(positions[0])} .. {int(positions[-1])}; expected 0 .. {size - 1} "
                f"for a weight of {list(shape)}"
            )
        if bool((positions[1:] == positions[:-1]).any()):
            raise ValueError("Selection.from_positions: got a position twice; expected each once; call .unique()")
        return _bucketed(positions, tuple(shape))

    @property
    def count(self) -> int:
        """k, the number of chosen entries."""
        return len(self.offsets)

    @property
    def density(self) -> float:
        """Chosen entries over all, 0..1; 0 of a weight without entries."""
        return self.count / max(1, math.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of the index: 2 an entry and 4 a tile."""
        return self.offsets.nbytes + self.starts.nbytes

    @property
    def device(self) -> torch.device:
        """Where it lies; weights and gradients must lie there, too."""
        return self.offsets.device

    def positions(self) -> Tensor:
        """int64 [k], places in the flattened weight in the order of the entries (not sorted: tile after tile)."""
        return positions(self.offsets, self.starts, self.shape)

    def mask(self) -> Tensor:
        """bool of the weight's shape, True where chosen."""
        out = torch.zeros(math.prod(self.shape), dtype=torch.bool, device=self.device)
        return out.index_fill_(0, self.positions(), True).view(self.shape)

    def gather(self, weight: Tensor) -> Tensor:
        """The chosen entries [k] of a tensor of the weight's shape, in its dtype; differentiable.

        Raises ValueError for another shape or device.
        """
        self._require("gather", weight)
        return weight.reshape(-1)[self.positions()]

    def scatter_(self, weight: Tensor, values: Tensor) -> Tensor:
        """Writes values [k] (converted to its dtype) to the chosen entries of `weight`, in place; returns it.

        Raises ValueError for another shape or device.
        """
        self._require("scatter_", weight)
        if values.shape != (self.count,) or values.device != self.device:
            raise ValueError(
                f"Selection.scatter_: got values {list(values.shape)} on {values.device}; expected [{self.count}] on "
                f"{self.device}"
            )
        return put_(weight, self.positions(), values)

    def to(self, device: torch.device | str) -> Selection:
        """The same entries, indexed on another device."""
        return replace(self, offsets=self.offsets.to(device), starts=self.starts.to(device))

    def __eq__(self, other: object) -> bool:
        """Whether the same entries of the same shape are chosen, on the same device."""
        if not isinstance(other, Selection):
            return NotImplemented
        if self.shape != other.shape or self.device != other.device:
            return False
        return torch.equal(self.starts, other.starts) and torch.equal(self.offsets, other.offsets)

    __hash__ = None  # pyright: ignore[reportAssignmentType]  # equality reads tensors

    def __repr__(self) -> str:
        return f"Selection({self.count} of {list(self.shape)}, {self.density:.3%}, {self.device})"

    def _require(self, what: str, weight: Tensor) -> None:
        if tuple(weight.shape) != self.shape or weight.device != self.device:
            raise ValueError(
                f"Selection.{what}: got {list(weight.shape)} on {weight.device}; expected {list(self.shape)} on "
                f"{self.device}"
            )


def matrix(shape: tuple[int, ...] | torch.Size) -> tuple[int, int]:
    """(rows, columns) of the matrix that a weight of this shape is seen as."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def tiles(shape: tuple[int, ...] | torch.Size) -> tuple[int, int]:
    """Rows and columns of tiles."""
    rows, columns = matrix(shape)
    return -(-rows // TILE), -(-columns // TILE)


def positions(offsets: Tensor, starts: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """See Selection.positions."""
    across, columns = tiles(shape)[1], matrix(shape)[1]
    each = torch.arange(len(starts) - 1, device=offsets.device)
    tile = each.repeat_interleave(starts.diff(), output_size=len(offsets))
    places = offsets.long()
    row = tile // max(across, 1) * TILE + places // TILE
    return row * columns + tile % max(across, 1) * TILE + places % TILE


def put_(weight: Tensor, flat: Tensor, values: Tensor) -> Tensor:
    """weight, of any strides, with values [k] at these places of its flattened form, in place."""
    with torch.no_grad():
        if weight.is_contiguous():
            weight.view(-1).index_copy_(0, flat, values.to(weight.dtype))
        else:
            weight.index_put_(torch.unravel_index(flat, weight.shape), values.to(weight.dtype))
    return weight


def _in_order(selection: Selection) -> bool:
    offsets, starts = selection.offsets, selection.starts
    if int(starts[0]) != 0 or int(starts[-1]) != len(offsets) or bool((starts.diff() < 0).any()):
        return False
    (rows, columns), across = matrix(selection.shape), max(tiles(selection.shape)[1], 1)
    tile = torch.arange(len(starts) - 1, device=starts.device).repeat_interleave(starts.diff())
    inside = (offsets >= 0) & (tile // across * TILE + offsets // TILE < rows)
    inside &= tile % across * TILE + offsets % TILE < columns
    return bool((inside & (tile * TILE**2 + offsets).diff(prepend=tile.new_full((1,), -1)).gt(0)).all())


def _bucketed(flat: Tensor, shape: tuple[int, ...]) -> Selection:
    """Of sorted places in the flattened weight."""
    if len(flat) > MOST:
        raise ValueError(f"Selection: got {len(flat)} entries; expected at most {MOST}; split the weight")
    rows, across = tiles(shape)
    columns = max(matrix(shape)[1], 1)
    row, column = flat // columns, flat % columns
    tile = row // TILE * across + column // TILE
    # one number that sorts by tile, then by row and column within it
    order = (tile * TILE**2 + row % TILE * TILE + column % TILE).sort().values
    starts = torch.zeros(rows * across + 1, dtype=torch.int32, device=flat.device)
    starts[1:] = torch.bincount(order // TILE**2, minlength=rows * across).cumsum(0)
    return Selection(shape, (order % TILE**2).to(torch.int16), starts)
