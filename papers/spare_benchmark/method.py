"""The SpaRe protocol: sparse neural rendering as a benchmark (AIM 2024 challenge; arXiv 2409.15041 and 2409.15045).

Scenes are seen by few cameras: three in Track 1, nine in Track 2, in one light. A split file says which views are the
input and which ten are compared. Six numbers are taken of each compared view: PSNR, SSIM and LPIPS of the whole image
and, because an object in a black box makes most of the image easy, of the object alone: PSNR-M over its pixels, SSIM-M
and LPIPS-M over the tight box around it. The challenge ranks by PSNR.

The benchmark hides its test photographs and asks for one submission. Here the same protocol runs on scenes whose test
views are known, and every entrant is trained with several seeds.

Sources: [site] read on the benchmark's pages; [code] read in released code; [guess] ours.

name        meaning
arm         an entrant or a variant of one: 3dgs, fsgs, dngaussian, corgs, dropgaussian, lm_gaussian, ...
set         where the views come from: generated, fern, chair, brighton, llff, dtu, spare
views       how many cameras train
run         one training: (arm, set, views, seed)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common.splatting import Camera, View, interpolate
from common.splatting.evaluation import score, tight_box
from common.splatting.splits import DTU_SCANS, dtu
from common.splatting.strategies import DefaultStrategy
from common.splatting.training import TrainSettings

TRACKS = {1: 3, 2: 9}  # input views [site]
TEST_VIEWS = 10  # [site]

# The generated rig has 7 x 7 cameras. Track 1 looks from three neighbours left of the middle, as DTU's first three lie
# close together; Track 2 adds six spread over the rig. Test views: ten of the others, the rim included.
RIG_INPUTS = (22, 23, 15, 10, 12, 26, 36, 38, 40)
RIG_TESTS = (0, 3, 6, 13, 19, 29, 32, 34, 44, 48)

# View counts that the papers report [code]. Brighton is ours: an aerial survey whose 15 views just cover the ground
VIEW_COUNTS = {
    "generated": (3, 9),
    "fern": (3, 6, 9),
    "fern_coarse": (3,),  # at half the resolution, for plain 3DGS
    "chair": (8,),
    "brighton": (15,),
    "llff": (3, 6, 9),
    "dtu": (3, 6, 9),
    "spare": (3, 9),
}
LLFF_SCENES = ("fern", "flower", "fortress", "horns", "leaves", "orchids", "room", "trex")

AUTHORS_ITERATIONS = 10_000  # FSGS, CoR-GS and DropGaussian on LLFF [code]; every step count below is of so many


# ----------------------------------------------------------------------------------------------------------- protocol


def split_file(views: int, scenes: Sequence[str]) -> dict[str, dict]:
    """A split file in the published schema: views by scene, 0-based; index i is camera i + 1 in file names.

    `views` train, at most nine. `scenes` are generated ones, apart from DTU's, which are called scan and a number.
    DTU's test views are those of the papers on splatting (25); SpaRe's own choice of ten lies in its published files.
    """
    split = {}
    for scene in scenes:
        if scene.startswith("scan"):
            found = dtu(views)
            split[scene] = {"input_views": list(found.train), "test_views": list(found.test), "dataset": "DTU"}
        else:
            inputs = list(RIG_INPUTS[:views])
            split[scene] = {"input_views": inputs, "test_views": list(RIG_TESTS), "dataset": "SpaRe"}
    return split


def dtu_scenes() -> list[str]:
    """The fifteen scans of DTU that everybody compares on, by the names of the layout."""
    return [f"scan{number}" for number in DTU_SCANS]


def six_metrics(
    view: View, image: Tensor, perceptual: Callable[[Tensor, Tensor], Tensor], name: str
) -> dict[str, float]:
    """The six numbers of one view; those of the object are left out where the view has no mask.

    image       [H, W, 3] render; limited to 0..1 first, as a file would
    perceptual  (image, reference) [3, H, W] -> scalar: LPIPS, or what stands in for it, called `name`

    PSNR and SSIM are `common.splatting.evaluation.score`'s.
    """
    plain = score(view, image)
    ours, photo = image.clamp(0, 1).movedim(-1, 0), view.image.movedim(-1, 0)  # [3, H, W]
    found = {"psnr": plain.psnr, "ssim": plain.ssim, name: float(perceptual(ours, photo))}
    box = None if view.mask is None else tight_box(view.mask)
    if box is None or plain.psnr_masked is None or plain.ssim_masked is None:
        return found
    distance = float(perceptual(ours[:, *box], photo[:, *box]))
    return found | {"psnr_m": plain.psnr_masked, "ssim_m": plain.ssim_masked, f"{name}_m": distance}


# ------------------------------------------------------------------------------------- what all entrants have in common


def scaled(step: int, iterations: int, authors: int = AUTHORS_ITERATIONS) -> int:
    """A step of the authors' schedule in a training of `iterations` steps, at least 1."""
    return max(1, round(step * iterations / authors))


def settings(
    iterations: int,
    seed: int,
    *,
    most: int,
    reset: bool,
    grow_grad2d: float = 5e-4,
    sh_degree: int = 3,
    depth: bool = False,
    random_background: bool = False,
    alpha_masks: bool = False,
) -> TrainSettings:
    """3DGS as FSGS, CoR-GS and DropGaussian run it on few views [code]: densify from 500 to the end at 5e-4.

    None is removed for its size, as in their code: cameras that face forward are close to each other, and most of what
    they see is larger than a tenth of their extent, 3DGS's limit once opacities have been reset.

    most    the largest number of Gaussians; the authors have no limit
    reset   whether opacities are reset every 3,000 steps. A short schedule leaves Adam no time to bring them back
    """
    strategy = DefaultStrategy(
        grow_grad2d=grow_grad2d,
        first=scaled(500, iterations),
        until=iterations,
        every=scaled(100, iterations),
        reset_every=scaled(3_000, iterations) if reset else iterations,
        prune_scale3d=math.inf,
        most=most,
    )
    return TrainSettings(
        iterations=iterations,
        seed=seed,
        sh_degree=sh_degree,
        sh_every=scaled(500, iterations),
        background="random" if random_background else "scene",
        alpha_masks=alpha_masks,
        mode="RGB+D" if depth else "RGB",
        strategy=strategy,
    )


def pseudo_camera(cameras: Sequence[Camera], generator: torch.Generator) -> Camera:
    """A camera that nobody stood at: on the way from a training camera to its nearest neighbour, moved a little.

    FSGS and CoR-GS take t + e for its place, t that of a training camera and e normal noise, and the mean of the two
    cameras' rotations. Cameras that stand around an object would then look past it, so here place and rotation are
    both a random share of the way [guess], and e has a tenth of the way's length as deviation [guess].
    """
    device = generator.device
    first = cameras[int(torch.randint(len(cameras), (), generator=generator, device=device))]
    others = [camera for camera in cameras if camera is not first]
    second = min(others, key=lambda camera: float((camera.center - first.center).norm()))
    way = float((second.center - first.center).norm())
    between = interpolate(first, second, float(torch.rand((), generator=generator, device=device)))
    noise = 0.1 * way * torch.randn(3, generator=generator, device=device)
    viewmat = between.viewmat.clone()
    viewmat[:3, 3] -= viewmat[:3, :3] @ noise.to(viewmat)  # the centre moves by `noise`
    return Camera(viewmat, between.K, between.width, between.height)
