"""What `kernels.bench` times for the photometric loss: loss and gradient beside pytorch-msssim and plain torch.

The window means of the photograph are given, as in a training. pytorch-msssim, which nerfstudio uses, has no padding
and no L1; its time is of D-SSIM and its gradient by autograd alone. fused-ssim runs on CUDA only.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from kernels import info, ssim
from kernels.bench import CORES, Case, Contender, other_isas, with_isa
from kernels.ssim import reference

PEERS: tuple[str, ...] = ("pytorch-msssim",)
SIZES = ((252, 189), (504, 378), (1008, 756))  # pixels


def cases(quick: bool) -> Iterator[Case]:
    """Loss and gradient of colour images of three sizes; with `quick` a tiny one."""
    for width, height in [(32, 24)] if quick else SIZES:
        yield _case(width, height)


def _case(width: int, height: int) -> Case:
    generator = torch.Generator().manual_seed(0)
    photo = torch.rand(height, width, 3, generator=generator)
    render = (photo + 0.1 * torch.randn(photo.shape, generator=generator)).clamp(0, 1)
    isa = info()["isa"]
    ours = partial(_kernel, render, _prepared(photo))
    contenders = [Contender(f"ours {isa}", ours, _gradient, threads, ours=True) for threads in ((1, 2)[:CORES])]
    contenders += [
        Contender(f"ours {other}", partial(with_isa, other, ours), _gradient, ours=True) for other in other_isas()
    ]
    plain = partial(_plain, render, _prepared(photo))
    contenders.append(Contender("plain torch", plain, _gradient, ours=True, note="reference.py in float32"))
    contenders.append(_msssim(render, photo))
    return Case(
        name=f"{width}x{height}",
        call="loss+gradient",
        contenders=contenders,
        baseline="plain torch",
        exact=lambda: _gradient(_plain(render.double(), _prepared(photo.double()))),
        data_bytes=4 * 5 * photo.numel(),
    )


def _prepared(photo: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean = reference.window_mean(photo)
    return photo, mean, reference.window_mean(photo.square()) - mean.square()


def _kernel(render: Tensor, photo: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    return ssim.photometric(render, *photo)


def _plain(render: Tensor, photo: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    return reference.photometric(render, *photo, None, 0.2, True)


def _gradient(out: tuple[Tensor, Tensor | None]) -> Tensor:
    assert out[1] is not None
    return out[1]


def _msssim(render: Tensor, photo: Tensor) -> Contender:
    name = "pytorch-msssim"
    if find_spec("pytorch_msssim") is None:
        return Contender(name, None, note=f"{name} is not installed: make setup-peers")
    from pytorch_msssim import ssim as theirs

    x, y = (image.movedim(-1, 0)[None].contiguous() for image in (render, photo))

    def run() -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(1 - theirs(leaf, y, data_range=1.0), leaf)[0]

    return Contender(name, run, note="D-SSIM alone, no padding")
