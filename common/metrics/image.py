"""Image quality: PSNR, SSIM, RMSE, MAE, and the CT windows in Hounsfield units.

Arguments are (image, reference), real tensors of one shape [..., H, W]; every function works over the last two axes and
returns one float64 value an image, [...]. Average them as the protocol asks: the mean of slice PSNRs is not the PSNR of
the volume (flatten to [1, N] for that). The range of the data is always said, never guessed: guessing it from the
dtype once inflated published SSIMs by 3 to 6 points.

NaN or infinity in an input gives NaN (or infinity) for that image alone; nothing is masked. Equal images have a PSNR
of infinity.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CLIP", "LUNG", "SOFT_TISSUE", "Window", "mae", "psnr", "rmse", "rmse_hu", "ssim", "window"]


class Window(NamedTuple):
    """A display window in HU: `level` is its centre."""

    level: float
    width: float


CLIP = Window(level=500.0, width=3000.0)  # [-1000, 2000] HU: the range of the GloReDi, FreeSeed and CvG-Diff tables
SOFT_TISSUE = Window(level=50.0, width=500.0)
LUNG = Window(level=-600.0, width=800.0)

SSIM_WINDOW = 11  # cells of the Gaussian window and its deviation, as in Wang et al. 2004
SSIM_SIGMA = 1.5


def psnr(image: Tensor, reference: Tensor, *, data_range: float) -> Tensor:
    """Peak signal-to-noise ratio in dB, 10 log10(data_range^2 / MSE): [...] float64.

    Raises TypeError and ValueError for inputs that are not real tensors of one shape, or a range that is not positive.
    """
    image, reference = _pair(image, reference)
    return 20 * math.log10(_range(data_range)) - 10 * torch.log10(_mean((image - reference) ** 2))


def ssim(
    image: Tensor,
    reference: Tensor,
    *,
    data_range: float,
    border: Literal["crop", "zero"] = "crop",
) -> Tensor:
    """Mean structural similarity (Wang et al. 2004), Gaussian window 11 x 11, sigma 1.5, K = (0.01, 0.03): [...].

    border="crop" averages where the window lies inside the image, as the paper and scikit-image (gaussian_weights=True,
    use_sample_covariance=False) do; images must be at least 11 x 11. border="zero" continues both images with zeros and
    averages over all pixels, as GloReDi's released code does: higher where the rim is background. (torchmetrics 1.9
    does neither: it mirrors the images and averages over all pixels.)

    Raises TypeError and ValueError as psnr, and ValueError for images smaller than the window or an unknown border.
    """
    if border not in ("crop", "zero"):
        raise ValueError(f"unknown border {border!r}; expected 'crop' (inside only) or 'zero' (GloReDi's padding)")
    image, reference = _pair(image, reference)
    if border == "crop" and min(image.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(
            f"images of {tuple(image.shape[-2:])} are smaller than the window, {SSIM_WINDOW} pixels a side"
        )
    c1, c2 = (0.01 * _range(data_range)) ** 2, (0.03 * _range(data_range)) ** 2
    moments = torch.stack([image, reference, image * image, reference * reference, image * reference])
    mu_x, mu_y, xx, yy, xy = _smooth(moments, pad=SSIM_WINDOW // 2 if border == "zero" else 0)
    covariance, variances = xy - mu_x * mu_y, xx - mu_x**2 + yy - mu_y**2
    numerator = (2 * mu_x * mu_y + c1) * (2 * covariance + c2)
    return _mean(numerator / ((mu_x**2 + mu_y**2 + c1) * (variances + c2)))


def rmse(image: Tensor, reference: Tensor) -> Tensor:
    """Root mean squared error, in the unit of the images: [...] float64."""
    image, reference = _pair(image, reference)
    return torch.sqrt(_mean((image - reference) ** 2))


def mae(image: Tensor, reference: Tensor) -> Tensor:
    """Mean absolute error, in the unit of the images: [...] float64."""
    image, reference = _pair(image, reference)
    return _mean((image - reference).abs())


def window(hu: Tensor, level: float, width: float) -> Tensor:
    """HU to [0, 1]: level - width/2 and below is 0, level + width/2 and above is 1. `window(hu, *SOFT_TISSUE)`.

    Raises ValueError for a width that is not positive.
    """
    if not (math.isfinite(level) and math.isfinite(width) and width > 0):
        raise ValueError(f"a window has a finite level and a positive width in HU; got level {level}, width {width}")
    return ((hu - (level - width / 2)) / width).clamp(0, 1)


def rmse_hu(hu: Tensor, reference_hu: Tensor, *, clip: Window | None = CLIP) -> Tensor:
    """RMSE in HU after clipping both images to `clip` (None: as they are): [...] float64.

    With the default this is 3000 * 10^(-PSNR/20) for the PSNR of the windowed images, as in the papers' tables.
    """
    if clip is None:
        return rmse(hu, reference_hu)
    return clip.width * rmse(window(hu, *clip), window(reference_hu, *clip))


def _pair(image: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float64, after the checks. float64: SSIM subtracts nearly equal numbers."""
    for name, tensor in (("image", image), ("reference", reference)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}. Use torch.as_tensor(...).")
        if tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"{name} must be real; got {tensor.dtype}. Take .abs() or .float() as you mean it.")
    if image.shape != reference.shape:
        raise ValueError(f"image and reference differ in shape: {tuple(image.shape)} and {tuple(reference.shape)}")
    if image.ndim < 2 or 0 in image.shape[-2:]:
        raise ValueError(f"expected images [..., H, W] with pixels; got shape {tuple(image.shape)}")
    return image.double(), reference.double()


def _range(data_range: float) -> float:
    if not (math.isfinite(data_range) and data_range > 0):
        raise ValueError(f"data_range is the largest minus the smallest possible value, positive; got {data_range}")
    return float(data_range)


def _mean(values: Tensor) -> Tensor:
    return values.mean(dim=(-2, -1))


def _smooth(values: Tensor, pad: int) -> Tensor:
    """Gaussian means of [..., H, W] with `pad` zeros around; the window is separable."""
    offset = torch.arange(SSIM_WINDOW, dtype=values.dtype, device=values.device) - SSIM_WINDOW // 2
    weights = torch.exp(-0.5 * (offset / SSIM_SIGMA) ** 2)
    weights = weights / weights.sum()
    flat = values.reshape(-1, 1, *values.shape[-2:])
    flat = F.conv2d(flat, weights[None, None, :, None], padding=(pad, 0))
    flat = F.conv2d(flat, weights[None, None, None, :], padding=(0, pad))
    return flat.reshape(*values.shape[:-2], *flat.shape[-2:])
