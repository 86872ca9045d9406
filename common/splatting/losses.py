"""Losses of Gaussian splatting: photometric (L1 and D-SSIM), Pearson correlation of depths, and smoothness.

Images are [H, W, C] in 0..1, depths [H, W]. All losses are means, lower is better, and return a scalar tensor.

D-SSIM is 1 - SSIM in the form of 3DGS: Gaussian window of 11 pixels, sigma 1.5, zeros around the image, constants
0.01^2 and 0.03^2, mean over all pixels and channels; `kernels.ssim` computes it. The window means of the photograph
never change and live in `Target` (twice its memory more).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import ssim as ssim_kernel

__all__ = [
    "Target",
    "edge_aware_smoothness",
    "pearson",
    "pearson_patches",
    "photometric",
    "ssim",
    "total_variation",
]


class Target:
    """A photograph prepared for `photometric`.

    image   [H, W, C], 0..1
    weight  [H, W], 0..1, or None for 1 everywhere. A pixel of weight w counts w times, and the windows see w times its
            values in both images: a weight of 0 is to them as what lies beyond the border

    Raises ValueError where the shapes do not fit, or no weight is positive.
    """

    def __init__(self, image: Tensor, weight: Tensor | None = None):
        if image.ndim != 3 or not image.is_floating_point():
            raise ValueError(f"Target: image is [H, W, C], floating point; got {image.dtype} {list(image.shape)}.")
        if weight is not None and (weight.shape != image.shape[:2] or not bool((weight > 0).any())):
            raise ValueError(
                f"Target: weight is {list(image.shape[:2])} with a positive value somewhere; got {list(weight.shape)}. "
                "Leave views out that show nothing of the scene."
            )
        self.weight = None if weight is None else weight.detach().to(image.dtype)
        self.image = (image.detach() if self.weight is None else image.detach() * self.weight[..., None]).contiguous()
        self.mean = ssim_kernel.window_mean(self.image)
        self.variance = ssim_kernel.window_mean(self.image.square()) - self.mean.square()


def photometric(image: Tensor, target: Target | Tensor, *, dssim: float = 0.2) -> Tensor:
    """(1 - dssim) L1 + dssim (1 - SSIM): the loss of 3DGS.

    image   [H, W, C] render, any range
    dssim   the share of D-SSIM, 0..1

    Raises ValueError for images of two shapes. Differentiable once, with respect to `image`.
    """
    if not isinstance(target, Target):
        target = Target(target)
    if image.shape != target.image.shape:
        raise ValueError(
            f"photometric: the render is {list(image.shape)}, the photograph {list(target.image.shape)}; render with "
            "the photograph's camera."
        )
    if target.weight is not None:
        image = image * target.weight[..., None]
    return _Photometric.apply(image, target, dssim)  # pyright: ignore[reportReturnType]


def ssim(image: Tensor, target: Target | Tensor) -> Tensor:
    """SSIM in the form of 3DGS, differentiable as `photometric` is. For scores use common.metrics.image (float64)."""
    return 1 - photometric(image, target, dssim=1.0)


def pearson(depth: Tensor, reference: Tensor, weight: Tensor | None = None) -> Tensor:
    """1 - the correlation of two depth maps, 0..2: blind to the unknown scale and shift of a monocular depth.

    depth, reference  [..., H, W]; the mean over the leading dimensions is taken
    weight            [..., H, W] >= 0, for instance 0 where the reference knows nothing

    A constant map correlates with nothing: its loss is 1 and its gradient 0. Negate or invert a disparity first.
    """
    if depth.shape != reference.shape or (weight is not None and weight.shape != depth.shape):
        raise ValueError(
            f"pearson: depth, reference (and weight) have one shape; got {list(depth.shape)}, {list(reference.shape)}"
            f"{'' if weight is None else f', {list(weight.shape)}'}."
        )
    w = torch.ones_like(depth) if weight is None else weight
    w = (w / w.sum(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)).flatten(-2)
    a, b = _standardised(depth.flatten(-2), w), _standardised(reference.flatten(-2), w)
    return (1 - (w * a * b).sum(dim=-1)).mean()


def pearson_patches(
    depth: Tensor,
    reference: Tensor,
    weight: Tensor | None = None,
    *,
    size: int,
    share: float = 0.5,
    generator: torch.Generator,
) -> Tensor:
    """The mean of `pearson` over boxes of `size` pixels at random places (SparseGS, LM-Gaussian).

    weight  [H, W] as in `pearson`; a box that it leaves nothing of counts as constant
    share   how many boxes: this share of those that fit beside each other, at least one

    Raises ValueError for boxes larger than the map.
    """
    height, width = depth.shape
    if not 2 <= size <= min(height, width):
        raise ValueError(f"pearson_patches: boxes of {size} pixels, expected 2..{min(height, width)} in this map.")
    count = max(1, int(share * (height // size) * (width // size)))

    def corners(last: int) -> list[int]:
        return torch.randint(last + 1, (count,), generator=generator, device=generator.device).tolist()

    places = list(zip(corners(height - size), corners(width - size), strict=True))
    maps = (depth, reference) if weight is None else (depth, reference, weight)
    return pearson(*(torch.stack([x[r : r + size, c : c + size] for r, c in places]) for x in maps))


def total_variation(image: Tensor) -> Tensor:
    """Mean absolute difference to the pixel below plus that to the right, of [H, W] or [H, W, C]."""
    return (image[1:] - image[:-1]).abs().mean() + (image[:, 1:] - image[:, :-1]).abs().mean()


def edge_aware_smoothness(depth: Tensor, image: Tensor) -> Tensor:
    """`total_variation` of a depth [H, W], each difference times exp(-|difference of the image|) (Godard et al. 2017).

    image: [H, W, C] 0..1; its differences are means over the channels. No gradient goes to it.
    """
    image = image.detach()
    down = (image[1:] - image[:-1]).abs().mean(dim=-1)
    right = (image[:, 1:] - image[:, :-1]).abs().mean(dim=-1)
    return ((depth[1:] - depth[:-1]).abs() * torch.exp(-down)).mean() + (
        (depth[:, 1:] - depth[:, :-1]).abs() * torch.exp(-right)
    ).mean()


def _standardised(values: Tensor, weight: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the last axis; all 0 where the variance is nothing but rounding."""
    precision = torch.finfo(values.dtype)
    mean_square = (weight * values.detach().square()).sum(dim=-1, keepdim=True)
    values = values - (weight * values).sum(dim=-1, keepdim=True)
    variance = (weight * values.square()).sum(dim=-1, keepdim=True)
    rounding = (16 * precision.eps) ** 2 * mean_square + precision.tiny
    return values * variance.clamp_min(rounding).rsqrt() * (variance > rounding)


class _Photometric(torch.autograd.Function):
    """The gradient is made with the loss, where all it needs is at hand, and scaled in backward."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, target: Target, dssim: float) -> Tensor:
        loss, gradient = ssim_kernel.photometric(
            image,
            target.image,
            target.mean,
            target.variance,
            weight=target.weight,
            dssim=dssim,
            gradient=ctx.needs_input_grad[0],
        )
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None
