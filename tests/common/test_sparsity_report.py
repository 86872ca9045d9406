"""The report: sizes by hand, and no speed-up where none was measured."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from common.sparsity import Gradual, NMConfig, pack_, report, sparsify_
from kernels import info
from kernels.nm import crossover


@pytest.fixture
def table(tmp_path, monkeypatch):
    """table(ratios at 1, 4, 16, 64, 256 tokens) is all that is known of this machine."""
    path = tmp_path / "table.json"
    monkeypatch.setenv("NM_CROSSOVER", str(path))
    monkeypatch.setattr(crossover, "SHIPPED", tmp_path / "none.json")

    def write(ratios):
        path.write_text(json.dumps({info()["isa"]: {"float32": {"2:8": ratios}}}))
        crossover._table.cache_clear()

    crossover._table.cache_clear()
    yield write
    crossover._table.cache_clear()


def model() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 16, bias=False), nn.Linear(16, 4))
    sparsify_(net, NMConfig(2, 8))
    return net


def test_sizes_by_hand(table):
    found = report(model())
    assert [(layer.name, layer.weights, layer.kept) for layer in found.layers] == [("0", 2048, 512), ("2", 512, 128)]
    assert [layer.packed_bytes for layer in found.layers] == [512 * 4 + 256, 128 * 4 + 64]
    rest = 32 + 16 * 4 + 4
    assert (found.weights, found.kept) == (2560 + rest, 640 + rest)
    assert found.dense_bytes == 4 * (2560 + rest)
    net = model()
    pack_(net)
    assert [layer.packed_bytes for layer in report(net).layers] == [layer.packed_bytes for layer in found.layers]
    assert report(net).weights == found.weights


def wide() -> nn.Sequential:
    """Two layers that are large enough for a claim, and a head."""
    net = nn.Sequential(nn.Linear(1024, 1024, bias=False), nn.GELU(), nn.Linear(1024, 1024), nn.Linear(1024, 4))
    sparsify_(net, NMConfig(2, 8))
    return net


def test_a_speedup_is_only_claimed_where_it_was_measured(table):
    assert report(wide()).speedup is None and "nothing claimed" in str(report(wide()))
    table([3.0, 2.0, 0.5, 1.5, 2.0])
    found = report(wide(), tokens=1)
    assert found.speedup == pytest.approx(3) and "expected speed-up at 1 token\n" in str(found)
    assert "products together 3.00 times as fast on one thread of a CPU, by the table" in str(found)
    slow = report(wide(), tokens=16)
    assert slow.speedup == 1 and "below the crossover (0.50), runs dense" in str(slow)
    assert "no gain is expected from these layers at 16 tokens" in str(slow)


def test_no_speedup_is_claimed_for_a_layer_smaller_than_what_was_measured(table):
    table([3.0] * 5)
    found = report(model())
    assert [layer.speedup for layer in found.layers] == [None, None] and found.speedup is None
    assert str(found).count("unknown: not measured here") == 2 and "nothing claimed" in str(found)
    mixed = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1016), nn.Linear(1016, 4))
    sparsify_(mixed, NMConfig(2, 8))
    assert [layer.speedup for layer in report(mixed).layers] == [3.0, None] and report(mixed).speedup is None


def test_vectors_have_smaller_places_and_a_crossover_of_their_own(table):
    net = nn.Sequential(nn.Linear(1024, 1000, bias=False), nn.Linear(1000, 4, bias=False))
    sparsify_(net, NMConfig(2, 8, vector=64))
    table([3.0] * 5)
    (layer,) = report(net).layers
    assert layer.pattern == "2:8x64" and layer.packed_bytes == 1000 * 256 * 4 + 16 * 256
    assert layer.speedup is None  # the table is of single rows
    pack_(net)
    assert report(net).layers == [layer]


def test_a_convolution_claims_nothing(table):
    table([3.0] * 5)
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Linear(8, 8))
    sparsify_(net, NMConfig(2, 8, where=["0"]))
    found = report(net)
    assert found.speedup == 1 and "no packed product" in str(found)


def test_models_without_a_report(table):
    with pytest.raises(ValueError, match="without sparse layers"):
        report(nn.Sequential(nn.Linear(8, 8)))
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    sparsify_(net, NMConfig(2, 8, recipe=Gradual(end=10)))
    with pytest.raises(ValueError, match="finalize_"):
        report(net)
