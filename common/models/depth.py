"""Monocular depth networks of the Hugging Face hub, for what the sparse-view papers ask of MiDaS."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["MissingNetwork", "load_depth_network"]


class MissingNetwork(OSError):
    """The weights of a depth network cannot be had."""


def load_depth_network(name: str, device: str | torch.device = "cpu") -> Callable[[Tensor], Tensor]:
    """A network that gives a relative disparity: image [H, W, 3] in 0..1 -> [H, W], larger is nearer.

    name   of a model for depth estimation, such as Intel/dpt-hybrid-midas, or a folder with its files

    Raises MissingNetwork where the weights are neither here nor to be downloaded.
    """
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    try:
        processor = AutoImageProcessor.from_pretrained(name)
        network = AutoModelForDepthEstimation.from_pretrained(name).to(device).eval()
    except (OSError, ValueError) as error:
        raise MissingNetwork(
            f"the depth network {name} cannot be loaded ({str(error).splitlines()[0]}). Download it once on a machine "
            "with a connection, or name a folder that holds its config, processor and weights."
        ) from error

    @torch.no_grad()
    def disparity(image: Tensor) -> Tensor:
        # the processor resizes to what the network was trained on; the answer comes back at the image's size
        inputs = processor(images=image.movedim(-1, 0), do_rescale=False, return_tensors="pt").to(device)
        answer = network(**inputs).predicted_depth[:, None]
        size = (image.shape[0], image.shape[1])
        wide = torch.nn.functional.interpolate(answer.float(), size=size, mode="bicubic", align_corners=False)
        return wide[0, 0].to(image.device)

    return disparity
