"""Pinhole cameras, and the paths of cameras along which novel-view videos are rendered.

Axes are OpenCV's: x right, y down, z forward. A world point p has camera coordinates `viewmat @ [p, 1]` = (x, y, z, 1)
and falls on the position `(fx x / z + cx, fy y / z + cy)`; the centre of pixel [row i, column j] is (j + 0.5, i + 0.5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.splatting.errors import SceneError

__all__ = ["Camera", "interpolate", "intrinsics", "look_at", "orbit", "path_through", "spiral"]

Vector = Tensor | Sequence[float]

ROTATION_TOLERANCE = 1e-3  # |R R^T - I|: float32 files of poses are this far off, wrong matrices are much further


@dataclass(frozen=True, eq=False)
class Camera:
    """A pinhole camera.

    viewmat  [4, 4] float32, world to camera, OpenCV axes (x right, y down, z forward)
    K        [3, 3] float32 in pixels, pixel centres at index + 0.5
    width, height  of its image in pixels

    Raises SceneError where a shape is wrong, a value is not finite, the rotation is none (or a mirror image), or a
    focal length or a size is not positive.
    """

    viewmat: Tensor
    K: Tensor
    width: int
    height: int

    def __post_init__(self) -> None:
        for name, shape in (("viewmat", (4, 4)), ("K", (3, 3))):
            matrix = getattr(self, name)
            if tuple(matrix.shape) != shape or matrix.dtype != torch.float32 or not torch.isfinite(matrix).all():
                raise SceneError(
                    f"Camera: {name} is a finite float32 {list(shape)}; got {matrix.dtype} {list(matrix.shape)}"
                    f"{'' if torch.isfinite(matrix).all() else ' with NaN or Inf'}."
                )
        if self.width < 1 or self.height < 1:
            raise SceneError(f"Camera: width and height are in pixels, >= 1; got {self.width} x {self.height}.")
        if not (self.K[0, 0] > 0 and self.K[1, 1] > 0):
            raise SceneError(f"Camera: focal lengths are positive; got fx {self.K[0, 0]:.4g}, fy {self.K[1, 1]:.4g}.")
        rotation = self.viewmat[:3, :3].double().cpu()
        off = (rotation @ rotation.T - torch.eye(3, dtype=torch.float64)).abs().max()
        if off > ROTATION_TOLERANCE or torch.linalg.det(rotation) < 0:
            raise SceneError(
                f"Camera: viewmat[:3, :3] is no rotation (|R R^T - I| up to {off:.2g}, determinant "
                f"{torch.linalg.det(rotation):.3g}, expected 1). Check scale, axes and handedness of the poses."
            )

    @property
    def center(self) -> Tensor:
        """[3] position of the camera in the world."""
        return -self.viewmat[:3, :3].T @ self.viewmat[:3, 3]

    @property
    def forward(self) -> Tensor:
        """[3] unit vector along the optical axis, in the world."""
        return self.viewmat[2, :3]

    @property
    def up(self) -> Tensor:
        """[3] unit vector from the bottom to the top of the image, in the world."""
        return -self.viewmat[1, :3]

    def to(self, device: torch.device | str) -> Camera:
        """The same camera with its tensors on `device`."""
        return replace(self, viewmat=self.viewmat.to(device), K=self.K.to(device))

    def resized(self, width: int, height: int) -> Camera:
        """The camera of the same image resampled to width x height pixels."""
        scale = self.K.new_tensor([[width / self.width], [height / self.height], [1.0]])
        return replace(self, K=self.K * scale, width=width, height=height)

    def project(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Pixel positions [..., 2] and depths z [...] of world points [..., 3].

        Points at or behind the camera (z <= 0) get positions without meaning: look at the depth first.
        """
        local = points @ self.viewmat[:3, :3].T + self.viewmat[:3, 3]
        image = local @ self.K.T
        return image[..., :2] / image[..., 2:], local[..., 2]

    def rays(self) -> Tensor:
        """[H, W, 3] directions through the pixel centres in the world, with a z component of 1 in the camera.

        So `center + depth * ray` is the point at that depth; the directions are not of unit length.
        """
        row, column = torch.meshgrid(
            torch.arange(self.height, dtype=torch.float32, device=self.K.device) + 0.5,
            torch.arange(self.width, dtype=torch.float32, device=self.K.device) + 0.5,
            indexing="ij",
        )
        pixels = torch.stack([column, row, torch.ones_like(row)], dim=-1)
        return pixels @ torch.linalg.inv(self.K).T @ self.viewmat[:3, :3]

    def backproject(self, depth: Tensor) -> Tensor:
        """[H, W, 3] world points of a depth map [H, W] (distance along the optical axis)."""
        if tuple(depth.shape) != (self.height, self.width):
            raise SceneError(f"backproject: depth is [{self.height}, {self.width}]; got {list(depth.shape)}.")
        return self.center + depth[..., None] * self.rays()


def intrinsics(width: int, height: int, *, fov_x_rad: float) -> Tensor:
    """K [3, 3] of square pixels, principal point in the middle, `fov_x_rad` the angle between left and right border."""
    if not 0 < fov_x_rad < math.pi:
        raise SceneError(f"intrinsics: fov_x_rad is an angle between 0 and pi; got {fov_x_rad}.")
    focal = 0.5 * width / math.tan(0.5 * fov_x_rad)
    return torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], dtype=torch.float32)


def look_at(eye: Vector, target: Vector, up: Vector, K: Tensor, width: int, height: int) -> Camera:
    """The camera at `eye` whose optical axis meets `target`, with `up` pointing to the top of the image.

    Raises SceneError where eye and target coincide, or the camera looks along `up`.
    """
    eye, target, up = (torch.as_tensor(v, dtype=torch.float64) for v in (eye, target, up))
    forward = target - eye
    right = torch.linalg.cross(forward, up)
    if forward.norm() == 0 or right.norm() <= 1e-9 * forward.norm() * up.norm():
        raise SceneError(
            f"look_at: eye {eye.tolist()}, target {target.tolist()} and up {up.tolist()} leave the camera undefined; "
            "expected another eye, or an up that is not along the view."
        )
    forward, right = forward / forward.norm(), right / right.norm()
    rotation = torch.stack([right, torch.linalg.cross(forward, right), forward])
    return _camera(rotation, eye, K, width, height)


def interpolate(a: Camera, b: Camera, t: float) -> Camera:
    """The camera a share `t` of the way from a to b: rotation by slerp, centre and K linearly.

    Raises SceneError where the image sizes differ.
    """
    if (a.width, a.height) != (b.width, b.height):
        raise SceneError(
            f"interpolate: sizes differ ({a.width} x {a.height} and {b.width} x {b.height}); use Camera.resized first."
        )
    start, end = a.viewmat[:3, :3].double(), b.viewmat[:3, :3].double()
    rotation = _rotation(t * _rotation_vector(end @ start.T)) @ start
    return _camera(rotation, torch.lerp(a.center, b.center, t), torch.lerp(a.K, b.K, t), a.width, a.height)


def path_through(cameras: Sequence[Camera], frames: int, *, closed: bool = False) -> list[Camera]:
    """`frames` cameras along straight segments from one camera to the next, each segment given equally many.

    closed  goes back from the last to the first; the first camera is then not repeated at the end
    """
    _check_path("path_through", cameras, frames, fewest=2)
    stops = [*cameras, cameras[0]] if closed else list(cameras)
    segments = len(stops) - 1
    steps = frames if closed else max(frames - 1, 1)
    path = []
    for frame in range(frames):
        place = segments * frame / steps
        first = min(int(place), segments - 1)
        path.append(interpolate(stops[first], stops[first + 1], place - first))
    return path


def orbit(cameras: Sequence[Camera], frames: int) -> list[Camera]:
    """`frames` cameras once around what the cameras look at, at their mean distance and height.

    The centre is the point closest to all optical axes (least squares). The axis is their mean up vector without what
    lies in the plane of their horizontal axes: cameras held level give the true vertical. K and size are those of the
    first camera. Made for cameras that stand around an object; for forward-facing ones use `spiral`.

    Raises SceneError for fewer than two cameras, or where all look the same way.
    """
    _check_path("orbit", cameras, frames, fewest=2)
    centers = torch.stack([camera.center for camera in cameras]).double()
    focus = _focus(centers, torch.stack([camera.forward for camera in cameras]).double())
    up = _vertical(cameras)
    offsets = centers - focus
    heights = offsets @ up
    flat = offsets - heights[:, None] * up
    first = flat[flat.norm(dim=1).argmax()]
    first = first / first.norm()
    second = torch.linalg.cross(up, first)
    radius = flat.norm(dim=1).mean()
    model = cameras[0]
    path = []
    for frame in range(frames):
        angle = 2 * math.pi * frame / frames
        eye = focus + heights.mean() * up + radius * (math.cos(angle) * first + math.sin(angle) * second)
        path.append(look_at(eye, focus, up, model.K, model.width, model.height))
    return path


def spiral(cameras: Sequence[Camera], frames: int, *, focus: float, turns: int = 2) -> list[Camera]:
    """The LLFF spiral: `turns` turns about the mean camera, all views aimed at a point `focus` ahead of it.

    The radii are the 90th percentiles of the cameras' distances from the mean, along each axis; the depth axis swings
    at half the speed. focus > 0 is a distance of the scene, for instance the median depth of its points.
    """
    _check_path("spiral", cameras, frames, fewest=1)
    if not focus > 0:
        raise SceneError(f"spiral: focus is a distance in front of the cameras, > 0; got {focus}.")
    centers = torch.stack([camera.center for camera in cameras]).double()
    middle = centers.mean(dim=0)
    forward = torch.stack([camera.forward for camera in cameras]).double().mean(dim=0)
    up = torch.stack([camera.up for camera in cameras]).double().mean(dim=0)
    model = cameras[0]
    mean = look_at(middle, middle + forward, up, model.K, model.width, model.height)
    axes = mean.viewmat[:3, :3].double()
    radii = torch.quantile(((centers - middle) @ axes.T).abs(), 0.9, dim=0)
    path = []
    for frame in range(frames):
        angle = 2 * math.pi * turns * frame / frames
        swing = torch.tensor([math.cos(angle), math.sin(angle), math.sin(angle / 2)], dtype=torch.float64)
        eye = middle + (swing * radii) @ axes
        path.append(look_at(eye, middle + focus * axes[2], up, model.K, model.width, model.height))
    return path


def _camera(rotation: Tensor, center: Tensor, K: Tensor, width: int, height: int) -> Camera:
    viewmat = torch.eye(4, dtype=torch.float64, device=rotation.device)
    viewmat[:3, :3] = rotation
    viewmat[:3, 3] = -rotation @ center.double()
    return Camera(viewmat.float(), K.float(), width, height)


def _check_path(name: str, cameras: Sequence[Camera], frames: int, *, fewest: int) -> None:
    if len(cameras) < fewest or frames < 1:
        raise SceneError(f"{name}: got {len(cameras)} cameras and {frames} frames; expected {fewest} and 1 or more.")


def _focus(centers: Tensor, forwards: Tensor) -> Tensor:
    """The point with the least sum of squared distances from the lines centers + s * forwards, each [V, 3]."""
    across = torch.eye(3, dtype=centers.dtype) - forwards[:, :, None] * forwards[:, None, :]  # removes the along part
    system = across.sum(dim=0)
    if torch.linalg.cond(system) > 1e9:
        raise SceneError("orbit: all cameras look in the same direction, so there is nothing to go around; use spiral.")
    return torch.linalg.solve(system, (across @ centers[:, :, None]).sum(dim=0)).squeeze(-1)


def _vertical(cameras: Sequence[Camera]) -> Tensor:
    up = torch.stack([camera.up for camera in cameras]).double().mean(dim=0)
    rights = torch.stack([camera.viewmat[0, :3] for camera in cameras]).double()
    spreads, axes = torch.linalg.eigh(rights.T @ rights / len(rights))  # rising
    for spread, axis in zip(spreads[1:], axes.T[1:], strict=True):
        if spread > 0.01:
            up = up - (up @ axis) * axis
    return up / up.norm()


def _rotation_vector(rotation: Tensor) -> Tensor:
    """[3] axis times angle (0..pi) of a rotation matrix, through its quaternion: stable at both ends."""
    m = rotation
    # the four squared quaternion components, each from the diagonal; the largest is safe to divide by
    squares = torch.stack([1 + m.trace(), *(1 + 2 * m.diagonal() - m.trace())]) / 4
    largest = int(squares.argmax())
    w, x, y, z = 0, 1, 2, 3
    products = torch.zeros(4, 4, dtype=m.dtype, device=m.device)
    products[w, x], products[w, y], products[w, z] = m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]
    products[x, y], products[x, z], products[y, z] = m[0, 1] + m[1, 0], m[0, 2] + m[2, 0], m[1, 2] + m[2, 1]
    products = (products + products.T) / 4 + torch.diag(squares)
    quaternion = products[largest] / squares[largest].sqrt()
    quaternion = quaternion / quaternion.norm() * (-1.0 if quaternion[0] < 0 else 1.0)
    sine = quaternion[1:].norm()
    if sine == 0:
        return torch.zeros_like(quaternion[1:])
    return quaternion[1:] / sine * 2 * torch.atan2(sine, quaternion[0])


def _rotation(vector: Tensor) -> Tensor:
    """The rotation matrix of an axis times angle."""
    x, y, z = vector.tolist()
    cross = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=vector.dtype, device=vector.device)
    return torch.linalg.matrix_exp(cross)
