"""What `kernels.bench` times for N:M sparsity: packed products and mask searches beside torch's dense ones.

`4096^2 x 1` is one token through a large layer, where reading the weight is all that counts: the ratio can be held
against the ratio of bytes, which the note gives. `1024^2 x 256` is a batch, where arithmetic counts. Each beside dense
float32, which all ratios are of, and dense bfloat16, which a user would take first where the processor has it. torch's
CSR product is the other thing at hand. Of vectors, whose rows share their places, the batch alone. Gradients: of the
input, and of the kept weights alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import nm
from kernels._load import native
from kernels.bench import CORES, Case, Contender, other_isas, with_isa
from kernels.nm import ops, reference

PEERS: tuple[str, ...] = ()
PATTERNS = ((2, 4), (1, 4), (2, 8), (1, 8), (1, 16), (1, 32))
PRODUCTS = ((4096, 1), (1024, 256))  # rows and columns of the weight, tokens
TRANSPOSABLE = ((2, 4), (2, 8))  # all tiles are tried for the first, the second is a flow problem
VECTOR = 32  # rows that share their places
CORNER = 64  # rows and columns that the slow reference searches
SEARCHED = 4096  # rows and columns: 16.8 million weights


def cases(quick: bool) -> Iterator[Case]:
    """Products on one and two threads, gradients and mask searches; with `quick` of one small pattern."""
    patterns = PATTERNS[:1] if quick else PATTERNS
    for size, tokens in [(64, 1), (64, 20)] if quick else PRODUCTS:
        for n, m in patterns:
            for threads in (1, 2)[:CORES]:
                yield _product(size, tokens, n, m, threads)
    size, tokens = (64, 20) if quick else PRODUCTS[1]
    for n, m in patterns[:3]:
        yield _product_of_vectors(size, tokens, n, m)
    for n, m in patterns:
        yield _input_gradient(size, tokens, n, m)
        yield _weight_gradient(size, tokens, n, m)
    for n, m in patterns:
        yield _search(64 if quick else SEARCHED, n, m)
    for size in (64,) if quick else (1024, SEARCHED):
        for n, m in TRANSPOSABLE[:1] if quick else TRANSPOSABLE:
            yield _transposable_search(size, n, m)


def _weight(size: int, n: int, m: int) -> Tensor:
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    return weight * nm.mask(weight, n, m)


def _tokens(tokens: int, size: int, seed: int) -> Tensor:
    return torch.randn(tokens, size, generator=torch.Generator().manual_seed(seed))


def _product(size: int, tokens: int, n: int, m: int, threads: int) -> Case:
    weight, x = _weight(size, n, m), _tokens(tokens, size, 1)
    narrow = weight.bfloat16(), x.bfloat16()
    contenders = [
        Contender("dense float32", partial(F.linear, x, weight), _same, threads),
        Contender("dense bfloat16", partial(F.linear, narrow[1], narrow[0]), _same, threads),
    ]
    for dtype in (torch.float32, torch.bfloat16):
        packed = nm.pack(weight, n, m, dtype=dtype)
        run = partial(nm.linear, x, packed, dense=False)
        note = f"{weight.nbytes / packed.nbytes:.2f} times fewer bytes than dense float32"
        name = f"ours {str(dtype).removeprefix('torch.')}"
        contenders.append(Contender(name, run, _same, threads, note=note, ours=True))
        if threads == 1:
            contenders += [
                Contender(f"{name} {isa}", partial(with_isa, isa, run), _same, ours=True) for isa in other_isas()
            ]
        if packed.dtype == torch.bfloat16 and native().nm_takes_bfloat16(n, m, tokens):
            run = partial(nm.linear, narrow[1], packed, dense=False)
            contenders.append(Contender(f"{name} in tiles", run, _same, threads, note="bfloat16 x too", ours=True))
    sparse = weight.to_sparse_csr()
    contenders.append(Contender("torch CSR", lambda: (sparse @ x.mT).mT, _same, threads))
    return Case(
        name=f"{n}:{m} {size}^2 x {tokens}" + (", 2 threads" if threads == 2 else ""),
        call="linear",
        contenders=contenders,
        baseline="dense float32",
        exact=lambda: F.linear(x.double(), weight.double()),
        data_bytes=weight.nbytes + x.nbytes + 4 * tokens * size,
    )


def _product_of_vectors(size: int, tokens: int, n: int, m: int) -> Case:
    weight, x = _tokens(size, size, 0), _tokens(tokens, size, 1)
    weight = weight * nm.mask(weight, n, m, vector=VECTOR)
    packed = nm.pack(weight, n, m, vector=VECTOR)
    note = f"{weight.nbytes / packed.nbytes:.2f} times fewer bytes than dense float32"
    run = partial(nm.linear, x, packed, dense=False)
    return Case(
        name=f"{packed.pattern} {size}^2 x {tokens}",
        call="linear of vectors",
        contenders=[
            Contender("dense float32", partial(F.linear, x, weight), _same),
            Contender("ours float32", run, _same, note=note, ours=True),
        ],
        baseline="dense float32",
        exact=lambda: F.linear(x.double(), weight.double()),
        data_bytes=weight.nbytes + x.nbytes + 4 * tokens * size,
    )


def _input_gradient(size: int, tokens: int, n: int, m: int) -> Case:
    weight, dy = _weight(size, n, m), _tokens(tokens, size, 2)
    packed = nm.pack(weight, n, m)
    run = partial(ops.input_gradient, dy, packed)
    return Case(
        name=f"{n}:{m} {size}^2 x {tokens}",
        call="input gradient",
        contenders=[
            Contender("dense float32", lambda: dy @ weight, _same),
            Contender("ours float32", run, _same, note="lists the weights by column in each call", ours=True),
        ],
        baseline="dense float32",
        exact=lambda: dy.double() @ weight.double(),
        data_bytes=weight.nbytes + 2 * dy.nbytes,
    )


def _weight_gradient(size: int, tokens: int, n: int, m: int) -> Case:
    weight, x, dy = _weight(size, n, m), _tokens(tokens, size, 1), _tokens(tokens, size, 2)
    packed = nm.pack(weight, n, m)

    def dense(values: Tensor) -> Tensor:
        return nm.NMTensor(values, packed.places, packed.shape, n, m).to_dense()

    return Case(
        name=f"{n}:{m} {size}^2 x {tokens}",
        call="weight gradient",
        contenders=[
            Contender("dense float32", lambda: dy.mT @ x, lambda slope: slope * (weight != 0)),
            Contender("ours float32", partial(ops.weight_gradient, dy, x, packed), dense, note="kept alone", ours=True),
        ],
        baseline="dense float32",
        exact=lambda: (dy.double().mT @ x.double()) * (weight != 0),
        data_bytes=weight.nbytes + x.nbytes + dy.nbytes,
    )


def _search(size: int, n: int, m: int) -> Case:
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    contenders = [Contender("torch topk", partial(_by_topk, weight, n, m), _same)]
    contenders += [
        Contender("ours", partial(nm.mask, weight, n, m), _same, threads, ours=True) for threads in (1, 2)[:CORES]
    ]
    return Case(
        name=f"{n}:{m} {size}^2",
        call="mask",
        contenders=contenders,
        baseline="torch topk",
        exact=lambda: _by_topk(weight, n, m),
        data_bytes=weight.nbytes + weight.numel(),
    )


def _transposable_search(size: int, n: int, m: int) -> Case:
    """Beside the search along the rows alone: it is what the second axis costs. The error is of the magnitude
    that is kept in a corner, of which the reference finds the optimum."""
    corner = (slice(CORNER), slice(CORNER))
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0))

    def kept(mask: Tensor) -> Tensor:
        return weight[corner].abs().double().where(mask[corner], 0).sum()

    return Case(
        name=f"{n}:{m} {size}^2",
        call="transposable mask",
        contenders=[
            Contender("ours along rows", partial(nm.mask, weight, n, m), None, note="not N:M in the transpose"),
            Contender("ours", partial(nm.mask, weight, n, m, transposable=True), kept, ours=True),
        ],
        baseline="ours along rows",
        exact=lambda: kept(reference.transposable_mask(weight[corner], n, m)),
        data_bytes=weight.nbytes + weight.numel(),
    )


def _by_topk(weight: Tensor, n: int, m: int) -> Tensor:
    groups = weight.abs().unflatten(-1, (-1, m))
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.topk(n, dim=-1).indices, True).flatten(-2)


def _same(out: Tensor) -> Tensor:
    return out
