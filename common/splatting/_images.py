"""Photographs from files: read, turned as the camera was held, brought to the size of the camera."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.splatting.cameras import Camera
from common.splatting.errors import SceneError
from common.splatting.scene import View

__all__ = ["IMAGE_SUFFIXES", "image_files", "image_folder", "image_size", "load_view", "read_pixels"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
BLACK = (0.0, 0.0, 0.0)


def image_files(folder: Path) -> list[Path]:
    """The image files directly in `folder`, sorted by name; what starts with a dot is left out."""
    found = (path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != ".")
    return sorted(path for path in found if path.is_file())


def image_folder(root: Path, factor: float, images: str = "images") -> tuple[Path, float]:
    """The folder to read and how much its images are still to be shrunk: `images_8` for a factor of 8, if it is there.

    Raises FileNotFoundError where there is neither `images` nor `images_<factor>`.
    """
    if not factor >= 1:
        raise SceneError(f"{root}: factor is how much smaller the images shall be, >= 1; got {factor}.")
    reduced = root / f"{images}_{factor:g}"
    if factor > 1 and reduced.is_dir():
        return reduced, 1.0
    if (root / images).is_dir():
        return root / images, factor
    there = sorted(path.name for path in root.glob(f"{images}*") if path.is_dir())
    raise FileNotFoundError(
        f"{root}: no folder {images}{f' or {images}_{factor:g}' if factor > 1 else ''}; "
        f"{f'there are {there}: choose the factor, or say images=...' if there else 'say where the images are'}."
    )


def load_view(
    name: str, path: Path, camera: Camera, *, shrink: float = 1.0, background: Iterable[float] | Tensor = BLACK
) -> View:
    """A view from an image file; the camera follows the image's size, both then shrink by `shrink`.

    An image of another size than the camera's is taken as the same picture resampled (images_4 beside a model of the
    full size), as long as both sides shrink alike to the pixel. An alpha channel becomes the mask, and the colour is
    composited on `background`.

    Raises FileNotFoundError, and SceneError where the file is not readable or its size does not fit the camera.
    """
    pixels = torch.from_numpy(read_pixels(path, like=(camera.width, camera.height)))
    height, width = pixels.shape[:2]
    scale = max(width / camera.width, height / camera.height)
    # a factor rounds each side to whole pixels, up or down: one pixel of play
    if abs(width - camera.width * scale) > 1 or abs(height - camera.height * scale) > 1:
        raise SceneError(
            f"{path}: {width} x {height} pixels, but its camera has {camera.width} x {camera.height}, another shape of "
            "picture. Expected the image that was posed, or the same at another scale; a crop needs new intrinsics."
        )
    image = pixels[..., :3].float() / 255
    mask = None
    if pixels.shape[-1] == 4:
        mask = pixels[..., 3].float() / 255
        image = image * mask[..., None] + (1 - mask[..., None]) * torch.as_tensor(list(background), dtype=torch.float32)
    view = View(name, camera.resized(width, height), image, mask)
    if shrink == 1:
        return view
    return view.resized(max(1, round(width / shrink)), max(1, round(height / shrink)))


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image as it is stored. Raises as `read_pixels`."""
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such image; {_neighbours(path)}.")
    try:
        with Image.open(path) as stored:
            return stored.size
    except UnidentifiedImageError:
        raise _unreadable(path) from None


def read_pixels(path: Path, *, like: tuple[int, int] | None = None) -> np.ndarray:
    """[H, W, 3] or, with transparency, [H, W, 4] uint8 of an image file.

    EXIF orientation: the image is turned upright, except where only the picture as stored has the proportions of
    `like` (width, height): solvers such as COLMAP look at the stored pixels and pose those.

    Raises FileNotFoundError, and SceneError where the file is no image that Pillow reads, or is cut short.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such image; {_neighbours(path)}.")
    try:
        with Image.open(path) as stored:
            if like is None or not _same_shape(stored.size, like):
                stored = ImageOps.exif_transpose(stored)
            has_alpha = stored.mode in ("LA", "RGBA", "PA") or "transparency" in stored.info
            return np.array(_eight_bits(stored).convert("RGBA" if has_alpha else "RGB"))
    except UnidentifiedImageError:
        raise _unreadable(path) from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise SceneError(f"{path}: the image cannot be read ({error}). Get it again, or save it as PNG.") from error


def _same_shape(size: tuple[int, int], like: tuple[int, int]) -> bool:
    scale = max(size[0] / like[0], size[1] / like[1])
    return abs(size[0] - like[0] * scale) <= 1 and abs(size[1] - like[1] * scale) <= 1


def _eight_bits(image: Any) -> Any:
    """16-bit greyscale scaled to 8: Pillow's own conversion would clip it to white."""
    from PIL import Image

    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image, dtype=np.float32) / 257).round().astype(np.uint8))


def _unreadable(path: Path) -> SceneError:
    return SceneError(f"{path}: not an image that can be read; {path.stat().st_size} bytes. Get it again.")


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f"nor is there a folder {path.parent}"
    names = [file.name for file in image_files(path.parent)]
    return f"{path.parent.name} holds {len(names)} images{f', such as {names[0]}' if names else ''}"
