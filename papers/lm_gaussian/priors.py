"""What stereo and monocular networks would say of a view: stand-ins made from the truth, from plane sweep, or the nets.

The stand-ins are made from the exact depth and normals of a generated view, with the errors that such networks have.
That leaks the truth unless one looks: rows with perfect and with shuffled priors stand beside every result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common import seeds
from common.splatting import View
from common.splatting.priors import slow_field, smoothed
from common.splatting.stereo import sweep_depth
from papers.lm_gaussian.method import Mono, normals_from_depth

# of the stereo stand-in, as shares of the depth
SMOOTH_ERROR, PIXEL_ERROR = 0.015, 0.005
BLOBS, BLOB_SHARE = 8, 0.08  # wrong patches a view, and the share of the image that all of them have
# its confidence: log C is this at the middle depth, falls by that for every middle depth beyond it
LOG_CONFIDENCE, LOG_FALL = 2.4, 1.3
# of the monocular stand-ins: low-frequency error as a share of the depth's spread; of the normals, radians
MONO_ERROR, NORMAL_ERROR = 0.15, 0.15
FIELD = 5  # knots a side of a low-frequency field
CERTAIN = 20.0  # the confidence of perfect stereo


@dataclass(frozen=True, eq=False)
class Stereo:
    """A depth map [H, W] along the optical axis, and its confidence [H, W] >= 1 on DUSt3R's scale."""

    depth: Tensor
    confidence: Tensor


def stereo_standin(view: View, seed: int, *, perfect: bool = False) -> Stereo:
    """The view's true depth as DUSt3R would find it: a smooth and a pixel error, flying pixels at edges, wrong patches.

    A wrong patch lies in front of the truth. Its confidence is lower, and so is that of far pixels, which are right:
    the two cases that cleaning and the background rule tell apart.
    """
    assert view.depth is not None, "generated views have depth"
    truth = view.depth
    if perfect:
        return Stereo(truth, torch.full_like(truth, CERTAIN))
    draw = seeds.generator(seed, "stereo", view.name)
    depth = truth * (
        1 + SMOOTH_ERROR * field(truth.shape, draw) + PIXEL_ERROR * torch.randn(truth.shape, generator=draw)
    )
    middle = truth.median()
    log_confidence = LOG_CONFIDENCE - LOG_FALL * (truth / middle - 1).clamp_min(0) + 0.2 * field(truth.shape, draw)

    padded = F.pad(depth[None, None], (1, 1, 1, 1), mode="replicate")
    near = -F.max_pool2d(-padded, 3, 1)[0, 0]
    edge = near < 0.9 * depth
    flying = edge & (torch.rand(truth.shape, generator=draw) < 0.5)
    depth = torch.where(flying, torch.lerp(near, depth, torch.rand(truth.shape, generator=draw)), depth)
    log_confidence = log_confidence - 0.6 * edge

    rows, columns = torch.meshgrid(*(torch.arange(size) for size in truth.shape), indexing="ij")
    radius = (BLOB_SHARE * truth.numel() / BLOBS / torch.pi) ** 0.5
    for _ in range(BLOBS):
        row, column, shift, lost = torch.rand(4, generator=draw).tolist()
        distance = (rows - row * truth.shape[0]).square() + (columns - column * truth.shape[1]).square()
        inside = distance < radius**2
        depth = torch.where(inside, depth * (0.45 + 0.4 * shift), depth)
        log_confidence = torch.where(inside, log_confidence - 0.2 - 0.6 * lost, log_confidence)
    return Stereo(depth, 1 + log_confidence.exp())


def mono_standin(view: View, seed: int, *, perfect: bool = False) -> Mono:
    """The view's true depth at an unknown scale and shift and true normals, both with a low-frequency error."""
    assert view.depth is not None and view.normals is not None, "generated views have depth and normals"
    if perfect:
        return Mono(view.depth, view.normals)
    draw = seeds.generator(seed, "mono", view.name)
    scale, shift = (0.2 + torch.rand(2, generator=draw)).tolist()
    error = MONO_ERROR * view.depth.std() * field(view.depth.shape, draw)
    tilt = NORMAL_ERROR * torch.stack([field(view.depth.shape, draw) for _ in range(3)], dim=-1)
    normals = F.normalize(view.normals + torch.linalg.cross(tilt, view.normals, dim=-1), dim=-1, eps=1e-6)
    return Mono(scale * (view.depth + error) + shift, normals)


def shuffled(mono: dict[str, Mono]) -> dict[str, Mono]:
    """Every view gets what was said of the next one: priors with nothing to say about it."""
    names = list(mono)
    return {name: mono[other] for name, other in zip(names, [*names[1:], names[0]], strict=True)}


def plane_sweep(views: Sequence[View], near: float, far: float) -> tuple[dict[str, Stereo], dict[str, Mono]]:
    """Both priors for real photographs without the networks: plane-sweep stereo, and its smoothed depth and normals.

    The confidence is 1 + 20 max(0, correlation of the windows): the threshold of 5 is then a correlation of 0.2.
    """
    stereo, mono = {}, {}
    for index, view in enumerate(views):
        found = sweep_depth(views, index, near, far)
        stereo[view.name] = Stereo(found.depth, 1 + 20 * found.correlation.clamp_min(0))
        smooth = smoothed(found.depth)
        mono[view.name] = Mono(smooth, normals_from_depth(view.camera, smooth))
    return stereo, mono


def field(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """[H, W] a smooth random field of mean square about 1."""
    values = slow_field(shape, generator, FIELD)
    return values / values.square().mean().sqrt()
