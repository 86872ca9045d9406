"""What both users of pycolmap share: quiet logs, repeatable options for few views, features and matches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.splatting.errors import SceneError

__all__ = ["extract", "mapping_options", "match", "quiet"]

SEED = 0


@contextmanager
def quiet() -> Iterator[Any]:
    """pycolmap with its log off: what matters is raised or returned. Restored afterwards.

    Raises SceneError where pycolmap is not installed.
    """
    try:
        import pycolmap
    except ImportError as error:
        raise SceneError("pycolmap is not installed; it comes with the project's requirements (make setup).") from error
    before = pycolmap.logging.minloglevel
    pycolmap.logging.minloglevel = pycolmap.logging.Level.FATAL.value
    try:
        yield pycolmap
    finally:
        pycolmap.logging.minloglevel = before


def extract(pycolmap: Any, database: Path, images: Path, names: list[str], *, shared: bool, model: str) -> None:
    """SIFT features of the named images into the database, on the CPU; one camera for all, or one for each image."""
    pycolmap.extract_features(
        database,
        images,
        image_names=names,
        camera_mode=pycolmap.CameraMode.SINGLE if shared else pycolmap.CameraMode.PER_IMAGE,
        reader_options=pycolmap.ImageReaderOptions(camera_model=model),
        device=pycolmap.Device.cpu,
    )


def match(pycolmap: Any, database: Path) -> None:
    """Matches of all pairs of images, verified with the database's cameras; on the CPU, seeded."""
    pycolmap.set_random_seed(SEED)
    verification = pycolmap.TwoViewGeometryOptions()
    verification.ransac.random_seed = SEED
    pycolmap.match_exhaustive(database, verification_options=verification, device=pycolmap.Device.cpu)


def mapping_options(pycolmap: Any) -> Any:
    """Options of the mapper and triangulator for few views: points seen by two views count."""
    options = pycolmap.IncrementalPipelineOptions()
    options.random_seed = SEED
    options.mapper.random_seed = SEED
    options.triangulation.random_seed = SEED
    options.triangulation.ignore_two_view_tracks = False
    options.min_model_size = 2
    return options
