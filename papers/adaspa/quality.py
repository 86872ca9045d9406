"""How videos compare: with the dense model's from the same noise, and with what their caption says."""

from __future__ import annotations

import torch
from torch import Tensor

from common.metrics import image
from papers.adaspa import data

__all__ = ["fidelity", "flicker", "follows"]

NEAR = 0.12  # squared distance of colours at which a pixel counts by 1/e
LEAST = 6.0  # pixels of a colour that make a sprite, by their weights
MOVES = 0.012  # of the side, a frame: a quarter of a sprite's speed


def fidelity(video: Tensor, dense: Tensor) -> dict[str, float]:
    """PSNR in dB and SSIM of a video [3, F, S, S] in -1..1 to the dense one: the mean over its frames.

    Values are not rounded to bytes, so that two that differ in rounding alone have a PSNR that says so.
    """
    shown = [x.clamp(-1, 1).movedim(1, 0) for x in (video, dense)]  # [F, 3, S, S]
    size = {"data_range": 2.0}
    psnr = image.psnr(shown[0].flatten(1)[:, None], shown[1].flatten(1)[:, None], **size)
    return {"psnr": psnr.mean().item(), "ssim": image.ssim(*shown, **size).mean().item()}


def flicker(video: Tensor) -> float:
    """VBench's temporal flickering, the one of its dimensions that needs no weights: (255 - mean |change|) / 255."""
    frames = ((video.clamp(-1, 1) + 1) * 127.5).round()
    return 1 - (frames[:, 1:] - frames[:, :-1]).abs().mean().item() / 255


def follows(video: Tensor, caption: data.Caption) -> list[bool]:
    """For each sprite of a caption, whether something of its colour is there and moves along the axis it names.

    A sprite may bounce, so left and right are one axis; "rest" asks for no movement. [3, F, S, S] in -1..1.
    """
    return [_moves(video, phrase) for phrase in caption if len(phrase) == 3]


def _moves(video: Tensor, phrase: tuple[str, ...]) -> bool:
    color = torch.tensor(data.COLORS[phrase[0]])[:, None, None, None]
    weight = (-(video - color).square().sum(0) / NEAR).exp()  # [F, S, S]
    mass = weight.sum((-2, -1))
    seen = mass > LEAST
    if seen.float().mean() < 0.5:
        return False
    place = (torch.arange(video.shape[-1]) + 0.5) / video.shape[-1]
    x, y = (weight.sum(1) @ place / mass, weight.sum(2) @ place / mass)
    both = seen[1:] & seen[:-1]
    speed = [(path[1:] - path[:-1])[both].abs().median().item() for path in (x, y)] if both.any() else [0.0, 0.0]
    wanted = data.MOTIONS[phrase[2]]
    if wanted == (0, 0):
        return max(speed) < MOVES
    along = 0 if wanted[0] else 1
    return speed[along] > max(MOVES, speed[1 - along])
