"""Depth maps and dense points from a few posed views: plane-sweep stereo with semi-global smoothing.

The published sparse-view baselines start from fused multi-view stereo, which COLMAP computes on CUDA alone. This is the
classical counterpart for any machine: Collins' plane sweep (1996) with normalised cross-correlation, Hirschmueller's
semi-global matching (2008). `sweep_depth` gives one view's depth map, every pixel filled, right or wrong; `plane_sweep`
keeps, as points, what correlates and what the depth maps of other views agree on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.splatting.cameras import Camera
from common.splatting.errors import SceneError
from common.splatting.scene import PointCloud, View

__all__ = ["DepthMap", "depth_range", "plane_sweep", "sweep_depth"]

MAX_PLANES = 192  # the cost volume is planes x height x width floats
_FLAT = 1e-4  # variance of grey values in a window below which its correlation says nothing
_UNKNOWN = 0.5  # cost where nothing is known: as for no correlation
_STEP, _JUMP = 0.05, 0.5  # penalties for a change of depth by one plane and by more, in units of cost (0..1)


@dataclass(frozen=True, eq=False)
class DepthMap:
    """What one reference view says.

    depth        [H, W] float32, along its optical axis
    correlation  [H, W] float32, -1..1: of the windows at that depth, mean of the better half of the other views
    step         [H, W] float32: distance in depth between neighbouring planes there, the resolution of `depth`
    """

    depth: Tensor
    correlation: Tensor
    step: Tensor


def plane_sweep(
    views: Sequence[View],
    near: float,
    far: float,
    *,
    planes: int | None = None,
    window: int = 7,
    min_correlation: float = 0.2,
    agree: int = 1,
    neighbours: int = 4,
    masked: bool = True,
    count: int | None = 20_000,
    seed: int = 0,
) -> PointCloud:
    """Points on the surfaces that at least `agree` + 1 of the views see alike, with the views' colours and tracks.

    views   two or more, training views only; close enough together that windows of pixels look alike. Of the points of
            generated scenes, nine in ten lie within 5 % of the true depth at 10 degrees between neighbours. On a flat
            front that holds up to 45 degrees, with less than half the points; on objects, 7 to 9 in ten at 33 degrees
    near, far   depths between which to look, along the optical axes: see `depth_range`
    planes  depths tried, evenly spaced in 1 / depth; None: so many that neighbours lie a pixel apart in the views,
            16 to 192
    window  side of the square of pixels compared, odd
    min_correlation   least correlation of the windows, -1..1; a high one leaves holes in plain walls and gains
            little: the views' agreement sorts out more
    agree   so many other views must have found the same depth, to within a plane and a half
    neighbours   a view is compared with so many others, those whose cameras are closest
    masked  pixels that a view's mask calls empty (< 0.5) give no points
    count   points kept, drawn at random by `seed`; None for all
    cost    about 25 s for three views of 504 x 378 on one core; memory 16 planes x H x W bytes

    Raises SceneError for fewer than two views, a bad range, and where no point survives.
    """
    _check(views, near, far, window, planes)
    if not 1 <= agree < len(views):
        raise SceneError(f"plane_sweep: agree is 1 to {len(views) - 1} other views; got {agree}.")
    maps = [
        sweep_depth(views, index, near, far, planes=planes, window=window, neighbours=neighbours)
        for index in range(len(views))
    ]
    positions, colors, seen = [], [], []
    for number, (view, found) in enumerate(zip(views, maps, strict=True)):
        points = view.camera.backproject(found.depth).reshape(-1, 3)
        tracks = torch.stack(
            [
                torch.ones(len(points), dtype=torch.bool)
                if other == number
                else _agrees(points, views[other], maps[other])
                for other in range(len(views))
            ],
            dim=1,
        )
        kept = (found.correlation.flatten() >= min_correlation) & (tracks.sum(dim=1) > agree)
        if masked and view.mask is not None:
            kept &= view.mask.flatten() >= 0.5
        positions.append(points[kept])
        colors.append(view.image.reshape(-1, 3)[kept])
        seen.append(tracks[kept])
    names = tuple(view.name for view in views)
    cloud = PointCloud(torch.cat(positions), torch.cat(colors), None, names, torch.cat(seen))
    if len(cloud) == 0:
        raise SceneError(
            f"plane_sweep: no depth between {near:.4g} and {far:.4g} on which {agree + 1} of the {len(views)} views "
            "agree; check the range and the poses, or take views that are closer together."
        )
    if count is None or len(cloud) <= count:
        return cloud
    return cloud.select(torch.randperm(len(cloud), generator=torch.Generator().manual_seed(seed))[:count])


def sweep_depth(
    views: Sequence[View],
    index: int,
    near: float,
    far: float,
    *,
    planes: int | None = None,
    window: int = 7,
    neighbours: int = 4,
) -> DepthMap:
    """The depth map of one view, every pixel filled, from others; arguments as in `plane_sweep`."""
    _check(views, near, far, window, planes)
    reference = views[index]
    others = [view for number, view in enumerate(views) if number != index]
    others.sort(key=lambda view: float((view.camera.center - reference.camera.center).norm()))
    others = others[:neighbours]
    count = planes or _planes(reference.camera, [view.camera for view in others], near, far)
    inverse = torch.linspace(1 / far, 1 / near, count, device=reference.image.device)
    cost = _matching_cost(reference, others, inverse, window)
    smooth = _semi_global(cost)
    best = smooth.argmin(dim=0, keepdim=True)
    correlation = 1 - 2 * cost.gather(0, best)[0]
    # the minimum of the parabola through the best plane and its neighbours
    inner = best.clamp(1, count - 2)
    low, middle, high = (smooth.gather(0, inner + offset)[0] for offset in (-1, 0, 1))
    bend = low - 2 * middle + high
    shift = torch.where((bend > 1e-6) & (inner == best)[0], 0.5 * (low - high) / bend.clamp_min(1e-6), 0.0)
    at = inverse[0] + (inverse[1] - inverse[0]) * (best[0] + shift.clamp(-0.5, 0.5))
    depth = 1 / at
    return DepthMap(depth, correlation, (inverse[1] - inverse[0]) * depth**2)


def depth_range(points: PointCloud, views: Sequence[View], *, margin: float = 1.25) -> tuple[float, float]:
    """Depths between which a cloud lies, seen from the views: its 1st and 99th percentile, widened by `margin`.

    Raises SceneError where no point lies in front of the views.
    """
    depths = torch.cat([view.camera.project(points.positions)[1] for view in views])
    depths = depths[depths > 0]
    if len(depths) == 0 or margin < 1:
        raise SceneError(f"depth_range: {len(depths)} points before the views, margin {margin}; expected some, >= 1.")
    ordered, last = depths.sort().values, len(depths) - 1
    return float(ordered[round(0.01 * last)]) / margin, float(ordered[round(0.99 * last)]) * margin


def _check(views: Sequence[View], near: float, far: float, window: int, planes: int | None) -> None:
    if len(views) < 2:
        raise SceneError(f"plane_sweep: {len(views)} views; stereo needs two or more.")
    if not 0 < near < far < math.inf:
        raise SceneError(f"plane_sweep: near {near:.4g} and far {far:.4g}; expected 0 < near < far, as depths.")
    if window < 3 or window % 2 == 0 or (planes is not None and planes < 3):
        raise SceneError(f"plane_sweep: window {window} and {planes} planes; expected an odd window >= 3, planes >= 3.")


def _planes(reference: Camera, others: Sequence[Camera], near: float, far: float) -> int:
    """Planes for a step of a pixel in the view where the image of a reference pixel moves most."""
    rays = reference.rays()[:: max(1, reference.height // 8), :: max(1, reference.width // 8)].reshape(-1, 3)
    moves = [0.0]
    for camera in others:
        (first, z_first), (last, z_last) = (camera.project(reference.center + depth * rays) for depth in (near, far))
        before = (z_first > 0) & (z_last > 0)
        moves += (first - last).norm(dim=1)[before].clamp(max=4 * camera.width).tolist()
    return min(MAX_PLANES, max(16, math.ceil(max(moves))))


def _matching_cost(reference: View, others: Sequence[View], inverse: Tensor, window: int) -> Tensor:
    """[D, H, W] costs 0..1, (1 - correlation) / 2 of windows, mean of the better half of the other views."""
    height, width = reference.image.shape[:2]
    grey = _grey(reference)
    mean = _mean(grey, window)
    variance = (_mean(grey * grey, window) - mean * mean).clamp_min(0)
    rays = reference.camera.rays().reshape(-1, 3).T  # [3, H W]
    sources = []
    for view in others:
        camera = view.camera
        turn = camera.K @ camera.viewmat[:3, :3]
        start = camera.K @ (camera.viewmat[:3, :3] @ reference.camera.center + camera.viewmat[:3, 3])
        sources.append((turn @ rays, start[:, None], _grey(view), camera))
    better = math.ceil(len(others) / 2)
    cost = grey.new_empty(len(inverse), height, width)
    for plane, level in enumerate(inverse.tolist()):
        each = []
        for along, start, image, camera in sources:
            x, y, z = along / level + start  # homogeneous pixels of the plane's points in the other view
            place = torch.stack([2 * x / (z * camera.width) - 1, 2 * y / (z * camera.height) - 1], dim=-1)
            place = torch.where((z > 0)[:, None], place, 2.0).reshape(1, height, width, 2)
            warped = F.grid_sample(image, place, align_corners=False)
            inside = (place.abs() < 1).all(dim=-1)[0]
            other = _mean(warped, window)
            spread = (_mean(warped * warped, window) - other * other).clamp_min(0)
            joint = _mean(grey * warped, window) - mean * other
            score = joint / torch.sqrt((variance + _FLAT) * (spread + _FLAT))
            each.append(torch.where(inside, (0.5 - 0.5 * score[0, 0]).clamp(0, 1), _UNKNOWN))
        costs = torch.stack(each)
        cost[plane] = costs.topk(better, dim=0, largest=False).values.mean(dim=0)
    return cost


def _semi_global(cost: Tensor) -> Tensor:
    """Sum of the path costs from left, right, top and bottom, [D, H, W]; the path cost is Hirschmueller's L_r."""
    total = torch.zeros_like(cost)
    by_column = cost.permute(2, 0, 1).contiguous()  # [W, D, H]
    by_row = cost.permute(1, 0, 2).contiguous()  # [H, D, W]
    for lines, back in ((by_column, (1, 2, 0)), (by_row, (1, 0, 2))):
        both = torch.zeros_like(lines)
        for order in (range(len(lines)), range(len(lines) - 1, -1, -1)):
            path = None
            for line in order:
                path = lines[line] if path is None else lines[line] + _cheapest_step(path)
                both[line] += path
        total += both.permute(*back)
    return total


def _cheapest_step(path: Tensor) -> Tensor:
    """[D, N] least cost to come from the pixel before, which had path costs `path`, less their minimum."""
    least = path.amin(dim=0, keepdim=True)
    step = path.clamp(max=least + _JUMP)
    step[1:] = torch.minimum(step[1:], path[:-1] + _STEP)
    step[:-1] = torch.minimum(step[:-1], path[1:] + _STEP)
    return step - least


def _agrees(points: Tensor, view: View, found: DepthMap) -> Tensor:
    """[P] bool: whether the depth map of a view has points [P, 3] at their depth, to within a plane and a half."""
    pixels, depth = view.camera.project(points)
    place = (2 * pixels / pixels.new_tensor([view.camera.width, view.camera.height]) - 1)[None, None]
    place = torch.where(torch.isfinite(place), place, 2.0)
    maps = torch.stack([found.depth, found.step])[None]
    there, step = F.grid_sample(maps, place, mode="nearest", align_corners=False)[0, :, 0]
    inside = (place[0, 0].abs() < 1).all(dim=1) & (depth > 0)
    return inside & ((there - depth).abs() <= 1.5 * step)


def _grey(view: View) -> Tensor:
    """[1, 1, H, W] luma (BT.601)."""
    return (view.image @ view.image.new_tensor([0.299, 0.587, 0.114]))[None, None]


def _mean(values: Tensor, window: int) -> Tensor:
    """Means over windows of [1, 1, H, W]; at the border over the part inside."""
    half = window // 2
    rows = F.avg_pool2d(values, (window, 1), 1, (half, 0), count_include_pad=False)
    return F.avg_pool2d(rows, (1, window), 1, (0, half), count_include_pad=False)
