"""Programs for the Triton kernels of masked gradients: interpreted, or compiled for chips that are not there."""

# New memory is filled with NaN, so that what a kernel does not write is seen.
COMMON = """
import json, torch
from torch.nn import functional as F
from kernels import masked_grad
from kernels.masked_grad import Moments, Selection, reference
torch.use_deterministic_algorithms(True)
generator = torch.Generator().manual_seed(0)
def noise(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=generator).to(dtype)
def chosen(shape, density):
    return Selection.from_mask(torch.rand(shape, generator=generator) < density)
def error(found, exact):
    assert found.shape == exact.shape
    return float((found.detach().double() - exact).norm() / exact.norm().clamp(min=1e-30))
"""

LAYERS = """
errors = []
for rows, columns, tokens, density in [
    (1, 1, 1, 1.1), (70, 150, 45, 0.1), (130, 129, 33, 0.02), (40, 20, 7, 1.1), (9, 9, 5, 0)
]:
    for dtype in (torch.float32, torch.bfloat16):
        selection = chosen((rows, columns), density)
        values = masked_grad.handle(selection)
        x, weight, dy = (noise(*s, dtype=dtype) for s in ((tokens, columns), (rows, columns), (tokens, rows)))
        masked_grad.linear(x, weight, values, selection).backward(dy)
        errors.append(error(values.grad, selection.gather(dy.double().mT @ x.double())))
# rows, channels, groups, kernel, stride, padding, dilation, image; groups fill a part, share one, lie across two
for rows, channels, groups, kernel, stride, padding, dilation, image in [
    (20, 6, 1, (3, 3), (1, 1), (1, 1), (1, 1), (6, 7)),
    (135, 4, 1, (3, 2), (2, 1), (0, 2), (1, 2), (7, 5)),
    (12, 6, 3, (3, 2), (1, 2), (0, 2), (2, 1), (7, 9)),
    (40, 40, 40, (2, 2), (1, 1), (0, 0), (1, 1), (3, 3)),
    (140, 4, 2, (1, 1), (1, 1), (0, 0), (1, 1), (3, 3)),
]:
    shape = (rows, channels // groups, *kernel)
    selection = chosen(shape, 0.3)
    values = masked_grad.handle(selection)
    x, weight, moves = noise(2, channels, *image), noise(*shape), (stride, padding, dilation, groups)
    y = masked_grad.conv2d(x, weight, values, selection, None, *moves)
    dy, dense = noise(*y.shape), weight.double().requires_grad_()
    y.backward(dy)
    F.conv2d(x.double(), dense, None, *moves).backward(dy.double())
    errors.append(error(values.grad, selection.gather(dense.grad)))
print(json.dumps(errors))
"""

EDGES = """
selection = chosen((40, 50), 0.5)
values, x = masked_grad.handle(selection), noise(20, 50)
x[3, 7] = torch.nan
masked_grad.linear(x, noise(40, 50), values, selection).backward(noise(20, 40))
assert torch.equal(values.grad.isnan(), selection.positions() % 50 == 7)
values.grad = None
masked_grad.linear(x[:0], noise(40, 50), values, selection).sum().backward()
assert torch.equal(values.grad, torch.zeros(selection.count))
print("passed")
"""

ADAMW = """
for shape in [(1, 1), (150, 140), (20, 3, 3, 3)]:
    selection = chosen(shape, 1.1 if shape == (1, 1) else 0.2)
    for dtype, master in ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, True)):
        weight = noise(*shape, dtype=dtype)
        exact, state, other = weight.clone(), Moments.zeros(selection), Moments.zeros(selection)
        masters = [selection.gather(weight).float() if master else None for _ in range(2)]
        for step in range(3):
            grad, scale = noise(selection.count), torch.tensor(0.5)
            settings = {"lr": 0.1, "weight_decay": 0.1}
            masked_grad.adamw_(weight, grad, selection, state, grad_scale=scale, master=masters[0], **settings)
            reference.adamw_(
                exact, grad * 0.5, selection.positions(), other.first, other.second, masters[1],
                betas=(0.9, 0.999), eps=1e-8, step=step + 1, **settings,
            )
        # the interpreter cuts bfloat16 off where a GPU rounds it
        close = 1e-6 if dtype == torch.float32 or master else 3 * 2**-7
        found, wanted = (masters if master else (weight, exact))
        assert error(found, wanted.double()) < close, (shape, dtype, error(found, wanted.double()))
        assert error(weight, exact.double()) < (1e-6 if dtype == torch.float32 else 3 * 2**-7)
        assert error(state.second, other.second.double()) < 1e-6
        others = ~selection.mask()
        assert torch.equal(weight[others], exact[others])
print("passed")
"""

# types, shapes and PTX are checked, the run is not
COMPILE = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.masked_grad import triton as kernels
def compiled(function, capability, weight, **constants):
    names = function.arg_names
    pointers = {"dy": weight, "x": weight, "weight": weight, "offsets": "*i16", "starts": "*i32"}
    pointers |= dict.fromkeys(("out", "grad", "first", "second", "master", "scale"), "*fp32")
    numbers = dict.fromkeys(("take1", "keep2", "take2", "keep", "rate", "root", "eps"), "fp32")
    constants |= {"TILE": kernels.TILE}
    signature = {name: "constexpr" if name in constants else (pointers | numbers).get(name, "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items() if name in names}
    asm = triton.compile(ASTSource(function, signature, values), target=GPUTarget("cuda", capability, 32))
    assert not re.search(r"\\\\b(atom|red)\\\\.", asm.asm["ptx"]), "atomics: not repeatable"
    assert ".f64" not in asm.asm["ptx"], "float64 by mistake"
    assert asm.metadata.shared <= 160 * 1024, f"{asm.metadata.shared} bytes of shared memory"
    return asm.asm["ptx"]
for capability, weight, pointwise, rows in (
    (80, "*fp32", False, kernels.ROWS), (80, "*bf16", True, kernels.ROWS), (90, "*fp32", False, kernels.FEW_ROWS),
    (90, "*fp32", True, kernels.ROWS), (90, "*bf16", False, kernels.ROWS),
):
    ptx = compiled(
        kernels._gradient_kernel, capability, weight, POINTWISE=pointwise, ROWS=rows, TOKENS=kernels.TOKENS,
        ENTRIES=kernels.ENTRIES, PRECISION="tf32x3" if weight == "*fp32" else "tf32", INTERPRETED=False,
    )
    assert "wgmma.mma_async" in ptx or "mma.sync" in ptx, "no tensor cores"
for capability, weight, master in ((80, "*fp32", False), (90, "*bf16", True)):
    compiled(kernels._adamw_kernel, capability, weight, MASTER=master, ENTRIES=kernels.UPDATED)
print("compiled")
"""
