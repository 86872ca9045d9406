"""Hounsfield units (HU) and linear attenuation.

    HU = 1000 (mu / mu_water - 1),   mu_water = 0.0192 1/mm

Attenuation is in 1/mm throughout, so that line integrals along lengths in mm have no unit. GloReDi and its family write
mu = HU/1000 * 0.192 + 0.192 in 1/cm: the same line, `MM_PER_CM * hu_to_mu(hu)`.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["MM_PER_CM", "MU_WATER_PER_MM", "hu_to_mu", "mu_to_hu"]

MU_WATER_PER_MM = 0.0192  # water at about 70 keV, the value of GloReDi's released code
MM_PER_CM = 10.0


def hu_to_mu(hu: Tensor) -> Tensor:
    """HU -> attenuation in 1/mm, any shape. Values below -1000 HU, which no matter has, become negative."""
    return MU_WATER_PER_MM * (1 + hu / 1000)


def mu_to_hu(mu: Tensor) -> Tensor:
    """Attenuation in 1/mm -> HU, any shape."""
    return 1000 * (mu / MU_WATER_PER_MM - 1)
