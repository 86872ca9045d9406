"""CoR-GS (Zhang et al., ECCV 2024): two fields of the same views, and what they disagree on is wrong.

Two fields start from the same points and see the same photographs; they part by the random splits of densification.
Where their Gaussians lie far apart, or their renders differ, no photograph held them together. So (1) co-pruning
removes Gaussians that have no partner in the other field, and (2) pseudo-view co-regularisation pulls the renders of
both together at cameras between the training views. In tests the first field is drawn.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from common import seeds
from common.splatting.extensions import Extension, Shot
from common.splatting.losses import photometric
from common.splatting.model import Gaussians, render
from common.splatting.training import Trainer
from papers.spare_benchmark.entrants import PSEUDO_CAMERAS, typical_depth
from papers.spare_benchmark.method import pseudo_camera, scaled


class CoRGS(Extension):
    """The first field's side; it trains the second one along with it.

    prune   co-prune every 500 steps: Gaussians whose nearest neighbour in the other field is farther than `distance`
    agree   from step 500 on, add 0.8 L1 + 0.2 D-SSIM between the two renders of a pseudo view, weight 1
    """

    PRUNE_EVERY, AGREE_FROM, WEIGHT = 500, 500, 1.0
    DISTANCE = 0.17  # of the median depth of the points: 5 units in fern, whose points are 29 away

    def __init__(self, *, prune: bool = True, agree: bool = True):
        self.prune, self.agree = prune, agree

    def start(self, trainer: Trainer) -> None:
        cameras = [view.camera for view in trainer.scene.train]
        generator = trainer.generator("pseudo cameras")
        self.cameras = [pseudo_camera(cameras, generator) for _ in range(PSEUDO_CAMERAS)]
        self.distance = self.DISTANCE * typical_depth(trainer)
        self._images: tuple[Tensor, Tensor] | None = None
        other = Gaussians(**trainer.model.values())
        self.partner = Trainer(
            trainer.scene,
            replace(trainer.settings, eval_every=0),
            model=other,
            extensions=[_Second(self)] if self.agree else (),
        )
        # the same seed gives the same views and backgrounds; only the splits may differ
        self.partner.generator("strategy").manual_seed(seeds.derived(trainer.settings.seed, "second field"))

    def before_step(self, trainer: Trainer) -> None:
        self._images = None
        if self.agree and trainer.step >= scaled(self.AGREE_FROM, trainer.settings.iterations):
            generator = trainer.generator("pseudo views")
            number = int(torch.randint(len(self.cameras), (), generator=generator, device=generator.device))
            first, second = (
                render(field.model.splats(trainer.sh_degree), self.cameras[number], background=trainer.background).image
                for field in (trainer, self.partner)
            )
            self._images = first, second

    def loss(self, trainer: Trainer, shot: Shot) -> Tensor | None:
        return None if self._images is None else self.WEIGHT * disagreement(*self._images)

    def second_loss(self) -> Tensor | None:
        """The same for the second field; both renders were made before either field moved."""
        return None if self._images is None else self.WEIGHT * disagreement(*reversed(self._images))

    def after_step(self, trainer: Trainer) -> None:
        self.partner.train_step()
        if self.prune and trainer.step % scaled(self.PRUNE_EVERY, trainer.settings.iterations) == 0:
            co_prune(trainer, self.partner, self.distance)

    def state(self) -> dict[str, Any]:
        return self.partner.state()

    def restore(self, state: dict[str, Any]) -> None:
        self.partner.restore(state)


class _Second(Extension):
    """The second field's side of the agreement."""

    def __init__(self, first: CoRGS):
        self._first = first

    def loss(self, trainer: Trainer, shot: Shot) -> Tensor | None:
        return self._first.second_loss()


def disagreement(ours: Tensor, theirs: Tensor) -> Tensor:
    """0.8 L1 + 0.2 D-SSIM of two renders [H, W, 3]; only `ours` learns."""
    return photometric(ours, theirs.detach())


@torch.no_grad()
def co_prune(first: Trainer, second: Trainer, distance: float) -> tuple[int, int]:
    """Remove from each field the Gaussians with none of the other within `distance`; returns how many. Never all."""
    from scipy.spatial import KDTree

    fields = [trainer.model.means.detach().cpu().numpy() for trainer in (first, second)]
    removed = []
    for trainer, ours, theirs in ((first, *fields), (second, *reversed(fields))):
        nearest, _ = KDTree(theirs).query(ours)
        keep = torch.from_numpy(nearest <= distance).to(trainer.device)
        if bool(keep.any()) and not bool(keep.all()):
            trainer.population.change(keep)
        removed.append(int((~keep).sum()))
    return removed[0], removed[1]
