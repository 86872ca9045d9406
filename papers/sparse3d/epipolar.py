"""The epipolar feature transformer (EFT): what the photographs say along the rays of a camera nobody stood at.

A query ray is sampled in depth; every sample falls on some pixel of each photograph, on that photograph's epipolar
line. Features picked there are compared over the photographs, then along the ray, then over the photographs again:
where the photographs agree, there is the surface. Order and inputs are those of SparseFusion's code, Sparse3D's open
relative; sizes are settings. All coordinates are those of the query camera, so the world's own frame does not matter.

B pictures, V photographs, R rays, D depth samples, C channels
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.splatting import Camera, View

WAVES = 6  # frequencies of the harmonic embeddings [SparseFusion's code]
KERNEL = 11  # side of the one convolution that makes features of pixels [SparseFusion's code]
HEADS = 4
COLORS = 3


class Photographs(NamedTuple):
    """Input views of B objects: images [B, V, 3, H, W] in 0..1, viewmats [B, V, 4, 4], Ks [B, V, 3, 3]."""

    images: Tensor
    viewmats: Tensor
    Ks: Tensor


class Looked(NamedTuple):
    """What the EFT says of rays: rgb [B, R, 3], about 0..1, and features [B, R, C]."""

    rgb: Tensor
    features: Tensor


def photographs(groups: Sequence[Sequence[View]]) -> Photographs:
    """Views of B objects, equally many of one size each."""
    return Photographs(
        torch.stack([torch.stack([view.image.movedim(-1, 0) for view in views]) for views in groups]),
        torch.stack([torch.stack([view.camera.viewmat for view in views]) for views in groups]),
        torch.stack([torch.stack([view.camera.K for view in views]) for views in groups]),
    )


class EpipolarTransformer(nn.Module):
    """The object is expected in the unit ball around the world's origin; samples lie within it.

    Args:
        width: channels C of tokens and of the features that come out, a multiple of 4.
        layers: of each of the three transformers.
        pixels: channels of the pixels' features.
        samples: depths D a ray.
    """

    def __init__(self, *, width: int = 64, layers: int = 2, pixels: int = 32, samples: int = 16):
        super().__init__()
        if width % HEADS or min(width, layers, pixels, samples) < 1:
            raise ValueError(
                f"EpipolarTransformer: got width={width}, layers={layers}, pixels={pixels}, samples={samples}; "
                f"expected a width in multiples of {HEADS} and the others at least 1."
            )
        self.samples, self.channels = samples, width + COLORS
        self.pixels = nn.Conv2d(COLORS, pixels, KERNEL, padding=KERNEL // 2)
        lines = 2 * harmonic_size(6)  # the query's ray and the photograph's
        self.enter = nn.Linear(pixels + COLORS + 1 + 2 * COLORS + lines + harmonic_size(1), width)
        self.over_views, self.along_ray, self.over_views_again = (_encoder(width, layers) for _ in range(3))
        self.depth_weight, self.view_weight = nn.Linear(width, 1), nn.Linear(width, 1)
        self.color = nn.Linear(width, COLORS)
        nn.init.zeros_(self.color.weight)  # at first the colour is a mean of the photographs'
        nn.init.zeros_(self.color.bias)

    def forward(self, given: Photographs, viewmats: Tensor, rays: Tensor) -> Looked:
        """viewmats [B, 4, 4] of the query cameras; rays [B, R, 3] in their coordinates, of any length."""
        relative = given.viewmats @ torch.linalg.inv(viewmats)[:, None]  # query -> photograph, [B, V, 4, 4]
        directions = F.normalize(rays, dim=-1)
        middle = viewmats[:, None, :3, 3]  # the origin of the world, [B, 1, 3]
        places = (torch.arange(self.samples, device=rays.device) + 0.5) * (2 / self.samples) - 1  # -1..1, [D]
        t = (middle * directions).sum(-1)[..., None] + places  # [B, R, D]
        points = t[..., None] * directions[:, :, None]  # [B, R, D, 3]

        features, colors, seen = self._picked(given, relative, points)  # [B, R, D, V, .]
        lines = self._lines(relative, points, directions)
        depth = harmonic((t - middle.norm(dim=-1, keepdim=True))[..., None])[:, :, :, None]
        depth = depth.expand(*seen.shape[:-1], -1)
        agreement = agreeing(colors, seen).expand(*seen.shape[:-1], -1)
        tokens = self.enter(torch.cat([features, colors, seen, agreement, lines, depth], dim=-1))  # [B, R, D, V, C]

        b, r, d, v, c = tokens.shape
        tokens = self.over_views(tokens.reshape(b * r * d, v, c)).reshape(b, r, d, v, c)
        tokens = tokens.transpose(2, 3)  # [B, R, V, D, C]
        tokens = self.along_ray(tokens.reshape(b * r * v, d, c)).reshape(b, r, v, d, c)
        along = self.depth_weight(tokens).softmax(dim=3)  # [B, R, V, D, 1]
        tokens, colors = (along * tokens).sum(dim=3), (along * colors.transpose(2, 3)).sum(dim=3)  # [B, R, V, .]
        tokens = self.over_views_again(tokens.reshape(b * r, v, c)).reshape(b, r, v, c)
        over = self.view_weight(tokens).softmax(dim=2)  # [B, R, V, 1]
        feature = (over * tokens).sum(dim=2)
        return Looked((over * colors).sum(dim=2) + self.color(feature), feature)

    @torch.no_grad()
    def look(self, views: Sequence[View], camera: Camera) -> tuple[Tensor, Tensor]:
        """From one camera: RGB [H, W, 3] limited to 0..1, and the map [C + 3, H, W] of features and RGB."""
        given = photographs([views])
        found = self(given, camera.viewmat[None], camera_rays(camera)[None])
        shape = (camera.height, camera.width, -1)
        both = torch.cat([found.features, found.rgb], dim=-1)[0].reshape(shape)
        return found.rgb[0].reshape(shape).clamp(0, 1), both.movedim(-1, 0).contiguous()

    def _picked(self, given: Photographs, relative: Tensor, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features, colours [B, R, D, V, .] where the points fall on the photographs, 0 outside, and whether inside."""
        b, v, _, height, width = given.images.shape
        r, d = points.shape[1:3]
        local = torch.einsum("bvij,brdj->bvrdi", relative[..., :3, :3], points) + relative[:, :, None, None, :3, 3]
        on_plane = torch.einsum("bvij,bvrdj->bvrdi", given.Ks, local)
        z = on_plane[..., 2:]
        size = on_plane.new_tensor([width, height])
        place = 2 * on_plane[..., :2] / z.clamp_min(1e-6) / size - 1
        inside = ((z > 0) & (place.abs() <= 1).all(dim=-1, keepdim=True)).to(points)  # [B, V, R, D, 1]
        flat = given.images.reshape(b * v, COLORS, height, width)
        planes = torch.cat([self.pixels(2 * flat - 1).relu(), flat], dim=1)
        place = place.clamp(-2, 2).reshape(b * v, r, d, 2)
        found = F.grid_sample(planes, place, padding_mode="border", align_corners=False)  # [B V, ., R, D]
        found = found.reshape(b, v, -1, r, d).permute(0, 3, 4, 1, 2)  # [B, R, D, V, .]
        inside = inside.permute(0, 2, 3, 1, 4)
        found = found * inside
        return found[..., :-COLORS], found[..., -COLORS:], inside

    def _lines(self, relative: Tensor, points: Tensor, directions: Tensor) -> Tensor:
        """Harmonic embeddings [B, R, D, V, .] of the query's ray and of each photograph's ray to the sample."""
        rotation, shift = relative[..., :3, :3], relative[..., :3, 3]
        centers = -torch.einsum("bvji,bvj->bvi", rotation, shift)  # of the photographs' cameras, [B, V, 3]
        towards = F.normalize(points[:, :, :, None] - centers[:, None, None], dim=-1)  # [B, R, D, V, 3]
        theirs = plucker(centers[:, None, None].expand_as(towards), towards)
        ours = plucker(torch.zeros_like(directions), directions)[:, :, None, None].expand_as(theirs)
        return harmonic(torch.cat([ours, theirs], dim=-1))


def agreeing(colors: Tensor, seen: Tensor) -> Tensor:
    """[..., 1, 6] mean and variance over the photographs of picked colours [..., V, 3], where `seen` [..., V, 1].

    A surface looks alike to all. Attention could find that out; told so, it learns in minutes [guess, as IBRNet does].
    """
    share = seen / seen.sum(dim=-2, keepdim=True).clamp_min(1)
    mean = (share * colors).sum(dim=-2, keepdim=True)
    return torch.cat([mean, (share * (colors - mean).square()).sum(dim=-2, keepdim=True)], dim=-1)


def plucker(origins: Tensor, directions: Tensor) -> Tensor:
    """[..., 6] direction and moment o x d of lines: the same for every origin on the line."""
    return torch.cat([directions, torch.linalg.cross(origins, directions, dim=-1)], dim=-1)


def harmonic(values: Tensor) -> Tensor:
    """[..., n] -> [..., 13 n]: the values, and sines and cosines of 2^k pi values / 2, k = 0..5."""
    angles = values[..., None] * (0.5 * math.pi * 2.0 ** torch.arange(WAVES, device=values.device))
    return torch.cat([values, angles.sin().flatten(-2), angles.cos().flatten(-2)], dim=-1)


def harmonic_size(values: int) -> int:
    """Channels of `harmonic` of so many values."""
    return values * (2 * WAVES + 1)


def camera_rays(camera: Camera) -> Tensor:
    """[H W, 3] rays through the pixel centres in the camera's own coordinates, row by row."""
    return (camera.rays() @ camera.viewmat[:3, :3].T).reshape(-1, 3)


def _encoder(width: int, layers: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        width, HEADS, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
