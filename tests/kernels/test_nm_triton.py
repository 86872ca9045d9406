"""N:M on a GPU without a GPU: the kernels' numbers in Triton's interpreter, and their compilation for real chips."""

from __future__ import annotations

import importlib.util
import json

import pytest
from nm_triton import interpreted, run

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (it has no build for this platform)"
)

PRODUCTS = """
def refused(*_):
    raise AssertionError("the table of the CPU was asked")
crossover.dense_is_faster = refused
errors = {"float32": [], "bfloat16": []}
# n, m, rows, groups, tokens: tokens of both kernels; places in nibbles and bytes; a group wider than a tile; slots in
# line and in a loop; and loops long enough to be split
for n, m, rows, groups, tokens in [
    (2, 4, 37, 9, 1), (2, 4, 21, 260, 3), (2, 8, 260, 5, 40), (1, 16, 33, 17, 17), (9, 16, 20, 3, 17),
    (3, 24, 21, 3, 4), (1, 1, 5, 70, 5), (5, 32, 16, 3, 40), (7, 100, 19, 3, 2), (7, 100, 19, 2, 17),
]:
    for dtype in (torch.float32, torch.bfloat16):
        exact, packed = packed_of(rows, groups * m, n, m, dtype)
        x, dy, bias = noise(tokens, groups * m), noise(tokens, rows), noise(rows)
        leaves = [x, bias, packed.values]
        for leaf in leaves:
            leaf.requires_grad_()
        y = nm.linear(x, packed, bias)
        y.backward(dy)
        x64, dy64 = x.detach().double(), dy.double()
        kept = nm.NMTensor(packed.values.grad, packed.places, packed.shape, n, m).to_dense()
        slope = dy64.T @ x64 * (exact != 0)
        assert bool((packed.values.grad[packed.values == 0] == 0).all()), "a slope where nothing is kept"
        # gradients are stored as the values are; the interpreter cuts bfloat16 off where a GPU rounds it
        assert error(kept, slope) < (1e-6 if dtype == torch.float32 else 2**-7), error(kept, slope)
        errors[str(dtype).removeprefix("torch.")] += [
            error(y.detach(), x64 @ exact.T + bias.detach().double()),
            error(x.grad, dy64 @ exact),
            error(bias.grad, dy64.sum(0)),
        ]
        if dtype == torch.bfloat16:  # as on CUDA, where a bfloat16 x is left as it is
            narrow = x.detach().bfloat16()
            found = ops.linear(narrow, packed, None, None)
            assert found.dtype == torch.bfloat16 and error(found, narrow.double() @ exact.T) < 2**-7
dense = noise(24, 16).requires_grad_()
x, dy = noise(5, 16), noise(5, 24)
nm.linear(x, nm.pack(dense.detach(), 2, 4), straight_through=dense).backward(dy)
assert error(dense.grad, dy.double().T @ x.double()) < 1e-6
assert nm.linear(x[:0], nm.pack(dense.detach(), 2, 4)).shape == (0, 24)
tall = torch.empty(16, 10).T
tall[::2] = x
assert torch.equal(nm.linear(tall[::2], nm.pack(dense.detach(), 2, 4)), nm.linear(x, nm.pack(dense.detach(), 2, 4)))
print(json.dumps(errors))
"""

NAN = """
exact, packed = packed_of(20, 32, 2, 8, torch.float32)
for tokens in (2, 17):
    x = noise(tokens, 32)
    x[1, 5] = torch.nan
    y = nm.linear(x, packed).isnan()
    # a few tokens meet only what is kept; more are multiplied with the zeros too
    assert torch.equal(y[1], exact[:, 5] != 0) if tokens == 2 else bool(y[1].all())
    assert int(y.sum()) == int(y[1].sum())
# filled-up groups: one kept instead of two, or none
kept = torch.zeros(4, 8, dtype=torch.bool)
kept[:, 2] = True
weight = noise(4, 8)
packed = nm.pack(weight, 2, 4, kept)
packed.values.requires_grad_()
for tokens in (1, 17):
    x = noise(tokens, 8)
    y = nm.linear(x, packed)
    assert torch.allclose(y, x @ (weight * kept).T, atol=1e-6)
    (slope,) = torch.autograd.grad(y.sum(), packed.values)
    dense = nm.NMTensor(slope, packed.places, packed.shape, 2, 4).to_dense()
    assert torch.equal(dense != 0, kept) and torch.allclose(dense[:, 2], x[:, 2].sum())
    weight[1, 2] = packed.values.data[0, 0, 0, 1] = torch.nan
    assert nm.linear(x, packed).isnan().any(0).tolist() == [False, True, False, False]
    weight[1, 2] = packed.values.data[0, 0, 0, 1] = 1.0
print("passed")
"""

MASK = """
pool = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, torch.inf, -torch.inf, 0.0, 1e-44, -3e-45])
odd = torch.tensor([0x7FC00000, 0x7F800001, -1, -0x00400000], dtype=torch.int32).view(torch.float32)
pool = torch.cat([pool, odd])
def awkward(*shape):
    return pool[torch.randint(len(pool), shape, generator=generator)]
def specified(weight, n, m, dim):
    return reference.mask(weight.movedim(dim, -1), n, m).movedim(-1, dim)
plain = reference.mask
for made in (noise, awkward):
    for n, m in [(2, 4), (4, 8), (1, 16), (3, 7), (5, 64), (0, 4), (1, 1)]:
        for weight, dim in (
            (made(3, 5 * m + m // 2), 1), (made(2, 3 * m, 2, 3), 1), (made(3, 2 * m).T, 0),
            (made(2200 // m**2, m).bfloat16(), 1), (made(0, m), 1),
        ):
            wanted = specified(weight.float(), n, m, dim)
            reference.mask = None  # so that it is the kernel
            found = nm.mask(weight, n, m, dim, ragged=True)
            reference.mask = plain
            assert torch.equal(found, wanted), (n, m, weight.shape, dim)
channels_last = noise(8, 12, 3, 3).to(memory_format=torch.channels_last)
assert nm.mask(channels_last, 2, 4, 1).stride() == channels_last.stride()

# what there are no kernels for: refused if forced, else the reference's
for weight, arguments, got in (
    (noise(2, 130), (3, 65), "groups of 65"), (noise(8, 8), (2, 4, -1), "a transposable mask"),
):
    transposable = len(arguments) == 3
    try:
        nm.mask(weight, *arguments, transposable=transposable)
    except KernelUnavailable as refusal:
        assert f"kernels.nm.mask: KERNELS_BACKEND=triton got {got}; expected groups of at most 64" in str(refusal)
        assert "unset KERNELS_BACKEND" in str(refusal)
    else:
        raise AssertionError(f"{got} went through")
del os.environ["KERNELS_BACKEND"]
_dispatch.TABLE["nm"][("cpu", torch.float32)] = _dispatch.TRITON  # as it is on CUDA
weight = noise(8, 130)
assert torch.equal(nm.mask(weight, 3, 65), reference.mask(weight, 3, 65))
weight = noise(8, 8)
assert torch.equal(nm.mask(weight, 2, 4, transposable=True), reference.transposable_mask(weight, 2, 4))
print("passed")
"""

# Triton compiles for a chip that is not there: types, shapes and PTX are checked, the run is not
COMPILE = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.nm import mask_triton as masks
from kernels.nm import triton as kernels
SINGLE, HALF = "*fp32", "*bf16"
def compiled(function, capability, weight, data, n=2, m=4, **constants):
    constants |= {"N": n, "INTERPRETED": False, "BIASED": True} | kernels._tile_of(m) | constants
    names = function.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    pointers = {"x": data, "dy": data, "values": weight, "places": "*u8", "bits": "*i32", "bias": SINGLE}
    pointers |= {"partial": SINGLE, "out": weight if function is kernels._weight_gradient_kernel else data}
    if function is masks._mask_kernel:
        pointers["out"] = "*u8"
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(ASTSource(function, signature, values), target=target).asm
few, many = kernels._few_kernel, kernels._many_kernel
def check(capability, products, others=()):
    for code in products:
        assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in code["ptx"], "no tensor cores"
        assert "math.fma" in code["ttgir"], "long sums are made inside the tensor cores"
    for code in (*products, *others):
        assert not re.search(r"\\b(atom|red)\\.", code["ptx"]), "atomics: not repeatable"
        assert ".f64" not in code["ptx"], "float64 by mistake"
single = compiled(many, 90, SINGLE, SINGLE, TOKENS=64)
half = compiled(many, 90, HALF, HALF, 1, 16, TOKENS=64)
assert "tf32" in single["ptx"] and "bf16.bf16" in half["ptx"]
check(
    90,
    [
        single,
        half,
        compiled(many, 90, HALF, SINGLE, 9, 100, TOKENS=16),
        compiled(kernels._input_gradient_kernel, 90, SINGLE, SINGLE, TOKENS=16),
        compiled(kernels._weight_gradient_kernel, 90, HALF, SINGLE, 1, 16, TOKENS=64),
    ],
    [
        compiled(few, 90, SINGLE, SINGLE, TOKENS=4, SLOTS=128),
        compiled(few, 90, HALF, HALF, 1, 32, TOKENS=1, SLOTS=128),
        compiled(kernels._sum_kernel, 90, SINGLE, SINGLE, SIZE=1024),
        compiled(masks._mask_kernel, 90, None, None, m=8, GROUPS=128),
    ],
)
check(
    80,
    [
        compiled(many, 80, SINGLE, SINGLE, TOKENS=16),
        compiled(kernels._input_gradient_kernel, 80, HALF, HALF, TOKENS=16),
        compiled(kernels._weight_gradient_kernel, 80, SINGLE, SINGLE, TOKENS=16),
    ],
    [
        compiled(few, 80, SINGLE, SINGLE, TOKENS=1, SLOTS=128),
        compiled(masks._mask_kernel, 80, None, None, m=4, GROUPS=512),
    ],
)
print("compiled")
"""


def test_interpreted_products_and_gradients_agree_with_float64() -> None:
    errors = json.loads(interpreted(PRODUCTS))
    assert {name: len(found) for name, found in errors.items()} == {"float32": 30, "bfloat16": 30}
    assert max(errors["float32"]) < 1e-6, errors
    assert max(errors["bfloat16"]) < 1e-6, "float32 x is not used whole"


def test_nan_and_groups_that_keep_fewer() -> None:
    assert interpreted(NAN) == "passed"


def test_interpreted_masks_are_the_specification() -> None:
    assert interpreted(MASK) == "passed"


def test_the_kernels_compile_for_a_gpu(tmp_path) -> None:
    from triton.backends import backends

    if "nvidia" not in backends:
        pytest.skip("this build of Triton has no NVIDIA backend")
    assert run(COMPILE, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0") == "compiled"
