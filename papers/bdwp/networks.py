"""The networks by name: those that are small enough for a laptop, and the five published ones."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from common.models.resnet_cifar import ResNetCifar
from common.models.vit import ViT
from papers.bdwp.settings import Params


def build(params: Params, name: str, *, classes: int, channels: int, size: int) -> nn.Module:
    """A network of `settings.NETWORKS` for images of channels x size x size, from torch's global generator."""
    if name == "resnet_cifar":
        return ResNetCifar(width=params.width, depth=params.depth, classes=classes, channels=channels)
    if name == "resnet20":
        return ResNetCifar(classes=classes, channels=channels)
    if name == "vit":
        shape = {"width": params.vit_width, "depth": params.vit_depth, "heads": params.vit_heads, "patch": params.patch}
        return ViT(size=size, classes=classes, channels=channels, **shape)
    if name == "resnet9":
        return ResNet9(classes=classes)
    if name == "vgg19":
        return _vgg19(classes)
    from torchvision import models

    return getattr(models, name)(num_classes=classes)


class ResNet9(nn.Module):
    """image [B, 3, 32, 32] -> logits [B, classes]: eight convolutions and a linear layer, as in the DAWNBench entries.

    A stem, three stages that double the channels up to 512 and halve the resolution, and two residual blocks.
    """

    def __init__(self, *, classes: int = 10):
        super().__init__()
        self.stem, self.stage1 = _conv(3, 64), _conv(64, 128)
        self.block1 = nn.Sequential(_conv(128, 128), _conv(128, 128))
        self.stage2, self.stage3 = _conv(128, 256), _conv(256, 512)
        self.block2 = nn.Sequential(_conv(512, 512), _conv(512, 512))
        self.head = nn.Linear(512, classes)

    def forward(self, image: Tensor) -> Tensor:
        x = F.max_pool2d(self.stage1(self.stem(image)), 2)
        x = x + self.block1(x)
        x = F.max_pool2d(self.stage2(x), 2)
        x = F.max_pool2d(self.stage3(x), 2)
        x = x + self.block2(x)
        return self.head(x.amax(dim=(2, 3)))


def _conv(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU()
    )


def _vgg19(classes: int) -> nn.Module:
    """VGG-19 with batch norm for 32 x 32 pixels: its sixteen convolutions and one linear layer instead of three."""
    from torchvision.models.vgg import cfgs, make_layers

    return nn.Sequential(make_layers(cfgs["E"], batch_norm=True), nn.Flatten(), nn.Linear(512, classes))
