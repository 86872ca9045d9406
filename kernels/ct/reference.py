"""Joseph's projector in plain torch: slow, obviously right, the specification of the fast ones.

Every ray of every geometry is a line X cos φ + Y sin φ = p. It is followed along its dominant axis: on each image row
(or column) it reads the two pixels beside the hit by linear interpolation and weighs them with the length it travels
per line, pixel / |cos φ| (or pixel / |sin φ|). Pixels outside the image are zero. (P. M. Joseph, IEEE TMI 1, 1982.)
"""

import torch
from torch import Tensor

from kernels.ct.geometry import FanBeam, ParallelBeam


def project(image: Tensor, geometry: ParallelBeam | FanBeam) -> Tensor:
    """image [B, H, W] -> sinogram [B, V, K], in the dtype and on the device of the image."""
    flat = image.flatten(1)  # [B, H*W]
    out = image.new_zeros(len(image), geometry.views, geometry.cells)
    for view in range(geometry.views):
        pixels, weights = _taps(geometry, view, image)  # [K, 2L] each
        for b in range(len(image)):
            out[b, view] = (flat[b][pixels] * weights).sum(-1)
    return out


def backproject(sinogram: Tensor, geometry: ParallelBeam | FanBeam) -> Tensor:
    """The exact adjoint: sinogram [B, V, K] -> image [B, H, W], adding up what `project` reads, with its weights."""
    height, width = geometry.shape
    out = sinogram.new_zeros(len(sinogram), height * width)
    for view in range(geometry.views):
        pixels, weights = _taps(geometry, view, sinogram)
        for b in range(len(sinogram)):
            out[b].index_add_(0, pixels.flatten(), (sinogram[b, view][:, None] * weights).flatten())
    return out.view(-1, height, width)


def _taps(geometry: ParallelBeam | FanBeam, view: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Flat pixel indices and weights [K, 2L] that the rays of one view read; L = max(H, W) lines."""
    (height, width), d = geometry.shape, geometry.pixel
    phi, p = (x[:, None].to(like.device) for x in geometry.rays(view))  # [K, 1] float64
    lines = torch.arange(max(height, width), dtype=torch.float64, device=like.device)  # [L]
    cos, sin = phi.cos(), phi.sin()
    steep = cos.abs() >= sin.abs()  # runs from row to row

    # where the ray hits line l, as a fractional pixel index along the line
    y, x = ((height - 1) / 2 - lines) * d, (lines - (width - 1) / 2) * d
    column = (p - y * sin) / torch.where(steep, cos, 1) / d + (width - 1) / 2  # [K, L]
    row = (height - 1) / 2 - (p - x * cos) / torch.where(steep, 1, sin) / d
    hit = torch.where(steep, column, row)
    length = d / torch.where(steep, cos, sin).abs()  # [K, 1] mm per line

    low = hit.floor()
    near = torch.stack([low, low + 1], -1)  # [K, L, 2]
    weight = (1 - (hit[..., None] - near).abs()) * length[..., None]
    across, along = torch.where(steep, width, height)[..., None], torch.where(steep, height, width)
    inside = (near >= 0) & (near < across) & (lines < along)[..., None]
    near, line = near.clamp(0, max(height, width) - 1).long(), lines.long()[:, None]
    pixel = torch.where(steep[..., None], line * width + near, near * width + line)
    weight = torch.where(inside, weight, 0).to(like.dtype)
    return torch.where(inside, pixel, 0).flatten(1), weight.flatten(1)
