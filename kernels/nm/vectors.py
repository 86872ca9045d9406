"""Products on the CPU of weights whose rows share their places, in vectors: the kept inputs of a vector are gathered
once, and what follows is a dense product by torch's BLAS of n/m of the size.

x [T, K] and dy [T, O] are float32, values [O, K/m, n] and places [ceil(O/vector), K/m, n] as in `NMTensor`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["input_gradient", "linear", "weight_gradient"]


def linear(x: Tensor, values: Tensor, places: Tensor, m: int, vector: int, bias: Tensor | None) -> Tensor:
    """y [T, O]; bias [O]."""
    inputs = x.mT.contiguous()  # so that a column that is gathered is one piece of memory
    out = x.new_empty(len(values), len(x))
    for rows, columns in _vectors(values, places, m, vector):
        torch.mm(_matrix(values[rows], x), inputs[columns], out=out[rows])
    return (out if bias is None else out.add_(bias[:, None])).mT.contiguous()


def input_gradient(dy: Tensor, values: Tensor, places: Tensor, m: int, vector: int) -> Tensor:
    """dy W [T, K]. The vectors' parts are added in their order."""
    slopes = dy.mT.contiguous()
    out = dy.new_zeros(values.shape[1] * m, len(dy))
    for rows, columns in _vectors(values, places, m, vector):
        out.index_add_(0, columns, _matrix(values[rows], dy).mT @ slopes[rows])
    return out.mT.contiguous()


def weight_gradient(dy: Tensor, x: Tensor, values: Tensor, places: Tensor, m: int, vector: int) -> Tensor:
    """dy^T x at the kept entries, laid out as values, in the dtype of x."""
    slopes, inputs = dy.mT.contiguous(), x.mT.contiguous()
    out = x.new_empty(len(values), values.shape[1] * values.shape[2])
    for rows, columns in _vectors(values, places, m, vector):
        torch.mm(slopes[rows], inputs[columns].mT, out=out[rows])
    return out.view(values.shape)


def _vectors(values: Tensor, places: Tensor, m: int, vector: int) -> Iterator[tuple[slice, Tensor]]:
    """The rows of each vector, and the columns that they keep in the order of the values."""
    first = torch.arange(0, places.shape[1] * m, m)[:, None]
    columns = (places.long() + first).flatten(1)
    for index in range(len(places)):
        yield slice(index * vector, min((index + 1) * vector, len(values))), columns[index]


def _matrix(values: Tensor, like: Tensor) -> Tensor:
    return values.flatten(1).to(like.dtype)
