"""Every claim of GloReDi can be turned by a one-line change of the method or the data.

What can be run exactly or in seconds is run: layers, losses, gradients, timings, FBP, small trainings. Claims about
long trainings and about data that is not here go through the same scoring and judging with reconstructions of known
quality: an arm's image is the target plus a share of the streaks, and the sabotage takes away what names the arm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from common import claims
from common import params as parameters
from common.paths import root
from common.testing import assert_sabotage_turns
from papers.gloredi import data, evaluation, experiment, method
from papers.gloredi.settings import Params

CLAIMS = {claim.id: claim for claim in claims.load(root() / "papers/gloredi/claims.yaml")}
SEEDS = (0, 1, 2)
V = 6  # views of the small scans here, few enough that a short training can beat their FBP image
# Share of the streaks that each arm leaves; an order that suits the claims' honest side, not a measurement.
LEFT = {"released": 0.5, "unet": 0.6, "plain": 0.7, "fourier": 0.4, "rdd": 0.3, "full_teacher": 0.3, "gloredi": 0.2}


def tiny(**changes) -> Params:
    small = {"size": 32, "train_images": 4, "test_images": 4, "full_views": 144, "views": [V], "main_views": V}
    return dataclasses.replace(parameters.load(Params, "gloredi", "smoke"), **(small | changes))


@cache
def triples() -> data.TripleSet:
    return data.TripleSet(tiny(), "test")


def seeded(values: list[float]) -> dict[str, float]:
    return {str(seed): value for seed, value in zip(SEEDS, values, strict=False)}


# ------------------------------------------------------------------------------------------------- run as they are


def reach(ratio: float) -> float:
    torch.manual_seed(0)
    encoder = method.Encoder(width=8, blocks=1, global_ratio=ratio).eval()
    image = torch.rand(1, 1, 64, 64)
    touched = image.clone()
    touched[0, 0, 32, 32] += 1
    return ((encoder(touched) - encoder(image)).abs().mean(dim=(0, 1)) > 1e-9).float().mean().item()


def parameters_of(encoder_blocks: int = 7, decoder_blocks: int = 2) -> dict:
    encoder = method.Encoder(width=64, blocks=encoder_blocks, global_ratio=0.75)
    decoder = method.Decoder(width=64, blocks=decoder_blocks, global_ratio=0.75)
    counts = {"encoder": encoder, "decoder": decoder}
    return {
        "parameters_millions": {
            name: {"all": sum(p.numel() for p in network.parameters()) / 1e6} for name, network in counts.items()
        }
    }


def unread(overlapping: bool, name: str) -> dict:
    torch.manual_seed(0)
    z = torch.rand(2, 32, 8, 8, requires_grad=True)
    method.Decoder(width=8, blocks=1, global_ratio=0.75, overlapping_split=overlapping)(z).square().sum().backward()
    share = (z.grad.abs().sum(dim=(0, 2, 3)) == 0).float().mean().item()
    return {"unread_share": {name: {"all": share}}}


def clamped(constant: bool) -> dict:
    bound, weight = method.LossClamp(constant=constant), torch.tensor(1.0, requires_grad=True)
    bound(weight * 1.0)
    outlier = bound(weight * 100.0)
    gradient = torch.autograd.grad(outlier, weight)[0].item() if outlier.requires_grad else 0.0
    return {"clamped_gradient": {"as_released": {"all": gradient}}}


def contrast_share(weight: float) -> dict:
    params = tiny(w_contrast=weight, bank=4)
    arm = experiment.arms(params)["gloredi"]
    found = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        model = experiment.build(params, arm)
        found.append(evaluation.gradient_shares(params, model, triples(), V)["bpc"])
    return {"gradient_share": {"bpc": seeded(found)}}


def timings(tv_iterations: int) -> dict:
    params = tiny(tv_iterations=tv_iterations, sirt_iterations=1)
    network = experiment.build(params, experiment.arms(params)["gloredi"])
    found = evaluation.seconds_per_slice(params, triples(), V, {"gloredi": network}, tv_weight=1e-3)
    return {"seconds": {name: {str(i): v for i, v in enumerate(values)} for name, values in found.items()}}


def whole_scan(unit: float = 1.0) -> dict:
    found = evaluation.scores(unit * triples().batch([0, 1], V).target, triples().source([0, 1]))
    return {"psnr": {"full_views": {"all": found["psnr"].mean().item()}}}


def fbp_by_views(kept: Callable[[int], int] = lambda views: views) -> dict:
    simulator, source = data.Simulator(32, 144), triples().source([0, 1])
    sinogram = simulator.sinogram(source)
    found = {}
    for views in (18, 36, 72):
        image = simulator.fbp(simulator.subset(sinogram, kept(views)))
        found[f"fbp/{views}"] = {"all": evaluation.scores(image, simulator.fbp(sinogram))["psnr"].mean().item()}
    return {"psnr": found}


@cache
def overfitted(steps: int) -> list[Tensor]:
    """GloReDi after `steps` on the very slices it is then tested on, an image batch a seed."""
    params = tiny(steps=max(steps, 1), learning_rate=5e-3 if steps else 0.0)
    arm, images = experiment.arms(params)["gloredi"], []
    for seed in SEEDS:
        state = experiment.fit(params, arm, triples(), V, seed)["state"]
        images.append(
            experiment.reconstruct(experiment.restore(params, arm, state), triples().batch(range(4), V).sparse)
        )
    return images


def trained_against(baseline: str, views: int, steps: int) -> dict:
    triple = triples().batch(range(4), V)
    other = triple.sparse
    if baseline == "sirt":
        few = tiny(sirt_iterations=2, tv_iterations=1)
        other = data.MM_PER_CM * evaluation.iterative(few, triples(), V, 1e-3)["sirt"].image
    quality = [evaluation.scores(image, triple.target)["psnr"].mean().item() for image in overfitted(steps)]
    base = evaluation.scores(other, triple.target)["psnr"].mean().item()
    return {"psnr": {f"gloredi/{views}": seeded(quality), f"{baseline}/{views}": {"all": base}}}


# --------------------------------------------------------------------------- scored and judged at a known quality


def streaked(left: float, seed: int) -> Tensor:
    """The target plus a share of the streaks; the share varies a little with the seed."""
    triple = triples().batch(range(4), V)
    return triple.target + (left + 0.005 * seed) * (triple.sparse - triple.target)


def arms(views: int = 36, metric: str = "psnr", **sabotaged: float) -> dict:
    """Scores of every arm at the shares `LEFT`, some of them replaced."""
    target, found = triples().batch(range(4), V).target, {}
    for name, left in (LEFT | {"tv": 0.3} | sabotaged).items():
        values = [evaluation.scores(streaked(left, seed), target)["psnr"].mean().item() for seed in SEEDS]
        found[f"{name}/{views}"] = seeded(values)
    found[f"fbp/{views}"] = {"all": evaluation.scores(streaked(1, 0), target)["psnr"].mean().item()}
    return {metric: found}


def by_views(network_reads: Callable[[int], int] = lambda views: views) -> dict:
    found = {}
    for views in (18, 36, 72):
        left = 18 / network_reads(views)
        values = [
            evaluation.scores(streaked(left, seed), triples().batch(range(4), V).target)["psnr"].mean().item()
            for seed in SEEDS
        ]
        found[f"gloredi/{views}"] = seeded(values)
    return {"psnr": found}


def at_quality(views: int, name: str, wanted: float, *, scored: str = "", louder: float = 1.0) -> dict:
    """Noisy images that score `wanted`, as the published ones do; a sabotage scores another window or adds noise."""
    target = data.hu_to_mu(torch.linspace(-700, 1700, 64 * 64).view(1, 1, 64, 64))
    found = []
    for seed in SEEDS:
        noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(seed)) * 0.192 / 1000

        def score(sigma_hu: float, name: str = name, noise: Tensor = noise) -> float:
            return evaluation.scores(target + sigma_hu * noise, target)[name].mean().item()

        found.append(score(louder * _bisect(score, wanted), scored or name))
    return {name: {f"gloredi/{views}": seeded(found)}}


def _bisect(score: Callable[[float], float], wanted: float) -> float:
    """The noise, in HU, at which a falling score is as wanted."""
    low, high = 0.01, 1000.0
    for _ in range(40):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if score(middle) > wanted else (low, middle)
    return (low * high) ** 0.5


def tooth(left: float) -> dict:
    return {"tooth_psnr": arms(gloredi=left)["psnr"]}


SABOTAGE: dict[str, Callable[[], tuple[dict, dict]]] = {
    # exact
    "every-feature-sees-the-image": lambda: tuple({"reach": {"fourier": {"all": reach(r)}}} for r in (0.75, 0.0)),
    "plain-features-do-not": lambda: tuple({"reach": {"plain": {"all": reach(r)}}} for r in (0.0, 0.75)),
    "encoder-parameters": lambda: (parameters_of(), parameters_of(encoder_blocks=6)),
    "decoder-parameters": lambda: (parameters_of(), parameters_of(decoder_blocks=1)),
    "released-decoder-ignores-a-quarter": lambda: (unread(True, "as_released"), unread(False, "as_released")),
    "intended-decoder-reads-all": lambda: (unread(False, "as_intended"), unread(True, "as_intended")),
    "released-clamp-drops-the-gradient": lambda: (clamped(constant=True), clamped(constant=False)),
    "bpc-hardly-pulls": lambda: (contrast_share(1e-6), contrast_share(1.0)),
    "faster-than-tv": lambda: (timings(tv_iterations=400), timings(tv_iterations=1)),
    "target-is-not-the-slice": lambda: (whole_scan(), whole_scan(unit=data.MM_PER_CM)),
    "fbp-improves-with-views": lambda: (fbp_by_views(), fbp_by_views(kept=lambda views: 18)),
    # small trainings
    "beats-fbp-at-18": lambda: (trained_against("fbp", 18, 80), trained_against("fbp", 18, 0)),
    "beats-fbp-at-72": lambda: (trained_against("fbp", 72, 80), trained_against("fbp", 72, 0)),
    "beats-sirt-at-18": lambda: (trained_against("sirt", 18, 80), trained_against("sirt", 18, 0)),
    # at a known quality: the sabotage makes an arm what it would be without the part it is named for
    "intended-beats-released": lambda: (arms(), arms(gloredi=LEFT["released"])),
    "fourier-over-plain": lambda: (arms(), arms(fourier=LEFT["plain"])),
    "fourier-over-plain-small": lambda: (arms(), arms(fourier=LEFT["plain"])),
    "rdd-helps": lambda: (arms(), arms(rdd=LEFT["fourier"])),
    "rdd-helps-small": lambda: (arms(), arms(rdd=LEFT["fourier"])),
    "bpc-helps": lambda: (arms(), arms(gloredi=LEFT["rdd"])),
    "bpc-helps-small": lambda: (arms(), arms(gloredi=LEFT["rdd"])),
    "twice-the-views-is-the-better-teacher": lambda: (arms(), arms(gloredi=LEFT["full_teacher"])),
    "twice-the-views-is-the-better-teacher-small": lambda: (arms(), arms(gloredi=LEFT["full_teacher"])),
    "beats-unet": lambda: (arms(), arms(gloredi=1.0)),
    "beats-unet-small": lambda: (arms(), arms(gloredi=1.0)),
    "beats-tv-at-18": lambda: (arms(18), arms(18, gloredi=1.0)),
    "beats-tv-at-18-on-the-true-slice": lambda: (
        arms(18, "psnr_source"),
        arms(18, "psnr_source", gloredi=1.0),
    ),
    "better-with-more-views": lambda: (by_views(), by_views(network_reads=lambda views: 18)),
    "helps-on-a-tooth": lambda: (tooth(0.3), tooth(1.2)),
    "aapm-psnr-18": lambda: (at_quality(18, "psnr", 34.75), at_quality(18, "psnr", 34.75, scored="psnr_soft")),
    "aapm-psnr-36": lambda: (at_quality(36, "psnr", 37.54), at_quality(36, "psnr", 37.54, scored="psnr_soft")),
    "aapm-psnr-72": lambda: (at_quality(72, "psnr", 41.80), at_quality(72, "psnr", 41.80, scored="psnr_soft")),
    "aapm-ssim-18": lambda: (at_quality(18, "ssim", 0.9132), at_quality(18, "ssim", 0.9132, louder=1.2)),
    "leads-freeseed-at-18": lambda: (at_quality(18, "psnr", 34.75), at_quality(18, "psnr", 34.75, louder=1.2)),
    "trails-dudotrans-at-36": lambda: (at_quality(36, "psnr", 37.54), at_quality(36, "psnr", 37.54, louder=0.8)),
    "trails-freeseed-at-72": lambda: (at_quality(72, "psnr", 41.80), at_quality(72, "psnr", 41.80, louder=0.8)),
}


def test_every_claim_has_a_sabotage():
    assert set(SABOTAGE) == set(CLAIMS)


@pytest.mark.parametrize("name", SABOTAGE)
def test_sabotage_turns_the_verdict(name):
    assert_sabotage_turns(CLAIMS[name], *SABOTAGE[name]())
