"""How reconstructions are scored, the baselines that need no training, and the out-of-domain tooth."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import data as datasets
from common import files
from common.data import ct
from common.metrics.image import psnr, rmse, ssim
from common.tomography import fbp, gloredi_geometry, sirt, tv
from kernels.ct import ParallelBeam
from papers.gloredi.data import MM_PER_CM, TripleSet, mu_to_hu
from papers.gloredi.experiment import reconstruct
from papers.gloredi.method import Distillation, GloReDi, band_features
from papers.gloredi.settings import Params

# name: lowest and highest HU; what lies outside is cut, what lies inside becomes 0..1. The first is the authors' own.
WINDOWS_HU = {"wide": (-1000.0, 2000.0), "soft": (-200.0, 300.0), "lung": (-1000.0, -200.0)}
TIMING_REPEATS = 5
BRIGHT = 0.99  # the quantile by which the tooth is scaled to the training images


def window(mu: Tensor, name: str = "wide") -> Tensor:
    """Attenuation in 1/cm -> the HU window as 0..1."""
    low, high = WINDOWS_HU[name]
    return ((mu_to_hu(mu) - low) / (high - low)).clamp(0, 1)


def scores(images: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Per-image scores [N] of images [N, 1, H, W] in 1/cm.

    `psnr` (dB), `ssim`, `rmse_hu` in the window -1000..2000 HU; `psnr_soft`, `psnr_lung` in theirs. The range is 1.
    """
    low, high = WINDOWS_HU["wide"]
    image, target = window(images), window(targets)
    found = {
        "psnr": psnr(image, target, data_range=1.0),
        "ssim": ssim(image, target, data_range=1.0),
        "rmse_hu": (high - low) * rmse(image, target),
    }
    for name in ("soft", "lung"):
        found[f"psnr_{name}"] = psnr(window(images, name), window(targets, name), data_range=1.0)
    return found


def iterative(params: Params, test: TripleSet, tv_weight: float) -> dict[str, Tensor]:
    """SIRT and TV images [N, 1, H, W] in 1/cm of every test slice, from the sinogram that its FBP image came from."""
    sinogram, geometry = _measured(test, list(range(len(test)))), gloredi_geometry(params.size, test.views)
    return {
        "sirt": MM_PER_CM * sirt(sinogram, geometry, iterations=params.sirt_iterations),
        "tv": MM_PER_CM * tv(sinogram, geometry, weight=tv_weight, iterations=params.tv_iterations),
    }


def choose_tv_weight(params: Params, training: TripleSet, slices: int = 2) -> float:
    """The weight of `params.tv_weights` with the best mean PSNR on a few training slices."""
    chosen = [i * len(training) // slices for i in range(slices)]
    sinogram, target = _measured(training, chosen), training.batch(chosen).target
    geometry = gloredi_geometry(params.size, training.views)

    def quality(weight: float) -> float:
        image = MM_PER_CM * tv(sinogram, geometry, weight=weight, iterations=params.tv_iterations)
        return scores(image, target)["psnr"].mean().item()

    return max(params.tv_weights, key=quality)


def gradient_shares(params: Params, model: GloReDi, training: TripleSet) -> dict[str, float]:
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
            terms.bank.push(band_features(model.student_encoder(training.batch(others).sparse), terms.band))
    triple = training.batch(list(range(params.batch)))
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
    params: Params, test: TripleSet, networks: Mapping[str, nn.Module], tv_weight: float
) -> dict[str, list[float]]:
    """Seconds from the sinogram to one image, `TIMING_REPEATS` medians of three, in this process, by method."""
    geometry, sinogram = gloredi_geometry(params.size, test.views), _measured(test, [0])

    def apply(network: nn.Module) -> Callable[[], Tensor]:
        return lambda: reconstruct(network, test.simulator.fbp(sinogram))

    jobs: dict[str, Callable[[], Tensor]] = {name: apply(network) for name, network in networks.items()}
    jobs["fbp"] = lambda: test.simulator.fbp(sinogram)
    jobs["sirt"] = lambda: sirt(sinogram, geometry, iterations=params.sirt_iterations)
    jobs["tv"] = lambda: tv(sinogram, geometry, weight=tv_weight, iterations=params.tv_iterations)
    found = {}
    for name, job in jobs.items():
        job()  # warm
        found[name] = [statistics.median(_seconds(job) for _ in range(3)) for _ in range(TIMING_REPEATS)]
    return found


class Tooth:
    """The tooth's upper detector row as FBP images [1, 1, size, size], scaled to the networks' range.

    Cells are averaged in groups down to the image's resolution, lengths are counted in cells (the scan has no pitch),
    and one factor makes the `BRIGHT` quantile of the 181-view image that of the training targets.
    """

    def __init__(self, params: Params, training: TripleSet):
        self.path = datasets.path("ct_sinogram_tooth") / "tooth.h5"
        scan = ct.tooth(self.path)
        integrals, self.angles_rad = scan.line_integrals()[:, 0], scan.theta_rad  # [V, K]
        self.views, cells = integrals.shape
        self.group = max(1, cells // params.size)
        kept = cells // self.group * self.group
        self.sinogram = integrals[None, None, :, :kept].unflatten(-1, (-1, self.group)).mean(dim=-1)
        self.size = params.size
        self.axis_cells = scan.centre_cell - (kept - 1) / 2
        few = list(range(0, len(training), max(1, len(training) // 16)))
        wanted = training.batch(few).target.cpu().flatten().quantile(BRIGHT)
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

    def digest(self) -> str:
        """sha256 of the file."""
        return files.sha256(Path(self.path))


def _measured(triples: TripleSet, indices: list[int]) -> Tensor:
    """The V-view sinogram [N, 1, V, K] of some slices."""
    full = triples.simulator.sinogram(triples.source(indices).to(triples.device))
    noisy = triples.simulator.add_noise(full, torch.Generator().manual_seed(0))
    return triples.simulator.subset(noisy, triples.views)


def _seconds(job: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    image = job()
    if image.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started
