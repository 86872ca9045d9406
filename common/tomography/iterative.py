"""Iterative reconstruction: SIRT, CGLS and total variation, all on the matched pair A, A^T of `kernels.ct`.

Every function takes sinograms [..., V, K] (line integrals, no unit) with the geometry that measured them, works on the
whole batch at once, and returns a `Reconstruction` whose image [..., H, W] is in 1/mm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.ct import FanBeam, ParallelBeam, backproject, project

Geometry = ParallelBeam | FanBeam


@dataclass(frozen=True)
class Reconstruction:
    """What an iterative method found.

    image: [..., H, W] in 1/mm. iterations: how many were made. converged: whether the method's own criterion was met,
    or the iterations ran out. history: one number an iteration; each function says which.
    """

    image: Tensor
    iterations: int
    converged: bool
    history: list[float] = field(repr=False)


def sirt(
    sinogram: Tensor,
    geometry: Geometry,
    *,
    iterations: int = 200,
    relaxation: float = 1.0,
    nonnegative: bool = True,
    tolerance: float = 1e-4,
    start: Tensor | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Reconstruction:
    """Simultaneous iterative reconstruction: x <- x + w C A^T R (y - A x), R = 1/(A 1), C = 1/(A^T 1).

    relaxation: w in (0, 2). tolerance: converged when the image changes by less than this share of its norm.
    start: [..., H, W], zeros if not given. progress: called with (iteration, relative change). Rays that miss the image
    and pixels that no ray meets keep their values. history: norm of y - A x.

    Raises ValueError for a bad shape, values that are not finite, or parameters out of range.
    """
    _check(sinogram, geometry, iterations)
    if not 0 < relaxation < 2:
        raise ValueError(f"sirt: got relaxation {relaxation}, expected a number between 0 and 2")
    rows, columns = (_inverse(total) for total in _totals(sinogram, geometry))
    x = _start(sinogram, geometry, start)
    history, converged = [], False
    for iteration in range(1, iterations + 1):
        residual = sinogram - project(x, geometry)
        new = x + relaxation * columns * backproject(rows * residual, geometry)
        if nonnegative:
            new = new.clamp_min(0)
        change = _share((new - x).norm(), new.norm())
        x = new
        history.append(residual.norm().item())
        if progress:
            progress(iteration, change)
        if change < tolerance:
            converged = True
            break
    return Reconstruction(x, len(history), converged, history)


def cgls(
    sinogram: Tensor,
    geometry: Geometry,
    *,
    iterations: int = 50,
    tolerance: float = 1e-5,
    noise_norm: float | None = None,
    start: Tensor | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Reconstruction:
    """Conjugate gradients for least squares, min ||A x - y||^2. (Hestenes & Stiefel 1952; Paige & Saunders 1982.)

    tolerance: converged when ||A^T (y - A x)|| falls below this share of its first value. noise_norm: if given, stop
    (converged) as soon as ||y - A x|| is no larger, the discrepancy principle: further iterations would fit noise.
    The batch is one problem with one step length. history: norm of y - A x.

    Raises ValueError for a bad shape, values that are not finite, or iterations < 1.
    """
    _check(sinogram, geometry, iterations)
    x = _start(sinogram, geometry, start)
    residual = sinogram - project(x, geometry)
    s = backproject(residual, geometry)
    p, gamma = s, s.square().sum()
    first, history = gamma.sqrt(), []
    converged = first.item() == 0
    while not converged and len(history) < iterations:
        q = project(p, geometry)
        alpha = gamma / q.square().sum()
        x = x + alpha * p
        residual = residual - alpha * q
        s = backproject(residual, geometry)
        gamma, previous = s.square().sum(), gamma
        p = s + (gamma / previous) * p
        history.append(residual.norm().item())
        change = _share(gamma.sqrt(), first)
        if progress:
            progress(len(history), change)
        converged = change < tolerance or (noise_norm is not None and history[-1] <= noise_norm)
    return Reconstruction(x, len(history), converged, history)


def tv(
    sinogram: Tensor,
    geometry: Geometry,
    *,
    weight: float,
    iterations: int = 2000,
    tolerance: float = 1e-4,
    nonnegative: bool = True,
    start: Tensor | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Reconstruction:
    """Total variation: min_x 1/2 ||A x - y||^2 + weight TV(x), TV isotropic, by preconditioned primal-dual steps.

    Chambolle & Pock 2011 with the diagonal steps of Pock & Chambolle 2011 (alpha = 1): sigma_i = 1 / sum_j |K_ij|,
    tau_j = 1 / sum_i |K_ij| of K = [A; s grad]; s makes the two blocks equally strong.

    weight: >= 0, in the unit of A x times mm. tolerance: converged when primal and dual residual (how far the optimality
    conditions are from holding) both fall below this share of the norms they are made of. history: the objective, every
    iteration.

    Raises ValueError for a bad shape, values that are not finite, or a negative weight.
    """
    _check(sinogram, geometry, iterations)
    if not weight >= 0:
        raise ValueError(
            f"tv: got weight {weight}, expected a number >= 0; 1e-3 is a start for line integrals of order 1"
        )
    rows, columns = _totals(sinogram, geometry)
    strength = columns.max().item() / 4 or 1.0  # of the gradient block; 4 is the most a column of |grad| sums to
    sigma_data, sigma_gradient = _inverse(rows), 1 / (2 * strength)
    tau = 1 / (columns + 4 * strength)
    bound = weight / strength
    x = _start(sinogram, geometry, start)
    data_dual, gradient_dual = torch.zeros_like(sinogram), torch.zeros_like(_gradient(x))
    ax, gx = project(x, geometry), _gradient(x)
    back = torch.zeros_like(x)  # K^T dual
    history, converged = [], False
    for iteration in range(1, iterations + 1):
        new = x - tau * back
        if nonnegative:
            new = new.clamp_min(0)
        new_ax, new_gx = project(new, geometry), _gradient(new)
        # the over-relaxed point enters only through A and grad, which are linear
        new_data = (data_dual + sigma_data * (2 * new_ax - ax - sinogram)) / (1 + sigma_data)
        new_gradient = gradient_dual + sigma_gradient * strength * (2 * new_gx - gx)
        new_gradient = (
            new_gradient / (new_gradient.norm(dim=-3, keepdim=True) / bound).clamp_min(1) if bound else 0 * gx
        )
        new_back = backproject(new_data, geometry) + strength * _gradient_adjoint(new_gradient)

        primal = _share(((x - new) / tau - (back - new_back)).norm(), new_back.norm() + ((x - new) / tau).norm())
        step_data = (data_dual - new_data) * _inverse(sigma_data) - (ax - new_ax)
        step_gradient = (gradient_dual - new_gradient) / sigma_gradient - strength * (gx - new_gx)
        scale = new_ax.norm() + sinogram.norm() + strength * new_gx.norm()
        dual = _share((step_data.norm().square() + step_gradient.norm().square()).sqrt(), scale)

        x, ax, gx, back = new, new_ax, new_gx, new_back
        data_dual, gradient_dual = new_data, new_gradient
        variation = gx.norm(dim=-3).sum()
        history.append((0.5 * (ax - sinogram).square().sum() + weight * variation).item())
        if progress:
            progress(iteration, max(primal, dual))
        if iteration > 1 and max(primal, dual) < tolerance:
            converged = True
            break
    return Reconstruction(x, len(history), converged, history)


def operator_norm(geometry: Geometry, *, iterations: int = 50, seed: int = 0) -> float:
    """The largest singular value of A, in mm, from below, by power iteration on A^T A."""
    x = torch.rand(geometry.shape, generator=torch.Generator().manual_seed(seed))
    norm = torch.tensor(0.0)
    for _ in range(iterations):
        x = x / x.norm()
        x = backproject(project(x, geometry), geometry)
        norm = x.norm()
    return math.sqrt(norm.item())


def _gradient(x: Tensor) -> Tensor:
    """Forward differences, zero at the far edges: [..., H, W] -> [..., 2, H, W]."""
    down, right = torch.zeros_like(x), torch.zeros_like(x)
    down[..., :-1, :] = x[..., 1:, :] - x[..., :-1, :]
    right[..., :-1] = x[..., 1:] - x[..., :-1]
    return torch.stack([down, right], dim=-3)


def _gradient_adjoint(g: Tensor) -> Tensor:
    """The transpose of `_gradient`: [..., 2, H, W] -> [..., H, W]."""
    down, right = g.unbind(-3)
    out = torch.zeros_like(down)
    out[..., 1:, :] += down[..., :-1, :]
    out[..., :-1, :] -= down[..., :-1, :]
    out[..., 1:] += right[..., :-1]
    out[..., :-1] -= right[..., :-1]
    return out


def _totals(sinogram: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """A 1 [V, K] and A^T 1 [H, W] in mm: row and column sums of A."""
    return project(sinogram.new_ones(geometry.shape), geometry), backproject(
        sinogram.new_ones(geometry.sinogram_shape), geometry
    )


def _inverse(total: Tensor) -> Tensor:
    """1/total, and 0 where a ray or a pixel meets (next to) nothing."""
    return torch.where(total > 1e-6 * total.max(), 1 / total, 0) if total.numel() else total


def _share(part: Tensor, whole: Tensor) -> float:
    return (part / whole.clamp_min(torch.finfo(whole.dtype).tiny)).item()


def _start(sinogram: Tensor, geometry: Geometry, start: Tensor | None) -> Tensor:
    shape = (*sinogram.shape[:-2], *geometry.shape)
    if start is None:
        return sinogram.new_zeros(shape)
    if tuple(start.shape) != shape:
        raise ValueError(f"got a start of shape {tuple(start.shape)}, expected {shape}, as sinogram and geometry say")
    return start.to(sinogram)


def _check(sinogram: Tensor, geometry: Geometry, iterations: int) -> None:
    if sinogram.ndim < 2 or tuple(sinogram.shape[-2:]) != geometry.sinogram_shape:
        raise ValueError(
            f"got a sinogram of shape {tuple(sinogram.shape)}, expected [..., views, cells] ending in "
            f"{geometry.sinogram_shape}, as the geometry says"
        )
    if not torch.isfinite(sinogram).all():
        bad = (~torch.isfinite(sinogram)).sum().item()
        raise ValueError(
            f"the sinogram holds {bad} values that are not finite; expected none. Mask or repair them first"
        )
    if iterations < 1:
        raise ValueError(f"got iterations {iterations}, expected an integer >= 1")
