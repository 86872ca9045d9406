"""How a paper changes the training: an object with a few methods, called at fixed places of every step.

class DropGaussian(Extension):
    def splats(self, trainer, splats):
        ...
        return splats._replace(opacities=kept)

fit(scene, settings, extensions=[DropGaussian()])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from common.splatting.model import Rendering, Splats
from common.splatting.scene import View

if TYPE_CHECKING:
    from common.splatting.training import Trainer

__all__ = ["Extension", "PerViewColour", "Shot"]


@dataclass(frozen=True, eq=False)
class Shot:
    """The training view of a step and its render.

    splats      what was drawn, after the extensions' changes
    rendering   as it came from the rasterizer
    image       [H, W, 3] what the photograph is compared with, after the extensions' changes
    background  [3] the colour that it was drawn on
    """

    view: View
    splats: Splats
    rendering: Rendering
    image: Tensor
    background: Tensor

    @property
    def depth(self) -> Tensor:
        """[H, W] rendered depth. Raises ValueError where the settings asked for none."""
        if self.rendering.depth is None:
            raise ValueError("Shot.depth: the views are drawn without depth; set TrainSettings(mode='RGB+ED').")
        return self.rendering.depth


class Extension:
    """Every method may be left as it is. They are called in this order, with `trainer.step` counting from 1.

    Random numbers come from `trainer.generator(name)`, whose state is kept in checkpoints. What else an extension
    remembers from step to step goes into `state` and comes back through `restore`. Own densification is a call of
    `trainer.population.change` in `after_step`; own per-Gaussian numbers live in `trainer.population.statistic`.
    """

    def start(self, trainer: Trainer) -> None:
        """Once, before the first step (and before `restore`, where a checkpoint is resumed)."""

    def before_step(self, trainer: Trainer) -> None:
        """After the learning rates of the step were set; `trainer.set_learning_rates(other_step)` overrides them."""

    def splats(self, trainer: Trainer, splats: Splats) -> Splats:
        """What is drawn for the training view: dropout of opacities, other colours."""
        return splats

    def image(self, trainer: Trainer, view: View, image: Tensor) -> Tensor:
        """What is compared with the photograph: exposure, appearance."""
        return image

    def loss(self, trainer: Trainer, shot: Shot) -> Tensor | None:
        """A scalar that is added to the loss: depths, pseudo views, ... None: nothing at this step."""
        return None

    def after_step(self, trainer: Trainer) -> None:
        """After the update of the parameters and the strategy's work."""

    def state(self) -> dict[str, Any]:
        """Tensors and plain values (numbers, strings, lists, dicts) for a checkpoint."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""


class PerViewColour(Extension):
    """An affine map of colours for each training view, learnt with the Gaussians: exposure and white balance (3DGS).

    Test views are drawn without it, so it pays where exposures differ and costs a little where they do not. It starts
    as the identity; its learning rate falls from `lr` to `lr_final` as the positions' does.
    """

    def __init__(self, lr: float = 0.01, lr_final: float = 0.001):
        self.lr, self.lr_final = lr, lr_final

    def start(self, trainer: Trainer) -> None:
        views = trainer.scene.train
        self._row = {view.name: row for row, view in enumerate(views)}
        identity = torch.eye(3, 4, device=views[0].image.device)
        self.maps = nn.Parameter(identity.repeat(len(views), 1, 1))  # [V, 3, 4]
        self._optimizer = torch.optim.Adam([self.maps], lr=self.lr)

    def image(self, trainer: Trainer, view: View, image: Tensor) -> Tensor:
        matrix = self.maps[self._row[view.name]]
        return image @ matrix[:, :3].T + matrix[:, 3]

    def after_step(self, trainer: Trainer) -> None:
        done = trainer.step / trainer.settings.iterations
        self._optimizer.param_groups[0]["lr"] = self.lr ** (1 - done) * self.lr_final**done
        self._optimizer.step()
        self._optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        return {"maps": self.maps.detach(), "optimizer": self._optimizer.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        self.maps.data.copy_(state["maps"])
        self._optimizer.load_state_dict(state["optimizer"])
