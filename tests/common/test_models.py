"""Layers and networks that papers share."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from common.models import ffc


def test_fourier_unit_filters_the_spectrum():
    torch.manual_seed(0)
    unit = ffc.FourierUnit(3).eval()
    x = torch.rand(1, 3, 8, 10) - 0.5
    with torch.no_grad():
        unit.mix.weight.copy_(2 * torch.eye(6)[:, :, None, None])
    spectrum = 2 * torch.fft.fft2(x, norm="ortho") / (1 + unit.norm.eps) ** 0.5
    half = torch.complex(F.relu(spectrum.real), F.relu(spectrum.imag))[..., :6]
    expected = torch.fft.irfft2(half, s=(8, 10), norm="ortho")
    torch.testing.assert_close(unit(x), expected)


def test_a_global_branch_without_channels_is_a_plain_convolution():
    torch.manual_seed(0)
    layer = ffc.FFC((3, 5), (0, 0)).eval()
    x = torch.rand(2, 3, 12, 9)
    local, empty = layer((x, None))
    convolved = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), layer.local_to_local.weight)
    torch.testing.assert_close(local, F.relu(convolved / (1 + layer.local_norm.eps) ** 0.5))
    assert empty is None
    assert layer.global_to_global is None and layer.local_to_global is None
