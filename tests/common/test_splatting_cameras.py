"""Cameras: projection against the textbook formula, interpolation and paths by their laws."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.splatting import Camera, SceneError, interpolate, intrinsics, look_at, orbit, path_through, spiral
from common.splatting.generated import facade_rig, object_rig

SIZE = (64, 48)
K = intrinsics(*SIZE, fov_x_rad=1.0)
UP = (0.0, 0.0, 1.0)
coordinate = st.floats(-3, 3, width=32)
points = st.tuples(coordinate, coordinate, coordinate)


def camera(eye=(3.0, 1.0, 1.5), target=(0.0, 0.0, 0.2)):
    return look_at(eye, target, UP, K, *SIZE)


def test_look_at_puts_the_target_in_the_middle_and_up_to_the_top():
    seen = camera()
    pixel, depth = seen.project(torch.tensor([[0.0, 0.0, 0.2], [0.0, 0.0, 0.7]]))
    assert torch.allclose(pixel[0], torch.tensor([32.0, 24.0]), atol=1e-4)
    assert depth[0] == pytest.approx(math.dist((3, 1, 1.5), (0, 0, 0.2)), rel=1e-6)
    assert pixel[1, 1] < 24 and pixel[1, 0] == pytest.approx(32, abs=1e-4)
    assert torch.allclose(seen.center, torch.tensor([3.0, 1.0, 1.5]), atol=1e-6)
    assert torch.allclose(seen.forward, -torch.tensor([3.0, 1.0, 1.3]) / seen.center.new_tensor([3, 1, 1.3]).norm())


def test_the_field_of_view_spans_the_image():
    edge = torch.tensor([[math.tan(0.5), 0.0, 1.0], [-math.tan(0.5), 0.0, 1.0]])
    pixel, _ = Camera(torch.eye(4), K, *SIZE).project(edge)
    assert torch.allclose(pixel[:, 0], torch.tensor([64.0, 0.0]), atol=1e-4)


def test_backproject_and_project_are_inverse_and_pixel_centres_are_halves():
    seen = camera()
    depth = 1 + torch.rand(48, 64, generator=torch.Generator().manual_seed(0))
    pixel, again = seen.project(seen.backproject(depth))
    row, column = torch.meshgrid(torch.arange(48) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    assert torch.allclose(pixel, torch.stack([column, row], dim=-1), atol=1e-3)  # float32 at values up to 64
    assert torch.allclose(again, depth, atol=1e-5)


def test_a_resized_camera_sees_the_same_directions():
    seen, small = camera(), camera().resized(32, 12)
    point = torch.tensor([0.3, -0.2, 0.4])
    assert torch.allclose(small.project(point)[0], seen.project(point)[0] * torch.tensor([0.5, 0.25]), atol=1e-4)
    assert torch.allclose(small.resized(*SIZE).K, seen.K)


@settings(max_examples=50, deadline=None)
@given(points, points, st.floats(0, 1))
def test_interpolation_keeps_rotations_and_goes_straight(first, second, t):
    far = torch.tensor([5.0, 0.0, 0.0])  # no camera stands on its target
    a, b = camera(torch.tensor(first) + far), camera(torch.tensor(second) + far, target=(0.3, 0.1, 0.0))
    between = interpolate(a, b, t)  # Camera itself refuses what is no rotation
    assert torch.allclose(between.center, torch.lerp(a.center, b.center, t), atol=2e-5)
    start, end, middle = (x.viewmat[:3, :3].double() for x in (a, b, between))

    def angle(rotation):
        # by the sine too: near zero the cosine alone loses half the digits
        sine = (rotation - rotation.T).norm() / math.sqrt(2)
        return float(torch.atan2(sine, rotation.trace() - 1))

    assert angle(middle @ start.T) == pytest.approx(t * angle(end @ start.T), abs=1e-5)


def test_half_a_turn_is_interpolated_too():
    """The rotation vector's hard case: at an angle of pi the antisymmetric part vanishes."""
    turned = torch.eye(4)
    turned[0, 0] = turned[2, 2] = -1
    quarter = interpolate(Camera(torch.eye(4), K, *SIZE), Camera(turned, K, *SIZE), 0.5)
    assert quarter.forward.abs().tolist() == pytest.approx([1, 0, 0], abs=1e-6)


def test_interpolation_refuses_different_sizes():
    with pytest.raises(SceneError, match=r"64 x 48 and 32 x 24"):
        interpolate(camera(), camera().resized(32, 24), 0.5)


def test_a_path_visits_its_cameras():
    rig = object_rig(SIZE)[:3]
    path = path_through(rig, 5)
    assert [torch.allclose(path[i].viewmat, rig[i // 2].viewmat, atol=1e-6) for i in (0, 2, 4)] == [True] * 3
    closed = path_through(rig, 6, closed=True)
    assert torch.allclose(closed[4].viewmat, rig[2].viewmat, atol=1e-6)
    assert torch.allclose(closed[5].center, (rig[2].center + rig[0].center) / 2, atol=1e-5)


def test_an_orbit_stands_level_at_one_distance_around_what_the_cameras_see():
    rig = object_rig(SIZE)  # stands on one side only, all looking at (0, 0, 0.35)
    path = orbit(rig, 8)
    centers = torch.stack([place.center for place in path])
    assert float(centers[:, 2].std()) < 1e-4, "the axis is the vertical, though no camera is opposite another"
    assert torch.allclose(centers.mean(dim=0)[:2], torch.zeros(2), atol=1e-4)
    for place in path:
        pixel, depth = place.project(torch.tensor([0.0, 0.0, 0.35]))
        assert torch.allclose(pixel, torch.tensor([32.0, 24.0]), atol=1e-2) and depth > 0


def test_an_orbit_needs_cameras_that_look_in_different_directions():
    eyes = [camera((3, y, 1), (0, y, 1)) for y in (0.0, 0.5, 1.0)]
    with pytest.raises(SceneError, match="use spiral"):
        orbit(eyes, 4)


def test_a_spiral_stays_among_the_cameras_and_aims_at_the_focus():
    rig = facade_rig(SIZE, 5, 0)
    path = spiral(rig, 40, focus=7.0)
    centers = torch.stack([place.center for place in rig])
    middle = centers.mean(dim=0)
    assert all((place.center - middle).norm() <= (centers - middle).norm(dim=1).max() * math.sqrt(3) for place in path)
    ahead = torch.stack([place.forward for place in rig]).mean(dim=0)
    target = middle + 7.0 * ahead / ahead.norm()
    for place in path:
        assert torch.allclose(place.project(target)[0], torch.tensor([32.0, 24.0]), atol=1e-2)


def test_one_camera_gives_a_spiral_that_stands_still():
    path = spiral([camera()], 3, focus=2.0)
    assert all(torch.allclose(place.viewmat, camera().viewmat, atol=1e-5) for place in path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"viewmat": torch.eye(4) * 2}, "no rotation"),
        ({"viewmat": torch.diag(torch.tensor([1.0, 1, -1, 1]))}, "determinant -1"),
        ({"viewmat": torch.full((4, 4), torch.nan)}, "NaN"),
        ({"viewmat": torch.eye(4).double()}, "float32"),
        ({"viewmat": torch.eye(3)}, r"\[4, 4\]"),
        ({"K": torch.zeros(3, 3)}, "focal lengths"),
        ({"width": 0}, "0 x 48"),
    ],
)
def test_a_camera_refuses_what_is_none(change, message):
    with pytest.raises(SceneError, match=message):
        Camera(**{"viewmat": torch.eye(4), "K": K, "width": 64, "height": 48} | change)


@pytest.mark.parametrize("eye", [(0.0, 0.0, 0.2), (0.0, 0.0, 5.0)])
def test_look_at_refuses_a_camera_on_its_target_or_along_up(eye):
    with pytest.raises(SceneError, match="undefined"):
        camera(eye)
