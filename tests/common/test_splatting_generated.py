"""The generated scenes: exact depth and normals against formulas, one world in all views, tracks that are true."""

import math

import pytest
import torch
import torch.nn.functional as F

from common.splatting import SceneError, facade_scene, intrinsics, look_at, object_scene, room_scene, surface_points
from common.splatting.generated import facade_world, object_rig, object_world, room_world
from common.splatting.raycast import LIGHTINGS, Shape, Texture, World

SIZE = (40, 30)
K = intrinsics(*SIZE, fov_x_rad=0.9)
PLAIN = Texture(
    "plain", torch.full((3, 3), 0.5).double(), 1.0, torch.zeros(2, 1, 3).double(), torch.zeros(2, 1).double()
)
LAMPS = torch.tensor([[-3.0, -4, 5], [3, -4, 5], [0, 0, 8]]).double()
EYE = (0.4, -3.0, 0.8)


def shape(kind, center=(0.1, 0.0, 0.2), half=(0.5, 0.5, 0.5), axes=None, **more):
    axes = torch.eye(3) if axes is None else axes
    return Shape(kind, torch.tensor(center).double(), torch.tensor(half).double(), axes.double(), PLAIN, **more)


def world(*shapes):
    return World(shapes, LAMPS, torch.tensor([0.1, 0.2, 0.3]))


def eye(position=EYE, target=(0.1, 0.0, 0.2)):
    return look_at(position, target, (0, 0, 1), K, *SIZE)


def turn(angle):
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, s, 0], [-s, c, 0], [0, 0, 1]])


def test_depth_and_normals_of_a_sphere_are_the_formula():
    """|o + t d - c| = r solved pixel by pixel, in float64 and with none of the ray caster's code."""
    camera = eye()
    view = world(shape("sphere")).render(camera, "s")
    o, center = camera.center.double(), torch.tensor([0.1, 0.0, 0.2]).double()
    found = 0
    for row in range(0, 30, 2):
        for column in range(0, 40, 2):
            pixel = torch.tensor([column + 0.5, row + 0.5, 1.0]).double()
            d = camera.viewmat[:3, :3].double().T @ torch.linalg.inv(K.double()) @ pixel
            b, c = torch.dot(o - center, d), torch.dot(o - center, o - center) - 0.25
            inside = b * b - torch.dot(d, d) * c
            if inside < 0:
                assert view.depth[row, column] == 0 and not view.normals[row, column].any()
                continue
            found += 1
            t = (-b - inside.sqrt()) / torch.dot(d, d)
            assert view.depth[row, column] == pytest.approx(float(t), rel=1e-6)
            expected = (o + t * d - center) / 0.5
            assert torch.allclose(view.normals[row, column].double(), expected, atol=1e-5)
    assert 20 < found < 250


@pytest.mark.parametrize("axes", [torch.eye(3), turn(0.7)])
def test_points_of_box_and_cylinder_lie_on_their_surface(axes):
    half = torch.tensor([0.5, 0.4, 0.6])
    for kind in ("box", "cylinder"):
        camera = eye((1.5, -2.5, 1.9))
        view = world(shape(kind, half=half.tolist(), axes=axes)).render(camera, kind)
        hit = view.depth > 0
        local = (camera.backproject(view.depth)[hit] - torch.tensor([0.1, 0.0, 0.2])) @ axes.T / half
        across = local.abs()[:, :2].amax(dim=1) if kind == "box" else local[:, :2].norm(dim=1)
        assert torch.allclose(torch.maximum(across, local[:, 2].abs()), torch.ones(len(local)), atol=1e-5)
        assert (local[:, 2] > 1 - 1e-5).any() and (local[:, 2] < 0.9).any(), "top and sides are both in the picture"
        # the normal is the gradient of the function that is 1 on the surface
        top = local[:, 2].abs() > across
        assert torch.allclose(
            view.normals[hit][top], torch.tensor([0.0, 0.0, 1.0]).expand(int(top.sum()), 3), atol=1e-6
        )
        assert view.normals[hit][~top][:, 2].abs().max() < 1e-6


def test_a_room_is_seen_from_inside():
    room = world(shape("box", center=(0.0, 0.0, 0.0), half=(2.0, 3.0, 1.0)))
    camera = look_at((0, -1, 0), (0, 2, 0), (0, 0, 1), K, *SIZE)
    view = room.render(camera, "inside")
    assert (view.depth > 0).all() and view.depth[15, 20] == pytest.approx(4.0, abs=1e-5)
    assert view.normals[15, 20].tolist() == pytest.approx([0, -1, 0], abs=1e-6)


WORLDS = {
    "object": (object_world, object_scene),
    "facade": (facade_world, facade_scene),
    "room": (room_world, room_scene),
}


@pytest.fixture(scope="module", params=WORLDS)
def scene(request):
    return WORLDS[request.param][1](3, views=3, tests=2, size=(64, 48), points=600), WORLDS[request.param][0](3)


def test_normals_are_unit_and_face_the_camera(scene):
    for view in (*scene[0].train, *scene[0].test):
        hit = view.depth > 0
        assert torch.allclose(view.normals[hit].norm(dim=1), torch.ones(int(hit.sum())), atol=1e-5)
        assert ((view.normals * view.camera.rays()).sum(dim=-1)[hit] <= 1e-6).all()
        assert not view.normals[~hit].any()


def test_depth_of_one_view_lands_on_the_same_colour_in_another(scene):
    """Surfaces are matt: a point has one colour. A camera of one pixel, put at the other view, looks exactly at it."""
    made, world_ = scene
    first, second = (world_.render(view.camera, view.name, samples=1) for view in made.train[1:3])
    points = first.camera.backproject(first.depth)[first.depth > 0]
    colors = first.image[first.depth > 0]
    shared = world_.visible(points, second.camera)
    assert shared.sum() > 300
    taken = torch.randperm(int(shared.sum()), generator=torch.Generator().manual_seed(0))[:40]
    narrow = intrinsics(1, 1, fov_x_rad=1e-3)
    off = []
    for point, color in zip(points[shared][taken], colors[shared][taken], strict=True):
        aimed = look_at(second.camera.center, point, (0, 0, 1), narrow, 1, 1)
        pixel = world_.render(aimed, "pixel", samples=1)
        assert pixel.depth[0, 0] == pytest.approx(float((point - second.camera.center).norm()), rel=1e-4)
        off.append((pixel.image[0, 0] - color).abs().max())
    # float32 points are a micron off, which edges of the texture and of shadows may show
    assert torch.quantile(torch.stack(off), 0.9) < 1e-3
    assert (colors[shared][taken] - colors[shared][taken.roll(1)]).abs().amax(dim=1).median() > 0.05, "the test bites"


def test_surface_points_are_exact_and_their_tracks_true(scene):
    made, world_ = scene
    cloud = made.points
    assert cloud.view_names == tuple(view.name for view in made.train) and len(cloud) == 600
    assert cloud.seen.any(dim=1).all()
    for number, view in enumerate(made.train):
        pixels, depth = view.camera.project(cloud.positions[cloud.seen[:, number]])
        column, row = pixels.long().unbind(dim=1)
        # the depth of the pixel's centre, half a pixel off at most: never far in front of the surface
        nearest = -F.max_pool2d(-view.depth[None].where(view.depth > 0, torch.inf), 3, 1, 1)[0]
        assert (depth > nearest[row, column] - 0.15 * depth).all()
        hidden = cloud.positions[~cloud.seen[:, number]]
        assert not world_.visible(hidden, view.camera).any()


def test_noise_and_outliers_are_what_they_say():
    made, world_ = object_scene(0, views=2, tests=1, size=(64, 48)), object_world(0)
    exact = surface_points(world_, made.train, 1000, seed=1)
    noisy = surface_points(world_, made.train, 1000, seed=1, noise=0.01)
    moved = noisy.positions - exact.positions
    assert moved.std() == pytest.approx(0.01, rel=0.1)  # of 3000 numbers: 1.3 % standard error
    wild = surface_points(world_, made.train, 1000, seed=1, outliers=0.2)
    assert int(((wild.positions - exact.positions).abs().amax(dim=1) > 0).sum()) == 200
    assert torch.equal(wild.colors, exact.colors)
    assert surface_points(world_, made.train, 10**6, seed=1).positions.shape[0] < 2 * 64 * 48
    for bad in ({"count": 0}, {"noise": -1.0}, {"outliers": 1.5}):
        with pytest.raises(SceneError, match="surface_points"):
            surface_points(world_, made.train, **({"count": 10, "seed": 1} | bad))


def test_seeds_repeat_and_differ():
    first, again, other = (object_scene(seed, views=2, tests=1, size=(32, 24), points=50) for seed in (0, 0, 1))
    assert torch.equal(first.train[0].image, again.train[0].image)
    assert torch.equal(first.points.positions, again.points.positions)
    assert not torch.equal(first.train[0].image, other.train[0].image)


def test_the_object_scene_is_as_spare_describes_it():
    """Objects on a white platform in a black box; fewer input views are a subset of more; masks are the objects."""
    few, many = (object_scene(5, views=views, tests=3, size=(48, 36), points=100) for views in (3, 9))
    assert {view.name for view in few.train} < {view.name for view in many.train}
    assert not {v.name for v in many.train} & {v.name for v in many.test}
    view = few.train[0]
    empty = view.depth == 0
    assert view.image[0, 0].tolist() == [0, 0, 0] and empty.any() and (view.mask[empty] < 1).all()
    platform = (view.mask == 0) & ~empty
    bright = view.image[platform].mean(dim=1)
    assert platform.float().mean() > 0.1 and bright.max() > 0.7
    assert (view.image[platform].std(dim=1) < 0.05).float().mean() > 0.9, "white: no colour"
    assert (view.mask > 0.5).float().mean() > 0.05


def test_a_narrower_arc_leaves_more_of_the_room_unseen():
    """What sparse views are about: a start that has seen everything would be too easy."""
    world_, unseen = room_world(0), []
    for arc in (360, 180):
        made = room_scene(0, views=4, tests=4, size=(24, 18), points=10, arc_deg=arc)
        shares = []
        for view in made.test:
            points = view.camera.backproject(view.depth)[view.depth > 0]
            known = torch.stack([world_.visible(points, train.camera) for train in made.train]).any(dim=0)
            shares.append((~known).float().mean())
        unseen.append(float(torch.stack(shares).mean()))
    assert unseen[0] < 0.15 and unseen[1] > 0.18


def test_lightings_differ_only_in_light():
    made, camera = object_world(2), object_rig((48, 36))[24]
    views = [made.render(camera, "v", lighting=number, samples=1) for number in range(len(LIGHTINGS))]
    for view in views[1:]:
        assert torch.equal(view.depth, views[0].depth) and torch.equal(view.mask, views[0].mask)
    brightness = torch.stack([view.image for view in views])
    assert (brightness[0] - brightness[1]).abs().max() > 0.1
    # all lamps on is the mean of the single ones: each lamp's share is its own; white is clipped at 1, so the darker
    below = (brightness[:3] < 0.8).all(dim=0)
    assert below.float().mean() > 0.2
    assert torch.allclose(brightness[3][below], brightness[:3].mean(dim=0)[below], atol=1e-5)
    for bad in ({"lighting": 7}, {"samples": 0}):
        with pytest.raises(SceneError, match="lighting is 0 to 6"):
            made.render(camera, "v", **bad)


def test_a_shadow_falls_away_from_the_lamp():
    """A ball over a plane under the one lamp straight above: dark right below it, lit elsewhere."""
    lamps = torch.tensor([[0.0, 0, 50], [0, 0, 50], [0, 0, 50]]).double()
    floor = shape("box", center=(0.0, 0.0, -0.1), half=(5.0, 5.0, 0.1), is_object=False)
    ball = shape("sphere", center=(0.0, 0.0, 1.0), half=(0.5, 0.5, 0.5))
    camera = look_at((0, -4, 1.2), (0, 0, 0.3), (0, 0, 1), K, *SIZE)
    view = World((floor, ball), lamps, torch.zeros(3)).render(camera, "v", lighting=0, samples=1)
    points = camera.backproject(view.depth)
    on_floor = (view.depth > 0) & (points[..., 2] < 1e-4)
    radius = points[..., :2].norm(dim=-1)
    dark, lit = view.image[on_floor & (radius < 0.45)], view.image[on_floor & (radius > 0.55) & (radius < 2)]
    assert len(dark) > 5 and len(lit) > 50
    assert dark.max() < 0.6 * lit.min()
    assert view.mask[on_floor].max() == 0 and view.mask.max() == 1


def test_more_samples_only_smooth():
    made, camera = facade_world(0), facade_scene(0, views=2, tests=1, size=(48, 36)).train[0].camera
    rough, fine = (made.render(camera, "v", samples=samples) for samples in (1, 3))
    assert torch.equal(rough.depth, fine.depth)
    assert (rough.image - fine.image).abs().mean() < 0.1
    assert set(rough.mask.unique().tolist()) <= {0.0, 1.0} and len(fine.mask.unique()) > 2
