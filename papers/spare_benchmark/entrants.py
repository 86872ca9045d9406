"""The entrants, each as what it adds to 3DGS. CoR-GS, which trains two fields, has a file of its own.

DropGaussian (Park, Ryu and Kim, CVPR 2025), FSGS (Zhu et al., ECCV 2024), DNGaussian (Li et al., CVPR 2024). Their
equations and constants; [code] read in the released code, [guess] ours. Depth maps are disparities of a
`common.splatting.priors.DepthPrior`: larger is nearer, factor and shift unknown.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from common.splatting.extensions import Extension, Shot
from common.splatting.losses import edge_aware_smoothness, pearson
from common.splatting.model import Splats, render
from common.splatting.priors import DepthPrior
from common.splatting.training import Trainer
from papers.spare_benchmark.method import pseudo_camera, scaled

PSEUDO_CAMERAS = 24  # drawn once, as the authors do [code]; their number is ours


class DropGaussian(Extension):
    """Each step, leave out a random share r of the Gaussians and let the others cover for them.

    A Gaussian that is behind others in a training view gets hardly any gradient from it. If those in front are missing
    now and then, it does. Opacities of the ones that stay are multiplied by 1 / (1 - r), as in dropout, and nothing is
    left out in tests. Progressive: r = 0.2 t / T at step t of T; otherwise r = 0.2 all the time.
    """

    def __init__(self, rate: float = 0.2, *, progressive: bool = True):
        self.rate, self.progressive = rate, progressive

    def rate_at(self, step: int, iterations: int) -> float:
        return self.rate * step / iterations if self.progressive else self.rate

    def splats(self, trainer: Trainer, splats: Splats) -> Splats:
        rate = self.rate_at(trainer.step, trainer.settings.iterations)
        drawn = torch.rand(len(splats.opacities), generator=trainer.generator("dropout"), device=trainer.device)
        return splats._replace(opacities=splats.opacities * (drawn >= rate) / (1 - rate))


class FSGS(Extension):
    """Depth that must correlate with a monocular one, in training and in pseudo views, and Gaussians grown into gaps.

    loss + w (1 - corr(D, D_mono)), D_mono the better of two readings of a disparity d: -d and 1 / (d + 200) [code].
    w is 0.05, and 0.001 in the last twentieth. In pseudo views it is 0.5 where all cameras look the same way and 0.03
    at every tenth step where they stand around the scene [code: LLFF and MipNeRF-360], from step 2,000 to 9,500 with a
    ramp of 500 steps.
    Unpooling: where a Gaussian is far from its three nearest neighbours, a new one is put half-way to each of them,
    with the neighbour's scale and opacity and no colour yet.
    """

    WEIGHT, LATE_WEIGHT = 0.05, 0.001
    PSEUDO_WEIGHT, PSEUDO_WEIGHT_AROUND, AROUND_EVERY = 0.5, 0.03, 10
    PSEUDO_FROM, PSEUDO_UNTIL, RAMP = 2_000, 9_500, 500
    UNPOOL_FROM, UNPOOL_UNTIL, UNPOOL_EVERY = 500, 2_000, 100
    NEIGHBOURS = 3
    FAR = 0.34  # of the median depth of the points: 10 units in fern, whose points are 29 away

    def __init__(self, prior: DepthPrior | None, *, forward: bool = True, unpool: bool = True, pseudo: bool = True):
        self.prior, self.unpool, self.pseudo = prior, unpool, pseudo and prior is not None
        self.pseudo_weight = self.PSEUDO_WEIGHT if forward else self.PSEUDO_WEIGHT_AROUND
        self.pseudo_every = 1 if forward else self.AROUND_EVERY

    def start(self, trainer: Trainer) -> None:
        cameras = [view.camera for view in trainer.scene.train]
        generator = trainer.generator("pseudo cameras")
        self.cameras = [pseudo_camera(cameras, generator) for _ in range(PSEUDO_CAMERAS)]
        self.far = self.FAR * typical_depth(trainer)

    def loss(self, trainer: Trainer, shot: Shot) -> Tensor | None:
        if self.prior is None:
            return None
        step, total = trainer.step, trainer.settings.iterations
        until = scaled(self.PSEUDO_UNTIL, total)
        weight = self.WEIGHT if step <= until else self.LATE_WEIGHT
        loss = weight * depth_loss(shot.depth, *self.prior.view(shot.view.name))
        begin = scaled(self.PSEUDO_FROM, total)
        if self.pseudo and begin < step < until and step % self.pseudo_every == 0:
            ramp = min(1.0, (step - begin) / scaled(self.RAMP, total))
            loss = loss + ramp * self.pseudo_weight * self._pseudo_loss(trainer, shot.background)
        return loss

    def after_step(self, trainer: Trainer) -> None:
        step, total = trainer.step, trainer.settings.iterations
        due = step % scaled(self.UNPOOL_EVERY, total) == 0
        if self.unpool and due and scaled(self.UNPOOL_FROM, total) < step < scaled(self.UNPOOL_UNTIL, total):
            unpool(trainer, self.far, self.NEIGHBOURS)

    def _pseudo_loss(self, trainer: Trainer, background: Tensor) -> Tensor:
        assert self.prior is not None
        generator = trainer.generator("pseudo views")
        number = int(torch.randint(len(self.cameras), (), generator=generator, device=generator.device))
        camera = self.cameras[number]
        splats = trainer.model.splats(trainer.sh_degree)
        rendering = render(splats, camera, mode="RGB+D", background=background)
        assert rendering.depth is not None
        return depth_loss(rendering.depth, *self.prior.at(camera, rendering.image))


def depth_loss(depth: Tensor, disparity: Tensor, weight: Tensor) -> Tensor:
    """FSGS's: the smaller Pearson loss of two readings of the disparity, where the weight [H, W] is positive."""
    return torch.minimum(pearson(depth, -disparity, weight), pearson(depth, 1 / (disparity + 200), weight))


@torch.no_grad()
def unpool(trainer: Trainer, far: float, neighbours: int = FSGS.NEIGHBOURS) -> int:
    """Put a Gaussian half-way between each one that is `far` from its neighbours (mean distance) and each of these.

    No more than the strategy's limit allows. Returns how many were added.
    """
    from scipy.spatial import KDTree

    model = trainer.model
    if len(model) <= neighbours:
        return 0
    points = model.means.detach().cpu().numpy()
    distance, index = KDTree(points).query(points, k=neighbours + 1)  # the first is the point itself
    apart, near = torch.from_numpy(distance)[:, 1:], torch.from_numpy(index)[:, 1:]
    lonely = apart.mean(dim=1) > far
    target = near[lonely].reshape(-1).to(model.means.device)  # [M * neighbours]
    origin = lonely.nonzero()[:, 0].repeat_interleave(neighbours).to(target.device)
    limit = getattr(trainer.settings.strategy, "most", None)
    room = len(target) if limit is None else max(0, limit - len(model))
    target, origin = target[:room], origin[:room]
    if not len(target):
        return 0
    old = torch.arange(len(model), device=target.device)
    fresh = torch.arange(len(model) + len(target), device=target.device) >= len(model)
    upright = model.quats.new_tensor([1.0, 0.0, 0.0, 0.0]).expand(len(target), 4)
    trainer.population.change(
        torch.cat([old, target]),  # scale and opacity of the neighbour
        fresh,
        means=(model.means[origin] + model.means[target]) / 2,
        quats=upright,
        sh0=torch.zeros_like(model.sh0[target]),
        shN=torch.zeros_like(model.shN[target]),
    )
    return len(target)


class DNGaussian(Extension):
    """Depth moves positions (hard) and opacities (soft), each alone, and counts after normalising small patches.

    Hard: every Gaussian is drawn with opacity 0.95, and only its position learns. Soft: drawn as it is, and only its
    opacity learns. Colour and shape never learn from depth, so that a wrong depth cannot bend them. The loss is the
    squared difference to the monocular depth after each patch of 5 to 17 pixels lost its mean and was divided by its
    deviation (local, 0.1) or by the whole image's (global, 1.0), plus 0.1 of edge-aware smoothness in the second half.
    Long Gaussians cost 2e-3, half-transparent ones 1e-3.
    """

    ITERATIONS = 6_000  # the authors' on LLFF
    GROW_GRAD2D = 1.3e-3
    LOCAL, GLOBAL, SMOOTH = 0.1, 1.0, 0.1
    SMOOTH_FROM = 3_000
    PATCH = (5, 17)  # pixels at 504 x 378
    WIDTH = 504
    HARD_OPACITY = 0.95  # [code]
    SHAPE, OPACITY = 2e-3, 1e-3

    def __init__(self, prior: DepthPrior):
        self.prior = prior

    def loss(self, trainer: Trainer, shot: Shot) -> Tensor:
        drawn = trainer.model.splats(trainer.sh_degree)
        still = Splats(*(value.detach() for value in drawn))
        hard = still._replace(means=drawn.means, opacities=torch.full_like(still.opacities, self.HARD_OPACITY))
        soft = still._replace(opacities=drawn.opacities)
        loss = self.SHAPE * (drawn.scales.amax(dim=1) / drawn.scales.amin(dim=1)).mean()
        visible = drawn.opacities > 0.2
        if bool(visible.any()):
            loss = loss + self.OPACITY * (1 - drawn.opacities[visible]).mean()  # form [guess]
        camera = shot.view.camera
        low, high = (max(3, round(size * camera.width / self.WIDTH)) for size in self.PATCH)
        generator = trainer.generator("patches")
        side = int(torch.randint(low, high + 1, (), generator=generator, device=generator.device))
        smooth = trainer.step > scaled(self.SMOOTH_FROM, trainer.settings.iterations, self.ITERATIONS)
        disparity, weight = self.prior.view(shot.view.name)
        for splats in (hard, soft):
            depth = render(splats, camera, mode="D").depth
            assert depth is not None
            loss = loss + self.LOCAL * patch_loss(depth, -disparity, weight, side, local=True)
            loss = loss + self.GLOBAL * patch_loss(depth, -disparity, weight, side, local=False)
            if smooth:
                loss = loss + self.SMOOTH * edge_aware_smoothness(_standard(depth, weight), shot.view.image)
        return loss


def patch_loss(depth: Tensor, reference: Tensor, weight: Tensor, side: int, *, local: bool) -> Tensor:
    """DNGaussian's normalised squared difference over patches of `side` x `side` pixels; the rim that fits none is cut.

    Each patch loses its mean and is divided by its deviation plus a hundredth of the image's [code] (local), or by the
    image's deviation, through which no gradient goes (global). Patches with a pixel of weight 0 do not count.
    """
    patches, wanted, known = (_patches(values, side) for values in (depth, reference, weight))
    whole = known.amin(dim=1) > 0
    if not bool(whole.any()):
        return depth.new_zeros(())

    def normal(patch: Tensor, values: Tensor) -> Tensor:
        centred = patch - patch.mean(dim=1, keepdim=True)
        spread = values[weight > 0].std().detach()
        if local:
            return centred / (_deviation(patch) + 0.01 * spread + 1e-8)
        return centred / (spread + 1e-8)

    return (normal(patches[whole], depth) - normal(wanted[whole], reference)).square().mean()


def typical_depth(trainer: Trainer) -> float:
    """The median depth of the initial Gaussians before the training cameras: the unit of the authors' distances."""
    depths = torch.cat([view.camera.project(trainer.model.means.detach())[1] for view in trainer.scene.train])
    return float(depths[depths > 0].median())


def _patches(values: Tensor, side: int) -> Tensor:
    """[P, side^2] patches beside each other of [H, W]."""
    return F.unfold(values[None, None], side, stride=side)[0].T


def _deviation(patch: Tensor) -> Tensor:
    """[P, 1] standard deviation; its gradient is finite where a patch is flat."""
    return (patch.var(dim=1, keepdim=True) + 1e-12).sqrt()


def _standard(depth: Tensor, weight: Tensor) -> Tensor:
    """A depth in units of its own deviation, so that smoothness does not depend on the scene's scale."""
    return depth / (depth.detach()[weight > 0].std() + 1e-8)
