"""The objects: albums that networks learn from, and held-out cases with all that may be asked about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from common import data as datasets
from common import files, seeds
from common.splatting import Camera, Scene, SceneError, View, visual_hull
from common.splatting import chair as real_chair
from papers.sparse3d import chairs, co3d
from papers.sparse3d.method import circle
from papers.sparse3d.settings import Params

REAL = "scene_chair_blender"
REAL_SIZE, REAL_SCALE = 800, 0.8  # pixels as rendered; its chair is about 1.2 units from the middle, ours 1
FIRST_TRAINED = 10_000  # the numbers of the chairs that train; held-out chairs have those of the seeds
OTHER = 5_000  # added to a seed: the chair whose features shuffled control gets
CELLS = 48  # of the visual hull along a side of its box
LOW, HIGH = (-1.0, -1.0, -1.0), (1.0, 1.0, 1.0)


class Album(NamedTuple):
    """Pictures of O objects, N of each: images [O, N, 3, H, W] in 0..1, masks [O, N, H, W], viewmats, Ks."""

    images: Tensor
    masks: Tensor
    viewmats: Tensor
    Ks: Tensor

    def to(self, device: str) -> Album:
        """The same on a device."""
        return Album(*(values.to(device) for values in self))


@dataclass(frozen=True, eq=False)
class Case:
    """One held-out object.

    scene    photographs, test views, and points on the visual hull of the photographs' masks
    circle   cameras on the path around the object
    truth    [N, H, W, 3] what these would photograph, None where nobody knows
    """

    scene: Scene
    circle: list[Camera]
    truth: Tensor | None = None


def album_parts(params: Params, at_once: int = 16) -> list[tuple[int, int]]:
    """Ranges of training objects, each a unit of work."""
    count = params.train_objects
    return [(first, min(first + at_once, count)) for first in range(0, count, at_once)]


def album(params: Params, first: int, end: int) -> Album:
    """Training objects `first` to `end` (not included); of CO3Dv2 as many as there are."""
    if params.dataset == "co3dv2":
        names = co3d.sequences(_root(params), params.category, params.subset, "train")[first:end]
        groups = [co3d.views(_root(params), params.category, n, params.size, params.train_views) for n in names]
    else:
        groups = []
        for number in range(FIRST_TRAINED + first, FIRST_TRAINED + end):
            world, draw = chairs.chair(number), seeds.generator(number, "cameras")
            stands = chairs.anywhere(params.train_views, params.size, draw)
            groups.append([world.render(camera, f"{number}-{i}") for i, camera in enumerate(stands)])
    return bound(groups)


def bound(groups: Sequence[Sequence[View]]) -> Album:
    """Views of several objects, equally many of one size each, as an album. Raises ValueError for none."""
    if not groups:
        raise ValueError("an album got no objects, expected at least one; look at train_objects and the data.")
    masks = [[_mask(view) for view in views] for views in groups]
    return Album(
        torch.stack([torch.stack([view.image.movedim(-1, 0) for view in views]) for views in groups]),
        torch.stack([torch.stack(row) for row in masks]),
        torch.stack([torch.stack([view.camera.viewmat for view in views]) for views in groups]),
        torch.stack([torch.stack([view.camera.K for view in views]) for views in groups]),
    )


def joined(albums: Sequence[Album]) -> Album:
    """Albums of the same size of pictures as one."""
    return Album(*(torch.cat(column) for column in zip(*albums, strict=True)))


def case(params: Params, views: int, seed: int) -> Case:
    """The held-out object of a seed with so many photographs; the first of more are those of fewer."""
    if params.dataset == "co3dv2":
        return _co3d_case(params, views, seed)
    world, draw = chairs.chair(seed), seeds.generator(seed, "held out")
    tests = chairs.all_around(params.tests, params.size, draw)
    taken = chairs.inputs(views, params.size, draw)
    train = [world.render(camera, f"input {i}") for i, camera in enumerate(taken)]
    test = [world.render(camera, f"test {i}") for i, camera in enumerate(tests)]
    path = circle(train, params.circle)
    truth = torch.stack([world.render(camera, "circle").image for camera in path])
    return _placed(params, Case(_scene(params, f"chair-{seed}", train, test, seed), path, truth))


def other_case(params: Params, views: int, seed: int) -> Case:
    """Another held-out object, for control by the wrong features."""
    if params.dataset == "co3dv2":
        return case(params, views, seed + len(params.seeds))
    return case(params, views, seed + OTHER)


def real_case(params: Params, views: int) -> Case:
    """NeRF-synthetic's chair, small: of no category that was learnt, and with another look.

    Raises common.data.MissingData where the set cannot be had.
    """
    scene = real_chair(views=views, factor=REAL_SIZE / params.size)
    every = max(1, len(scene.test) // params.tests)
    train = [scaled(view, REAL_SCALE) for view in scene.train]
    test = [scaled(view, REAL_SCALE) for view in scene.test[::every][: params.tests]]
    return _placed(params, Case(_scene(params, "real chair", train, test, 0), circle(train, params.circle)))


def real_sha256() -> str:
    """One digest of the real chair's files."""
    return datasets.registry()[REAL].sha256


def scaled(view: View, by: float) -> View:
    """The view in a world that is `by` times as large; the picture stays."""
    viewmat = view.camera.viewmat.clone()
    viewmat[:3, 3] *= by
    depth = None if view.depth is None else by * view.depth
    return replace(view, camera=replace(view.camera, viewmat=viewmat), depth=depth)


def provenance(params: Params) -> tuple[str, str]:
    """The data set's name, and a digest of what was generated from or of the annotations' names and sizes."""
    if params.dataset == "chairs":
        shape = [params.size, params.train_objects, params.train_views, params.tests, params.views, params.seeds]
        return "chairs", files.digest([repr(shape)])
    listed = sorted(path for path in (_root(params) / params.category).glob("*.jgz"))
    return "co3dv2", files.digest([f"{path.name} {path.stat().st_size}" for path in listed])


def _co3d_case(params: Params, views: int, seed: int) -> Case:
    names = co3d.sequences(_root(params), params.category, params.subset, "test")
    if seed >= len(names):
        raise ValueError(
            f"seed {seed} asks for held-out sequence {seed} of {params.category} ({params.subset}), which has "
            f"{len(names)}; expected smaller seeds, or another subset."
        )
    found = co3d.views(_root(params), params.category, names[seed], params.size, max(params.views) + params.tests)
    # the photographs are spread over the sequence, and those of fewer are the first of more
    spread = torch.linspace(0, len(found) - 1, max(params.views) + 1).round().int().tolist()[: max(params.views)]
    train = [found[place] for place in spread[:views]]
    test = [view for place, view in enumerate(found) if place not in spread]
    scene = _scene(params, f"{params.category}-{names[seed]}", train, test, seed)
    return _placed(params, Case(scene, circle(train, params.circle)))


def _placed(params: Params, made: Case) -> Case:
    """The case on the device of the parameters."""
    path = [camera.to(params.device) for camera in made.circle]
    truth = None if made.truth is None else made.truth.to(params.device)
    return Case(made.scene.to(params.device), path, truth)


def _scene(params: Params, name: str, train: Sequence[View], test: Sequence[View], seed: int) -> Scene:
    hull = visual_hull(train, low=LOW, high=HIGH, cells=CELLS, count=params.points, seed=seed)
    return Scene(name, tuple(train), tuple(test), hull, torch.ones(3))


def _mask(view: View) -> Tensor:
    if view.mask is None:
        raise SceneError(f"view {view.name} has no mask; expected one in every training picture.")
    return view.mask


def _root(params: Params) -> Path:
    if not params.data_dir:
        raise ValueError(
            "data_dir is empty; co3dv2 needs the folder that holds its categories (apple/, ball/, ...), as the "
            "authors' download script leaves them: --set data_dir=FOLDER"
        )
    return Path(params.data_dir)
