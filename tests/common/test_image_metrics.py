"""Image metrics against scikit-image, torchmetrics and closed forms."""

import math

import numpy as np
import pytest
import skimage.metrics
import torch

from common.data import ct
from common.metrics.image import CLIP, LUNG, SOFT_TISSUE, mae, psnr, rmse, rmse_hu, ssim, window


def pair(shape, seed=0, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    reference = torch.from_numpy(rng.random(shape))
    image = reference + 0.1 * torch.from_numpy(rng.standard_normal(shape))
    return image.to(dtype), reference.to(dtype)


def skimage_ssim(image, reference, data_range):
    return skimage.metrics.structural_similarity(
        image.numpy(),
        reference.numpy(),
        data_range=data_range,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )


@pytest.mark.parametrize("shape", [(11, 11), (40, 33), (64, 64)])
@pytest.mark.parametrize("data_range", [1.0, 2.5])
def test_against_scikit_image(shape, data_range):
    image, reference = pair(shape)
    expected = skimage.metrics.peak_signal_noise_ratio(reference.numpy(), image.numpy(), data_range=data_range)
    assert psnr(image, reference, data_range=data_range).item() == pytest.approx(expected, rel=1e-12)
    expected = skimage_ssim(image, reference, data_range)
    assert ssim(image, reference, data_range=data_range).item() == pytest.approx(expected, rel=1e-10)
    expected = math.sqrt(skimage.metrics.mean_squared_error(reference.numpy(), image.numpy()))
    assert rmse(image, reference).item() == pytest.approx(expected, rel=1e-12)


def test_against_torchmetrics():
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    image, reference = pair((3, 1, 48, 40))
    expected, full = structural_similarity_index_measure(
        image, reference, data_range=1.0, reduction="none", return_full_image=True
    )
    inside = full[..., 5:-5, 5:-5].mean((-1, -2))
    torch.testing.assert_close(ssim(image, reference, data_range=1.0), inside, rtol=1e-9, atol=0)
    # torchmetrics mirrors and keeps the rim: the inside of the mirrored images is the same
    mirrored = [torch.nn.functional.pad(each, (5, 5, 5, 5), mode="reflect") for each in (image, reference)]
    torch.testing.assert_close(ssim(*mirrored, data_range=1.0)[:, 0], expected, rtol=1e-9, atol=0)
    for one, other in zip(image, reference, strict=True):
        expected = peak_signal_noise_ratio(one, other, data_range=1.0)
        torch.testing.assert_close(psnr(one, other, data_range=1.0)[0], expected, rtol=1e-6, atol=0, check_dtype=False)


def test_on_a_real_slice(real_data):
    """float32 HU of a real scan, where SSIM in single precision loses digits, against scikit-image in double."""
    volume = ct.npz_volume(real_data("ct_phantom_head_philips") / "bone_1mm_256.npz")
    reference = window(volume.hu[60:63], *CLIP)
    image = window(volume.hu[60:63] + 40 * torch.randn(3, 256, 256, generator=torch.Generator().manual_seed(0)), *CLIP)
    ours = ssim(image, reference, data_range=1.0)
    for index in range(3):
        expected = skimage_ssim(image[index].double(), reference[index].double(), 1.0)
        assert ours[index].item() == pytest.approx(expected, rel=1e-9)
    shifted = window(volume.hu[61:64], *CLIP)
    assert (psnr(shifted, reference, data_range=1.0) < psnr(reference + 1e-6, reference, data_range=1.0)).all()


def test_zero_border_is_a_padded_convolution_over_all_pixels():
    """The definition, written out with a dense window and explicit zeros."""
    image, reference = pair((20, 14))
    offset = np.arange(11) - 5
    weights = np.exp(-(offset[:, None] ** 2 + offset[None, :] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()

    def smooth(values):
        padded = np.pad(values, 5)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (11, 11))
        return (windows * weights).sum((-1, -2))

    x, y = image.numpy(), reference.numpy()
    mx, my = smooth(x), smooth(y)
    vx, vy, vxy = smooth(x * x) - mx**2, smooth(y * y) - my**2, smooth(x * y) - mx * my
    full = (2 * mx * my + 1e-4) * (2 * vxy + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    assert ssim(image, reference, data_range=1.0, border="zero").item() == pytest.approx(full.mean(), rel=1e-10)
    assert ssim(image, reference, data_range=1.0).item() == pytest.approx(full[5:-5, 5:-5].mean(), rel=1e-10)
    assert abs(full.mean() - full[5:-5, 5:-5].mean()) > 1e-3


@pytest.mark.parametrize("metric", [rmse, mae, lambda x, y: psnr(x, y, data_range=1.0)])
def test_batches_are_image_by_image(metric):
    image, reference = pair((2, 3, 16, 12))
    batched = metric(image, reference)
    assert batched.shape == (2, 3) and batched.dtype == torch.float64
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(batched[i, j], metric(image[i, j], reference[i, j]), rtol=1e-12, atol=0)
    assert batched.unique().numel() == 6


def test_ssim_batches_and_symmetry():
    image, reference = pair((2, 3, 16, 12))
    batched = ssim(image, reference, data_range=1.0)
    assert batched.shape == (2, 3)
    torch.testing.assert_close(batched[1, 2], ssim(image[1, 2], reference[1, 2], data_range=1.0))
    torch.testing.assert_close(batched, ssim(reference, image, data_range=1.0))
    torch.testing.assert_close(ssim(image, image, data_range=1.0), torch.ones(2, 3, dtype=torch.float64))


def test_known_values():
    zero, tenth = torch.zeros(8, 8), torch.full((8, 8), 0.1, dtype=torch.float64)
    assert psnr(tenth, zero, data_range=1.0).item() == pytest.approx(20.0)
    assert psnr(tenth, zero, data_range=2.0).item() == pytest.approx(20.0 + 20 * math.log10(2))
    assert rmse(tenth, zero).item() == mae(tenth, zero).item() == pytest.approx(0.1)
    assert psnr(tenth, tenth, data_range=1.0).item() == math.inf
    half = torch.zeros(2, 2)
    half[0] = 2.0
    assert mae(half, torch.zeros(2, 2)).item() == 1.0
    assert rmse(half, torch.zeros(2, 2)).item() == pytest.approx(math.sqrt(2))


def test_integers_do_not_wrap_round():
    image, reference = torch.zeros(12, 12, dtype=torch.uint8), torch.full((12, 12), 200, dtype=torch.uint8)
    assert mae(image, reference).item() == 200
    assert psnr(image, reference, data_range=255).item() == pytest.approx(20 * math.log10(255 / 200))


def test_nan_stays_in_its_image():
    image, reference = pair((2, 16, 16))
    image[0, 8, 8] = math.nan
    for value in (rmse(image, reference), mae(image, reference), psnr(image, reference, data_range=1.0)):
        assert value[0].isnan() and value[1].isfinite()
    value = ssim(image, reference, data_range=1.0)
    assert value[0].isnan() and value[1].isfinite()


def test_the_range_must_be_said():
    image, reference = pair((16, 16))
    for metric in (psnr, ssim):
        with pytest.raises(TypeError, match="data_range"):
            metric(image, reference)
        for wrong in (0.0, -1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match="data_range"):
                metric(image, reference, data_range=wrong)
    # why it is asked for: a range guessed too large flatters a low-contrast image
    image, reference = 0.1 * image, 0.1 * reference
    assert ssim(image, reference, data_range=2.0) > ssim(image, reference, data_range=1.0) + 0.01


def test_wrong_inputs_are_named():
    image, reference = pair((16, 16))
    with pytest.raises(ValueError, match=r"\(16, 16\) and \(16, 15\)"):
        rmse(image, reference[:, :15])
    with pytest.raises(ValueError, match=r"\(1, 16, 16\) and \(16, 16\)"):  # no silent broadcasting
        psnr(image[None], reference, data_range=1.0)
    with pytest.raises(TypeError, match="ndarray"):
        mae(image.numpy(), reference)
    with pytest.raises(TypeError, match="complex"):
        mae(image.to(torch.complex64), reference)
    with pytest.raises(ValueError, match="smaller than the window"):
        ssim(image[:10], reference[:10], data_range=1.0)
    with pytest.raises(ValueError, match="zero"):
        ssim(image, reference, data_range=1.0, border="reflect")
    with pytest.raises(ValueError, match="with pixels"):
        rmse(image[:0], reference[:0])


def test_windows():
    hu = torch.tensor([-2000.0, -1000.0, -600.0, -200.0, 50.0, 300.0, 2000.0, 3000.0])
    torch.testing.assert_close(window(hu, *CLIP)[[0, 1, 6, 7]], torch.tensor([0.0, 0.0, 1.0, 1.0]))
    torch.testing.assert_close(window(hu, *SOFT_TISSUE)[[3, 4, 5]], torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(window(hu, *LUNG)[[1, 2, 3]], torch.tensor([0.0, 0.5, 1.0]))
    with pytest.raises(ValueError, match="width"):
        window(hu, 0.0, 0.0)


def test_rmse_in_hu():
    reference = torch.full((4, 4), 100.0)
    assert rmse_hu(reference + 30, reference).item() == pytest.approx(30, rel=1e-5)
    assert rmse_hu(reference + 3000, reference).item() == pytest.approx(1900, rel=1e-6)  # clipped at 2000 HU
    assert rmse_hu(reference + 3000, reference, clip=None).item() == 3000
    image, reference = pair((3, 32, 32))
    image, reference = 3500 * image - 1200, 3500 * reference - 1200
    dB = psnr(window(image, *CLIP), window(reference, *CLIP), data_range=1.0)
    torch.testing.assert_close(rmse_hu(image, reference), 3000 * 10 ** (-dB / 20), rtol=1e-12, atol=0)
