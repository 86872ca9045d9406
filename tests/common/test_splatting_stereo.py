"""Points from training views: plane-sweep stereo, triangulation and visual hull, against truth."""

import numpy as np
import pytest
import torch
from PIL import Image

from common.splatting import (
    Camera,
    PointCloud,
    SceneError,
    View,
    depth_range,
    facade_scene,
    fern,
    intrinsics,
    look_at,
    object_scene,
    plane_sweep,
    triangulate,
    visual_hull,
)
from common.splatting.generated import facade_world
from common.splatting.raycast import Shape, Texture, World
from common.splatting.stereo import sweep_depth


@pytest.fixture(scope="module")
def facade():
    return facade_scene(1, views=3, tests=1, size=(72, 54), points=400)


def depth_errors(cloud, view):
    """Relative depth errors of the points that a view with true depth is said to have seen."""
    points = cloud.positions[cloud.seen[:, cloud.view_names.index(view.name)]]
    pixels, depth = view.camera.project(points)
    size = torch.tensor([view.camera.width, view.camera.height])
    inside = ((pixels >= 0) & (pixels < size)).all(dim=1)
    column, row = pixels[inside].long().unbind(dim=1)
    return (view.depth[row, column] - depth[inside]).abs() / depth[inside]


def test_a_plane_is_found_to_a_fraction_of_the_step():
    """Two cameras side by side before a wall of noise: parallax by hand, b f / z pixels."""
    generator = torch.Generator().manual_seed(0)
    wall = torch.rand(64, 140, 3, generator=generator)
    wall = torch.nn.functional.avg_pool2d(wall.movedim(-1, 0), 5, 1, 2).movedim(0, -1)
    K = torch.tensor([[100.0, 0, 48], [0, 100, 32], [0, 0, 1]])
    moved = torch.eye(4)
    moved[0, 3] = -0.5
    left, right = Camera(torch.eye(4), K, 96, 64), Camera(moved, K, 96, 64)
    depth = 100 * 0.5 / 10  # ten pixels of parallax
    views = [View("left", left, wall[:, 10:106]), View("right", right, wall[:, 20:116])]
    found = sweep_depth(views, 0, 2.5, 12.0, planes=31)  # half a pixel apart
    inner = found.depth[5:-5, 16:-5]
    assert (100 * 0.5 / inner - 10).abs().median() < 0.1  # pixels, a fifth of a step
    assert ((100 * 0.5 / inner - 10).abs() < 0.5).float().mean() > 0.98
    assert found.correlation[5:-5, 16:-5].median() > 0.75  # interpolated once, at half pixels
    assert torch.allclose(found.step / found.depth**2, (found.step / found.depth**2)[0, 0].expand(64, 96), rtol=1e-4)
    cloud = plane_sweep(views, 2.5, 12.0, planes=31, count=None)
    assert cloud.positions[:, 2].median() == pytest.approx(depth, rel=0.01)
    assert cloud.view_names == ("left", "right") and cloud.seen.all()


def test_the_facade_is_found_from_three_views_35_degrees_apart(facade):
    near, far = depth_range(facade.points, facade.train)
    cloud = plane_sweep(facade.train, near, far, planes=40, count=None)
    errors = torch.cat([depth_errors(cloud, view) for view in facade.train])
    assert len(cloud) > 0.4 * 3 * 72 * 54
    # 40 planes lie 2 to 6 percent apart
    assert errors.median() < 0.02 and (errors < 0.05).float().mean() > 0.85
    pixels, _ = facade.train[0].camera.project(cloud.positions[cloud.seen[:, 0]])
    column, row = (pixels.long().clamp(min=0) % torch.tensor([72, 54])).unbind(dim=1)
    off = (facade.train[0].image[row, column] - cloud.colors[cloud.seen[:, 0]]).abs().mean(dim=1)
    assert off.median() < 0.1


def test_wrong_poses_are_not_agreed_upon(facade):
    """The sabotage of the test above: with the images exchanged, the views find far less in common."""
    near, far = depth_range(facade.points, facade.train)
    honest = plane_sweep(facade.train, near, far, planes=40, count=None)
    swapped = [
        View(view.name, view.camera, other.image, view.mask, view.depth)
        for view, other in zip(facade.train, (*facade.train[1:], facade.train[0]), strict=True)
    ]
    wrong = plane_sweep(swapped, near, far, planes=40, count=None)
    assert len(wrong) < 0.7 * len(honest)
    assert torch.cat([depth_errors(wrong, view) for view in swapped]).median() > 0.05


def test_sky_gives_no_points_and_count_limits_them(facade):
    near, far = depth_range(facade.points, facade.train)
    limited, again, other = (
        plane_sweep(facade.train, near, far, planes=20, count=300, seed=seed) for seed in (0, 0, 1)
    )
    assert len(limited) == 300 and torch.equal(limited.positions, again.positions)
    assert not torch.equal(limited.positions, other.positions)
    everywhere = plane_sweep(facade.train, near, far, planes=40, count=None, masked=False)
    masked = plane_sweep(facade.train, near, far, planes=40, count=None)
    assert len(masked) < len(everywhere)
    both = plane_sweep(facade.train, near, far, planes=40, count=None, agree=2)
    assert 0 < len(both) < len(masked) and both.seen.all()


def test_stereo_of_the_motorcycle(real_data):
    """A real pair with true disparity (Middlebury). Half size, to be quick; disparities there are 3.6 to 30 pixels."""
    folder = real_data("scene_motorcycle_stereo")
    focal, cx, cy, shift, baseline = 994.978, 311.193, 254.877, 31.086, 193.001
    true = torch.from_numpy(np.load(folder / "motorcycle_disp.npz")["arr_0"])
    known = torch.isfinite(true)
    views = []
    for name, place, middle in (("left", 0.0, cx), ("right", baseline, cx + shift)):
        pixels = np.array(Image.open(folder / f"motorcycle_{name}.png").convert("RGB"))
        pose = torch.eye(4)
        pose[0, 3] = -place
        K = torch.tensor([[focal, 0, middle + 0.5], [0, focal, cy + 0.5], [0, 0, 1]])
        views.append(View(name, Camera(pose, K, 741, 500), torch.from_numpy(pixels).float() / 255).resized(370, 250))
    depth = torch.where(known, focal * baseline / (true + shift), 0.0)
    small = torch.nn.functional.interpolate(depth[None, None], size=(250, 370), mode="nearest-exact")[0, 0]
    found = sweep_depth(views, 0, float(depth[known].min()), float(depth.max()))
    there = small > 0
    off = (focal * baseline / found.depth[there] - focal * baseline / small[there]).abs()  # pixels of the full size
    assert off.median() < 0.5
    assert (off > 4).float().mean() < 0.2  # a tenth of the pixels is hidden in the right picture


def test_fern_dense_start_agrees_with_the_photographs_held_out(real_data):
    """The points of three training views, projected into a test view, have its colours."""
    real_data("scene_fern_llff")
    scene = fern(views=3, factor=32)
    cloud = plane_sweep(scene.train, *depth_range(scene.points, scene.train), count=None)
    assert set(cloud.view_names) == {view.name for view in scene.train}
    view = scene.test[1]
    pixels, depth = view.camera.project(cloud.positions)
    size = torch.tensor([view.camera.width, view.camera.height])
    inside = ((pixels >= 0) & (pixels < size)).all(dim=1) & (depth > 0)
    column, row = pixels[inside].long().unbind(dim=1)
    front = torch.full((size[0] * size[1],), torch.inf).scatter_reduce(0, row * size[0] + column, depth[inside], "amin")
    shown = depth[inside] < 1.02 * front[row * size[0] + column]
    off = (view.image[row, column] - cloud.colors[inside]).abs().mean(dim=1)[shown]
    assert inside.float().mean() > 0.8
    assert off.median() < 0.08
    assert (view.image[row, column] - cloud.colors[inside].roll(5, dims=0)).abs().mean(
        dim=1
    ).median() > 1.2 * off.median()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"near": 0.0}, "0 < near < far"),
        ({"far": 1.0}, "0 < near < far"),
        ({"window": 4}, "odd window"),
        ({"planes": 2}, "planes >= 3"),
        ({"agree": 3}, "agree is 1 to 2"),
        ({"agree": 0}, "agree is 1 to 2"),
        ({"min_correlation": 1.1}, "no depth between 3 and 9 on which 2 of the 3 views"),
    ],
)
def test_stereo_refuses_what_it_cannot_do(facade, arguments, message):
    values = {"near": 3.0, "far": 9.0, "planes": 4} | arguments
    with pytest.raises(SceneError, match=message):
        plane_sweep(facade.train, values.pop("near"), values.pop("far"), **values)


def test_stereo_needs_two_views_and_a_range_needs_points(facade):
    with pytest.raises(SceneError, match="1 views; stereo needs two"):
        plane_sweep(facade.train[:1], 3, 9)
    behind = PointCloud(torch.tensor([[0.0, -100, 0]]), torch.zeros(1, 3))
    with pytest.raises(SceneError, match="0 points before the views"):
        depth_range(behind, facade.train)
    near, far = depth_range(facade.points, facade.train, margin=1)
    depths = torch.cat([view.camera.project(facade.points.positions)[1] for view in facade.train])
    assert 0.97 < ((depths >= near) & (depths <= far)).float().mean() < 0.99


def test_triangulated_points_lie_on_the_surface():
    scene = facade_scene(0, views=3, tests=1, size=(256, 192), points=10)
    cloud = triangulate(scene.train)
    assert len(cloud) > 60 and (cloud.seen.sum(dim=1) >= 2).all()
    assert cloud.view_names == tuple(view.name for view in scene.train)
    errors = torch.cat([depth_errors(cloud, view) for view in scene.train])
    assert errors.median() < 0.005 and torch.quantile(errors, 0.8) < 0.03
    assert ((cloud.colors >= 0) & (cloud.colors <= 1)).all() and cloud.colors.std() > 0.05
    again = triangulate(scene.train)
    assert torch.equal(cloud.positions, again.positions), "seeded"


def test_triangulation_says_when_nothing_matches():
    world = facade_world(0)
    K = intrinsics(96, 72, fov_x_rad=1.0)
    wall = world.render(look_at((0, -7, 2), (0, 0, 2), (0, 0, 1), K, 96, 72), "wall")
    street = world.render(look_at((0, -7, 2), (0, -20, 1), (0, 0, 1), K, 96, 72), "street")
    with pytest.raises(SceneError, match="2 views share no point"):
        triangulate([wall, street])
    with pytest.raises(SceneError, match="expected two or more, with different names"):
        triangulate([wall, wall])


@pytest.fixture(scope="module")
def ball():
    """A red ball of radius 0.5 at (0.1, 0, 0.2), lit from above, from nine sides."""
    no_waves = torch.zeros(2, 1, 3).double()
    red = Texture("plain", torch.tensor([[0.9, 0.1, 0.1]] * 3).double(), 1.0, no_waves, no_waves[..., 0])
    center = torch.tensor([0.1, 0.0, 0.2]).double()
    solid = Shape("sphere", center, torch.full((3,), 0.5).double(), torch.eye(3).double(), red)
    world = World((solid,), torch.tensor([[0.0, 0, 9]] * 3).double(), torch.zeros(3))
    K = intrinsics(80, 80, fov_x_rad=0.7)
    views = []
    for index in range(9):
        angle = torch.tensor(2 * torch.pi * index / 9)
        eye = (3 * float(angle.cos()), 3 * float(angle.sin()), (-1.0, 0.5, 2.0)[index % 3])
        views.append(world.render(look_at(eye, (0, 0, 0), (0, 0, 1), K, 80, 80), f"v{index}"))
    return views


def test_the_hull_of_a_ball_is_a_little_larger_than_the_ball(ball):
    cloud = visual_hull(ball, cells=48, count=4000)
    radius = (cloud.positions - torch.tensor([0.1, 0.0, 0.2])).norm(dim=1)
    cell = 2.6 / 48
    # a surface cell lies up to a diagonal (1.73 cells) inside, a point of it up to half a diagonal more
    assert radius.min() > 0.5 - 2.6 * cell, "the hull holds the object"
    assert radius.median() < 0.5 + 2 * cell and radius.max() < 0.5 + 4 * cell
    assert cloud.seen.any(dim=1).float().mean() > 0.95
    # seen from above it is lit, from below not: colours come from the side that a point is on
    top, bottom = (cloud.colors[mask].mean() for mask in (cloud.positions[:, 2] > 0.5, cloud.positions[:, 2] < -0.1))
    assert top > 1.3 * bottom


def test_the_hull_uses_masks_of_its_views_alone():
    scene = object_scene(0, views=9, tests=1, size=(64, 48), points=10)
    cloud = visual_hull(scene.train, low=(-1, -1, -0.1), high=(1, 1, 1.6), cells=40, count=500)
    for view in scene.train:
        pixels, _ = view.camera.project(cloud.positions)
        size = torch.tensor([64, 48])
        inside = ((pixels >= 0) & (pixels < size)).all(dim=1)
        column, row = pixels[inside].long().unbind(dim=1)
        spread = torch.nn.functional.max_pool2d(view.mask[None], 5, 1, 2)[0]  # half a cell is two pixels
        assert (spread[row, column] > 0).float().mean() > 0.97


def test_hull_errors(ball):
    with pytest.raises(SceneError, match="1 views, 1 with a mask"):
        visual_hull(ball[:1])
    bare = View("bare", ball[0].camera, ball[0].image)
    with pytest.raises(SceneError, match="2 views, 1 with a mask"):
        visual_hull([ball[1], bare])
    with pytest.raises(SceneError, match="expected low < high"):
        visual_hull(ball, low=(0, 0, 0), high=(1, 1, 0))
    with pytest.raises(SceneError, match=r"0 of \d+ cells are in the hull"):
        visual_hull(ball, low=(0.8, 0.8, 0.8), high=(1, 1, 1), cells=16)
    with pytest.raises(SceneError, match="expected some, not all"):
        visual_hull(ball, low=(0, -0.1, 0.1), high=(0.2, 0.1, 0.3), cells=16)
