"""2-D tomography: project an image along the lines of a scan, and back (the exact adjoint).

    from kernels.ct import FanBeam, backproject, project
    scan = FanBeam.uniform(72, 336, (128, 128), source_axis=537.5, axis_detector=537.5, pitch=2.0)
    sinogram = project(image, scan)                  # [..., 128, 128] -> [..., 72, 336]

The discretisation is Joseph's; `reference.py` is the specification. Both functions are linear and differentiable any
number of times (the derivative of one is the other); they work under torch.compile and torch.vmap, though not under
torch.func.grad, which takes no torch.library ops. They run in float32 on the CPU (C++) and on CUDA (Triton), in float64
through the reference; KERNELS_BACKEND=reference|cpu|triton forces one. The same call gives the same bits again (the
reference on a GPU excepted).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import _dispatch
from kernels._load import native
from kernels.ct.astra import from_astra, to_astra
from kernels.ct.geometry import FanBeam, ParallelBeam

__all__ = ["FanBeam", "ParallelBeam", "backproject", "from_astra", "project", "to_astra"]

Geometry = ParallelBeam | FanBeam


def project(image: Tensor, geometry: Geometry) -> Tensor:
    """Line integrals of an image: A x.

    image: [..., H, W] of `geometry.shape`, any strides, float32 or float64, in 1/mm (or any unit a mm).
    Returns [..., V, K] of `geometry.sinogram_shape`, dimensionless (or that unit), with the image's dtype and device.

    Raises ValueError for a shape that does not fit, TypeError for another dtype or type, KernelUnavailable where no
    kernel serves the device. A NaN pixel makes the cells whose rays pass it NaN.
    Costs max(H, W) reads of two pixels for each of the V K rays; memory: image, sinogram, a copy or two of the image.
    """
    batch = _batch("project", "image [..., H, W]", image, geometry, "shape")
    flat = image.reshape(batch.numel(), *geometry.shape)
    return _project(flat, *_flat(geometry)).reshape(*batch, *geometry.sinogram_shape)


def backproject(sinogram: Tensor, geometry: Geometry) -> Tensor:
    """Back-projection A^T y, the exact adjoint of `project`. Not a reconstruction: for that see `common.tomography`.

    sinogram: [..., V, K] of `geometry.sinogram_shape`, any strides, float32 or float64.
    Returns [..., H, W] of `geometry.shape`, in the sinogram's unit times mm, with its dtype and device.

    Raises and costs as `project` does.
    """
    batch = _batch("backproject", "sinogram [..., views, cells]", sinogram, geometry, "sinogram_shape")
    flat = sinogram.reshape(batch.numel(), *geometry.sinogram_shape)
    return _backproject(flat, *_flat(geometry)).reshape(*batch, *geometry.shape)


def _batch(function: str, name: str, tensor: Tensor, geometry: Geometry, expected: str) -> torch.Size:
    """The leading sizes of a tensor whose last two are `expected`, an attribute of the geometry."""
    if not isinstance(geometry, Geometry):
        raise TypeError(
            f"kernels.ct.{function}: got a geometry of type {type(geometry).__name__}; expected ParallelBeam or "
            f"FanBeam; call {function}(tensor, geometry)"
        )
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"kernels.ct.{function}: got {type(tensor).__name__}; expected a torch.Tensor, {name}; use torch.as_tensor"
        )
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"kernels.ct.{function}: got dtype {tensor.dtype}; expected torch.float32 or torch.float64; use .float()"
        )
    sizes = getattr(geometry, expected)
    if tuple(tensor.shape[-2:]) != sizes:
        raise ValueError(
            f"kernels.ct.{function}: got shape {tuple(tensor.shape)}; expected {name} ending in {sizes}, the "
            f"geometry's {expected}; reshape it, or make a geometry for it"
        )
    return tensor.shape[:-2]


def _flat(geometry: Geometry) -> tuple[Tensor, int, tuple[int, int], tuple[float, ...]]:
    """The geometry in types that an op can take."""
    return geometry.angles, geometry.cells, geometry.shape, geometry.lengths_mm


def _geometry(angles: Tensor, cells: int, shape: Sequence[int], lengths: Sequence[float]) -> Geometry:
    beam = "parallel" if len(lengths) == 4 else "fan"
    cls, names = {
        "parallel": (ParallelBeam, ("pitch", "pixel", "offset", "axis")),
        "fan": (FanBeam, ("source_axis", "axis_detector", "pitch", "pixel", "offset", "axis")),
    }[beam]
    scan: dict[str, Any] = dict(zip(names, lengths, strict=True))
    return cls(angles.tolist(), cells, (shape[0], shape[1]), **scan)


def _run(
    name: str,
    data: Tensor,
    out: Tensor,
    angles: Tensor,
    cells: int,
    shape: Sequence[int],
    lengths: Sequence[float],
) -> Tensor:
    backend = _dispatch.backend_for(data.device, data.dtype, "ct")
    if data.numel() == 0 or out.numel() == 0:
        return out.zero_()
    if backend == _dispatch.REFERENCE:
        from kernels.ct import reference

        return out.copy_(getattr(reference, name)(data.detach(), _geometry(angles, cells, shape, lengths)))
    data = data.detach().contiguous()
    if backend == _dispatch.TRITON:
        from kernels.ct import triton

        getattr(triton, name)(data, angles, out, lengths)
    else:
        beam = "parallel" if len(lengths) == 4 else "fan"
        getattr(native(), f"ct_{beam}_{name}")(data, angles, out, *lengths, torch.get_num_threads())
    return out


def _project_kernel(image: Tensor, angles: Tensor, cells: int, *scan: Any) -> Tensor:
    return _run("project", image, image.new_empty(len(image), len(angles), cells), angles, cells, *scan)


def _backproject_kernel(sinogram: Tensor, angles: Tensor, cells: int, shape: Sequence[int], *scan: Any) -> Tensor:
    return _run("backproject", sinogram, sinogram.new_empty(len(sinogram), *shape), angles, cells, shape, *scan)


def _project_fake(image: Tensor, angles: Tensor, cells: int, *_: Any) -> Tensor:
    return image.new_empty(image.shape[0], angles.shape[0], cells)


def _backproject_fake(sinogram: Tensor, angles: Tensor, cells: int, shape: Sequence[int], _: Any) -> Tensor:
    return sinogram.new_empty(sinogram.shape[0], *shape)


def _keep_geometry(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, angles, *ctx.scan = inputs
    ctx.save_for_backward(angles)


def _gradient(adjoint: Any) -> Any:
    """The backward of a linear op: its adjoint, which is an op with a gradient of its own."""
    return lambda ctx, grad: (adjoint(grad, *ctx.saved_tensors, *ctx.scan), None, None, None, None)


def _vmap(op: Any) -> Any:
    """How torch.vmap maps the op: the mapped dimension joins the batch."""

    def rule(info: Any, in_dims: tuple, data: Tensor, angles: Tensor, *scan: Any) -> tuple[Tensor, int]:
        assert in_dims[1] is None, "angles come from a geometry, which is no tensor to map over"
        data = data.movedim(in_dims[0], 0)  # [N, B, ., .]
        return op(data.flatten(0, 1), angles, *scan).unflatten(0, data.shape[:2]), 0

    return rule


# The ops know the geometry as plain values, so that torch can trace, store and compare them: angles [V] float64 on the
# CPU, and the lengths in mm in the order of `lengths_mm`, four for a parallel beam and six for a fan. They are defined
# piece by piece because `torch.library.custom_op` imports the compiler on the first call, which takes seconds.
_library = torch.library.Library("resparse", "FRAGMENT")
_ARGUMENTS = "Tensor angles, SymInt cells, SymInt[] shape, float[] lengths"
_library.define(f"ct_project(Tensor image, {_ARGUMENTS}) -> Tensor")
_library.define(f"ct_backproject(Tensor sinogram, {_ARGUMENTS}) -> Tensor")
_project = torch.ops.resparse.ct_project.default
_backproject = torch.ops.resparse.ct_backproject.default
for _op, _adjoint, _kernel, _fake in (
    (_project, _backproject, _project_kernel, _project_fake),
    (_backproject, _project, _backproject_kernel, _backproject_fake),
):
    _library.impl(_op, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(_op, _fake, lib=_library)
    torch.library.register_autograd(_op, _gradient(_adjoint), setup_context=_keep_geometry, lib=_library)
    torch.library.register_vmap(_op, _vmap(_op), lib=_library)
