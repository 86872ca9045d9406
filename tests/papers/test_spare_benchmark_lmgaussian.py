"""SpaRe benchmark: the LM-Gaussian-like entrant against what is worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from common.splatting import Scene
from common.splatting.generated import object_rig, object_scene
from common.splatting.model import render
from common.splatting.priors import StandIn, stand_in
from common.splatting.training import Trainer, TrainSettings, fit
from common.splatting.virtual import point_image
from papers.spare_benchmark import method
from papers.spare_benchmark.lmgaussian import LMGaussian, path, released


@cache
def scene() -> Scene:
    return object_scene(0, views=3, tests=2, size=(24, 24), points=150)


@cache
def prior() -> StandIn:
    depths = [view.depth for view in scene().train if view.depth is not None]
    return stand_in("truth", scene().train, depths, error=0.0, generator=torch.Generator().manual_seed(0))


def entrant(**options) -> LMGaussian:
    points = scene().points
    assert points is not None
    return LMGaussian(prior(), points, **options)


def trainer(extension: LMGaussian, iterations: int = 10) -> Trainer:
    settings = TrainSettings(iterations=iterations, sh_degree=0, strategy=None, mode="RGB+ED")
    return Trainer(scene(), settings, extensions=[extension])


@torch.no_grad()
def test_the_depth_loss_is_one_minus_correlation_where_the_prior_knows(monkeypatch):
    monkeypatch.setattr(LMGaussian, "BOX", 504)  # one box, the whole image, which is square: P_l = P_g
    extension = entrant(virtual=False)
    ours = trainer(extension)
    shot = ours._draw(scene().train[0])
    disparity, weight = prior().view(shot.view.name)
    inside = weight.numpy() > 0
    assert 0 < inside.mean() < 1, "the box around the object is black and has no depth"
    correlation = np.corrcoef(shot.depth.numpy()[inside], -disparity.numpy()[inside])[0, 1]
    assert correlation > 0.3, "nearer is nearer"
    assert float(extension.loss(ours, shot)) == pytest.approx(0.1 * 2 * (1 - correlation), abs=1e-5)


@torch.no_grad()
def test_boxes_have_128_of_504_pixels(monkeypatch):
    sizes = []

    def patches(depth, reference, weight, *, size, generator):
        sizes.append(size)
        return depth.new_zeros(())

    monkeypatch.setattr("papers.spare_benchmark.lmgaussian.pearson_patches", patches)
    extension = entrant(virtual=False)
    ours = trainer(extension)
    extension.loss(ours, ours._draw(scene().train[0]))
    assert sizes == [6]  # 24 * 128 / 504


@pytest.mark.parametrize(("forward", "weight"), [(True, 0.3), (False, 0.6)])
@torch.no_grad()
def test_virtual_views_count_half_where_all_cameras_look_the_same_way(forward, weight):
    extension = entrant(forward=forward, depth=False)
    ours = trainer(extension)
    shot = ours._draw(scene().train[0])
    extension.points = extension.points[:1]
    target = extension.points[0]
    drawn = render(shot.splats, target.camera, background=torch.ones(3)).image
    expected = weight * float((drawn - target.image).abs().mean())
    assert expected > 0.01
    assert float(extension.loss(ours, shot)) == pytest.approx(expected, rel=1e-5)


def test_virtual_views_show_the_points_from_between_the_photographs():
    extension = entrant()
    trainer(extension)
    assert len(extension.points) == 2 * 10  # ten in each of two gaps between three views
    first, second = (view.camera.center for view in path(scene().train)[:2])
    torch.testing.assert_close(extension.points[0].camera.center, torch.lerp(first, second, 1 / 11))
    again = point_image(extension.cloud, extension.points[3].camera)
    assert torch.equal(extension.points[3].image, again.image)
    alone = entrant(virtual=False)
    trainer(alone)
    assert alone.points == []


def test_every_step_looks_at_another_virtual_view(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "papers.spare_benchmark.lmgaussian.point_image_loss",
        lambda splats, points: (seen.append(points), splats.means.sum() * 0)[1],
    )
    extension = entrant()
    ours = trainer(extension, iterations=40)
    for _ in range(40):
        ours.train_step()
    assert len({id(points) for points in seen}) > 10  # of 20; fewer than 11 in 40 draws: below 1e-4


def test_a_path_goes_to_the_closest_view_that_is_left():
    rig = object_rig((24, 24))
    views = [replace(scene().train[0], name=str(column), camera=rig[column]) for column in (0, 6, 1, 4, 2)]
    assert [view.name for view in path(views)] == ["0", "1", "2", "4", "6"]


def test_released_settings():
    common = method.settings(400, 0, most=100, reset=True)
    forward, around = released(common, forward=True), released(common, forward=False)
    assert forward.strategy is None and around.strategy is None, "neither growth nor resets"
    assert (forward.lr_opacities, around.lr_opacities) == (0.065, 0.05)
    assert forward.mode == "RGB+ED" and forward.sh_every == 40  # 1,000 of 10,000
    assert (forward.iterations, forward.lr_means, forward.initial_opacity) == (400, common.lr_means, 0.1)


def test_a_stopped_training_goes_on_with_the_same_bits(tmp_path):
    settings = TrainSettings(iterations=8, sh_degree=0, strategy=None, mode="RGB+ED", checkpoint_every=3)
    whole = fit(scene(), settings, extensions=[entrant()], progress=False)

    class Stop(Exception):
        pass

    def stop(ours: Trainer) -> None:
        if ours.step == 5:
            raise Stop

    file = tmp_path / "lmgaussian.pt"
    with pytest.raises(Stop):
        fit(scene(), settings, extensions=[entrant()], checkpoint=file, on_step=stop, progress=False)
    resumed = fit(scene(), settings, extensions=[entrant()], checkpoint=file, progress=False)
    assert resumed.losses == whole.losses
    assert torch.equal(resumed.model.means, whole.model.means)
