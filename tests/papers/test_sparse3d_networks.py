"""Sparse3D's networks: the epipolar transformer's geometry, what the trainings see, and the arms put together."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny_diffusion import write_stable_diffusion
from torch import Tensor

from common import params as parameters
from common.models.denoiser import Denoiser
from common.splatting import Camera, View
from papers.sparse3d import chairs, data, evaluation, experiment, method, priors
from papers.sparse3d.epipolar import EpipolarTransformer, camera_rays, harmonic, photographs, plucker
from papers.sparse3d.settings import Params

SIZE = 16


def tiny(**changes) -> Params:
    small = {"size": SIZE, "train_objects": 3, "train_views": 4, "tests": 2, "circle": 3, "points": 60, "steps": 6}
    small |= {"bootstrap_steps": 3, "eft_width": 8, "eft_pixels": 4, "eft_samples": 4, "eft_steps": 2, "eft_objects": 2}
    small |= {"eft_rays": 8, "base_steps": 2, "base_batch": 2, "control_maps": 4, "control_steps": 2}
    return dataclasses.replace(parameters.load(Params, "sparse3d", "smoke"), **(small | changes))


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def transformer(seed: int = 0) -> EpipolarTransformer:
    """One whose weights are all away from 0."""
    torch.manual_seed(seed)
    network = EpipolarTransformer(width=8, layers=1, pixels=4, samples=6).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network


def stand(around: float, height: float = 0.3) -> Camera:
    return chairs.camera(around, height, SIZE)


def shown(count: int = 2, seed: int = 0) -> list[View]:
    pictures = torch.rand(count, SIZE, SIZE, 3, generator=draw(seed))
    return [View(str(i), stand(1.8 * i), picture) for i, picture in enumerate(pictures)]


# ------------------------------------------------------------------------------------------------------ the transformer


def test_what_is_picked_lies_where_the_sample_falls_on_the_photograph():
    """The photograph's colour is its pixel's position, so the picked colour tells where was looked."""
    column, row = torch.meshgrid((torch.arange(SIZE) + 0.5) / SIZE, (torch.arange(SIZE) + 0.5) / SIZE, indexing="xy")
    places = torch.stack([column, row, torch.zeros_like(row)], dim=-1)
    given = photographs([[View("a", stand(1.0), places)]])
    query = stand(0.0)
    network, points = transformer(), torch.rand(1, 5, 3, 3, generator=draw()) - 0.5
    local = points @ query.viewmat[:3, :3].T + query.viewmat[:3, 3]
    relative = given.viewmats @ torch.linalg.inv(query.viewmat)
    _, colors, inside = network._picked(given, relative, local)
    pixels, _ = stand(1.0).project(points)
    assert inside.all()
    torch.testing.assert_close(colors[0, :, :, 0, :2], pixels[0] / SIZE, atol=1e-3, rtol=0)


def test_what_falls_beside_a_photograph_or_behind_its_camera_is_not_picked():
    given = photographs([[View("a", stand(0.0), torch.ones(SIZE, SIZE, 3))]])
    points = torch.tensor([[[[0.0, 0, 3], [0, 0, -3], [30, 0, 3]]]])  # ahead, behind, beside, in its own coordinates
    _, colors, inside = transformer()._picked(given, torch.eye(4)[None, None], points)
    assert inside[0, 0, :, 0, 0].tolist() == [1, 0, 0]
    assert colors[0, 0, :, 0, 0].tolist() == [1, 0, 0]


def test_the_order_of_the_photographs_and_the_length_of_rays_do_not_matter():
    network, query = transformer(), stand(0.9)
    given, rays = photographs([shown(3)]), camera_rays(query)[None]
    with torch.no_grad():
        found = network(given, query.viewmat[None], rays)
        turned = network(type(given)(*(value[:, [2, 0, 1]] for value in given)), query.viewmat[None], 3 * rays)
    for ours, theirs in zip(found, turned, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_turning_the_world_changes_nothing():
    query, moved = stand(0.9), stand(0.9 + 2.0)
    views = shown()
    turned = [View(v.name, stand(1.8 * i + 2.0), v.image) for i, v in enumerate(views)]
    ours, theirs = transformer().look(views, query), transformer().look(turned, moved)
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-3, rtol=0)  # float32 through sines of up to 32 pi x
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-3, rtol=0)


def test_at_first_the_colour_is_a_mean_of_the_photographs():
    torch.manual_seed(0)
    network = EpipolarTransformer(width=8, layers=1, pixels=4, samples=6).eval()
    pairs = zip(shown(), (0.2, 0.6), strict=True)
    shades = [View(v.name, v.camera, torch.full((SIZE, SIZE, 3), shade)) for v, shade in pairs]
    middle = network.look(shades, stand(0.9))[0][6:10, 6:10]
    assert float(middle.min()) >= 0.2 and float(middle.max()) <= 0.6


def test_lines_have_one_plucker_form_whatever_their_origin():
    origin, along = torch.rand(4, 3, generator=draw()), torch.rand(4, 3, generator=draw(1))
    torch.testing.assert_close(plucker(origin, along), plucker(origin + 2.5 * along, along))
    found = harmonic(torch.tensor([[0.5]]))
    expected = [
        0.5,
        *(math.sin(0.25 * math.pi * 2**k) for k in range(6)),
        *(math.cos(0.25 * math.pi * 2**k) for k in range(6)),
    ]
    torch.testing.assert_close(found, torch.tensor([expected]), atol=1e-5, rtol=0)


def test_a_transformer_of_impossible_sizes_is_refused():
    with pytest.raises(ValueError, match="multiples of 4"):
        EpipolarTransformer(width=6)


# ------------------------------------------------------------------------------------------------------- the trainings


@cache
def album() -> data.Album:
    return data.album(tiny(), 0, 3)


def test_every_ray_is_the_middle_of_its_square_and_knows_its_mean():
    queries = priors.every_ray(album(), 2)
    world = chairs.chair(data.FIRST_TRAINED + 1)
    camera = Camera(album().viewmats[1, 2], album().Ks[1, 2], SIZE, SIZE)
    small = world.render(camera, "a").resized(8, 8)
    torch.testing.assert_close(queries.colors[1, 2], small.image.reshape(-1, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(queries.rays[1, 2], camera_rays(small.camera), atol=1e-5, rtol=0)
    assert small.mask is not None
    weights = queries.weights[1, 2].reshape(8, 8)
    assert (weights[small.mask > 0.6] == priors.NEAR_OBJECT).all() and weights[0, 0] == 1


def test_no_picture_is_predicted_from_itself():
    generator, counts = draw(), set()
    for _ in range(20):
        objects, query, inputs = priors.chosen(album(), [2, 3], 5, generator)
        assert objects.max() < 3 and not (query[:, None] == inputs).any()
        assert all(len(set(row.tolist())) == inputs.shape[1] for row in inputs)
        counts.add(inputs.shape[1])
    assert counts == {2, 3}


def test_the_pairs_of_the_controller_belong_together():
    """Every map's last three channels are the transformer's colours at the picture's camera."""
    network = priors.transformer(tiny()).eval()
    with torch.no_grad():
        network.color.bias.fill_(0.05)
    maps, pictures = priors.learning_pairs(tiny(), album(), network)
    generator = torch.Generator().manual_seed(priors.seeds.derived(priors.SEED, "maps"))
    objects, query, inputs = priors.chosen(album(), tiny().views, priors.TOGETHER, generator)
    one, q = int(objects[0]), int(query[0])
    views = [
        View(
            str(i),
            Camera(album().viewmats[one, i], album().Ks[one, i], SIZE, SIZE),
            album().images[one, i].movedim(0, -1),
        )
        for i in inputs[0].tolist()
    ]
    camera = Camera(album().viewmats[one, q], album().Ks[one, q], SIZE, SIZE)
    _, expected = network.look(views, camera.resized(8, 8))
    torch.testing.assert_close(maps[0], expected, atol=1e-4, rtol=0)
    assert torch.equal(pictures[0], album().images[one, q]) and maps.shape == (4, 11, 8, 8)


def test_training_lowers_the_errors():
    params = tiny(eft_steps=60, base_steps=80, eft_rate=5e-3)
    for train in (priors.train_transformer, priors.train_base):
        losses = train(params, album())["losses"]
        assert sum(losses[-15:]) < 0.8 * sum(losses[:15])


# ------------------------------------------------------------------------------------------------------------ the arms


@cache
def together() -> tuple[data.Case, experiment.Looks, experiment.Networks]:
    params = tiny()
    first = {name: experiment.first_networks(params, album(), name) for name in ("transformer", "base")}
    states = first["transformer"]["state"], first["base"]["state"]
    networks = experiment.Networks(
        first["transformer"], first["base"], priors.train_controller(params, album(), *states)
    )
    case, other = data.case(params, 2, 0), data.other_case(params, 2, 0)
    return case, experiment.looks(params, case, other, networks.transformer), networks


def added(arm: str) -> dict[str, object]:
    found = experiment.extensions(tiny(), *together(), experiment.ARMS[arm])
    return {type(extension).__name__: extension for extension in found}


def test_every_arm_has_the_losses_that_it_is_named_for():
    steps, first = tiny().steps, tiny().bootstrap_steps
    until = {name: getattr(added(name).get("Bootstrap"), "until", None) for name in experiment.ARMS}
    assert until == {**dict.fromkeys(experiment.ARMS, first), "photo": None, "no_bootstrap": None, "eft": steps}
    rules = {name: getattr(added(name).get("Distillation"), "rule", None) for name in experiment.ARMS}
    sds, csds = ("sds", "no_control", "oracle"), ("csds", "no_bootstrap", "shuffled", "again")
    assert rules == {"photo": None, "eft": None, **dict.fromkeys(sds, "sds"), **dict.fromkeys(csds, "csds")}
    assert all("Silhouette" in added(name) for name in experiment.ARMS)


def test_the_controls_know_what_they_are_named_for():
    case, seen, _ = together()
    conditions = {name: added(name)["Distillation"].conditions for name in ("csds", "sds", "shuffled", "oracle")}
    assert torch.equal(conditions["csds"], seen.maps) and torch.equal(conditions["sds"], seen.maps)
    assert torch.equal(conditions["shuffled"], seen.others) and not torch.equal(seen.maps, seen.others)
    assert torch.equal(conditions["oracle"], case.truth.movedim(-1, 1))
    assert added("no_control")["Distillation"].prior.control is False
    assert added("again")["Distillation"].stream != added("csds")["Distillation"].stream


def test_a_fit_is_scored_and_repeats_to_the_bit():
    first, again = (experiment.fitted(tiny(), *together(), "csds", 0) for _ in range(2))
    assert len(first["loss"]) == tiny().steps and first["scores"] == again["scores"]
    wanted = {"psnr", "psnr_masked", "ssim", "gmsd", "sharpness", "unsharpness", "depth_error", "chamfer"}
    assert set(first["scores"]) == wanted and all(math.isfinite(value) for value in first["scores"].values())


def test_the_trained_prior_is_the_one_that_was_trained():
    _, seen, networks = together()
    prior = networks.prior(tiny())
    base = Denoiser(width=tiny().base_width)
    base.load_state_dict(networks.base["state"])
    x, t = torch.rand(1, 3, SIZE, SIZE), torch.tensor([300])
    with torch.no_grad():
        assert torch.equal(prior.base(x, t), base(x, t))
        assert not torch.equal(prior.controlled(x, t, seen.maps[:1]), prior.base(x, t))


def test_the_networks_are_measured_on_held_out_objects():
    case, seen, networks = together()
    perfect = torch.nn.functional.avg_pool2d(case.truth.movedim(-1, 1), 2).movedim(1, -1)
    found = evaluation.transformer_quality(case, perfect)
    assert found["transformer"] > 60 > found["nearest"]
    errors = evaluation.prior_quality(networks.prior(tiny()), case, seen.maps, seen.others, 0)
    assert errors["zero"] == pytest.approx(1.0, abs=0.1) and set(errors) == {"zero", "base", "controlled", "shuffled"}
    for pictures in evaluation.samples(networks.prior(tiny()), seen.maps, SIZE, 0):
        assert pictures.shape == (3, SIZE, SIZE, 3) and 0 <= float(pictures.min()) <= float(pictures.max()) <= 1


@pytest.mark.filterwarnings("default")  # other people's packages warn about themselves
def test_stable_diffusion_takes_the_small_models_place(tmp_path: Path):
    folder = write_stable_diffusion(tmp_path / "model")
    params = tiny(prior="pretrained", stable_diffusion=folder, size=64, ray_pixels=8, eft_width=8)
    prior = priors.fresh_prior(params, 11)
    image, maps = torch.rand(64, 64, 3, requires_grad=True), torch.rand(11, 8, 8)
    method.distillation_loss(prior, image, maps, "csds", draw()).backward()
    assert image.grad is not None and not image.grad.any()  # the controller adds nothing yet
    method.distillation_loss(prior, image, maps, "sds", draw()).backward()
    assert isinstance(image.grad, Tensor) and float(image.grad.abs().max()) > 0
    book = data.Album(torch.rand(2, 3, 3, 64, 64), torch.ones(2, 3, 64, 64), *_poses(2, 3))
    state = priors.train_controller(params, book, priors.kept(priors.transformer(params)), None)["state"]
    again = priors.trained_prior(params, None, state)
    x, t = torch.rand(1, 4, 8, 8), torch.tensor([200])
    with torch.no_grad():
        assert not torch.equal(again.controlled(x, t, maps[None]), again.base(x, t))


def _poses(objects: int, count: int) -> tuple[Tensor, Tensor]:
    cameras = [chairs.camera(2.0 * i, 0.3, 64) for i in range(count)]
    viewmats, Ks = (torch.stack([getattr(camera, name) for camera in cameras]) for name in ("viewmat", "K"))
    return viewmats.expand(objects, -1, -1, -1), Ks.expand(objects, -1, -1, -1)
