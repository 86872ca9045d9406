"""What LM-Gaussian (Yu et al., arXiv 2409.03456) adds to 3DGS with the inputs that every entrant has here.

Its first stage holds the Gaussians by more than the photographs: a monocular depth, by correlation; and the points that
they started from, drawn from virtual cameras between the photographs. Normals need a network that no other entrant
asks, and the repair of renders by a diffusion model is the second stage; both are left out. The whole method is
`papers/lm_gaussian`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from common.splatting import PointCloud, View
from common.splatting.extensions import Extension, Shot
from common.splatting.losses import pearson, pearson_patches
from common.splatting.priors import DepthPrior
from common.splatting.training import Trainer, TrainSettings
from common.splatting.virtual import point_image, point_image_loss, virtual_cameras
from papers.spare_benchmark.method import scaled


class LMGaussian(Extension):
    """loss + 0.1 (P_g + P_l) + 0.6 |R_v - P_v|_1, the last 0.3 where all cameras look the same way [code].

    P_g is 1 - corr(D, -d) over the image, d a disparity of the prior; P_l its mean over boxes of 128 pixels at random
    places, half as many as fit beside each other. R_v is the render of a virtual camera v, another one each step, and
    P_v the points `cloud` from there, both in front of white. Ten virtual cameras stand between neighbours.
    """

    DEPTH, VIRTUAL, VIRTUAL_FORWARD = 0.1, 0.6, 0.3
    BETWEEN = 10
    BOX, WIDTH = 128, 504  # pixels; the authors' resolution is not known, DUSt3R's is 512 [guess]

    def __init__(
        self, prior: DepthPrior, cloud: PointCloud, *, forward: bool = True, depth: bool = True, virtual: bool = True
    ):
        self.prior, self.cloud, self.depth, self.virtual = prior, cloud, depth, virtual
        self.virtual_weight = self.VIRTUAL_FORWARD if forward else self.VIRTUAL

    def start(self, trainer: Trainer) -> None:
        cloud = PointCloud(self.cloud.positions.to(trainer.device), self.cloud.colors.to(trainer.device))
        cameras = virtual_cameras(path(trainer.scene.train), self.BETWEEN, closed=False) if self.virtual else []
        self.points = [point_image(cloud, camera) for camera in cameras]

    def loss(self, trainer: Trainer, shot: Shot) -> Tensor:
        total = shot.image.new_zeros(())
        if self.depth:
            total = total + self.DEPTH * self._depth_loss(trainer, shot)
        if self.virtual:
            generator = trainer.generator("virtual views")
            number = int(torch.randint(len(self.points), (), generator=generator, device=generator.device))
            total = total + self.virtual_weight * point_image_loss(shot.splats, self.points[number])
        return total

    def _depth_loss(self, trainer: Trainer, shot: Shot) -> Tensor:
        disparity, weight = self.prior.view(shot.view.name)
        height, width = shot.depth.shape
        box = min(height, width, max(2, round(self.BOX * width / self.WIDTH)))
        maps = shot.depth, -disparity, weight
        return pearson(*maps) + pearson_patches(*maps, size=box, generator=trainer.generator("boxes"))


def released(settings: TrainSettings, forward: bool) -> TrainSettings:
    """The benchmark's settings as the released code has its own [code].

    No Gaussian is added or removed and no opacity reset: growth begins and ends at the same step. Opacities learn at
    0.05, or 0.065 where all cameras look the same way. One SH degree more every 1,000 steps, and expected depth.
    """
    return replace(
        settings,
        strategy=None,
        lr_opacities=0.065 if forward else 0.05,
        sh_every=scaled(1_000, settings.iterations),
        mode="RGB+ED",
    )


def path(views: Sequence[View]) -> list[View]:
    """The views in an order in which neighbours follow each other: from the first on, always to the closest one left.

    The authors take the photographs' order, that of a walk; those of a split come in any order [guess].
    """
    left, ordered = list(views[1:]), [views[0]]
    while left:
        here = ordered[-1].camera.center
        closest = min(range(len(left)), key=lambda number: float((left[number].camera.center - here).norm()))
        ordered.append(left.pop(closest))
    return ordered
