"""3-D Gaussian splatting on any machine: images of Gaussians, and gradients back to them.

    from kernels.splat import rasterization
    render, alphas, meta = rasterization(means, quats, scales, opacities, colors, viewmats, Ks, width, height)

`rasterization` has the signature, the shapes and the `meta` of gsplat 1.5.3, so that code written for gsplat runs where
there is no CUDA. On the CPU it is three stages, each a function of its own: `projection`, `spherical_harmonics`,
`rasterize`. They run in float32 in C++ and in float64 through the plain-torch `reference.py`, the specification. On a
CUDA device gsplat does the work. KERNELS_BACKEND=reference|cpu forces one. `relocation` and `position_noise` are what
3DGS-MCMC needs beside. The same call gives the same bits again, whatever the number of threads.
"""

from __future__ import annotations

from kernels.splat.pipeline import rasterization
from kernels.splat.stages import position_noise, projection, rasterize, relocation, spherical_harmonics

__all__ = ["position_noise", "projection", "rasterization", "rasterize", "relocation", "spherical_harmonics"]
