"""The scenes with their priors: generated courtyards with exact truth, the real fern, COLMAP scenes of yours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from common import data as datasets
from common import files
from common.splatting import Camera, Scene, View
from common.splatting.colmap import find_model, load_colmap
from common.splatting.generated import facade_scene, object_scene, room_rig, room_world, surface_points
from common.splatting.raycast import World
from common.splatting.real import fern
from common.splatting.stereo import depth_range
from common.splatting.virtual import virtual_cameras
from papers.lm_gaussian import priors
from papers.lm_gaussian.method import Mono
from papers.lm_gaussian.priors import Stereo
from papers.lm_gaussian.settings import Params

WALL = (7.0, 7.0, 4.0)  # half sizes of the courtyard, so that walls are two to three times as far as the furniture
SFM_POINTS, SFM_NOISE = 600, 0.01  # what structure from motion would find, before two views must share a point
COURTYARD, FERN = "courtyard", "scene_fern_llff"
PRIOR_SCENES = 1000  # the seeds of the diffusion model's scenes begin here


@dataclass(frozen=True, eq=False)
class Case:
    """One scene with all that a method may ask about it.

    scene    training and test views; its points are sparse ones, as from structure from motion
    stereo, mono   by name of the training view; the `perfect_` ones are the truth, None for real photographs
    virtual  cameras between the training views
    truth    [V, H, W, 3] what they would photograph, None for real scenes
    unseen   the share of the test pixels that no training view sees, None for real scenes
    """

    scene: Scene
    stereo: dict[str, Stereo]
    mono: dict[str, Mono]
    virtual: list[Camera]
    perfect_stereo: dict[str, Stereo] | None = None
    perfect_mono: dict[str, Mono] | None = None
    truth: Tensor | None = None
    unseen: float | None = None


def scenes(params: Params) -> list[str]:
    """The scenes of a run: the subfolders of data_dir, or one courtyard.

    Raises ValueError where data_dir is missing or holds no scene.
    """
    if params.dataset == "courtyard":
        return [COURTYARD]
    root = Path(params.data_dir)
    found = sorted(path.name for path in root.glob("*/") if find_model(path)) if params.data_dir else []
    if not found:
        raise ValueError(
            f"data_dir is {params.data_dir!r}; {params.dataset} needs a folder with one subfolder a scene, each with "
            "photographs in images/ and a COLMAP model in sparse/0: --set data_dir=FOLDER"
        )
    return found


def case(params: Params, scene: str, views: int, seed: int) -> Case:
    """A scene of `scenes` with `views` training views, on the device of the parameters."""
    if params.dataset == "courtyard":
        return courtyard(params, views, seed)
    from papers.lm_gaussian import pretrained

    return pretrained.case(params, load_colmap(Path(params.data_dir) / scene, views=views, factor=params.factor))


def courtyard(params: Params, views: int, seed: int) -> Case:
    """Furniture in the middle of a walled yard, photographed from all sides; new textures and sizes every seed."""
    world = courtyard_world(seed)
    rig = room_rig((params.width, params.height), views, params.tests)
    shots = [world.render(camera, f"view_{index:02d}") for index, camera in enumerate(rig)]
    train, test = shots[:views], shots[views:]
    sparse = surface_points(world, train, SFM_POINTS, seed=seed, noise=SFM_NOISE).seen_by([view.name for view in train])
    virtual = virtual_cameras(train, params.between, closed=params.closed)
    return Case(
        Scene(f"courtyard-{seed}", tuple(train), tuple(test), sparse, world.background),
        {view.name: priors.stereo_standin(view, seed) for view in train},
        {view.name: priors.mono_standin(view, seed) for view in train},
        virtual,
        {view.name: priors.stereo_standin(view, seed, perfect=True) for view in train},
        {view.name: priors.mono_standin(view, seed, perfect=True) for view in train},
        torch.stack([world.render(camera, "virtual").image for camera in virtual]),
        _unseen(world, train, test),
    )


def courtyard_world(seed: int) -> World:
    """`room_world` with its walls moved outwards and their texture enlarged."""
    world = room_world(seed)
    wall = world.shapes[0]
    half = torch.tensor(WALL, dtype=torch.float64)
    texture = replace(wall.texture, period=3 * wall.texture.period, waves=wall.texture.waves / 3)
    wall = replace(wall, center=half * half.new_tensor([0, 0, 1]), half=half, texture=texture)
    return World((wall, *world.shapes[1:]), world.lamps, world.background)


def fern_case(params: Params) -> Case:
    """Real photographs, forward-facing: LLFF's fern with plane-sweep stereo in place of the networks.

    Raises common.data.MissingData where the set cannot be had.
    """
    scene = fern(views=params.fern_views, factor=params.fern_factor)
    width, height = (8 * round(size / 8) for size in (scene.train[0].camera.width, scene.train[0].camera.height))
    scene = replace(
        scene,
        train=tuple(view.resized(width, height) for view in scene.train),
        test=tuple(view.resized(width, height) for view in scene.test),
    )
    assert scene.points is not None
    stereo, mono = priors.plane_sweep(scene.train, *depth_range(scene.points, scene.train))
    return Case(scene, stereo, mono, virtual_cameras(scene.train, params.between, closed=False))


def provenance(params: Params) -> tuple[str, str]:
    """The data set's name, and a digest of what was generated from or of the names and sizes of its files."""
    if params.dataset == "courtyard":
        return COURTYARD, files.digest([repr([params.width, params.height, params.tests, params.views, params.seeds])])
    listed = sorted(path for path in Path(params.data_dir).rglob("*") if path.is_file())
    return params.dataset, files.digest([f"{path.name} {path.stat().st_size}" for path in listed])


def fern_sha256() -> str:
    """One digest of the fern's photographs and poses."""
    return datasets.registry()[FERN].sha256


def prior_scenes(params: Params) -> list[Scene]:
    """What the small diffusion model learns from: facades and objects on a platform in turn, never courtyards."""
    options = {"size": (params.width, params.height), "views": 4, "tests": 4, "points": 3000, "noise": 0.02}
    makers = (facade_scene, object_scene)
    return [makers[number % 2](PRIOR_SCENES + number, **options) for number in range(params.prior_scenes)]


def _unseen(world: World, train: Sequence[View], test: Sequence[View]) -> float:
    """Share of the pixels of the test views whose surface no training view sees."""
    seen = []
    for view in test:
        assert view.depth is not None
        points = view.camera.backproject(view.depth).reshape(-1, 3)
        seen.append(torch.stack([world.visible(points, other.camera) for other in train]).any(dim=0))
    return 1 - float(torch.cat(seen).float().mean())
