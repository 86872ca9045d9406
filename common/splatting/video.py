"""Videos along a path of cameras: MP4 that browsers play, and GIF."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common import files
from common.splatting.cameras import Camera
from common.splatting.model import Gaussians

__all__ = ["write"]

CRF = 18  # H.264's constant rate factor: 18 looks like the original, 23 is the encoder's default


def write(
    path: Path,
    model: Gaussians,
    cameras: Sequence[Camera],
    *,
    fps: int = 30,
    background: Tensor | None = None,
    antialiased: bool = False,
    progress: bool = True,
) -> None:
    """Render the model from each camera into `path`, an .mp4 (H.264, yuv420p) or a .gif (endless); all or nothing.

    H.264 in yuv420p has even sizes: an odd last row or column is repeated once. A GIF has 256 colours a frame and times
    its frames in 1/100 s, so at most 50 fps.

    Raises ValueError for another ending, no cameras, cameras of several sizes, or fps out of range.
    """
    kinds = {".mp4": _mp4, ".gif": _gif}
    if path.suffix not in kinds:
        raise ValueError(f"video: {path.name} ends in {path.suffix!r}; expected .mp4 or .gif.")
    sizes = {(camera.width, camera.height) for camera in cameras}
    if len(sizes) != 1:
        raise ValueError(
            f"video: cameras of one size make a video; got {sorted(sizes) or 'no camera'}. Use Camera.resized."
        )
    fastest = 50 if path.suffix == ".gif" else 240
    if not 1 <= fps <= fastest:
        raise ValueError(f"video: fps is {fps}, expected 1 to {fastest} for {path.suffix}.")
    frames = _frames(path.name, model, cameras, background, antialiased, progress)
    files.write(path, lambda stream: kinds[path.suffix](stream, frames, fps))


@torch.no_grad()
def _frames(
    name: str,
    model: Gaussians,
    cameras: Sequence[Camera],
    background: Tensor | None,
    antialiased: bool,
    progress: bool,
) -> Iterator[NDArray[np.uint8]]:
    """[H, W, 3] images."""
    from tqdm import tqdm

    for camera in tqdm(cameras, desc=name, file=sys.stdout, ascii=True, disable=not progress):
        image = model.render(camera, background=background, antialiased=antialiased).image
        yield (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def _mp4(stream: BinaryIO, frames: Iterator[NDArray[np.uint8]], fps: int) -> None:
    import av
    from av.video.reformatter import ColorRange, Colorspace

    with av.open(stream, "w", format="mp4") as container:
        video = None
        for number, image in enumerate(frames):
            height, width = image.shape[:2]
            image = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            if video is None:
                video = container.add_stream("libx264", rate=fps, options={"crf": str(CRF)})
                video.height, video.width = image.shape[:2]
                video.pix_fmt = "yuv420p"
                # say which conversion from RGB was used: players guess by the size of the image
                video.codec_context.colorspace = Colorspace.ITU601
                video.codec_context.color_range = ColorRange.MPEG
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(video.encode(frame))
        assert video is not None
        container.mux(video.encode())


def _gif(stream: BinaryIO, frames: Iterator[NDArray[np.uint8]], fps: int) -> None:
    from PIL import Image

    images = [Image.fromarray(image) for image in frames]
    times = [round(100 * number / fps) for number in range(len(images) + 1)]  # 1/100 s, no drift
    durations = [10 * (after - before) for before, after in itertools.pairwise(times)]
    images[0].save(stream, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)
