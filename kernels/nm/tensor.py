"""The packed formats: kept values and their places, sixteen rows interleaved, or for many rows at once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels import _dispatch
from kernels._load import native
from kernels.nm import reference

BLOCK = 16  # rows that are interleaved, as in row.h
NIBBLES = 16  # the largest m whose places are stored as nibbles
LARGEST = 256  # m
VECTORS = (1, 16, 32, 64, 128, 256)  # rows that share their places; 16 is the least that tensor cores take


@dataclass(frozen=True)
class NMTensor:
    """A weight [O, K] of which n of every m neighbours along K are kept.

    values  [ceil(O/16), K/m, n, 16], float32 or bfloat16 (float64 for checks): sixteen rows beside each other, as a
            product reads them; rows behind the last one hold zeros
    places  uint8, where in its group a value stands. Up to m = 16 nibbles [ceil(O/16), K/m, n, 8], byte i holding row i
            in its low and row i + 8 in its high half; above that bytes [ceil(O/16), K/m, n, 16]
    shape   (O, K)
    vector  rows that share their places. Above 1 both lie as a dense matrix of the kept columns would: values
            [O, K/m, n], and places, a byte each, [ceil(O/vector), K/m, n]

    A value that is exactly zero counts as not kept: it gets no gradient. Make one with `kernels.nm.pack`.
    """

    values: Tensor
    places: Tensor
    shape: tuple[int, int]
    n: int
    m: int
    vector: int = 1

    def __post_init__(self) -> None:
        require_vector(self.vector, "NMTensor")
        rows, columns = self.shape
        groups = (columns // self.m, self.n)
        head = (-(-rows // BLOCK), *groups)
        expected = (*head, BLOCK), (*head, BLOCK // 2 if self.m <= NIBBLES else BLOCK)
        if self.vector > 1:
            expected = (rows, *groups), (-(-rows // self.vector), *groups)
        found = tuple(self.values.shape), tuple(self.places.shape)
        if found != expected or columns % self.m:
            raise ValueError(
                f"kernels.nm.NMTensor: got values {list(found[0])} and places {list(found[1])}; expected "
                f"{list(expected[0])} and {list(expected[1])} for a {self.pattern} weight of {list(self.shape)}"
            )
        if self.places.dtype != torch.uint8:
            raise TypeError(f"kernels.nm.NMTensor: got places of {self.places.dtype}; expected torch.uint8")

    @property
    def pattern(self) -> str:
        """As 2:8, or 2:8x32 where 32 rows share their places."""
        return pattern(self.n, self.m, self.vector)

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
        if self.values.requires_grad or self.vector > 1 or not _is_native(self.values):
            groups = to_groups(self.values, self.places, self.m, self.shape[0], self.vector)
            return reference.unpack(*groups, self.m)
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
        return replace(self, values=values, places=self.places.to(device=device))


def packed_from(weight: Tensor, kept: Tensor, n: int, m: int, vector: int) -> NMTensor:
    """See kernels.nm.pack, which has checked the arguments. Raises ValueError where a group keeps more than n, or the
    rows of a vector differ."""
    if vector > 1:
        return _shared_from(weight.detach(), kept, n, m, vector)
    rows, columns = weight.shape
    head = (-(-rows // BLOCK), columns // m, n)
    if _is_native(weight):
        values = torch.empty(*head, BLOCK, dtype=weight.dtype)
        places = torch.empty(*head, BLOCK // 2 if m <= NIBBLES else BLOCK, dtype=torch.uint8)
        inputs = bits(weight.detach().contiguous()), kept.contiguous().view(torch.uint8)
        fits = native().nm_pack(*inputs, m, bits(values), places, torch.get_num_threads())
    else:
        fits = _fits(kept, n, m)
        values, index = reference.pack(weight.detach(), kept, n, m)
        values, places = from_groups(values, head[0]), _stored(from_groups(index, head[0]), m)
    _require_fit(fits, n, m)
    return NMTensor(values, places, (rows, columns), n, m)


def pattern(n: int, m: int, vector: int) -> str:
    """The name of a pattern: 2:8, or 2:8x32 where 32 rows share their places."""
    return f"{n}:{m}x{vector}" if vector > 1 else f"{n}:{m}"


def require_vector(vector: int, what: str) -> None:
    """Raises ValueError for a number of rows that cannot share their places."""
    if vector not in VECTORS:
        raise ValueError(f"kernels.nm.{what}: got vectors of {vector} rows; expected one of {VECTORS}")


def is_shared(kept: Tensor, vector: int) -> bool:
    """Whether every `vector` rows of a mask [O, K] are the same; the last ones may be fewer."""
    return bool((kept == kept[::vector].repeat_interleave(vector, 0)[: len(kept)]).all())


def to_groups(values: Tensor, places: Tensor, m: int, rows: int, vector: int = 1) -> tuple[Tensor, Tensor]:
    """Values and places as `reference` has them, [rows, K/m, n] both, places as int64."""
    if vector > 1:
        return values, places.long().repeat_interleave(vector, 0)[:rows]
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


def _shared_from(weight: Tensor, kept: Tensor, n: int, m: int, vector: int) -> NMTensor:
    if not is_shared(kept, vector):
        raise ValueError(
            f"kernels.nm.pack: got a mask that differs within {vector} rows; expected the same columns in every vector "
            f"of them, e.g. nm.mask(weight, n, m, vector={vector})"
        )
    first = kept[::vector]
    _require_fit(_fits(first, n, m), n, m)
    filled, places = reference.pack(first.float(), first, n, m)  # 1 where a slot holds a weight, 0 where a zero
    filled, index = (slots.repeat_interleave(vector, 0)[: len(weight)] for slots in (filled, places))
    values = weight.unflatten(1, (-1, m)).gather(-1, index).where(filled > 0, 0)
    return NMTensor(values, places.to(torch.uint8), (weight.shape[0], weight.shape[1]), n, m, vector)


def _fits(kept: Tensor, n: int, m: int) -> bool:
    return bool((kept.unflatten(1, (-1, m)).sum(dim=-1) <= n).all())


def _require_fit(fits: bool, n: int, m: int) -> None:
    if not fits:
        raise ValueError(f"kernels.nm.pack: got a mask with more than {n} of {m} kept; expected nm.mask(weight, n, m)")


def _rows(blocked: Tensor, rows: int) -> Tensor:
    return blocked.movedim(-1, 1).flatten(0, 1)[:rows]


def _stored(places: Tensor, m: int) -> Tensor:
    places = places.to(torch.uint8)
    return places[..., :8] | places[..., 8:] << 4 if m <= NIBBLES else places


def _is_native(weight: Tensor) -> bool:
    dtype = torch.float32 if weight.dtype == torch.bfloat16 else weight.dtype
    return _dispatch.backend_for(weight.device, dtype, "nm") == _dispatch.CPU
