"""Attention on a GPU without a GPU: the kernels' numbers in Triton's interpreter, and compilation for real chips."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (it has no build for this platform)"
)

# In a process of its own: Triton reads TRITON_INTERPRET when it decorates the kernels. New memory is filled with NaN,
# so that what a kernel does not write is seen. float16 is CUDA's alone: the kernels are called without the op.
COMMON = """
import torch
from kernels import attention
from kernels.attention import BlockMask, ops, reference, triton as kernels
torch.use_deterministic_algorithms(True)
generator = torch.Generator().manual_seed(0)
noise = lambda *shape: torch.randn(*shape, generator=generator)
# of results; the interpreter cuts float16 and bfloat16 off where a GPU rounds them. LSE and scores are float32 always
WORST = {torch.float32: 1e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}
def close(found, exact, limit):
    assert found.shape == exact.shape
    found, exact = found.detach().double(), exact.double()
    assert torch.equal(found.isinf(), exact.isinf()), "infinite elsewhere"
    found, exact = found.nan_to_num(posinf=0, neginf=0), exact.nan_to_num(posinf=0, neginf=0)
    assert (found - exact).norm() <= limit * exact.norm(), float((found - exact).norm() / exact.norm())
def exactly(q, k, v, mask, block, key_mask, d_out=None, d_lse=None):
    keep = reference.token_mask(mask.expand(*q.shape[:2], -1, -1), key_mask, (q.shape[2], k.shape[2]), block)
    wide = [q.double(), *(ops._present(key_mask, k.double(), v.double()))]
    scale = q.shape[-1] ** -0.5
    out, lse = reference.block_sparse_attention(*wide, keep, scale)
    if d_out is None:
        return out, lse
    return out, lse, *reference.gradients(*wide, keep, scale, out, lse, d_out.double(), d_lse.double())
def lacking(key_mask, *tensors):
    return [x.masked_fill(~key_mask[:, None, :, None], torch.nan) for x in tensors]
"""

AGREE = """
# batch, heads, key heads, queries, keys, dim, block, mask for (batch, heads), padding
for *sizes, dtype in [
    (1, 4, 2, 37, 40, 16, 16, (1, 4), False, torch.float32),
    (2, 2, 1, 70, 90, 5, 32, (2, 1), True, torch.float32),
    (2, 1, 1, 64, 64, 32, 64, (1, 1), False, torch.bfloat16),
    (1, 2, 1, 130, 150, 72, 64, (1, 2), True, torch.bfloat16),
    (1, 2, 2, 130, 256, 64, 128, (1, 2), False, torch.float16),
    (1, 1, 1, 40, 33, 256, 128, (1, 1), True, torch.bfloat16),
    (1, 1, 1, 20, 40, 129, 128, (1, 1), False, torch.float32),
]:
    batch, heads, groups, q_length, k_length, dim, block, lists, padding = sizes
    q, k, v = (noise(batch, h, n, dim).to(dtype) for h, n in
               ((heads, q_length), (groups, k_length), (groups, k_length)))
    rows, columns = ops.tiles(q_length, block), ops.tiles(k_length, block)
    mask = torch.rand(*lists, rows, columns, generator=generator) < 0.6
    mask[:, :, 0] = True
    if rows > 2:
        mask[0, 0, 1] = False  # nothing to attend to
    key_mask = torch.rand(batch, k_length, generator=generator) < 0.7 if padding else None
    if padding:
        k, v = lacking(key_mask, k, v)
    d_out, d_lse = noise(batch, heads, q_length, dim).to(dtype), noise(batch, heads, q_length)
    exact = exactly(q, k, v, mask, block, key_mask, d_out, d_lse)
    scale, compact = dim**-0.5, BlockMask.of(mask)
    plain = (compact.lists(), lists, block, scale, key_mask)
    out, lse = kernels.attention(q, k, v, *plain)
    assert out.dtype == dtype and lse.dtype == torch.float32
    close(out, exact[0], WORST[dtype])
    close(lse, exact[1], 1e-6)
    found = kernels.gradients(d_out, d_lse, q, k, v, out, lse, *plain)
    for slope, wanted in zip(found, exact[2:]):
        assert slope.dtype == dtype
        close(slope, wanted, 2 * WORST[dtype])
    found = kernels.search(q, k, v, block, scale, key_mask)
    wanted = exactly(q, k, v, torch.ones_like(mask), block, key_mask)
    close(found[0], wanted[0], WORST[dtype])
    close(found[1], wanted[1], 1e-6)
    keys = ops._present(key_mask, k)[0].double()
    close(found[2], reference.block_scores(q.double(), keys, wanted[1], key_mask, scale, block), 1e-6)
    assert torch.equal(kernels.attention(q, k, v, *plain)[0].view(torch.uint8), out.view(torch.uint8)), "other bits"
print("passed")
"""

# the lists of pairs of rows, one by one; then what two rows make of a list that they share
PAIRS = """
kernels.LEAST_PAIRED = 1
mask = torch.rand(2, 3, 5, 700, generator=generator) < 0.3
mask[:, :, 1] = mask[:, :, 0]  # alike
mask[0, 0, 2:4] = False
mask[1, 2, :, 3:] = False
starts, columns = BlockMask.of(mask).lists()
pairs, alone = kernels._paired(BlockMask.of(mask).lists(), 6, 5, 700)
together = 0
for number, rows in enumerate(mask.flatten(0, 1)):
    for pair in range(3):
        two = rows[2 * pair : 2 * pair + 2]
        first, count = int(pairs.firsts[number * 3 + pair]), int(pairs.counts[number * 3 + pair])
        others = alone.counts[number * 5 + 2 * pair :][: len(two)].tolist()
        if len(two) == 2 and 4 * int(two.any(0).sum()) <= 3 * int(two.sum()):
            kept = [(int(c), int(two[0, c]) + 2 * int(two[1, c])) for c in two.any(0).nonzero()[:, 0]]
            found = pairs.columns[first : first + count].tolist()
            assert [(c & 0xFFFF, c >> 16) for c in found] == kept and others == [-1, -1]
            together += 1
        else:
            assert count == -1 and others == two.sum(1).tolist()
assert 6 <= together < 18
for q_length, k_length, padding in ((300, 260, False), (256, 200, True)):
    q, k, v = (noise(1, 2, n, 16).bfloat16() for n in (q_length, k_length, k_length))
    mask = torch.rand(1, 2, ops.tiles(q_length, 64), ops.tiles(k_length, 64), generator=generator) < 0.5
    mask[0, 0, 0], mask[0, 0, 1] = True, torch.tensor([True, True, False, True, True])[: mask.shape[-1]]
    mask[0, 1, 2:4] = False  # a pair of empty rows
    key_mask = torch.rand(1, k_length, generator=generator) < 0.7 if padding else None
    if padding:
        k, v = lacking(key_mask, k, v)
    counts = kernels._paired(BlockMask.of(mask).lists(), 2, mask.shape[2], mask.shape[3])[0].counts
    assert (counts > 0).any() and (counts < 0).any() and (counts == 0).any()
    out, lse = attention.block_sparse_attention(q, k, v, mask, key_mask=key_mask, return_lse=True)
    exact = exactly(q, k, v, mask, 64, key_mask)
    close(out, exact[0], WORST[q.dtype])
    close(lse, exact[1], 1e-6)
    assert bool((out[0, 1, 128:256] == 0).all())
print("passed")
"""

EDGES = """
q, k, v = (noise(1, 2, n, 8) for n in (40, 50, 50))
mask = torch.ones(1, 1, 3, 4, dtype=torch.bool)
attend = lambda q, k, v, **more: attention.block_sparse_attention(q, k, v, mask, block_size=16, return_lse=True, **more)
out, lse = attend(q, k, v)
# NaN stays in its row; one in a key or value reaches what attends to it
bad = q.clone()
bad[0, 1, 20, 3] = torch.nan
found, sums = attend(bad, k, v)
assert bool(found[0, 1, 20].isnan().all()) and int(found.isnan().sum()) == 8 and int(sums.isnan().sum()) == 1
assert torch.equal(found[0, 0], out[0, 0])
scores = attention.search(bad, k, v, block_size=16).scores
assert bool(scores[0, 1, 1].isnan().all()) and int(scores.isnan().sum()) == 4
mask[0, 0, 0, 2] = False
bad = k.clone()
bad[0, 0, 33] = torch.nan
found = attend(q, bad, v)[0].isnan()
assert bool(found[0, 0, 16:].all()) and not bool(found[0, 0, :16].any() or found[0, 1].any())
# no key is there: as where nothing is kept
nobody = torch.zeros(1, 50, dtype=torch.bool)
leaves = [x.clone().requires_grad_() for x in (q, *lacking(nobody, k, v))]
found, sums = attend(*leaves, key_mask=nobody)
assert bool((found == 0).all()) and bool((sums == -torch.inf).all())
for slope in torch.autograd.grad(found.sum(), leaves):
    assert bool((slope == 0).all())
# strides: [batch, length, heads, dim] as diffusers has it, a stride of zero, a last dimension that is not the last
turned = q.transpose(1, 2).contiguous().transpose(1, 2)
shared = k[:, :1].expand(-1, 2, -1, -1)
assert torch.equal(attend(turned, shared, v.mT.contiguous().mT)[0], attend(q, shared.contiguous(), v)[0])
# a scale that is negative, or none
for scale in (-0.7, 0.0):
    wanted = attention.block_sparse_attention(q * scale, k, v, mask, block_size=16, scale=1.0)
    close(attention.block_sparse_attention(q, k, v, mask, block_size=16, scale=scale), wanted, 1e-6)
# scores far from the LSE: huge, but a number; those without an LSE count nothing
stale = torch.full((1, 2, 40), -1e4)
stale[0, 0, :16] = -torch.inf
found = attention.block_scores(q, k, stale, block_size=16)
assert bool(found.isfinite().all()) and bool((found[0, 0, 0] == 0).all()) and bool((found[0, 1] > 1e30).all())
# nothing at all
for n, m in ((0, 50), (40, 0), (0, 0)):
    leaves = [noise(1, 2, length, 8).requires_grad_() for length in (n, m, m)]
    nothing = torch.ones(1, 1, ops.tiles(n, 16), ops.tiles(m, 16), dtype=torch.bool)
    found, sums = attention.block_sparse_attention(*leaves, nothing, block_size=16, return_lse=True)
    assert found.shape == (1, 2, n, 8) and bool((found == 0).all()) and bool((sums == -torch.inf).all())
    assert all(bool((slope == 0).all()) for slope in torch.autograd.grad(found.sum(), leaves))
    assert attention.search(*leaves, block_size=16).scores.shape == (1, 2, ops.tiles(n, 16), ops.tiles(m, 16))
print("passed")
"""

# Triton compiles for a chip that is not there: types, shapes, PTX and shared memory are checked, the run is not
COMPILE = """
import re, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.attention import triton as forward, triton_backward as backward, triton_common as common
SINGLE, HALF, BRAIN = (torch.float32, "*fp32"), (torch.float16, "*fp16"), (torch.bfloat16, "*bf16")
INTEGERS = {name: "*i32" for name in ("order", "firsts", "counts", "starts", "alone", "union")}
def compiled(function, capability, kind, dim=64, block=64, span=64, masked=False, **constants):
    dtype, data = kind
    q = torch.empty(1, 1, 128, dim, dtype=dtype, device="meta")
    constants |= common.constants_of(q, q, block, None) | {"INTERPRETED": False, "BLOCK": block, "SPAN": span}
    constants |= {"MASKED": masked, "WHOLE": not masked, "DENSE": False, "STEPS": 11}
    if function is forward._attention_kernel:
        rows, keys, options = forward._sizes(q, span, block)
        constants |= {"ROWS": rows, "KEYS": keys}
    elif function is forward._scores_kernel:
        rows, keys, options = forward._score_sizes(q)
        constants |= {"ROWS": rows, "KEYS": keys, "HEIGHT": min(rows, block), "SHARE": min(keys, block)}
    elif function is forward._pairs_kernel:
        options, constants["SIZE"] = {}, 512
    else:
        constants["SIZE"], options = backward._sizes(q, block)
    names = function.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    types = INTEGERS | dict.fromkeys(("q", "k", "v", "out", "d_out", "dq", "dk", "dv"), data)
    types |= {"columns": "*i32" if span > block else "*u16", "key_mask": "*u8", "lse": "*fp32", "shift": "*fp32"}
    types |= {"scale": "fp32", "slope": "fp32"}
    if function is forward._scores_kernel:
        types["out"] = "*fp32"
    if function is backward._keys_kernel:
        types["rows"] = "*i32"
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [name for name in names if signature[name][0] == "*" or re.fullmatch("[qkvd]_(batch|head|row)", name)]
    source = ASTSource(
        function,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    code = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = code.asm["ptx"]
    assert not re.search(r"\\b(atom|red)\\.", ptx), "atomics: not repeatable"
    assert ".f64" not in ptx, "float64 by mistake"
    assert code.metadata.shared <= 99 * 1024, "more shared memory than the smaller chips have"
    if kind is SINGLE:
        assert "tf32" not in ptx and "mma" not in ptx, "float32 is rounded"
    elif function is not forward._pairs_kernel:
        assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in ptx, "no tensor cores"
        assert "cp.async" in ptx, "the next tile is not loaded while this one is multiplied"
    return ptx
compiled(forward._attention_kernel, 90, BRAIN, 128, 64, 128)
compiled(forward._attention_kernel, 90, HALF, 64, 64, masked=True)
compiled(forward._scores_kernel, 90, BRAIN, 128)
compiled(forward._pairs_kernel, 90, BRAIN)
compiled(backward._queries_kernel, 90, BRAIN, 128)
compiled(backward._keys_kernel, 90, BRAIN, 64, masked=True)
compiled(forward._attention_kernel, 80, SINGLE, 64, 16)
compiled(forward._attention_kernel, 80, BRAIN, 256, 128, 128, masked=True)
compiled(forward._scores_kernel, 80, SINGLE, 32, 128)
compiled(backward._keys_kernel, 80, BRAIN, 128, 128)
print("compiled")
"""


def run(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", "import os\n" + code],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([".", os.environ.get("PYTHONPATH", "")])} | environment,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.splitlines()[-1]


def interpreted(code: str) -> str:
    return run(COMMON + code, TRITON_INTERPRET="1", KERNELS_BACKEND="triton")


def test_interpreted_attention_gradients_and_search_agree_with_float64() -> None:
    assert interpreted(AGREE) == "passed"


def test_rows_that_share_a_program_are_found_and_served() -> None:
    assert interpreted(PAIRS) == "passed"


def test_nan_padding_strides_and_nothing_at_all() -> None:
    assert interpreted(EDGES) == "passed"


def test_the_kernels_compile_for_a_gpu(tmp_path) -> None:
    from triton.backends import backends

    if "nvidia" not in backends:
        pytest.skip("this build of Triton has no NVIDIA backend")
    assert run(COMPILE, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0") == "compiled"
