"""Gaussian splatting from few views: cameras, scenes, initial points, training. Built on kernels.splat."""

from common.splatting.cameras import Camera, interpolate, intrinsics, look_at, orbit, path_through, spiral
from common.splatting.scene import PointCloud, Scene, View

__all__ = [
    "Camera",
    "PointCloud",
    "Scene",
    "View",
    "interpolate",
    "intrinsics",
    "look_at",
    "orbit",
    "path_through",
    "spiral",
]
