"""What can be set in the GloReDi paper: data, geometry, networks, training, and which arms are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Params:
    """One run. `params.yaml` gives the values of each profile.

    Data
        dataset          phantoms (generated), head_philips (a real phantom scan), deeplesion or aapm (folders of yours)
        data_dir         the folder of deeplesion or aapm; empty for the others
        size             pixels a side of the images, a multiple of 4
        train_images, test_images   how many to use; 0: all there are. Phantoms are generated to that number
        full_views       views of the sinogram that the target is reconstructed from
        augment          extra copies of each training image, turned and flipped before it is projected
        noise_photons    photons an unattenuated ray, for Poisson noise in the sparse and intermediate views; 0: none

    Experiment
        seeds            one training each, for every arm
        views            view counts V, the paper's 18, 36, 72
        main_views       the V at which all `arms` are compared
        arms             compared at main_views; see `experiment.ARMS`
        main_arms        trained at every V
        teacher_factor   the teacher sees this many times V views
        variant          which of `method.VARIANTS` the arms are built on; the arm `released` is always as_released

    Network
        width            channels after the first convolution (64 in the paper)
        encoder_blocks, decoder_blocks   FFC residual blocks (7 and 2)
        global_ratio     share of channels in the global branch (0.75)

    Training
        steps, batch     iterations and images in each; epochs, if not 0, counts passes over the data instead of steps
        learning_rate    of Adam; halved every 45/150 of the schedule
        w_distill, w_contrast   weights of the directional and the contrastive loss
        temperature, bank       of the contrastive loss, and the number of its stored negatives
        band_low, band_high     its band of DCT indices, as shares of each axis
        clamp            whether outlier losses are bounded
        device           cpu or cuda
        workers          trainings at once, each with one thread; 0: one for each core; 1 shows every step

    Baselines
        sirt_iterations, tv_iterations   upper bounds; both stop on their own criterion first
        tv_weights       candidates of TV's weight; the best on training images is used

    Out of domain
        tooth            whether to reconstruct the real tooth sinogram (data set ct_sinogram_tooth)
    """

    seeds: list[int]
    dataset: Literal["phantoms", "head_philips", "deeplesion", "aapm"]
    data_dir: str
    size: int
    train_images: int
    test_images: int
    full_views: int
    augment: int
    noise_photons: float
    views: list[int]
    main_views: int
    arms: list[str]
    main_arms: list[str]
    teacher_factor: int
    variant: Literal["as_intended", "as_released"]
    width: int
    encoder_blocks: int
    decoder_blocks: int
    global_ratio: float
    steps: int
    epochs: int
    batch: int
    learning_rate: float
    w_distill: float
    w_contrast: float
    temperature: float
    bank: int
    band_low: float
    band_high: float
    clamp: bool
    device: Literal["cpu", "cuda"]
    workers: int
    sirt_iterations: int
    tv_iterations: int
    tv_weights: list[float]
    tooth: bool
