"""SparseGS-W's parts against hand computations: points, AdaIN, inpainting, constraint, rounds, losses, arms."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from common import params as parameters
from common.models.diffusion import Schedule
from common.splatting import Camera, PointCloud, Scene, View, intrinsics, look_at
from common.splatting.model import Gaussians
from common.splatting.settings import TrainSettings
from common.splatting.training import fit
from papers.sparsegs_w import data, experiment, method, prior
from papers.sparsegs_w.settings import Params

SIZE = 24
K = intrinsics(SIZE, SIZE, fov_x_rad=math.radians(60))
SMALL = {"width": 48, "height": 40, "tests": 2, "points": 200, "steps": 12, "warm": 4, "every": 2, "rounds": 2}


def tiny(**changes) -> Params:
    return dataclasses.replace(parameters.load(Params, "sparsegs_w", "smoke"), **(SMALL | changes))


@pytest.fixture(scope="module")
def case() -> data.Case:
    return data.facade(tiny(), 0)


def camera(x: float) -> Camera:
    return look_at((x, -3.0, 0), (0, 0, 0), (0, 0, 1), K, SIZE, SIZE)


def view(name: str, place: Camera, shade: float = 0.5) -> View:
    return View(name, place, torch.full((SIZE, SIZE, 3), shade))


def wall(count: int = 300) -> PointCloud:
    """Points of the plane y = 0, which the cameras face."""
    draw = torch.Generator().manual_seed(0)
    flat = 4 * torch.rand(count, 2, generator=draw) - 2
    positions = torch.stack([flat[:, 0], torch.zeros(count), flat[:, 1]], dim=1)
    return PointCloud(positions, torch.rand(count, 3, generator=draw))


# ---------------------------------------------------------------------------------------------------------- points


def test_points_come_from_sure_pixels_where_nobody_stands():
    one, depth, confidence = view("a", camera(0.0), 0.3), torch.full((SIZE, SIZE), 3.0), torch.full((SIZE, SIZE), 9.0)
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    mask[:6] = True
    confidence[6:8] = method.CONFIDENCE  # not above it
    depth[8] = 0  # nothing known
    cloud = method.fused([one, one], [depth, depth], [confidence, confidence], [mask, None])
    assert len(cloud) == SIZE * (SIZE - 9) + SIZE * (SIZE - 3)
    pixels, z = one.camera.project(cloud.positions[: SIZE * (SIZE - 9)])
    torch.testing.assert_close(z, torch.full_like(z, 3.0))
    assert float(pixels[:, 1].min()) == pytest.approx(9.5, abs=1e-3)
    torch.testing.assert_close(cloud.colors, torch.full_like(cloud.colors, 0.3))


# ------------------------------------------------------------------------------------------------------ inpainting


def test_holes_are_filled_by_the_means_of_what_is_around_them():
    photo = torch.tensor([[1.0, 9.0, 3.0, 5.0]])[None, None].expand(1, 3, 1, 4)
    mask = torch.tensor([[False, True, False, False]])[None, None]
    found = method.filled(photo, mask)
    torch.testing.assert_close(found[0, 0, 0], torch.tensor([1.0, 2.0, 3.0, 5.0]))  # (1 + 3) / 2
    everything = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    torch.testing.assert_close(method.filled(photo, everything), photo)
    wide = torch.zeros(1, 3, 9, 9)
    wide[..., 0] = 1.0
    hole = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    hole[..., 0] = False
    torch.testing.assert_close(method.filled(wide, hole), torch.ones(1, 3, 9, 9))


def test_inpainting_keeps_the_photograph_and_paints_what_the_model_sees():
    schedule, draw = Schedule.cosine(), torch.Generator().manual_seed(0)
    photo = torch.rand(1, 3, 8, 8, generator=draw)
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., 2:5, 3:7] = True
    wanted, seen = torch.full_like(photo, 0.25), []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        seen.append((int(t[0]), x.clone()))
        a = schedule.at(t)
        return (x - a.sqrt() * wanted) / (1 - a).sqrt()

    options = {"strength": 0.5, "steps": 4, "generator": draw}
    found = method.inpainted(predict, photo, method.filled(photo, mask), mask, schedule, **options)
    assert torch.equal(found[~mask.expand_as(photo)], photo[~mask.expand_as(photo)])
    torch.testing.assert_close(found[mask.expand_as(photo)], wanted[mask.expand_as(photo)], atol=1e-4, rtol=0)
    # between the steps the known pixels are the photograph at that noise
    time, state = seen[1]
    noise = (state - schedule.at(time).sqrt() * photo) / (1 - schedule.at(time)).sqrt()
    assert float(noise[~mask.expand_as(photo)].std()) == pytest.approx(1, abs=0.3)
    untouched = method.inpainted(predict, photo, photo, torch.zeros_like(mask), schedule, **options)
    assert torch.equal(untouched, photo)


# ------------------------------------------------------------------------------------------------------ appearance


def test_adain_by_hand():
    z, reference = torch.tensor([[[0.0, 2.0], [4.0, 6.0]]]), torch.tensor([[[1.0, 1.0], [2.0, 2.0]]])
    mine, to = method.style(z), method.style(reference)
    assert float(mine.mean) == 3 and float(mine.spread) == pytest.approx(math.sqrt(5))
    found = method.adain(z, mine, to)
    torch.testing.assert_close(found, 0.5 * (z - 3) / math.sqrt(5) + 1.5)
    again = method.style(found)
    torch.testing.assert_close(again.mean, to.mean)
    torch.testing.assert_close(again.spread, to.spread)


def test_masked_pixels_have_no_part_in_the_style():
    draw = torch.Generator().manual_seed(0)
    picture = torch.rand(3, 6, 8, generator=draw)
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[:, 4:] = True
    spoilt = torch.where(mask, 7.0, picture)
    for ours, plain in zip(method.style(spoilt, mask), method.style(picture[..., :4]), strict=True):
        torch.testing.assert_close(ours, plain)
    flat = method.adain(torch.ones(3, 2, 2), method.style(torch.ones(3, 2, 2)), method.style(picture))
    assert torch.isfinite(flat).all()  # a flat picture has no spread to divide by


def test_the_style_of_a_noised_picture():
    schedule, draw = Schedule.cosine(), torch.Generator().manual_seed(0)
    picture = 0.3 * torch.rand(1, 3, 200, 200, generator=draw) + 0.4
    noised = schedule.noised(picture, torch.randn(picture.shape, generator=draw), 400)
    wanted = method.at_noise(method.style(picture), schedule.at(400))
    for ours, theory in zip(method.style(noised), wanted, strict=True):
        torch.testing.assert_close(ours, theory, atol=0.01, rtol=0)  # 40,000 pixels: standard error 0.004


# ------------------------------------------------------------------------------------------- constrained enhancement


def predictor_of(wanted: Tensor, schedule: Schedule):
    def predict(x: Tensor, t: Tensor) -> Tensor:
        a = schedule.at(t)
        return (x - a.sqrt() * wanted) / (1 - a).sqrt()

    return predict


def test_enhancement_ends_at_the_models_picture_in_the_style_of_the_reference():
    schedule, draw = Schedule.cosine(), torch.Generator().manual_seed(0)
    wanted, drawn = torch.rand(2, 2, 3, 16, 16, generator=draw)
    reference = method.style(torch.rand(1, 3, 16, 16, generator=draw) * 0.2 + 0.7)
    options = {"strength": 0.6, "steps": 10, "generator": draw}
    plain = method.enhanced(predictor_of(wanted, schedule), drawn, schedule, **options)
    torch.testing.assert_close(plain, wanted, atol=1e-4, rtol=0)
    styled = method.enhanced(predictor_of(wanted, schedule), drawn, schedule, reference=reference, **options)
    for ours, theirs in zip(method.style(styled), reference, strict=True):
        torch.testing.assert_close(ours, theirs.expand_as(ours), atol=1e-4, rtol=0)


def test_the_constraint_is_a_projection_that_leaves_detail_alone():
    draw = torch.Generator().manual_seed(0)
    target, drawn = torch.rand(2, 2, 3, 8, 12, generator=draw)
    found = method.constrained(target, drawn, 4)
    means = torch.nn.functional.avg_pool2d
    torch.testing.assert_close(means(found, 4), means(drawn, 4))
    torch.testing.assert_close(method.constrained(found, drawn, 4), found)
    torch.testing.assert_close(found[..., 0, 0] - found[..., 1, 2], target[..., 0, 0] - target[..., 1, 2])
    with pytest.raises(ValueError, match="blocks of 5 pixels do not fit 12 x 8"):
        method.constrained(target, drawn, 5)


# ---------------------------------------------------------------------------------------------------------- rounds


def test_rounds_begin_near_and_strong_and_end_far_and_gentle():
    plan = method.Rounds(warm=10, every=5, count=3, views=4, first=0.6, last=0.2)
    begins = {step: plan.turn(step) for step in range(1, 40) if plan.turn(step) is not None}
    assert begins == {11: 0, 16: 1, 21: 2}
    assert [plan.reach(turn) for turn in range(3)] == pytest.approx([1 / 6, 2 / 6, 0.5])
    assert [plan.strength(turn) for turn in range(3)] == pytest.approx([0.6, 0.4, 0.2])
    once = dataclasses.replace(plan, progressive=False)
    assert [step for step in range(1, 40) if once.turn(step) is not None] == [11]
    assert (once.reach(0), once.size()) == (0.5, 12) and once.strength(0) == pytest.approx(0.4)


def test_virtual_cameras_stay_within_reach_of_a_photograph():
    views = [view(str(x), camera(x)) for x in (-2.0, 0.0, 1.0)]
    draw = torch.Generator().manual_seed(0)
    places = torch.stack([c.center for c in method.virtual_cameras(views, 0.25, 200, draw)])[:, 0]
    distance = torch.stack([(places - x).abs() for x in (-2.0, 0.0, 1.0)]).amin(dim=0)
    assert float(distance.max()) <= 0.25 * 3 + 1e-4  # the longest way is from -2 to 1
    assert len(set(places.tolist())) == 200
    small = dataclasses.replace(views[2], camera=views[2].camera.resized(12, 10), image=torch.zeros(10, 12, 3))
    mixed = method.virtual_cameras([*views[:2], small], 0.5, 30, draw)  # photographs of two sizes
    assert {(c.width, c.height) for c in mixed} == {(24, 24), (12, 10)}


def run(weight: float, shade: float, **options) -> tuple[Gaussians, list[tuple[int, int]]]:
    """A training whose repairer paints everything in one shade."""
    asked = []

    def enhance(drawn: Tensor, cameras: list[Camera], turn: int) -> Tensor:
        assert drawn.shape == (len(cameras), SIZE, SIZE, 3)
        asked.append((turn, len(cameras)))
        return torch.full_like(drawn, shade)

    plan = method.Rounds(warm=2, every=3, count=2, views=2, first=0.6, last=0.2, **options)
    extension = method.NovelViews(plan, enhance, weight=weight, ramp=1, dssim=0.2)
    scene = Scene("wall", (view("a", camera(-0.5)), view("b", camera(0.5))), points=wall())
    settings = TrainSettings(iterations=20, strategy=None, sh_degree=0)
    return fit(scene, settings, extensions=[extension], progress=False).model, asked


def test_virtual_views_are_repaired_at_every_round_and_pull_as_their_weight_says():
    bright, asked = run(1.0, 1.0)
    assert asked == [(0, 2), (1, 2)]
    assert run(1.0, 1.0, progressive=False)[1] == [(0, 4)]
    dark = run(1.0, 0.0)[0]
    difference = bright.render(camera(0.1)).image.mean() - dark.render(camera(0.1)).image.mean()
    assert float(difference.detach()) > 0.02
    assert torch.equal(run(0.0, 1.0)[0].means, run(0.0, 0.3)[0].means)  # then it does not matter what was painted


def test_painted_pixels_are_compared_where_the_mask_is_and_nowhere_else():
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    mask[:, :12] = True
    views = (view("a", camera(-0.5), 0.5), view("b", camera(0.5), 0.5))
    clean = {one.name: torch.full((SIZE, SIZE, 3), 1.0) for one in views}
    extension = method.Uncovered(clean, {one.name: mask for one in views}, weight=2.0)
    losses = []

    class Peek(method.Uncovered):
        def loss(self, trainer, shot):
            found = extension.loss(trainer, shot)
            image = shot.image.detach()
            expected = 2.0 * float((1 - image[:, :12]).abs().sum() / image.numel())
            losses.append((float(found.detach()), expected))
            return found

    settings = TrainSettings(iterations=3, strategy=None, sh_degree=0)
    fit(Scene("wall", views, points=wall()), settings, extensions=[Peek({}, {}, 0.0)], progress=False)
    for ours, expected in losses:
        assert ours == pytest.approx(expected, rel=1e-4)


# ----------------------------------------------------------------------------------------------- arms and their parts


def test_every_arm_trains_and_is_scored(case: data.Case):
    """With a model that has learnt nothing, so no training of it is needed."""
    params = tiny(round_views=2)
    network = prior.Corrector(Schedule.cosine(), width=params.prior_width)
    untrained = {"state": network.state_dict()}
    found = {arm: experiment.train(params, case, arm, untrained, 0) for arm in experiment.ARMS}
    for arm, result in found.items():
        assert {"psnr", "ssim", "gmsd"} <= set(result["scores"]) and result["ghost"] > 0, arm
        rounds = {"none": 0}.get(experiment.ARMS[arm].novel, 2 if experiment.ARMS[arm].progressive else 1)
        assert len(result["rounds"]) == rounds, arm
        assert (result["colour"] is None) == (experiment.ARMS[arm].appearance != "affine"), arm
        assert bool(result["clean"]) == experiment.ARMS[arm].inpaint, arm
    assert found["full"]["rounds"][0]["repaired_psnr"] == pytest.approx(found["full"]["rounds"][0]["drawn_psnr"], abs=1)
    again = experiment.train(params, case, "full", untrained, 0)
    assert torch.equal(again["model"]["means"], found["full"]["model"]["means"])  # the same bits


def test_the_reference_stays_and_the_others_take_its_style(case: data.Case):
    arm = dataclasses.replace(experiment.ARMS["full"], inpaint=False)
    given = experiment.inputs(case, arm, None)
    torch.testing.assert_close(given.views[0].image, case.reference.image, atol=1e-5, rtol=0)
    to = method.style(case.reference.image.movedim(-1, 0), case.masks[case.reference.name])
    for one in given.views[1:]:
        ours = method.style(one.image.movedim(-1, 0), case.masks[one.name])
        torch.testing.assert_close(ours.mean, to.mean, atol=0.03, rtol=0)  # limits at 0 and 1 move it a little
    raw = experiment.inputs(case, experiment.ARMS["raw"], None)
    assert raw.views == case.scene.train and not raw.masks and not raw.clean


def test_test_views_of_collections_lend_their_appearance_from_the_left_half(case: data.Case):
    """A gain and an offset of the test photograph cost nothing then; in one appearance for all they do."""
    model = Gaussians.from_points(
        experiment.start(tiny(), case, experiment.inputs(case, experiment.ARMS["raw"], None), 0)
    )
    seen = [experiment.picture(model, one.camera) for one in case.scene.test]
    tests = tuple(
        dataclasses.replace(one, image=0.5 * image + 0.2) for one, image in zip(case.scene.test, seen, strict=True)
    )
    own = dataclasses.replace(case, scene=dataclasses.replace(case.scene, test=tests))
    as_reference = experiment.scores(tiny(), own, model, None)
    lent = experiment.scores(tiny(), dataclasses.replace(own, reference_tests=False), model, None)
    assert lent["psnr"] > 60 > as_reference["psnr"]


def test_real_photographs_have_no_oracle_and_no_perfect_masks(case: data.Case):
    real = dataclasses.replace(case, world=None, true_masks=None)
    with pytest.raises(ValueError, match="perfect_masks"):
        experiment.inputs(real, experiment.ARMS["perfect_masks"], None)
    with pytest.raises(ValueError, match="oracle"):
        real.truth([case.reference.camera])
