"""Files of Gaussians and points: bit-exact round trips, other people's files, damaged files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import plyfile
import pytest
import torch

from common.splatting import ply
from common.splatting.model import SH_C0, Gaussians
from common.splatting.scene import PointCloud


def some_gaussians(count: int = 50, sh_degree: int = 3, seed: int = 0) -> Gaussians:
    g = torch.Generator().manual_seed(seed)
    return Gaussians(
        torch.randn(count, 3, generator=g),
        torch.randn(count, 3, generator=g) - 2,
        torch.randn(count, 4, generator=g),
        2 * torch.randn(count, generator=g),
        torch.randn(count, 1, 3, generator=g),
        torch.randn(count, (sh_degree + 1) ** 2 - 1, 3, generator=g),
    )


def some_points(count: int = 20, *, normals: bool = False) -> PointCloud:
    g = torch.Generator().manual_seed(1)
    colors = torch.randint(0, 256, (count, 3), generator=g) / 255
    direction = torch.nn.functional.normalize(torch.randn(count, 3, generator=g), dim=1)
    return PointCloud(torch.randn(count, 3, generator=g), colors, normals=direction if normals else None)


@pytest.mark.parametrize("sh_degree", [0, 1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 50])
def test_ply_gives_back_every_bit(tmp_path: Path, count: int, sh_degree: int) -> None:
    model = some_gaussians(count, sh_degree)
    ply.export_ply(tmp_path / "a.ply", model)
    back = ply.import_ply(tmp_path / "a.ply")
    for name, value in model.values().items():
        assert torch.equal(value, back.values()[name]), name


def test_ply_is_read_by_plyfile_in_the_order_of_3dgs(tmp_path: Path) -> None:
    model = some_gaussians(7)
    ply.export_ply(tmp_path / "a.ply", model)
    vertices = plyfile.PlyData.read(tmp_path / "a.ply")["vertex"]
    names = [p.name for p in vertices.properties]
    assert names[:9] == ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2"]
    assert names[9:54] == [f"f_rest_{i}" for i in range(45)]
    assert names[54:] == ["opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]
    values = model.values()
    # channel-major: the second green coefficient is f_rest_{15 + 1}
    np.testing.assert_array_equal(vertices["f_rest_16"], values["shN"][:, 1, 1].numpy())
    np.testing.assert_array_equal(vertices["opacity"], values["opacity_logits"].numpy())
    np.testing.assert_array_equal(vertices["rot_0"], values["quats"][:, 0].numpy())
    assert not vertices["nx"].any()


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_a_ply_of_another_program_is_read(tmp_path: Path, text: bool, byte_order: str) -> None:
    """Doubles, another order, a further property, another byte order or text: as plyfile writes them."""
    model = some_gaussians(5, sh_degree=1)
    ply.export_ply(tmp_path / "a.ply", model)
    table = plyfile.PlyData.read(tmp_path / "a.ply")["vertex"].data
    names = [*reversed(table.dtype.names or ()), "segment"]
    other = np.empty(len(table), [(name, "f8" if name == "x" else "f4") for name in names[:-1]] + [("segment", "u1")])
    for name in names[:-1]:
        other[name] = table[name]
    other["segment"] = 3
    element = plyfile.PlyElement.describe(other, "vertex")
    plyfile.PlyData([element], text=text, byte_order=byte_order).write(tmp_path / "b.ply")
    back = ply.import_ply(tmp_path / "b.ply")
    for name, value in model.values().items():
        assert torch.allclose(value, back.values()[name], rtol=1e-6, atol=0), name  # text has 8 or more digits


def test_splat_has_32_bytes_each_and_bounded_errors(tmp_path: Path) -> None:
    model = some_gaussians(200, sh_degree=2)
    ply.export_splat(tmp_path / "a.splat", model)
    assert (tmp_path / "a.splat").stat().st_size == 200 * 32
    back = ply.import_splat(tmp_path / "a.splat")

    splats = model.splats(0)
    contribution = splats.scales.prod(dim=1) * splats.opacities
    order = contribution.argsort(descending=True)
    ours, theirs = [x.detach()[order] for x in splats], [x.detach() for x in back.splats()]
    assert torch.equal(ours[0], theirs[0])  # float32 positions
    assert torch.allclose(ours[2], theirs[2], rtol=1e-6)  # float32 scales, through a logarithm
    assert (ours[3] - theirs[3]).abs().max() <= 0.5 / 255 + 1e-6  # half a step of 8 bits
    colors, found = [(0.5 + SH_C0 * x[:, 0]).clamp(0, 1) for x in (ours[4], theirs[4])]
    assert (colors - found).abs().max() <= 0.5 / 255 + 1e-6
    # half a step of 1/128 a component, a whole one where +1 does not fit; quaternions q and -q are kept apart
    q, r = (torch.nn.functional.normalize(x, dim=1) for x in (ours[1], theirs[1]))
    assert (q - r).abs().max() < 1.5 / 128


def test_splat_keeps_the_largest_contributions() -> None:
    model = some_gaussians(50)
    content = ply.splat_bytes(model, most=10)
    assert len(content) == 10 * ply.SPLAT_BYTES
    assert ply.splat_bytes(model)[: len(content)] == content
    splats = model.splats()
    first = int((splats.scales.prod(dim=1) * splats.opacities).argmax())
    np.testing.assert_array_equal(np.frombuffer(content[:12], "<f4"), model.means[first].detach().numpy())


@pytest.mark.parametrize("normals", [True, False])
def test_points_round_trip_and_plyfile_agrees(tmp_path: Path, normals: bool) -> None:
    cloud = some_points(normals=normals)
    ply.export_points(tmp_path / "p.ply", cloud)
    back = ply.import_points(tmp_path / "p.ply")
    assert torch.equal(cloud.positions, back.positions)
    assert torch.equal(cloud.colors, back.colors)  # they were multiples of 1/255
    assert (back.normals is not None) == normals
    if cloud.normals is not None and back.normals is not None:
        assert torch.equal(cloud.normals, back.normals)
    vertices = plyfile.PlyData.read(tmp_path / "p.ply")["vertex"]
    np.testing.assert_array_equal(vertices["red"], (cloud.colors[:, 0] * 255).round().to(torch.uint8).numpy())


def test_points_of_colmap_and_without_colours(tmp_path: Path) -> None:
    table = np.array([(1.0, 2.0, 3.0), (4.0, 5.0, 6.0)], dtype=[(name, "f8") for name in "xyz"])
    faces = np.array([([0, 1, 0],)], dtype=[("vertex_indices", "i4", (3,))])
    elements = [plyfile.PlyElement.describe(table, "vertex"), plyfile.PlyElement.describe(faces, "face")]
    plyfile.PlyData(elements).write(tmp_path / "mesh.ply")
    cloud = ply.import_points(tmp_path / "mesh.ply")
    assert torch.equal(cloud.positions, torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    assert bool((cloud.colors == 0.5).all())


def test_every_cut_of_a_file_is_an_error_of_one_line(tmp_path: Path) -> None:
    ply.export_ply(tmp_path / "a.ply", some_gaussians(3, sh_degree=0))
    content = (tmp_path / "a.ply").read_bytes()
    cut = tmp_path / "cut.ply"
    for length in [0, 2, 10, 100, content.index(b"end_header"), len(content) - 12 * 3, len(content) - 1]:
        cut.write_bytes(content[:length])
        with pytest.raises(ply.PlyError, match=r"cut\.ply") as caught:
            ply.import_ply(cut)
        assert "\n" not in str(caught.value)
    splat = tmp_path / "cut.splat"
    splat.write_bytes(ply.splat_bytes(some_gaussians(3))[:-5])
    with pytest.raises(ply.PlyError, match="multiple of 32"):
        ply.import_splat(splat)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"ply\n", b"plx\n", "no PLY file"),
        (b"element vertex 3", b"element vertex x", "first element is 'vertex x'"),
        (b"element vertex 3", b"element face 3", "first element is 'face 3'"),
        (b"binary_little_endian", b"binary_middle_endian", "no known format"),
        (b"property float opacity", b"property float opacita", "no property 'opacity'"),
        (b"property float opacity", b"property list uchar int opacity", "cannot read"),
        (b"property float nx", b"property float ny", "one twice"),
        (b"property float f_dc_0", b"property float f_rest_0", "1 properties f_rest"),
    ],
)
def test_a_wrong_header_is_named(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    ply.export_ply(tmp_path / "a.ply", some_gaussians(3, sh_degree=0))
    content = (tmp_path / "a.ply").read_bytes()
    assert old in content
    (tmp_path / "b.ply").write_bytes(content.replace(old, new, 1))
    with pytest.raises(ply.PlyError, match=message):
        ply.import_ply(tmp_path / "b.ply")


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = some_gaussians(3)
    model.means.data[1, 2] = torch.nan
    ply.export_ply(tmp_path / "a.ply", model)
    with pytest.raises(ply.PlyError, match="means hold NaN"):
        ply.import_ply(tmp_path / "a.ply")
    model = some_gaussians(3)
    model.log_scales.data[0, 0] = -torch.inf  # a scale of zero
    ply.export_splat(tmp_path / "a.splat", model)
    with pytest.raises(ply.PlyError, match="log_scales hold NaN or Inf"):
        ply.import_splat(tmp_path / "a.splat")


def test_points_given_as_gaussians_say_what_to_use(tmp_path: Path) -> None:
    ply.export_points(tmp_path / "p.ply", some_points())
    with pytest.raises(ply.PlyError, match="import_points"):
        ply.import_ply(tmp_path / "p.ply")
