"""Loaders for computed tomography: DICOM series, npz and MetaImage volumes, raw synchrotron projections.

Every loader checks what it reads and names the file at fault; none repairs data silently. Volumes come in Hounsfield
units (HU), `hu = 1000 (mu / mu_water - 1)`; axes are [Z, H, W] with z rising, rows running down, columns to the right.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.data._dicom import read_slices

__all__ = ["CTVolume", "RawProjections", "dicom_series", "metaimage", "npz_volume", "tooth"]

TOOTH_CENTRE_CELL = 296.0  # where the rotation axis falls on the detector of the tooth scan: SOURCE.md, found by FBP


@dataclass(frozen=True)
class CTVolume:
    """A CT volume in Hounsfield units with its grid.

    hu            [Z, H, W] float32
    spacing_zyx_mm  distance between voxel centres along z, rows and columns
    z_mm          [Z] float64, strictly rising positions of the slices
    origin_xy_mm  centre of the first pixel of a slice, patient coordinates ((0, 0) where the file does not say)
    source        the file or folder it was read from
    """

    hu: Tensor
    spacing_zyx_mm: tuple[float, float, float]
    z_mm: Tensor
    origin_xy_mm: tuple[float, float]
    source: Path

    def __post_init__(self) -> None:
        if self.hu.ndim != 3 or self.hu.dtype != torch.float32:
            raise ValueError(
                f"{self.source}: a volume is float32 [Z, H, W]; got {self.hu.dtype} {tuple(self.hu.shape)}"
            )
        if self.z_mm.shape != self.hu.shape[:1]:
            raise ValueError(f"{self.source}: {self.hu.shape[0]} slices but {self.z_mm.numel()} positions in z_mm")
        if not (torch.diff(self.z_mm) > 0).all():
            raise ValueError(f"{self.source}: z_mm must rise from slice to slice; sort the slices by position")
        if not all(np.isfinite(s) and s > 0 for s in self.spacing_zyx_mm):
            raise ValueError(f"{self.source}: spacing must be positive, in mm; got {self.spacing_zyx_mm}")


@dataclass(frozen=True)
class RawProjections:
    """Raw parallel-beam counts with their white (beam, no object) and dark (no beam) fields.

    counts [V, R, K], white [Nw, R, K], dark [Nd, R, K]: float32 detector counts for V views, R rows, K cells
    theta_rad [V] float64: view angles
    centre_cell: detector cell (0-based, fractional) on which the rotation axis falls
    """

    counts: Tensor
    white: Tensor
    dark: Tensor
    theta_rad: Tensor
    centre_cell: float
    source: Path

    @property
    def axis_cells(self) -> float:
        """Distance from the middle of the detector to the rotation axis, in cells: `axis / pitch` of kernels.ct."""
        return self.centre_cell - (self.counts.shape[-1] - 1) / 2

    def line_integrals(self, *, min_transmission: float = 1e-4) -> Tensor:
        """-log((counts - dark) / (white - dark)) with the mean fields: [V, R, K] float32, no unit.

        Transmissions below `min_transmission` (0 < m < 1) are raised to it, so that a starved or noisy cell gives a
        large but finite integral. Slightly negative integrals (beam drift) are kept: clipping them would bias air.

        Raises ValueError where a cell's white field does not exceed its dark field: it carries no signal.
        """
        if not 0 < min_transmission < 1:
            raise ValueError(
                f"min_transmission is a fraction of the open beam, between 0 and 1; got {min_transmission}"
            )
        dark = self.dark.double().mean(dim=0)
        beam = self.white.double().mean(dim=0) - dark
        dead = torch.nonzero(~(beam > 0))
        if len(dead):
            raise ValueError(
                f"{self.source}: {len(dead)} detector cells have no beam (mean white <= mean dark), the first at "
                f"[row, cell] = {dead[0].tolist()}; expected white > dark everywhere. Leave these cells "
                "out or mend them."
            )
        transmission = (self.counts.double() - dark) / beam
        return -torch.log(transmission.clamp_min(min_transmission)).float()


def dicom_series(folder: str | Path) -> CTVolume:
    """One axial CT series from the DICOM files of `folder`, sorted by position, in HU.

    Reads `*.dcm`, `*.dicom`, `*.ima` and files without a suffix (subfolders and other suffixes are left alone). The
    stored values become HU by each slice's own RescaleSlope and RescaleIntercept.

    Raises FileNotFoundError without such files; ValueError, naming the file, where one is not DICOM, not CT,
    truncated, compressed, without rescale values or not axial; and where the files are several series, differ in
    size or pixel spacing, share a position or leave a gap.
    """
    folder = Path(folder)
    slices = read_slices(folder)
    first = slices[0]
    z_mm = torch.tensor([s.z_mm for s in slices], dtype=torch.float64)
    step_mm = float(torch.diff(z_mm).median()) if len(slices) > 1 else first.thickness_mm
    hu = torch.stack([torch.from_numpy(s.hu) for s in slices])
    return CTVolume(hu, (step_mm, *first.spacing_yx_mm), z_mm, first.origin_xy_mm, folder)


def npz_volume(path: str | Path) -> CTVolume:
    """A volume from an npz file with `hu` [Z, H, W], `spacing_zyx_mm` (3,) and `z_mm` (Z,).

    Raises FileNotFoundError, and ValueError where the archive is broken or an array is missing or of wrong shape.
    """
    path = _existing(path)
    try:
        # our own handle: numpy leaves its one open where the archive is broken
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        raise ValueError(
            f"{path}: not a readable npz archive ({error}); {path.stat().st_size} bytes. Get the file again."
        ) from error
    missing = {"hu", "spacing_zyx_mm", "z_mm"} - arrays.keys()
    if missing:
        raise ValueError(f"{path}: arrays {sorted(missing)} are missing; it has {sorted(arrays)}")
    spacing = np.asarray(arrays["spacing_zyx_mm"], dtype=np.float64)
    if spacing.shape != (3,):
        raise ValueError(f"{path}: spacing_zyx_mm holds three lengths in mm; got shape {spacing.shape}")
    hu = torch.from_numpy(arrays["hu"].astype(np.float32))
    z_mm = torch.from_numpy(arrays["z_mm"].astype(np.float64))
    z_spacing, y_spacing, x_spacing = map(float, spacing)
    return CTVolume(hu, (z_spacing, y_spacing, x_spacing), z_mm, (0.0, 0.0), path)


def metaimage(path: str | Path, *, hu_offset: float) -> CTVolume:
    """A 3-D MetaImage (`.mha`, header and raw data in one file).

    MetaImage has no rescale values, so the caller says what to add to reach HU: `hu_offset=-1024` for `head.mha`,
    whose values are offset CT numbers (roughly HU + 1024).

    Raises FileNotFoundError, and ValueError for compressed, non-3-D, truncated files or an unknown element type.
    """
    path = _existing(path)
    raw = path.read_bytes()
    header, start = _metaimage_header(path, raw)
    dtype = _METAIMAGE_TYPES.get(header.get("ElementType", ""))
    if dtype is None:
        raise ValueError(f"{path}: ElementType {header.get('ElementType')!r}; known are {', '.join(_METAIMAGE_TYPES)}")
    if header.get("CompressedData", "False").lower() == "true":
        raise ValueError(f"{path}: compressed data is not supported; write it again uncompressed")
    size = [int(n) for n in header.get("DimSize", "").split()]
    spacing = [float(s) for s in header.get("ElementSpacing", "").split()]
    if len(size) != 3 or len(spacing) != 3:
        raise ValueError(f"{path}: expected three numbers in DimSize and ElementSpacing; got {size} and {spacing}")
    order = ">" if header.get("BinaryDataByteOrderMSB", "False").lower() == "true" else "<"
    expected = int(np.prod(size)) * np.dtype(dtype).itemsize
    if len(raw) - start != expected:
        raise ValueError(
            f"{path}: {len(raw) - start} bytes of image data, expected {expected} for {size[0]} x {size[1]} x "
            f"{size[2]} {dtype}: the file is truncated or its header wrong. Get it again."
        )
    values = np.frombuffer(raw, dtype=np.dtype(dtype).newbyteorder(order), offset=start).reshape(size[::-1])
    offset = [float(o) for o in header.get("Offset", "0 0 0").split()]
    z_mm = offset[2] + spacing[2] * torch.arange(size[2], dtype=torch.float64)
    hu = torch.from_numpy(values.astype(np.float32) + np.float32(hu_offset))
    return CTVolume(hu, (spacing[2], spacing[1], spacing[0]), z_mm, (offset[0], offset[1]), path)


def tooth(path: str | Path) -> RawProjections:
    """The tooth scan (`tooth.h5`, HDF5 Data Exchange): 181 views, 2 rows, 640 cells, parallel beam.

    Lengths are in detector cells: the file does not give the cell pitch.
    Raises FileNotFoundError, and ValueError where the file is broken or a data set is missing or of wrong shape.
    """
    import h5py

    path = _existing(path)
    names = {"counts": "exchange/data", "white": "exchange/data_white", "dark": "exchange/data_dark"}
    try:
        with h5py.File(path, "r") as file:
            missing = [name for name in (*names.values(), "exchange/theta") if name not in file]
            if missing:
                raise ValueError(
                    f"{path}: data sets {missing} are missing; expected a Data Exchange file like tooth.h5"
                )
            fields: dict[str, Any] = {key: torch.from_numpy(_h5(file, name, "f4")) for key, name in names.items()}
            theta_rad = torch.from_numpy(np.deg2rad(_h5(file, "exchange/theta", "f8")))
    except OSError as error:
        raise ValueError(
            f"{path}: not a readable HDF5 file ({error}); {path.stat().st_size} bytes. Get the file again."
        ) from error
    views, *detector = fields["counts"].shape
    if theta_rad.shape != (views,) or any(list(field.shape[1:]) != detector for field in fields.values()):
        shapes = {key: tuple(field.shape) for key, field in fields.items()}
        raise ValueError(f"{path}: shapes do not fit together: {shapes}, theta {tuple(theta_rad.shape)}")
    return RawProjections(**fields, theta_rad=theta_rad, centre_cell=TOOTH_CENTRE_CELL, source=path)


_METAIMAGE_TYPES = {
    "MET_UCHAR": "u1",
    "MET_CHAR": "i1",
    "MET_USHORT": "u2",
    "MET_SHORT": "i2",
    "MET_UINT": "u4",
    "MET_INT": "i4",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}


def _metaimage_header(path: Path, raw: bytes) -> tuple[dict[str, str], int]:
    """The `key = value` lines up to `ElementDataFile = LOCAL`, and where the data starts."""
    header: dict[str, str] = {}
    start = 0
    while "ElementDataFile" not in header:
        end = raw.find(b"\n", start)
        key, equals, value = raw[start : max(end, start)].decode("ascii", "replace").partition("=")
        if end < 0 or not equals:
            raise ValueError(f"{path}: not a MetaImage header: no `key = value` at byte {start}")
        header[key.strip()] = value.strip()
        start = end + 1
    if header["ElementDataFile"] != "LOCAL":
        raise ValueError(
            f"{path}: data in another file ({header['ElementDataFile']}); expected ElementDataFile = LOCAL"
        )
    return header, start


def _h5(file: Any, name: str, dtype: str) -> np.ndarray:
    return np.asarray(file[name][()], dtype=dtype)


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file. common.data.path(NAME) gives the folder of a registered data set."
        )
    return path
