"""2-D tomography: project an image along the lines of a scan, and back (the exact adjoint).

    from kernels.ct import FanBeam, backproject, project
    scan = FanBeam.uniform(72, 336, (128, 128), source_axis=537.5, axis_detector=537.5, pitch=2.0)
    sinogram = project(image, scan)                  # [..., 128, 128] -> [..., 72, 336]

The discretisation is Joseph's (see `reference.py`, the specification). Both functions are linear, differentiable any
number of times (the derivative of one is the other), run in float32 on the CPU (C++) and on CUDA (Triton), and in
float64 through the reference. Repeated calls give the same bits.
"""

import torch
from torch import Tensor

from kernels import _dispatch
from kernels.ct.geometry import FanBeam, ParallelBeam

__all__ = ["FanBeam", "ParallelBeam", "backproject", "project"]

Geometry = ParallelBeam | FanBeam


def project(image: Tensor, geometry: Geometry) -> Tensor:
    """Line integrals of an image: A x.

    image: [..., H, W] of `geometry.shape`, any strides, float32 or float64, in 1/mm (or any unit a mm).
    Returns [..., V, K] of `geometry.sinogram_shape`, dimensionless (or that unit).

    Raises ValueError for a shape that does not fit, TypeError for another dtype, RuntimeError where no kernel serves the
    device. Costs about H W V pixel reads (max(H, W) reads of two pixels a ray); memory: image + sinogram + one copy.
    """
    batch = _batch(image, geometry.shape, "project", "image", "[..., H, W]", geometry)
    flat = image.reshape(-1, *geometry.shape)
    return _project(flat, *_arguments(geometry)).reshape(*batch, *geometry.sinogram_shape)


def backproject(sinogram: Tensor, geometry: Geometry) -> Tensor:
    """Back-projection, the exact adjoint of `project`: A^T y. It is not a reconstruction: see `common.tomography`.

    sinogram: [..., V, K] of `geometry.sinogram_shape`, any strides, float32 or float64.
    Returns [..., H, W] of `geometry.shape`, in the sinogram's unit times mm.

    Raises and costs as `project`.
    """
    batch = _batch(sinogram, geometry.sinogram_shape, "backproject", "sinogram", "[..., views, cells]", geometry)
    flat = sinogram.reshape(-1, *geometry.sinogram_shape)
    return _backproject(flat, *_arguments(geometry)).reshape(*batch, *geometry.shape)


def _batch(tensor: Tensor, expected: tuple[int, int], op: str, name: str, axes: str, geometry: Geometry) -> torch.Size:
    if not isinstance(geometry, Geometry):
        raise TypeError(f"{op}: got geometry of type {type(geometry).__name__}, expected ParallelBeam or FanBeam")
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: got {name} of type {type(tensor).__name__}, expected a torch.Tensor {axes}")
    if tensor.ndim < 2 or tuple(tensor.shape[-2:]) != expected:
        raise ValueError(
            f"{op}: got {name} of shape {tuple(tensor.shape)}, expected {axes} ending in {expected}, as the geometry says"
        )
    return tensor.shape[:-2]


def _arguments(geometry: Geometry) -> tuple[Tensor, int, list[int], list[float]]:
    """The geometry as an op can take it; `lengths` = pitch, pixel, offset, axis and, for a fan, R and D."""
    lengths = [geometry.pitch, geometry.pixel, geometry.offset, geometry.axis]
    if isinstance(geometry, FanBeam):
        lengths += [geometry.source_axis, geometry.axis_detector]
    return geometry.angles, geometry.cells, list(geometry.shape), lengths


def _geometry(angles: Tensor, cells: int, shape: list[int], lengths: list[float]) -> Geometry:
    keys = ("pitch", "pixel", "offset", "axis", "source_axis", "axis_detector")
    cls = ParallelBeam if len(lengths) == 4 else FanBeam
    return cls(tuple(angles.tolist()), cells, (shape[0], shape[1]), **dict(zip(keys, lengths, strict=False)))  # type: ignore[arg-type]


@torch.library.custom_op("resparse::ct_project", mutates_args=())
def _project(image: Tensor, angles: Tensor, cells: int, shape: list[int], lengths: list[float]) -> Tensor:
    backend = _dispatch.backend_for(image, "kernels.ct.project")
    if backend == _dispatch.CPU:
        out = image.new_empty(len(image), len(angles), cells)
        return _native("project", image, angles, out, lengths)
    return _implementation(backend).project(image, _geometry(angles, cells, shape, lengths))


@torch.library.custom_op("resparse::ct_backproject", mutates_args=())
def _backproject(sinogram: Tensor, angles: Tensor, cells: int, shape: list[int], lengths: list[float]) -> Tensor:
    backend = _dispatch.backend_for(sinogram, "kernels.ct.backproject")
    if backend == _dispatch.CPU:
        out = sinogram.new_empty(len(sinogram), *shape)
        return _native("backproject", sinogram, angles, out, lengths)
    return _implementation(backend).backproject(sinogram, _geometry(angles, cells, shape, lengths))


def _native(name: str, data: Tensor, angles: Tensor, out: Tensor, lengths: list[float]) -> Tensor:
    from kernels._load import native

    beam = "parallel" if len(lengths) == 4 else "fan"
    distances = lengths[4:]
    function = getattr(native(), f"ct_{beam}_{name}")
    function(data.detach().contiguous(), angles, out, *distances, *lengths[:4], torch.get_num_threads())
    return out


def _implementation(backend: str):
    if backend == _dispatch.TRITON:
        from kernels.ct import triton as module
    else:
        from kernels.ct import reference as module
    return module


@_project.register_fake
def _(image: Tensor, angles: Tensor, cells: int, shape: list[int], lengths: list[float]) -> Tensor:
    return image.new_empty(image.shape[0], angles.shape[0], cells)


@_backproject.register_fake
def _(sinogram: Tensor, angles: Tensor, cells: int, shape: list[int], lengths: list[float]) -> Tensor:
    return sinogram.new_empty(sinogram.shape[0], *shape)


def _keep_geometry(ctx, inputs, output) -> None:
    _, ctx.angles, ctx.cells, ctx.shape, ctx.lengths = inputs


def _project_backward(ctx, grad: Tensor):
    return _backproject(grad, ctx.angles, ctx.cells, ctx.shape, ctx.lengths), None, None, None, None


def _backproject_backward(ctx, grad: Tensor):
    return _project(grad, ctx.angles, ctx.cells, ctx.shape, ctx.lengths), None, None, None, None


_project.register_autograd(_project_backward, setup_context=_keep_geometry)
_backproject.register_autograd(_backproject_backward, setup_context=_keep_geometry)
