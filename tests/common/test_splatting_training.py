"""The training loop: it learns, it can be stopped and resumed without a trace, and papers can change it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.splatting.cameras import Camera
from common.splatting.checkpoints import CheckpointError, read
from common.splatting.evaluation import evaluate
from common.splatting.extensions import Extension, PerViewColour, Shot
from common.splatting.generated import object_scene
from common.splatting.losses import Target, photometric
from common.splatting.model import Gaussians, Splats, render
from common.splatting.scene import Scene
from common.splatting.settings import TrainSettings
from common.splatting.strategies import DefaultStrategy, MCMCStrategy
from common.splatting.training import FitResult, Trainer, fit

GROW = DefaultStrategy(first=5, every=10, until=1000, reset_every=25, most=450)


@pytest.fixture(scope="module")
def scene() -> Scene:
    return object_scene(0, views=3, tests=2, size=(48, 36), points=300)


def short(iterations: int = 30, **changes: Any) -> TrainSettings:
    changes = {"strategy": GROW, "sh_every": 10, "sh_degree": 1, **changes}
    return TrainSettings(iterations=iterations, lr_means_until=100, **changes)


def run(scene: Scene, settings: TrainSettings, **others: Any) -> FitResult:
    return fit(scene, settings, progress=False, **others)


def equal(a: Gaussians, b: Gaussians) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.values().values(), b.values().values(), strict=True))


def test_a_small_scene_is_learnt(scene: Scene) -> None:
    settings = TrainSettings(iterations=300, sh_every=100, strategy=DefaultStrategy(first=60, until=250, most=900))
    result = run(scene, settings)
    psnr = evaluate(result.model, scene.train, background=result.background).mean("psnr")
    assert psnr is not None and psnr > 25  # 15 at the start
    assert len(result.losses) == len(result.counts) == 300
    assert result.counts[-1] == len(result.model) > 300
    # and what it learnt is the scene: views that it never saw are closer than before, too
    start = Gaussians.from_points(scene.points) if scene.points else None
    assert start is not None
    before, after = (evaluate(m, scene.test).mean("psnr") for m in (start, result.model))
    assert before is not None and after is not None and after > before + 3


@pytest.mark.parametrize(
    "strategy",
    [GROW, replace(GROW, absgrad=True, scale2d_until=50), MCMCStrategy(most=400, first=5, every=10), None],
    ids=["3dgs", "absgrad", "mcmc", "no"],
)
def test_a_resumed_training_gives_the_same_bits(scene: Scene, tmp_path: Path, strategy: Any) -> None:
    settings = short(60, strategy=strategy, background="random", mode="RGB+ED")

    def extensions() -> list[Extension]:
        return [PerViewColour(), Noisy()]

    torch.manual_seed(0)
    whole = run(scene, settings, extensions=extensions())

    def stop(trainer: Trainer) -> None:
        if trainer.step == 37:  # in the middle of a round of views and between refinements
            raise KeyboardInterrupt

    file = tmp_path / "training.ckpt"
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        run(scene, settings, extensions=extensions(), checkpoint=file, on_step=stop)
    torch.manual_seed(12345)  # what happens between the sittings must not matter
    torch.rand(7)
    resumed = run(scene, settings, extensions=extensions(), checkpoint=file)
    assert equal(whole.model, resumed.model)
    assert whole.losses == resumed.losses and whole.counts == resumed.counts
    # and a finished training is not done again
    again = run(scene, settings, extensions=extensions(), checkpoint=file, on_step=forbidden)
    assert equal(whole.model, again.model)


class Noisy(Extension):
    """Draws from a stream of its own and from torch's, and counts."""

    def __init__(self) -> None:
        self.drawn = 0.0

    def loss(self, trainer: Trainer, shot: Shot) -> Tensor:
        value = torch.rand((), generator=trainer.generator("noisy")) + torch.rand(())
        self.drawn += float(value)
        return 1e-3 * self.drawn * value * shot.depth.mean()

    def state(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def restore(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]


def forbidden(trainer: Trainer) -> None:
    raise AssertionError(f"step {trainer.step} was made")


def test_the_seed_decides_and_nothing_else(scene: Scene) -> None:
    settings = short(12, background="random", strategy=MCMCStrategy(first=5, every=5))
    first, second, other = (run(scene, replace(settings, seed=seed)).model for seed in (0, 0, 1))
    assert equal(first, second)
    assert not equal(first, other)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own answer to Ctrl-C; a shell's background jobs begin without it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_checkpoints_come_regularly_and_on_ctrl_c(scene: Scene, tmp_path: Path) -> None:
    file, seen = tmp_path / "a" / "training.ckpt", []

    def look(trainer: Trainer) -> None:
        seen.append(read(file)["history"][0] if file.exists() else 0)

    run(scene, short(12, checkpoint_every=5), checkpoint=file, on_step=look)
    assert seen == [0] * 5 + [5] * 5 + [10] * 2  # look comes before the saving of the same step
    assert read(file)["history"][0] == 12

    class Impatient(Extension):
        """Presses Ctrl-C in the middle of a step."""

        def loss(self, trainer: Trainer, shot: Shot) -> None:
            if trainer.step == 7:
                os.kill(os.getpid(), signal.SIGINT)

    file = tmp_path / "b.ckpt"
    with pytest.raises(KeyboardInterrupt):
        run(scene, short(12), extensions=[Impatient()], checkpoint=file)
    assert read(file)["history"][0] == 7  # the step was finished first
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_checkpoint_of_another_training_is_refused(scene: Scene, tmp_path: Path) -> None:
    file = tmp_path / "training.ckpt"
    run(scene, short(3), checkpoint=file)
    with pytest.raises(CheckpointError, match=r"settings\.dssim is 0\.5 here and 0\.2 there"):
        run(scene, short(3, dssim=0.5), checkpoint=file)
    with pytest.raises(CheckpointError, match=r"settings\.strategy"):
        run(scene, short(3, strategy=MCMCStrategy()), checkpoint=file)
    other = object_scene(0, views=4, tests=2, size=(48, 36), points=300)
    with pytest.raises(CheckpointError, match=r"scene\.train"):
        run(other, short(3), checkpoint=file)
    with pytest.raises(CheckpointError, match=r"extensions \[\], this training \['Noisy'\]"):
        run(scene, short(3), checkpoint=file, extensions=[Noisy()])
    run(scene, short(3, eval_every=1), checkpoint=file, on_step=forbidden)  # changes no number


@pytest.mark.parametrize("damage", [b"", b"half a file", "cut"])
def test_a_damaged_checkpoint_is_named(scene: Scene, tmp_path: Path, damage: Any) -> None:
    file = tmp_path / "training.ckpt"
    run(scene, short(2), checkpoint=file)
    file.write_bytes(file.read_bytes()[:-5000] if damage == "cut" else damage)
    with pytest.raises(CheckpointError, match=r"training\.ckpt is no readable checkpoint"):
        run(scene, short(2), checkpoint=file)


def test_a_loss_that_is_not_finite_stops_with_step_and_view(scene: Scene, tmp_path: Path) -> None:
    class Broken(Extension):
        def loss(self, trainer: Trainer, shot: Shot) -> Tensor | None:
            return shot.image.mean() * torch.nan if trainer.step == 4 else None

    file = tmp_path / "training.ckpt"
    with pytest.raises(FloatingPointError, match=r"step 4, view .*: the loss is nan"):
        run(scene, short(9, checkpoint_every=1), extensions=[Broken()], checkpoint=file)
    state = read(file)
    assert state["history"][0] == 3
    assert all(bool(torch.isfinite(value).all()) for value in state["population"]["parameters"].values())


def test_memory_errors_pass_through(scene: Scene) -> None:
    class Greedy(Extension):
        def loss(self, trainer: Trainer, shot: Shot) -> None:
            raise MemoryError("too many intersections")

    with pytest.raises(MemoryError, match="too many intersections"):
        run(scene, short(2), extensions=[Greedy()])


def test_every_view_comes_once_before_any_comes_again(scene: Scene) -> None:
    names: list[str] = []

    class Names(Extension):
        def loss(self, trainer: Trainer, shot: Shot) -> None:
            names.append(shot.view.name)

    run(scene, short(12), extensions=[Names()])
    every = sorted(view.name for view in scene.train)
    assert [sorted(names[i : i + 3]) for i in range(0, 12, 3)] == [every] * 4


def test_learning_rates_and_degrees_follow_their_schedule(scene: Scene) -> None:
    trainer = Trainer(scene, TrainSettings(iterations=200, sh_every=50))
    trainer.set_learning_rates(0)
    assert trainer.population.group("means")["lr"] == pytest.approx(1.6e-4 * scene.extent)
    trainer.set_learning_rates(100)
    assert trainer.population.group("means")["lr"] == pytest.approx(1.6e-5 * scene.extent)
    trainer.set_learning_rates(5000)
    assert trainer.population.group("means")["lr"] == pytest.approx(1.6e-6 * scene.extent)
    assert trainer.population.group("shN")["lr"] == pytest.approx(2.5e-3 / 20)
    degrees = []
    for step in (1, 49, 50, 100, 150, 200):
        trainer.step = step
        degrees.append(trainer.sh_degree)
    assert degrees == [0, 0, 1, 2, 3, 3]


def test_the_first_step_is_adam_on_the_photometric_loss(scene: Scene) -> None:
    """One step of the loop against the same step written out."""
    settings = TrainSettings(iterations=100, strategy=None, dssim=0.2)
    trainer, names = Trainer(scene, settings), []

    class Names(Extension):
        def loss(self, trainer: Trainer, shot: Shot) -> None:
            names.append(shot.view)

    trainer.extensions = (Names(),)
    assert scene.points is not None
    model = Gaussians.from_points(scene.points)
    value = trainer.train_step()
    view = names[0]
    loss = photometric(model.render(view.camera, background=torch.zeros(3), sh_degree=0).image, Target(view.image))
    assert value == pytest.approx(float(loss.detach()), rel=1e-6)
    loss.backward()
    rate = 1.6e-4 ** (1 - 0.01) * 1.6e-6**0.01 * scene.extent
    for name, lr in (("means", rate), ("opacity_logits", 0.05), ("log_scales", 5e-3)):
        parameter = getattr(model, name)
        moved = getattr(trainer.model, name).detach() - parameter.detach()
        # Adam's first step is lr times the sign of the gradient
        certain = parameter.grad.abs() > 1e-6
        expected = -lr * parameter.grad.sign()
        assert torch.allclose(moved[certain], expected[certain], rtol=1e-3, atol=1e-6), name


class Dropout(Extension):
    """DropGaussian: some opacities are zero for a step, the others make up for it."""

    def splats(self, trainer: Trainer, splats: Splats) -> Splats:
        keep = torch.rand(len(splats.opacities), generator=trainer.generator("drop")) > 0.3
        return splats._replace(opacities=splats.opacities * keep / 0.7)


class PseudoView(Extension):
    """A second render from a camera of its own, compared with another model's (CoR-GS)."""

    def __init__(self, camera: Camera) -> None:
        self.camera, self.other = camera, None
        self.values: list[float] = []

    def loss(self, trainer: Trainer, shot: Shot) -> Tensor:
        assert self.other is not None
        with torch.no_grad():
            seen = self.other.model.render(self.camera).image
        extra = photometric(trainer.model.render(self.camera).image, seen)
        self.values.append(float(extra.detach()))
        return extra


class Prune(Extension):
    """Own densification: the lowest half of the Gaussians goes at step 5."""

    def after_step(self, trainer: Trainer) -> None:
        if trainer.step == 5:
            heights = trainer.model.means.detach()[:, 2]
            trainer.population.change(heights > heights.median())


def test_methods_are_small_objects(scene: Scene) -> None:
    """Dropout, own pruning, pseudo views of two fields that look at each other."""
    assert not equal(run(scene, short(10)).model, run(scene, short(10), extensions=[Dropout()]).model)

    pruned = run(scene, short(10, strategy=None), extensions=[Prune()])
    assert pruned.counts == [300] * 4 + [150] * 6

    pairs = [PseudoView(scene.test[0].camera) for _ in range(2)]
    fields = [Trainer(scene, short(40, seed=i, strategy=None), extensions=[pairs[i]]) for i in range(2)]
    pairs[0].other, pairs[1].other = fields[1], fields[0]
    for _ in range(40):
        for each in fields:
            each.train_step()
    assert not equal(fields[0].model, fields[1].model)
    assert pairs[0].values[-1] < 0.5 * max(pairs[0].values)  # they part, and are drawn together again


def test_a_second_pass_can_hold_parts_fixed(scene: Scene) -> None:
    """DNGaussian's: the depth of detached shapes moves positions alone."""
    trainer = Trainer(scene, short(1, strategy=None))
    splats = trainer.model.splats()
    hard = Splats(splats.means, *(x.detach() for x in splats[1:]))._replace(
        opacities=torch.full_like(splats.opacities, 0.95).detach()
    )
    depth = render(hard, scene.train[0].camera, mode="ED").depth
    assert depth is not None
    depth.mean().backward()
    assert trainer.model.means.grad is not None and bool((trainer.model.means.grad != 0).any())
    assert trainer.model.opacity_logits.grad is None and trainer.model.log_scales.grad is None


def test_depth_that_was_not_drawn_says_so(scene: Scene) -> None:
    with pytest.raises(ValueError, match=r"TrainSettings\(mode='RGB\+ED'\)"):
        run(scene, short(2), extensions=[Noisy()])


def test_exposure_is_taken_out(scene: Scene) -> None:
    """Photographs of other brightness: with a colour map per view the model keeps the scene's own colours better."""
    gains = [1.0, 0.6, 0.8]
    views = tuple(replace(view, image=view.image * gain) for view, gain in zip(scene.train, gains, strict=True))
    darker = replace(scene, train=views)
    settings = TrainSettings(iterations=150, strategy=None, sh_every=1000)
    colours = PerViewColour()
    with_maps, without = run(darker, settings, extensions=[colours]), run(darker, settings)
    assert sum(with_maps.losses[-30:]) < 0.9 * sum(without.losses[-30:])
    brightness = colours.maps.detach()[:, :, :3].diagonal(dim1=1, dim2=2).mean(dim=1)
    assert float(brightness[1]) < float(brightness[2]) < float(brightness[0])


def weighted(scene: Scene, weights: dict[str, Tensor]) -> FitResult:
    return run(scene, short(40, strategy=None), weights=weights)


def test_pixels_of_weight_zero_teach_nothing(scene: Scene) -> None:
    spot = (slice(10, 20), slice(20, 35))
    weight = torch.ones(36, 48)
    weight[spot] = 0
    weights = {view.name: weight for view in scene.train}

    def painted(color: float) -> Scene:
        views = []
        for view in scene.train:
            image = view.image.clone()
            image[spot] = color
            views.append(replace(view, image=image))
        return replace(scene, train=tuple(views))

    camera = scene.train[0].camera
    black, white = (weighted(painted(color), weights).model.render(camera).image.detach() for color in (0.0, 1.0))
    assert torch.equal(black, white)
    unweighted = weighted(painted(1.0), {}).model.render(camera).image.detach()
    assert float((unweighted - white).abs().mean()) > 0
    with pytest.raises(ValueError, match="weights are given for 'nobody'"):
        weighted(scene, {"nobody": weight})


def test_alpha_masks_put_the_drawn_background_behind_the_photographs() -> None:
    g = torch.Generator().manual_seed(0)
    base = object_scene(0, views=2, tests=1, size=(20, 16), points=50)
    alpha = (torch.rand(16, 20, generator=g) > 0.5).float()
    views = tuple(replace(view, mask=alpha, image=view.image * alpha[..., None]) for view in base.train)
    scene = replace(base, train=views, background=torch.zeros(3))
    shots: list[Shot] = []

    class Keep(Extension):
        def loss(self, trainer: Trainer, shot: Shot) -> None:
            shots.append(shot)

    settings = short(3, background="random", alpha_masks=True, strategy=None)
    trainer = Trainer(scene, settings, extensions=[Keep()])
    trainer.train_step()
    target = trainer._target(shots[0]).image
    assert torch.allclose(target[alpha == 0], shots[0].background.expand(int((alpha == 0).sum()), 3))
    assert torch.equal(target[alpha == 1], shots[0].view.image[alpha == 1])
    assert torch.equal(trainer.background, torch.zeros(3))  # the photographs', for evaluation
    with pytest.raises(ValueError, match="alpha_masks needs"):
        Trainer(replace(scene, background=None), settings)


def test_what_cannot_be_trained_says_why(scene: Scene) -> None:
    with pytest.raises(ValueError, match=r"Gaussians\.random"):
        run(replace(scene, points=None), short(1))
    with pytest.raises(ValueError, match="iterations is 0"):
        run(scene, short(0))
    single = replace(scene, train=scene.train[:1], allow_single=True)
    with pytest.raises(ValueError, match=r"TrainSettings\.extent"):
        run(single, short(1))
    assert len(run(single, short(1, extent=2.0)).losses) == 1

    class Erase(Extension):
        def after_step(self, trainer: Trainer) -> None:
            trainer.population.change(torch.zeros(len(trainer.population), dtype=torch.bool))

    with pytest.raises(ValueError, match="no Gaussians, expected at least one"):
        run(scene, short(2, strategy=None), extensions=[Erase()])


def test_evaluations_are_of_settled_models(scene: Scene) -> None:
    """Before the strategy's changes of a step; at the last step it makes none."""

    class Counts(Extension):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def before_step(self, trainer: Trainer) -> None:
            self.seen.append(float(len(trainer.model)))

    strategy = DefaultStrategy(first=5, every=10, prune_opacity=0.1)
    counts = Counts()
    result = run(scene, short(40, eval_every=15, strategy=strategy), extensions=[counts])
    assert [entry["step"] for entry in result.evaluations] == [15, 30, 40]
    assert set(result.evaluations[0]) == {"step", "psnr", "ssim", "psnr_masked", "ssim_masked"}
    last = evaluate(result.model, scene.test, background=result.background, sh_degree=1)
    assert result.evaluations[-1]["psnr"] == pytest.approx(last.mean("psnr"))
    assert counts.seen[30] != counts.seen[29] and len(result.model) == counts.seen[-1]
    stopped = run(scene, short(30, eval_every=30, strategy=strategy))
    assert stopped.evaluations[0]["psnr"] == result.evaluations[1]["psnr"]
    assert len(stopped.model) == counts.seen[29]


def test_the_bar_shows_loss_psnr_and_number(scene: Scene, capsys: Callable[..., Any]) -> None:
    fit(scene, short(20, strategy=None), progress=True)
    shown = capsys.readouterr().out  # type: ignore[attr-defined]
    assert "loss=" in shown and "PSNR=" in shown and "Gaussians=300" in shown and "20/20" in shown
