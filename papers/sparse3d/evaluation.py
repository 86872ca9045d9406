"""What is measured: renders and surfaces against the truth, the networks on held-out objects, and exact checks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import seeds
from common.metrics.image import psnr
from common.metrics.perceptual import LUMA, gmsd, load_lpips
from common.models.denoiser import Denoiser
from common.models.diffusion import Schedule, ddim, times
from common.record import Record
from common.splatting import Camera, View
from common.splatting.evaluation import evaluate
from common.splatting.model import Gaussians
from papers.sparse3d import method
from papers.sparse3d.data import Case
from papers.sparse3d.epipolar import EpipolarTransformer
from papers.sparse3d.settings import Params

COVERED = 0.5  # a pixel shows the object above this opacity or mask
WORST_DEPTH = 0.5  # of a pixel, in radii of the ball; also where the Gaussians leave the object open
SURFACE_POINTS = 2000
ASKED_TIMES = (50, 200, 400, 600, 800)  # of the held-out errors of the diffusion model
SAMPLER_STEPS = 50


# ------------------------------------------------------------------------------------------------------ fitted scenes


@torch.no_grad()
def scores(params: Params, case: Case, model: Gaussians) -> dict[str, float]:
    """Means over the test views.

    psnr, psnr_masked (dB), ssim, gmsd, and lpips where the parameters name its network
    sharpness       gradient energy of the render over that of the photograph; 1 is right
    unsharpness     |log2 sharpness|; 0 is right
    depth_error     mean error of the depth where the object is, at most 0.5 a pixel, in radii of the ball
    chamfer         between the rendered and the true surface as the test views show them, in radii of the ball

    The last two only where the test views know their depth.
    """
    views, background = case.scene.test, case.scene.background
    found = evaluate(model, views, background=background)
    means = {name: found.mean(name) for name in ("psnr", "psnr_masked", "ssim")}
    shown = [picture(model, view.camera) for view in views]
    rows: dict[str, list[float]] = {"gmsd": [], "sharpness": [], "unsharpness": []}
    lpips = load_lpips(params.lpips).to(views[0].image.device) if params.lpips else None
    for ours, view in zip(shown, views, strict=True):
        pair = ours.movedim(-1, 0), view.image.movedim(-1, 0)
        rows["gmsd"].append(float(gmsd(*pair)))
        if lpips is not None:
            rows.setdefault("lpips", []).append(float(lpips(*pair)))
        ratio = gradient_energy(ours) / gradient_energy(view.image)
        rows["sharpness"].append(ratio)
        rows["unsharpness"].append(abs(math.log2(max(ratio, 1e-6))))
    if all(view.depth is not None for view in views):
        rows["depth_error"] = [depth_error(model, view) for view in views]
        rows["chamfer"] = [chamfer(rendered_surface(model, views), true_surface(views))]
    means |= {name: statistics.fmean(values) for name, values in rows.items()}
    return {name: value for name, value in means.items() if value is not None}


@torch.no_grad()
def picture(model: Gaussians, camera: Camera) -> Tensor:
    """[H, W, 3] the render in front of white, limited to 0..1."""
    return model.render(camera, background=torch.ones(3, device=model.means.device)).image.clamp(0, 1)


def grey(image: Tensor) -> Tensor:
    """[H, W] luma of an image [H, W, 3]."""
    return image @ image.new_tensor(LUMA)


def gradient_energy(image: Tensor) -> float:
    """Mean squared difference of the luma to the next pixel below and to the right: falls where an image is blurred."""
    luma = grey(image)
    return float(luma.diff(dim=0).square().mean() + luma.diff(dim=1).square().mean())


def spectrum(image: Tensor) -> Tensor:
    """[n // 2] power of the luma by spatial frequency, in whole waves across the image from 1 on."""
    power = torch.fft.fft2(grey(image) - grey(image).mean()).abs().square() / image.shape[0] ** 4
    waves = torch.fft.fftfreq(image.shape[0], 1 / image.shape[0], device=image.device)
    ring = torch.hypot(waves[:, None], waves).round().long()
    total = torch.zeros(int(ring.max()) + 1, device=image.device).index_add_(0, ring.flatten(), power.flatten())
    return total[1 : image.shape[0] // 2 + 1].cpu()


def depth_error(model: Gaussians, view: View) -> float:
    """See `scores`."""
    assert view.depth is not None and view.mask is not None
    drawn = model.render(view.camera, mode="ED")
    assert drawn.depth is not None
    there = view.mask > COVERED
    error = (drawn.depth - view.depth).abs().clamp_max(WORST_DEPTH)
    return float(torch.where(drawn.alpha > COVERED, error, WORST_DEPTH)[there].mean())


def true_surface(views: Sequence[View]) -> Tensor:
    """[P, 3] points of the true surface that these views see."""
    points = [view.camera.backproject(known(view.depth))[known(view.depth) > 0] for view in views]
    return _thinned(torch.cat(points))


def rendered_surface(model: Gaussians, views: Sequence[View]) -> Tensor:
    """[P, 3] where the Gaussians put the surface in these views; none where they cover nothing."""
    points = []
    for view in views:
        drawn = model.render(view.camera, mode="ED")
        points.append(view.camera.backproject(known(drawn.depth))[drawn.alpha > COVERED])
    return _thinned(torch.cat(points))


def chamfer(first: Tensor, second: Tensor) -> float:
    """Mean distance from each point [P, 3] to the closest of the other set, averaged over both directions.

    1, the radius of the ball, where a set is empty.
    """
    if not len(first) or not len(second):
        return 1.0
    distance = torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")  # the other is off by 1e-5
    return float((distance.amin(dim=1).mean() + distance.amin(dim=0).mean()) / 2)


def report(
    record: Record, results: Mapping[tuple[str, int, int], Mapping[str, Any]]
) -> dict[str, dict[tuple[str, int], list[float]]]:
    """Record every score of every run, and its `seconds`. Returns metric -> (arm, photographs) -> one value a seed."""
    found: dict[str, dict[tuple[str, int], list[float]]] = {}
    for (arm, views, seed), result in results.items():
        for name, value in {**result["scores"], "seconds": result["seconds"]}.items():
            record.metric(name, value, variant=f"{arm}/{views}", seed=seed)
            found.setdefault(name, {}).setdefault((arm, views), []).append(value)
    return found


# ---------------------------------------------------------------------------------------------- networks, held out


@torch.no_grad()
def transformer_quality(case: Case, pictures: Tensor) -> dict[str, float]:
    """PSNR of the transformer's pictures of the circle, and of the `nearest` photograph shown in its place."""
    truth = known(case.truth).movedim(-1, 1)
    pixels = truth.shape[2] // pictures.shape[1]  # of a ray
    small = F.avg_pool2d(truth, pixels)
    photos = torch.stack([view.image for view in case.scene.train]).movedim(-1, 1)
    stands = torch.stack([view.camera.center for view in case.scene.train])
    nearest = torch.cdist(torch.stack([camera.center for camera in case.circle]), stands).argmin(dim=1)
    copies = F.avg_pool2d(photos[nearest], pixels)
    both = {"transformer": pictures.movedim(-1, 1), "nearest": copies}
    return {name: float(psnr(ours.flatten(1), small.flatten(1), data_range=1.0).mean()) for name, ours in both.items()}


@torch.no_grad()
def prior_quality(prior: method.Prior, case: Case, maps: Tensor, others: Tensor, seed: int) -> dict[str, float]:
    """Mean squared error of the predicted noise on a held-out object's true pictures, by several times.

    zero        of the answer 0; 1 up to chance
    base        of the category's model alone
    controlled  with the transformer's maps of this object;  shuffled: with those of another
    """
    x = torch.cat([prior.encode(part) for part in known(case.truth).movedim(-1, 1).split(4)])
    noise = torch.randn(x.shape, generator=seeds.generator(seed, "held out noise", device=x.device), device=x.device)
    errors: dict[str, list[float]] = {}
    for time in ASKED_TIMES:
        t = torch.full((len(x),), time, device=x.device)
        x_t = prior.schedule.noised(x, noise, t)
        answers = {"zero": torch.zeros_like(x), "base": prior.base(x_t, t)}
        answers |= {
            "controlled": prior.controlled(x_t, t, maps),
            "shuffled": prior.controlled(x_t, t, others),
        }
        for name, answer in answers.items():
            errors.setdefault(name, []).append(float(F.mse_loss(answer, noise)))
    return {name: statistics.fmean(values) for name, values in errors.items()}


@torch.no_grad()
def samples(prior: method.NetworkPrior, maps: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures [N, size, size, 3] in 0..1 of a model in pixels from the same noise: the base's, and the controlled."""
    draw = seeds.generator(seed, "samples", device=maps.device)
    start = torch.randn(len(maps), 3, size, size, generator=draw, device=maps.device)
    at = times(prior.schedule, SAMPLER_STEPS)
    asked: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
        prior.base,
        lambda x, t: prior.controlled(x, t, maps),
    )
    drawn = [ddim(predict, start, prior.schedule, at, limit=1.0) for predict in asked]
    base, steered = (((x + 1) / 2).clamp(0, 1).movedim(1, -1) for x in drawn)
    return base, steered


# ------------------------------------------------------------------------------------------------------ exact checks


@torch.no_grad()
def exact_checks() -> dict[str, float]:
    """How much a new controller alters the model, how large C-SDS is then, and what moving the world changes."""
    torch.manual_seed(0)
    denoiser = Denoiser(width=8, depth=2)
    for parameter in denoiser.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    prior = method.NetworkPrior(method.controlled(denoiser, 7, 2), Schedule.cosine())
    x, t, maps = torch.rand(1, 3, 16, 16), torch.tensor([300]), torch.rand(1, 7, 8, 8)
    control = float((prior.controlled(x, t, maps) - prior.base(x, t)).abs().max())
    csds = float(method.distilled(prior, x, maps, t, torch.randn_like(x), "csds").abs().max())
    return {"control": control, "csds": csds, "world": _change_by_turning()}


class Gaussian:
    """A prior whose answers are known: numbers of a category N(0, spread^2), of which f says N(mean, narrow^2).

    eps = sqrt(1 - a) (x_t - sqrt(a) m) / (a s^2 + 1 - a) for N(m, s^2).
    """

    def __init__(self, mean: float = 1.0, narrow: float = 0.3, spread: float = 1.0):
        self.schedule = Schedule.cosine()
        self.mean, self.narrow, self.spread = mean, narrow, spread

    def encode(self, image: Tensor) -> Tensor:
        return image

    def base(self, x: Tensor, t: Tensor) -> Tensor:
        return self._eps(x, t, 0.0, self.spread)

    def controlled(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return self._eps(x, t, self.mean, self.narrow)

    def _eps(self, x: Tensor, t: Tensor, mean: float, spread: float) -> Tensor:
        a = self.schedule.at(t).to(x)
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * spread**2 + 1 - a)


def pull(rule: method.Rule, places: Sequence[float], known_prior: Gaussian | None = None) -> list[float]:
    """Minus the mean gradient of `rule` at some numbers x, over all times and noises: where x is pulled."""
    prior = known_prior or Gaussian()
    steps = prior.schedule.steps
    t = torch.arange(round(method.EARLIEST * steps), round(method.LATEST * steps) + 1)
    found = []
    for place in places:
        x = torch.full((len(t), 1, 1, 1), place, dtype=torch.float64)
        # the gradient is linear in the noise, so that one noise and its opposite have the mean of all
        both = [method.distilled(prior, x, x, t, sign * torch.ones_like(x), rule) for sign in (1, -1)]
        found.append(-float(torch.stack(both).mean()))
    return found


def fixed_point(rule: method.Rule, known_prior: Gaussian | None = None) -> float:
    """Where `pull` is zero; it is a straight line in x."""
    at_0, at_1 = pull(rule, (0.0, 1.0), known_prior)
    return at_0 / (at_0 - at_1)


def _change_by_turning() -> float:
    """Largest change of the transformer's answer when the world turns about the origin, cameras and all."""
    from papers.sparse3d import chairs

    network = EpipolarTransformer(width=8, layers=1, pixels=4, samples=4).eval()
    draw = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    answers = []
    for turn in (0.0, 1.0):
        stands = [chairs.camera(angle + turn, 0.4, 16) for angle in (0.0, 1.8, 0.9)]
        images = torch.rand(2, 16, 16, 3, generator=torch.Generator().manual_seed(1))
        views = [View(str(i), stand, image) for i, (stand, image) in enumerate(zip(stands, images, strict=False))]
        answers.append(network.look(views, stands[2].resized(8, 8))[1])
    return float((answers[0] - answers[1]).abs().max())


def known(value: Tensor | None) -> Tensor:
    """What only generated objects have. Raises ValueError where it is not known."""
    if value is None:
        raise ValueError("photographs have no truth to compare with; leave what needs it (oracle) out of the arms.")
    return value


def _thinned(points: Tensor) -> Tensor:
    some = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:SURFACE_POINTS]
    return points[some.to(points.device)]
