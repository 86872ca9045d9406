"""Five styles: fixed transforms of RGB images that stand in for the style sets on which SaRA is measured.

The authors fine-tune on pictures of five styles from a site for image models. Those are not to be had, so each style
here is a fixed map of any image, with the name and the number of pictures of the original. It changes colours and
texture and leaves what is shown, so that content and style can be judged apart. What looks like the name is a guess.

    barbie        pink, from plum to white
    cyberpunk     two colours, violet and cyan, with scan lines
    elementfire   four colours of fire, with a glow around what is bright
    expedition    faded paper, and dark lines along the edges
    hornify       the green negative, in large pixels
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["STYLES", "stylised"]

STYLES = {"barbie": 316, "cyberpunk": 440, "elementfire": 156, "expedition": 396, "hornify": 236}  # pictures (SaRA)

LUMA = (0.299, 0.587, 0.114)  # BT.601
GRAIN = 16  # lines, tiles and blurs are a sixteenth of an image wide, so that a style looks alike at any size

Colour = tuple[float, float, float]


def stylised(images: Tensor, style: str) -> Tensor:
    """Images [N, 3, H, W] in -1..1 in that style, likewise; sides of at least 4 pixels. Deterministic.

    Raises ValueError for an unknown style, TypeError and ValueError for what is no batch of RGB images.
    """
    if style not in TRANSFORMS:
        raise ValueError(f"stylised: got style {style!r}; expected one of {', '.join(STYLES)}")
    if not images.is_floating_point():
        raise TypeError(f"stylised: got images of {images.dtype}; expected floats in -1..1; scale them first")
    if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 4:
        raise ValueError(f"stylised: got images {list(images.shape)}; expected [N, 3, H, W] of at least 4 x 4 pixels")
    return 2 * TRANSFORMS[style]((images + 1) / 2).clamp(0, 1) - 1


def _barbie(image: Tensor) -> Tensor:
    pink = _painted(_luma(image), [(0.25, 0.0, 0.20), (1.0, 0.20, 0.60), (1.0, 0.92, 0.97)])
    return 0.8 * pink + 0.2 * image


def _cyberpunk(image: Tensor) -> Tensor:
    neon = _painted(_luma(image), [(0.04, 0.0, 0.15), (0.60, 0.0, 0.80), (0.10, 1.0, 1.0)])
    lines = 1 - 0.55 * (_grain(torch.arange(image.shape[2], device=image.device), image) % 2)
    return (0.85 * neon + 0.15 * image) * lines.to(image)[:, None]


def _elementfire(image: Tensor) -> Tensor:
    grey = _luma(image)
    levels = (3.999 * grey.clamp(0, 1)).floor() / 3
    fire = _painted(levels, [(0.05, 0.0, 0.0), (0.65, 0.05, 0.0), (1.0, 0.55, 0.0), (1.0, 1.0, 0.70)])
    glow = _blurred((grey - 0.5).clamp_min(0))
    return 0.85 * fire + 0.15 * image + glow * image.new_tensor((1.2, 0.6, 0.0))[:, None, None]


def _expedition(image: Tensor) -> Tensor:
    grey = _luma(image)
    paper = _painted(grey, [(0.45, 0.37, 0.22), (0.78, 0.70, 0.50), (0.98, 0.94, 0.80)])
    return (0.85 * paper + 0.15 * image) * (1 - 0.85 * (2.5 * _edges(grey)).clamp(0, 1))


def _hornify(image: Tensor) -> Tensor:
    tile = 2 * _pixel(image)
    coarse = F.avg_pool2d(image, tile, ceil_mode=True).repeat_interleave(tile, 2).repeat_interleave(tile, 3)
    mixed = 0.7 * coarse[:, :, : image.shape[2], : image.shape[3]] + 0.3 * image
    acid = _painted(1 - _luma(mixed), [(0.05, 0.0, 0.10), (0.05, 0.50, 0.10), (0.75, 1.0, 0.25)])
    return 0.75 * acid + 0.25 * (1 - mixed)


TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "barbie": _barbie,
    "cyberpunk": _cyberpunk,
    "elementfire": _elementfire,
    "expedition": _expedition,
    "hornify": _hornify,
}


def _luma(image: Tensor) -> Tensor:
    """[N, 3, H, W] -> [N, 1, H, W]."""
    return torch.einsum("nchw,c->nhw", image, image.new_tensor(LUMA))[:, None]


def _painted(grey: Tensor, colours: Sequence[Colour]) -> Tensor:
    """Grey 0..1 [N, 1, H, W] -> [N, 3, H, W]: black is the first colour, white the last, linear between them."""
    table = grey.new_tensor(colours)  # [K, 3]
    place = grey[:, 0].clamp(0, 1) * (len(colours) - 1)
    low = place.floor().clamp_max(len(colours) - 2).long()
    return torch.lerp(table[low], table[low + 1], (place - low)[..., None]).movedim(-1, 1)


def _pixel(image: Tensor) -> int:
    return max(1, min(image.shape[2:]) // GRAIN)


def _grain(place: Tensor, image: Tensor) -> Tensor:
    return place.div(_pixel(image), rounding_mode="floor")


def _blurred(grey: Tensor) -> Tensor:
    """Means of 3 x 3 grains, the rim continued."""
    reach = _pixel(grey)
    return F.avg_pool2d(F.pad(grey, (reach,) * 4, mode="replicate"), 2 * reach + 1, stride=1)


def _edges(grey: Tensor) -> Tensor:
    """Size of the difference between neighbours two grains apart, 0 to about 1; the rim continued."""
    reach = _pixel(grey)
    wide = F.pad(grey, (reach,) * 4, mode="replicate")
    inner = slice(reach, -reach)
    across = (wide[..., inner, 2 * reach :] - wide[..., inner, : -2 * reach]) / 2
    down = (wide[..., 2 * reach :, inner] - wide[..., : -2 * reach, inner]) / 2
    return torch.hypot(across, down)
