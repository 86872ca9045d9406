"""Virtual cameras and pictures of points: places, colours and the loss, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from common.splatting import Camera, PointCloud, SceneError, View, intrinsics, look_at
from common.splatting.model import Gaussians
from common.splatting.virtual import PointImage, point_image, point_image_loss, virtual_cameras

SIZE = 24
RED = (0.9, 0.1, 0.1)


def camera(x: float, size: int = SIZE) -> Camera:
    K = intrinsics(size, size, fov_x_rad=math.radians(60))
    return look_at((x, -3.0, 0), (0, 0, 0), (0, 0, 1), K, size, size)


def view(x: float, size: int = SIZE) -> View:
    return View(f"at {x}", camera(x, size), torch.full((size, size, 3), 0.5))


def square(side: float) -> PointCloud:
    """4,000 red points of a square in the plane y = 0, which the cameras face."""
    flat = side * (torch.rand(4_000, 2, generator=torch.Generator().manual_seed(0)) - 0.5)
    return PointCloud(torch.stack([flat[:, 0], torch.zeros(4_000), flat[:, 1]], dim=1), torch.tensor([RED] * 4_000))


def test_virtual_cameras_lie_evenly_between_neighbours():
    views = [view(x) for x in (-1.0, 0.0, 1.0)]
    found = virtual_cameras(views, 3, closed=False)
    assert len(found) == 6 and len(virtual_cameras(views, 3, closed=True)) == 9
    middles = torch.stack([c.center for c in found])
    torch.testing.assert_close(middles[:, 0], torch.tensor([-0.75, -0.5, -0.25, 0.25, 0.5, 0.75]), atol=1e-5, rtol=0)
    torch.testing.assert_close(middles[:, 1], torch.full((6,), -3.0), atol=1e-5, rtol=0)
    last = virtual_cameras(views, 1, closed=True)[-1]  # between the last and the first
    torch.testing.assert_close(last.center, torch.tensor([0.0, -3.0, 0.0]), atol=1e-5, rtol=0)


def test_virtual_cameras_need_views_of_one_size():
    with pytest.raises(SceneError, match="sizes differ"):
        virtual_cameras([view(0.0), view(1.0, size=12)], 1, closed=False)


def test_points_are_drawn_in_their_colours_in_front_of_white():
    found = point_image(square(1.0), camera(0.0))
    torch.testing.assert_close(found.image[12, 12], torch.tensor(RED), atol=0.03, rtol=0)  # nearly opaque: 0.99
    torch.testing.assert_close(found.image[0, 0], torch.ones(3))
    assert found.cover[12, 12] > 0.95 and found.cover[0, 0] == 0


@torch.no_grad()
def test_the_loss_is_the_mean_difference_in_front_of_white():
    points = point_image(square(1.0), camera(0.0))
    gone = Gaussians.from_points(square(1.0), sh_degree=0, initial_opacity=1e-4).splats()  # fainter than is drawn
    difference = (1 - points.image).abs()  # the render is white
    assert float(point_image_loss(gone, points)) == pytest.approx(float(difference.mean()), abs=1e-6)
    nothing = PointImage(points.camera, torch.ones_like(points.image), torch.zeros_like(points.cover))
    assert float(point_image_loss(gone, nothing)) == pytest.approx(0, abs=1e-6), "white is wanted, white is there"


@torch.no_grad()
def test_covered_looks_only_where_there_are_points():
    small = point_image(square(0.5), camera(0.0))
    large = Gaussians.from_points(square(3.0), sh_degree=0, initial_opacity=0.95).splats()  # red everywhere
    assert float(point_image_loss(large, small)) > 0.4, "red where white is wanted"
    assert float(point_image_loss(large, small, covered=True)) < 0.05, "red where the points are red"
