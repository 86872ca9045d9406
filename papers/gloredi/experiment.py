"""The arms that are compared, and how one of them is built, trained and applied. The idea itself is in `method.py`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common import seeds
from common.models.unet import UNet
from papers.gloredi import method
from papers.gloredi.data import TripleSet, batches
from papers.gloredi.settings import Params

FULL = 0  # as `Arm.teacher`: the teacher sees the target itself
NO_BAR = partial(tqdm, disable=True)


@dataclass(frozen=True)
class Arm:
    """One bar of the comparison. `teacher`: None for no teacher, FULL for all views, else a multiple of V."""

    label: str
    network: Literal["fourier", "plain", "unet"] = "fourier"
    teacher: int | None = None
    contrast: bool = False
    released: bool = False


def arms(params: Params) -> dict[str, Arm]:
    """Every arm by name; `params.arms` says which are run."""
    factor = params.teacher_factor
    return {
        "unet": Arm("U-Net", network="unet"),
        "plain": Arm("plain conv", network="plain"),
        "fourier": Arm("Fourier"),
        "rdd": Arm("Fourier + RDD", teacher=factor),
        "gloredi": Arm("GloReDi", teacher=factor, contrast=True),
        "full_teacher": Arm("full-view teacher", teacher=FULL, contrast=True),
        "released": Arm("as released", teacher=factor, contrast=True, released=True),
    }


def build(params: Params, arm: Arm) -> nn.Module:
    """The network of an arm, freshly initialised from torch's global generator; all arms have (nearly) equal size."""
    if arm.network == "unet":
        return UNet(width=_closest(lambda width: UNet(width=width), inference_size(params)))
    return _gloredi(params, arm, bottleneck=plain_bottleneck(params) if arm.network == "plain" else None)


def variant(params: Params, arm: Arm) -> method.Variant:
    """The arm's variant: as released if the arm says so, else the run's, with BPC only where the arm has it."""
    chosen = method.VARIANTS["as_released" if arm.released else params.variant]
    return replace(chosen, contrast=chosen.contrast and arm.contrast)


def inference_size(params: Params) -> int:
    """Parameters of the Fourier student, encoder and decoder, without a teacher."""
    return parameter_count(_gloredi(params, Arm("")))


def plain_bottleneck(params: Params) -> int:
    """The bottleneck channels at which the plain-conv network has the Fourier network's size and depth."""

    def candidate(channels: int) -> nn.Module:
        return _gloredi(params, Arm("", network="plain"), bottleneck=channels)

    return _closest(candidate, inference_size(params))


def parameter_count(network: nn.Module) -> int:
    """Parameters used at inference: all, but for a GloReDi those of the student alone."""
    parts = [network]
    if isinstance(network, method.GloReDi):
        parts = [network.student_encoder, network.student_decoder]
    return sum(p.numel() for part in parts for p in part.parameters())


@seeds.one_thread()  # networks as small as ours only lose by a second one, and a GPU has no use for it
def fit(
    params: Params,
    arm: Arm,
    training: TripleSet,
    views: int,
    seed: int,
    *,
    progress: Callable = NO_BAR,
) -> dict:
    """Train one arm with one seed on images of `views` views.

    Returns `state` (state dict on the CPU), `curves` {loss: [(step, value), ...]} and `seconds`. Arms of the same seed
    see the same batches in the same order. `progress(iterable, title, total=...)` draws a bar.
    """
    seeds.everything(seed, deterministic=False)
    network = build(params, arm).to(params.device).train()
    steps = params.steps or math.ceil(params.epochs * len(training) / params.batch)
    step = _stepper(params, arm, network)
    history: dict[str, list[tuple[int, float]]] = {}
    started = time.perf_counter()
    title = f"{arm.label} {views} views, seed {seed}"
    bar = progress(batches(len(training), params.batch, steps, seed), title, total=steps)
    for index, chosen in enumerate(bar):
        losses = step(training.batch(chosen, views), index / steps)
        if losses is None:
            break  # the released schedule ends where its last stage would begin
        if index % max(1, steps // 100) == 0 or index == steps - 1:
            bar.set_postfix(**losses)
            for name, value in losses.items():
                history.setdefault(name, []).append((index, value))
    state = {name: value.cpu() for name, value in network.state_dict().items()}
    return {"state": state, "curves": history, "seconds": time.perf_counter() - started}


@torch.no_grad()
def reconstruct(network: nn.Module, images: Tensor, *, chunk: int = 8) -> Tensor:
    """FBP images [N, 1, H, W] in 1/cm -> the network's, in evaluation mode."""
    network.eval()
    return torch.cat([network(part) for part in images.split(chunk)])


def restore(params: Params, arm: Arm, state: dict) -> nn.Module:
    """The trained network of a result of `fit`."""
    network = build(params, arm)
    network.load_state_dict(state)
    return network.to(params.device)


def _gloredi(params: Params, arm: Arm, bottleneck: int | None = None) -> method.GloReDi:
    return method.GloReDi(
        variant(params, arm),
        width=params.width,
        encoder_blocks=params.encoder_blocks,
        decoder_blocks=params.decoder_blocks,
        global_ratio=0.0 if arm.network == "plain" else params.global_ratio,
        bottleneck=bottleneck,
    )


def _stepper(params: Params, arm: Arm, network: nn.Module) -> Callable:
    """The update of one batch: (triple, progress) -> losses, or None where the schedule is over."""
    weights = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=params.learning_rate)
    if not isinstance(network, method.GloReDi):
        clamp = method.LossClamp(constant=False) if params.clamp else nn.Identity()
    else:
        distillation = method.Distillation(
            network,
            w_distill=params.w_distill,
            w_contrast=params.w_contrast,
            temperature=params.temperature,
            bank=params.bank,
            band=(params.band_low, params.band_high),
            clamp=params.clamp,
        )

    def step(triple, progress: float) -> dict[str, float] | None:
        for group in optimizer.param_groups:
            group["lr"] = method.learning_rate(progress, params.learning_rate)
        if not isinstance(network, method.GloReDi):
            loss = F.smooth_l1_loss(network(triple.sparse), triple.target)
            optimizer.zero_grad()
            clamp(loss).backward()
            optimizer.step()
            return {"pixel": loss.item()}
        last = method.in_finetuning(progress)
        if last and arm.teacher is not None and not network.variant.finetune:
            return None
        if last or arm.teacher is None:
            return distillation.finetune(triple.sparse, triple.target, optimizer)
        intermediate = triple.target if arm.teacher == FULL else triple.intermediate
        return distillation.step(triple.sparse, intermediate, triple.target, optimizer)

    return step


def _closest(candidate: Callable[[int], nn.Module], size: int) -> int:
    """The whole number at which `candidate(n)`, growing with n, is closest to `size` parameters."""
    low, high = 4, 8
    while parameter_count(candidate(high)) < size:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if parameter_count(candidate(middle)) < size:
            low = middle
        else:
            high = middle
    return min((low, high), key=lambda n: abs(parameter_count(candidate(n)) - size))
