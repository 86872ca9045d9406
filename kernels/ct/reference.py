"""Joseph's projector in plain torch: slow, obviously right, the specification of the fast ones.

Every ray of every geometry is a line X nx + Y ny = p with a unit normal n. It is followed along its dominant axis: on
each image row (or column) it reads the two pixels beside the hit by linear interpolation and weighs them with the
length it travels from one row to the next, pixel / |nx| (or pixel / |ny|). Pixels outside the image are zero.
(P. M. Joseph, "An improved algorithm for reprojecting rays through pixel images", IEEE Trans. Med. Imaging 1, 1982.)

Positions and weights are computed in float64 whatever the dtype of the data. Memory: a few K x max(H, W) float64
tables, for one view at a time. On a GPU `backproject` adds with atomics, so its last bits vary there from run to run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.ct.geometry import FanBeam, ParallelBeam

__all__ = ["backproject", "project"]


def project(image: Tensor, geometry: ParallelBeam | FanBeam) -> Tensor:
    """image [B, H, W] -> sinogram [B, V, K], in the dtype and on the device of the image."""
    flat = torch.nn.functional.pad(image.flatten(1), (0, 1))  # [B, H*W + 1]: the last pixel stands for all outside
    out = image.new_zeros(len(image), *geometry.sinogram_shape)
    for view in range(geometry.views):
        pixels, weights = _taps(geometry, view, image)  # [K, 2L]
        for b in range(len(image)):
            out[b, view] = (flat[b][pixels] * weights).sum(-1)
    return out


def backproject(sinogram: Tensor, geometry: ParallelBeam | FanBeam) -> Tensor:
    """The exact adjoint: sinogram [B, V, K] -> image [B, H, W], writing where `project` reads, with its weights."""
    height, width = geometry.shape
    flat = sinogram.new_zeros(len(sinogram), height * width + 1)
    for view in range(geometry.views):
        pixels, weights = _taps(geometry, view, sinogram)
        for b in range(len(sinogram)):
            flat[b].index_add_(0, pixels.flatten(), (sinogram[b, view, :, None] * weights).flatten())
    return flat[:, :-1].reshape(-1, height, width)


def _taps(geometry: ParallelBeam | FanBeam, view: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Flat indices and weights [K, 2L] of the pixels that the rays of a view read; L = max(H, W) lines.

    Index H*W, with weight 0, is the pixel outside.
    """
    (height, width), d = geometry.shape, geometry.pixel
    device = "cpu" if like.device.type == "mps" else like.device  # MPS has no float64
    nx, ny, p = (x[:, None].to(device) for x in geometry.lines(view))  # [K, 1]
    line = torch.arange(max(height, width), dtype=torch.float64, device=device)  # [L]
    # the ray meets every row once; otherwise every column. A ray at 45° counts as the former whatever the last bit of
    # its sine says: the same rule, with the same slack, is in geometry.cpp
    by_rows = nx.abs() >= ny.abs() * (1 - 1e-12)

    # where the ray meets row `line` (as a column) or column `line` (as a row), in pixels, from X nx + Y ny = p
    y, x = ((height - 1) / 2 - line) * d, (line - (width - 1) / 2) * d
    column = (p - y * ny) / torch.where(by_rows, nx, 1) / d + (width - 1) / 2  # [K, L]
    row = (height - 1) / 2 - (p - x * nx) / torch.where(by_rows, 1, ny) / d
    hit = torch.where(by_rows, column, row)[..., None]
    step = d / torch.where(by_rows, nx, ny).abs()[..., None]  # mm from line to line

    near = hit.floor() + torch.arange(2, device=device)  # [K, L, 2]
    weight = (1 - (hit - near).abs()) * step
    by_rows, line = by_rows[..., None], line.long()[:, None]
    inside = (near >= 0) & (near < torch.where(by_rows, width, height)) & (line < torch.where(by_rows, height, width))
    near = torch.where(inside, near, 0).long()
    pixel = torch.where(by_rows, line * width + near, near * width + line)
    pixel, weight = torch.where(inside, pixel, height * width), torch.where(inside, weight, 0)
    return pixel.flatten(1).to(like.device), weight.flatten(1).to(like.device, like.dtype)
