"""LM-Gaussian's parts against hand computations: cleaning, losses, virtual cameras, weights, schedules, refinement."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from common.splatting import Camera, PointCloud, Scene, View, intrinsics, look_at
from common.splatting.extensions import Shot
from common.splatting.model import Gaussians, Splats, render
from common.splatting.settings import TrainSettings
from common.splatting.training import Trainer, fit
from common.splatting.virtual import point_image, virtual_cameras
from papers.lm_gaussian import method

SIZE = 24
K = intrinsics(SIZE, SIZE, fov_x_rad=math.radians(60))


def camera(x: float, y: float = -3.0) -> Camera:
    return look_at((x, y, 0), (0, 0, 0), (0, 0, 1), K, SIZE, SIZE)


def view(name: str, place: Camera, shade: float = 0.5) -> View:
    return View(name, place, torch.full((SIZE, SIZE, 3), shade))


def wall(count: int = 300, *, spread: float = 1.0) -> PointCloud:
    """Points of the plane y = 0, which the cameras face."""
    draw = torch.Generator().manual_seed(0)
    flat = (torch.rand(count, 2, generator=draw) * 2 - 1) * spread
    positions = torch.stack([flat[:, 0], torch.zeros(count), flat[:, 1]], dim=1)
    return PointCloud(positions, torch.rand(count, 3, generator=draw))


# ------------------------------------------------------------------------------------------------ points from stereo


def test_cleaning_removes_the_less_confident_of_two_points_that_contradict():
    """Both cameras see a wall at depth 3; view a has a patch at half of it, in the middle."""
    views = [view("a", camera(0.0)), view("b", camera(0.0))]
    true = torch.full((SIZE, SIZE), 3.0)
    patch = true.clone()
    patch[10:14, 10:14] = 1.5
    sure, unsure = torch.full((SIZE, SIZE), 9.0), torch.full((SIZE, SIZE), 7.0)

    kept = method.cleaned(views, [patch, true], [unsure, sure])
    assert not kept[0][10:14, 10:14].any()
    outside = torch.ones(SIZE, SIZE, dtype=torch.bool)
    outside[10:14, 10:14] = False
    assert torch.equal(kept[0][outside], unsure[outside])  # the same depth hides nothing
    assert torch.equal(kept[1], sure)  # behind is not in front
    assert torch.equal(method.cleaned(views, [patch, true], [sure, unsure])[0], sure)  # the surer one stays


def test_cleaning_looks_only_at_what_the_other_camera_sees():
    away = look_at((0, -3, 0), (0, -6, 0), (0, 0, 1), K, SIZE, SIZE)
    views = [view("a", camera(0.0)), view("b", away)]
    depths, low, high = (
        [torch.full((SIZE, SIZE), 1.0)] * 2,
        torch.full((SIZE, SIZE), 2.0),
        torch.full((SIZE, SIZE), 9.0),
    )
    assert torch.equal(method.cleaned(views, depths, [low, high])[0], low)


def test_the_background_survives_the_threshold_and_what_was_cleaned_does_not():
    depth = torch.tensor([[2.0, 2.0, 2.9, 3.1, 10.0]])
    confidence = torch.tensor([[6.0, 2.0, 2.0, 2.0, 0.0]])  # the last was cleaned
    aware = method.background_aware(depth, confidence)  # median 2.9, so background begins at 4.35
    assert aware.tolist() == [[6.0, 2.0, 2.0, 2.0, 5.0]]
    assert (aware > method.CONFIDENCE).tolist() == [[True, False, False, False, False]]
    deep = method.background_aware(torch.tensor([[1.0, 1.0, 1.6]]), torch.tensor([[1.0, 1.0, 1.0]]))
    assert (deep > method.CONFIDENCE).tolist() == [[False, False, True]]


def test_fused_points_lie_where_the_views_say_and_know_their_view():
    views = [view("a", camera(-1.0), 0.2), view("b", camera(1.0), 0.8)]
    confidence = torch.zeros(SIZE, SIZE)
    confidence[12, 12] = 6.0
    cloud = method.fused(views, [torch.full((SIZE, SIZE), 3.0)] * 2, [confidence, confidence])
    assert len(cloud) == 2 and cloud.seen is not None
    assert cloud.seen.tolist() == [[True, False], [False, True]]
    torch.testing.assert_close(cloud.colors, torch.tensor([[0.2] * 3, [0.8] * 3]))
    for point, one in zip(cloud.positions, views, strict=True):
        pixel, depth = one.camera.project(point)
        torch.testing.assert_close(pixel, torch.tensor([12.5, 12.5]), atol=1e-4, rtol=0)
        assert float(depth) == pytest.approx(3.0, abs=1e-5)


def test_guided_alignment_repairs_what_stereo_is_unsure_of_and_leaves_the_rest():
    one = view("a", camera(0.0))
    true = 2 + torch.linspace(0, 2, SIZE).expand(SIZE, SIZE)
    wrong = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    wrong[8:16, 8:16] = True
    depth = torch.where(wrong, 0.7 * true, true)
    confidence = torch.where(wrong, 1.0, 20.0)
    draw = torch.Generator().manual_seed(0)
    found = method.guided_alignment(one, depth, confidence, 5 * true - 3, steps=200, box=12, generator=draw)
    assert float((found - true)[wrong].abs().mean()) < 0.5 * float((depth - true)[wrong].abs().mean())
    assert float((found / true - 1)[~wrong].abs().mean()) < 0.02


# -------------------------------------------------------------------------------------------------------- the losses


def test_depth_loss_ignores_scale_and_shift_and_is_one_minus_correlation():
    draw = torch.Generator().manual_seed(0)
    depth, other = torch.rand(2, 16, 16, generator=draw)
    boxes = {"box": 16, "generator": draw}  # one box, the whole image: P_l = P_g
    assert float(method.depth_loss(depth, 3 * depth + 7, **boxes)) == pytest.approx(0, abs=1e-5)
    expected = 2 * (1 - float(torch.corrcoef(torch.stack([depth.flatten(), other.flatten()]))[0, 1]))
    assert float(method.depth_loss(depth, other, **boxes)) == pytest.approx(expected, abs=1e-5)


def test_normal_loss_by_hand():
    ours = torch.tensor([[[1.0, 0, 0], [0, 1.0, 0]]])
    wanted = torch.tensor([[[1.0, 0, 0], [0, 0, 1.0]]])
    # L1: mean of |differences| over 6 numbers, two of them 1; cosine: mean of 0 and 1
    assert float(method.normal_loss(ours, wanted)) == pytest.approx(2 / 6 + 1 / 2)
    unknown = torch.tensor([[[1.0, 0, 0], [0, 0, 0]]])
    assert float(method.normal_loss(ours, unknown)) == pytest.approx(0)


def test_the_normal_of_a_gaussian_is_its_shortest_axis_towards_the_camera():
    half = math.sqrt(0.5)
    quats = torch.tensor([[1.0, 0, 0, 0], [half, 0, 0, half], [1.0, 0, 0, 0]])  # the second: 90 degrees about z
    scales = torch.tensor([[0.3, 0.01, 0.3], [0.01, 0.3, 0.3], [0.01, 0.3, 0.3]])
    means = torch.tensor([[0.0, 0, 0], [0, 0, 0], [1.0, 0, 0]])
    splats = Splats(means, quats, scales, torch.ones(3), torch.ones(3, 3))
    found = method.splat_normals(splats, camera(0.0))  # at y = -3
    torch.testing.assert_close(found, torch.tensor([[0.0, -1, 0], [0, -1, 0], [-1.0, 0, 0]]), atol=1e-6, rtol=0)


def test_rendered_normals_of_a_wall_and_those_of_its_depth_face_the_camera():
    model = Gaussians.from_points(wall(600, spread=2.0), initial_opacity=0.95)
    with torch.no_grad():
        model.log_scales[:, 1] = math.log(1e-3)  # flat
    splats, place = model.splats(), camera(0.6)
    drawn = method.normal_image(splats, place)[6:-6, 6:-6]
    torch.testing.assert_close(drawn, torch.tensor([0.0, -1, 0]).expand_as(drawn), atol=1e-3, rtol=0)
    depth = (0 - place.center[1]) / place.rays()[..., 1]  # of the plane y = 0, exactly
    surface = method.normals_from_depth(place, depth)[1:-1, 1:-1]
    torch.testing.assert_close(surface, torch.tensor([0.0, -1, 0]).expand_as(surface), atol=1e-3, rtol=0)


def stage1_loss(weights: method.Weights, step: int = 1, **options) -> tuple[float, Trainer, Shot]:
    views = (view("a", camera(-0.5)), view("b", camera(0.5)))
    settings = TrainSettings(iterations=10, mode="RGB+ED", strategy=None, sh_degree=0)
    trainer = Trainer(Scene("wall", views, points=wall()), settings)
    trainer.step = step
    splats = trainer.model.splats()
    rendering = render(splats, views[0].camera, mode="RGB+ED")
    shot = Shot(views[0], splats, rendering, rendering.image, torch.zeros(3))
    draw = torch.Generator().manual_seed(1)
    depth = torch.rand(SIZE, SIZE, generator=draw)
    normals = torch.nn.functional.normalize(torch.rand(SIZE, SIZE, 3, generator=draw), dim=-1)
    points = [point_image(wall(), camera(0.0))]
    extension = method.MultiModal({"a": method.Mono(depth, normals)}, points, weights, box=SIZE, late=5, **options)
    loss = extension.loss(trainer, shot)
    assert loss is not None
    return float(loss.detach()), trainer, shot


@torch.no_grad()
def test_each_term_of_stage_1_has_its_weight():
    nothing = method.Weights(0, 0, 0, 0)
    assert stage1_loss(nothing)[0] == 0

    total, _, shot = stage1_loss(dataclasses.replace(nothing, virtual=0.6))
    drawn = render(shot.splats, camera(0.0), background=torch.ones(3)).image
    target = point_image(wall(), camera(0.0))
    assert total == pytest.approx(0.6 * float((drawn - target.image).abs().mean()), rel=1e-5)
    covered = float(((drawn - target.image).abs() * target.cover[..., None]).mean())
    assert stage1_loss(dataclasses.replace(nothing, virtual=0.6), covered=True)[0] == pytest.approx(
        0.6 * covered, rel=1e-5
    )

    draw = torch.Generator().manual_seed(1)
    depth = torch.rand(SIZE, SIZE, generator=draw)
    normals = torch.nn.functional.normalize(torch.rand(SIZE, SIZE, 3, generator=draw), dim=-1)
    global_ = 1 - float(torch.corrcoef(torch.stack([shot.depth.detach().flatten(), depth.flatten()]))[0, 1])
    assert stage1_loss(dataclasses.replace(nothing, depth=0.1))[0] == pytest.approx(0.1 * 2 * global_, rel=1e-3)
    ours = method.normal_image(shot.splats, camera(-0.5))
    expected = 0.01 * float(method.normal_loss(ours, normals))
    assert stage1_loss(dataclasses.replace(nothing, normal=0.01))[0] == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_depth_and_normals_agree_only_after_the_late_step():
    only = method.Weights(0, 0, 0, 0.05)
    assert stage1_loss(only, step=5)[0] == 0
    total, _, shot = stage1_loss(only, step=6)
    surface = method.normals_from_depth(camera(-0.5), shot.depth)
    expected = 0.05 * (1 - (method.normal_image(shot.splats, camera(-0.5)) * surface).sum(-1)).mean()
    assert total == pytest.approx(float(expected), rel=1e-5)


# ------------------------------------------------------------------------------------------- virtual views and rounds


def test_distance_weights_by_hand():
    views = [view(name, camera(x)) for name, x in (("a", 0.0), ("b", 1.0), ("c", 3.0))]
    # distances to the others: a 3, 1; b 2, 1; c 3, 2. Second-farthest: 1, 1, 2. d_max = 1.2 x 2 = 2.4
    cameras = [camera(0.015), camera(0.03), camera(2.0)]
    expected = torch.tensor([16 * 0.015 / 2.4, 16 * 0.03 / 2.4, 1.0])
    torch.testing.assert_close(method.distance_weights(cameras, views), expected, atol=1e-4, rtol=0)
    assert (
        float(method.distance_weights([camera(0.5)], views[:2])) == 1
    )  # two photographs: d_max = 1.2 x their distance


def test_the_authors_schedules():
    assert method.AUTHORS_360.rounds == [12_000, 18_000, 24_000]
    assert method.AUTHORS_FORWARD.rounds == [3_000, 9_000]
    assert method.AUTHORS_360.depth_normal_steps == method.AUTHORS_FORWARD.depth_normal_steps == 0
    assert method.Plan(stage1=10, steps=20, every=5, late=4).depth_normal_steps == 6


def test_early_renders_are_the_first_of_every_view():
    views = (view("a", camera(-0.5)), view("b", camera(0.5)))
    early = method.EarlyRenders(until=7, most=2)
    settings = TrainSettings(iterations=12, strategy=None, sh_degree=0)
    fit(Scene("wall", views, points=wall()), settings, extensions=[early], progress=False)
    assert {name: len(found) for name, found in early.renders.items()} == {"a": 2, "b": 2}
    short = method.EarlyRenders(until=3, most=50)
    fit(Scene("wall", views, points=wall()), settings, extensions=[short], progress=False)
    assert sum(len(found) for found in short.renders.values()) == 3


class Steps:
    """A repairer that paints everything in one colour and remembers when it was asked."""

    def __init__(self, shade: float):
        self.shade, self.asked = shade, []

    def __call__(self, drawn: Tensor, turn: int) -> Tensor:
        self.asked.append((turn, tuple(drawn.shape)))
        return torch.full_like(drawn, self.shade)


def refine(weight: float, shade: float, steps: int = 9) -> tuple[Gaussians, Steps, list[float]]:
    views = (view("a", camera(-0.5)), view("b", camera(0.5)))
    cameras = virtual_cameras(views, 2, closed=False)
    mender, rates = Steps(shade), []
    extension = method.Refinement(cameras, torch.full((2,), weight), mender, every=3, rewind=2)
    settings = TrainSettings(iterations=steps, strategy=None, sh_degree=0, lr_means_until=20)
    scene = Scene("wall", views, points=wall(spread=2.0))
    result = fit(
        scene,
        settings,
        extensions=[extension],
        on_step=lambda trainer: rates.append(trainer.population.group("means")["lr"]),
        progress=False,
    )
    return result.model, mender, rates


def test_refinement_repairs_at_the_start_of_every_round_and_rewinds_the_learning_rate():
    _, mender, rates = refine(1.0, 0.5)
    assert mender.asked == [(turn, (2, SIZE, SIZE, 3)) for turn in range(3)]
    assert rates[:3] == rates[3:6] == rates[6:] and rates[0] > rates[1] > rates[2]


def test_repaired_views_pull_as_much_as_their_weight_says():
    white, black = (refine(1.0, shade, steps=30)[0].render(camera(0.1)).image.mean() for shade in (1.0, 0.0))
    assert float((white - black).detach()) > 0.02
    at_zero = [refine(0.0, shade)[0] for shade in (1.0, 0.3)]  # then it does not matter what was painted
    assert torch.equal(at_zero[0].means, at_zero[1].means)
