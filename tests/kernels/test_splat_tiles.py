"""How kernels.splat.rasterize draws: order, ends, ties, broken items, absgrad, tiles, the same bits again."""

from __future__ import annotations

from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import splat_oracle
import torch
from splat_compare import ISAS, assert_as_good, random, rasterizers, run, weights_of, worst_row
from torch import Tensor

from kernels import splat
from kernels.splat import reference

F32, F64 = torch.float32, torch.float64
seeds = st.integers(0, 2**16)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("KERNELS_ISA", request.param)
    return request.param


@pytest.mark.parametrize("same_depth", [False, True])
def test_a_pixel_ends_where_it_must_and_ties_keep_their_order(same_depth: bool, isa: str) -> None:
    # T falls below 1e-4 after 25 Gaussians of opacity 0.3; those behind have no gradient
    count, drawn = 100, 25
    order = torch.randperm(count, generator=splat_oracle.generator(0))
    items = {
        "means2d": torch.full((count, 2), 20.0, dtype=F64),
        "conics": torch.tensor([[1e-9, 0.0, 1e-9]], dtype=F64).repeat(count, 1),
        "colors": torch.rand(count, 2, generator=splat_oracle.generator(1)).double(),
        "opacities": torch.full((count,), 0.3, dtype=F64),
        "radii": torch.full((count, 2), 300, dtype=torch.int32),
        "depths": torch.full((count,), 2.0, dtype=F64) if same_depth else 1 + order.double(),
        "first": torch.tensor([0, count]),
        "backgrounds": None,
    }
    rank = torch.arange(count) if same_depth else order
    weights = [torch.ones(1, 40, 40, 2, dtype=F64), torch.ones(1, 40, 40, 1, dtype=F64)]
    # all depths become inputs here, and have no gradient
    found = run(lambda **kw: splat.rasterize(**kw, width=40, height=40)[:2], items, F32, weights)
    exact = run(lambda **kw: reference.rasterize(**kw, width=40, height=40), items, F64, weights)
    assert_as_good(found, found, exact)
    assert not found["d colors"][rank >= drawn].any() and not found["d opacities"][rank >= drawn].any()
    assert found["d colors"][rank < drawn].all() and not found["d depths"].any()
    torch.testing.assert_close(found["output 1"], torch.full((1, 40, 40, 1), 1 - 0.7**drawn), rtol=0, atol=1e-6)


def test_broken_items_are_not_drawn(isa: str) -> None:
    scene = splat_oracle.scene(11, 40)
    items = splat_oracle.items(scene.to(F32), random(40, 3).float())
    seen = (items["radii"] > 0).all(-1).nonzero()[:, 0]
    faults = [
        ("means2d", torch.nan),
        ("means2d", torch.inf),
        ("conics", torch.nan),
        ("conics", -1.0),
        ("conics", torch.inf),
        ("opacities", torch.nan),
        ("opacities", torch.inf),
        ("depths", torch.nan),
    ]
    assert len(seen) > len(faults)
    without = items | {"radii": items["radii"].clone()}
    without["radii"][seen[: len(faults)]] = 0
    size = {"backgrounds": None, "width": scene.width, "height": scene.height}
    expected, *_ = splat.rasterize(**without, **size)
    for i, (name, value) in zip(seen, faults, strict=False):
        items[name] = items[name].clone()
        items[name][i] = value
    leaves = {name: items[name].requires_grad_() for name in ("means2d", "conics", "colors", "opacities")}
    found, *_ = splat.rasterize(**items, **size)
    assert torch.equal(found, expected)
    found.square().sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad.any(), name
        assert not leaf.grad[seen[: len(faults)]].any(), name


@pytest.mark.parametrize("channels", [1, 9])
def test_absgrad_sums_the_magnitude_over_pixels(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = splat_oracle.scene(21, 30, 2, 19, 5)
    inputs, _, plain, smooth = rasterizers(scene, random(30, channels), None, False)
    items = splat_oracle.items(scene, random(30, channels))
    weights = weights_of(smooth, channels, 5)
    exact = torch.zeros(60, 2, dtype=F64)
    leaves = {name: None if value is None else value.detach().requires_grad_() for name, value in inputs.items()}
    image, alphas = plain(**leaves)
    light = (image * weights[0]).sum(-1) + (alphas * weights[1]).sum(-1)
    for pixel in light[smooth]:
        (gradient,) = torch.autograd.grad(pixel, leaves["means2d"], retain_graph=True)
        exact += gradient.abs()
    rest = {name: items[name] for name in ("radii", "first")} | {"depths": items["depths"].float()}
    for isa in ISAS:
        monkeypatch.setenv("KERNELS_ISA", isa)
        leaves = {name: value.detach().float().requires_grad_() for name, value in inputs.items() if value is not None}
        image, alphas, _ = splat.rasterize(**leaves, **rest, backgrounds=None, width=19, height=5, absgrad=True)
        ((image * weights[0].float()).sum() + (alphas * weights[1].float()).sum()).backward()
        found, gradient = leaves["means2d"].absgrad, leaves["means2d"].grad
        assert worst_row(found, exact) < 2e-4, isa
        assert (
            gradient is not None
            and (found >= gradient.abs() * (1 - 1e-4) - 1e-6).all()
            and (found > 2 * gradient.abs()).any()
        )


@hypothesis.given(
    seed=seeds,
    count=st.integers(0, 60),
    cameras=st.integers(1, 3),
    size=st.tuples(st.integers(1, 70), st.integers(1, 50)),
)
@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
def test_the_tiles_hold_what_touches_them(seed: int, count: int, cameras: int, size: tuple) -> None:
    scene = splat_oracle.scene(seed, count, cameras, *size).to(F32)
    items = splat_oracle.items(scene, torch.zeros(count, 1))
    rows, columns = -(-size[1] // 16), -(-size[0] // 16)
    expected: dict[tuple, list[int]] = {}  # (camera, row, column) -> items in order of depth
    for camera in range(cameras):
        ids = range(camera * count, (camera + 1) * count)
        for i in sorted(ids, key=items["depths"].tolist().__getitem__):
            radius = items["radii"][i]
            if (radius > 0).all():
                low = ((items["means2d"][i] - radius) / 16).floor().int().clamp(min=0).tolist()
                high = ((items["means2d"][i] + radius) / 16).ceil().int().tolist()
                for row in range(low[1], min(rows, high[1])):
                    for column in range(low[0], min(columns, high[0])):
                        expected.setdefault((camera, row, column), []).append(i)
    *_, tiles = splat.rasterize(**items, backgrounds=None, width=size[0], height=size[1])
    flat = [i for key in sorted(expected) for i in expected[key]]
    assert tiles["flatten_ids"].dtype == torch.int32 and tiles["flatten_ids"].tolist() == flat
    counts = torch.bincount(torch.tensor(flat, dtype=torch.int64), minlength=cameras * count)
    assert tiles["tiles_per_gauss"].dtype == torch.int32 and torch.equal(tiles["tiles_per_gauss"].long(), counts)
    starts, before = torch.zeros(cameras, rows, columns, dtype=torch.int32), 0
    for camera in range(cameras):
        for row in range(rows):
            for column in range(columns):
                starts[camera, row, column] = before
                before += len(expected.get((camera, row, column), []))
    assert torch.equal(tiles["isect_offsets"], starts) and tiles["isect_offsets"].dtype == torch.int32
    # gsplat's keys: camera, tile, the bits of the depth
    bits = (rows * columns).bit_length()
    keys = [
        ((c << bits) | (row * columns + column)) << 32
        for (c, row, column) in sorted(expected)
        for _ in expected[c, row, column]
    ]
    depths = items["depths"][flat].view(torch.int32).long() if flat else torch.zeros(0, dtype=torch.int64)
    assert torch.equal(tiles["isect_ids"], torch.tensor(keys, dtype=torch.int64) + depths)


def test_the_same_bits_again_whatever_the_threads(isa: str) -> None:
    scene = splat_oracle.scene(4, 500, 2, 90, 70)
    inputs = {name: value for name, value in vars(scene).items() if isinstance(value, Tensor)}
    inputs |= {"dirs": random(2, 500, 3) - 0.5, "coeffs": random(500, 16, 3)}

    def image(dirs: Tensor, coeffs: Tensor, **kw: Any) -> tuple[Tensor, Tensor]:
        radii, means2d, depths, conics, factors = splat.projection(**kw, width=90, height=70, antialiased=True)
        colors = splat.spherical_harmonics(3, dirs, coeffs).flatten(0, 1)
        opacities, first = (kw["opacities"] * factors).flatten(), torch.tensor([0, 500, 1000])
        flat = [tensor.flatten(0, 1) for tensor in (means2d, conics, radii, depths)]
        return splat.rasterize(*flat[:2], colors, opacities, *flat[2:], first, None, 90, 70)[:2]

    weights = [random(2, 70, 90, 3), random(2, 70, 90, 1)]
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        found.append(run(image, inputs, F32, weights))
        torch.set_num_threads(before)
    for name, value in found[0].items():
        assert value.any() or name == "d Ks", name
        assert torch.equal(value, found[1][name]) and torch.equal(value, found[2][name]), name
