"""N:M sparsity of any torch model: sparse layers, training recipes, meters, one-shot criteria and packed files.

handle = sparsify_(model, NMConfig(2, 8, recipe=SRSTE()))
...; optimizer.step(); handle.step()
save_packed(model, "model.safetensors")
"""

from __future__ import annotations

from common.sparsity.flops import FlopMeter, Passes, densities
from common.sparsity.flows import Gradual, MDGFExponential, MDGFLinear, Progressive, SDGFGeometric, SDGFStepwise
from common.sparsity.layers import NMConv2d, NMLayer, NMLinear
from common.sparsity.meters import GradientVariance, MaskMeter, Meter
from common.sparsity.packed import PackedFileError, PackedLinear, load_packed, pack_, save_packed
from common.sparsity.recipes import BDWP, SRSTE, STE, BiMask, Dense, Fixed, Transposable
from common.sparsity.report import LayerReport, Report, report
from common.sparsity.rules import Masks, Recipe, Rule
from common.sparsity.sparsify import NMConfig, Sparsity, sparsify_

__all__ = [
    "BDWP",
    "SRSTE",
    "STE",
    "BiMask",
    "Dense",
    "Fixed",
    "FlopMeter",
    "GradientVariance",
    "Gradual",
    "LayerReport",
    "MDGFExponential",
    "MDGFLinear",
    "MaskMeter",
    "Masks",
    "Meter",
    "NMConfig",
    "NMConv2d",
    "NMLayer",
    "NMLinear",
    "PackedFileError",
    "PackedLinear",
    "Passes",
    "Progressive",
    "Recipe",
    "Report",
    "Rule",
    "SDGFGeometric",
    "SDGFStepwise",
    "Sparsity",
    "Transposable",
    "densities",
    "load_packed",
    "pack_",
    "report",
    "save_packed",
    "sparsify_",
]
