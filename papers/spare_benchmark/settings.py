"""What can be set in the SpaRe benchmark: scenes, sizes, schedule, entrants and seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Params:
    """One run. `params.yaml` gives the values of each profile.

    Scenes
        dataset          sets that are run: generated, fern, chair, brighton (registered) or llff, dtu, spare (yours)
        data_dir         the folder with `llff/<scene>`, `dtu/<scan>`, `dtu_masks/<scan>`, `spare/<scene>`
        scenes           how many scenes are generated
        width            pixels a row of the generated images, a multiple of 4; they are 4 : 3
        factor_fern, factor_chair, factor_brighton   images are that much smaller than the originals
        points           Gaussians to start from, drawn by the seed from a larger cloud
        point_noise, outliers   of the generated clouds: deviation as a share of the scene, share of wild points

    Entrants
        seeds            one training each, for every arm
        arms             entrants, run on every set at every view count; see `experiment.ARMS`
        ablations        variants of entrants, run on `main_sets` at the fewest views
        controls         variants with a perfect and a shuffled depth prior, run on the sets at the fewest views
        prior            where depth comes from: stand_in, or network (weights from `depth_model`)
        depth_model      a monocular depth network on the Hugging Face hub, or a folder with one
        prior_error      slow errors of priors that are made from the truth, as a share of the disparity's deviation

    Training
        iterations       of the authors' 10,000 (DNGaussian: of 6,000); all their step counts shrink with it
        most             Gaussians at most
        reset            whether opacities are reset, as the authors do; a short schedule cannot recover from it
        sh_degree        of the colours
        device           cpu or cuda
        workers          trainings at once, each with one thread; 0: one for each core

    Scores
        perceptual       gmsd, or lpips with the weights in `lpips_weights` (empty: torch's hub folder)
        lpips_weights    folder, see common.metrics.perceptual.load_lpips
        lpips_net        alex (SpaRe) or vgg (the tables of the splatting papers)

    Timing
        timing_iterations   steps of plain 3DGS on fern at 504 x 378 that are timed, on two threads; 0: none
    """

    seeds: list[int]
    dataset: list[str]
    data_dir: str
    scenes: int
    width: int
    factor_fern: float
    factor_chair: float
    factor_brighton: float
    points: int
    point_noise: float
    outliers: float
    arms: list[str]
    ablations: list[str]
    main_sets: list[str]
    controls: list[str]
    prior: Literal["stand_in", "network"]
    depth_model: str
    prior_error: float
    iterations: int
    most: int
    reset: bool
    sh_degree: int
    device: str
    workers: int
    perceptual: Literal["gmsd", "lpips"]
    lpips_weights: str
    lpips_net: Literal["alex", "vgg"]
    timing_iterations: int
