"""Scores of a model on views it may not have seen: PSNR and SSIM, over the whole image and over the object."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.metrics.image import psnr, ssim
from common.splatting.model import Gaussians
from common.splatting.scene import View

__all__ = ["MASKED", "Scores", "ViewScore", "evaluate", "score", "tight_box"]

MASKED = 0.5  # a pixel belongs to the object above this mask value


@dataclass(frozen=True)
class ViewScore:
    """One view. PSNR in dB for values in 0..1; SSIM in the form of 3DGS (window of 11 pixels, zeros around).

    psnr_masked  over the pixels of the object alone (SpaRe's PSNR-M), None without a mask or with an empty one
    ssim_masked  over the tight box around the object (SpaRe's SSIM-M), None likewise
    """

    name: str
    psnr: float
    ssim: float
    psnr_masked: float | None = None
    ssim_masked: float | None = None


@dataclass(frozen=True)
class Scores:
    """Scores of several views; their means as the tables give them, None where no view has the score."""

    views: tuple[ViewScore, ...]

    def mean(self, score: str) -> float | None:
        """The mean of "psnr", "ssim", "psnr_masked" or "ssim_masked" over the views that have it."""
        known = [value for value in (getattr(view, score) for view in self.views) if value is not None]
        return statistics.fmean(known) if known else None


@torch.no_grad()
def evaluate(
    model: Gaussians,
    views: Sequence[View],
    *,
    background: Tensor | None = None,
    sh_degree: int | None = None,
    antialiased: bool = False,
) -> Scores:
    """Draw each view and compare it with its photograph, after limiting the render to 0..1.

    background, sh_degree, antialiased  as in training

    Raises ValueError for no views.
    """
    if not views:
        raise ValueError("evaluate: got no views, expected at least one; the scene may have no test views.")
    return Scores(
        tuple(
            score(
                view,
                model.render(view.camera, background=background, sh_degree=sh_degree, antialiased=antialiased).image,
            )
            for view in views
        )
    )


def score(view: View, image: Tensor) -> ViewScore:
    """Compare an image [H, W, 3], limited to 0..1 first as a file would, with a view's photograph."""
    ours, photo = image.detach().clamp(0, 1).movedim(-1, 0), view.image.movedim(-1, 0)  # [3, H, W]
    whole = _psnr(ours.flatten(), photo.flatten()), _ssim(ours, photo)
    box = None if view.mask is None else tight_box(view.mask)
    if view.mask is None or box is None:
        return ViewScore(view.name, *whole)
    inside = view.mask > MASKED
    of_object = _psnr(ours[:, inside], photo[:, inside]), _ssim(ours[:, *box], photo[:, *box])
    return ViewScore(view.name, *whole, *of_object)


def tight_box(mask: Tensor) -> tuple[slice, slice] | None:
    """The smallest box of rows and columns that holds the object of a mask [H, W], or None where there is none."""
    inside = mask > MASKED
    rows, columns = inside.any(dim=1).nonzero(), inside.any(dim=0).nonzero()
    if not len(rows):
        return None
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _psnr(ours: Tensor, photo: Tensor) -> float:
    return float(psnr(ours.reshape(1, -1), photo.reshape(1, -1), data_range=1.0))


def _ssim(ours: Tensor, photo: Tensor) -> float:
    return float(ssim(ours, photo, data_range=1.0, border="zero").mean())
