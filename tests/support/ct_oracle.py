"""Scans worth testing, and Joseph's weights a second time: one dense float64 matrix, ray by ray, from two points a ray.

Nothing is shared with `kernels.ct`: the points come from the text of its geometry, the weights from the crossing of the
ray with one image line after the other.
"""

from __future__ import annotations

import math

import numpy as np

from kernels.ct import FanBeam, ParallelBeam

# exact quarter and eighth turns (the dominant axis is a tie), ordinary angles, a negative one and one beyond a turn
ANGLES = (0.0, 0.3, math.pi / 4, 1.2, math.pi / 2, 2.5, math.pi, -0.7, 3 * math.pi / 4, 7.9)

SCANS = {
    "parallel": ParallelBeam(ANGLES, 23, (16, 16)),
    "parallel, wide image": ParallelBeam(ANGLES, 19, (11, 18), pitch=1.2),
    "parallel, tall image, offsets": ParallelBeam(ANGLES, 17, (18, 7), pitch=0.8, pixel=1.1, offset=0.37, axis=-0.9),
    "parallel, fine cells": ParallelBeam(ANGLES, 61, (9, 8), pitch=0.23),
    "parallel, coarse cells": ParallelBeam(ANGLES, 7, (16, 13), pitch=3.1),
    "fan": FanBeam(ANGLES, 29, (16, 16), source_axis=32.0, axis_detector=16.0, pitch=1.5),
    "fan, wide image": FanBeam(ANGLES, 25, (11, 18), source_axis=40.0, axis_detector=0.0),
    "fan, tall image, offsets": FanBeam(
        ANGLES, 21, (18, 7), source_axis=21.0, axis_detector=33.0, pitch=2.7, pixel=0.9, offset=-0.8, axis=0.6
    ),
    "fan, close source": FanBeam(ANGLES, 40, (12, 12), source_axis=8.8, axis_detector=5.0, pitch=0.7),
    "fan, coarse cells": FanBeam(ANGLES, 9, (13, 13), source_axis=30.0, axis_detector=30.0, pitch=5.0),
}


def matrix(scan: ParallelBeam | FanBeam) -> np.ndarray:
    """A of A x = sinogram, [V*K, H*W] float64."""
    height, width = scan.shape
    columns_x = (np.arange(width) - (width - 1) / 2) * scan.pixel
    rows_y = ((height - 1) / 2 - np.arange(height)) * scan.pixel
    rays = [(angle, cell) for angle in scan.angles_rad for cell in range(scan.cells)]
    weights = [_weights(*_two_points(scan, angle, cell), columns_x, rows_y, scan.pixel) for angle, cell in rays]
    return np.array(weights).reshape(len(rays), height * width)


def _two_points(scan: ParallelBeam | FanBeam, angle: float, cell: int) -> tuple[np.ndarray, np.ndarray]:
    """Two points (X, Y) in mm on the ray to a cell."""
    lateral = np.array([math.cos(angle), math.sin(angle)])
    up = np.array([-math.sin(angle), math.cos(angle)])  # from the source to the detector
    u = (cell - (scan.cells - 1) / 2) * scan.pitch + scan.offset
    if isinstance(scan, FanBeam):
        source = -scan.axis * lateral - scan.source_axis * up
        return source, (u - scan.axis) * lateral + scan.axis_detector * up
    return (u - scan.axis) * lateral, (u - scan.axis) * lateral + up


def _weights(a: np.ndarray, b: np.ndarray, columns_x: np.ndarray, rows_y: np.ndarray, pixel: float) -> np.ndarray:
    """What one ray through points a and b reads of every pixel, [H, W]: crossing lines of pixel centres."""
    dx, dy = b - a
    out = np.zeros((len(rows_y), len(columns_x)))
    if abs(dy) >= abs(dx):  # crosses every row of pixel centres
        for r, y in enumerate(rows_y):
            x = a[0] + (y - a[1]) * dx / dy
            out[r] = np.clip(1 - abs(columns_x - x) / pixel, 0, None)
        return out * pixel * math.hypot(dx, dy) / abs(dy)
    for c, x in enumerate(columns_x):
        y = a[1] + (x - a[0]) * dy / dx
        out[:, c] = np.clip(1 - abs(rows_y - y) / pixel, 0, None)
    return out * pixel * math.hypot(dx, dy) / abs(dx)
