"""Reading and checking the slices of one axial CT series; `ct.dicom_series` is the public face."""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SUFFIXES = {".dcm", ".dicom", ".ima", ""}
SPACING_TOLERANCE = 0.01  # of the median step: positions are printed with few digits, a missing slice is off by 1.0


@dataclass(frozen=True)
class Slice:
    """One axial slice: hu [H, W] float32, position and pixel spacing in mm."""

    file: Path
    hu: np.ndarray
    z_mm: float
    origin_xy_mm: tuple[float, float]
    spacing_yx_mm: tuple[float, float]
    thickness_mm: float
    series: str


def read_slices(folder: Path) -> list[Slice]:
    """All slices of the one series in `folder`, sorted by z, checked against each other."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected one with the DICOM files of a CT series")
    files = sorted(f for f in folder.iterdir() if f.is_file() and _is_candidate(f))
    if not files:
        raise FileNotFoundError(f"{folder}: no DICOM files (*.dcm, *.dicom, *.ima or without suffix)")
    slices = sorted((_read(file) for file in files), key=lambda s: s.z_mm)
    _check_one_series(folder, slices)
    _check_steps(folder, slices)
    return slices


def _is_candidate(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.name != "DICOMDIR"


def _read(file: Path) -> Slice:
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        header = pydicom.dcmread(file)
        pixels = _stored_pixels(file, header)
        values = pixels * np.float32(header.RescaleSlope) + np.float32(header.RescaleIntercept)
        x_mm, y_mm, z_mm = (float(v) for v in header.ImagePositionPatient)
        orientation = [float(v) for v in header.ImageOrientationPatient]
        row_mm, column_mm = (float(v) for v in header.PixelSpacing)
        thickness_mm = float(header.get("SliceThickness") or "nan")  # needed for a lone slice only
        series = str(header.SeriesInstanceUID)
    except InvalidDicomError as error:
        raise ValueError(
            f"{file}: not a DICOM file ({file.stat().st_size} bytes, no DICM mark at byte 128). "
            "Take it out of the folder, or get it again if the transfer broke."
        ) from error
    except (AttributeError, EOFError, struct.error, TypeError, NotImplementedError) as error:
        raise ValueError(
            f"{file}: cannot be read as a CT slice: {error}. {file.stat().st_size} bytes; expected a header with pixel "
            "data, position, spacing and rescale values. If it is truncated, get it again."
        ) from error
    # gantry tilt and other planes would make z a slanted coordinate and every length along it wrong
    if not np.allclose(orientation, [1, 0, 0, 0, 1, 0], atol=1e-3):
        raise ValueError(f"{file}: not an axial slice: ImageOrientationPatient {orientation}, expected 1,0,0,0,1,0")
    return Slice(file, values, z_mm, (x_mm, y_mm), (row_mm, column_mm), thickness_mm, series)


def _stored_pixels(file: Path, header: Any) -> np.ndarray:
    """[H, W] float32 of the stored values, after the checks that pydicom leaves to the caller."""
    if header.Modality != "CT":
        raise ValueError(f"{file}: modality {header.Modality}, expected CT")
    if header.file_meta.TransferSyntaxUID.is_compressed:
        raise ValueError(
            f"{file}: compressed ({header.file_meta.TransferSyntaxUID.name}); expected uncompressed pixel data. "
            "Decompress it first, e.g. with `dcmdjpeg` of DCMTK."
        )
    if header.SamplesPerPixel != 1 or header.PhotometricInterpretation != "MONOCHROME2":
        raise ValueError(f"{file}: {header.PhotometricInterpretation}, expected one MONOCHROME2 value a pixel")
    expected = header.Rows * header.Columns * header.BitsAllocated // 8
    got = len(header.get("PixelData", b""))
    if got < expected:
        raise ValueError(
            f"{file}: truncated: {got} bytes of pixel data, expected {expected} for {header.Rows} x {header.Columns} "
            f"at {header.BitsAllocated} bits. Get the file again."
        )
    return header.pixel_array.astype(np.float32)


def _check_one_series(folder: Path, slices: list[Slice]) -> None:
    series = Counter(s.series for s in slices)
    if len(series) > 1:
        listed = ", ".join(f"{uid} ({count} files)" for uid, count in series.most_common())
        raise ValueError(f"{folder}: {len(series)} series mixed in one folder, expected one: {listed}. Split them.")
    for name in ("shape", "spacing_yx_mm"):
        values = {s.file.name: s.hu.shape if name == "shape" else s.spacing_yx_mm for s in slices}
        usual = Counter(values.values()).most_common(1)[0][0]
        odd = [file for file, value in values.items() if value != usual]
        if odd:
            raise ValueError(f"{folder}: {odd[0]} has {name} {values[odd[0]]}, the other slices {usual}")


def _check_steps(folder: Path, slices: list[Slice]) -> None:
    if len(slices) < 2:
        return
    steps = np.diff([s.z_mm for s in slices])
    usual = float(np.median(steps))
    for step, below, above in zip(steps, slices, slices[1:], strict=False):
        pair = f"{below.file.name} (z = {below.z_mm:g} mm) and {above.file.name} (z = {above.z_mm:g} mm)"
        if step <= 0:
            raise ValueError(f"{folder}: {pair} share one position; expected one slice a position. Remove the copy.")
        if abs(step - usual) > SPACING_TOLERANCE * usual:
            raise ValueError(
                f"{folder}: {step:g} mm between {pair}, elsewhere {usual:g} mm: a slice is missing or the "
                "spacing uneven. Add the missing files, or load an evenly spaced part."
            )
