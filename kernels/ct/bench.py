"""What `kernels.bench` times for tomography: our projector pair beside ASTRA's and scikit-image's, on noise.

ASTRA: `algorithm.run` alone, with its data in place, one thread (it has no other on the CPU); our calls are the whole
public function. In a parallel beam its `linear` model has our weights; its fan beam has no such model on the CPU, so
there the baseline is `line_fanflat` (chord lengths), which computes something slightly different.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels import ct, info
from kernels.bench import CORES, Case, Contender, missing, other_isas, with_isa
from kernels.ct import FanBeam, ParallelBeam, reference, to_astra

PEERS = ("astra-toolbox", "scikit-image")
BATCH = 8
OTHER = "other discretisation"
Scan = ParallelBeam | FanBeam


def cases(quick: bool) -> Iterator[Case]:
    """Parallel and fan beam, forward and back; with `quick` one small image."""
    sizes = [(48, 12)] if quick else [(256, 180), (512, 72), (512, 720)]  # pixels a side, views
    for size, views in sizes:
        cells = 23 * size // 16  # covers the diagonal: 368, 736
        for scan in (
            ParallelBeam.uniform(views, cells, (size, size)),
            FanBeam.uniform(views, cells, (size, size), source_axis=2.0 * size, axis_detector=1.0 * size, pitch=1.5),
        ):
            for call in ("project", "backproject"):
                with ExitStack() as cleanup:
                    yield _case(scan, call, size <= 256, cleanup)


def _case(scan: Scan, call: str, small: bool, cleanup: ExitStack) -> Case:
    fan, forward = isinstance(scan, FanBeam), call == "project"
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(BATCH, *(scan.shape if forward else scan.sinogram_shape), generator=generator)
    # the reference would take half a minute for 720 views; the first image of a batch stands for all
    every = 10 if forward and scan.views > 500 else 1

    def first(out: Tensor) -> Tensor:
        return out[0, ::every]

    checked = scan.subset(range(0, scan.views, every))
    contenders = [*_ours(scan, call, data, first, small), *_astra(scan, call, data[0], first, cleanup)]
    if small and isinstance(scan, ParallelBeam):
        contenders.append(_skimage(scan, call, data[0]))
    pixels, rays = scan.shape[0] * scan.shape[1], scan.views * scan.cells
    return Case(
        name=f"{'fan' if fan else 'parallel'} {scan.shape[0]}^2/{scan.views}",
        call=call,
        contenders=contenders,
        baseline="astra line_fanflat" if fan else "astra linear",
        exact=lambda: getattr(reference, call)(data[:1].double(), checked)[0],
        data_bytes=4 * (pixels + rays),
    )


def _ours(scan: Scan, call: str, data: Tensor, result: Callable, small: bool) -> Iterator[Contender]:
    function, isa = getattr(ct, call), info()["isa"]
    for threads in (1, 2) if CORES > 1 else (1,):
        yield Contender(f"ours {isa}", partial(function, data[:1], scan), result, threads, ours=True)
    yield Contender(f"ours {isa}", partial(function, data, scan), result, batch=BATCH, ours=True)
    if not small:
        return
    for other in other_isas():
        run = partial(with_isa, other, partial(function, data[:1], scan))
        yield Contender(f"ours {other}", run, result, ours=True)
    slow = partial(getattr(reference, call), data[:1], scan)
    yield Contender("ours reference", slow, result, ours=True, note="the specification in plain torch")


def _astra(scan: Scan, call: str, data: Tensor, result: Callable, cleanup: ExitStack) -> Iterator[Contender]:
    models = {"line_fanflat": OTHER} if isinstance(scan, FanBeam) else {"linear": "", "line": OTHER}
    for model, note in models.items():
        if find_spec("astra") is None:
            yield missing(f"astra {model}", "astra-toolbox")
            continue
        run, get = _astra_algorithm(scan, call, data, model, cleanup)
        yield Contender(f"astra {model}", run, None if note else lambda _, get=get: result(get()), note=note)


def _astra_algorithm(
    scan: Scan, call: str, data: Tensor, model: str, cleanup: ExitStack
) -> tuple[Callable[[], Any], Callable[[], Tensor]]:
    """ASTRA ready to run, and what reads its result, [1, V, K] or [1, H, W]; `cleanup` will free it all."""
    import astra

    forward = call == "project"
    proj_geom, vol_geom = to_astra(scan)
    projector = astra.create_projector(model, proj_geom, vol_geom)
    image = astra.data2d.create("-vol", vol_geom, data.numpy() if forward else 0)
    sinogram = astra.data2d.create("-sino", proj_geom, 0 if forward else data.numpy())
    settings = astra.astra_dict("FP" if forward else "BP")
    settings |= {"ProjectorId": projector, "ProjectionDataId": sinogram}
    settings["VolumeDataId" if forward else "ReconstructionDataId"] = image
    algorithm = astra.algorithm.create(settings)
    for delete, ident in (
        (astra.projector.delete, projector),
        (astra.data2d.delete, image),
        (astra.data2d.delete, sinogram),
        (astra.algorithm.delete, algorithm),
    ):
        cleanup.callback(delete, ident)
    out = sinogram if forward else image
    return partial(astra.algorithm.run, algorithm), lambda: torch.from_numpy(astra.data2d.get(out))[None]


def _skimage(scan: ParallelBeam, call: str, data: Tensor) -> Contender:
    """radon turns the image for each view; iradon without a filter interpolates linearly in the detector."""
    name = "skimage radon" if call == "project" else "skimage iradon"
    if find_spec("skimage") is None:
        return missing(name, "scikit-image")
    from skimage.transform import iradon, radon

    degrees = np.rad2deg(scan.angles.numpy())
    if call == "project":
        run = partial(radon, data.numpy(), degrees, circle=False)
        return Contender(name, run, note=f"{OTHER}; {scan.shape[0]}^2 image, cells as its diagonal")
    rows = data.numpy().T.copy()  # [K, V]
    filterless: Any = None  # allowed, but not declared
    run = partial(iradon, rows, degrees, filter_name=filterless, circle=False, output_size=scan.shape[0])
    return Contender(name, run, note=OTHER)
