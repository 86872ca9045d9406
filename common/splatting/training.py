"""Fitting Gaussians to photographs: the loop of 3DGS, open to what papers add.

    result = fit(scene, TrainSettings(iterations=3_000))
    scores = evaluate(result.model, scene.test, background=result.background)

One step (`Trainer.train_step`): draw a training view, compare with the photograph, add the extensions' losses, go
backward, update with Adam, let the strategy add and remove Gaussians. Everything that a step depends on is in a
checkpoint, so a resumed training gives the same bits as one that was never stopped (same machine and threads).
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import seeds
from common.splatting import checkpoints
from common.splatting.evaluation import evaluate
from common.splatting.extensions import Extension, Shot
from common.splatting.losses import Target, photometric
from common.splatting.model import Gaussians, render
from common.splatting.population import Population
from common.splatting.scene import Scene, View
from common.splatting.settings import TrainSettings

__all__ = ["FitResult", "Trainer", "fit"]

BAR_EVERY = 10  # steps; the PSNR beside the bar costs a little


@dataclass(frozen=True, eq=False)
class FitResult:
    """A finished training.

    model        the Gaussians
    background   [3] the colour to evaluate on, see `Trainer.background`
    losses       one a step
    counts       the number of Gaussians after each step
    evaluations  {"step", "psnr", "ssim"} of the test views at each evaluation
    seconds      of training, over all sittings
    """

    model: Gaussians
    background: Tensor
    losses: list[float]
    counts: list[int]
    evaluations: list[dict[str, float]]
    seconds: float


def fit(
    scene: Scene,
    settings: TrainSettings,
    *,
    model: Gaussians | None = None,
    extensions: Sequence[Extension] = (),
    weights: Mapping[str, Tensor] | None = None,
    on_step: Callable[[Trainer], None] | None = None,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> FitResult:
    """Train on a scene, on the device of its tensors.

    model       where to start, trained in place; None: Gaussians.from_points(scene.points)
    extensions  what a paper adds
    weights     [H, W] pixel weights 0..1 by view name, see `losses.Target`; views that are not named count fully
    on_step     called after each step, for instance to record something
    checkpoint  a file to save to and, if it is there already, to go on from
    progress    show a bar with loss, PSNR of the last view and number of Gaussians

    Interrupting it (Ctrl-C, the stop button) finishes the step, saves the checkpoint and raises KeyboardInterrupt.
    Raises FloatingPointError with step and view where the loss is not finite (the last checkpoint stays), ValueError
    for a scene, settings or checkpoint that do not fit, and what the rasterizer raises.
    """
    from tqdm import tqdm

    trainer = Trainer(scene, settings, model=model, extensions=extensions, weights=weights)
    if checkpoint is not None and checkpoint.exists():
        trainer.restore(checkpoints.read(checkpoint))
    # on standard output, as a notebook keeps it; ascii, as a log does
    shape = {"total": settings.iterations, "initial": trainer.step, "desc": scene.name}
    bar = tqdm(**shape, file=sys.stdout, ascii=True, disable=not progress)

    def save() -> None:
        if checkpoint is not None:
            checkpoints.write(checkpoint, trainer.state())

    with bar:
        try:
            while trainer.step < settings.iterations:
                with checkpoints.uninterrupted():
                    trainer.train_step()
                bar.update()
                if progress and trainer.step % BAR_EVERY == 0:
                    bar.set_postfix(trainer.progress(), refresh=False)
                if on_step is not None:
                    on_step(trainer)
                if settings.checkpoint_every and trainer.step % settings.checkpoint_every == 0:
                    save()
        except KeyboardInterrupt:
            save()
            raise
    save()
    return trainer.result()


class Trainer:
    """A training that goes step by step; `fit` drives one, a method with two fields drives two.

    scene, settings, extensions   as given to `fit`
    population    the model, its optimizer and running statistics
    step          how many steps are done; inside a step, its number
    losses, counts, evaluations   as in FitResult
    """

    def __init__(
        self,
        scene: Scene,
        settings: TrainSettings,
        *,
        model: Gaussians | None = None,
        extensions: Sequence[Extension] = (),
        weights: Mapping[str, Tensor] | None = None,
    ):
        _check(scene, settings, model, weights or {})
        if model is None:
            assert scene.points is not None
            model = Gaussians.from_points(
                scene.points, sh_degree=settings.sh_degree, initial_opacity=settings.initial_opacity
            )
        self.scene, self.settings, self.extensions = scene, settings, tuple(extensions)
        self.device = scene.train[0].image.device
        extent = scene.extent if settings.extent is None else settings.extent
        self.population = Population(model.to(self.device), extent)
        self.step, self.seconds = 0, 0.0
        self.losses: list[float] = []
        self.counts: list[int] = []
        self.evaluations: list[dict[str, float]] = []
        self._weights = dict(weights or {})
        self._targets: dict[str, Target] = {}
        self._waiting: list[int] = []  # training views that are still to come in this round
        self._generators: dict[str, torch.Generator] = {}
        self._last: tuple[Tensor, Tensor] | None = None  # render and photograph
        for extension in self.extensions:
            extension.start(self)

    @property
    def model(self) -> Gaussians:
        """The Gaussians as they are now."""
        return self.population.model

    @property
    def sh_degree(self) -> int:
        """The SH degree in use at this step."""
        every, highest = self.settings.sh_every, self.model.sh_degree
        return min(highest, self.step // every) if every else highest

    @property
    def background(self) -> Tensor:
        """[3] the colour to evaluate on: that of the photographs where it is known, else the trained one or black."""
        choice, of_scene = self.settings.background, self.scene.background
        if of_scene is not None and (choice == "scene" or self.settings.alpha_masks):
            return of_scene
        return torch.full((3,), float(choice == "white"), device=self.device)

    def generator(self, name: str) -> torch.Generator:
        """The random stream of that name, on the scene's device; the same object each time."""
        if name not in self._generators:
            self._generators[name] = seeds.generator(self.settings.seed, "splatting", name, device=self.device)
        return self._generators[name]

    def train_step(self) -> float:
        """One step of the training; returns its loss."""
        started = time.perf_counter()
        self.step += 1
        self.set_learning_rates(self.step)
        for extension in self.extensions:
            extension.before_step(self)

        shot = self._draw(self._next_view())
        loss = self._loss(shot)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(
                f"step {self.step}, view {shot.view.name}: the loss is {value}, so this step cannot be made. Look at "
                "the photograph and the extensions' losses, lower the learning rates, or resume from a checkpoint."
            )
        loss.backward()

        strategy, population = self.settings.strategy, self.population
        if strategy is not None:
            strategy.after_backward(self.step, population, shot.rendering.meta)
        population.optimizer.step()
        population.optimizer.zero_grad()
        self.seconds += time.perf_counter() - started
        self._evaluate_if_due()  # before the strategy's changes, which need some steps to settle
        started = time.perf_counter()
        if strategy is not None and self.step < self.settings.iterations:
            strategy.after_update(self.step, population, self.generator("strategy"))
        for extension in self.extensions:
            extension.after_step(self)

        self._last = shot.image.detach(), shot.view.image
        self.losses.append(value)
        self.counts.append(len(population))
        self.seconds += time.perf_counter() - started
        return value

    def set_learning_rates(self, step: int) -> None:
        """The learning rates of that step of the schedule."""
        settings, group = self.settings, self.population.group
        done = min(1.0, step / (settings.lr_means_until or settings.iterations))
        group("means")["lr"] = self.population.extent * settings.lr_means ** (1 - done) * settings.lr_means_final**done
        group("log_scales")["lr"] = settings.lr_scales
        group("quats")["lr"] = settings.lr_quats
        group("opacity_logits")["lr"] = settings.lr_opacities
        group("sh0")["lr"] = settings.lr_sh0
        group("shN")["lr"] = settings.lr_shN

    def progress(self) -> dict[str, str]:
        """What stands beside the bar."""
        if self._last is None:
            return {}
        error = float((self._last[0] - self._last[1]).square().mean())
        psnr = f"{-10 * math.log10(error):.1f}" if error > 0 else "inf"
        return {"loss": f"{self.losses[-1]:.3g}", "PSNR": psnr, "Gaussians": str(self.counts[-1])}

    def result(self) -> FitResult:
        """The model as it is now, with the curves up to here."""
        return FitResult(self.model, self.background, self.losses, self.counts, self.evaluations, self.seconds)

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, for `checkpoints.write`; the tensors are not copies."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {
            "settings": self.settings.plain(),
            "scene": _fingerprint(self.scene),
            "extensions": [[type(extension).__name__, extension.state()] for extension in self.extensions],
            "population": self.population.state(),
            "generators": {name: generator.get_state() for name, generator in self._generators.items()},
            "torch": [torch.get_rng_state(), cuda],  # for extensions that draw from the global generators
            "waiting": list(self._waiting),
            "history": [self.step, self.seconds, self.losses, self.counts, self.evaluations],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises CheckpointError for the state of another training, naming what differs.
        """
        ours = {"settings": self.settings.plain(), "scene": _fingerprint(self.scene)}
        for part, values in ours.items():
            for name, value in values.items():
                if state[part].get(name) != value:
                    raise checkpoints.CheckpointError(
                        f"the checkpoint is of another training: {part}.{name} is {value} here and "
                        f"{state[part].get(name)} there; use another checkpoint file, or delete it to start anew."
                    )
        names = [type(extension).__name__ for extension in self.extensions]
        if names != [name for name, _ in state["extensions"]]:
            raise checkpoints.CheckpointError(
                f"the checkpoint has the extensions {[name for name, _ in state['extensions']]}, this training {names}."
            )
        self.population.restore(state["population"])
        for name, value in state["generators"].items():
            self.generator(name).set_state(value)
        cpu, cuda = state["torch"]
        torch.set_rng_state(cpu)
        if cuda is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(cuda, self.device)
        self._waiting = list(state["waiting"])
        self.step, self.seconds, self.losses, self.counts, self.evaluations = state["history"]
        for extension, (_, remembered) in zip(self.extensions, state["extensions"], strict=True):
            extension.restore(remembered)

    def _next_view(self) -> View:
        """A training view at random, but every one once before any comes again."""
        if not self._waiting:
            generator = self.generator("views")
            count = len(self.scene.train)
            self._waiting = torch.randperm(count, generator=generator, device=self.device).tolist()
        return self.scene.train[self._waiting.pop()]

    def _draw(self, view: View) -> Shot:
        settings, strategy = self.settings, self.settings.strategy
        background = self._drawn_background()
        splats = self.model.splats(self.sh_degree)
        for extension in self.extensions:
            splats = extension.splats(self, splats)
        rendering = render(
            splats,
            view.camera,
            mode=settings.mode,
            background=background,
            antialiased=settings.antialiased,
            absgrad=strategy is not None and strategy.absgrad,
        )
        if strategy is not None:
            rendering.meta["means2d"].retain_grad()
        image = rendering.image
        for extension in self.extensions:
            image = extension.image(self, view, image)
        return Shot(view, splats, rendering, image, background)

    def _loss(self, shot: Shot) -> Tensor:
        settings = self.settings
        loss = photometric(shot.image, self._target(shot), dssim=settings.dssim)
        if settings.opacity_penalty:
            loss = loss + settings.opacity_penalty * shot.splats.opacities.mean()
        if settings.scale_penalty:
            loss = loss + settings.scale_penalty * shot.splats.scales.mean()
        for extension in self.extensions:
            extra = extension.loss(self, shot)
            if extra is not None:
                loss = loss + extra
        return loss

    def _drawn_background(self) -> Tensor:
        choice = self.settings.background
        if choice == "random":
            return torch.rand(3, generator=self.generator("background"), device=self.device)
        if choice == "scene":
            return self.background
        return torch.full((3,), float(choice == "white"), device=self.device)

    def _target(self, shot: Shot) -> Target:
        """The photograph; where its mask is its alpha, on the background that the Gaussians were drawn on."""
        view, weight = shot.view, self._weights.get(shot.view.name)
        of_scene = self.scene.background
        if self.settings.alpha_masks and view.mask is not None and of_scene is not None:
            return Target(view.image + (1 - view.mask)[..., None] * (shot.background - of_scene), weight)
        if view.name not in self._targets:
            self._targets[view.name] = Target(view.image, weight)
        return self._targets[view.name]

    def _evaluate_if_due(self) -> None:
        every, last = self.settings.eval_every, self.step == self.settings.iterations
        if not every or not self.scene.test or not (last or self.step % every == 0):
            return
        scores = evaluate(
            self.model,
            self.scene.test,
            background=self.background,
            sh_degree=self.sh_degree,
            antialiased=self.settings.antialiased,
        )
        means = {name: scores.mean(name) for name in ("psnr", "ssim", "psnr_masked", "ssim_masked")}
        known = {name: value for name, value in means.items() if value is not None}
        self.evaluations.append({"step": self.step, **known})


def _check(scene: Scene, settings: TrainSettings, model: Gaussians | None, weights: Mapping[str, Tensor]) -> None:
    if model is None and scene.points is None:
        raise ValueError(
            f"fit: scene {scene.name} has no points to start from; give it some, or pass model=Gaussians.random(...)."
        )
    names = {view.name for view in scene.train}
    unknown = sorted(set(weights) - names)
    if unknown:
        raise ValueError(f"fit: weights are given for {unknown[0]!r}, but the training views are {sorted(names)}.")
    if settings.iterations < 1:
        raise ValueError(f"fit: iterations is {settings.iterations}, expected 1 or more.")
    if settings.alpha_masks and (scene.background is None or any(view.mask is None for view in scene.train)):
        raise ValueError(
            f"fit: alpha_masks needs a scene with a background colour and a mask in every training view; {scene.name} "
            "lacks some. Set alpha_masks=False."
        )


def _fingerprint(scene: Scene) -> dict[str, str]:
    views = [[view.name, view.camera.width, view.camera.height, *view.camera.center.tolist()] for view in scene.train]
    return {"name": scene.name, "train": repr(views)}
