"""Tomography in 2-D: filtered back-projection, iterative reconstruction, units and scans. Built on kernels.ct."""

from common.tomography.analytic import fbp, fbp_gloredi, view_weights
from common.tomography.iterative import Reconstruction, cgls, operator_norm, sirt, tv
from common.tomography.scans import add_photon_noise, gloredi_geometry, keep_views
from common.tomography.units import MM_PER_CM, MU_WATER_PER_MM, hu_to_mu, mu_to_hu

__all__ = [
    "MM_PER_CM",
    "MU_WATER_PER_MM",
    "Reconstruction",
    "add_photon_noise",
    "cgls",
    "fbp",
    "fbp_gloredi",
    "gloredi_geometry",
    "hu_to_mu",
    "keep_views",
    "mu_to_hu",
    "operator_norm",
    "sirt",
    "tv",
    "view_weights",
]
