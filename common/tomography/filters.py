"""The ramp filter of filtered back-projection and its windows.

The ramp |f| is sampled in space, not in frequency (Ramachandran and Lakshminarayanan 1971; Kak and Slaney, eq. 3.61):

    h[0] = 1/(4 d^2),   h[n] = -1/(pi n d)^2 for odd n,   0 for even n

for cells d apart. Sampling |f| in frequency instead would set its mean to zero and the image's level with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from common.tomography._checks import check_number, nearest

__all__ = ["WINDOWS", "filter_views", "ramp_kernel"]

# name -> factor at frequency f, given as a share of the Nyquist frequency 1/(2 d): from 1 at f = 0 downwards
WINDOWS: dict[str, Callable[[Tensor], Tensor]] = {
    "ram-lak": torch.ones_like,
    "shepp-logan": lambda f: torch.sinc(f / 2),
    "cosine": lambda f: torch.cos(math.pi / 2 * f),
    "hamming": lambda f: 0.54 + 0.46 * torch.cos(math.pi * f),
    "hann": lambda f: 0.5 + 0.5 * torch.cos(math.pi * f),
}


def filter_views(views: Tensor, spacing_mm: float, window: str = "ram-lak") -> Tensor:
    """Convolve each view with the windowed ramp, q[k] = d sum_j h[k - j] g[j].

    views       [..., K] float32 or float64; line integrals, no unit. Taken as zero outside its K cells
    spacing_mm  d > 0, the distance between cells (fan beam: on the virtual detector through the axis)
    window      a name in WINDOWS

    Returns [..., K] in 1/mm, differentiable. Raises ValueError for a spacing <= 0 or an unknown window.
    """
    check_number("spacing_mm", spacing_mm, low=0, inclusive=False)
    if window not in WINDOWS:
        raise ValueError(f"window: got {window!r}, expected one of {', '.join(WINDOWS)}.{nearest(window, WINDOWS)}")
    cells = views.shape[-1]
    if not cells:
        return views
    padded = 1 << (2 * cells - 1).bit_length()  # >= 2 K: no wrap-around, and a fast length
    response = torch.fft.rfft(ramp_kernel(padded, spacing_mm)).real
    response = spacing_mm * response * WINDOWS[window](torch.linspace(0, 1, len(response), dtype=torch.float64))
    spectrum = torch.fft.rfft(views, n=padded) * response.to(views)
    return torch.fft.irfft(spectrum, n=padded)[..., :cells]


def ramp_kernel(length: int, spacing_mm: float) -> Tensor:
    """h[n] in 1/mm^2, [length] float64 in FFT order: n = 0, 1, ..., then the negative n."""
    n = torch.fft.fftfreq(length, 1 / length, dtype=torch.float64).round()
    odd = n.abs() % 2 == 1
    kernel = torch.where(odd, -1 / (math.pi * n * spacing_mm).square().clamp_min(1e-300), torch.zeros_like(n))
    kernel[0] = 1 / (4 * spacing_mm**2)
    return kernel
