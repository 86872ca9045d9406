"""The photometric kernel: against the float64 specification, on every instruction set, bit for bit on any threads.

The specification itself is held to SSIM's definition and to differences in tests/common/test_splatting_losses.py.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import KernelUnavailable, info
from kernels.bench import other_isas
from kernels.ssim import photometric, reference, window_mean

ISAS = [info()["isa"], *other_isas(), "emulated512"]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("KERNELS_ISA", request.param)
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pair(height: int, width: int, channels: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    photo = torch.rand(height, width, channels, generator=generator)
    return (photo + 0.2 * torch.randn(photo.shape, generator=generator)).clamp(0, 1), photo


def prepared(photo: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean = reference.window_mean(photo)
    return photo, mean, reference.window_mean(photo.square()) - mean.square()


def compare(render: Tensor, photo: Tensor, weight: Tensor | None = None, dssim: float = 0.2) -> None:
    """float32 in C++ against float64 in torch; the means and variances are the same numbers in both."""
    given = prepared(photo)
    loss, gradient = photometric(render, *given, weight=weight, dssim=dssim)
    wide = [tensor.double() for tensor in given]
    expected, slope = reference.photometric(
        render.double(), *wide, None if weight is None else weight.double(), dssim, True
    )
    assert gradient is not None and slope is not None
    # m(x^2) - m(x)^2 is 1e-7 off where both are near 1, and C2 = 9e-4 is the least that it is divided by
    assert float(loss) == pytest.approx(float(expected), abs=2e-5)
    assert float((gradient - slope).norm()) <= 1e-3 * float(slope.norm())


SIZES = [(1, 1, 1), (1, 40, 3), (40, 1, 3), (3, 5, 4), (11, 16, 1), (23, 37, 3), (64, 51, 3), (12, 9, 7)]


@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_specification(size: tuple[int, int, int], isa: str) -> None:
    compare(*pair(*size))
    torch.testing.assert_close(window_mean(pair(*size)[0]), reference.window_mean(pair(*size)[0]), atol=3e-7, rtol=0)


@pytest.mark.parametrize("dssim", [0.0, 0.2, 1.0])
def test_weights_and_shares(dssim: float, isa: str) -> None:
    render, photo = pair(33, 29)
    weight = torch.rand(33, 29, generator=torch.Generator().manual_seed(3))
    weight[5:9] = 0
    compare(render * weight[..., None], photo * weight[..., None], weight, dssim)
    compare(render, photo, dssim=dssim)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 5), st.integers(0, 99))
def test_any_size(height: int, width: int, channels: int, seed: int) -> None:
    compare(*pair(height, width, channels, seed))


@pytest.mark.parametrize("size", [(90, 70, 3), (2, 9000, 1), (200, 30, 3)])
def test_the_same_bits_on_any_number_of_threads(size: tuple[int, int, int], threads: None, isa: str) -> None:
    render, photo = pair(*size)
    given = prepared(photo)
    found = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        loss, gradient = photometric(render, *given)
        assert gradient is not None
        found.append((loss, gradient, window_mean(photo)))
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_an_image_equal_to_its_photograph_has_no_loss_and_no_gradient(isa: str) -> None:
    _, photo = pair(30, 31)
    loss, gradient = photometric(photo, *prepared(photo))
    assert gradient is not None
    assert float(loss) == pytest.approx(0.0, abs=1e-6)
    # the slope of the loss is of the order of 1 / numel wherever the images differ
    assert float(gradient.abs().max()) < 1e-4 / photo.numel()


def test_black_and_flat_images_are_no_trouble(isa: str) -> None:
    black, grey = torch.zeros(20, 20, 3), torch.full((20, 20, 3), 0.5)
    for render, photo in ((black, black), (black, grey), (grey, black), (grey, grey)):
        finite(render, photo)


def finite(render: Tensor, photo: Tensor) -> None:
    loss, gradient = photometric(render, *prepared(photo))
    assert gradient is not None
    assert bool(gradient.isfinite().all()) and bool(loss.isfinite())


def test_a_broken_pixel_shows_in_the_loss(isa: str) -> None:
    render, photo = pair(20, 21)
    render[4, 5, 1] = torch.nan
    loss, _ = photometric(render, *prepared(photo))
    assert bool(loss.isnan())


def test_without_the_gradient_the_loss_is_the_same() -> None:
    render, photo = pair(40, 41)
    loss, gradient = photometric(render, *prepared(photo), gradient=False)
    assert gradient is None
    assert torch.equal(loss, photometric(render, *prepared(photo))[0])


def test_strided_images_and_histories_are_taken() -> None:
    render, photo = pair(24, 26)
    planes = render.movedim(-1, 0).contiguous().movedim(0, -1).requires_grad_()
    loss, gradient = photometric(planes, *prepared(photo))
    assert gradient is not None
    expected, slope = photometric(render, *prepared(photo))
    assert slope is not None
    assert torch.equal(loss, expected) and torch.equal(gradient, slope)
    assert not loss.requires_grad and not gradient.requires_grad


def test_float64_runs_the_specification_and_backends_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    render, photo = pair(12, 13)
    double = photometric(render.double(), *prepared(photo.double()))
    assert double[0].dtype == torch.float64
    monkeypatch.setenv("KERNELS_BACKEND", "reference")
    plain = photometric(render, *prepared(photo))
    expected = reference.photometric(render, *prepared(photo), None, 0.2, True)
    assert torch.equal(plain[0], expected[0])
    monkeypatch.setenv("KERNELS_BACKEND", "cpu")
    with pytest.raises(KernelUnavailable, match="expected a float32 tensor on 'cpu'"):
        photometric(render.double(), *prepared(photo.double()))
    monkeypatch.setenv("KERNELS_BACKEND", "triton")
    with pytest.raises(KernelUnavailable, match="no Triton kernels of this op"):
        window_mean(photo)


def test_wrong_input_is_refused() -> None:
    render, photo = pair(12, 13)
    mean, variance = prepared(photo)[1:]
    with pytest.raises(ValueError, match=r"photo is \[11, 13, 3\]; expected \[12, 13, 3\]"):
        photometric(render, photo[1:], mean, variance)
    with pytest.raises(ValueError, match=r"weight is \[13, 12\]; expected \[12, 13\]"):
        photometric(render, photo, mean, variance, weight=torch.ones(13, 12))
    with pytest.raises(ValueError, match=r"expected \[H, W, C\], none of them 0"):
        window_mean(torch.zeros(0, 4, 3))
    with pytest.raises(ValueError, match=r"render is \[12, 13\]"):
        photometric(render[..., 0], photo, mean, variance)
    with pytest.raises(TypeError, match=r"mean is torch\.float64 on cpu; expected torch\.float32"):
        photometric(render, photo, mean.double(), variance)
    with pytest.raises(TypeError, match=r"got dtype torch\.float16"):
        window_mean(photo.half())


@pytest.mark.skipif(bool(info()["sanitized"]), reason="the sanitizers need memory of their own")
def test_memory_does_not_grow_with_the_image_but_for_the_gradient() -> None:
    """In a process of its own: what 12 megapixels add is the gradient (137 MiB), not maps beside it."""
    code = """
import torch
from kernels.bench import Contender, _extra_mib
from kernels.ssim import photometric
image = torch.rand(3000, 4000, 3)
found = _extra_mib(Contender("ours", lambda: photometric(image, image, image, image), ours=True))
print("none" if found is None else found)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    found = run.stdout.strip()
    if found == "none":
        pytest.skip("this system does not tell the peak of a call")
    gradient = 4 * 3000 * 4000 * 3 / 2**20
    assert gradient < float(found) < gradient + 16
