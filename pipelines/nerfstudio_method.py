"""Gaussian splatting in nerfstudio, with CUDA and without: the method `resparse-splat`.

    ns-train resparse-splat --data FOLDER
    ns-eval --load-config outputs/.../config.yml --output-path scores.json
    ns-export gaussian-splat --load-config outputs/.../config.yml --output-dir exports

It is splatfacto of nerfstudio 1.1.5 with the rasterizer of `kernels.splat`. splatfacto cannot run without CUDA: it
calls `.cuda()` twice, its rasterizer has no other code, and it downloads LPIPS's network before the first step. What
does so is replaced here and all else inherited. The defaults are for few views and a processor: a third of the steps.
nerfstudio finds the method by the entry point in pyproject.toml; all its data parsers serve.
"""

from __future__ import annotations

# pyright: reportMissingImports=false
# nerfstudio is left out with NERFSTUDIO=0
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from gsplat.strategy import DefaultStrategy
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.configs.base_config import MachineConfig
from nerfstudio.data.datamanagers.full_images_datamanager import FullImageDatamanager, FullImageDatamanagerConfig
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from nerfstudio.engine.schedulers import ExponentialDecayScheduler, ExponentialDecaySchedulerConfig
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.model_components.lib_bilagrid import BilateralGrid
from nerfstudio.models.splatfacto import RGB2SH, SplatfactoModel, SplatfactoModelConfig, num_sh_bases
from nerfstudio.pipelines.base_pipeline import VanillaPipelineConfig
from nerfstudio.plugins.types import MethodSpecification
from nerfstudio.utils.colors import get_color
from nerfstudio.utils.rich_utils import CONSOLE
from pytorch_msssim import SSIM
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from kernels.splat import rasterization

__all__ = [
    "DecaySchedulerConfig",
    "ResparseSplatDatamanager",
    "ResparseSplatDatamanagerConfig",
    "ResparseSplatModel",
    "ResparseSplatModelConfig",
    "resparse_splat",
]

ITERATIONS = 10_000  # those of CoR-GS, FSGS and DropGaussian; splatfacto's schedules, made for 30,000, are cut to them
OPACITY_OF_POINTS = 0.1  # at the start, as in 3DGS
OPACITY_AT_RANDOM = 0.02  # random Gaussians fill space: at 0.1 they are fog that lets no gradient through for long
FEWEST_POINTS = 4  # a point's size at the start is its mean distance to three neighbours
ALPHA_COLOR = "alpha_color"  # in the data's metadata: [3] what is behind images with an alpha channel
SMALLEST_DISTANCE = 1e-6  # of two points in one place, whose size would have no logarithm


@dataclass
class ResparseSplatModelConfig(SplatfactoModelConfig):
    """splatfacto's settings, of which some have other defaults here, and one of its own."""

    _target: type = field(default_factory=lambda: ResparseSplatModel)
    num_downscales: int = 1
    resolution_schedule: int = 500  # at full size from when the first Gaussians are added: they shall fit the details
    sh_degree_interval: int = 500
    stop_split_at: int = 5_000
    densify_grad_thresh: float = 0.002  # 2.5 times splatfacto's, as CoR-GS, FSGS and DropGaussian raise that of 3DGS
    num_random: int = 20_000
    random_scale: float = 3.0  # Blender's scenes are within 1.5 of the origin
    lpips: bool = True
    """Score LPIPS when evaluating. Where its weights are neither here nor to be downloaded, it is left out."""


class ResparseSplatModel(SplatfactoModel):
    """splatfacto on every device that `kernels.splat` serves."""

    config: ResparseSplatModelConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def populate_modules(self) -> None:
        """Make what splatfacto makes, on the CPU: the pipeline moves it to its device afterwards."""
        if not 0 <= self.config.sh_degree <= 3:
            raise ValueError(f"resparse-splat: got sh_degree {self.config.sh_degree}; expected 0, 1, 2 or 3.")
        from torchmetrics.image import PeakSignalNoiseRatio

        self.step = 0
        self.gauss_params = nn.ParameterDict(self._initial_gaussians())
        self.camera_optimizer = self.config.camera_optimizer.setup(num_cameras=self.num_train_data, device="cpu")
        self.psnr = PeakSignalNoiseRatio(data_range=1.0)
        self.ssim = SSIM(data_range=1.0, size_average=True, channel=3)
        self.crop_box = None
        self.background_color = self._still_background()
        if self.config.use_bilateral_grid:
            self.bil_grids = BilateralGrid(self.num_train_data, *self.config.grid_shape)
        self.strategy = self._strategy()
        self.strategy_state = self.strategy.initialize_state(scene_scale=1.0)

    def get_outputs(self, camera: Cameras) -> dict[str, Any]:
        """Render for one camera.

        Returns rgb [H, W, 3] and accumulation [H, W, 1] in 0..1, background [3] in training, else [H, W, 3], and depth
        [H, W, 1], in training None unless it was asked for. In training H and W follow the resolution schedule.
        """
        config = self.config
        shrink = self._get_downscale_factor()
        width, height = int(camera.width.item()) // shrink, int(camera.height.item()) // shrink
        gaussians = self._kept_gaussians()
        if len(gaussians["means"]) == 0:
            return self.get_empty_outputs(width, height, self.background_color)

        poses = self.camera_optimizer.apply_to_camera(camera) if self.training else camera.camera_to_worlds
        with_depth = config.output_depth_during_training or not self.training
        if config.sh_degree == 0:  # splatfacto then stores the logits of colours
            colors, degree = gaussians["features_dc"].sigmoid(), None
        else:
            colors = torch.cat([gaussians["features_dc"][:, None], gaussians["features_rest"]], dim=1)
            degree = min(self.step // config.sh_degree_interval, config.sh_degree)
        render, alpha, self.info = rasterization(
            gaussians["means"],
            gaussians["quats"],
            gaussians["scales"].exp(),
            gaussians["opacities"].squeeze(-1).sigmoid(),
            colors,
            _viewmats(poses),
            _intrinsics(camera, shrink).to(self.device),
            width,
            height,
            sh_degree=degree,
            packed=False,
            render_mode="RGB+ED" if with_depth else "RGB",
            absgrad=self.strategy.absgrad,
            rasterize_mode=config.rasterize_mode,
        )
        if self.info["radii"].ndim == 3:
            # kernels.splat gives two radii, across and down; gsplat 1.4's strategy knows the larger alone
            self.info["radii"] = self.info["radii"].amax(dim=-1)
        if self.training:
            self.strategy.step_pre_backward(
                self.gauss_params, self.optimizers, self.strategy_state, self.step, self.info
            )
        background = self._get_background_color()
        rgb = (render[..., :3] + (1 - alpha) * background).clamp(0, 1)  # [1, H, W, 3]
        view = (camera.metadata or {}).get("cam_idx")
        if config.use_bilateral_grid and self.training and view is not None:
            rgb = self._apply_bilateral_grid(rgb, view, height, width)
        return {
            "rgb": rgb.squeeze(0),
            "depth": _filled_depth(render[..., 3:], alpha).squeeze(0) if with_depth else None,
            "accumulation": alpha.squeeze(0),
            "background": background if self.training else background.expand(height, width, 3),
        }

    def get_image_metrics_and_images(
        self, outputs: dict[str, Tensor], batch: dict[str, Tensor]
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """PSNR, SSIM and, where it can be had, LPIPS of one image; truth and render side by side."""
        metrics, images = super().get_image_metrics_and_images(outputs, batch)
        return {name: value for name, value in metrics.items() if "lpips" not in name or math.isfinite(value)}, images

    def load_state_dict(self, dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """Take over a checkpoint, with its number of Gaussians.

        splatfacto puts new parameters in place of its own, while the optimizers of a resumed training keep the old ones
        and update them in vain.
        """
        for name, parameter in self.gauss_params.items():
            parameter.data = parameter.data.new_empty(dict[f"gauss_params.{name}"].shape)
        return nn.Module.load_state_dict(self, dict, **kwargs)

    def step_post_backward(self, step: int) -> None:
        """Let the strategy work, but not at step 0: there it would reset opacities that have not been trained."""
        if step > 0:
            super().step_post_backward(step)

    def update_to_step(self, step: int) -> None:
        """Go on from this step, with its degree of spherical harmonics."""
        self.step = step

    def lpips(self, truth: Tensor, image: Tensor) -> Tensor:
        """LPIPS of images [1, 3, H, W] in 0..1, nan without its network.

        A method and no module, as in splatfacto, so that the network is loaded when it is wanted and is no part of
        checkpoints, which would differ between machines.
        """
        network = _lpips_network(self.device) if self.config.lpips else None
        return truth.new_tensor(math.nan) if network is None else network(truth, image)

    def _initial_gaussians(self) -> dict[str, nn.Parameter]:
        config = self.config
        if self.seed_points is None or config.random_init:
            means = (torch.rand(config.num_random, 3) - 0.5) * config.random_scale
            colors, opacity = torch.rand(config.num_random, 3), OPACITY_AT_RANDOM
        else:
            means, colors = self.seed_points[0].float(), self.seed_points[1].float() / 255
            opacity = OPACITY_OF_POINTS
            if len(colors) == 0:  # a cloud without colours
                colors = torch.full_like(means, 0.5)
        count = len(means)
        if count < FEWEST_POINTS:
            raise ValueError(
                f"resparse-splat: got {count} initial points; expected {FEWEST_POINTS} or more. Start from random ones "
                "with --pipeline.model.random-init True."
            )
        distances, _ = self.k_nearest_sklearn(means, FEWEST_POINTS - 1)
        scales = torch.from_numpy(distances).mean(dim=-1, keepdim=True).clamp_min(SMALLEST_DISTANCE).log()
        initial = {
            "means": means,
            "scales": scales.repeat(1, 3),
            "quats": nn.functional.normalize(torch.randn(count, 4), dim=-1),
            "features_dc": RGB2SH(colors) if config.sh_degree > 0 else torch.logit(colors, eps=1e-6),
            "features_rest": torch.zeros(count, num_sh_bases(config.sh_degree) - 1, 3),
            "opacities": torch.logit(torch.full((count, 1), opacity)),
        }
        return {name: nn.Parameter(value) for name, value in initial.items()}

    def _still_background(self) -> Tensor:
        """[3] What renders stand before outside training."""
        if self.config.background_color != "random":
            return get_color(self.config.background_color)
        return self.kwargs["metadata"].get(ALPHA_COLOR, get_color("black"))

    def _strategy(self) -> DefaultStrategy:
        config = self.config
        return DefaultStrategy(
            prune_opa=config.cull_alpha_thresh,
            grow_grad2d=config.densify_grad_thresh,
            grow_scale3d=config.densify_size_thresh,
            grow_scale2d=config.split_screen_size,
            prune_scale3d=config.cull_scale_thresh,
            prune_scale2d=config.cull_screen_size,
            refine_scale2d_stop_iter=config.stop_screen_size_at,
            refine_start_iter=config.warmup_length,
            refine_stop_iter=config.stop_split_at,
            refine_every=config.refine_every,
            reset_every=config.reset_alpha_every * config.refine_every,
            pause_refine_after_reset=self.num_train_data + config.refine_every,
            absgrad=config.use_absgrad,
            verbose=True,
        )

    def _kept_gaussians(self) -> dict[str, Tensor]:
        """Parameters by name: all, or outside training those inside the crop box of the viewer or of ns-render."""
        if self.crop_box is None or self.training:
            return dict(self.gauss_params)
        inside = self.crop_box.within(self.means).squeeze(-1)
        return {name: parameter[inside] for name, parameter in self.gauss_params.items()}


@dataclass
class ResparseSplatDatamanagerConfig(FullImageDatamanagerConfig):
    """splatfacto's data manager with what processors and Blender scenes need."""

    _target: type = field(default_factory=lambda: ResparseSplatDatamanager)
    cache_images_type: Literal["uint8", "float32"] = "uint8"


class ResparseSplatDatamanager(FullImageDatamanager):
    """Full images, from memory."""

    config: ResparseSplatDatamanagerConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: ResparseSplatDatamanagerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if not torch.cuda.is_available():
            # "cpu" means pinned memory, which only CUDA has; nerfstudio chooses it by itself from 500 images on
            self.config.cache_images = "gpu"

    def create_train_dataset(self) -> InputDataset:
        """The training views."""
        self.train_dataparser_outputs = _with_alpha(self.train_dataparser_outputs)
        return super().create_train_dataset()

    def create_eval_dataset(self) -> InputDataset:
        """The validation views, or the test views where a Blender scene has no others."""
        parser = self.config.dataparser
        if isinstance(parser, BlenderDataParserConfig) and not (parser.data / "transforms_val.json").is_file():
            self.test_split = "test"  # many copies of NeRF-synthetic leave the validation views out
        outputs = self.dataparser.get_dataparser_outputs(split=self.test_split)
        return self.dataset_type(_with_alpha(outputs), scale_factor=self.config.camera_res_scale_factor)


@dataclass
class DecaySchedulerConfig(ExponentialDecaySchedulerConfig):
    """Exponential decay in plain numbers."""

    _target: type = field(default_factory=lambda: DecayScheduler)


class DecayScheduler(ExponentialDecayScheduler):
    """nerfstudio's decay, whose numpy numbers end up in checkpoints: from torch 2.6 on `torch.load` refuses those."""

    def get_scheduler(self, optimizer: torch.optim.Optimizer, lr_init: float) -> LambdaLR:
        """As ExponentialDecayScheduler.get_scheduler."""
        factor = cast(LambdaLR, super().get_scheduler(optimizer, lr_init)).lr_lambdas[0]
        return LambdaLR(optimizer, lambda step: float(factor(step)))


def _with_alpha(outputs: DataparserOutputs) -> DataparserOutputs:
    """Let images keep their alpha channel: the model then puts truth and render before the same colour.

    Photographs already put before white cannot be trained with random backgrounds, splatfacto's default: nothing but
    white walls of Gaussians explains them.
    """
    if outputs.alpha_color is None:
        return outputs
    return replace(outputs, alpha_color=None, metadata={**outputs.metadata, ALPHA_COLOR: outputs.alpha_color})


def _viewmats(poses: Tensor) -> Tensor:
    """World to camera [C, 4, 4] with OpenCV axes from camera to world [C, 3, 4] with OpenGL axes.

    splatfacto's function for it is compiled by torch at the first call, which takes seconds and a C++ compiler.
    """
    rotation = (poses[:, :3, :3] * poses.new_tensor([1.0, -1.0, -1.0])).transpose(1, 2)
    top = torch.cat([rotation, -rotation @ poses[:, :3, 3:]], dim=2)  # [C, 3, 4]
    return torch.cat([top, top.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(len(top), 1, 4)], dim=1)


def _intrinsics(camera: Cameras, shrink: int) -> Tensor:
    """[C, 3, 3] in pixels of images `shrink` times smaller."""
    K = camera.get_intrinsics_matrices()
    return torch.cat([K[:, :2] / shrink, K[:, 2:]], dim=1)


def _filled_depth(depth: Tensor, alpha: Tensor) -> Tensor:
    """The depth with the largest one where nothing is, so that pictures of it keep their range."""
    return torch.where(alpha > 0, depth, depth.detach().max())


@functools.cache
def _lpips_network(device: torch.device) -> nn.Module | None:
    """LPIPS with AlexNet, or None where its weights cannot be had, which is said once."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        return LearnedPerceptualImagePatchSimilarity(normalize=True).to(device)
    except (OSError, RuntimeError) as error:  # no network; a broken download
        CONSOLE.print(
            f"[bold yellow]Warning: LPIPS is left out of the scores: the weights of its AlexNet are not in "
            f"{torch.hub.get_dir()}/checkpoints and cannot be downloaded ({error}). Put them there, or silence this "
            "with --pipeline.model.lpips False."
        )
        return None


def _adam(lr: float, lr_final: float | None = None, **schedule: Any) -> dict[str, Any]:
    """An optimizer's entry in the configuration; with lr_final its learning rate falls over the training."""
    scheduler = lr_final and DecaySchedulerConfig(lr_final=lr_final, max_steps=ITERATIONS, **schedule)
    return {"optimizer": AdamOptimizerConfig(lr=lr, eps=1e-15), "scheduler": scheduler}


resparse_splat = MethodSpecification(
    TrainerConfig(
        method_name="resparse-splat",
        max_num_iterations=ITERATIONS,
        steps_per_save=2_000,
        steps_per_eval_batch=0,
        steps_per_eval_image=500,
        steps_per_eval_all_images=2_500,
        mixed_precision=False,
        pipeline=VanillaPipelineConfig(
            datamanager=ResparseSplatDatamanagerConfig(
                # nerfstudio holds out a tenth; the splatting papers every eighth view
                dataparser=NerfstudioDataParserConfig(load_3D_points=True, eval_mode="interval", eval_interval=8),
            ),
            model=ResparseSplatModelConfig(),
        ),
        optimizers={  # splatfacto's rates
            "means": _adam(1.6e-4, 1.6e-6),
            "features_dc": _adam(2.5e-3),
            "features_rest": _adam(2.5e-3 / 20),
            "opacities": _adam(0.05),
            "scales": _adam(5e-3),
            "quats": _adam(1e-3),
            "camera_opt": _adam(1e-4, 5e-7, warmup_steps=300, lr_pre_warmup=0),
            "bilateral_grid": _adam(2e-3, 1e-4, warmup_steps=300, lr_pre_warmup=0),
        },
        machine=MachineConfig(device_type="cuda" if torch.cuda.is_available() else "cpu"),
        vis="tensorboard",  # of what it can be, the one that opens no port and ends with the training
    ),
    "Gaussian splatting for few views, with CUDA or on the processor alone.",
)
