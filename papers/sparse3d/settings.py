"""What can be set in the Sparse3D paper: objects, networks, how a scene is fitted, and which arms are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Params:
    """One run. `params.yaml` gives the values of each profile.

    Objects
        dataset          chairs (generated, exact truth; another held-out chair for each seed) or co3dv2 (a folder of
                         yours; the held-out sequences of one category, in order, one a seed)
        data_dir         the folder with CO3Dv2's categories; empty for chairs
        category, subset of CO3Dv2, for instance chair and fewview_dev; the category is also Stable Diffusion's prompt
        size             side of the square pictures in pixels, a multiple of 16; Stable Diffusion needs 64
        train_objects    that the networks learn from; CO3Dv2: at most so many sequences
        train_views      pictures of each of them
        tests            test views of a held-out object
        circle           cameras on the path around the object
        real_arms        arms fitted to NeRF-synthetic's chair (set scene_chair_blender); may be none

    Experiment
        seeds            one held-out object and one training each, for every arm
        views            numbers of photographs
        main_views       the one at which all `arms` are compared
        arms             compared at main_views; see `experiment.ARMS`
        side_arms        trained at the other numbers of photographs

    Scene
        points           Gaussians, on the visual hull
        steps            of the fit; the first `bootstrap_steps` are with the transformer's pictures, the
                         others with the prior
        lr_means, lr_means_final   times the extent of the cameras
        lr_scales, lr_quats, lr_opacities, lr_colors
        w_silhouette, w_bootstrap, w_prior, w_opacity   weights beside the photometric loss, which has 1

    Epipolar feature transformer
        ray_pixels       side of the square of pixels that one of its rays stands for
        eft_width, eft_layers, eft_pixels, eft_samples   see `epipolar.EpipolarTransformer`
        eft_steps, eft_objects, eft_rays, eft_rate   training: objects a step, rays an object

    Diffusion model and controller
        prior            small (trained here, in pixels) or pretrained (Stable Diffusion, in latents)
        stable_diffusion name or folder of its weights
        base_width       channels of the small model, a multiple of 8
        base_steps, base_batch, base_rate   training of the small model
        control_maps     maps of the transformer that the controller learns from, made once
        control_steps, control_batch, control_rate   training of the controller

        lpips            its network, where its weights are there; empty: no LPIPS, GMSD alone
        device           cpu or cuda
        workers          trainings at once, each with one thread; 0: one for each core; 1 shows every step
    """

    seeds: list[int]
    dataset: Literal["chairs", "co3dv2"]
    data_dir: str
    category: str
    subset: str
    size: int
    train_objects: int
    train_views: int
    tests: int
    circle: int
    real_arms: list[str]
    views: list[int]
    main_views: int
    arms: list[str]
    side_arms: list[str]
    points: int
    steps: int
    bootstrap_steps: int
    lr_means: float
    lr_means_final: float
    lr_scales: float
    lr_quats: float
    lr_opacities: float
    lr_colors: float
    w_silhouette: float
    w_bootstrap: float
    w_prior: float
    w_opacity: float
    ray_pixels: int
    eft_width: int
    eft_layers: int
    eft_pixels: int
    eft_samples: int
    eft_steps: int
    eft_objects: int
    eft_rays: int
    eft_rate: float
    prior: Literal["small", "pretrained"]
    stable_diffusion: str
    base_width: int
    base_steps: int
    base_batch: int
    base_rate: float
    control_maps: int
    control_steps: int
    control_batch: int
    control_rate: float
    lpips: Literal["", "alex", "vgg"]
    device: Literal["cpu", "cuda"]
    workers: int
