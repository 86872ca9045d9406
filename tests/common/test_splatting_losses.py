"""Losses of splatting: SSIM by its definition, gradients by differences, and what the others must be blind to."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.metrics.image import ssim as measured_ssim
from common.splatting.losses import (
    Target,
    edge_aware_smoothness,
    pearson,
    pearson_patches,
    photometric,
    ssim,
    total_variation,
)


def images(height: int, width: int, channels: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Two images [2, H, W, C] that resemble each other."""
    g = torch.Generator().manual_seed(seed)
    first = torch.rand(height, width, channels, generator=g, dtype=dtype)
    return torch.stack([first, (first + 0.3 * torch.rand(first.shape, generator=g, dtype=dtype)).clamp(0, 1)])


def literal_ssim(x: Tensor, y: Tensor) -> float:
    """Pixel by pixel with an 11 x 11 window, as in Wang et al. 2004; zeros outside the image."""
    offsets = torch.arange(-5, 6, dtype=torch.float64)
    window = torch.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window = window / window.sum()
    total = 0.0
    for a, b in zip(x.unbind(-1), y.unbind(-1), strict=True):
        a, b = (torch.nn.functional.pad(image, (5, 5, 5, 5)) for image in (a, b))
        for row in range(x.shape[0]):
            for column in range(x.shape[1]):
                box = (slice(row, row + 11), slice(column, column + 11))
                mean_a, mean_b = (window * a[box]).sum(), (window * b[box]).sum()
                var_a = (window * a[box] ** 2).sum() - mean_a**2
                var_b = (window * b[box] ** 2).sum() - mean_b**2
                covariance = (window * a[box] * b[box]).sum() - mean_a * mean_b
                above = (2 * mean_a * mean_b + 0.01**2) * (2 * covariance + 0.03**2)
                total += float(above / ((mean_a**2 + mean_b**2 + 0.01**2) * (var_a + var_b + 0.03**2)))
    return total / x.numel()


@pytest.mark.parametrize("size", [(14, 17), (5, 30), (1, 1)])
def test_ssim_is_its_definition(size: tuple[int, int]) -> None:
    x, y = images(*size)
    assert float(ssim(x, y)) == pytest.approx(literal_ssim(x, y), rel=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 4), st.integers(0, 99))
def test_ssim_is_what_the_metric_measures(height: int, width: int, channels: int, seed: int) -> None:
    x, y = images(height, width, channels, seed)
    planes = (x.movedim(-1, 0), y.movedim(-1, 0))
    expected = float(measured_ssim(*planes, data_range=1.0, border="zero").mean())
    assert float(ssim(x, y)) == pytest.approx(expected, rel=1e-10)
    assert float(ssim(x, x)) == pytest.approx(1.0, rel=1e-12)


def test_float32_is_close_to_float64() -> None:
    x, y = images(60, 70)
    # variances are differences of means of about 0.5: float32 leaves them 1e-7 off, against C2 = 9e-4
    assert float(ssim(x.float(), y.float())) == pytest.approx(float(ssim(x, y)), abs=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dssim", [0.0, 0.2, 1.0])
def test_the_gradient_is_that_of_the_loss(dssim: float, weighted: bool) -> None:
    x, y = images(13, 12, 1)
    weight = torch.rand(13, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64) if weighted else None
    if weight is not None:
        weight[3:6] = 0
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: photometric(x, Target(y, weight), dssim=dssim), x)


def test_photometric_is_the_weighted_sum() -> None:
    x, y = images(20, 30)
    expected = 0.8 * (x - y).abs().mean() + 0.2 * (1 - ssim(x, y))
    assert float(photometric(x, y)) == pytest.approx(float(expected), rel=1e-12)
    assert float(photometric(x, Target(y), dssim=0.0)) == pytest.approx(float((x - y).abs().mean()), rel=1e-12)


def test_a_pixel_of_weight_zero_leaks_nowhere() -> None:
    x, y = images(30, 30)
    weight = torch.ones(30, 30)
    weight[10:20, 5:15] = 0
    x.requires_grad_()
    photometric(x, Target(y, weight)).backward()
    assert x.grad is not None
    assert bool((x.grad[10:20, 5:15] == 0).all())
    assert bool((x.grad[:10] != 0).any())
    x = x.detach()
    changed = x.clone()
    changed[10:20, 5:15] = 7.0
    assert torch.equal(photometric(changed, Target(y, weight)), photometric(x, Target(y, weight)))
    repainted = y.clone()
    repainted[10:20, 5:15] = 0.0
    assert torch.equal(photometric(x, Target(repainted, weight)), photometric(x, Target(y, weight)))
    assert float(photometric(x, Target(y, torch.ones(30, 30)))) == pytest.approx(float(photometric(x, y)))


def test_a_weight_counts_as_often() -> None:
    x, y = images(8, 9)
    weight = torch.rand(8, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = (weight[..., None] * (x - y).abs()).sum() / (3 * weight.sum())
    assert float(photometric(x, Target(y, weight), dssim=0.0)) == pytest.approx(float(expected), rel=1e-12)


def test_wrong_images_are_refused() -> None:
    x, y = images(12, 13)
    with pytest.raises(ValueError, match="photograph's camera"):
        photometric(x[:-1], y)
    with pytest.raises(ValueError, match="positive value somewhere"):
        Target(y, torch.zeros(12, 13))
    with pytest.raises(ValueError, match=r"weight is \[12, 13\]"):
        Target(y, torch.ones(13, 12))
    with pytest.raises(ValueError, match=r"image is \[H, W, C\]"):
        Target(y[..., 0])


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 100), st.floats(-100, 100), st.integers(0, 99))
def test_pearson_is_blind_to_scale_and_shift(scale: float, shift: float, seed: int) -> None:
    a, b = images(15, 16, 1, seed)[..., 0]
    # float64 keeps 16 digits, a shift of 1e4 standard deviations costs 8 of them
    assert float(pearson(scale * a + shift, b)) == pytest.approx(float(pearson(a, b)), abs=1e-6)
    assert float(pearson(a, scale * a + shift)) == pytest.approx(0.0, abs=1e-6)
    assert float(pearson(a, -scale * a + shift)) == pytest.approx(2.0, abs=1e-6)


def test_pearson_is_numpys_correlation_and_weights_choose_pixels() -> None:
    a, b = images(15, 16, 1)[..., 0]
    expected = 1 - float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])
    assert float(pearson(a, b)) == pytest.approx(expected, rel=1e-10)
    weight = torch.zeros(15, 16, dtype=torch.float64)
    weight[:, :5] = 0.3
    assert float(pearson(a, b, weight)) == pytest.approx(float(pearson(a[:, :5], b[:, :5])), rel=1e-10)
    with pytest.raises(ValueError, match="one shape"):
        pearson(a, b[1:])


@pytest.mark.parametrize("flat", ["first", "second", "both", "nothing weighs"])
def test_pearson_of_a_constant_map_is_one_with_a_finite_gradient(flat: str) -> None:
    a, b = images(8, 9, 1)[..., 0]
    a = torch.full_like(a, 3.0) if flat in ("first", "both") else a.clone()
    b = torch.full_like(b, 3.0) if flat in ("second", "both") else b
    weight = torch.zeros_like(a) if flat == "nothing weighs" else None
    assert float(pearson(a, b, weight)) == pytest.approx(1.0)
    pearson(a.requires_grad_(), b, weight).backward()
    assert a.grad is not None and bool(torch.isfinite(a.grad).all())


def test_patches_are_the_mean_of_pearson_over_their_boxes() -> None:
    a, b = images(40, 50, 1)[..., 0]
    value = pearson_patches(a, b, size=10, share=0.5, generator=torch.Generator().manual_seed(3))
    g = torch.Generator().manual_seed(3)
    count = int(0.5 * 4 * 5)
    rows = torch.randint(31, (count,), generator=g).tolist()
    columns = torch.randint(41, (count,), generator=g).tolist()
    boxes = [(slice(r, r + 10), slice(c, c + 10)) for r, c in zip(rows, columns, strict=True)]
    assert float(value) == pytest.approx(sum(float(pearson(a[box], b[box])) for box in boxes) / count, rel=1e-10)
    assert float(value) != pytest.approx(float(pearson(a, b)))  # not the global one
    with pytest.raises(ValueError, match=r"expected 2\.\.40"):
        pearson_patches(a, b, size=41, generator=g)


def test_patches_count_the_pixels_that_weigh() -> None:
    a, b = images(12, 12, 1)[..., 0]
    weight = torch.zeros_like(a)
    weight[:, :7] = 0.3
    one_box = {"size": 12, "generator": torch.Generator().manual_seed(0)}
    assert float(pearson_patches(a, b, weight, **one_box)) == pytest.approx(float(pearson(a[:, :7], b[:, :7])))
    assert float(pearson_patches(a, b, torch.zeros_like(a), **one_box)) == pytest.approx(1.0), "as a constant map"


def test_smoothness_counts_steps_and_forgives_them_at_edges() -> None:
    depth = torch.zeros(10, 12)
    depth[:, 6:] = 2.0
    image = torch.zeros(10, 12, 3)
    step = 2.0 * 10 / (10 * 11)  # one of eleven differences in each row
    assert float(total_variation(depth)) == pytest.approx(step)
    assert float(edge_aware_smoothness(depth, image)) == pytest.approx(step)
    image[:, 6:] = 1.0
    assert float(edge_aware_smoothness(depth, image)) == pytest.approx(step * math.exp(-1))
    image[:, 6:] = 0.0
    image[:, 8:] = 1.0  # an edge elsewhere forgives nothing
    assert float(edge_aware_smoothness(depth, image)) == pytest.approx(step)
    assert float(total_variation(depth[..., None].expand(-1, -1, 3))) == pytest.approx(step)
