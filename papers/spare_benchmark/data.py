"""The scenes of the benchmark, and what every entrant gets with them: the same points and the same depth prior."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from common import data as datasets
from common import seeds
from common.splatting import Camera, PointCloud, Scene, View, real, splits
from common.splatting.generated import object_rig, object_world, surface_points
from common.splatting.hull import visual_hull
from common.splatting.llff import load_llff
from common.splatting.priors import StandIn, point_depth, stand_in, stereo_depths
from common.splatting.raycast import World
from common.splatting.spare import image_name, load_spare
from common.splatting.stereo import depth_range, plane_sweep
from papers.spare_benchmark import method
from papers.spare_benchmark.settings import Params

REGISTERED = {
    "fern": "scene_fern_llff",
    "fern_coarse": "scene_fern_llff",
    "chair": "scene_chair_blender",
    "brighton": "scene_brighton_drone",
}
SPARE_LIKE = 1.25  # radius of the generated platform, the unit of the clouds' noise
CLOUD = 4  # a cloud holds so many times the points that a training starts from
DTU_FACTOR, SPARE_FACTOR = 4, 1  # the tables of the splatting papers are at 1/4, SpaRe is scored at full size


class MissingScenes(FileNotFoundError):
    """The folder of a published data set is not there."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A scene with what comes from its training views alone.

    scene      its points are None: `start` draws them
    cloud      dense points
    sparse     those of structure from motion, or None
    prior      the depth stand-in; `exact` is the one without errors, where the truth is known
    forward    all cameras look the same way; otherwise they stand around something
    random_background   one can be used: the photographs are filled to the rim, or their masks are alpha
    """

    scene: Scene
    cloud: PointCloud
    sparse: PointCloud | None
    prior: StandIn
    exact: StandIn | None
    forward: bool
    random_background: bool


def scene_names(params: Params, set_: str) -> list[str]:
    """The scenes of a set."""
    if set_ == "generated":
        return [f"generated_{number:02d}" for number in range(params.scenes)]
    if set_ == "llff":
        return list(method.LLFF_SCENES)
    if set_ == "dtu":
        return method.dtu_scenes()
    if set_ == "spare":
        return sorted(splits.spare(_spare_split(_folder(params, "spare"))))
    return [set_]


def prepare(params: Params, set_: str, views: int, name: str) -> Prepared:
    """One scene of a set with its points and its depth prior.

    Raises MissingScenes where a published set is not in `params.data_dir`, common.data.MissingData for a registered
    one that cannot be had, ValueError for an unknown set.
    """
    if set_ == "generated":
        return _generated(params, views, name)
    if set_ == "chair":
        scene = real.chair(views=views, factor=params.factor_chair)
        hull = visual_hull(scene.train, count=CLOUD * params.points)
        depths = [point_depth(hull.positions, view.camera) for view in scene.train]
        return _prepared(scene, hull, depths, "visual hull", forward=False, random_background=True)
    if set_ in ("fern", "fern_coarse", "brighton", "llff"):
        scene = _photographs(params, set_, views, name)
        if scene.points is None:
            raise ValueError(f"{name} at {views} views: its model has no point that two training views saw.")
        near, far = depth_range(scene.points, scene.train)
        return _stereo(scene, near, far, forward=True, random_background=True)
    if set_ in ("dtu", "spare"):
        scene = _spare_layout(params, set_, views, name)
        near, far = _around_focus([view.camera for view in scene.train])
        return _stereo(scene, near, far, forward=False, random_background=False)
    raise ValueError(f"no set {set_!r}; expected one of {', '.join(method.VIEW_COUNTS)}.")


def start(params: Params, prepared: Prepared, seed: int, *, sparse: bool = False) -> Scene:
    """The scene with the points that a seed draws, on the run's device; `sparse`: all those of structure from motion.

    Raises ValueError where sparse points are asked for and there are none.
    """
    cloud = prepared.cloud
    if sparse:
        if prepared.sparse is None:
            raise ValueError(f"scene {prepared.scene.name} has no points from structure from motion.")
        cloud = prepared.sparse
    elif len(cloud) > params.points:
        generator = seeds.generator(seed, "points", prepared.scene.name)
        cloud = cloud.select(torch.randperm(len(cloud), generator=generator)[: params.points])
    return replace(prepared.scene, points=cloud).to(params.device)


def write_split(path: Path, views: int, scenes: Sequence[str]) -> Path:
    """Write a split file in the published schema; returns its path."""
    path.write_text(json.dumps(method.split_file(views, scenes), indent=1))
    return path


def unseen_share(name: str, scene: Scene) -> float:
    """The share of the test views' surface pixels whose point no training view sees, for a generated scene."""
    world, total, hidden = generated_world(name), 0, 0
    for view in scene.test:
        assert view.depth is not None, "generated views have depth"
        points = view.camera.backproject(view.depth)[view.depth > 0]
        seen = torch.stack([world.visible(points, other.camera) for other in scene.train]).any(dim=0)
        total, hidden = total + len(points), hidden + int((~seen).sum())
    return hidden / total


def generated_world(name: str) -> World:
    """The world of `generated_03` and so on."""
    return object_world(int(name.rpartition("_")[2]))


def registered_hash(set_: str) -> tuple[str, str] | None:
    """Registered name and sha256 of a set, for the record; None for those that are not registered."""
    if set_ not in REGISTERED:
        return None
    found = datasets.registry()[REGISTERED[set_]]
    joined = "".join(sorted(file.sha256 for file in found.files))
    return REGISTERED[set_], joined


def folder_hash(params: Params, set_: str) -> str:
    """A digest of names and sizes of the files of a set in `params.data_dir`; contents would take minutes to read."""
    root = _folder(params, set_)
    listed = sorted(f"{path.relative_to(root).as_posix()} {path.stat().st_size}" for path in root.rglob("*.png"))
    return hashlib.sha256("\n".join(listed).encode()).hexdigest()


def _generated(params: Params, views: int, name: str) -> Prepared:
    world, rig = generated_world(name), object_rig((params.width, params.width * 3 // 4))
    with tempfile.TemporaryDirectory() as folder:
        split = splits.spare(write_split(Path(folder) / "split.json", views, [name]))[name]
    train, test = (
        tuple(world.render(rig[index], image_name(index, split.dataset)) for index in indices)
        for indices in (split.train, split.test)
    )
    noise = params.point_noise * SPARE_LIKE
    count = CLOUD * params.points
    cloud = surface_points(world, train, count, seed=0, noise=noise, outliers=params.outliers)
    scene = Scene(name, train, test, None, world.background)
    depths = [view.depth for view in train if view.depth is not None]
    prior, exact = (
        stand_in(title, train, depths, error=error, generator=seeds.generator(0, "prior", name))
        for title, error in (("truth with slow errors", params.prior_error), ("truth", 0.0))
    )
    return Prepared(scene, cloud, None, prior, exact, forward=False, random_background=False)


def _stereo(scene: Scene, near: float, far: float, *, forward: bool, random_background: bool) -> Prepared:
    cloud = plane_sweep(scene.train, near, far, count=None)
    depths = stereo_depths(scene.train, near, far)
    return _prepared(scene, cloud, depths, "plane-sweep stereo", forward=forward, random_background=random_background)


def _prepared(
    scene: Scene, cloud: PointCloud, depths: Sequence[Tensor], made_of: str, *, forward: bool, random_background: bool
) -> Prepared:
    generator = seeds.generator(0, "prior", scene.name)
    prior = stand_in(made_of, scene.train, depths, error=0.0, generator=generator)  # stereo has errors of its own
    bare = replace(scene, points=None)
    return Prepared(bare, cloud, scene.points, prior, None, forward=forward, random_background=random_background)


def _photographs(params: Params, set_: str, views: int, name: str) -> Scene:
    if set_ in ("fern", "fern_coarse"):
        return real.fern(views=views, factor=params.factor_fern * (2 if set_ == "fern_coarse" else 1))
    if set_ == "brighton":
        return real.brighton(views=views, factor=params.factor_brighton)
    return load_llff(_folder(params, "llff") / name, factor=8, views=views)


def _spare_layout(params: Params, set_: str, views: int, name: str) -> Scene:
    root = _folder(params, set_)
    if set_ == "spare":
        return load_spare(root, name, split=_spare_split(root, views), factor=SPARE_FACTOR)
    with tempfile.TemporaryDirectory() as folder:
        split = write_split(Path(folder) / "split.json", views, method.dtu_scenes())
        scene = load_spare(root, name, split=split, factor=DTU_FACTOR)
    return replace(scene, test=tuple(_masked(params, name, view) for view in scene.test))


def _masked(params: Params, name: str, view: View) -> View:
    """A DTU view with its object mask, `dtu_masks/scan8/014.png` for `rect_015_3_r5000.png`."""
    import numpy as np
    from PIL import Image

    path = _folder(params, "dtu_masks") / name / f"{int(view.name.split('_')[1]) - 1:03d}.png"
    if not path.is_file():
        raise MissingScenes(f"{path}: no such mask; DTU is scored over the object, with the masks of IDR or RegNeRF.")
    size = (view.camera.width, view.camera.height)
    pixels = np.asarray(Image.open(path).convert("L").resize(size, Image.Resampling.BOX), dtype=np.float32) / 255
    return replace(view, mask=torch.from_numpy(pixels))


def _folder(params: Params, name: str) -> Path:
    path = Path(params.data_dir) / name
    if not params.data_dir or not path.is_dir():
        raise MissingScenes(
            f"the set {name} is read from {path if params.data_dir else f'data_dir/{name}'}, which is not there; say "
            "--set data_dir=FOLDER, the folder that holds llff, dtu, dtu_masks and spare."
        )
    return path


def _spare_split(root: Path, views: int | None = None) -> Path:
    tracks = {count: track for track, count in method.TRACKS.items()}
    pattern = f"*rack{tracks[views] if views else 1}*split*.json"
    found = sorted(root.glob(pattern))
    if len(found) != 1:
        raise MissingScenes(f"{root}: {len(found)} files named {pattern}; expected the split of one set.")
    return found[0]


def _around_focus(cameras: Sequence[Camera]) -> tuple[float, float]:
    """Near and far depth for an object that all cameras look at: 0.5 and 1.6 times the distance to it."""
    centers = torch.stack([camera.center for camera in cameras]).double()
    axes = torch.stack([camera.forward for camera in cameras]).double()
    across = torch.eye(3, dtype=torch.float64) - axes[:, :, None] * axes[:, None, :]
    focus = torch.linalg.solve(across.sum(dim=0), (across @ centers[:, :, None]).sum(dim=0))[:, 0]
    distance = float((centers - focus).norm(dim=1).median())
    return 0.5 * distance, 1.6 * distance
