"""Points on the visual hull: where the masks of all training views allow an object to be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from common.splatting.errors import SceneError
from common.splatting.scene import PointCloud, View

__all__ = ["visual_hull"]


def visual_hull(
    views: Sequence[View],
    *,
    low: Sequence[float] = (-1.3, -1.3, -1.3),
    high: Sequence[float] = (1.3, 1.3, 1.3),
    cells: int = 96,
    count: int = 20_000,
    seed: int = 0,
) -> PointCloud:
    """Coloured points on the surface of the visual hull (Laurentini 1994), for objects with masks seen from all sides.

    A cell of a grid belongs to the hull if its centre falls on the mask (>= 0.5) of every view that has it in its
    image, and at least two views do. Points are drawn in the cells of the hull's surface. A point's colour is that of
    the view it lies closest to among those where no hull cell is in front of it; concave parts stay filled.

    views   training views with masks
    low, high   corners of the box searched, world units; the default is the box of NeRF-synthetic scenes
    cells   along the longest side of the box
    count   points

    Raises SceneError for views without masks, fewer than two, and where the hull is empty or reaches the whole box.
    """
    masks = [view.mask for view in views if view.mask is not None]
    if len(views) < 2 or len(masks) < len(views):
        raise SceneError(
            f"visual_hull: {len(views)} views, {len(masks)} with a mask; expected two or more, all with one."
        )
    corner, size = torch.tensor(low), torch.tensor(high) - torch.tensor(low)
    if cells < 4 or not (size > 0).all():
        raise SceneError(
            f"visual_hull: box from {list(low)} to {list(high)} in {cells} cells; expected low < high, 4 cells."
        )
    step = float(size.max()) / cells
    shape = torch.ceil(size / step - 1e-4).long()
    axes = [torch.arange(int(number)) for number in shape]
    index = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    centers = (corner + (index + 0.5) * step).float()  # [X, Y, Z, 3]
    inside, witnesses = torch.ones(centers.shape[:3], dtype=torch.bool), torch.zeros(centers.shape[:3])
    for view in views:
        value, visible, _ = _sample(view, _planes(view), centers.reshape(-1, 3))
        allowed = (value[:, 3] >= 0.5) | ~visible
        inside &= allowed.reshape(inside.shape)
        witnesses += visible.reshape(inside.shape)
    inside &= witnesses >= 2
    # the surface: cells of the hull with a neighbour outside; what lies beyond the box counts as outside
    padded = F.pad(inside[None, None].float(), (1, 1, 1, 1, 1, 1))
    buried = -F.max_pool3d(-padded, 3, 1)[0, 0] > 0.5
    surface = centers[inside & ~buried]
    if len(surface) == 0 or inside.all():
        raise SceneError(
            f"visual_hull: {int(inside.sum())} of {inside.numel()} cells are in the hull; expected some, not all. "
            "Check the masks and the box (low, high)."
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(surface), (count,), generator=generator)
    points = surface[drawn] + step * (torch.rand(count, 3, generator=generator) - 0.5)
    colors, seen = _colors(views, points, surface, step)
    return PointCloud(points, colors, None, tuple(view.name for view in views), seen)


def _colors(views: Sequence[View], points: Tensor, surface: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """Colour [P, 3] of points from the closest view that sees them past the surface cells, and who sees them [P, V]."""
    best = torch.full(points.shape[:1], torch.inf)
    colors = torch.zeros_like(points)
    seen = torch.zeros(len(points), len(views), dtype=torch.bool)
    for number, view in enumerate(views):
        value, visible, depth = _sample(view, _planes(view), points)
        front = _front(view, surface, step)
        pixels = view.camera.project(points)[0].long()
        height, width = front.shape
        row, column = pixels[:, 1].clamp(0, height - 1), pixels[:, 0].clamp(0, width - 1)
        visible &= depth <= front[row, column] + 2 * step
        seen[:, number] = visible
        closer = torch.where(visible, depth, torch.inf) < best
        colors[closer] = value[closer, :3]
        best = torch.where(closer, depth, best)
    hidden = torch.isinf(best)
    colors[hidden] = colors[~hidden].mean(dim=0) if (~hidden).any() else 0.5
    return colors, seen


def _front(view: View, surface: Tensor, step: float) -> Tensor:
    """[H, W] depth of the first surface cell: cells as squares of their size in the image; inf where there is none."""
    pixels, depth = view.camera.project(surface)
    height, width = view.image.shape[:2]
    ahead = depth > 0
    # a raster so coarse that neighbouring cells fall on neighbouring pixels leaves no gaps to look through
    cell = max(1.0, float(view.camera.K[0, 0]) * step / float(depth[ahead].median()))
    rows, columns = int(height / cell) + 1, int(width / cell) + 1
    place = (pixels / cell).long()
    fits = ahead & (place >= 0).all(dim=1) & (place[:, 0] < columns) & (place[:, 1] < rows)
    flat = torch.full((rows * columns,), torch.inf)
    flat.scatter_reduce_(0, place[fits, 1] * columns + place[fits, 0], depth[fits], "amin")
    row = (torch.arange(height) / cell).long()
    column = (torch.arange(width) / cell).long()
    return flat.reshape(rows, columns)[row][:, column]


def _planes(view: View) -> Tensor:
    """[1, 4, H, W] colour and mask."""
    assert view.mask is not None, "checked by visual_hull"
    return torch.cat([view.image, view.mask[..., None]], dim=-1).movedim(-1, 0)[None]


def _sample(view: View, planes: Tensor, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values [P, 4] of the nearest pixel, whether it is in the image [P], and depths [P]."""
    pixels, depth = view.camera.project(points)
    size = pixels.new_tensor([view.camera.width, view.camera.height])
    visible = (depth > 0) & (pixels >= 0).all(dim=1) & (pixels < size).all(dim=1)
    place = torch.where(visible[:, None], 2 * pixels / size - 1, 2.0)[None, None]
    value = F.grid_sample(planes, place, mode="nearest", align_corners=False)[0, :, 0].T
    return value, visible, depth
