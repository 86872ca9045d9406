"""`resparse scene ...`: pose photographs, and say what a folder holds. Doors to common.splatting."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

# Imports of ours stand inside the commands: `resparse --help` must not wait for torch.

app = typer.Typer(help="Scenes for splatting: pose photographs, look into a folder.", no_args_is_help=True)

SHOWN = 12  # view names in a line


@app.command("pose")
def pose(
    photos: Annotated[Path, typer.Argument(metavar="PHOTOS", help="folder of photographs of one place")],
    out: Annotated[Path | None, typer.Option(help="new folder for the scene; default: PHOTOS_scene beside it")] = None,
    train: Annotated[
        str, typer.Option(metavar="NAME,NAME", help="triangulate the points from these photographs alone")
    ] = "",
    camera_model: Annotated[str, typer.Option(help="COLMAP's name for the lens")] = "SIMPLE_RADIAL",
    max_size: Annotated[int, typer.Option(help="longest side in pixels; larger photographs are shrunk")] = 1600,
) -> None:
    """Find the cameras of photographs and write a scene of undistorted images in COLMAP's layout.

    [dim]resparse scene pose photos/kitchen --train IMG_1,IMG_4,IMG_7[/dim]

    The points may only know what the training views show, or a sparse-view run is not fair: name them by --train, or
    leave the choice to the loader, which keeps points that two of its training views saw.
    """
    from common.splatting.photos import pose_photos

    target = out or photos.absolute().with_name(f"{photos.absolute().name}_scene")
    chosen = [name.strip() for name in train.split(",") if name.strip()] or None
    pose_photos(photos, target, train=chosen, camera_model=camera_model, max_size=max_size, progress=typer.echo)
    print(f"Next: resparse scene info {target}")


@app.command("info")
def info(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="a scene: COLMAP, LLFF, Blender or nerfstudio")],
    views: Annotated[int | None, typer.Option(help="training views; default: all but the test views")] = None,
    factor: Annotated[float, typer.Option(help="images that much smaller, from images_<factor> if there is one")] = 1,
) -> None:
    """Say what a folder holds: layout, views, sizes, points, and the split that a run would use.

    [dim]resparse scene info fern --factor 8 --views 3[/dim]
    """
    from common.splatting.layouts import open_scene, recognise

    layout = recognise(folder)
    scene = open_scene(folder, layout=layout, factor=factor, views=views, allow_single=True)
    width = max(len(name) for name, _ in _facts(layout, scene))
    for name, value in _facts(layout, scene):
        print(f"{name:<{width}}  {value}")


def _facts(layout: str, scene: Any) -> Iterator[tuple[str, str]]:
    import math

    from common.splatting.stereo import depth_range

    yield "layout", layout
    every = (*scene.train, *scene.test)
    sizes = sorted({(view.camera.width, view.camera.height) for view in every})
    yield "size", ", ".join(f"{width} x {height}" for width, height in sizes)
    angles = [2 * math.degrees(math.atan(view.camera.width / (2 * float(view.camera.K[0, 0])))) for view in every]
    yield "field of view", f"{min(angles):.1f} to {max(angles):.1f} degrees across"
    for name, views in (("train", scene.train), ("test", scene.test)):
        names = [view.name for view in views]
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        yield name, f"{len(names)}: {', '.join(names[:SHOWN])}{more}"
    yield "masks", f"{sum(view.mask is not None for view in every)} of {len(every)} views"
    yield "extent", f"{scene.extent:.4g} (1.1 x the largest distance of a training camera from their mean)"
    if scene.points is None:
        yield "points", "none that two training views saw; start from stereo, a visual hull or random points"
        return
    near, far = depth_range(scene.points, scene.train, margin=1)
    yield "points", f"{len(scene.points)} seen by two training views or more, at depths {near:.3g} to {far:.3g}"
