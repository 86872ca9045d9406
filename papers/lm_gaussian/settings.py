"""What can be set in the LM-Gaussian paper: scenes, priors, schedule, repair model, and which arms are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Params:
    """One run. `params.yaml` gives the values of each profile.

    Scenes
        dataset          courtyard (generated, exact truth; a new one a seed), or tanks_and_temples, mipnerf360, llff:
                         a folder of yours with one COLMAP scene a subfolder
        data_dir         that folder; empty for courtyards
        factor           how much smaller than on disk its photographs are used
        width, height    of the courtyard's images, multiples of 8
        tests            test views of a courtyard
        closed           the last training view and the first are neighbours
        fern_arms        arms fitted to real photographs (set scene_fern_llff), with plane-sweep stereo; may be none
        fern_views, fern_factor   its training views, and how much smaller than 4032 x 3024 they are

    Experiment
        seeds            one courtyard and one training each, for every arm
        views            numbers of training views
        main_views       the one at which all `arms` are compared
        arms             compared at main_views; see `experiment.ARMS`
        side_arms        trained at the other numbers of views
        points           Gaussians to start with, drawn from the cloud; 0: all points

    Schedule (method.Plan) and learning rates
        stage1, steps, every   end of stage 1, end, steps a round
        early_until, early_most   renders for the repair model: among the first steps, so many a view
        rewind           every round starts at the learning rate of this step
        lr_means, lr_means_final   times the extent of the cameras
        lr_scales, lr_quats, lr_opacities, lr_sh0
        sh_degree, sh_every    one more degree every so many steps

    Losses
        w_virtual, w_depth, w_normal, w_depth_normal   method.Weights
        box              side of the Pearson boxes, pixels
        between          virtual cameras between two neighbours
        align_steps, align_box   of the depth-guided alignment

    Priors
        priors           standin (truth with noise, a small diffusion model) or pretrained (the authors' models)
        dust3r, marigold_depth, marigold_normals, stable_diffusion, controlnet   names or folders of the weights
        prompt           what the scene shows, typed by hand
        prior_scenes     generated scenes the small diffusion model learns from
        prior_width      its channels
        prior_steps, control_steps, prior_batch, prior_crop, prior_rate   training of the network and of its control

    Repair
        lora_rank, lora_steps, lora_batch, lora_crop, lora_rate   fine-tuning to the scene
        ddim_steps, strength, control, eta   SDEdit

        lpips            its network, where its weights are there; empty: no LPIPS, GMSD alone
        device           cpu or cuda
        workers          trainings at once, each with one thread; 0: one for each core; 1 shows every step
    """

    seeds: list[int]
    dataset: Literal["courtyard", "tanks_and_temples", "mipnerf360", "llff"]
    data_dir: str
    factor: float
    width: int
    height: int
    tests: int
    closed: bool
    fern_arms: list[str]
    fern_views: int
    fern_factor: float
    views: list[int]
    main_views: int
    arms: list[str]
    side_arms: list[str]
    points: int
    stage1: int
    steps: int
    every: int
    early_until: int
    early_most: int
    rewind: int
    lr_means: float
    lr_means_final: float
    lr_scales: float
    lr_quats: float
    lr_opacities: float
    lr_sh0: float
    sh_degree: int
    sh_every: int
    w_virtual: float
    w_depth: float
    w_normal: float
    w_depth_normal: float
    box: int
    between: int
    align_steps: int
    align_box: int
    priors: Literal["standin", "pretrained"]
    dust3r: str
    marigold_depth: str
    marigold_normals: str
    stable_diffusion: str
    controlnet: str
    prompt: str
    prior_scenes: int
    prior_width: int
    prior_steps: int
    control_steps: int
    prior_batch: int
    prior_crop: int
    prior_rate: float
    lora_rank: int
    lora_steps: int
    lora_batch: int
    lora_crop: int
    lora_rate: float
    ddim_steps: int
    strength: float
    control: float
    eta: float
    lpips: Literal["", "alex", "vgg"]
    device: Literal["cpu", "cuda"]
    workers: int
