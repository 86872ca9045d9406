"""Gaussian splatting from few views: cameras, scenes, initial points, training. Built on kernels.splat."""

from common.splatting.cameras import Camera, interpolate, intrinsics, look_at, orbit, path_through, spiral
from common.splatting.colmap import load_colmap
from common.splatting.errors import SceneError
from common.splatting.generated import facade_scene, object_scene, room_scene, surface_points
from common.splatting.hull import visual_hull
from common.splatting.layouts import open_scene, recognise
from common.splatting.llff import load_llff
from common.splatting.photos import PartlyPosed, pose_photos
from common.splatting.real import brighton, chair, fern
from common.splatting.scene import PointCloud, Scene, View
from common.splatting.sfm import triangulate
from common.splatting.spare import load_spare
from common.splatting.splits import Split
from common.splatting.stereo import depth_range, plane_sweep
from common.splatting.transforms import load_blender, load_nerfstudio

__all__ = [
    "Camera",
    "PartlyPosed",
    "PointCloud",
    "Scene",
    "SceneError",
    "Split",
    "View",
    "brighton",
    "chair",
    "depth_range",
    "facade_scene",
    "fern",
    "interpolate",
    "intrinsics",
    "load_blender",
    "load_colmap",
    "load_llff",
    "load_nerfstudio",
    "load_spare",
    "look_at",
    "object_scene",
    "open_scene",
    "orbit",
    "path_through",
    "plane_sweep",
    "pose_photos",
    "recognise",
    "room_scene",
    "spiral",
    "surface_points",
    "triangulate",
    "visual_hull",
]
