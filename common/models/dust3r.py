"""DUSt3R (Wang et al. 2024): depth and confidence of several photographs at once, at poses that are known.

The network and its global alignment come from the authors' package `dust3r` (CC BY-NC-SA 4.0, not on PyPI).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.models.stable_diffusion import MissingWeights
from common.splatting.scene import View

__all__ = ["dust3r"]

LONGER, MULTIPLE = 512, 16  # pixels: the longer side that it was trained on, and the size of its patches
STEPS, RATE = 500, 0.01  # of the global alignment, with a cosine schedule


def dust3r(views: Sequence[View], weights: str, *, device: str | torch.device = "cuda") -> list[tuple[Tensor, Tensor]]:
    """(depth, confidence) [H, W] of every view, in world units, confidence >= 1 before any logarithm.

    views    two or more, of one size; all pairs are looked at, both ways round
    weights  name or folder, such as naver/DUSt3R_ViTLarge_BaseDecoder_512_dpt

    Raises ModuleNotFoundError without the package, MissingWeights without the weights.
    """
    try:
        from dust3r.cloud_opt import GlobalAlignerMode, global_aligner  # pyright: ignore[reportMissingImports]
        from dust3r.image_pairs import make_pairs  # pyright: ignore[reportMissingImports]
        from dust3r.inference import inference  # pyright: ignore[reportMissingImports]
        from dust3r.model import AsymmetricCroCo3DStereo  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"DUSt3R needs its authors' package, which is not on PyPI ({error}): clone "
            "https://github.com/naver/dust3r with its submodules and put the folder on PYTHONPATH.",
            name="dust3r",
        ) from error
    try:
        network = AsymmetricCroCo3DStereo.from_pretrained(weights).to(device)
    except (OSError, ValueError) as error:
        raise MissingWeights(
            f"{weights} cannot be loaded ({str(error).splitlines()[0]}). Download it once on a machine with a "
            "connection, or name a folder that holds it."
        ) from error

    camera = views[0].camera
    shrink = LONGER / max(camera.width, camera.height)
    width, height = (max(MULTIPLE, MULTIPLE * round(s * shrink / MULTIPLE)) for s in (camera.width, camera.height))
    small = [view.camera.resized(width, height) for view in views]
    images = [_image(view, width, height, number) for number, view in enumerate(views)]
    pairs = make_pairs(images, scene_graph="complete", prefilter=None, symmetrize=True)
    answer = inference(pairs, network, device, batch_size=1)
    # the modular one lets poses and focal lengths be given
    aligner: Any = global_aligner(answer, device=device, mode=GlobalAlignerMode.ModularPointCloudOptimizer)
    aligner.preset_pose([torch.linalg.inv(one.viewmat) for one in small])
    aligner.preset_focal([float(one.K[0, 0]) for one in small])
    aligner.compute_global_alignment(init="known_poses", niter=STEPS, schedule="cosine", lr=RATE)
    found = []
    for view, depth, confidence in zip(views, aligner.get_depthmaps(), aligner.im_conf, strict=True):
        maps = torch.stack([depth.detach(), confidence.detach()])[None]
        size = (view.camera.height, view.camera.width)
        wide = F.interpolate(maps, size=size, mode="nearest-exact")[0].to(view.image)  # no mean of near and far
        found.append((wide[0], wide[1]))
    return found


def _image(view: View, width: int, height: int, number: int) -> dict[str, Any]:
    """A view as the package's loader would give it."""
    import numpy as np

    image = F.interpolate(view.image.movedim(-1, 0)[None], size=(height, width), mode="area")
    shape = np.array([[height, width]], dtype=np.int32)
    return {"img": 2 * image - 1, "true_shape": shape, "idx": number, "instance": str(number)}
