"""The scenes: generated facades with exact truth, the real fern with made-up people, PhotoTourism folders of yours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from common import data as datasets
from common import files, seeds
from common.splatting import Camera, Scene, View, intrinsics, look_at
from common.splatting.generated import facade_world, room_rig, room_world
from common.splatting.raycast import Shape, World
from common.splatting.real import fern
from common.splatting.stereo import depth_range, sweep_depth
from papers.sparsegs_w import photos
from papers.sparsegs_w.photos import NEUTRAL, Light, Person
from papers.sparsegs_w.settings import Params

FACADE, FERN = "facade", "scene_fern_llff"
ARC, STAND, FOV = 70.0, (5.6, 7.0), 54.0  # degrees before the facade; distances; width of the image in degrees
AIM, JITTER = 3.2, 0.6  # how far to the sides photographers aim, and at random
PRACTICE = 1000  # the seeds of the diffusion model's scenes begin here
# of the stereo stand-in, as shares of the depth: smooth and pixel error; wrong patches a view, and their share of it
SMOOTH_ERROR, PIXEL_ERROR, PATCHES, PATCH_SHARE = 0.015, 0.005, 8, 0.08
PERSON_DEPTH = 0.5  # of the median depth: where stereo sees the people
CERTAIN, UNSURE = 2.0, (0.3, 1.6)  # log of the confidence: of right pixels, and the range for those of wrong patches
WEAK = 2  # a pixel is weakly observed where fewer photographs than this show its surface


@dataclass(frozen=True, eq=False)
class Pointmap:
    """What stereo says of a photograph: depth [H, W] along its axis, confidence [H, W] >= 1 on DUSt3R's scale."""

    depth: Tensor
    confidence: Tensor


@dataclass(frozen=True, eq=False)
class Case:
    """One scene with all that a method may ask about it, and what only the measurement may.

    scene    photographs as taken (the first is the reference, whose appearance the test views have), test views
    masks    [H, W] bool by photograph: where something transient was detected
    maps     stereo's pointmaps by photograph
    reference_tests   the test views have the reference's appearance; else each has its own (real collections)

    true_masks, clean   by photograph: pixels that a person touches; the view without people, in the reference's light
    lights   by photograph: its light
    world    the generated world; None for real photographs, as the others where they are not known
    weak     share of the test pixels that fewer than two photographs show
    """

    scene: Scene
    masks: dict[str, Tensor]
    maps: dict[str, Pointmap]
    reference_tests: bool = True
    true_masks: dict[str, Tensor] | None = None
    clean: dict[str, Tensor] | None = None
    lights: dict[str, Light] | None = None
    world: World | None = None
    weak: float | None = None

    @property
    def reference(self) -> View:
        """The photograph whose appearance everything is brought to."""
        return self.scene.train[0]

    def truth(self, cameras: Sequence[Camera]) -> Tensor:
        """[V, H, W, 3] what these cameras would photograph in the reference's light.

        Raises ValueError for real photographs.
        """
        if self.world is None:
            raise ValueError("nobody knows what a virtual camera sees of a real place: leave the arm oracle out.")
        return torch.stack([self.world.render(camera, "truth").image for camera in cameras])


def case(params: Params, seed: int) -> Case:
    """The scene of a seed, on the device of the parameters."""
    if params.dataset == "facade":
        return facade(params, seed)
    from papers.sparsegs_w import pretrained

    return pretrained.case(params)


def facade(params: Params, seed: int) -> Case:
    """The front of a house before a wooded hill, photographed by strangers from an arc of 70 degrees."""
    rig = photo_rig(params, seeds.generator(seed, "rig"))
    made = made_up(f"facade-{seed}", facade_in_the_wild(seed), rig, params.views, seed, lit=True)
    return replace(made, weak=weakly_observed(made))


def practice(params: Params, number: int) -> Case:
    """A scene for the diffusion model to learn from: facades and rooms in turn, other than any of `facade`.

    People stand in it too, but the light is the same in all photographs: what is bad about renders is to come from
    holes, wrong points and too few photographs. It has no test views.
    """
    seed = PRACTICE + number
    if number % 2 == 0:
        rig, world = photo_rig(params, seeds.generator(seed, "rig")), facade_in_the_wild(seed)
    else:
        rig, world = room_rig((params.width, params.height), params.views, 0), room_world(seed)
    return made_up(f"practice-{number}", world, rig[: params.views], params.views, seed, lit=False)


def made_up(name: str, world: World, rig: Sequence[Camera], views: int, seed: int, *, lit: bool) -> Case:
    """Photographs of a world from the first `views` cameras of a rig, clean test views from the others.

    lit  every photograph but the first has a light of its own
    """
    clean = [world.render(camera, f"photo_{index:02d}") for index, camera in enumerate(rig[:views])]
    tests = tuple(world.render(camera, f"test_{index:02d}") for index, camera in enumerate(rig[views:]))
    crowds, lights = strangers(clean, seed, lit=lit)
    maps = {view.name: stereo_standin(view, crowds[view.name], seed) for view in clean}
    made = spoilt(Scene(name, tuple(clean), tests, None, world.background), crowds, lights, maps, seed)
    return replace(made, world=world)


def strangers(
    views: Sequence[View], seed: int, *, lit: bool = True
) -> tuple[dict[str, list[Person]], dict[str, Light]]:
    """The people before each view, and its light; that of the first, the reference, is neutral."""
    crowds, lights = {}, {}
    for index, view in enumerate(views):
        draw = seeds.generator(seed, "strangers", view.name)
        crowds[view.name] = photos.people(view.camera.height, view.camera.width, draw)
        lights[view.name] = photos.light(draw) if lit and index else NEUTRAL
    return crowds, lights


def spoilt(
    scene: Scene, crowds: dict[str, list[Person]], lights: dict[str, Light], maps: dict[str, Pointmap], seed: int
) -> Case:
    """The case of a scene whose clean training views get people and light; depth and normals are taken away."""
    train, masks, true_masks = [], {}, {}
    for view in scene.train:
        crowd, size = crowds[view.name], (view.camera.height, view.camera.width)
        image = photos.photographed(view.image, crowd, lights[view.name])
        train.append(View(view.name, view.camera, image))
        true_masks[view.name] = photos.covered(crowd, *size)
        masks[view.name] = photos.detected(crowd, *size, seeds.generator(seed, "detected", view.name))
    clean = {view.name: view.image for view in scene.train}
    tests = tuple(View(view.name, view.camera, view.image) for view in scene.test)
    spoiled = replace(scene, train=tuple(train), test=tests)
    return Case(spoiled, masks, maps, true_masks=true_masks, clean=clean, lights=lights)


def weakly_observed(made: Case) -> float:
    """Share of the pixels of the test views whose surface fewer than WEAK photographs show, people not in between."""
    world, masks, counts = made.world, made.true_masks, []
    assert world is not None and masks is not None, "generated scenes have both"
    for test in made.scene.test:
        depth = world.render(test.camera, test.name, samples=1).depth
        assert depth is not None
        points = test.camera.backproject(depth).reshape(-1, 3)
        seen = torch.zeros(len(points))
        for view in made.scene.train:
            pixels, _ = view.camera.project(points)
            visible = world.visible(points, view.camera)
            column, row = torch.where(visible[:, None], pixels.floor().long(), 0).unbind(dim=1)
            seen += visible & ~masks[view.name][row, column]
        counts.append(seen)
    return float((torch.cat(counts) < WEAK).float().mean())


def facade_in_the_wild(seed: int) -> World:
    """`facade_world` on a wider square, with a wooded hill behind it in place of the sky: every pixel has a surface."""
    world = facade_world(seed)
    wall, ground = world.shapes[:2]
    greens = torch.tensor([[0.1, 0.18, 0.08], [0.3, 0.42, 0.2], [0.2, 0.25, 0.12]], dtype=torch.float64)
    trees = replace(wall.texture, pattern="waves", palette=greens, period=2.0, waves=0.3 * wall.texture.waves)
    middle, half = (torch.tensor(v, dtype=torch.float64) for v in ([0, 4.5, 3.0], [40.0, 0.2, 14.0]))
    hill = Shape("box", middle, half, torch.eye(3, dtype=torch.float64), trees, False)
    middle, half = (torch.tensor(v, dtype=torch.float64) for v in ([0, -5.0, -0.05], [40.0, 10.0, 0.05]))
    square = replace(ground, center=middle, half=half)
    return World((wall, square, *world.shapes[2:], hill), world.lamps, world.background)


def photo_rig(params: Params, draw: torch.Generator) -> list[Camera]:
    """`views` cameras on an arc before the facade, each aimed at another part of it; then `tests` likewise."""
    size = (params.width, params.height)
    K = intrinsics(*size, fov_x_rad=math.radians(FOV))

    def stand(place: float, aim: float) -> Camera:
        far, high, aside, up = torch.rand(4, generator=draw).tolist()
        around, distance = math.radians(ARC * (place - 0.5)), STAND[0] + (STAND[1] - STAND[0]) * far
        eye = (distance * math.sin(around), -distance * math.cos(around), 1.4 + 0.8 * high)
        target = (AIM * (2 * aim - 1) + JITTER * (2 * aside - 1), 0, 2.2 + 0.8 * up)
        return look_at(eye, target, (0, 0, 1), K, *size)

    last = max(1, params.views - 1)
    # every second part of the house, then those between: neighbours on the arc aim at different ones
    aims = [2 * index % params.views / last if params.views % 2 else index / last for index in range(params.views)]
    train = [stand(index / last, aim) for index, aim in enumerate(aims)]
    return train + [stand(place := (index + 0.5) / params.tests, 1 - place) for index in range(params.tests)]


def stereo_standin(view: View, crowd: Sequence[Person], seed: int) -> Pointmap:
    """The true depth as DUSt3R would find it: a smooth and a pixel error, wrong patches, and people in front.

    The people are as sure as the house. Wrong patches lie in front of the truth; stereo is less sure of them, yet some
    pass the threshold: these are the start's outliers.
    """
    assert view.depth is not None, "generated views have depth"
    truth, draw = view.depth, seeds.generator(seed, "stereo", view.name)
    shape = (truth.shape[0], truth.shape[1])
    error = SMOOTH_ERROR * photos.smooth_field(shape, draw) + PIXEL_ERROR * torch.randn(shape, generator=draw)
    depth = truth * (1 + error)
    sure = CERTAIN + 0.2 * photos.smooth_field(shape, draw)
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in shape), indexing="ij")
    radius = math.sqrt(PATCH_SHARE * truth.numel() / PATCHES / math.pi)
    for _ in range(PATCHES):
        row, column, nearer, doubt = torch.rand(4, generator=draw).tolist()
        inside = (rows - row * shape[0]).square() + (columns - column * shape[1]).square() < radius**2
        depth = torch.where(inside, depth * (0.5 + 0.4 * nearer), depth)
        sure = torch.where(inside, UNSURE[0] + (UNSURE[1] - UNSURE[0]) * doubt, sure)
    person = photos.covered(crowd, *shape)
    return Pointmap(torch.where(person, PERSON_DEPTH * truth.median(), depth), 1 + sure.exp() * (truth > 0))


def fern_case(params: Params, seed: int) -> Case:
    """Real photographs: LLFF's fern, with made-up light and people; points by plane sweep of the spoilt photographs.

    Raises common.data.MissingData where the set cannot be had.
    """
    scene = fern(views=params.views, factor=params.fern_factor)
    size = [8 * round(side / 8) for side in (scene.train[0].camera.width, scene.train[0].camera.height)]
    train, test = (tuple(view.resized(*size) for view in views) for views in (scene.train, scene.test))
    assert scene.points is not None
    near, far = depth_range(scene.points, train)
    made = spoilt(replace(scene, train=train, test=test, points=None), *strangers(train, seed), {}, seed)
    for index, view in enumerate(made.scene.train):
        found = sweep_depth(made.scene.train, index, near, far)
        made.maps[view.name] = Pointmap(found.depth, 1 + 10 * found.correlation.clamp_min(0))  # 3: a correlation of 0.2
    return made


def provenance(params: Params) -> tuple[str, str]:
    """The data set's name, and a digest of what was generated from or of the names and sizes of its files."""
    if params.dataset == "facade":
        values = [params.width, params.height, params.views, params.tests, params.seeds]
        return FACADE, files.digest([repr(values)])
    listed = sorted(path for path in Path(params.data_dir).rglob("*") if path.is_file())
    return params.dataset, files.digest([f"{path.name} {path.stat().st_size}" for path in listed])


def fern_sha256() -> str:
    """One digest of the fern's photographs and poses."""
    return datasets.registry()[FERN].sha256
