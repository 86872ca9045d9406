"""Stand-ins for monocular depth: blind to scale, wrong as told, and of no use once shuffled."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.models.depth import MissingNetwork, load_depth_network
from common.splatting.generated import object_rig, object_scene, object_world
from common.splatting.losses import pearson
from common.splatting.priors import NetworkPrior, StandIn, point_depth, slow_field, smoothed, stand_in, stereo_depths


@pytest.fixture(scope="module")
def scene():
    return object_scene(0, views=3, tests=2, size=(48, 36), points=200)


def made(scene, error: float) -> StandIn:
    depths = [view.depth for view in scene.train]
    return stand_in("truth", scene.train, depths, error=error, generator=torch.Generator().manual_seed(0))


def correlation(a, b, weight) -> float:
    known = weight > 0
    return float(np.corrcoef(a[known].numpy(), b[known].numpy())[0, 1])


def test_a_prior_without_error_is_the_disparity_up_to_factor_and_shift(scene):
    prior = made(scene, 0.0)
    for view in scene.train:
        disparity, weight = prior.view(view.name)
        assert torch.equal(weight > 0, view.depth > 0)
        assert correlation(disparity, 1 / view.depth.clamp_min(1e-9), weight) == pytest.approx(1, abs=1e-5)
        assert 250 <= disparity[weight > 0].max() <= 1500


def test_each_view_has_its_own_factor_and_shift(scene):
    prior = made(scene, 0.0)
    fits = []
    for view in scene.train:
        disparity, weight = prior.view(view.name)
        known = weight > 0
        fits.append(np.polyfit(1 / view.depth[known].numpy(), disparity[known].numpy(), 1))
    assert abs(fits[0] - fits[1]).min() > 1


def test_errors_are_slow_and_as_large_as_asked(scene):
    exact, wrong = made(scene, 0.0), made(scene, 0.3)
    for view in scene.train:
        (a, weight), (b, _) = exact.view(view.name), wrong.view(view.name)
        assert 0.6 < correlation(a, b, weight) < 0.999  # 1 / sqrt(1 + 0.3^2) = 0.96 for white errors
        line = np.polyfit(a[weight > 0].numpy(), b[weight > 0].numpy(), 1)
        error = (b - line[0] * a - line[1]) * weight
        inside = (weight[:, 1:] * weight[:, :-1]) > 0
        assert (error[:, 1:] - error[:, :-1])[inside].abs().mean() < 0.2 * error[weight > 0].std()


def test_a_slow_field_passes_through_its_nodes():
    """Bicubic interpolation with aligned corners: the corners are the outer normal numbers themselves."""
    field = slow_field((13, 17), torch.Generator().manual_seed(3), 4)
    nodes = torch.randn(4, 4, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(field[::4][:, [0, 16]], nodes[:, [0, 3]], atol=1e-5, rtol=0)  # 12 / 3 = 4 rows apart
    assert (field[1:] - field[:-1]).abs().max() < 0.6 * (nodes[1:] - nodes[:-1]).abs().max(), "slow"


def test_medians_take_away_single_pixels_and_keep_edges():
    depth = torch.ones(9, 12)
    depth[:, 6:] = 2.0
    wrong = depth.clone()
    wrong[4, 3], wrong[0, 0] = 50.0, 50.0
    assert torch.equal(smoothed(wrong), depth)
    by_hand = torch.rand(9, 12, generator=torch.Generator().manual_seed(0))
    assert float(smoothed(by_hand)[4, 5]) == float(by_hand[2:7, 3:8].median())


def test_other_cameras_are_told_what_the_points_say(scene):
    prior = made(scene, 0.0)
    view = object_world(0).render(object_rig((48, 36))[17], "between")
    disparity, weight = prior.at(view.camera, view.image)
    both = (weight > 0) & (view.depth > 0)
    assert both.float().mean() > 0.5 * (view.depth > 0).float().mean()
    # the points of neighbouring pixels and of grown ones: an approximation, far better than nothing
    assert pearson(1 / view.depth.clamp_min(1e-9), disparity, both.float()) < 0.1
    again = prior.at(view.camera, view.image)
    assert again[0] is disparity, "kept for the next time"


def test_a_shuffled_prior_has_the_same_values_in_the_wrong_places(scene):
    prior = made(scene, 0.0)
    mixed = prior.shuffled()
    assert "shuffled" in mixed.name
    for view in scene.train:
        (a, weight), (b, _) = prior.view(view.name), mixed.view(view.name)
        assert torch.equal(a.flatten().sort().values, b.flatten().sort().values)
        assert correlation(a, b, weight) < 0.9
    camera = scene.test[0].camera
    assert not torch.equal(prior.at(camera, scene.test[0].image)[0], mixed.at(camera, scene.test[0].image)[0])


def test_point_depth_takes_the_nearest_point_and_grows_by_a_pixel():
    view = object_world(0).render(object_rig((48, 36))[24], "view")
    rays = view.camera.rays()
    points = torch.stack([view.camera.center + depth * rays[10, 20] for depth in (3.0, 2.0, 5.0)])
    depth = point_depth(points, view.camera)
    expected = torch.zeros(36, 48)
    expected[9:12, 19:22] = 2.0
    torch.testing.assert_close(depth, expected, rtol=1e-5, atol=0)
    assert point_depth(points, view.camera, grow=0).count_nonzero() == 1
    behind = view.camera.center - rays[10, 20]
    assert point_depth(behind[None], view.camera).count_nonzero() == 0


def test_stereo_depth_of_close_views_is_near_the_truth():
    world, rig = object_world(0), object_rig((64, 48))
    views = [world.render(rig[index], str(index)) for index in (24, 23, 17)]
    for view, depth in zip(views, stereo_depths(views, 2.0, 5.0), strict=True):
        assert view.depth is not None
        known = view.depth > 0
        error = ((depth - view.depth).abs() / view.depth)[known]
        assert error.median() < 0.05


def test_bad_maps_are_refused(scene):
    depths = [view.depth for view in scene.train]
    generator = torch.Generator()
    with pytest.raises(ValueError, match="3 views, 2 depth maps"):
        stand_in("x", scene.train, depths[:2], error=0.0, generator=generator)
    with pytest.raises(ValueError, match="known pixels"):
        stand_in("x", scene.train, [*depths[:2], torch.zeros(36, 48)], error=0.0, generator=generator)


def test_a_network_is_asked_about_photographs_and_renders(scene):
    asked = []

    def network(image):
        asked.append(image.shape)
        return image.mean(dim=-1)

    prior = NetworkPrior("mean", network, scene.train)
    disparity, weight = prior.view(scene.train[1].name)
    assert torch.equal(disparity, scene.train[1].image.mean(dim=-1))
    assert torch.equal(weight > 0, scene.train[1].mask > 0.5)
    assert prior.at(scene.test[0].camera, torch.full((36, 48, 3), 2.0))[0].max() == 1, "limited as a photograph is"
    assert len(asked) == 4


def test_a_depth_network_without_weights_says_so(tmp_path):
    with pytest.raises(MissingNetwork, match="holds its config"):
        load_depth_network(str(tmp_path))


def test_a_depth_network_in_a_folder_is_read(tmp_path):
    """A tiny DPT with random weights, saved as published ones are."""
    from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

    torch.manual_seed(0)
    config = DPTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_in_index=-1,
        is_hybrid=False,
    )
    DPTForDepthEstimation(config).save_pretrained(tmp_path)
    DPTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    network = load_depth_network(str(tmp_path))
    image = torch.rand(24, 40, 3)
    disparity = network(image)
    assert disparity.shape == (24, 40)
    assert torch.isfinite(disparity).all()
    assert not torch.equal(disparity, network(1 - image))
