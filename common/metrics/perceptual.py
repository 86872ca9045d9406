"""How different two images look: LPIPS with its real weights, and GMSD, which needs none.

Both take (image, reference), RGB [..., 3, H, W] in 0..1, and return one float64 value an image, [...]; lower is better,
0 for equal images. NaN in an image gives NaN for that image.

LPIPS is a trained network and only the published weights make it LPIPS; without them it raises. GMSD (gradient
magnitude similarity deviation) is a formula. It is *another* metric, which also ranks blur and broken edges as people
do better than PSNR does. A table that shows it must call it GMSD: values of the two cannot be compared.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Lpips", "MissingWeights", "gmsd", "load_lpips", "lpips"]

Net = Literal["alex", "vgg"]

# torchvision's ImageNet weights by their file names, which end in the first digits of the sha256
BACKBONES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}
# the published linear weights, v0.1 (richzhang/PerceptualSimilarity, lpips/weights/v0.1; BSD-2)
HEADS = {"alex": "alex.pth", "vgg": "vgg.pth"}
# where torchvision's `features` are cut: after the last ReLU of each of five blocks
CUTS = {"alex": (2, 5, 8, 10, 12), "vgg": (4, 9, 16, 23, 30)}
SMALLEST = {"alex": 31, "vgg": 16}  # pixels; a smaller image vanishes on its way through the poolings
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of the inputs, on values in -1..1

GMSD_CONSTANT = 170.0  # on grey values of 0..255 (Xue et al. 2014)
LUMA = (0.299, 0.587, 0.114)  # BT.601, as MATLAB's rgb2gray


class MissingWeights(FileNotFoundError):
    """The weights that make LPIPS what it is are not on this machine."""


def gmsd(image: Tensor, reference: Tensor) -> Tensor:
    """Gradient magnitude similarity deviation (Xue, Zhang, Mou and Bovik, IEEE TIP 2014): [...] float64, 0..0.5 or so.

    On luma of 0..255, halved in size by means of 2 x 2 pixels; Prewitt gradients with zeros around; standard deviation
    of (2 a b + c) / (a^2 + b^2 + c) with c = 170 over the pixels (n - 1, as MATLAB's std2).

    Raises TypeError and ValueError for inputs that are not real images [..., 3, H, W] of one shape, at least 3 x 3.
    """
    _check(image, reference, smallest=3)
    first, second = _gradient(image), _gradient(reference)
    similarity = (2 * first * second + GMSD_CONSTANT) / (first**2 + second**2 + GMSD_CONSTANT)
    return similarity.flatten(-2).std(dim=-1, correction=1)


def lpips(image: Tensor, reference: Tensor, *, net: Net = "alex", weights: str | Path | None = None) -> Tensor:
    """LPIPS v0.1 (Zhang et al. 2018) with the published weights: [...] float64.

    net      alex (SpaRe, gsplat) or vgg (the papers after 3DGS)
    weights  see `load_lpips`

    Raises as `load_lpips` and `Lpips`.
    """
    return load_lpips(net, weights).to(image.device)(image, reference)


@cache
def load_lpips(net: Net = "alex", weights: str | Path | None = None) -> Lpips:
    """The metric with the published weights; kept for the next call.

    weights  a folder with torchvision's backbone (`alexnet-owt-7be5be79.pth`, `vgg16-397923af.pth`) and the linear
             weights of LPIPS v0.1 (`alex.pth`, `vgg.pth`); None: torch's own, `torch.hub.get_dir()/checkpoints`

    Raises MissingWeights naming the file and where it comes from, ValueError for a damaged file or an unknown net.
    """
    import torchvision

    if net not in CUTS:
        raise ValueError(f"lpips: net is one of {', '.join(CUTS)}; got {net!r}.")
    folder = Path(torch.hub.get_dir()) / "checkpoints" if weights is None else Path(weights)
    sources = {
        BACKBONES[net]: "https://download.pytorch.org/models/",
        HEADS[net]: "https://github.com/richzhang/PerceptualSimilarity/tree/master/lpips/weights/v0.1",
    }
    for name, source in sources.items():
        if not (folder / name).is_file():
            raise MissingWeights(
                f"lpips: {folder / name} is not there; put it there from {source} or name another folder. Without "
                "these weights there is no LPIPS; `gmsd` needs none, but is another metric."
            )
    path = folder / BACKBONES[net]
    wanted, found = path.stem.rpartition("-")[2], hashlib.sha256(path.read_bytes()).hexdigest()
    if not found.startswith(wanted):
        raise ValueError(f"lpips: {path} is damaged: its sha256 begins with {found[:8]}, expected {wanted}; fetch it.")
    network = {"alex": torchvision.models.alexnet, "vgg": torchvision.models.vgg16}[net]()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    published = torch.load(folder / HEADS[net], map_location="cpu", weights_only=True)
    heads = [published[f"lin{layer}.model.1.weight"] for layer in range(len(CUTS[net]))]
    return Lpips(net, network.features, heads)


class Lpips(nn.Module):
    """The network: features of five blocks, scaled to unit length over the channels; weighted squared differences.

    features   torchvision's, of AlexNet or VGG-16
    heads      five weights [1, C, 1, 1], >= 0

    Called with (image, reference) [..., 3, H, W] in 0..1 it gives [...] float64; raises ValueError for images that are
    too small for the backbone (31 pixels a side for alex, 16 for vgg).
    """

    def __init__(self, net: Net, features: nn.Sequential, heads: list[Tensor]):
        super().__init__()
        self.net, self.features = net, features
        self.heads = nn.ParameterList(nn.Parameter(head.detach().clone()) for head in heads)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, image: Tensor, reference: Tensor) -> Tensor:
        _check(image, reference, smallest=SMALLEST[self.net])
        shape, distance = image.shape[:-3], 0.0
        for head, first, second in zip(self.heads, self._blocks(image), self._blocks(reference), strict=True):
            difference = (F.normalize(first, dim=1, eps=1e-10) - F.normalize(second, dim=1, eps=1e-10)) ** 2
            distance = distance + F.conv2d(difference, head).double().mean(dim=(1, 2, 3))
        return torch.as_tensor(distance).reshape(shape)

    def _blocks(self, image: Tensor) -> list[Tensor]:
        x = 2 * image.reshape(-1, *image.shape[-3:]).to(self.heads[0].dtype) - 1
        x = (x - x.new_tensor(SHIFT)[:, None, None]) / x.new_tensor(SCALE)[:, None, None]
        found = []
        for index, layer in enumerate(self.features[: CUTS[self.net][-1]]):
            x = layer(x)
            if index + 1 in CUTS[self.net]:
                found.append(x)  # the next layer is no ReLU, so nothing changes it in place
        return found


def _gradient(image: Tensor) -> Tensor:
    """[..., H/2, W/2] size of the Prewitt gradient of the halved luma, 0..255."""
    grey = 255 * torch.einsum("...chw,c->...hw", image.double(), image.new_tensor(LUMA, dtype=torch.float64))
    height, width = grey.shape[-2:]
    flat = F.pad(grey.reshape(-1, 1, height, width), (0, width % 2, 0, height % 2))
    half = F.avg_pool2d(flat, 2)
    prewitt = half.new_tensor([[1, 0, -1]] * 3) / 3
    both = F.conv2d(half, torch.stack([prewitt, prewitt.T])[:, None], padding=1)
    return both.norm(dim=1).reshape(*grey.shape[:-2], *half.shape[-2:])


def _check(image: Tensor, reference: Tensor, *, smallest: int) -> None:
    for name, tensor in (("image", image), ("reference", reference)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} is a floating-point torch.Tensor in 0..1; got {got}.")
    if image.shape != reference.shape:
        raise ValueError(f"image and reference differ in shape: {tuple(image.shape)} and {tuple(reference.shape)}")
    if image.ndim < 3 or image.shape[-3] != 3 or min(image.shape[-2:]) < smallest:
        raise ValueError(
            f"expected RGB images [..., 3, H, W] of at least {smallest} x {smallest} pixels; got {tuple(image.shape)}"
        )
