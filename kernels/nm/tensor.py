"""The packed format: kept values and their places, sixteen rows interleaved."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import _dispatch
from kernels._load import native
from kernels.nm import reference

BLOCK = 16  # rows that are interleaved, as in row.h
NIBBLES = 16  # the largest m whose places are stored as nibbles
LARGEST = 256  # m


@dataclass(frozen=True)
class NMTensor:
    """A weight [O, K] of which n of every m neighbours along K are kept.

    values  [ceil(O/16), K/m, n, 16], float32 or bfloat16 (float64 for checks): sixteen rows beside each other, as a
            product reads them; rows behind the last one hold zeros
    places  uint8, where in its group a value stands. Up to m = 16 nibbles [ceil(O/16), K/m, n, 8], byte i holding row i
            in its low and row i + 8 in its high half; above that bytes [ceil(O/16), K/m, n, 16]
    shape   (O, K)

    A value that is exactly zero counts as not kept: it gets no gradient. Make one with `kernels.nm.pack`.
    """

    values: Tensor
    places: Tensor
    shape: tuple[int, int]
    n: int
    m: int

    def __post_init__(self) -> None:
        rows, columns = self.shape
        head = (-(-rows // BLOCK), columns // self.m, self.n)
        expected = (*head, BLOCK), (*head, BLOCK // 2 if self.m <= NIBBLES else BLOCK)
        found = tuple(self.values.shape), tuple(self.places.shape)
        if found != expected or columns % self.m:
            raise ValueError(
                f"kernels.nm.NMTensor: got values {list(found[0])} and places {list(found[1])}; expected "
                f"{list(expected[0])} and {list(expected[1])} for a {self.n}:{self.m} weight of {list(self.shape)}"
            )
        if self.places.dtype != torch.uint8:
            raise TypeError(f"kernels.nm.NMTensor: got places of {self.places.dtype}; expected torch.uint8")

    @property
    def nbytes(self) -> int:
        """Bytes of values and places."""
        return self.values.nbytes + self.places.nbytes

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    def to_dense(self) -> Tensor:
        """The weight [O, K] with zeros where nothing is kept; differentiable by `values`."""
        if self.values.requires_grad or not _is_native(self.values):
            return reference.unpack(*to_groups(self.values, self.places, self.m, self.shape[0]), self.m)
        out = torch.empty(self.shape, dtype=self.dtype)
        native().nm_unpack(bits(self.values), self.places, self.m, bits(out), torch.get_num_threads())
        return out

    def to_semi_structured(self) -> Tensor:
        """torch's 2:4 tensor for CUDA (float16, bfloat16 or int8 weights on the device's own terms).

        It is a copy in torch's own format, for `torch.nn.functional.linear` with an input of the same dtype, and meant
        for many tokens.

        Raises ValueError for another pattern than 2:4, and for a weight that is not on a CUDA device.
        """
        if (self.n, self.m) != (2, 4) or not self.values.is_cuda:
            raise ValueError(
                f"kernels.nm.NMTensor.to_semi_structured: got {self.n}:{self.m} on {self.values.device}; expected 2:4 "
                "on a CUDA device, which is all that torch's semi-structured kernels serve"
            )
        return torch.sparse.to_sparse_semi_structured(self.to_dense())

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> NMTensor:
        """The same weight in another dtype or on another device."""
        values = self.values.to(device=device, dtype=dtype)
        return NMTensor(values, self.places.to(device=device), self.shape, self.n, self.m)


def packed_from(weight: Tensor, kept: Tensor, n: int, m: int) -> NMTensor:
    """See kernels.nm.pack, which has checked the arguments. Raises ValueError where a group keeps more than n."""
    rows, columns = weight.shape
    head = (-(-rows // BLOCK), columns // m, n)
    if _is_native(weight):
        values = torch.empty(*head, BLOCK, dtype=weight.dtype)
        places = torch.empty(*head, BLOCK // 2 if m <= NIBBLES else BLOCK, dtype=torch.uint8)
        inputs = bits(weight.detach().contiguous()), kept.contiguous().view(torch.uint8)
        fits = native().nm_pack(*inputs, m, bits(values), places, torch.get_num_threads())
    else:
        fits = bool((kept.unflatten(1, (-1, m)).sum(dim=-1) <= n).all())
        values, index = reference.pack(weight.detach(), kept, n, m)
        values, places = from_groups(values, head[0]), _stored(from_groups(index, head[0]), m)
    if not fits:
        raise ValueError(f"kernels.nm.pack: got a mask with more than {n} of {m} kept; expected nm.mask(weight, n, m)")
    return NMTensor(values, places, (rows, columns), n, m)


def to_groups(values: Tensor, places: Tensor, m: int, rows: int) -> tuple[Tensor, Tensor]:
    """Values and places as `reference` has them, [rows, K/m, n] both, places as int64."""
    if m <= NIBBLES:
        places = torch.cat([places & 15, places >> 4], dim=-1)
    return _rows(values, rows), _rows(places, rows).long()


def from_groups(groups: Tensor, blocks: int) -> Tensor:
    """[O, K/m, n] as [blocks, K/m, n, 16], zeros behind the last row."""
    padded = torch.nn.functional.pad(groups, (0, 0, 0, 0, 0, blocks * BLOCK - len(groups)))
    return padded.unflatten(0, (blocks, BLOCK)).movedim(1, -1).contiguous()


def bits(values: Tensor) -> Tensor:
    """bfloat16 as its bits, which is how it travels to the kernels; float32 as it is."""
    return values.view(torch.uint16) if values.dtype == torch.bfloat16 else values


def _rows(blocked: Tensor, rows: int) -> Tensor:
    return blocked.movedim(-1, 1).flatten(0, 1)[:rows]


def _stored(places: Tensor, m: int) -> Tensor:
    places = places.to(torch.uint8)
    return places[..., :8] | places[..., 8:] << 4 if m <= NIBBLES else places


def _is_native(weight: Tensor) -> bool:
    dtype = torch.float32 if weight.dtype == torch.bfloat16 else weight.dtype
    return _dispatch.backend_for(weight.device, dtype, "nm") == _dispatch.CPU
