"""GMSD against scipy and hand-made cases, LPIPS against torchmetrics with the same (random) backbone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.signal import convolve2d
from torch import nn

from common.metrics import perceptual
from common.metrics.perceptual import Lpips, MissingWeights, gmsd, load_lpips


def pair(height: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    reference = torch.rand(3, height, width, generator=generator)
    return (reference + 0.2 * torch.randn(3, height, width, generator=generator)).clamp(0, 1), reference


def gmsd_by_scipy(image: np.ndarray, reference: np.ndarray) -> float:
    """The authors' MATLAB, line by line: conv2(..., 'same'), every second pixel, std2."""

    def gradient(rgb: np.ndarray) -> np.ndarray:
        grey = 255 * np.tensordot([0.299, 0.587, 0.114], rgb, axes=1)
        padded = np.pad(grey, ((0, 1), (0, 1)))  # conv2 'same' with a 2 x 2 kernel looks down and right
        half = convolve2d(padded, np.full((2, 2), 0.25), mode="valid")[::2, ::2]
        kernel = np.array([[1, 0, -1]] * 3) / 3
        across, down = (convolve2d(half, k, mode="same") for k in (kernel, kernel.T))
        return np.sqrt(across**2 + down**2)

    a, b = gradient(image), gradient(reference)
    return float(np.std((2 * a * b + 170) / (a**2 + b**2 + 170), ddof=1))


@pytest.mark.parametrize("size", [(40, 56), (41, 57), (3, 8)])
def test_gmsd_is_the_authors(size):
    image, reference = pair(*size)
    expected = gmsd_by_scipy(image.double().numpy(), reference.double().numpy())
    assert gmsd(image, reference).item() == pytest.approx(expected, rel=1e-6)  # float32 inputs, float64 arithmetic


def test_gmsd_by_hand():
    """A step of 255 * 0.1 grey values between two halves, against a flat image: two columns differ, all others agree.

    With gradient g there, similarity is c / (g^2 + c); rows at the rim have other gradients, so look at the middle row.
    """
    flat, step = torch.zeros(3, 8, 16), torch.zeros(3, 8, 16)
    step[..., 8:] = 0.1
    gradient = perceptual._gradient(step)[1]  # [8]: 8 columns of the halved image
    # 255 * 0.1 = 25.5, over three rows and divided by three; the last column sees zeros behind the rim
    torch.testing.assert_close(gradient, torch.tensor([0, 0, 0, 25.5, 25.5, 0, 0, 25.5]).double(), rtol=1e-6, atol=1e-6)
    assert perceptual._gradient(flat).abs().max() == 0


def test_gmsd_grows_with_blur_and_is_blind_to_nothing():
    _, sharp = pair(48, 48)
    blurs = [torch.nn.functional.avg_pool2d(sharp[None], k, 1, k // 2, count_include_pad=False)[0] for k in (3, 5, 9)]
    values = [gmsd(sharp, sharp).item(), *(gmsd(blur, sharp).item() for blur in blurs)]
    assert values[0] == 0
    assert values[0] < values[1] < values[2] < values[3]


def test_batches_are_single_images_and_nan_stays_where_it_is():
    pairs = [pair(40, 40, seed) for seed in range(4)]
    image, reference = (torch.stack(column).reshape(2, 2, 3, 40, 40) for column in zip(*pairs, strict=True))
    single = torch.stack([gmsd(*each) for each in pairs]).reshape(2, 2)
    torch.testing.assert_close(gmsd(image, reference), single)
    image[0, 1, 0, 5, 5] = torch.nan
    assert gmsd(image, reference).isnan().tolist() == [[False, True], [False, False]]


def random_lpips(net: str) -> tuple[Lpips, nn.Module]:
    """Ours, and torchmetrics' with the published linear weights and the same random backbone."""
    import torchvision
    from torchmetrics.functional.image.lpips import _LPIPS

    theirs = _LPIPS(net=net, pnet_rand=True)  # pyright: ignore[reportArgumentType]
    torch.manual_seed(0)
    features = {"alex": torchvision.models.alexnet, "vgg": torchvision.models.vgg16}[net]().features
    slices = [getattr(theirs.net, f"slice{i}") for i in range(1, 6)]
    mine = dict(features.named_parameters())
    for part in slices:
        for name, parameter in part.named_parameters():
            parameter.data.copy_(mine[name])
    heads = [lin.model[-1].weight for lin in theirs.lins]  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]
    return Lpips(net, features, heads), theirs  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_is_torchmetrics(net):
    ours, theirs = random_lpips(net)
    pairs = [pair(64, 72, seed) for seed in range(2)]
    image, reference = (torch.stack(column) for column in zip(*pairs, strict=True))
    expected = theirs(image, reference, normalize=True).flatten().double()
    assert expected.min() > 0
    torch.testing.assert_close(ours(image, reference), expected, rtol=1e-4, atol=1e-9)
    assert ours(image[0], reference[0]).shape == ()
    assert ours(reference, reference).abs().max() == 0


def test_lpips_without_weights_says_what_is_missing(tmp_path):
    with pytest.raises(MissingWeights, match=r"alexnet-owt-7be5be79\.pth.*download\.pytorch\.org"):
        load_lpips("alex", tmp_path)
    (tmp_path / "alexnet-owt-7be5be79.pth").write_bytes(b"no weights")
    with pytest.raises(MissingWeights, match=r"alex\.pth.*richzhang"):
        load_lpips("alex", tmp_path)
    (tmp_path / "alex.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="damaged"):
        load_lpips("alex", tmp_path)
    with pytest.raises(ValueError, match="one of alex, vgg"):
        load_lpips("squeeze")  # pyright: ignore[reportArgumentType]


def test_published_weights_are_read(tmp_path, monkeypatch):
    """The same files as published, made here: a random backbone under a name that its hash fits."""
    import hashlib

    import torchvision

    torch.manual_seed(1)
    network = torchvision.models.alexnet()
    torch.save(network.state_dict(), tmp_path / "backbone.pth")
    digest = hashlib.sha256((tmp_path / "backbone.pth").read_bytes()).hexdigest()[:8]
    (tmp_path / "backbone.pth").rename(tmp_path / f"alexnet-{digest}.pth")
    widths = (64, 192, 384, 256, 256)
    heads = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate(widths)}
    torch.save(heads, tmp_path / "alex.pth")
    monkeypatch.setitem(perceptual.BACKBONES, "alex", f"alexnet-{digest}.pth")
    image, reference = pair(48, 48)
    expected = Lpips("alex", network.features, list(heads.values()))(image, reference)
    torch.testing.assert_close(perceptual.lpips(image, reference, weights=tmp_path), expected)


@pytest.mark.parametrize(
    ("image", "reference", "error"),
    [
        (torch.rand(3, 9, 9), torch.rand(3, 9, 8), ValueError),
        (torch.rand(9, 9), torch.rand(9, 9), ValueError),
        (torch.rand(1, 9, 9), torch.rand(1, 9, 9), ValueError),
        (torch.rand(3, 2, 9), torch.rand(3, 2, 9), ValueError),
        (torch.ones(3, 9, 9, dtype=torch.uint8), torch.ones(3, 9, 9, dtype=torch.uint8), TypeError),
    ],
)
def test_bad_images_are_refused(image, reference, error):
    with pytest.raises(error):
        gmsd(image, reference)


def test_images_too_small_for_the_backbone_are_refused():
    ours, _ = random_lpips("alex")
    with pytest.raises(ValueError, match="at least 31"):
        ours(torch.rand(3, 30, 50), torch.rand(3, 30, 50))
    assert torch.isfinite(ours(torch.rand(3, 31, 31), torch.rand(3, 31, 31)))
