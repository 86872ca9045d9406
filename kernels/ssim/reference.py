"""The specification in plain torch: any device, float32 or float64. On a CUDA device it is what runs.

SSIM = a b / (c d) with a = 2 mx my + C1, b = 2 (m(x y) - mx my) + C2, c = mx^2 + my^2 + C1, d = vx + vy + C2 and
vx = m(x^2) - mx^2, where m(.) are window means of render x and photograph y. It is a function of three window means of
the render, and since the window is symmetric, the gradient takes three more window means and nothing else.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["photometric", "window_mean"]

WINDOW, SIGMA = 11, 1.5  # pixels
C1, C2 = 0.01**2, 0.03**2


def photometric(
    render: Tensor,
    photo: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    dssim: float,
    gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """See kernels.ssim.photometric."""
    share = 1 / render.numel() if weight is None else 1 / (weight.sum() * render.shape[-1])
    difference = render - photo
    slope = difference.sign().mul_((1 - dssim) * share)
    loss = difference.abs_().sum() * ((1 - dssim) * share)
    of_map = share if weight is None else (weight * share)[..., None]
    value, ssim_gradient = _ssim(render, photo, mean, variance, of_map, gradient)
    loss = loss + dssim * (1 - value)
    return loss, None if ssim_gradient is None else slope.sub_(ssim_gradient, alpha=dssim)


def window_mean(image: Tensor) -> Tensor:
    """See kernels.ssim.window_mean. Sums of shifted copies: on a CPU as fast as torch's best convolution."""
    height, width, channels = image.shape
    weights = [math.exp(-0.5 * (offset / SIGMA) ** 2) for offset in range(-(WINDOW // 2), WINDOW // 2 + 1)]
    weights = [weight / sum(weights) for weight in weights[WINDOW // 2 :]]  # the middle one and those to one side
    means = image.flatten(1)  # [H, W C]
    for dim, length, step in ((0, height, 1), (1, width * channels, channels)):
        source, means = means, means * weights[0]
        for offset, weight in enumerate(weights[1:], start=1):
            kept = length - offset * step
            if kept > 0:
                means.narrow(dim, offset * step, kept).add_(source.narrow(dim, 0, kept), alpha=weight)
                means.narrow(dim, 0, kept).add_(source.narrow(dim, offset * step, kept), alpha=weight)
    return means.view_as(image)


def _ssim(
    x: Tensor, y: Tensor, my: Tensor, vy: Tensor, share: Tensor | float, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """sum(share * SSIM map), and its gradient with respect to x [H, W, C]."""
    mx, xx, xy = window_mean(x), window_mean(x * x), window_mean(x * y)
    product, square = mx * my, mx * mx
    c, d = torch.addcmul(square, my, my).add_(C1), xx.sub_(square).add_(vy).add_(C2)
    a, b = product.mul(2).add_(C1), xy.sub_(product).mul_(2).add_(C2)
    inverse = torch.mul(c, d).reciprocal_()
    ssim_map = torch.mul(a, b).mul_(inverse)
    value = (ssim_map * share).sum()
    if not with_gradient:
        return value, None
    # derivatives by xy, by xx, and by mx at fixed xy and xx
    by_xx = (ssim_map / d).neg_()
    by_mx = torch.sub(b, a).mul_(inverse).mul_(my).sub_((ssim_map / c).add_(by_xx).mul_(mx)).mul_(2)
    by_xy = a.mul_(inverse).mul_(2)
    from_mx, from_xx, from_xy = (window_mean(derivative.mul_(share)) for derivative in (by_mx, by_xx, by_xy))
    return value, from_mx.add_(from_xx.mul_(x), alpha=2).addcmul_(from_xy, y)
