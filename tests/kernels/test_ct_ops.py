"""kernels.ct as torch operations: gradients of any order, compilation, vmap, strides, and errors that help."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from kernels import KernelUnavailable, _dispatch, ct
from kernels.ct import FanBeam, ParallelBeam, backproject, project

SCANS = {
    "parallel": ParallelBeam.uniform(3, 11, (8, 8), offset=0.2),
    "fan": FanBeam.uniform(3, 11, (8, 8), source_axis=12.0, axis_detector=6.0, pitch=1.4, axis=0.3),
}
FUNCTIONS = {"project": (project, "shape"), "backproject": (backproject, "sinogram_shape")}


@pytest.fixture(params=SCANS)
def scan(request: pytest.FixtureRequest) -> ParallelBeam | FanBeam:
    return SCANS[request.param]


@pytest.fixture(params=FUNCTIONS)
def function(request: pytest.FixtureRequest, scan: ParallelBeam | FanBeam):
    """(f, input sizes): f(tensor) of these sizes, either way through the scan."""
    way, sizes = FUNCTIONS[request.param]
    return (lambda data: way(data, scan)), getattr(scan, sizes)


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_gradients_of_first_and_second_order(function) -> None:
    f, sizes = function
    data = noise(*sizes, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(f, data)
    assert torch.autograd.gradgradcheck(lambda x: f(x).square(), data, fast_mode=True)


def test_the_gradient_of_the_compiled_kernel_is_its_adjoint(scan: ParallelBeam | FanBeam) -> None:
    image, weights = noise(3, *scan.shape).requires_grad_(), noise(3, *scan.sinogram_shape, seed=1)
    (gradient,) = torch.autograd.grad((project(image, scan) * weights).sum(), image)
    assert torch.equal(gradient, backproject(weights, scan))
    # and of the gradient: d/dw of A^T w . v is A v
    weights.requires_grad_()
    (gradient,) = torch.autograd.grad((project(image, scan) * weights).sum(), image, create_graph=True)
    (second,) = torch.autograd.grad((gradient * image.detach()).sum(), weights)
    assert torch.equal(second, project(image.detach(), scan))


def test_gradients_that_are_not_contiguous(function) -> None:
    f, sizes = function
    data = noise(*sizes).requires_grad_()
    (expanded,) = torch.autograd.grad(f(data).sum(), data)  # the gradient that arrives is one number, expanded
    (full,) = torch.autograd.grad((f(data) * torch.ones_like(f(data))).sum(), data)
    assert torch.equal(expanded, full)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck itself reads it
def test_opcheck(scan: ParallelBeam | FanBeam) -> None:
    for op, sizes in ((ct._project, scan.shape), (ct._backproject, scan.sinogram_shape)):
        for dtype in (torch.float32, torch.float64):
            data = noise(2, *sizes, dtype=dtype).requires_grad_()
            torch.library.opcheck(op, (data, *ct._flat(scan)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_into_one_graph(function, dynamic: bool) -> None:
    f, sizes = function
    torch._dynamo.reset()  # or all rounds of this test count against one limit of recompilations
    compiled = torch.compile(lambda x: (2 * f(x)).square().sum(), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for batch in (2, 3):
        data = noise(batch, *sizes).requires_grad_()
        expected = (2 * f(data)).square().sum()
        (gradient,) = torch.autograd.grad(expected, data)
        found = compiled(data)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, data)[0], gradient)


def test_vmap_is_a_loop(function) -> None:
    f, sizes = function
    data = noise(sizes[0], 3, sizes[1])
    found = torch.vmap(f, in_dims=1, out_dims=1)(data)
    assert torch.equal(found, torch.stack([f(data[:, i]) for i in range(3)], dim=1))


def test_any_batch_and_any_strides(function) -> None:
    f, (rows, columns) = function
    data = noise(2, 3, rows, columns)
    expected = f(data)
    assert expected.shape[:2] == (2, 3)
    torch.testing.assert_close(f(data[1, 2]), expected[1, 2])
    layouts = {
        "transposed": data.mT.contiguous().mT,
        "every second column": torch.stack([data, data + 1], dim=-1).flatten(-2)[..., ::2],
        "batch last": data.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
    }
    for name, same in layouts.items():
        assert not same.is_contiguous()
        assert torch.equal(f(same), expected), name
    repeated = data[:1, :1].expand(2, 3, rows, columns)
    assert torch.equal(f(repeated), f(repeated.contiguous()))


@pytest.mark.parametrize("batch", [(0,), (2, 0), (0, 3)])
def test_empty_batches(function, batch: tuple[int, ...]) -> None:
    f, sizes = function
    data = torch.zeros(*batch, *sizes, requires_grad=True)
    f(data).sum().backward()
    assert data.grad is not None and data.grad.shape == data.shape


@pytest.mark.parametrize(("views", "cells", "shape"), [(0, 4, (3, 3)), (2, 0, (3, 3)), (2, 4, (0, 3)), (2, 4, (3, 0))])
def test_empty_scans_measure_nothing(views: int, cells: int, shape: tuple[int, int]) -> None:
    scan = ParallelBeam.uniform(views, cells, shape)
    assert torch.equal(project(torch.ones(2, *shape), scan), torch.zeros(2, views, cells))
    assert torch.equal(backproject(torch.ones(2, views, cells), scan), torch.zeros(2, *shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_other_dtypes_are_refused(function, dtype: torch.dtype) -> None:
    f, sizes = function
    with pytest.raises(TypeError, match=r"got dtype torch\.\w+; expected torch.float32 or torch.float64; use .float"):
        f(torch.zeros(sizes).to(dtype))


def test_wrong_arguments_are_named() -> None:
    scan = SCANS["parallel"]
    with pytest.raises(ValueError, match=r"got shape \(8, 9\); expected image .* ending in \(8, 8\)"):
        project(torch.zeros(8, 9), scan)
    with pytest.raises(ValueError, match=r"got shape \(8, 8\); expected sinogram .* ending in \(3, 11\)"):
        backproject(torch.zeros(8, 8), scan)
    with pytest.raises(ValueError, match=r"got shape \(8,\)"):
        project(torch.zeros(8), scan)
    with pytest.raises(TypeError, match=r"got a geometry of type Tensor; expected ParallelBeam or FanBeam"):
        project(scan, torch.zeros(8, 8))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got ndarray; expected a torch.Tensor"):
        project(torch.zeros(8, 8).numpy(), scan)  # type: ignore[arg-type]


def test_a_device_without_kernels_is_refused() -> None:
    with pytest.raises(KernelUnavailable, match=r"'xpu'; expected one of: cpu, cuda; .* KERNELS_BACKEND=reference"):
        _dispatch.backend_for(torch.device("xpu"), torch.float32, "ct")


def test_the_device_and_dtype_choose_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KERNELS_BACKEND", raising=False)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    chosen = {
        (device.type, dtype): _dispatch.backend_for(device, dtype, "ct")
        for device in (cpu, cuda)
        for dtype in (torch.float32, torch.float64)
    }
    assert chosen == _dispatch.TABLE["ct"]
    monkeypatch.setenv("KERNELS_BACKEND", "reference")
    assert _dispatch.backend_for(torch.device("xpu"), torch.float32, "ct") == "reference"


def test_a_forced_backend_runs_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    scan, image = SCANS["fan"], noise(8, 8)
    monkeypatch.setenv("KERNELS_BACKEND", "cpu")
    with pytest.raises(KernelUnavailable, match=r"KERNELS_BACKEND=cpu got torch.float64 on 'cpu'; expected a float32"):
        project(image.double(), scan)
    monkeypatch.setenv("KERNELS_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(KernelUnavailable, match=r"=triton got torch.float32 on 'cpu'; expected .*'cuda'"):
        project(image, scan)
    monkeypatch.setenv("KERNELS_BACKEND", "referense")
    with pytest.raises(ValueError, match=r"'referense'; expected one of .*; did you mean 'reference'"):
        project(image, scan)


def test_without_a_binary_nothing_is_silently_slow(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    # in a process of its own, because this one has the binary already
    code = "import torch; from kernels.ct import *; project(torch.zeros(4, 4), ParallelBeam.uniform(2, 4, (4, 4)))"
    monkeypatch.setenv("KERNELS_NATIVE", str(tmp_path))
    monkeypatch.delenv("KERNELS_BACKEND", raising=False)
    missing = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert missing.returncode != 0
    assert "KernelUnavailable" in missing.stderr
    assert "make kernels" in missing.stderr and "KERNELS_BACKEND=reference" in missing.stderr
    monkeypatch.setenv("KERNELS_BACKEND", "reference")
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert asked.returncode == 0, asked.stderr


def test_the_first_call_does_not_import_the_compiler() -> None:
    # torch._dynamo takes seconds, which every notebook would pay
    code = (
        "import sys, torch; from kernels.ct import *; scan = ParallelBeam.uniform(2, 4, (4, 4))\n"
        "project(torch.zeros(4, 4, requires_grad=True), scan).sum().backward()\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_a_constant_image_projects_to_chord_lengths() -> None:
    # 1/mm times mm: the middle ray through an 8 x 8 image of 0.5 mm pixels sees 4 mm of it at 0°, more at 45°
    scan = ParallelBeam((0.0, math.pi / 4), 9, (8, 8), pitch=0.5, pixel=0.5)
    middle = project(torch.ones(8, 8), scan)[:, 4]
    torch.testing.assert_close(middle, torch.tensor([4.0, 4 * math.sqrt(2)]))
