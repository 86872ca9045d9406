"""Training of the three networks: the epipolar transformer, the category's diffusion model, and its controller.

All are trained once, on objects that no experiment uses, and then serve every scene: there is one Stable Diffusion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import seeds
from common.models.denoiser import Denoiser
from common.models.diffusion import Schedule, epsilon_loss, train
from common.splatting import Camera, View
from papers.sparse3d import method
from papers.sparse3d.data import Album
from papers.sparse3d.epipolar import EpipolarTransformer, Photographs
from papers.sparse3d.settings import Params

TIMES = 1000  # steps of the noise schedule
AVERAGE = 0.995  # decay of the weights' running mean
NEAR_OBJECT = 4.0  # rays at the object and next to it are drawn so many times as often as others
TOGETHER = 4  # maps made at once
SEED = 0

State = Mapping[str, Tensor]


# ------------------------------------------------------------------------------------- the epipolar feature transformer


def transformer(params: Params, state: State | None = None) -> EpipolarTransformer:
    """A new transformer, or the one of `train_transformer`'s result."""
    network = EpipolarTransformer(
        width=params.eft_width, layers=params.eft_layers, pixels=params.eft_pixels, samples=params.eft_samples
    )
    if state is not None:
        network.load_state_dict(state)
        network.eval()
    return network.to(params.device)


@seeds.one_thread()
def train_transformer(params: Params, album: Album) -> dict[str, Any]:
    """Colours of rays of one picture from a few others of the same object. Returns `state` and `losses`."""
    torch.manual_seed(seeds.derived(SEED, "transformer"))
    album = album.to(params.device)
    queries = every_ray(album, params.ray_pixels)

    def loss(network: nn.Module, draw: torch.Generator) -> Tensor:
        objects, query, inputs = chosen(album, params.views, params.eft_objects, draw)
        rays = torch.multinomial(queries.weights[objects, query], params.eft_rays, generator=draw)  # [B, R]
        directions = torch.gather(queries.rays[objects, query], 1, rays[..., None].expand(-1, -1, 3))
        wanted = torch.gather(queries.colors[objects, query], 1, rays[..., None].expand(-1, -1, 3))
        found = network(photographs_of(album, objects, inputs), album.viewmats[objects, query], directions)
        return F.mse_loss(found.rgb, wanted)

    options = {"steps": params.eft_steps, "learning_rate": params.eft_rate, "ema": AVERAGE}
    found = train(transformer(params), loss, seed=SEED, **options)
    return {"state": kept(found.network), "losses": found.losses}


class Queries(NamedTuple):
    """Every ray of every picture of an album: R rays a picture, one for each square of `ray_pixels` pixels.

    colors [O, N, R, 3] means over the squares;  rays [O, N, R, 3] in the camera's coordinates;  weights [O, N, R]
    """

    colors: Tensor
    rays: Tensor
    weights: Tensor


def every_ray(album: Album, pixels: int) -> Queries:
    """The rays through the middles of squares of `pixels` pixels a side."""
    objects, count, _, height, width = album.images.shape
    colors = F.avg_pool2d(album.images.flatten(0, 1), pixels).flatten(2).movedim(1, 2)
    near = F.max_pool2d(album.masks.flatten(0, 1)[:, None], 3 * pixels, stride=pixels, padding=pixels)
    weights = 1 + (NEAR_OBJECT - 1) * (near.flatten(1) > 0.5)
    row, column = torch.meshgrid(
        *(pixels * (torch.arange(size // pixels, device=album.images.device) + 0.5) for size in (height, width)),
        indexing="ij",
    )
    places = torch.stack([column, row, torch.ones_like(row)], dim=-1).reshape(-1, 3)
    rays = places @ torch.linalg.inv(album.Ks).transpose(-1, -2)  # [O, N, R, 3]
    shape = (objects, count)
    return Queries(colors.unflatten(0, shape), rays, weights.unflatten(0, shape))


def chosen(album: Album, views: Sequence[int], count: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Of `count` random objects [B] a picture to predict [B] and others to predict it from [B, V].

    V is one of `views`, the same for the whole batch.
    """
    device = draw.device
    shown = views[int(torch.randint(len(views), (1,), generator=draw, device=device))]
    objects = torch.randint(len(album.images), (count,), generator=draw, device=device)
    order = torch.rand(count, album.images.shape[1], generator=draw, device=device).argsort(dim=1)
    return objects, order[:, 0], order[:, 1 : shown + 1]


def photographs_of(album: Album, objects: Tensor, inputs: Tensor) -> Photographs:
    """Pictures `inputs` [B, V] of `objects` [B]."""
    rows = objects[:, None]
    return Photographs(album.images[rows, inputs], album.viewmats[rows, inputs], album.Ks[rows, inputs])


@torch.no_grad()
def look_around(
    network: EpipolarTransformer, views: Sequence[View], cameras: Sequence[Camera], pixels: int
) -> tuple[Tensor, Tensor]:
    """From every camera, at one ray for a square of pixels: RGB [N, h, w, 3] and maps [N, F, h, w]."""
    found = [network.look(views, camera.resized(camera.width // pixels, camera.height // pixels)) for camera in cameras]
    return torch.stack([rgb for rgb, _ in found]), torch.stack([features for _, features in found])


# ------------------------------------------------------------------------------------------------- the diffusion model


@seeds.one_thread()
def train_base(params: Params, album: Album) -> dict[str, Any]:
    """The category's model: pictures of all objects from all sides, half of them mirrored, and nothing else told.

    Returns `state` of a `Denoiser` and `losses`.
    """
    torch.manual_seed(seeds.derived(SEED, "base"))
    pictures = 2 * album.images.to(params.device).flatten(0, 1) - 1
    schedule = Schedule.cosine(TIMES).to(params.device)

    def loss(network: nn.Module, draw: torch.Generator) -> Tensor:
        which = torch.randint(len(pictures), (params.base_batch,), generator=draw, device=draw.device)
        mirrored = torch.rand(params.base_batch, generator=draw, device=draw.device) < 0.5
        some = pictures[which]
        some = torch.where(mirrored[:, None, None, None], some.flip(-1), some)
        return epsilon_loss(network, some, schedule, draw)

    options = {"steps": params.base_steps, "learning_rate": params.base_rate, "ema": AVERAGE}
    found = train(Denoiser(width=params.base_width).to(params.device), loss, seed=SEED, **options)
    return {"state": kept(found.network), "losses": found.losses}


@seeds.one_thread()
def train_controller(
    params: Params, album: Album, transformer_state: State, base_state: State | None
) -> dict[str, Any]:
    """The controller: it sees the transformer's maps of pictures it has to denoise; the model itself stays frozen.

    base_state  of `train_base`; None where the model is Stable Diffusion

    Returns `state` of the controller and `losses`.
    """
    torch.manual_seed(seeds.derived(SEED, "controller"))
    album = album.to(params.device)
    maps, pictures = learning_pairs(params, album, transformer(params, transformer_state))
    prior = fresh_prior(params, base_state)
    x = torch.cat([prior.encode(part) for part in pictures.split(TOGETHER)]).detach()

    def loss(network: nn.Module, draw: torch.Generator) -> Tensor:
        which = torch.randint(len(x), (params.control_batch,), generator=draw, device=draw.device)
        conditions = maps[which]
        return epsilon_loss(lambda x, t: network(x, t, conditions), x[which], prior.schedule, draw)

    options = {"steps": params.control_steps, "learning_rate": params.control_rate, "ema": AVERAGE}
    found = train(prior.network, loss, seed=SEED, **options)
    return {"state": kept(found.network.get_submodule("control")), "losses": found.losses}


@torch.no_grad()
def learning_pairs(params: Params, album: Album, network: EpipolarTransformer) -> tuple[Tensor, Tensor]:
    """Maps [M, F, h, w] of the transformer, and the pictures [M, 3, H, W] that belong there."""
    draw = seeds.generator(SEED, "maps", device=params.device)
    queries = every_ray(album, params.ray_pixels)
    side = album.images.shape[-1] // params.ray_pixels
    maps, pictures = [], []
    while len(maps) * TOGETHER < params.control_maps:
        objects, query, inputs = chosen(album, params.views, TOGETHER, draw)
        given = photographs_of(album, objects, inputs)
        found = network(given, album.viewmats[objects, query], queries.rays[objects, query])
        both = torch.cat([found.features, found.rgb], dim=-1).movedim(1, 2)
        maps.append(both.unflatten(-1, (side, side)))
        pictures.append(album.images[objects, query])
    return torch.cat(maps), torch.cat(pictures)


def fresh_prior(params: Params, base_state: State | None) -> method.NetworkPrior:
    """The diffusion model with a controller that changes nothing yet."""
    channels = params.eft_width + 3
    if params.prior == "pretrained":
        from papers.sparse3d import pretrained

        return pretrained.fresh_prior(params, channels)
    denoiser = Denoiser(width=params.base_width)
    if base_state is not None:
        denoiser.load_state_dict(base_state)
    network = method.controlled(denoiser, channels, params.ray_pixels).to(params.device)
    return method.NetworkPrior(network, Schedule.cosine(TIMES).to(params.device))


def trained_prior(params: Params, base_state: State | None, control_state: State) -> method.NetworkPrior:
    """The diffusion model with the controller of `train_controller`'s result."""
    prior = fresh_prior(params, base_state)
    prior.network.get_submodule("control").load_state_dict(control_state)
    prior.network.eval().requires_grad_(False)
    return prior


def kept(network: nn.Module) -> dict[str, Tensor]:
    """A network's values on the CPU."""
    return {name: value.detach().cpu() for name, value in network.state_dict().items()}
