"""Checks and timings of kernels.attention on a GPU.

Timed beside torch's own dense attention (which picks the fastest it has for the chip) and FlexAttention on the same
tiles, at lengths up to a video of 119,056 tokens. `random`: each row of tiles keeps others; `alike`: two rows
at a time keep the same, about as neighbours in a video do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import attention
from kernels.attention import BlockMask, ops, reference
from pipelines.gpu.report import Check, Timing, call_times, error, measured, quartiles

# |error| / |exact|: of float32 sums of products, exponentials among them; of gradients, which take differences; and of
# results that are 16 bits wide, whose last bit a GPU rounds and the interpreter cuts off
WORST_ERROR = {torch.float32: 3e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}
WORST_SUM = 3e-6

NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


Call = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """Queries [batch, heads, queries, dim], keys with their own heads, and a random mask over tiles."""

    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    dim: int
    block: int
    density: float
    padding: bool = False

    def __str__(self) -> str:
        padded = ", padded" if self.padding else ""
        sharing = f"{self.heads}/{self.key_heads}"
        return f"{self.batch}x{sharing}x{self.queries}x{self.keys} D{self.dim} b{self.block}{padded}"


TINY = (Case(1, 2, 1, 37, 50, 5, 16, 0.6, True), Case(1, 1, 1, 70, 64, 16, 64, 0.7))
CASES = (
    *TINY,
    Case(2, 4, 2, 1000, 1100, 64, 64, 0.4, True),
    Case(1, 4, 4, 4200, 4160, 64, 64, 0.7),  # long enough for pairs of rows
    Case(1, 2, 1, 4096, 4096, 128, 64, 0.2),
    Case(1, 2, 2, 700, 900, 128, 128, 0.4, True),
    Case(1, 2, 2, 700, 900, 256, 128, 0.4),
    Case(2, 3, 1, 333, 444, 72, 32, 0.3),
    Case(1, 2, 2, 300, 300, 1, 64, 0.5),
)
LENGTHS = (8192, 16384, 32768, 119_056)
DIMS = (64, 128)
DENSITIES = (1.0, 0.2, 0.1)
HEADS = 24  # as HunyuanVideo has
BLOCK = 64


def checks(device: torch.device, tiny: bool) -> Iterator[Check]:
    """Outputs, LSE, gradients and scores against float64; padding, and the same bits again."""
    dtypes = (torch.float32, torch.bfloat16) if tiny else tuple(NAMES)  # the CPU has no float16 here
    for case in TINY if tiny else CASES:
        for dtype in dtypes:
            yield from _of_case(device, case, dtype)


def timings(device: torch.device, repeats: int) -> Iterator[Timing]:
    """Attention in bfloat16 at every length, head dim and density; search and gradients of the middle one."""
    for dim in DIMS:
        for length in LENGTHS:
            yield from _attentions(device, length, dim, repeats)


def _of_case(device: torch.device, case: Case, dtype: torch.dtype) -> Iterator[Check]:
    generator = torch.Generator().manual_seed(0)

    def noise(heads: int, length: int) -> Tensor:
        return torch.randn(case.batch, heads, length, case.dim, generator=generator).to(device, dtype)

    q, d_out = noise(case.heads, case.queries), noise(case.heads, case.queries)
    k, v = noise(case.key_heads, case.keys), noise(case.key_heads, case.keys)
    rows, columns = ops.tiles(case.queries, case.block), ops.tiles(case.keys, case.block)
    mask = torch.rand(1, case.heads, rows, columns, generator=generator) < case.density
    mask[:, :, 0] = False  # rows with nothing to attend to
    mask = mask.to(device)
    key_mask = (torch.rand(case.batch, case.keys, generator=generator) < 0.8).to(device) if case.padding else None
    if key_mask is not None:
        k, v = (x.masked_fill(~key_mask[:, None, :, None], torch.nan) for x in (k, v))
    d_lse = torch.randn(q.shape[:3], generator=generator).to(device)

    call: Call = partial(attention.block_sparse_attention, block_size=case.block, key_mask=key_mask, return_lse=True)
    exact = _exact(case, (q, k, v), mask, key_mask, d_out, d_lse)
    everything = _exact(case, (q, k, v), torch.ones_like(mask), key_mask)

    def slopes() -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(call(leaves[0], leaves[1], leaves[2], mask), leaves, (d_out, d_lse))

    def unrepeated() -> float:
        pairs = [*zip(call(q, k, v, mask), call(q, k, v, mask), strict=True), *zip(slopes(), slopes(), strict=True)]
        return float(sum((a != b).sum() for a, b in pairs))

    def searched() -> attention.Search:
        return attention.search(q, k, v, block_size=case.block, key_mask=key_mask)

    def cached() -> Tensor:
        return attention.block_scores(q, k, everything[1].float(), block_size=case.block, key_mask=key_mask)

    worst = WORST_ERROR[dtype]
    measures: dict[str, tuple[Callable[[], float], float]] = {
        "output": (lambda: error(call(q, k, v, mask)[0], exact[0]), worst),
        "LSE": (lambda: _error_of_sums(call(q, k, v, mask)[1], exact[1]), WORST_SUM),
        "gradients": (lambda: max(error(a, b) for a, b in zip(slopes(), exact[2:], strict=True)), 2 * worst),
        "searched output": (lambda: error(searched().out, everything[0]), worst),
        "scores": (lambda: error(searched().scores, everything[2]), WORST_SUM),
        "scores of a known LSE": (lambda: error(cached(), everything[2]), WORST_SUM),
        "not the same again": (unrepeated, 0.0),
    }
    for name, (measure, limit) in measures.items():
        yield measured("attn", f"{case}, {NAMES[dtype]}", name, measure, limit)


def _exact(
    case: Case,
    tensors: tuple[Tensor, Tensor, Tensor],
    mask: Tensor,
    key_mask: Tensor | None,
    d_out: Tensor | None = None,
    d_lse: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """In float64: output, LSE, and gradients; or the scores, where no gradient comes in."""
    present = 1.0 if key_mask is None else key_mask[:, None, :, None]
    q, k, v = (x.double() for x in tensors)
    k, v = (x.nan_to_num() * present for x in (k, v))
    every = mask.expand(case.batch, -1, -1, -1)
    keep = reference.token_mask(every, key_mask, (case.queries, case.keys), case.block)
    scale = case.dim**-0.5
    out, lse = reference.block_sparse_attention(q, k, v, keep, scale)
    if d_out is None or d_lse is None:
        return out, lse, reference.block_scores(q, k, lse, key_mask, scale, case.block)
    return out, lse, *reference.gradients(q, k, v, keep, scale, out, lse, d_out.double(), d_lse.double())


def _error_of_sums(found: Tensor, exact: Tensor) -> float:
    """The error of an LSE; infinite where an empty row is not one."""
    if not torch.equal(found == -torch.inf, exact == -torch.inf):
        return torch.inf
    return error(found.nan_to_num(neginf=0.0), exact.nan_to_num(neginf=0.0))


def _attentions(device: torch.device, length: int, dim: int, repeats: int) -> Iterator[Timing]:
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, HEADS, length, dim)
    q, k, v = (torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(3))
    case, whole = f"{length} D{dim}", 4 * length**2 * dim * HEADS / 1e9
    dense = _timed(case, "torch SDPA", partial(F.scaled_dot_product_attention, q, k, v), repeats, whole)
    yield dense
    for density in DENSITIES:
        for kind in ("random", "alike") if density < 1 else ("",):
            mask = _mask(length, density, kind == "alike", generator)
            compact = BlockMask.of(mask)
            compact.lists()  # which are remembered
            named, work = f"{case} {density} {kind}".strip(), whole * float(mask.float().mean())
            call = partial(attention.block_sparse_attention, q, k, v, compact)
            yield _timed(named, "sparse", call, repeats, work, dense)
            if kind != "alike":
                yield from _flex(named, q, k, v, mask, repeats, work, dense)
            if kind == "random" and density == DENSITIES[1] and length == LENGTHS[2]:
                yield from _backward(case, named, (q, k, v), compact, repeats, (2.5 * whole, 2.5 * work))
    search = attention.search(q, k, v)
    yield _timed(case, "search", partial(attention.search, q, k, v), repeats, 1.5 * whole, dense)
    scores = partial(attention.block_scores, q, k, search.lse)
    yield _timed(case, "scores of a known LSE", scores, repeats, whole / 2, dense)


def _backward(
    case: str, named: str, tensors: tuple[Tensor, ...], mask: BlockMask, repeats: int, work: tuple[float, float]
) -> Iterator[Timing]:
    """Gradients, dense and sparse."""
    q, k, v = (x.clone().requires_grad_() for x in tensors)

    def back(out: Tensor | Any) -> Call:
        return partial(torch.autograd.grad, [out], [q, k, v], [torch.ones_like(out)], retain_graph=True)

    by_torch = back(F.scaled_dot_product_attention(q, k, v))
    dense = _timed(case, "gradients, torch SDPA", by_torch, repeats, work[0])
    yield dense
    sparse = back(attention.block_sparse_attention(q, k, v, mask))
    yield _timed(named, "gradients", sparse, repeats, work[1], dense)


def _mask(length: int, density: float, alike: bool, generator: torch.Generator) -> Tensor:
    """bool [1, heads, n, n]; as many tiles in every row."""
    blocks = ops.tiles(length, BLOCK)
    rows = -(-blocks // 2) if alike else blocks
    scores = torch.rand(1, HEADS, rows, blocks, generator=generator, device=generator.device)
    kept = scores.topk(max(1, round(density * blocks)), -1).indices
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, kept, True)
    return mask.repeat_interleave(2, 2)[:, :, :blocks] if alike else mask


def _flex(
    case: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, repeats: int, work: float, dense: Timing
) -> Iterator[Timing]:
    """torch's FlexAttention on the same tiles."""
    try:
        from torch.nn.attention import flex_attention as flex

        order = mask.int().sort(dim=-1, descending=True, stable=True).indices.int()
        counts = mask.sum(-1, dtype=torch.int32)
        nothing, zero = torch.zeros_like(order), torch.zeros_like(counts)  # no tile is kept in part
        tiles = flex.BlockMask.from_kv_blocks(
            zero, nothing, counts, order, BLOCK_SIZE=BLOCK, seq_lengths=(q.shape[2], k.shape[2])
        )
        options: Any = {"BLOCK_M": BLOCK, "BLOCK_N": BLOCK}
        attend = torch.compile(flex.flex_attention, dynamic=False)
        call = partial(attend, q, k, v, block_mask=tiles, kernel_options=options)
        yield _timed(case, "FlexAttention", call, repeats, work, dense)
    except Exception as fault:  # its own terms: compiler, shapes, memory
        print(f"FlexAttention was not timed, {case}: {type(fault).__name__}: {str(fault).strip()[:300]}")


def _timed(case: str, call: str, function: Call, repeats: int, work: float, beside: Timing | None = None) -> Timing:
    low, median, high = quartiles(call_times(function, repeats))
    ratio, name = (beside.median_ms / median, beside.call) if beside else (None, "")
    return Timing("attn", case, call, 1, median, low, high, work / median, "TFLOP/s", ratio, name)
