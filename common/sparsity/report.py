"""What N:M sparsity brings a model: weights, bytes, and speed where it was measured; none is claimed elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from common.sparsity.layers import NMLayer
from common.sparsity.packed import PackedLinear
from kernels import nm
from kernels.nm.tensor import pattern

__all__ = ["LayerReport", "Report", "report"]


@dataclass(frozen=True)
class LayerReport:
    """One sparse layer. `speedup`: of its packed product over torch's dense one of the same dtype at `Report.tokens`,
    as kernels.nm.speedup knows it; 1 where no packed product serves it; None where nothing was measured that it could
    be held against."""

    name: str
    pattern: str
    weights: int
    kept: int
    dense_bytes: int
    packed_bytes: int
    speedup: float | None
    note: str


@dataclass(frozen=True)
class Report:
    """Of a whole model. All parameters count, sparse or not; `print` it for a table."""

    layers: list[LayerReport]
    tokens: int
    weights: int
    kept: int
    dense_bytes: int
    packed_bytes: int

    @property
    def speedup(self) -> float | None:
        """Of the sparse layers together, weighted by their dense work; None if it is unknown of any of them.

        Never below 1: where a packed product is slower, kernels.nm.linear runs dense.
        """
        if not self.layers or any(layer.speedup is None for layer in self.layers):
            return None
        work = sum(layer.weights for layer in self.layers)
        return work / sum(layer.weights / max(1.0, layer.speedup or 0.0) for layer in self.layers)

    def __str__(self) -> str:
        width = max([5, *(len(layer.name) for layer in self.layers)])
        header = f"{'layer':{width}}  pattern       weights     kept   dense KiB  packed KiB"
        lines = [f"{header}  expected speed-up at {_told(self.tokens)}"]
        for layer in self.layers:
            lines.append(
                f"{layer.name:{width}}  {layer.pattern:10}{layer.weights:11,}{layer.kept / layer.weights:9.1%}"
                f"{layer.dense_bytes / 1024:12,.1f}{layer.packed_bytes / 1024:12,.1f}  {layer.note}"
            )
        lines.append(
            f"whole model: {self.kept:,} of {self.weights:,} parameters kept, {self.packed_bytes / 2**20:.2f} of "
            f"{self.dense_bytes / 2**20:.2f} MiB"
        )
        if self.speedup is None:
            lines.append("speed: nothing claimed, it is unknown of some layers; see the last column")
        elif self.speedup <= 1:
            lines.append(f"speed: no gain is expected from these layers at {_told(self.tokens)}")
        else:
            lines.append(
                f"speed: the sparse layers' products together {self.speedup:.2f} times as fast on one thread of a CPU, "
                "by the table of kernels.nm.speedup"
            )
        return "\n".join(lines)


def report(model: nn.Module, *, tokens: int = 1) -> Report:
    """What the sparse layers of a model save at products of so many tokens (batch times sequence).

    Raises ValueError for a model without sparse layers, or one on its way to the hard mask.
    """
    layers = [
        _layer(name, module, tokens)
        for name, module in model.named_modules()
        if isinstance(module, NMLayer | PackedLinear)
    ]
    if not layers:
        raise ValueError("report: got a model without sparse layers; expected one that sparsify_ was applied to")
    sparse = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, NMLayer | PackedLinear)
        for parameter in [module.values if isinstance(module, PackedLinear) else module.weight]
    }
    others = [parameter for parameter in model.parameters() if id(parameter) not in sparse]
    count, size = sum(p.numel() for p in others), sum(p.nbytes for p in others)
    return Report(
        layers=layers,
        tokens=tokens,
        weights=count + sum(layer.weights for layer in layers),
        kept=count + sum(layer.kept for layer in layers),
        dense_bytes=size + sum(layer.dense_bytes for layer in layers),
        packed_bytes=size + sum(layer.packed_bytes for layer in layers),
    )


def _layer(name: str, layer: NMLayer | PackedLinear, tokens: int) -> LayerReport:
    if isinstance(layer, PackedLinear):
        weight = layer.weight
        n, m, vector, shape, dtype, packed = layer.n, layer.m, layer.vector, weight.shape, weight.dtype, weight.nbytes
        count, served = shape[0] * shape[1], True
    else:
        if layer.kept is None or layer.rule.beta > 0:
            raise ValueError(f"report: {name!r} has no hard mask yet; call finalize_() on its handle first")
        n, m, vector = layer.rule.n, layer.rule.m, layer.rule.vector
        count, dtype = layer.weight.numel(), layer.weight.dtype
        kept, shape = count * n // m, (layer.weight.shape[0], count // layer.weight.shape[0])
        places = -(-shape[0] // vector) * shape[1] * n // m if vector > 1 else kept // 2 if m <= 16 else kept
        packed = kept * layer.weight.element_size() + places
        served = isinstance(layer, nn.Linear) and layer.axis == "in"
    ratio = nm.speedup(n, m, tokens, dtype, shape=shape, vector=vector) if served else 1.0
    if not served:
        note = "none: no packed product for this kind of layer"
    elif ratio is None:
        note = "unknown: not measured here, see kernels.nm.autotune()"
    elif ratio < 1:
        note = f"none: below the crossover ({ratio:.2f}), runs dense"
    else:
        note = f"{ratio:.2f}"
    size = torch.finfo(dtype).bits // 8
    return LayerReport(name, pattern(n, m, vector), count, count * n // m, count * size, packed, ratio, note)


def _told(tokens: int) -> str:
    return f"{tokens} token{'s' if tokens > 1 else ''}"
