"""CT loaders on the real sets, and on files broken in every way a transfer or a scanner breaks them."""

import math
import shutil

import h5py
import numpy as np
import pydicom
import pytest
import torch

from common.data import ct


@pytest.fixture
def series(tmp_path):
    """Eight written slices of 32 x 24, 5 mm apart, to be damaged; file names are not in slice order."""
    random = np.random.default_rng(0)
    for index in range(8):
        name = f"I{10 * index + 90}.dcm"
        header = pydicom.dataset.FileMetaDataset()
        header.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        header.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
        header.MediaStorageSOPInstanceUID = f"1.2.826.{index + 1}"
        slice_ = pydicom.Dataset()
        slice_.file_meta = header
        slice_.SOPClassUID, slice_.SOPInstanceUID = header.MediaStorageSOPClassUID, header.MediaStorageSOPInstanceUID
        slice_.Modality, slice_.SeriesInstanceUID = "CT", "1.2.826.99"
        slice_.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        slice_.ImagePositionPatient = [-12, -16, 700 + 5 * index]
        slice_.PixelSpacing, slice_.SliceThickness = [0.5, 0.75], 5
        slice_.Rows, slice_.Columns, slice_.SamplesPerPixel = 32, 24, 1
        slice_.PhotometricInterpretation = "MONOCHROME2"
        slice_.BitsAllocated = slice_.BitsStored = 16
        slice_.HighBit, slice_.PixelRepresentation = 15, 0
        slice_.RescaleSlope, slice_.RescaleIntercept = 1, -1024
        slice_.PixelData = random.integers(0, 2000, (32, 24), dtype="<u2").tobytes()
        slice_.save_as(tmp_path / name, enforce_file_format=True)
    return tmp_path


def edit(path, **values):
    slice_ = pydicom.dcmread(path)
    for key, value in values.items():
        setattr(slice_, key, value)
    slice_.save_as(path)


def test_the_whole_philips_series(real_data):
    volume = ct.dicom_series(real_data("ct_phantom_head_philips") / "dicom_5mm")
    assert volume.hu.shape == (28, 512, 512) and volume.hu.dtype == torch.float32
    assert (volume.hu.min(), volume.hu.max()) == (-1024, 782)
    assert volume.spacing_zyx_mm == (5.0, 0.451171875, 0.451171875)
    assert torch.allclose(torch.diff(volume.z_mm), torch.tensor(5.0, dtype=torch.float64))
    assert volume.z_mm[0] == pytest.approx(696.21)


def test_dicom_and_npz_show_the_same_phantom(real_data):
    """Two reconstructions of one scan: the 5 mm slices agree with means of five 1 mm slices at the same z."""
    folder = real_data("ct_phantom_head_philips")
    thick, thin = ct.dicom_series(folder / "dicom_5mm"), ct.npz_volume(folder / "bone_1mm_256.npz")
    coarse = torch.nn.functional.avg_pool2d(thick.hu, 2)

    def difference(shift):
        errors = []
        for index in (8, 12, 16):
            near = (thin.z_mm - thick.z_mm[index] - shift).abs() <= 2.5
            errors.append((thin.hu[near].mean(0) - coarse[index]).abs().mean())
        return sum(errors) / 3

    assert difference(0.0) < 40
    assert difference(0.0) < 0.7 * min(difference(15.0), difference(-15.0))  # sorted and scaled alike


def test_slices_are_sorted_by_position_not_by_name(series):
    volume = ct.dicom_series(series)
    assert volume.hu.shape == (8, 32, 24) and volume.spacing_zyx_mm == (5.0, 0.5, 0.75)
    assert volume.z_mm.tolist() == [700 + 5 * index for index in range(8)] and volume.origin_xy_mm == (-12, -16)
    first = pydicom.dcmread(series / "I90.dcm")  # "I90" sorts behind "I160" by name
    assert torch.equal(volume.hu[0], torch.from_numpy(first.pixel_array.astype(np.float32) - 1024))


def test_each_slice_has_its_own_rescale(series):
    plain = ct.dicom_series(series).hu
    edit(series / "I90.dcm", RescaleSlope=2, RescaleIntercept=-24)
    changed = ct.dicom_series(series).hu
    torch.testing.assert_close(changed[0], 2 * (plain[0] + 1024) - 24)
    assert torch.equal(changed[1:], plain[1:])


def test_a_lone_slice(real_data):
    volume = ct.dicom_series(real_data("ct_dicom_small"))
    assert volume.hu.shape == (1, 128, 128)
    assert volume.spacing_zyx_mm == (5.0, 0.661468, 0.661468)
    assert (volume.hu.min(), volume.hu.max()) == (-896, 1167)


@pytest.mark.parametrize("keep", [0.7, 0.999])
def test_truncated_slice(series, keep):
    path = series / "I120.dcm"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    got = 1536 - (len(whole) - int(keep * len(whole)))
    with pytest.raises(ValueError, match=rf"I120\.dcm: truncated: {got} bytes of pixel data, expected 1536"):
        ct.dicom_series(series)


def test_truncated_in_the_header(series):
    path = series / "I120.dcm"
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(ValueError, match=r"I120\.dcm: cannot be read as a CT slice"):
        ct.dicom_series(series)


@pytest.mark.parametrize("content", [b"", b"hello", b"\0" * 400])
def test_not_dicom(series, content):
    (series / "other.dcm").write_bytes(content)
    with pytest.raises(ValueError, match=rf"other\.dcm: not a DICOM file \({len(content)} bytes"):
        ct.dicom_series(series)


def test_other_files_are_left_alone(series):
    (series / "SOURCE.md").write_text("words")
    (series / ".hidden").write_text("words")
    assert ct.dicom_series(series).hu.shape[0] == 8


def test_missing_slice(series):
    (series / "I120.dcm").unlink()
    with pytest.raises(ValueError, match=r"10 mm between I110\.dcm .*I130\.dcm .*elsewhere 5 mm"):
        ct.dicom_series(series)


def test_uneven_spacing(series):
    last = pydicom.dcmread(series / "I160.dcm").ImagePositionPatient
    edit(series / "I160.dcm", ImagePositionPatient=[last[0], last[1], last[2] + 0.2])
    with pytest.raises(ValueError, match=r"5\.2 mm between"):
        ct.dicom_series(series)


def test_a_slice_twice(series):
    shutil.copy(series / "I120.dcm", series / "again.dcm")
    with pytest.raises(ValueError, match=r"(?=.*again\.dcm)(?=.*I120\.dcm).*share one position"):
        ct.dicom_series(series)


def test_mixed_series(series):
    edit(series / "I120.dcm", SeriesInstanceUID="1.2.3")
    with pytest.raises(ValueError, match=r"2 series mixed.*\(7 files\), 1\.2\.3 \(1 files\)"):
        ct.dicom_series(series)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"PixelSpacing": [0.5, 0.5]}, r"I120\.dcm has spacing_yx_mm"),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}, r"I120\.dcm: not an axial slice"),
        ({"Modality": "MR"}, r"I120\.dcm: modality MR"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, r"I120\.dcm: MONOCHROME1"),
    ],
)
def test_slices_that_do_not_belong(series, change, message):
    edit(series / "I120.dcm", **change)
    with pytest.raises(ValueError, match=message):
        ct.dicom_series(series)


def test_another_image_size(series):
    path = series / "I120.dcm"
    slice_ = pydicom.dcmread(path)
    slice_.PixelData, slice_.Rows = slice_.PixelData[: 31 * 24 * 2], 31
    slice_.save_as(path)
    with pytest.raises(ValueError, match=r"I120\.dcm has shape \(31, 24\)"):
        ct.dicom_series(series)


def test_no_rescale_values(series):
    slice_ = pydicom.dcmread(series / "I120.dcm")
    del slice_.RescaleIntercept
    slice_.save_as(series / "I120.dcm")
    with pytest.raises(ValueError, match=r"I120\.dcm: cannot be read.*RescaleIntercept"):
        ct.dicom_series(series)


def test_compressed_slice_is_named(series):
    slice_ = pydicom.dcmread(series / "I120.dcm")
    slice_.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    slice_.save_as(series / "I120.dcm")
    with pytest.raises(ValueError, match=r"I120\.dcm: compressed \(RLE Lossless\)"):
        ct.dicom_series(series)


def test_no_folder_and_no_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        ct.dicom_series(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="no DICOM files"):
        ct.dicom_series(tmp_path)


def save_npz(path, **changes):
    arrays = {"hu": np.zeros((3, 4, 5), "i2"), "spacing_zyx_mm": np.array([2.0, 1.0, 1.5]), "z_mm": np.arange(3) * 2.0}
    np.savez(path, **{key: value for key, value in (arrays | changes).items() if value is not None})
    return path


def test_npz_volume(tmp_path, real_data):
    volume = ct.npz_volume(save_npz(tmp_path / "v.npz", hu=np.arange(60, dtype="i2").reshape(3, 4, 5)))
    assert torch.equal(volume.hu, torch.arange(60.0).reshape(3, 4, 5))
    assert volume.spacing_zyx_mm == (2.0, 1.0, 1.5)
    real = ct.npz_volume(real_data("ct_phantom_head_philips") / "bone_1mm_256.npz")
    assert real.hu.shape == (140, 256, 256) and (real.hu.min(), real.hu.max()) == (-1024, 2319)
    # the dossier's trap: air-like filling inside the shell, about -677 HU in the middle of slice 70
    assert real.hu[70, 110:146, 110:146].mean() == pytest.approx(-677, abs=1)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hu": None}, "'hu'.* missing"),
        ({"hu": np.zeros((3, 4))}, r"float32 \[Z, H, W\]"),
        ({"z_mm": np.array([0.0, 1.0])}, "3 slices but 2 positions"),
        ({"z_mm": np.array([0.0, 2.0, 1.0])}, "must rise"),
        ({"spacing_zyx_mm": np.array([1.0, 1.0])}, "three lengths"),
        ({"spacing_zyx_mm": np.array([1.0, 0.0, 1.0])}, "spacing must be positive"),
        ({"hu": np.array([{}], dtype=object)}, "not a readable npz"),
    ],
)
def test_wrong_npz(tmp_path, changes, message):
    path = save_npz(tmp_path / "v.npz", **changes)
    with pytest.raises(ValueError, match=message):
        ct.npz_volume(path)


def test_truncated_npz(tmp_path):
    path = save_npz(tmp_path / "v.npz")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"v\.npz: not a readable npz"):
        ct.npz_volume(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"v\.npz: not a readable npz archive .*; 0 bytes"):
        ct.npz_volume(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        ct.npz_volume(tmp_path / "absent.npz")


def save_mha(path, **changes):
    header = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "False",
        "Offset": "1 2 3",
        "ElementSpacing": "0.5 0.6 2",
        "DimSize": "4 3 2",
        "ElementType": "MET_SHORT",
        "ElementDataFile": "LOCAL",
    }
    values = np.arange(24, dtype=">i2" if changes.get("BinaryDataByteOrderMSB") == "True" else "<i2")
    lines = "".join(f"{key} = {value}\n" for key, value in (header | changes).items())
    path.write_bytes(lines.encode() + values.tobytes())
    return path


@pytest.mark.parametrize("big_endian", ["True", "False"])
def test_metaimage(tmp_path, big_endian):
    volume = ct.metaimage(save_mha(tmp_path / "v.mha", BinaryDataByteOrderMSB=big_endian), hu_offset=-10.0)
    assert torch.equal(volume.hu, torch.arange(24.0).reshape(2, 3, 4) - 10)  # x runs fastest
    assert volume.spacing_zyx_mm == (2.0, 0.6, 0.5)
    assert volume.z_mm.tolist() == [3.0, 5.0] and volume.origin_xy_mm == (1.0, 2.0)


def test_metaimage_of_the_head(real_data):
    volume = ct.metaimage(real_data("ct_volume_head_vtk") / "head.mha", hu_offset=-1024)
    assert volume.hu.shape == (93, 64, 64)
    assert volume.spacing_zyx_mm == pytest.approx((1.5, 3.2, 3.2))
    assert volume.hu[:, 0].median() < -900  # air outside
    inside = volume.hu[40, 20:44, 20:44]
    assert -100 < inside.median() < 200  # soft tissue, so the offset is right


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"DimSize": "4 3 5"}, "48 bytes of image data, expected 120"),
        ({"DimSize": "4 3"}, "three numbers"),
        ({"ElementType": "MET_LONG_LONG"}, "MET_LONG_LONG.*MET_SHORT"),
        ({"CompressedData": "True"}, "compressed"),
        ({"ElementDataFile": "head.raw"}, r"another file \(head\.raw\)"),
    ],
)
def test_wrong_metaimage(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        ct.metaimage(save_mha(tmp_path / "v.mha", **changes), hu_offset=0)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no header\n\n", b"NDims = 3\nDimSize"])
def test_not_a_metaimage(tmp_path, content):
    (tmp_path / "v.mha").write_bytes(content)
    with pytest.raises(ValueError, match="not a MetaImage header"):
        ct.metaimage(tmp_path / "v.mha", hu_offset=0)


def test_tooth(real_data):
    raw = ct.tooth(real_data("ct_sinogram_tooth") / "tooth.h5")
    assert raw.counts.shape == (181, 2, 640) and raw.white.shape == raw.dark.shape == (10, 2, 640)
    assert raw.theta_rad[0] == 0 and raw.theta_rad[-1].item() == pytest.approx(
        math.radians(179.0), abs=2e-4
    )  # the stage's reading, 179.006 degrees
    integrals = raw.line_integrals()
    assert integrals.shape == (181, 2, 640) and integrals.dtype == torch.float32 and torch.isfinite(integrals).all()
    assert integrals.min().item() == pytest.approx(-0.09, abs=0.02)
    assert integrals.max().item() == pytest.approx(1.95, abs=0.02)
    assert raw.axis_cells == -23.5


def test_the_rotation_centre_of_the_tooth(real_data):
    """The first view, mirrored at the centre, is the last one (179 degrees on) nearly: best at cell 296."""
    raw = ct.tooth(real_data("ct_sinogram_tooth") / "tooth.h5")
    integrals = raw.line_integrals()
    first, last = integrals[0, 0].double().numpy(), integrals[-1, 0].double().numpy()
    cells = np.arange(640.0)

    def mismatch(centre):
        mirrored = np.interp(2 * centre - cells, cells, first, left=np.nan, right=np.nan)
        return np.nanmean((mirrored - last) ** 2)

    centres = np.arange(280, 340, 0.5)
    best = centres[np.argmin([mismatch(c) for c in centres])]
    assert best == pytest.approx(raw.centre_cell, abs=2.0)


def projections(counts, white=1000.0, dark=100.0):
    counts = torch.as_tensor(counts, dtype=torch.float32).reshape(1, 1, -1)
    field = torch.ones(2, 1, counts.shape[-1])
    return ct.RawProjections(counts, white * field, dark * field, torch.zeros(1), 0.0, "made up")


def test_line_integrals_by_hand():
    values = projections([1000, 100 + 900 / math.e, 550, 1090]).line_integrals().flatten()
    torch.testing.assert_close(values, torch.tensor([0.0, 1.0, math.log(2), -math.log(1.1)]))


def test_starved_cells_are_clipped_and_dead_cells_refused():
    values = projections([100, 50, 1000]).line_integrals(min_transmission=1e-3).flatten()
    torch.testing.assert_close(values, torch.tensor([math.log(1000), math.log(1000), 0.0]), atol=1e-6, rtol=0)
    raw = projections([500, 500, 500])
    raw.white[:, 0, 1] = 100.0
    with pytest.raises(ValueError, match=r"1 detector cells have no beam.*\[0, 1\]"):
        raw.line_integrals()
    raw.white[:, 0, 1] = math.nan
    with pytest.raises(ValueError, match="no beam"):
        raw.line_integrals()
    for wrong in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="min_transmission"):
            projections([500]).line_integrals(min_transmission=wrong)


def test_broken_tooth_files(tmp_path):
    path = tmp_path / "t.h5"
    with h5py.File(path, "w") as file:
        file["exchange/data"] = np.ones((3, 2, 4))
    with pytest.raises(ValueError, match="exchange/data_white"):
        ct.tooth(path)
    with h5py.File(path, "a") as file:
        file["exchange/data_white"] = np.ones((1, 2, 4))
        file["exchange/data_dark"] = np.ones((1, 2, 5))
        file["exchange/theta"] = np.zeros(3)
    with pytest.raises(ValueError, match="do not fit together"):
        ct.tooth(path)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(ValueError, match=r"t\.h5: not a readable HDF5 file"):
        ct.tooth(path)
