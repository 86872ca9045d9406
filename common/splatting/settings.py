"""What a training is told: the settings of 3DGS, and a few that sparse views need."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from common.splatting.strategies import DefaultStrategy, Strategy

__all__ = ["TrainSettings"]


@dataclass(frozen=True)
class TrainSettings:
    """The settings of 3DGS, and its values.

    iterations       steps; one training view each, every view once before any comes again
    seed             of the order of views, random backgrounds, the strategy and the extensions
    initial_opacity  of the Gaussians made from the scene's points
    extent           unit of length of the learning rate of means and of the strategy's scales; None: the scene's

    lr_*             Adam's learning rates. That of the means is times the extent and falls exponentially from lr_means
                     to lr_means_final at step `lr_means_until` (None: the last step)
    sh_degree        highest SH degree; one more is used every `sh_every` steps from 0 on (0: all from the start)

    dssim            share of D-SSIM in the photometric loss
    opacity_penalty, scale_penalty   weights of the mean opacity and the mean scale in the loss (3DGS-MCMC)
    background       what is behind the Gaussians: the scene's colour (black where it has none), or a colour, or a new
                     random one each step, which makes transparency dear
    alpha_masks      the views' masks are the photographs' alpha: the drawn background replaces the scene's in them too
    mode             "RGB+ED" or "RGB+D" also draws depth, for extensions
    antialiased      see `model.render`
    strategy         None: the number of Gaussians stays. After the last step it is not called any more: nothing could
                     settle what it changes

    eval_every       score the test views at its multiples and at the end (0: never)
    checkpoint_every save at its multiples, where `fit` is given a file (0: only at the end and when stopped)
    """

    iterations: int = 30_000
    seed: int = 0
    initial_opacity: float = 0.1
    extent: float | None = None
    lr_means: float = 1.6e-4
    lr_means_final: float = 1.6e-6
    lr_means_until: int | None = None
    lr_scales: float = 5e-3
    lr_quats: float = 1e-3
    lr_opacities: float = 5e-2
    lr_sh0: float = 2.5e-3
    lr_shN: float = 2.5e-3 / 20
    sh_degree: int = 3
    sh_every: int = 1_000
    dssim: float = 0.2
    opacity_penalty: float = 0.0
    scale_penalty: float = 0.0
    background: Literal["scene", "black", "white", "random"] = "scene"
    alpha_masks: bool = False
    mode: Literal["RGB", "RGB+D", "RGB+ED"] = "RGB"
    antialiased: bool = False
    strategy: Strategy | None = field(default_factory=DefaultStrategy)
    eval_every: int = 0
    checkpoint_every: int = 1_000

    def plain(self) -> dict[str, str]:
        """What a resumed training must share with the one before: all settings but those that change no number."""
        kept = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: repr(value) for name, value in kept.items() if name not in ("eval_every", "checkpoint_every")}
