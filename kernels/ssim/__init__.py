"""L1 and D-SSIM between a render and a photograph, with the gradient: the loss of 3D Gaussian splatting.

    from kernels.ssim import photometric, window_mean
    mean = window_mean(photo)
    loss, gradient = photometric(render, photo, mean, window_mean(photo**2) - mean**2)

Beside the rasterizer it is the dearest part of a training step. The gradient is made with the loss, where all that it
needs is at hand: on the CPU (C++, AVX2 or AVX-512) in one pass over the rows that keeps eleven of them and stores
nothing else. D-SSIM is 1 - SSIM in the form of 3DGS: Gaussian window of 11 pixels, sigma 1.5, zeros around the image,
constants 0.01^2 and 0.03^2, mean over all pixels and channels. In float64 and on a CUDA device the plain-torch
`reference.py`, the specification, runs. KERNELS_BACKEND=reference|cpu forces one. The same call gives the same bits
again, whatever the number of threads. `common.splatting.losses.photometric` is the differentiable loss made of this.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import _dispatch
from kernels._load import native
from kernels.ssim import reference

__all__ = ["photometric", "window_mean"]


def photometric(
    render: Tensor,
    photo: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    weight: Tensor | None = None,
    dssim: float = 0.2,
    gradient: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """(1 - dssim) L1 + dssim (1 - SSIM) (Kerbl et al. 2023, section 5.1; Wang et al. 2004), and its gradient.

    render, photo   [H, W, C], any range; the constants of SSIM are for 0..1
    mean, variance  [H, W, C] window means of `photo`, and of its square less their square: they never change
    weight          [H, W] >= 0 with a positive sum: what a pixel of the loss counts; render and photo must have been
                    multiplied by it already
    dssim           the share of D-SSIM, 0..1
    gradient        whether it is wanted

    Returns the loss, a scalar, and dloss/drender [H, W, C] (None if not wanted), both without a history of their own.
    Raises ValueError for shapes that do not fit, TypeError for dtypes, KernelUnavailable where no kernel serves.
    """
    _expect_image("photometric", render, "render")
    for tensor, name in ((photo, "photo"), (mean, "mean"), (variance, "variance")):
        _expect("photometric", tensor, render.shape, name, render)
    if weight is not None:
        _expect("photometric", weight, render.shape[:2], "weight", render)
    images = [tensor.detach() for tensor in (render, photo, mean, variance)]
    weight = None if weight is None else weight.detach()
    if _dispatch.backend_for(render.device, render.dtype, "ssim") == _dispatch.REFERENCE:
        return reference.photometric(*images, weight, dssim, gradient)  # pyright: ignore[reportCallIssue]
    total = render[..., 0].numel() if weight is None else float(weight.sum())
    share = 1 / (total * render.shape[-1])
    rows = torch.empty(len(render), 2, dtype=torch.float64)
    slope = torch.empty_like(render, memory_format=torch.contiguous_format) if gradient else None
    native().ssim_photometric(
        *(tensor.contiguous() for tensor in images),
        None if weight is None else weight.contiguous(),
        (1 - dssim) * share,
        dssim * share,
        rows,
        slope,
        torch.get_num_threads(),
    )
    similarity, difference = rows.sum(dim=0)
    return ((1 - dssim) * share * difference + dssim * (1 - share * similarity)).to(render.dtype), slope


def window_mean(image: Tensor) -> Tensor:
    """Means over a Gaussian window of 11 x 11 pixels, sigma 1.5, with zeros around the image.

    Returns [H, W, C] of image [H, W, C], any range, without a history of its own.
    Raises ValueError for another number of dimensions, TypeError for dtypes, KernelUnavailable where no kernel serves.
    """
    _expect_image("window_mean", image, "image")
    if _dispatch.backend_for(image.device, image.dtype, "ssim") == _dispatch.REFERENCE:
        return reference.window_mean(image.detach())
    out = torch.empty_like(image, memory_format=torch.contiguous_format)
    native().ssim_window_mean(image.detach().contiguous(), out, torch.get_num_threads())
    return out


def _expect_image(function: str, image: Tensor, name: str) -> None:
    if image.ndim != 3 or not image.numel():
        raise ValueError(f"kernels.ssim.{function}: {name} is {list(image.shape)}; expected [H, W, C], none of them 0.")


def _expect(function: str, tensor: Tensor, shape: torch.Size, name: str, like: Tensor) -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"kernels.ssim.{function}: {name} is {list(tensor.shape)}; expected {list(shape)}, as of the render."
        )
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise TypeError(
            f"kernels.ssim.{function}: {name} is {tensor.dtype} on {tensor.device}; expected {like.dtype} on "
            f"{like.device}, as the render; convert or move it with .to(...)."
        )
