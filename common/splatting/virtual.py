"""Cameras that nobody stood at, between those of the photographs, and what they see of a cloud of points.

A picture of the points from there can be compared with a render of the Gaussians, which keeps them together where no
photograph looks: the virtual-view loss of LM-Gaussian (Yu et al., arXiv 2409.03456).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.splatting.cameras import Camera, interpolate
from common.splatting.model import Splats, render
from common.splatting.scene import PointCloud, View

__all__ = ["PointImage", "point_image", "point_image_loss", "virtual_cameras"]

POINT_RADIUS = 0.01  # of the shorter half of the image, in LM-Gaussian's code


def virtual_cameras(views: Sequence[View], between: int, *, closed: bool) -> list[Camera]:
    """`between` cameras inside every pair of neighbouring views: rotations by slerp, centres along a straight line.

    views   in such an order that neighbours follow each other
    closed  the last view and the first are neighbours too

    Raises SceneError where image sizes differ.
    """
    stops = [view.camera for view in views]
    pairs = list(zip(stops, [*stops[1:], stops[0]], strict=True))[: None if closed else -1]
    return [interpolate(a, b, (step + 1) / (between + 1)) for a, b in pairs for step in range(between)]


@dataclass(frozen=True, eq=False)
class PointImage:
    """What a virtual camera sees of the points, in front of white.

    image [H, W, 3];  cover [H, W] 0..1, how much of the pixel is points
    """

    camera: Camera
    image: Tensor
    cover: Tensor


@torch.no_grad()
def point_image(cloud: PointCloud, camera: Camera) -> PointImage:
    """The points as small discs, here round Gaussians of POINT_RADIUS that are nearly opaque."""
    _, depth = camera.project(cloud.positions)
    radius = POINT_RADIUS * min(camera.height, camera.width) / 2  # pixels
    scales = (0.5 * radius * depth.clamp_min(1e-6) / camera.K[0, 0])[:, None].expand(-1, 3)
    still = scales.new_tensor([1.0, 0, 0, 0]).expand(len(scales), 4)
    splats = Splats(cloud.positions, still, scales.contiguous(), torch.full_like(depth, 0.99), cloud.colors)
    drawn = render(splats, camera, background=scales.new_ones(3))
    return PointImage(camera, drawn.image, drawn.alpha)


def point_image_loss(splats: Splats, points: PointImage, *, covered: bool = False) -> Tensor:
    """Mean |R - P| between a render of the Gaussians and the picture of the points, both in front of white.

    covered  count a pixel by how much of it is points; without it, white is wanted where there are none
    """
    drawn = render(splats, points.camera, background=torch.ones_like(points.image[0, 0])).image
    error = (drawn - points.image).abs()
    return (error * points.cover[..., None] if covered else error).mean()
