"""Seeded CT phantoms: axial slices that look like a head or an abdomen, in Hounsfield units.

They stand in for patient data where there is none: for tests, the smoke profile and small priors. Organs are random
superellipses with smooth irregular outlines and texture; they are plausible pictures, not anatomical models, and say
nothing about a method's worth on patients. Exact phantoms with known projections are in `ellipses.py`.
"""

from __future__ import annotations

import difflib

import torch
from torch import Tensor

from common import seeds
from common.data import _abdomen, _head
from common.data._canvas import Draws

__all__ = ["FIELD_OF_VIEW_MM", "KINDS", "generate"]

_MODULES = {"abdomen": _abdomen, "head": _head}
KINDS = tuple(sorted(_MODULES))
FIELD_OF_VIEW_MM = {kind: module.FOV_MM for kind, module in _MODULES.items()}

_PIXELS_AT_ONCE = 2**15  # a shape's temporaries stay in the core's cache


def generate(kind: str, count: int, size: int, seed: int) -> Tensor:
    """`count` random axial slices: [count, size, size] float32 in HU, between -1024 and 2500.

    kind   "head" or "abdomen"
    size   pixels a side, at least 8; the image is FIELD_OF_VIEW_MM[kind] wide, so a pixel is that over `size`
    seed   any integer >= 0

    The same arguments give the same images; slice i depends on (kind, seed, i) alone, so more slices, or finer pixels,
    extend or refine the same set. Row 0 is the front of the patient, column 0 the patient's right.

    Raises ValueError for an unknown kind or a count, size or seed out of range.
    Cost: about 20 ms a slice at 64 x 64, one core; memory for the result and a few slices.
    """
    if kind not in _MODULES:
        near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown phantom kind {kind!r}; expected one of {', '.join(KINDS)}.{hint}")
    if count < 0 or size < 8 or seed < 0:
        raise ValueError(f"expected count >= 0, size >= 8 and seed >= 0; got {count}, {size} and {seed}")
    at_once = max(1, _PIXELS_AT_ONCE // size**2)
    image = torch.empty(count, size, size)
    with seeds.one_thread():
        for start in range(0, count, at_once):
            # whole batches always: vectorised pow rounds a tensor's last elements differently
            batch = _MODULES[kind].slices(Draws(kind, range(start, start + at_once), seed), size)
            image[start : start + at_once] = batch[: count - start]
    return image
