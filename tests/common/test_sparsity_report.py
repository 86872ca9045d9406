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


def test_a_speedup_is_only_claimed_where_it_was_measured(table):
    assert report(model()).speedup is None and "not claimed" in str(report(model()))
    table([3.0, 2.0, 0.5, 1.5, 2.0])
    found = report(model(), tokens=1)
    assert found.speedup == pytest.approx(3) and "3.00 times as fast" in str(found)
    slow = report(model(), tokens=16)
    assert slow.speedup == 1 and "below the crossover (0.50), runs dense" in str(slow) and "none to be had" in str(slow)


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
