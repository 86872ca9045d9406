"""Monocular depth as sparse-view papers use it, and named stand-ins for machines without the networks' weights.

A depth network says of one photograph how near each pixel is, as a *disparity* up to an unknown factor and shift, with
errors that vary slowly over the image. `stand_in` makes exactly that out of depth maps that come from elsewhere: from
stereo of the training views (`stereo_depths`), from points, or, for generated scenes, from the truth. A prior made
from the truth leaks the answer, so runs that use one also show `error=0` and `shuffled` beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from common.splatting.cameras import Camera
from common.splatting.scene import View
from common.splatting.stereo import sweep_depth

__all__ = [
    "DepthPrior",
    "NetworkPrior",
    "StandIn",
    "point_depth",
    "slow_field",
    "smoothed",
    "stand_in",
    "stereo_depths",
]

RANGE = 1000.0  # of the disparities: MiDaS's run to about a thousand, and FSGS's constant of 200 is meant for that
LOW_FREQUENCY = 4  # nodes along each side of the image of the errors' field
MEDIAN = 5  # pixels a side of the window that smooths stereo
MIXED_BANDS = (3, 0, 4, 1, 5, 2)  # for `shuffled`; no band stays where it was


class DepthPrior(Protocol):
    """What an entrant asks. A disparity is larger where the scene is nearer; the weight is 0 where nothing is known."""

    def view(self, name: str) -> tuple[Tensor, Tensor]:
        """Disparity and weight [H, W] of a training view."""
        ...

    def at(self, camera: Camera, image: Tensor) -> tuple[Tensor, Tensor]:
        """Disparity and weight [H, W] for a camera without a photograph; `image` [H, W, 3] is its render."""
        ...


@dataclass(frozen=True, eq=False)
class StandIn:
    """A `DepthPrior` without a network.

    name     says what it is made of
    maps     disparity and weight [H, W] by view
    points   [P, 3] where the maps say that the surfaces are: what other cameras are told
    mixed    whether the maps are mixed up, see `shuffled`
    """

    name: str
    maps: Mapping[str, tuple[Tensor, Tensor]]
    points: Tensor
    mixed: bool = False
    _known: dict[Camera, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def view(self, name: str) -> tuple[Tensor, Tensor]:
        return self._placed(self.maps[name])

    def at(self, camera: Camera, image: Tensor) -> tuple[Tensor, Tensor]:
        """The depth of the points from there, kept for each camera. A network would look at `image`; this does not."""
        if camera not in self._known:
            depth = point_depth(self.points, camera)
            known = depth > 0
            nearest = depth[known].amin() if bool(known.any()) else depth.new_ones(())
            self._known[camera] = self._placed((RANGE * known * nearest / depth.clamp_min(1e-12), known.float()))
        return self._known[camera]

    def shuffled(self) -> StandIn:
        """The control: the same values in the wrong places, rows and columns cut into six bands each and mixed."""
        return replace(self, name=f"{self.name}, shuffled", mixed=True, _known={})

    def _placed(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return (_mixed(pair[0]), _mixed(pair[1])) if self.mixed else pair


class NetworkPrior:
    """The real thing: a monocular network that is asked about the photographs, and about renders for other cameras.

    network   image [H, W, 3] in 0..1 -> disparity [H, W] in MiDaS's range, see `common.models.depth`
    """

    def __init__(self, name: str, network: Callable[[Tensor], Tensor], views: Sequence[View]):
        self.name, self._network = name, network
        self._maps = {view.name: network(view.image) for view in views}
        self._weights = {view.name: _covered(view) for view in views}

    def view(self, name: str) -> tuple[Tensor, Tensor]:
        return self._maps[name], self._weights[name]

    def at(self, camera: Camera, image: Tensor) -> tuple[Tensor, Tensor]:
        disparity = self._network(image.detach().clamp(0, 1))
        return disparity, torch.ones_like(disparity)


def stand_in(
    name: str, views: Sequence[View], depths: Sequence[Tensor], *, error: float, generator: torch.Generator
) -> StandIn:
    """A monocular-like prior from depth maps.

    depths   [H, W] for each view, along the optical axis; 0 where nothing is known
    error    standard deviation of the slow errors, as a share of that of the view's disparity; 0: none

    Each view's disparity gets a factor and a shift of its own, which no loss may depend on.

    Raises ValueError where the maps do not fit the views or a view's map knows nothing.
    """
    if len(views) != len(depths) or error < 0:
        raise ValueError(
            f"stand_in: {len(views)} views, {len(depths)} depth maps, error {error}; expected as many, >= 0."
        )
    maps, points = {}, []
    for view, depth in zip(views, depths, strict=True):
        known = depth > 0
        if depth.shape != view.image.shape[:2] or not bool(known.any()):
            raise ValueError(
                f"stand_in: view {view.name} is {list(view.image.shape[:2])}, its depth {list(depth.shape)} with "
                f"{int(known.sum())} known pixels; expected its size, and some."
            )
        disparity = torch.where(known, 1 / depth.clamp_min(1e-12), 0.0)
        wrong = disparity + error * disparity[known].std() * slow_field(depth.shape, generator, LOW_FREQUENCY).to(depth)
        wrong = wrong.clamp_min(0.2 * float(disparity[known].min()))  # stays in front of the camera
        points.append(view.camera.backproject(1 / wrong)[known])
        factor, shift = (torch.rand(2, generator=generator) * 0.5 + 0.25).tolist()
        maps[view.name] = (RANGE * (factor * wrong / wrong[known].max() + shift) * known, known.float())
    return StandIn(name, maps, torch.cat(points))


def stereo_depths(views: Sequence[View], near: float, far: float) -> list[Tensor]:
    """[H, W] for each view: its depth from plane-sweep stereo with the others, made smooth by medians of 5 x 5."""
    return [smoothed(sweep_depth(views, index, near, far).depth) for index in range(len(views))]


def smoothed(depth: Tensor) -> Tensor:
    """[H, W] the median of the MEDIAN x MEDIAN pixels around each one; the rim is repeated around the map."""
    padded = F.pad(depth[None, None], (MEDIAN // 2,) * 4, mode="replicate")
    windows = F.unfold(padded, MEDIAN)[0]  # [MEDIAN^2, H W]
    return windows.median(dim=0).values.reshape(depth.shape)


def slow_field(shape: Sequence[int], generator: torch.Generator, nodes: int) -> Tensor:
    """[H, W] a smooth random field: `nodes` x `nodes` normal numbers with bicubic interpolation between them."""
    values = torch.randn(1, 1, nodes, nodes, generator=generator)
    return F.interpolate(values, size=tuple(shape), mode="bicubic", align_corners=True)[0, 0]


def point_depth(points: Tensor, camera: Camera, *, grow: int = 1) -> Tensor:
    """[H, W] depth of the nearest point [P, 3] in each pixel, or else in a pixel next to it (`grow` rings); 0: none."""
    pixels, depth = camera.project(points)
    place = pixels.floor().long()
    size = place.new_tensor([camera.width, camera.height])
    fits = (depth > 0) & (place >= 0).all(dim=1) & (place < size).all(dim=1)
    flat = depth.new_full((camera.height * camera.width,), torch.inf)
    flat.scatter_reduce_(0, place[fits, 1] * camera.width + place[fits, 0], depth[fits], "amin")
    found = flat.reshape(camera.height, camera.width)
    for _ in range(grow):
        around = -F.max_pool2d(-found[None, None], 3, 1, 1)[0, 0]
        found = torch.where(torch.isinf(found), around, found)
    return torch.where(torch.isinf(found), 0.0, found)


def _covered(view: View) -> Tensor:
    return view.image.new_ones(view.image.shape[:2]) if view.mask is None else (view.mask > 0.5).float()


def _mixed(values: Tensor) -> Tensor:
    """[H, W] with its bands of rows, then of columns, in another order."""
    for dim in (0, 1):
        bands = values.tensor_split(len(MIXED_BANDS), dim=dim)
        values = torch.cat([bands[band] for band in MIXED_BANDS], dim=dim)
    return values
