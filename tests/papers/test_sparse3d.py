"""Sparse3D's parts against hand computations: the two gradients, the controller, the losses of a scene, the scores."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from common.models.denoiser import Denoiser
from common.models.diffusion import Schedule, epsilon_loss, train
from common.splatting import Camera, PointCloud, Scene, View
from common.splatting.extensions import Shot
from common.splatting.model import Gaussians, Rendering, Splats, render
from common.splatting.settings import TrainSettings
from common.splatting.training import Trainer, fit
from papers.sparse3d import chairs, evaluation, method

SIZE = 16


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Constant:
    """A prior that always sees the same noises."""

    def __init__(self, controlled: float, base: float):
        self.schedule, self.answers = Schedule.cosine(), (controlled, base)

    def encode(self, image: Tensor) -> Tensor:
        return 2 * image - 1

    def base(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x, self.answers[1])

    def controlled(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return torch.full_like(x, self.answers[0])


class Echo(Constant):
    """A prior whose answers depend on what it is given."""

    def base(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.3 * x + t.reshape(-1, 1, 1, 1) / 1000

    def controlled(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return self.base(x, t) * condition.mean() + 0.1


def a_network(seed: int = 0) -> method.NetworkPrior:
    """A small model with random weights, so that its answers are not 0, and a new controller."""
    torch.manual_seed(seed)
    denoiser = Denoiser(width=8, depth=2)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return method.NetworkPrior(method.controlled(denoiser, 5, 2), Schedule.cosine())


# ----------------------------------------------------------------------------------------------------- two gradients


@pytest.mark.parametrize("time", [20, 500, 990])
def test_both_rules_are_their_formulas_and_differ_in_one_term(time: int):
    prior, t = Echo(0, 0), torch.tensor([time])
    x, noise, condition = torch.rand(1, 3, 4, 4, generator=draw()), torch.randn(1, 3, 4, 4), torch.rand(1, 2, 2, 2)
    a = float(prior.schedule.signal[time])
    x_t = math.sqrt(a) * x + math.sqrt(1 - a) * noise
    base = 0.3 * x_t + time / 1000
    steered = base * condition.mean() + 0.1
    expected = {"sds": (1 - a) * (steered - noise), "csds": (1 - a) * (steered - base)}
    for rule, gradient in expected.items():
        found = method.distilled(prior, x, condition, t, noise, rule)
        torch.testing.assert_close(found, gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rule", ["sds", "csds"])
def test_the_losss_gradient_is_the_rule_through_the_encoder_alone(rule: method.Rule):
    """The model's own derivative is left out: that is what makes it score distillation."""
    prior, condition = Echo(0, 0), torch.rand(2, 2, 2, generator=draw(1))
    image = torch.rand(4, 4, 3, generator=draw(2), requires_grad=True)
    method.distillation_loss(prior, image, condition, rule, draw(3)).backward()
    again = draw(3)
    t = torch.randint(20, 991, (1,), generator=again)
    noise = torch.randn(1, 3, 4, 4, generator=again)
    x = prior.encode(image.detach().movedim(-1, 0)[None])
    gradient = method.distilled(prior, x, condition[None], t, noise, rule)
    torch.testing.assert_close(image.grad, 2 * gradient[0].movedim(0, -1) / x.numel())


@pytest.mark.parametrize(("narrow", "spread"), [(0.3, 1.0), (0.05, 1.0), (0.3, 3.0)])
def test_with_known_models_sds_settles_at_the_mean_and_csds_beyond_it(narrow: float, spread: float):
    known = evaluation.Gaussian(mean=0.8, narrow=narrow, spread=spread)
    assert evaluation.fixed_point("sds", known) == pytest.approx(0.8, abs=1e-6)
    # sum k (A (x - m) - B x) = 0 with k = (1 - a) sqrt(a (1 - a)), A and B the two inverse variances of x_t
    a = known.schedule.signal[20:991].double()
    k = (1 - a) * (a * (1 - a)).sqrt()
    first, second = 1 / (a * narrow**2 + 1 - a), 1 / (a * spread**2 + 1 - a)
    expected = 0.8 * float((k * first).sum() / (k * (first - second)).sum())
    assert expected > 0.8 and evaluation.fixed_point("csds", known) == pytest.approx(expected, rel=1e-6)


def test_sds_by_a_prior_that_knows_the_picture_is_a_straight_pull_to_it():
    prior = method.OraclePrior(None, Schedule.cosine())
    x, truth = 2 * torch.rand(1, 3, 4, 4) - 1, torch.rand(1, 3, 4, 4)
    for noise in (torch.randn(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)):  # whatever the noise
        found = method.distilled(prior, x, truth, torch.tensor([400]), noise, "sds")
        a = prior.schedule.at(400)
        torch.testing.assert_close(found, (a * (1 - a)).sqrt() * (x - (2 * truth - 1)), atol=1e-5, rtol=1e-4)


# -------------------------------------------------------------------------------------------------- the controller


def test_a_new_controller_changes_nothing_and_then_csds_is_zero():
    prior = a_network()
    x, t, maps = torch.rand(2, 3, 16, 16), torch.tensor([100, 900]), torch.rand(2, 5, 8, 8)
    with torch.no_grad():
        assert torch.equal(prior.controlled(x, t, maps), prior.base(x, t))
        noise = torch.randn_like(x)
        assert not method.distilled(prior, x, maps, t, noise, "csds").any()
        assert method.distilled(prior, x, maps, t, noise, "sds").abs().max() > 0.1


def test_training_moves_the_controller_and_leaves_the_base_as_it_is():
    prior = a_network()
    before = [value.clone() for value in prior.network.denoiser.parameters()]
    x, maps, t = torch.rand(2, 3, 16, 16), torch.rand(2, 5, 8, 8), torch.tensor([500, 500])

    def loss(network, generator):
        return epsilon_loss(lambda x, t: network(x, t, maps), x, prior.schedule, generator)

    train(prior.network, loss, steps=5, learning_rate=1e-2, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(before, prior.network.denoiser.parameters(), strict=True))
    with torch.no_grad():
        assert not torch.equal(prior.controlled(x, t, maps), prior.base(x, t))
        assert not torch.equal(prior.controlled(x, t, maps), prior.controlled(x, t, maps.flip(0)))
        silent = method.NetworkPrior(prior.network, prior.schedule, control=False)
        assert torch.equal(silent.controlled(x, t, maps), prior.base(x, t))


@pytest.mark.parametrize(("pixels", "side"), [(2, 8), (4, 4), (1, 16)])
def test_the_map_may_be_coarser_or_finer_than_the_models_positions(pixels: int, side: int):
    network = method.controlled(Denoiser(width=8, depth=2), 5, pixels)
    assert network(torch.rand(1, 3, 16, 16), torch.tensor([3]), torch.rand(1, 5, side, side)).shape == (1, 3, 16, 16)


# ------------------------------------------------------------------------------------------------- fitting the scene


def views(count: int = 2) -> tuple[View, ...]:
    disc = torch.zeros(SIZE, SIZE)
    disc[4:12, 4:12] = 1
    image = torch.where(disc[..., None] > 0, 0.4, 1.0).expand(SIZE, SIZE, 3).contiguous()
    return tuple(View(str(i), chairs.camera(1.8 * i, 0.3, SIZE), image, disc) for i in range(count))


def ball(count: int = 150) -> PointCloud:
    places = torch.nn.functional.normalize(torch.randn(count, 3, generator=draw()), dim=-1) * 0.5
    return PointCloud(places, torch.rand(count, 3, generator=draw(1)))


def scene() -> Scene:
    return Scene("ball", views(), points=ball(), background=torch.ones(3))


def a_shot(trainer: Trainer) -> Shot:
    view, splats = trainer.scene.train[0], trainer.model.splats()
    rendering = render(splats, view.camera, background=torch.ones(3))
    return Shot(view, splats, rendering, rendering.image, torch.ones(3))


def a_trainer() -> Trainer:
    return Trainer(scene(), TrainSettings(iterations=10, strategy=None, sh_degree=0))


def test_the_circle_goes_around_at_the_photographs_height():
    path = method.circle(views(3), 8)
    centers = torch.stack([camera.center for camera in path])
    torch.testing.assert_close(centers[:, 2], torch.full((8,), 3 * math.sin(0.3)), atol=1e-4, rtol=0)
    torch.testing.assert_close(centers.norm(dim=1), torch.full((8,), 3.0), atol=1e-3, rtol=0)
    assert float(torch.pdist(centers).min()) > 2.0  # 45 degrees apart


def test_the_silhouette_is_a_huber_loss_between_opacity_and_mask():
    trainer = a_trainer()
    shot = a_shot(trainer)
    error = (shot.rendering.alpha - shot.view.mask).abs()
    huber = torch.where(error < 0.1, 0.5 * error**2, 0.1 * (error - 0.05)).mean()
    found = method.Silhouette(2.0).loss(trainer, shot)
    assert float(found.detach()) == pytest.approx(2 * float(huber.detach()), rel=1e-5)


def test_the_bootstrap_compares_means_over_rays_and_ends():
    trainer = a_trainer()
    shot, camera = a_shot(trainer), chairs.camera(0.7, 0.3, SIZE)
    picture = torch.rand(1, 8, 8, 3, generator=draw(4))
    extension = method.Bootstrap([camera], picture, 3.0, until=5)
    trainer.step = 5
    image = render(shot.splats, camera, background=torch.ones(3)).image
    small = image.reshape(8, 2, 8, 2, 3).mean(dim=(1, 3))
    error = (small - picture[0]).abs()
    huber = torch.where(error < 0.1, 0.5 * error**2, 0.1 * (error - 0.05)).mean()
    found = extension.loss(trainer, shot)
    assert found is not None and float(found.detach()) == pytest.approx(3 * float(huber.detach()), rel=1e-5)
    trainer.step = 6
    assert extension.loss(trainer, shot) is None


def test_distillation_begins_after_the_bootstrap_and_hears_its_stream():
    def gradient(stream: str, step: int = 6) -> Tensor | None:
        trainer = a_trainer()
        shot = a_shot(trainer)
        trainer.step = step
        cameras = [chairs.camera(0.7, 0.3, SIZE), chairs.camera(2.7, 0.3, SIZE)]
        conditions = torch.rand(2, 2, 8, 8, generator=draw(5))
        loss = method.Distillation(Echo(0, 0), cameras, conditions, "sds", 1.0, 5, stream).loss(trainer, shot)
        if loss is None:
            return None
        loss.backward()
        return trainer.model.sh0.grad

    assert gradient("distillation", step=5) is None
    first, again, other = gradient("distillation"), gradient("distillation"), gradient("other")
    assert first is not None and torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(("answer", "sign"), [(0.5, -1), (-0.5, 1)])
def test_a_prior_that_sees_noise_everywhere_darkens_the_scene_and_the_other_way_round(answer: float, sign: int):
    """eps - eps_base > 0: the picture is said to be too bright, so descent lowers it."""
    cameras = [camera.camera for camera in views(2)]
    extension = method.Distillation(Constant(answer, 0), cameras, torch.zeros(2, 1, 8, 8), "csds", 5.0, 0)
    settings = TrainSettings(iterations=20, strategy=None, sh_degree=0)
    model = Gaussians.from_points(ball(), sh_degree=0, initial_opacity=0.5)
    moved = fit(scene(), settings, model=model, extensions=[extension], progress=False).model
    alone = fit(
        scene(), settings, model=Gaussians.from_points(ball(), sh_degree=0, initial_opacity=0.5), progress=False
    ).model
    assert sign * float(moved.sh0.detach().mean() - alone.sh0.detach().mean()) > 0.01


# ---------------------------------------------------------------------------------------------------------- the scores


def test_gradient_energy_by_hand_and_that_blur_lowers_it():
    step = torch.zeros(4, 4, 3)
    step[:, 2:] = 1  # one of three steps to the right is 1, none down
    assert evaluation.gradient_energy(step) == pytest.approx(1 / 3, abs=1e-6)
    noise = torch.rand(32, 32, 3, generator=draw())
    blurred = torch.nn.functional.avg_pool2d(noise.movedim(-1, 0), 3, stride=1, padding=1).movedim(0, -1)
    assert evaluation.gradient_energy(blurred) < 0.3 * evaluation.gradient_energy(noise)


def test_the_spectrum_puts_a_wave_where_it_belongs_and_keeps_the_power():
    columns = torch.arange(32) / 32
    wave = (0.5 + 0.25 * torch.cos(2 * math.pi * 5 * columns))[None, :, None].expand(32, 32, 3)
    found = evaluation.spectrum(wave)
    assert int(found.argmax()) == 4  # five waves; the first entry is one
    assert float(found.sum()) == pytest.approx(float(evaluation.grey(wave).var(correction=0)), rel=1e-3)


def test_chamfer_by_hand():
    square = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]])
    assert evaluation.chamfer(square, square) == 0
    assert evaluation.chamfer(square + torch.tensor([0, 0, 0.25]), square) == pytest.approx(0.25)
    assert evaluation.chamfer(square[:1], square) == pytest.approx((0 + (0 + 1 + 1 + math.sqrt(2)) / 4) / 2)
    assert evaluation.chamfer(square[:0], square) == 1.0


class Drawn:
    """A model that renders a depth and an opacity."""

    def __init__(self, depth: Tensor, alpha: Tensor):
        self.depth, self.alpha = depth, alpha

    def render(self, camera: Camera, *, mode: str) -> Rendering:
        assert mode == "ED"
        return Rendering(torch.zeros(SIZE, SIZE, 0), self.alpha, self.depth, {})


def test_depth_error_counts_holes_as_wrong_and_looks_only_at_the_object():
    world, camera = chairs.chair(0), chairs.camera(0.3, 0.3, SIZE)
    view = world.render(camera, "a")
    full, depth = torch.ones(SIZE, SIZE), view.depth
    assert evaluation.depth_error(Drawn(depth, full), view) == 0
    assert evaluation.depth_error(Drawn(depth + 0.2 * (view.mask > 0.5), full), view) == pytest.approx(0.2, abs=1e-5)
    assert evaluation.depth_error(Drawn(depth + 9.0, full), view) == 0.5
    assert evaluation.depth_error(Drawn(depth, torch.zeros(SIZE, SIZE)), view) == 0.5
    beside = depth + 0.3 * (view.mask <= 0.5)
    assert evaluation.depth_error(Drawn(beside, full), view) == 0


def test_surfaces_of_the_truth_and_of_a_render_meet_where_the_render_is_right():
    world = chairs.chair(0)
    test = [world.render(chairs.camera(x, 0.3, SIZE), str(x)) for x in (0.0, 2.0)]
    truth = evaluation.true_surface(test)
    assert len(truth) > 50 and float(truth.norm(dim=1).max()) < 1.1
    shown = torch.cat([v.camera.backproject(v.depth)[v.depth > 0] for v in test])
    assert evaluation.chamfer(truth, shown) == 0


def test_the_model_is_scored_on_white():
    model = Gaussians.from_points(ball(), sh_degree=0)
    image = evaluation.picture(model, chairs.camera(0.0, 0.3, SIZE))
    assert torch.equal(image[0, 0], torch.ones(3)) and float(image.min()) < 0.95
    assert isinstance(model.splats(), Splats)
