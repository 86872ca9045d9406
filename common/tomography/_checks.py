"""What every reconstruction asks of its input."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from kernels.ct import FanBeam, ParallelBeam

Geometry = ParallelBeam | FanBeam


def check_sinogram(sinogram: Tensor, geometry: Geometry) -> None:
    """Raise where `sinogram` is not a float32 or float64 tensor [..., V, K] of `geometry`."""
    if not isinstance(geometry, (ParallelBeam, FanBeam)):
        raise TypeError(
            f"geometry: got {type(geometry).__name__}, expected kernels.ct.ParallelBeam or FanBeam. Build one from the "
            "view angles, the number of cells and the image shape."
        )
    _check_tensor("sinogram", sinogram)
    if tuple(sinogram.shape[-2:]) != tuple(geometry.sinogram_shape):
        views, cells = geometry.sinogram_shape
        raise ValueError(
            f"sinogram: got shape {tuple(sinogram.shape)}, expected [..., {views}, {cells}] (views, cells) as the "
            "geometry says. Transpose it, or build the geometry of the views you kept."
        )


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise where the tensor holds NaN or infinity: one such value spreads over the whole image."""
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    if bad:
        raise ValueError(
            f"{name}: got {bad} of {tensor.numel()} values NaN or infinite, expected finite ones. Mend dead cells and "
            "starved rays (log of zero counts) first."
        )


def check_image(name: str, image: Tensor, sinogram: Tensor, geometry: Geometry) -> None:
    """Raise where `image` is no [..., H, W] that goes with the sinogram's batch, type and device."""
    _check_tensor(name, image)
    expected = (*sinogram.shape[:-2], *geometry.shape)
    if tuple(image.shape) != expected or image.dtype != sinogram.dtype or image.device != sinogram.device:
        raise ValueError(
            f"{name}: got {tuple(image.shape)} {image.dtype} on {image.device}, expected {expected} {sinogram.dtype} "
            f"on {sinogram.device}, as the sinogram. Expand or convert it."
        )


def check_number(
    name: str, value: float, *, low: float = -math.inf, high: float = math.inf, inclusive: bool = True
) -> None:
    """Raise where `value` is not a finite number in [low, high], or (low, high) if not inclusive."""
    inside = low <= value <= high if inclusive else low < value < high
    if not (math.isfinite(value) and inside):
        brackets = "[]" if inclusive else "()"
        raise ValueError(f"{name}: got {value}, expected a number in {brackets[0]}{low}, {high}{brackets[1]}.")


def nearest(name: str, known: Iterable[str]) -> str:
    """' Did you mean ...?', or nothing where no known name is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.4)
    return f" Did you mean {near[0]!r}?" if near else ""


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor. Use torch.as_tensor(...).")
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: got {tensor.dtype}, expected float32 or float64. Convert it with .float().")
