"""From raw photographs to a posed scene: structure from motion by pycolmap, undistorted, in COLMAP's layout."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.splatting import _pycolmap, splits
from common.splatting._images import IMAGE_SUFFIXES, image_files, image_size, read_pixels
from common.splatting.errors import SceneError

__all__ = ["PartlyPosed", "pose_photos"]

Tell = Callable[[str], None]

RAW_SUFFIXES = (".heic", ".heif", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".mp4", ".mov")
_EXIF_POINTER, _FOCAL_35MM = 0x8769, 0xA405  # the EXIF block of the tags; FocalLengthIn35mmFilm, mm
_WIDTH_35MM = 36.0  # mm, the long side of a 35 mm frame


class PartlyPosed(SceneError):
    """Some photographs found no place. The scene of the others is complete and lies in `folder`."""

    def __init__(self, message: str, folder: Path, left_out: Sequence[str]) -> None:
        super().__init__(message)
        self.folder = folder
        self.left_out = tuple(left_out)


def pose_photos(
    folder: str | Path,
    out: str | Path,
    *,
    train: Sequence[int | str] | None = None,
    camera_model: str = "SIMPLE_RADIAL",
    max_size: int = 1600,
    progress: Tell = lambda message: None,
) -> Path:
    """Pose the photographs in `folder` and write `out/images` and `out/sparse/0` for `load_colmap`.

    The photographs are turned upright as their EXIF says, shrunk, solved (SIFT, all pairs, incremental mapping) and
    undistorted to pinhole images. If all have one size, they share one camera. Scale and axes of the world are
    arbitrary.

    train     the training views, by index or name: the poses come from all photographs, but the points are then
              triangulated again from these alone. None: points of all; `load_colmap` keeps those that two training
              views saw
    camera_model   how the lens is modelled before it is undistorted: COLMAP's name, such as OPENCV for a wide lens
    max_size  longest side in pixels; larger photographs are shrunk
    progress  is told what happens, a line at a time
    cost      five seconds a photograph at 800 x 600 on one core: 30 s for six

    Returns `out`.

    Raises FileNotFoundError for a missing folder; FileExistsError where `out` already holds something; SceneError for
    fewer than two photographs, one that cannot be read, and where too little matches; PartlyPosed, with the scene
    written, where only some could be posed.
    """
    if max_size < 100:
        raise SceneError(f"max_size is the longest side in pixels, >= 100; got {max_size}.")
    source, target = Path(folder), Path(out)
    files = _photographs(source)
    chosen = None if train is None else splits.choose([path.name for path in files], train=train, test=()).train
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target}: not empty; name another folder, or remove it.")
    work = target / "work"
    (work / "images").mkdir(parents=True)
    try:
        with _pycolmap.quiet() as pycolmap:
            names, focals = _prepare(files, work / "images", max_size, progress)
            model = _solve(pycolmap, work, names, focals, camera_model, progress)
            if chosen is not None:
                _retriangulate(pycolmap, work, model, {names[index] for index in chosen}, progress)
            _undistort(pycolmap, work, model, target, progress)
        posed = {image.name for image in model.images.values() if image.has_pose}
    except BaseException:
        shutil.rmtree(target)
        raise
    shutil.rmtree(work)
    left_out = [path.name for path, name in zip(files, names, strict=True) if name not in posed]
    if left_out:
        raise PartlyPosed(
            f"{len(posed)} of {len(files)} photographs posed, their scene is in {target}; left out: "
            f"{', '.join(left_out)}. They share too little with the others: add photographs in between, or go on "
            "without them.",
            target,
            left_out,
        )
    return target


def _photographs(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder.")
    files = image_files(folder)
    if len(files) < 2:
        other = sorted({path.suffix for path in folder.iterdir() if path.suffix.lower() in RAW_SUFFIXES})
        raise SceneError(
            f"{folder}: {len(files)} photographs; expected two or more of {', '.join(IMAGE_SUFFIXES)}."
            f"{f' Convert the {other} files to JPEG first.' if other else ''}"
        )
    stems = [path.stem for path in files]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise SceneError(f"{folder}: more than one photograph is called {twice[0]!r}; rename or remove one.")
    return files


def _prepare(files: list[Path], target: Path, max_size: int, tell: Tell) -> tuple[list[str], dict[str, float]]:
    """Upright, shrunk copies as PNG; their names, and focal lengths in pixels of those whose EXIF has one."""
    from PIL import Image

    names, focals = [], {}
    for path in files:
        image = Image.fromarray(read_pixels(path)[..., :3])
        longest = max(image.size)
        if longest > max_size:
            width, height = (round(side * max_size / longest) for side in image.size)
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        name = f"{path.stem}.png"
        image.save(target / name)
        names.append(name)
        with Image.open(path) as stored:
            equivalent = stored.getexif().get_ifd(_EXIF_POINTER).get(_FOCAL_35MM)
        if equivalent:
            focals[name] = float(equivalent) / _WIDTH_35MM * max(image.size)
    tell(f"{len(names)} photographs, {len(focals)} with a focal length")
    return names, focals


def _solve(pycolmap: Any, work: Path, names: list[str], focals: dict[str, float], camera_model: str, tell: Tell) -> Any:
    """The largest reconstruction of the photographs in `work/images`."""
    if camera_model not in pycolmap.CameraModelId.__members__:
        raise SceneError(f"camera_model {camera_model!r} is none of COLMAP's, such as SIMPLE_RADIAL or OPENCV.")
    database = work / "database.db"
    sizes = {image_size(work / "images" / name) for name in names}
    _pycolmap.extract(pycolmap, database, work / "images", names, shared=len(sizes) == 1, model=camera_model)
    with pycolmap.Database.open(database) as store:
        for image in store.read_all_images():
            if image.name in focals:
                camera = store.read_camera(image.camera_id)
                camera.focal_length, camera.has_prior_focal_length = focals[image.name], True
                store.update_camera(camera)
        features = store.num_keypoints()
    tell(f"{features} features")
    _pycolmap.match(pycolmap, database)
    with pycolmap.Database.open(database) as store:
        _, geometries = store.read_two_view_geometries()
        pairs = sum(len(geometry.inlier_matches) > 0 for geometry in geometries)
    tell(f"{pairs} of {len(names) * (len(names) - 1) // 2} pairs match")
    if not pairs:
        raise SceneError(
            f"no two of the {len(names)} photographs match; expected pictures of one place that overlap by half or "
            "more, sharp and with texture. Take more, closer together."
        )
    posed = iter(range(3, len(names) + 1))
    models = pycolmap.incremental_mapping(
        database,
        work / "images",
        work,
        options=_pycolmap.mapping_options(pycolmap),
        next_image_callback=lambda: tell(f"posed {next(posed, len(names))} of {len(names)}"),
    )
    if not models:
        raise SceneError(
            f"{pairs} pairs of photographs match, but none gives a pose: the camera may only have turned, or the place "
            "is one plane. Take photographs from places further apart."
        )
    return max(models.values(), key=lambda model: (model.num_reg_images(), model.num_points3D()))


def _retriangulate(pycolmap: Any, work: Path, model: Any, train: set[str], tell: Tell) -> None:
    """Replace the model's points by those triangulated from the training views alone, poses held fixed."""
    kept = {image.image_id for image in model.images.values() if image.name in train and image.has_pose}
    if len(kept) < 2:
        raise SceneError(f"{len(kept)} of the training views {sorted(train)} could be posed; expected two or more.")
    alone = pycolmap.Reconstruction(model)
    for image in model.images.values():
        if image.has_pose and image.image_id not in kept:
            alone.deregister_frame(image.frame_id)
    (work / "alone").mkdir()
    options = _pycolmap.mapping_options(pycolmap)
    alone = pycolmap.triangulate_points(alone, work / "database.db", work / "images", work / "alone", options=options)
    for number in list(model.points3D):
        model.delete_point3D(number)
    for point in alone.points3D.values():
        model.add_point3D(point.xyz, point.track, point.color)
    model.update_point_3d_errors()
    tell(f"{model.num_points3D()} points from {len(kept)} training views")


def _undistort(pycolmap: Any, work: Path, model: Any, target: Path, tell: Tell) -> None:
    (work / "best").mkdir()
    model.write_binary(work / "best")
    pycolmap.undistort_images(work / "undistorted", work / "best", work / "images")
    shutil.move(work / "undistorted" / "images", target / "images")
    shutil.move(work / "undistorted" / "sparse", target / "sparse" / "0")
    tell(f"{model.num_reg_images()} views and {model.num_points3D()} points in {target}")
