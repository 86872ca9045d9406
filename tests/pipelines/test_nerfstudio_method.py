"""The nerfstudio method as a user meets it: train, evaluate, export, resume, on a machine without CUDA or a network.

nerfstudio takes most of a minute to import on a slow core. So ns-train runs once, as the command it is, and what
follows runs in this process, through the classes behind ns-eval and ns-export.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
import math
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.splatting.cameras import Camera
from common.splatting.generated import room_scene
from common.splatting.ply import export_points, import_ply
from common.splatting.scene import Scene

if importlib.util.find_spec("nerfstudio") is None:
    pytest.skip("nerfstudio is not installed (NERFSTUDIO=0, or Python 3.13)", allow_module_level=True)

# nerfstudio 1.1.5 is older than the torch here and calls much that is deprecated
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).resolve().parents[2]
GROUP = "nerfstudio.method_configs"
NOWHERE = "http://127.0.0.1:9"  # the discard port: nobody listens
POINTS, STEPS = 1500, 150
# within so few steps the resolution doubles, Gaussians are added, harmonics join and images are scored
SCHEDULE = {
    "max-num-iterations": STEPS,
    "steps-per-eval-image": 75,
    "pipeline.model.resolution-schedule": 10,
    "pipeline.model.warmup-length": 5,
    "pipeline.model.refine-every": 10,
    "pipeline.model.stop-split-at": 25,
    "pipeline.model.sh-degree-interval": 20,
}
IN_PLACE = {"orientation-method": "none", "center-method": "none", "auto-scale-poses": "False"}


def flags(values: dict[str, Any]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def write_nerfstudio(folder: Path, scene: Scene) -> list[Camera]:
    """transforms.json with images and points. Returns the cameras in the order of the images' names."""
    (folder / "images").mkdir(parents=True)
    views = [*scene.train, *scene.test]
    frames = []
    for index, view in enumerate(views):
        name = f"images/{index:03d}.png"
        Image.fromarray((view.image * 255).round().byte().numpy()).save(folder / name)
        pose = torch.linalg.inv(view.camera.viewmat.double()) * torch.tensor([1.0, -1.0, -1.0, 1.0])  # OpenGL's axes
        frames.append({"file_path": name, "transform_matrix": pose.tolist()})
    assert scene.points is not None
    export_points(folder / "points.ply", scene.points)
    camera = views[0].camera
    K = camera.K.tolist()
    lens = {"w": camera.width, "h": camera.height, "fl_x": K[0][0], "fl_y": K[1][1], "cx": K[0][2], "cy": K[1][2]}
    meta = {**lens, "camera_model": "OPENCV", "ply_file_path": "points.ply", "frames": frames}
    (folder / "transforms.json").write_text(json.dumps(meta))
    return [view.camera for view in views]


@pytest.fixture(scope="module")
def alone() -> Any:
    """No CUDA, no network, no weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("https_proxy", NOWHERE)
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nerfstudio")


@pytest.fixture(scope="module")
def cameras(home: Path) -> list[Camera]:
    return write_nerfstudio(home / "room", room_scene(0, views=8, tests=2, size=(64, 48), points=POINTS))


@pytest.fixture(scope="module")
def training(home: Path, cameras: list[Camera]) -> str:
    """What ns-train printed."""
    place = ["--data", home / "room", "--output-dir", home / "outputs", "--timestamp", "once"]
    command = [Path(sys.executable).with_name("ns-train"), "resparse-splat", *place, *flags(SCHEDULE)]
    environment = {"CUDA_VISIBLE_DEVICES": "", "TORCH_HOME": str(home), "https_proxy": NOWHERE, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*map(str, command), "nerfstudio-data", *flags(IN_PLACE)],
        cwd=home,
        env=os.environ | environment | {"COLUMNS": "300"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def config(home: Path, training: str) -> Path:
    return home / "outputs/room/resparse-splat/once/config.yml"


@pytest.fixture(scope="module")
def scored(home: Path, config: Path, alone: None) -> dict[str, Any]:
    """What ns-eval leaves: its results, pictures [V, H, W, 3] of the truth and its renders, and what it printed."""
    from nerfstudio.scripts.eval import ComputePSNR

    printed, folder = io.StringIO(), home / "pictures"
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(home))
        ComputePSNR(load_config=config, output_path=home / "scores.json", render_output_path=folder).main()
    pictures = np.stack([np.asarray(Image.open(path), dtype=np.float64) / 255 for path in sorted(folder.glob("*.png"))])
    truth, renders = np.split(pictures, 2, axis=2)  # nerfstudio puts them side by side
    results = json.loads((home / "scores.json").read_text())["results"]
    return {"results": results, "truth": truth, "renders": renders, "printed": printed.getvalue()}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return -10 * math.log10(np.mean((a - b) ** 2))


def test_the_entry_point_is_declared_and_installed() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]
    installed = {entry.name: entry.value for entry in metadata.entry_points(group=GROUP)}
    assert declared == {"resparse-splat": "pipelines.nerfstudio_method:resparse_splat"}
    assert installed.items() >= declared.items(), "run make kernels: it installs the entry points of pyproject.toml"


def test_it_trains_on_the_processor_by_itself(training: str) -> None:
    assert "device_type='cpu'" in training
    grown = re.search(r"Step 20: (\d+) GSs duplicated, (\d+) GSs split. Now having (\d+) GSs", training)
    assert grown, "the strategy has not run"
    assert int(grown[1]) + int(grown[2]) > 0, "the strategy saw no gradients, or no radii"
    assert int(grown[3]) == POINTS + int(grown[1]) + int(grown[2])


def test_a_checkpoint_holds_tensors_and_plain_numbers(config: Path) -> None:
    (path,) = config.parent.glob("nerfstudio_models/*.ckpt")
    state = torch.load(path, weights_only=True)
    assert state["step"] == STEPS - 1
    assert "means" in state["schedulers"]
    assert not [name for name in state["pipeline"] if "lpips" in name]


def test_every_eighth_view_is_held_out_and_scored(scored: dict[str, Any], cameras: list[Camera], home: Path) -> None:
    results, truth = scored["results"], scored["truth"]
    photographs = [np.asarray(Image.open(home / f"room/images/{index:03d}.png")) / 255 for index in (0, 8)]
    assert np.abs(truth - np.stack(photographs)).max() < 1 / 255
    each = [psnr(a, b) for a, b in zip(truth, scored["renders"], strict=True)]
    assert results["psnr"] == pytest.approx(np.mean(each), abs=0.05)  # renders were rounded to 8 bits
    assert 0 < results["ssim"] < 1
    # it has learnt something in the right places: steps are few, but with a wrong axis it is worse than one colour
    assert results["psnr"] > psnr(truth, np.broadcast_to(truth.mean((0, 1, 2)), truth.shape)) + 1


def test_lpips_is_left_out_once_where_its_weights_are_not(scored: dict[str, Any]) -> None:
    assert not [name for name in scored["results"] if "lpips" in name]
    assert scored["printed"].count("LPIPS is left out") == 1


def test_the_exported_file_shows_what_was_scored(
    config: Path, home: Path, scored: dict[str, Any], cameras: list[Camera]
) -> None:
    from nerfstudio.scripts.exporter import ExportGaussianSplat

    ExportGaussianSplat(load_config=config, output_dir=home / "exports").main()
    model = import_ply(home / "exports/splat.ply")
    assert len(model) > 0
    assert model.sh_degree == 3
    renders = model.render([cameras[0], cameras[8]]).image.detach().clamp(0, 1).numpy()
    # ours on black, as theirs; half a step of 8 bits, and what the export leaves out below an opacity of 1/255
    assert np.abs(renders - scored["renders"]).max() < 0.5 / 255 + 0.004


def test_a_resumed_training_goes_on_with_its_gaussians(config: Path, alone: None, tmp_path: Path) -> None:
    import yaml
    from nerfstudio.engine.callbacks import TrainingCallbackLocation

    resumed = yaml.load(config.read_text(), Loader=yaml.Loader)
    resumed.load_dir, resumed.output_dir, resumed.vis = config.parent / "nerfstudio_models", tmp_path, "viewer"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(resumed), "is_viewer_enabled", lambda self: False)
        trainer = resumed.setup()
        trainer.setup()
    model, saved = trainer.pipeline.model, torch.load(next(resumed.load_dir.glob("*.ckpt")))
    assert trainer._start_step == STEPS
    for name, parameter in model.gauss_params.items():
        assert torch.equal(parameter, saved["pipeline"][f"_model.gauss_params.{name}"])
        assert trainer.optimizers.optimizers[name].param_groups[0]["params"][0] is parameter
    before = model.means.detach().clone()
    trainer.pipeline.train()
    for callback in trainer.callbacks:
        callback.run_callback_at_location(STEPS, TrainingCallbackLocation.BEFORE_TRAIN_ITERATION)
    trainer.train_iteration(STEPS)
    assert not torch.equal(model.means, before)


def write_blender(folder: Path, image: np.ndarray) -> None:
    """The layout of NeRF-synthetic with `image` [H, W, 4] uint8 three times for each part, without validation views."""
    for part in ("train", "test"):
        (folder / part).mkdir(parents=True)
        frames = []
        for index in range(3):
            Image.fromarray(image).save(folder / part / f"r_{index}.png")
            pose = np.eye(4)
            pose[2, 3] = 4  # looks down -z at the origin
            frames.append({"file_path": f"./{part}/r_{index}", "transform_matrix": pose.tolist()})
        (folder / f"transforms_{part}.json").write_text(json.dumps({"camera_angle_x": 0.7, "frames": frames}))


def pipeline_of(folder: Path, **model: Any) -> Any:
    """The method's pipeline on a Blender scene, with few Gaussians."""
    from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig

    from pipelines.nerfstudio_method import resparse_splat

    made = copy.deepcopy(resparse_splat.config.pipeline)
    made.datamanager.dataparser, made.datamanager.data = BlenderDataParserConfig(), folder
    made.datamanager.cache_images = "cpu"  # what nerfstudio changes it to from 500 images on
    settings = {"num_random": 50, "num_downscales": 0, "lpips": False} | model
    for name, value in settings.items():
        assert hasattr(made.model, name)
        setattr(made.model, name, value)
    made = made.setup(device="cpu", test_mode="val")
    made.model.optimizers = {}
    return made


@pytest.fixture(scope="module")
def blender(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scene whose photographs show nothing: noise under an alpha of 0."""
    folder = tmp_path_factory.mktemp("blender") / "nothing"
    image = np.random.default_rng(0).integers(0, 255, (24, 32, 4), dtype=np.uint8)
    image[..., 3] = 0
    write_blender(folder, image)
    return folder


def test_photographs_with_alpha_stand_before_the_background_of_the_render(blender: Path, alone: None) -> None:
    pipeline = pipeline_of(blender)
    manager, model = pipeline.datamanager, pipeline.model
    assert manager.test_split == "test"  # there are no validation views
    with torch.no_grad():
        model.opacities.fill_(-20.0)  # nothing to see
    pipeline.train()
    backgrounds = []
    for step in range(3):
        camera, batch = manager.next_train(step)
        outputs = model.get_outputs(camera)
        backgrounds.append(outputs["background"])
        assert float(model.get_loss_dict(outputs, batch)["main_loss"]) < 1e-5
    assert not torch.allclose(backgrounds[0], backgrounds[1])  # random ones
    pipeline.eval()
    metrics, images = pipeline.get_eval_image_metrics_and_images(0)
    assert metrics["psnr"] > 50
    assert torch.allclose(images["img"], torch.ones(()), atol=1e-3)  # on white, as Blender scenes are compared


@pytest.mark.parametrize(
    "settings",
    [
        {"sh_degree": 0},
        {"rasterize_mode": "antialiased", "use_absgrad": False},
        {"use_bilateral_grid": True, "output_depth_during_training": True, "background_color": "black"},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_splatfactos_switches_still_work(blender: Path, alone: None, settings: dict[str, Any]) -> None:
    pipeline = pipeline_of(blender, **settings)
    pipeline.train()
    _, losses, _ = pipeline.get_train_loss_dict(0)
    sum(losses.values()).backward()
    assert pipeline.model.opacities.grad.abs().max() > 0
    assert torch.isfinite(pipeline.model.means.grad).all()
    pipeline.model.step = 1
    pipeline.model.step_post_backward(1)
    assert pipeline.model.strategy_state["count"].max() == 1
    assert pipeline.model.strategy_state["grad2d"].max() > 0


def test_the_first_step_resets_no_opacities(blender: Path, alone: None) -> None:
    pipeline = pipeline_of(blender, cull_alpha_thresh=0.005)  # the reset is to twice that, below the 0.02 at the start
    pipeline.train()
    _, losses, _ = pipeline.get_train_loss_dict(0)
    sum(losses.values()).backward()
    before = pipeline.model.opacities.detach().clone()
    pipeline.model.step_post_backward(0)
    assert torch.equal(pipeline.model.opacities, before)


def test_a_crop_box_beside_everything_shows_the_background(blender: Path, alone: None) -> None:
    from nerfstudio.data.scene_box import OrientedBox

    pipeline = pipeline_of(blender)
    pipeline.eval()
    camera, _ = pipeline.datamanager.next_eval_image(0)
    box = OrientedBox.from_params((100.0, 0.0, 0.0), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    everything = pipeline.model.get_outputs_for_camera(camera)
    nothing = pipeline.model.get_outputs_for_camera(camera, box)
    assert float(everything["accumulation"].max()) > 0.1
    assert nothing["rgb"].shape == everything["rgb"].shape
    assert torch.equal(nothing["rgb"], torch.ones(24, 32, 3))


def test_bad_starts_are_refused(blender: Path, alone: None) -> None:
    with pytest.raises(ValueError, match="sh_degree 4"):
        pipeline_of(blender, sh_degree=4)
    with pytest.raises(ValueError, match="3 initial points; expected 4 or more"):
        pipeline_of(blender, num_random=3)


def test_points_in_one_place_have_a_size(alone: None) -> None:
    from pipelines.nerfstudio_method import ResparseSplatModelConfig

    seeds = (torch.zeros(5, 3), torch.zeros(0, 3))  # and no colours
    model = ResparseSplatModelConfig().setup(
        scene_box=None, num_train_data=1, metadata={}, device="cpu", seed_points=seeds
    )
    assert torch.isfinite(model.scales).all()
    assert torch.allclose(model.colors, torch.full((5, 3), 0.5))
