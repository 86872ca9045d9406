"""Files of Gaussians and of points: the PLY of 3DGS, the compact `.splat`, and point clouds as PLY.

    export_ply(path, model)         import_ply(path) -> Gaussians        everything, bit for bit; what viewers open
    export_splat(path, model)       import_splat(path) -> Gaussians      32 bytes a Gaussian: no view dependence, 8-bit
    export_points(path, cloud)      import_points(path) -> PointCloud    positions, colours, normals

PLY of 3DGS (Inria's order of properties): x y z, nx ny nz (zeros), f_dc_0..2, f_rest_* (all coefficients of red, then
of green, then of blue), opacity (logit), scale_0..2 (logarithms), rot_0..3 (w, x, y, z); binary, float32, little
endian.

`.splat`: position (3 float32), scale (3 float32), red, green, blue, opacity (uint8, 0..255 for 0..1), quaternion (4
uint8, 128 + 128 q with q = w, x, y, z of unit length), the largest contributions first: volume times opacity.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from common import files
from common.splatting.model import SH_C0, Gaussians
from common.splatting.scene import PointCloud

__all__ = [
    "SPLAT_BYTES",
    "PlyError",
    "export_ply",
    "export_points",
    "export_splat",
    "import_ply",
    "import_points",
    "import_splat",
    "splat_bytes",
]

SPLAT = np.dtype([("position", "<f4", 3), ("scale", "<f4", 3), ("rgba", "u1", 4), ("rotation", "u1", 4)])
SPLAT_BYTES = SPLAT.itemsize
SH_COUNTS = {0: 0, 9: 3, 24: 8, 45: 15}  # f_rest properties -> coefficients a channel

_TYPES = {
    **dict.fromkeys(("char", "int8"), "i1"),
    **dict.fromkeys(("uchar", "uint8"), "u1"),
    **dict.fromkeys(("short", "int16"), "i2"),
    **dict.fromkeys(("ushort", "uint16"), "u2"),
    **dict.fromkeys(("int", "int32"), "i4"),
    **dict.fromkeys(("uint", "uint32"), "u4"),
    **dict.fromkeys(("float", "float32"), "f4"),
    **dict.fromkeys(("double", "float64"), "f8"),
}
_LONGEST_HEADER = 64 * 1024  # bytes; one of 3DGS has 1.5 kB


class PlyError(ValueError):
    """A file of Gaussians or points that cannot be read: which, and what is wrong."""


def export_ply(path: Path, model: Gaussians) -> None:
    """Write all parameters as the PLY of 3DGS."""
    values = {name: value.cpu().numpy() for name, value in model.values().items()}
    count = len(model)
    columns = [  # of f_rest the coefficients run fastest, the channels slowest
        values["means"],
        np.zeros((count, 3), np.float32),
        values["sh0"][:, 0],
        values["shN"].transpose(0, 2, 1).reshape(count, 3 * values["shN"].shape[1]),
        values["opacity_logits"][:, None],
        values["log_scales"],
        values["quats"],
    ]
    names = _gaussian_properties(values["shN"].shape[1])
    _write_ply(path, dict(zip(names, np.concatenate(columns, axis=1).T, strict=True)))


def import_ply(path: Path) -> Gaussians:
    """Read a PLY of 3DGS, from any program: further properties are ignored, and so is the order.

    Raises PlyError for a file that is no such PLY, is cut off, or holds values that are not finite.
    """
    table = _read_ply(path)
    rest = sum(name.startswith("f_rest_") for name in table)
    if rest not in SH_COUNTS:
        raise PlyError(f"{path}: {rest} properties f_rest_*; expected 0, 9, 24 or 45 (SH degree 0 to 3).")
    higher = SH_COUNTS[rest]
    needed = [name for name in _gaussian_properties(higher) if name not in ("nx", "ny", "nz")]
    _demand(path, table, needed, "Gaussians (for plain points use import_points)")

    def take(*names: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([table[name].astype(np.float32) for name in names], axis=1))  # [N, names]

    shN = take(*(f"f_rest_{i}" for i in range(rest))) if rest else torch.zeros(len(table["x"]), 0)
    model = Gaussians(
        take("x", "y", "z"),
        take("scale_0", "scale_1", "scale_2"),
        take("rot_0", "rot_1", "rot_2", "rot_3"),
        take("opacity")[:, 0],
        take("f_dc_0", "f_dc_1", "f_dc_2")[:, None],
        shN.unflatten(1, (3, higher)).transpose(1, 2),
    )
    _demand_finite(path, model)
    return model


def export_splat(path: Path, model: Gaussians, *, most: int | None = None) -> None:
    """Write the `.splat`; `most`: only that many Gaussians, those with the largest volume times opacity."""
    files.write(path, splat_bytes(model, most=most))


def splat_bytes(model: Gaussians, *, most: int | None = None) -> bytes:
    """The content of a `.splat` file. Colours are those of SH degree 0, limited to 0..1."""
    values = {name: value.double().cpu() for name, value in model.values().items()}
    opacities = values["opacity_logits"].sigmoid()
    contribution = values["log_scales"].sum(dim=1) + opacities.log()
    order = torch.argsort(contribution, descending=True, stable=True)[:most]
    rgba = torch.cat([0.5 + SH_C0 * values["sh0"][:, 0], opacities[:, None]], dim=1)
    table = np.empty(len(order), SPLAT)
    table["position"] = values["means"][order].numpy()
    table["scale"] = values["log_scales"].exp()[order].numpy()
    table["rgba"] = (rgba[order] * 255).round().clamp(0, 255).numpy()
    rotation = torch.nn.functional.normalize(values["quats"][order], dim=1)
    table["rotation"] = (rotation * 128 + 128).round().clamp(0, 255).numpy()
    return table.tobytes()


def import_splat(path: Path) -> Gaussians:
    """Read a `.splat`: Gaussians of SH degree 0 with 8-bit colours, opacities and rotations.

    Opacities of 0 and 255 become half a step from the end, whose logit is finite.

    Raises PlyError for a size that is no multiple of 32 bytes, and for values that are not finite or scales <= 0.
    """
    content = path.read_bytes()
    if len(content) % SPLAT_BYTES:
        raise PlyError(f"{path}: {len(content)} bytes, expected a multiple of {SPLAT_BYTES}; the file is cut off.")
    table = np.frombuffer(content, SPLAT)
    rgba = torch.from_numpy(table["rgba"].astype(np.float32))
    quats = (torch.from_numpy(table["rotation"].astype(np.float32)) - 128) / 128
    quats[quats.square().sum(dim=1) == 0] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    opacity = rgba[:, 3].clamp(0.5, 254.5) / 255
    model = Gaussians(
        torch.from_numpy(table["position"].copy()),
        torch.from_numpy(table["scale"].copy()).log(),
        quats,
        torch.logit(opacity),
        ((rgba[:, :3] / 255 - 0.5) / SH_C0)[:, None],
        torch.zeros(len(table), 0, 3),
    )
    _demand_finite(path, model)
    return model


def export_points(path: Path, points: PointCloud) -> None:
    """Write a point cloud: x y z, red green blue (uint8), and nx ny nz where it has normals. Tracks are not kept."""
    columns: dict[str, NDArray[Any]] = dict(zip("xyz", points.positions.cpu().numpy().T, strict=True))
    if points.normals is not None:
        columns |= dict(zip(("nx", "ny", "nz"), points.normals.cpu().numpy().T, strict=True))
    colors = (points.colors * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
    _write_ply(path, columns | dict(zip(("red", "green", "blue"), colors.T, strict=True)))


def import_points(path: Path) -> PointCloud:
    """Read a point cloud with x y z and, if it has them, red green blue (grey if not) and nx ny nz.

    Integer colours are divided by the largest value of their type.

    Raises PlyError as `import_ply` does.
    """
    table = _read_ply(path)
    _demand(path, table, ["x", "y", "z"], "points")

    def take(names: Sequence[str]) -> torch.Tensor:
        columns = [table[name] for name in names]
        scale = np.iinfo(columns[0].dtype).max if columns[0].dtype.kind in "ui" and names[0] == "red" else 1
        return torch.from_numpy(np.stack([(column / scale).astype(np.float32) for column in columns], axis=1))

    positions, color_names, normal_names = take("xyz"), ("red", "green", "blue"), ("nx", "ny", "nz")
    if not bool(torch.isfinite(positions).all()):
        raise PlyError(f"{path}: positions hold NaN or Inf; the file is damaged or of another kind.")
    colors = take(color_names) if set(color_names) <= set(table) else torch.full_like(positions, 0.5)
    return PointCloud(positions, colors, normals=take(normal_names) if set(normal_names) <= set(table) else None)


def _gaussian_properties(higher: int) -> list[str]:
    return [
        *("x", "y", "z", "nx", "ny", "nz"),
        *(f"f_dc_{i}" for i in range(3)),
        *(f"f_rest_{i}" for i in range(3 * higher)),
        "opacity",
        *(f"scale_{i}" for i in range(3)),
        *(f"rot_{i}" for i in range(4)),
    ]


def _write_ply(path: Path, columns: dict[str, NDArray[Any]]) -> None:
    """A binary little-endian PLY with one element, `vertex`."""
    words = {"f": "float", "u": "uchar"}
    dtype = np.dtype([(name, column.dtype.newbyteorder("<")) for name, column in columns.items()])
    table = np.empty(len(columns["x"]), dtype)
    for name, column in columns.items():
        table[name] = column
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(table)}"]
    lines += [f"property {words[column.dtype.kind]} {name}" for name, column in columns.items()]
    files.write(path, "\n".join([*lines, "end_header", ""]).encode("ascii") + table.tobytes())


def _read_ply(path: Path) -> dict[str, NDArray[Any]]:
    """The columns of the element `vertex`, which has to be the first: that of every PLY of Gaussians or points."""
    content = path.read_bytes()
    if not content.startswith(b"ply"):
        raise PlyError(f"{path}: no PLY file; it starts with {content[:8]!r}.")
    end = content.find(b"end_header", 0, _LONGEST_HEADER)
    newline = content.find(b"\n", end)
    if end < 0 or newline < 0:
        raise PlyError(f"{path}: the PLY header has no end; the file is cut off.")
    encoding, count, properties = _header(path, content[:end].decode("ascii", errors="replace").splitlines()[1:])
    body = content[newline + 1 :]
    if encoding == "ascii":
        return _ascii_columns(path, body, count, properties)
    order = "<" if encoding == "binary_little_endian" else ">"
    dtype = np.dtype([(name, order + kind) for name, kind in properties])
    if len(body) < count * dtype.itemsize:
        raise PlyError(
            f"{path}: {len(body)} bytes of data, expected {count * dtype.itemsize} for {count} vertices; it is cut off."
        )
    table = np.frombuffer(body, dtype, count)
    return {name: table[name].astype(kind) for name, kind in properties}


def _header(path: Path, lines: list[str]) -> tuple[str, int, list[tuple[str, str]]]:
    """(encoding, number of vertices, [(property, NumPy type)])."""
    encoding, count, properties = "", -1, []
    for line in lines:
        match line.split():
            case ["format", name, _]:
                encoding = name
            case ["element", "vertex", number] if count < 0 and number.isdecimal():
                count = int(number)
            case ["element", *rest] if count < 0:
                raise PlyError(f"{path}: the first element is {' '.join(rest)!r}, expected 'vertex' and their number.")
            case ["element", *_]:
                break  # what follows the vertices is of no interest
            case ["property", kind, name] if kind in _TYPES:
                properties.append((name, _TYPES[kind]))
            case ["property", *_]:
                raise PlyError(
                    f"{path}: cannot read {line.strip()!r} of the vertices; expected a number type and a name."
                )
    if encoding not in ("ascii", "binary_little_endian", "binary_big_endian") or count < 0:
        raise PlyError(f"{path}: the PLY header gives no known format or no vertices; the file is damaged.")
    if len({name for name, _ in properties}) != len(properties) or not properties:
        raise PlyError(f"{path}: the vertices have no properties, or one twice; the file is damaged.")
    return encoding, count, properties


def _ascii_columns(path: Path, body: bytes, count: int, properties: list[tuple[str, str]]) -> dict[str, NDArray[Any]]:
    rows = [line.split() for line in body.decode("ascii", errors="replace").splitlines() if line.strip()][:count]
    if len(rows) < count or any(len(row) != len(properties) for row in rows):
        raise PlyError(f"{path}: expected {count} lines of {len(properties)} numbers; the file is cut off or damaged.")
    try:
        columns = np.array(rows, dtype=np.float64).reshape(count, len(properties)).T
    except ValueError as error:
        raise PlyError(f"{path}: {error}; the file is damaged.") from error
    return {name: column.astype(kind) for (name, kind), column in zip(properties, columns, strict=True)}


def _demand(path: Path, table: dict[str, Any], needed: Sequence[str], what: str) -> None:
    missing = [name for name in needed if name not in table]
    if missing:
        raise PlyError(f"{path}: no property {missing[0]!r} ({len(missing)} missing), so it holds no {what}.")


def _demand_finite(path: Path, model: Gaussians) -> None:
    for name, value in model.values().items():
        if not bool(torch.isfinite(value).all()):
            raise PlyError(f"{path}: {name} hold NaN or Inf; the file is damaged or of another kind.")
