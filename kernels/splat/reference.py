"""Gaussian splatting in plain torch: slow, obviously right, the specification of the fast kernels.

Every function works in float32 and float64, on any device, and is differentiable by plain autograd wherever the maths
is. The conventions are those of gsplat 1.5.3: cameras look along +z with y down (OpenCV), view matrices map the world
to the camera, the centre of a pixel is its index + 0.5. C cameras, N Gaussians, D channels, H x W pixels.

Maths: B. Kerbl et al., "3D Gaussian Splatting for Real-Time Radiance Field Rendering", 2023 (the image formation);
M. Zwicker et al., "EWA volume splatting", 2001 (the flattening); Z. Yu et al., "Mip-Splatting", 2024 (the
compensation); S. Kheradmand et al., "3D Gaussian Splatting as Markov Chain Monte Carlo", 2024 (relocation and noise).
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

__all__ = ["position_noise", "projection", "rasterize", "relocation", "spherical_harmonics"]

EXTENT = 3.33  # sigmas: an opacity of 1 has fallen to 1/255 there
ALPHA_MIN = 1 / 255  # less than one step of an 8-bit image is not drawn
TRANSMITTANCE_MIN = 1e-4  # a Gaussian that would leave no more light than this ends the pixel and is not drawn
RATIO_MAX = 51  # copies of one Gaussian that relocation tells apart, as in the authors' code


def projection(
    means: Tensor,
    quats: Tensor | None,
    scales: Tensor | None,
    opacities: Tensor | None,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    *,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    radius_clip: float = 0.0,
    eps2d: float = 0.3,
    antialiased: bool = False,
    covars: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """3-D Gaussians -> what each camera sees of them: 2-D Gaussians in pixels.

    means [N, 3]; quats [N, 4] (w, x, y, z), of any length but 0; scales [N, 3], standard deviations along the turned
    axes; or, instead of quats and scales, covars [N, 3, 3], of which the symmetric part counts; opacities [N] in 0..1,
    which only bound the radii (None: 3.33 sigmas); viewmats [C, 4, 4]; Ks [C, 3, 3] in pixels, without skew and without
    gradient. eps2d [pixels^2] widens every Gaussian to about a pixel.

    Returns
        radii [C, N, 2] int32: half sizes in pixels of a box beyond which alpha < 1/255; (0, 0) means culled;
        means2d [C, N, 2] in pixels; depths [C, N], z in the camera's frame;
        conics [C, N, 3]: (a, b, c) of the inverse covariance [[a, b], [b, c]], in pixels^-2;
        compensations [C, N]: the factor of the opacity, sqrt(det before / det after widening); 1 unless antialiased.

    Culled is what is not between the planes, has no area, is too faint (opacity < 1/255, after compensation), no larger
    than radius_clip pixels either way, or beside the image; also what is broken: NaN or infinite anywhere, a zero
    quaternion, an overflow on the way. All outputs of a culled Gaussian are 0, and so are its gradients.
    Raises ValueError unless there are either quats and scales or covars.
    """
    shape = [values for values in (quats, scales, covars) if values is not None]
    if len(shape) != (2 if covars is None else 1):
        raise ValueError("projection: got both or neither of quats with scales and covars; expected one of the two")
    view = {"Ks": Ks.detach(), "width": width, "height": height, "eps2d": eps2d}
    with torch.no_grad():
        centres, spreads = _to_camera(means, _covariances(*shape), viewmats)
        means2d, conics, variances, compensations = _to_image(centres, spreads, **view)
        if opacities is None:
            extents = torch.full_like(compensations, EXTENT)
        else:
            extents = _extents(opacities * compensations if antialiased else opacities)
        radii = (extents[..., None] * variances.sqrt()).ceil()
        low, high = means2d - radii, means2d + radii
        kept = (
            _finite(centres, means2d, conics)
            & (centres[..., 2] > near_plane)
            & (centres[..., 2] < far_plane)
            & (radii > radius_clip).any(-1)
            & ((radii > 0) & (radii < 2**31) & (high > 0) & (low < low.new_tensor([width, height]))).all(-1)
        )

    # Once more, with harmless values in place of the culled ones, and for cameras that see nothing: masking the results
    # alone would leave gradients of 0 * inf = NaN.
    seen = kept[..., None]
    eye = torch.eye(4, dtype=means.dtype, device=means.device)
    used = kept.any(1)[:, None, None]
    viewmats, view["Ks"] = torch.where(used, viewmats, eye), torch.where(used, view["Ks"], eye[:3, :3])
    stand_ins = (eye[0], torch.ones_like(eye[0, :3])) if covars is None else (eye[:3, :3],)
    shape = [
        torch.where(seen.view(*kept.shape, *[1] * good.ndim), values, good)
        for values, good in zip(shape, stand_ins, strict=True)
    ]
    centres, spreads = _to_camera(torch.where(seen, means, 0), _covariances(*shape), viewmats)
    centres = torch.where(seen, centres, eye[2, :3])
    means2d, conics, _, compensations = _to_image(centres, spreads, **view)
    return (
        torch.where(seen, radii, 0).to(torch.int32),
        torch.where(seen, means2d, 0),
        torch.where(kept, centres[..., 2], 0),
        torch.where(seen, conics, 0),
        torch.where(kept, compensations, 0) if antialiased else kept.to(means.dtype),
    )


def spherical_harmonics(degree: int, dirs: Tensor, coeffs: Tensor) -> Tensor:
    """Real spherical harmonics up to a degree of 0..3, summed: colours as seen along directions.

    dirs [..., 3], of any length; a zero direction counts as (0, 0, 0) and has no gradient. coeffs [..., K, 3] with
    K >= (degree + 1)^2, of which the first (degree + 1)^2 are read; the leading sizes broadcast.

    Returns [..., 3], without the 0.5 that 3DGS adds and without its cut at 0.
    Raises ValueError for another degree or too few coefficients.
    """
    if degree not in (0, 1, 2, 3):
        raise ValueError(f"spherical_harmonics: got degree {degree!r}; expected 0, 1, 2 or 3")
    count = (degree + 1) ** 2
    if coeffs.shape[-2] < count:
        raise ValueError(
            f"spherical_harmonics: got coeffs {tuple(coeffs.shape)}; degree {degree} needs [..., K >= {count}, 3]; "
            "lower the degree, or pad coeffs with zeros"
        )
    x, y, z = _unit(dirs, of_zero=0.0).unbind(-1)
    band1, band2, band3 = (math.sqrt(n / (4 * math.pi)) for n in (3, 5, 7))
    basis = [
        torch.full_like(x, math.sqrt(1 / (4 * math.pi))),
        -band1 * y,
        band1 * z,
        -band1 * x,
        band2 * math.sqrt(3) * x * y,
        -band2 * math.sqrt(3) * y * z,
        band2 / 2 * (3 * z**2 - 1),
        -band2 * math.sqrt(3) * x * z,
        band2 * math.sqrt(3) / 2 * (x**2 - y**2),
        -band3 * math.sqrt(5 / 8) * y * (3 * x**2 - y**2),
        band3 * math.sqrt(15) * x * y * z,
        -band3 * math.sqrt(3 / 8) * y * (5 * z**2 - 1),
        band3 / 2 * z * (5 * z**2 - 3),
        -band3 * math.sqrt(3 / 8) * x * (5 * z**2 - 1),
        band3 * math.sqrt(15) / 2 * z * (x**2 - y**2),
        -band3 * math.sqrt(5 / 8) * x * (x**2 - 3 * y**2),
    ]
    return (torch.stack(basis[:count], -1)[..., None] * coeffs[..., :count, :]).sum(-2)


def rasterize(
    means2d: Tensor,
    conics: Tensor,
    colors: Tensor,
    opacities: Tensor,
    radii: Tensor,
    depths: Tensor,
    first: Tensor,
    backgrounds: Tensor | None,
    width: int,
    height: int,
    *,
    alpha_max: float = 0.999,
    tile_size: int = 16,
) -> tuple[Tensor, Tensor]:
    """2-D Gaussians, blended front to back into images.

    means2d [M, 2], conics [M, 3], radii [M, 2] and depths [M] as `projection` returns them; colors [M, D]; opacities
    [M] with the compensation in them; first [C + 1] int64: camera c draws the items first[c] : first[c + 1];
    backgrounds [C, D] (None: 0).

    In the order of their depths (equal ones: of their indices), each Gaussian whose box touches the pixel's tile covers
    it by alpha = min(alpha_max, opacity exp(-sigma)) with sigma = (a dx^2 + c dy^2) / 2 + b dx dy. It is passed over
    where sigma < 0 or alpha < 1/255. The first that would bring the transmittance T, the product of 1 - alpha, to 1e-4
    or below ends the pixel and is not drawn itself. Not drawn either: items with a radius of 0, with a conic that is
    not positive definite, with NaN or infinity in anything but the colour. A colour that is not finite makes the tiles
    of its box NaN.

    Returns render [C, H, W, D]: the sum of alpha T colour, plus the last T times the background; alphas [C, H, W, 1]:
    one minus the last T. depths, radii and the order have no gradient; a clipped alpha has none either.
    Costs memory: a few [items of the tile, tile_size^2] tables a tile, kept for the backward pass.
    """
    rows, columns = -(-height // tile_size), -(-width // tile_size)
    index = torch.arange(tile_size, dtype=means2d.dtype, device=means2d.device) + 0.5
    pixels = torch.cartesian_prod(index, index).flip(-1)  # [P, 2], x changes fastest; of the tile at the origin
    low, high = (means2d - radii).detach(), (means2d + radii).detach()
    a, b, c = conics.unbind(-1)
    definite = (a > 0) & (a * c > b * b)
    drawn = definite & (radii > 0).all(-1) & _finite(means2d, conics, opacities[:, None], depths[:, None])
    images = [colors.new_empty(0, height, width, colors.shape[1] + 1)]
    for camera, (start, stop) in enumerate(itertools.pairwise(first.tolist())):
        items = start + drawn[start:stop].nonzero()[:, 0]
        items = items[depths[items].argsort(stable=True)]
        background = colors.new_zeros(colors.shape[1]) if backgrounds is None else backgrounds[camera]
        tiles = []
        for top in range(0, rows * tile_size, tile_size):
            in_row = items[(low[items, 1] < top + tile_size) & (high[items, 1] > top)]
            for left in range(0, columns * tile_size, tile_size):
                i = in_row[(low[in_row, 0] < left + tile_size) & (high[in_row, 0] > left)]
                at = pixels + pixels.new_tensor([left, top])
                tiles.append(_blend(means2d[i], conics[i], colors[i], opacities[i], background, at, alpha_max))
        image = torch.stack(tiles).view(rows, columns, tile_size, tile_size, -1).transpose(1, 2)
        images.append(image.reshape(1, rows * tile_size, columns * tile_size, -1)[:, :height, :width])
    image = torch.cat(images)
    return image[..., :-1], image[..., -1:]


def relocation(opacities: Tensor, scales: Tensor, ratios: Tensor) -> tuple[Tensor, Tensor]:
    """What n copies of a Gaussian must be to look together like the one they replace (3DGS-MCMC, equation 9).

    opacities [n] in 0..1, scales [n, 3], ratios [n] int: how many copies, the original included, cut to 1..51.

    Returns opacities [n] o' = 1 - (1 - o)^(1/n) and scales [n, 3], multiplied by
    o / sum over i = 1..n and k = 0..i-1 of binom(i-1, k) (-1)^k o'^(k+1) / sqrt(k+1). Computed in float64.
    """
    # sum over i of binom(i-1, k) = binom(n, k+1), so that the inner sum is done here, exactly
    table = [
        [(-1) ** k * math.comb(n, k + 1) / math.sqrt(k + 1) for k in range(RATIO_MAX)] for n in range(RATIO_MAX + 1)
    ]
    device = "cpu" if opacities.device.type == "mps" else opacities.device  # MPS has no float64
    n = ratios.to(device).clamp(1, RATIO_MAX).long()
    old = opacities.to(device, torch.float64)
    # the alternating sum cancels to nothing at an opacity of exactly 1 and many copies; a last bit less, and it holds
    new = -torch.expm1(torch.log1p(-old.clamp(max=1 - 2**-53)) / n)
    powers = new[:, None] ** torch.arange(1, RATIO_MAX + 1, device=device)
    total = (powers * torch.tensor(table, dtype=torch.float64, device=device)[n]).sum(-1)
    factor = torch.where(old > 0, old / torch.where(old > 0, total, 1), 1)  # at 0: the limit
    return new.to(opacities), (scales.to(factor) * factor[:, None]).to(scales)


def position_noise(quats: Tensor, scales: Tensor, opacities: Tensor, noise: Tensor) -> Tensor:
    """The noise that 3DGS-MCMC adds to the means: Sigma noise sigmoid(100 ((1 - opacity) - 0.995)).

    quats [N, 4], scales [N, 3] and opacities [N] after their activations; noise [N, 3], normal numbers already times
    the step size. Faint Gaussians move, along their own shape; opaque ones stay.

    Returns [N, 3]; 0 for a broken Gaussian (a zero quaternion, anything NaN or infinite).
    """
    gate = torch.sigmoid(100 * ((1 - opacities) - 0.995))
    moved = (_covariances(quats, scales) @ noise[..., None])[..., 0] * gate[..., None]
    return torch.where(_finite(moved, opacities[..., None])[..., None], moved, 0)


def _unit(vectors: Tensor, of_zero: float) -> Tensor:
    """Vectors [..., n] at length 1; zero becomes `of_zero` and has no gradient; NaN where something is not finite."""
    largest = vectors.detach().abs().amax(-1, keepdim=True)  # so that no square overflows
    usable = largest > 0
    vectors = torch.where(usable, vectors, 1) / torch.where(usable, largest, 1)
    unit = vectors / vectors.square().sum(-1, keepdim=True).sqrt()
    return torch.where(usable, unit, torch.where(largest == 0, of_zero, torch.nan))


def _extents(opacities: Tensor) -> Tensor:
    """How many sigmas from the centre opacity * exp(-sigmas^2 / 2) is 1/255, at most 3.33; NaN if it is nowhere."""
    extents = (2 * (255 * opacities).log()).sqrt().clamp(max=EXTENT)
    return torch.where((opacities >= ALPHA_MIN) & opacities.isfinite(), extents, torch.nan)


def _finite(*values: Tensor) -> Tensor:
    """[...]: whether all of the last dimension of all of them is finite."""
    return torch.cat([v.isfinite() for v in values], -1).all(-1)


def _covariances(*shape: Tensor) -> Tensor:
    """Sigma = R diag(s)^2 R^T [..., 3, 3] of quats and scales, or of covariances themselves."""
    if len(shape) == 1:
        return (shape[0] + shape[0].mT) / 2
    quats, scales = shape
    w, x, y, z = _unit(quats, of_zero=torch.nan).unbind(-1)
    rotation = [
        1 - 2 * (y * y + z * z),
        2 * (x * y - w * z),
        2 * (x * z + w * y),
        2 * (x * y + w * z),
        1 - 2 * (x * x + z * z),
        2 * (y * z - w * x),
        2 * (x * z - w * y),
        2 * (y * z + w * x),
        1 - 2 * (x * x + y * y),
    ]
    root = torch.stack(rotation, -1).unflatten(-1, (3, 3)) * scales[..., None, :]
    return root @ root.mT


def _to_camera(means: Tensor, covars: Tensor, viewmats: Tensor) -> tuple[Tensor, Tensor]:
    """Centres [C, N, 3] and covariances [C, N, 3, 3] in the frames of the cameras."""
    turn, shift = viewmats[:, None, :3, :3], viewmats[:, None, :3, 3]
    return (turn @ means[..., None])[..., 0] + shift, turn @ covars @ turn.mT


def _to_image(
    centres: Tensor, covars: Tensor, Ks: Tensor, width: int, height: int, eps2d: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """means2d [C, N, 2], conics [C, N, 3], the variances along x and y [C, N, 2], compensations [C, N].

    Without positive area all but means2d are NaN.
    """
    x, y, z = centres.unbind(-1)
    fx, fy, cx, cy = (Ks[:, i, j, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))  # [C, 1]
    means2d = torch.stack([fx * x / z + cx, fy * y / z + cy], -1)
    # the flattening is linear, and far outside the image no good: there it is that of a point 15 % of the size beyond
    # the border
    x = z * (x / z).clamp(-(cx + 0.15 * width) / fx, (1.15 * width - cx) / fx)
    y = z * (y / z).clamp(-(cy + 0.15 * height) / fy, (1.15 * height - cy) / fy)
    zero = torch.zeros_like(z)
    jacobian = torch.stack([fx / z, zero, -fx * x / z**2, zero, fy / z, -fy * y / z**2], -1).unflatten(-1, (2, 3))
    flat = jacobian @ covars @ jacobian.mT  # [C, N, 2, 2]
    a, b, c = flat[..., 0, 0], flat[..., 0, 1], flat[..., 1, 1]
    sharp = a * c - b * b
    a, c = a + eps2d, c + eps2d
    area = a * c - b * b
    area = torch.where(area > 0, area, torch.nan)
    ratio = sharp / area
    compensations = torch.where(ratio > 0, torch.where(ratio > 0, ratio, 1).sqrt(), 0)  # no gradient at 0
    conics = torch.stack([c, -b, a], -1) / area[..., None]
    return means2d, conics, torch.stack([a, c], -1), compensations


def _blend(
    means2d: Tensor,
    conics: Tensor,
    colors: Tensor,
    opacities: Tensor,
    background: Tensor,
    pixels: Tensor,
    alpha_max: float,
) -> Tensor:
    """Sorted Gaussians [n, .] on pixels [P, 2]: the colours and the coverage [P, D + 1]."""
    dx, dy = (means2d[:, None] - pixels).unbind(-1)  # [n, P]
    a, b, c = conics[:, :, None].unbind(1)  # [n, 1]
    sigma = (a * dx * dx + c * dy * dy) / 2 + b * dx * dy
    alpha = (opacities[:, None] * torch.exp(-sigma)).clamp(max=alpha_max)
    with torch.no_grad():
        counts = (sigma >= 0) & (alpha >= ALPHA_MIN)
        counts = counts & (torch.where(counts, 1 - alpha, 1).cumprod(0) > TRANSMITTANCE_MIN)
    alpha = torch.where(counts, alpha, 0)
    left = torch.cat([dx.new_ones(1, len(pixels)), 1 - alpha]).cumprod(0)  # [n + 1, P]: T
    colour = (alpha * left[:-1]).mT @ colors + left[-1, :, None] * background
    return torch.cat([colour, 1 - left[-1, :, None]], -1)
