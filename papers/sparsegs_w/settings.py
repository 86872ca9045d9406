"""What can be set in the SparseGS-W paper: scenes, arms, schedule, priors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Params:
    """One run. `params.yaml` gives the values of each profile.

    Scenes
        dataset          facade (generated, exact truth; a new one a seed), or phototourism: a folder of yours
        data_dir         that folder: images/, a COLMAP model in sparse/0 or sparse, masks/ if there are any; empty
                         for facades
        width, height    of all images, multiples of 8 (pretrained priors: of 64) and of `down`
        views, tests     photographs to train on, views to test on
        photos           names of the photographs to train on, instead of `views` evenly spaced ones (phototourism)
        fern_arms        arms fitted to real photographs (set scene_fern_llff) with made-up light and people; or none
        fern_factor      how much smaller than 4032 x 3024 they are

    Experiment
        seeds            one facade and one training each, for every arm
        arms             see `experiment.ARMS`
        points           Gaussians to start with, drawn from the cloud; 0: all points

    Schedule (method.Rounds) and learning rates
        steps, warm, every, rounds, round_views   all steps, before the first round, a round; rounds and views in each
        strength_first, strength_last   of the repair, by round
        lr_means, lr_means_final   times the extent of the cameras
        lr_scales, lr_quats, lr_opacities, lr_sh0
        sh_degree, sh_every    one more degree every so many steps

    Losses
        w_virtual, ramp  of the virtual views: weight, and steps over which it grows
        w_clean          of inpainted pixels
        dssim_virtual    share of D-SSIM in the loss on virtual views

    Repair
        ddim_steps       of the whole schedule; a repair makes the share `strength` of them
        clean_strength   of inpainting
        down             side of the blocks whose means a repaired view keeps, pixels
        control          how much the ControlNet is heard (pretrained)

    Priors
        priors           standin (truth with noise, a small diffusion model) or pretrained
        dust3r, stable_diffusion, controlnet   names or folders of the weights
        prompt           what the scene shows
        prior_scenes     generated scenes the small diffusion model learns from; one more is kept aside
        prior_width      its channels
        prior_steps, prior_batch, prior_crop, prior_rate   its training

        lpips            its network, where its weights are there; empty: no LPIPS, GMSD alone
        device           cpu or cuda
        workers          trainings at once, each with one thread; 0: one for each core; 1 shows every step
    """

    seeds: list[int]
    dataset: Literal["facade", "phototourism"]
    data_dir: str
    width: int
    height: int
    views: int
    tests: int
    photos: list[str]
    fern_arms: list[str]
    fern_factor: float
    arms: list[str]
    points: int
    steps: int
    warm: int
    every: int
    rounds: int
    round_views: int
    strength_first: float
    strength_last: float
    lr_means: float
    lr_means_final: float
    lr_scales: float
    lr_quats: float
    lr_opacities: float
    lr_sh0: float
    sh_degree: int
    sh_every: int
    w_virtual: float
    ramp: int
    w_clean: float
    dssim_virtual: float
    ddim_steps: int
    clean_strength: float
    down: int
    control: float
    priors: Literal["standin", "pretrained"]
    dust3r: str
    stable_diffusion: str
    controlnet: str
    prompt: str
    prior_scenes: int
    prior_width: int
    prior_steps: int
    prior_batch: int
    prior_crop: int
    prior_rate: float
    lpips: Literal["", "alex", "vgg"]
    device: Literal["cpu", "cuda"]
    workers: int
