"""How reconstructions are scored, the baselines that need no training, and the out-of-domain tooth."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import data as datasets
from common import files
from common.data import ct
from common.metrics import image as metrics
from common.record import Record
from common.tomography import MM_PER_CM, fbp, gloredi_geometry
from common.tomography.iterative import Reconstruction, sirt, tv
from kernels.ct import FanBeam, ParallelBeam
from papers.gloredi.data import TripleSet, mu_to_hu
from papers.gloredi.experiment import reconstruct
from papers.gloredi.method import Distillation, Encoder, GloReDi, Variant, band_features
from papers.gloredi.settings import Params

TIMING_REPEATS = 5
TV_TOLERANCE = 1e-2  # of the duality gap: a careful bound, the objective is then about 1e-4 above its minimum
BRIGHT = 0.99  # the quantile by which the tooth is scaled to the training images


def scores(images: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Per-image scores [N] of images [N, 1, H, W] in 1/cm, as the authors take them.

    `psnr` (dB), `ssim` and `rmse_hu` after clipping to -1000..2000 HU; `psnr_soft`, `psnr_lung` in their windows.
    """
    image, target = mu_to_hu(images[:, 0]), mu_to_hu(targets[:, 0])  # [N, H, W]
    found = {
        name: metrics.psnr(metrics.window(image, *shown), metrics.window(target, *shown), data_range=1.0)
        for name, shown in (("psnr", metrics.CLIP), ("psnr_soft", metrics.SOFT_TISSUE), ("psnr_lung", metrics.LUNG))
    }
    clipped, wanted = metrics.window(image, *metrics.CLIP), metrics.window(target, *metrics.CLIP)
    found["ssim"] = metrics.ssim(clipped, wanted, data_range=1.0, border="zero")
    found["rmse_hu"] = metrics.rmse_hu(image, target)
    return found


def report(
    record: Record, images: Tensor, targets: Tensor, sources: Tensor, *, variant: str, seed: int | None = None
) -> float:
    """Record the mean of every score against the target, and `psnr_source` against the true slices; return the PSNR."""
    found = scores(images, targets)
    for name, values in found.items():
        record.metric(name, values.mean(), variant=variant, seed=seed)
    record.metric("psnr_source", scores(images, sources)["psnr"].mean(), variant=variant, seed=seed)
    return found["psnr"].mean().item()


def iterative(params: Params, test: TripleSet, views: int, tv_weight: float) -> dict[str, Reconstruction]:
    """SIRT and TV of every test slice from its sinogram; `image` [N, 1, H, W] is in 1/mm."""
    sinogram, geometry = test.sinogram(list(range(len(test))), views), gloredi_geometry(params.size, views)
    return {
        "sirt": sirt(sinogram, geometry, iterations=params.sirt_iterations),
        "tv": _tv(params, sinogram, geometry, tv_weight),
    }


def choose_tv_weight(params: Params, training: TripleSet, views: int, slices: int = 2) -> float:
    """The weight of `params.tv_weights` with the best mean PSNR on a few training slices.

    Measured against the true slice: TV looks for that, and not for the FBP image of all views.
    """
    chosen = [i * len(training) // slices for i in range(slices)]
    sinogram, source = training.sinogram(chosen, views), training.source(chosen)
    geometry = gloredi_geometry(params.size, views)

    def quality(weight: float) -> float:
        image = MM_PER_CM * _tv(params, sinogram, geometry, weight).image.cpu()
        return scores(image, source)["psnr"].mean().item()

    return max(params.tv_weights, key=quality)


@torch.no_grad()
def reach(global_ratio: float, *, size: int = 64) -> Tensor:
    """How much each feature of a small random encoder changes with one pixel in the middle: [size/4, size/4]."""
    torch.manual_seed(0)
    encoder = Encoder(width=8, blocks=1, global_ratio=global_ratio).eval()
    image = torch.rand(1, 1, size, size)
    touched = image.clone()
    touched[0, 0, size // 2, size // 2] += 1
    return (encoder(touched) - encoder(image)).abs().mean(dim=(0, 1))


def gradient_of_features(variant: Variant) -> Tensor:
    """By channel of z, how much the image that a small random decoder draws depends on it: [C]. 0: it is never read."""
    torch.manual_seed(0)
    model = GloReDi(variant, width=8, encoder_blocks=1, decoder_blocks=1)
    z = model.student_encoder(torch.rand(2, 1, 32, 32)).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.student_decoder(z).square().sum(), z)
    return gradient.abs().sum(dim=(0, 2, 3))


def gradient_shares(params: Params, model: GloReDi, training: TripleSet, views: int) -> dict[str, float]:
    """The norm of each weighted term's gradient in the student's encoder, divided by their sum, on one batch.

    The memory bank is filled with the student's features of other training images.
    """
    terms = Distillation(
        model.train(),
        w_distill=params.w_distill,
        w_contrast=params.w_contrast,
        temperature=params.temperature,
        bank=params.bank,
        band=(params.band_low, params.band_high),
        clamp=False,
    )
    with torch.no_grad():
        while not terms.bank.full:
            start = params.batch + len(terms.bank.entries)
            others = [(start + i) % len(training) for i in range(params.batch)]
            terms.bank.push(band_features(model.student_encoder(training.batch(others, views).sparse), terms.band))
    triple = training.batch(list(range(params.batch)), views)
    student_z = model.student_encoder(triple.sparse)
    rdd, bpc = terms.representation_losses(student_z, model.teacher_encoder(triple.intermediate))
    losses = {
        "pixel": F.smooth_l1_loss(model.student_decoder(student_z), triple.target),
        "rdd": params.w_distill * rdd,
        "bpc": params.w_contrast * bpc,
    }
    weights = list(model.student_encoder.parameters())
    norms = {}
    for name, loss in losses.items():
        gradients = torch.autograd.grad(loss, weights, retain_graph=True) if loss.requires_grad else []
        norms[name] = sum(g.square().sum().item() for g in gradients) ** 0.5
    return {name: norm / sum(norms.values()) for name, norm in norms.items()}


def seconds_per_slice(
    params: Params, test: TripleSet, views: int, networks: Mapping[str, nn.Module], tv_weight: float
) -> dict[str, list[float]]:
    """Seconds from the sinogram to one image, `TIMING_REPEATS` times after one to warm up, by method."""
    geometry, sinogram = gloredi_geometry(params.size, views), test.sinogram([0], views)

    def apply(network: nn.Module) -> Callable[[], Tensor]:
        return lambda: reconstruct(network, test.simulator.fbp(sinogram))

    jobs: dict[str, Callable[[], Tensor]] = {name: apply(network) for name, network in networks.items()}
    jobs["fbp"] = lambda: test.simulator.fbp(sinogram)
    jobs["sirt"] = lambda: sirt(sinogram, geometry, iterations=params.sirt_iterations).image
    jobs["tv"] = lambda: _tv(params, sinogram, geometry, tv_weight).image
    found = {}
    for name, job in jobs.items():
        job()  # warm
        found[name] = [_seconds(job) for _ in range(TIMING_REPEATS)]
    return found


class Tooth:
    """The tooth's upper detector row as FBP images [1, 1, size, size], scaled to the networks' range.

    Cells are averaged in groups down to the image's resolution, lengths are counted in cells (the scan has no pitch),
    and one factor makes the `BRIGHT` quantile of the 181-view image that of the training targets.
    """

    def __init__(self, params: Params, training: TripleSet):
        path = datasets.path("ct_sinogram_tooth") / "tooth.h5"
        scan, self.sha256 = ct.tooth(path), files.sha256(path)
        integrals, self.angles_rad = scan.line_integrals()[:, 0], scan.theta_rad  # [V, K]
        self.views, cells = integrals.shape
        self.group = max(1, cells // params.size)
        kept = cells // self.group * self.group
        self.sinogram = integrals[None, None, :, :kept].unflatten(-1, (-1, self.group)).mean(dim=-1)
        self.size = params.size
        self.axis_cells = scan.centre_cell - (kept - 1) / 2
        few = list(range(0, len(training), max(1, len(training) // 16)))
        wanted = training.batch(few, params.views[0]).target.cpu().flatten().quantile(BRIGHT)
        self.scale = 1.0
        self.scale = float(wanted / self.fbp(self.views).flatten().quantile(BRIGHT))

    def fbp(self, views: int) -> Tensor:
        """FBP of `views` nearly evenly spaced ones of the scan's views."""
        kept = [i * self.views // views for i in range(views)]
        geometry = ParallelBeam(
            tuple(self.angles_rad[kept].tolist()),
            self.sinogram.shape[-1],
            (self.size, self.size),
            pitch=float(self.group),
            pixel=float(self.group),
            axis=self.axis_cells,
        )
        return self.scale * fbp(self.sinogram[..., kept, :].contiguous(), geometry)


def _tv(params: Params, sinogram: Tensor, geometry: FanBeam, weight: float) -> Reconstruction:
    return tv(sinogram, geometry, weight=weight, iterations=params.tv_iterations, tolerance=TV_TOLERANCE)


def _seconds(job: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    image = job()
    if image.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started
