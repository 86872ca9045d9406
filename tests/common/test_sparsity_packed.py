"""Packed files: what comes back, how large they are, and what is said of files that cannot be read."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from nm_tables import packed_always  # noqa: F401  (a fixture of every test: these layers are small enough to run dense)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from common.sparsity import (
    SRSTE,
    Fixed,
    MDGFLinear,
    NMConfig,
    PackedFileError,
    PackedLinear,
    load_packed,
    pack_,
    save_packed,
    sparsify_,
)


def model(width: int = 32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3),
        nn.BatchNorm2d(width),
        nn.Conv2d(width, 16, 3, bias=False),
        nn.Flatten(),
        nn.Linear(64, 8),
    )


def everything(name: str, layer: nn.Module) -> bool:
    return name in ("2", "4")


LONG = [("in", (1, 16)), ("in", (5, 32))]  # the model has eight outputs


@pytest.mark.parametrize(
    ("axis", "pattern"), [(axis, p) for axis in ("in", "out") for p in ((2, 4), (1, 4), (3, 8))] + LONG, ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_comes_back_as_it_was(pattern, axis, dtype, tmp_path):
    n, m = pattern
    net, path = model().to(dtype), tmp_path / "net.safetensors"
    handle = sparsify_(net, NMConfig(n, m, axis=axis, where=everything, recipe=SRSTE()))
    handle.layers["4"].weight.data[0, :m] = 1.0  # ties
    handle.step()
    masks = handle.masks()
    save_packed(net, path)
    handle.remove(keep="zeros")
    other = model().to(dtype)
    for parameter in other.parameters():
        parameter.data.fill_(7)
    found = load_packed(path, other)
    assert {name: mask.tolist() for name, mask in found.items()} == {
        name: mask.tolist() for name, mask in masks.items()
    }
    expected = net.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in other.state_dict().items())


def test_the_file_is_as_small_as_promised(tmp_path):
    """2:8 of float32: 2 values of 4 bytes and 2 places of half a byte for every 8 weights."""
    net, path = nn.Sequential(nn.Linear(512, 512, bias=False)), tmp_path / "net.safetensors"
    sparsify_(net, NMConfig(2, 8, where=["0"]))
    save_packed(net, path)
    payload = 512 * 512 / 8 * (2 * 4 + 2 * 0.5)
    assert payload <= path.stat().st_size <= payload + 1000


def test_training_goes_on_from_a_file(tmp_path):
    net, path = model(), tmp_path / "net.safetensors"
    sparsify_(net, NMConfig(1, 8, where=everything))
    save_packed(net, path)
    other = model()
    masks = load_packed(path, other)
    handle = sparsify_(other, NMConfig(1, 8, where=list(masks), recipe=Fixed()))
    handle.set_masks(masks)
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(other.eval()(x), net.eval()(x))


@pytest.mark.parametrize("pattern", [(2, 4), (5, 32)], ids=str)
def test_vectors_come_back_and_the_header_says_so(pattern, tmp_path):
    (n, m), path = pattern, tmp_path / "net.safetensors"

    def net() -> nn.Sequential:
        return nn.Sequential(nn.Linear(64, 40), nn.GELU(), nn.Linear(40, 8))

    def header() -> tuple[str, dict[str, Any]]:
        with safe_open(path, framework="pt") as file:
            return file.metadata()["version"], json.loads(file.metadata()["layers"])

    trained, x = net(), torch.randn(6, 64)
    sparsify_(trained, NMConfig(n, m, where=["0"]))
    save_packed(trained, path)
    assert header()[0] == "1" and "vector" not in header()[1]["0"]  # older releases read it
    plain = path.stat().st_size

    trained = net()
    handle = sparsify_(trained, NMConfig(n, m, where=["0"], vector=16))
    masks, expected = handle.masks(), trained(x)
    save_packed(trained, path)
    assert header() == ("2", {"0": {"n": n, "m": m, "axis": "in", "shape": [40, 64], "vector": 16}})
    assert path.stat().st_size < plain
    loaded = net()
    found = load_packed(path, loaded)
    assert torch.equal(found["0"], masks["0"])
    torch.testing.assert_close(loaded(x), expected)
    sparsify_(loaded, NMConfig(n, m, where=["0"], recipe=Fixed(), vector=16)).set_masks(found)
    assert pack_(loaded) == ["0"] and repr(loaded[0]).endswith(f"{n}:{m}x16 packed)")
    torch.testing.assert_close(loaded(x), expected)
    optimizer = torch.optim.SGD(loaded.parameters(), 0.1)
    loaded(x).square().sum().backward()
    optimizer.step()
    assert loaded[0].weight.vector == 16 and not torch.allclose(loaded(x), expected)

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    for vector, message in (
        (7, "got vectors of 7 rows"),
        (32, "values .* and places"),
        ("16", "got vectors of 16"),
    ):
        layers = json.dumps({"0": header()[1]["0"] | {"vector": vector}})
        save_file(tensors, tmp_path / "bad", {"format": "resparse-nm", "version": "2", "layers": layers})
        with pytest.raises(PackedFileError, match=f"damaged at layer '0' .*{message}"):
            load_packed(tmp_path / "bad", net())
    tensors["0.weight.places"] += m
    save_file(tensors, tmp_path / "bad", {"format": "resparse-nm", "version": "2", "layers": json.dumps(header()[1])})
    with pytest.raises(PackedFileError, match=f"in groups of {m}"):
        load_packed(tmp_path / "bad", net())


def test_groups_that_keep_fewer_come_back_too(tmp_path):
    net, path = nn.Sequential(nn.Linear(8, 2)), tmp_path / "net.safetensors"
    handle = sparsify_(net, NMConfig(2, 4, where=["0"], recipe=Fixed()))
    handle.set_masks({"0": torch.tensor([[1, 0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1, 0, 0]]).bool()})
    save_packed(net, path)
    handle.remove(keep="zeros")
    other = nn.Sequential(nn.Linear(8, 2))
    load_packed(path, other)
    assert torch.equal(other[0].weight, net[0].weight)


def test_models_that_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="no sparse layer"):
        save_packed(model(), tmp_path / "net.safetensors")
    for recipe in (MDGFLinear(10), MDGFLinear(10, dense=5)):
        net = model()
        handle = sparsify_(net, NMConfig(1, 8, where=everything, recipe=recipe))
        with pytest.raises(ValueError, match="finalize_"):
            save_packed(net, tmp_path / "net.safetensors")
        handle.finalize_()
        save_packed(net, tmp_path / "net.safetensors")
    wide = nn.Sequential(nn.Linear(512, 2))
    sparsify_(wide, NMConfig(1, 512, where=["0"]))
    with pytest.raises(ValueError, match="at most 256"):
        save_packed(wide, tmp_path / "net.safetensors")


def test_files_that_cannot_be_read(tmp_path):
    net, path = model(), tmp_path / "net.safetensors"
    sparsify_(net, NMConfig(1, 8, where=everything))
    save_packed(net, path)
    whole = path.read_bytes()

    def message(content: bytes, target: nn.Module | None = None) -> str:
        path.write_bytes(content)
        plain = target or model()
        before = {name: value.clone() for name, value in plain.state_dict().items()}
        with pytest.raises(PackedFileError) as caught:
            load_packed(path, plain)
        assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
        assert "\n" not in str(caught.value)
        return str(caught.value)

    for size in (0, 5, 100, len(whole) - 1):
        assert "cut short" in message(whole[:size])
    assert "version '3'" in message(whole.replace(b'"version":"1"', b'"version":"3"'))
    save_file({"x": torch.ones(1)}, path)
    assert "no packed N:M model" in message(path.read_bytes())
    assert "'0.bias' is [32] in the file and [16] in the model (7 such)" in message(whole, model(16))
    with pytest.raises(FileNotFoundError, match="save_packed"):
        load_packed(tmp_path / "none.safetensors", model())


def test_a_damaged_header_or_place_is_found_before_anything_is_written(tmp_path):
    """Places beyond their group would be written behind the weight, which ends the process."""
    net, path = model(), tmp_path / "net.safetensors"
    sparsify_(net, NMConfig(1, 8, where=everything))
    save_packed(net, path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    layers = json.loads(header["layers"])
    first = next(iter(layers))
    values, places = (f"{first}.weight.{part}" for part in ("values", "places"))

    def message(*, without: str = "", **changed: Any) -> str:
        kept = {name: tensor for name, tensor in tensors.items() if name != without}
        save_file(kept | changed.pop("tensors", {}), path, header | changed)
        plain = model()
        before = {name: value.clone() for name, value in plain.state_dict().items()}
        with pytest.raises(PackedFileError) as caught:
            load_packed(path, plain)
        assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    def about(name: str = first, **changed: Any) -> str:
        return json.dumps(layers | {name: layers[first] | changed})

    for broken in ("{", "[1]", "null"):
        assert "its header does not list the layers" in message(layers=broken)
    assert f"damaged at layer {first!r} ('{values}' is missing)" in message(without=values)
    assert "at layer 'elsewhere' ('elsewhere.weight.values' is missing)" in message(layers=about("elsewhere"))
    assert "at layer" in message(layers=about(m=4)) and "at layer" in message(layers=about(m=0))
    assert "'across' is missing" in message(layers=about(axis="across"))
    assert "at layer" in message(tensors={values: tensors[values][:1].clone()})
    assert "values of torch.int32" in message(tensors={values: tensors[values].int()})
    assert "expected torch.uint8" in message(tensors={places: tensors[places].int()})
    for byte, place in ((0x0F, 15), (0xF0, 15), (0x08, 8)):
        assert f"a place of {place} in groups of 8" in message(tensors={places: tensors[places] * 0 + byte})


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 40), nn.GELU(), nn.Linear(40, 64, bias=False), nn.GELU(), nn.Linear(64, 5)).to(
        dtype
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_packed_model_computes_the_same(dtype):
    net = mlp(dtype)
    sparsify_(net, NMConfig(2, 8))
    x = torch.randn(3, 7, 64).to(dtype)
    expected = net(x)
    assert pack_(net) == ["0", "2"]
    assert isinstance(net[0], PackedLinear) and repr(net[0]).endswith("2:8 packed)")
    tolerance = {} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2**-6}  # the dense product rounds otherwise
    torch.testing.assert_close(net(x), expected, **tolerance)
    assert net[0].values.dtype == dtype and net[2].bias is None


def test_a_packed_model_trains_its_kept_weights():
    net, dense = mlp(), mlp()
    handle = sparsify_(dense, NMConfig(2, 8, recipe=Fixed()))
    sparsify_(net, NMConfig(2, 8, recipe=Fixed()))
    pack_(net)
    x = torch.randn(16, 64)
    for model_ in (net, dense):
        optimizer = torch.optim.SGD(model_.parameters(), 0.1)
        model_(x).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(net[0].weight.to_dense(), dense[0].weight * handle.masks()["0"])


def test_what_cannot_be_packed_in_place():
    with pytest.raises(ValueError, match="no sparse Linear"):
        pack_(mlp())
    net = mlp()
    sparsify_(net, NMConfig(1, 8, recipe=MDGFLinear(10)))
    with pytest.raises(ValueError, match="'0' has no hard mask yet; call finalize_"):
        pack_(net)
    assert type(net[2]).__name__ == "NMLinear"
    single = nn.Linear(64, 8)
    sparsify_(single, NMConfig(1, 8, where=lambda name, layer: True))
    with pytest.raises(ValueError, match="inside the model"):
        pack_(single)
