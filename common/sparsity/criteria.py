"""Pruning a trained model in one shot: magnitude, Wanda and SparseGPT, to n:m or to a share of zeros.

    masks = prune_(model, 2, 4, method="sparsegpt", calibration=batches)

Every layer is seen as a matrix [O, K] whose groups of m lie along the inputs: the weight of a Linear as it is, that of
a Conv2d with its kernel positions before its input channels, so that a group never crosses a position.

    magnitude   |W|
    wanda       |W_oj| ||x_j||_2, compared within a row (Sun et al. 2023, 2306.11695, eq. 1)
    sparsegpt   W_oj^2 / [U_jj]^2 with U^T U = H^-1, H = X^T X + damping mean(diag) I, and after each pruned column the
                ones to its right take over its part (Frantar and Alistarh 2023, 2301.00774, algorithm 1)

Layers are pruned in the order in which a forward pass meets them, block by block, so later ones are judged by what the
pruned earlier ones let through.
"""

from __future__ import annotations

import fnmatch
import itertools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import nm

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["Pattern", "inputs_as_matrix", "prune_", "sparsegpt"]

Method = Literal["magnitude", "wanda", "sparsegpt"]
Where = Callable[[str, nn.Module], bool] | Sequence[str]
Layer = nn.Linear | nn.Conv2d


@dataclass(frozen=True)
class Pattern:
    """What is kept: n of every m inputs, or all but a share `sparsity` of the weights. Give one of the two.

    Raises ValueError unless 1 <= n <= m, or 0 <= sparsity < 1.
    """

    n: int | None = None
    m: int | None = None
    sparsity: float | None = None

    def __post_init__(self) -> None:
        if (self.n is None) != (self.m is None) or (self.n is None) == (self.sparsity is None):
            raise ValueError(
                f"pruning: got n={self.n}, m={self.m}, sparsity={self.sparsity}; expected n and m, or a sparsity alone"
            )
        if self.n is not None and self.m is not None and not 1 <= self.n <= self.m:
            raise ValueError(f"pruning: got {self.n}:{self.m}; expected 1 <= n <= m, for example 2:4")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ValueError(f"pruning: got sparsity {self.sparsity}; expected 0 <= sparsity < 1, the share of zeros")

    def keep(self, score: Tensor, *, by_row: bool = False) -> Tensor:
        """The mask of the largest `score` [O, K] >= 0: bool. A share is taken of each row, or of the whole matrix.

        Of equals the first is kept, so the count is exact: K - round(sparsity K) of a row.
        """
        if self.n is not None and self.m is not None:
            return nm.mask(score, self.n, self.m)
        rows = score if by_row else score.reshape(1, -1)
        kept = rows.shape[1] - round((self.sparsity or 0.0) * rows.shape[1])
        best = rows.sort(dim=1, descending=True, stable=True).indices[:, :kept]
        return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, best, True).view_as(score)


def prune_(
    model: nn.Module,
    n: int | None = None,
    m: int | None = None,
    *,
    sparsity: float | None = None,
    method: Method = "wanda",
    calibration: Iterable[Any] | None = None,
    where: Where | None = None,
    damping: float = 0.01,
    block: int = 128,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Set weights of a trained model to zero, in place; nothing is trained.

    n, m         keep n of every m inputs; or `sparsity`, the share of zeros: of a layer (magnitude), of each of its
                 rows (wanda), of each of its blocks of columns (sparsegpt), as the authors take it
    calibration  what wanda and sparsegpt look at: batches, each a tensor, a tuple of positional or a mapping of keyword
                 arguments of the model; they are held in memory and run through the model once for each of its blocks
    where        layers by name: glob patterns, or a predicate of name and module; None: every Linear and Conv2d whose
                 inputs m divides, but the last one, which in the papers stays dense as the head
    damping      of sparsegpt's Hessian, relative to the mean of its diagonal
    block        columns that sparsegpt treats before it updates the rest; rounded up to a multiple of m

    Returns the mask of every pruned weight by the layer's name: bool, True where it is kept. Dead inputs, zero in the
    whole calibration, are pruned first.

    Raises ValueError, and changes nothing, for a pattern, method or layers that do not fit, and for a missing
    calibration; ValueError naming layer and batch for inputs that are not finite and for a layer that the
    calibration never reaches (layers before it are pruned by then).
    """
    pattern = Pattern(n, m, sparsity)
    layers = _chosen(model, where, pattern)
    if method not in get_args(Method):
        raise ValueError(f"prune_: got method {method!r}; expected one of {', '.join(get_args(Method))}")
    if method == "magnitude":
        return {name: _write(layer, None, pattern.keep(_matrix(layer).abs())) for name, layer in layers.items()}
    batches = list(calibration) if calibration is not None else []
    if not batches:
        raise ValueError(
            f"prune_: {method} got no calibration; expected batches of the model's inputs (128 sequences are usual), "
            'or method="magnitude"'
        )
    from tqdm import tqdm

    _refuse_grouped(layers, method)
    masks: dict[str, Tensor] = {}
    with _evaluating(model), tqdm(desc=method, file=sys.stdout, ascii=True, disable=not progress) as bar:
        stages = _stages(model, layers, batches)
        bar.reset(len(stages) * len(batches) + len(layers))  # passes of the calibration, and what follows them
        for index, stage in enumerate(stages):
            later = [layers[name] for names in stages[index + 1 :] for name in names]
            seen = _watch(
                model, {name: layers[name] for name in stage}, later, batches, bar, gram=method == "sparsegpt"
            )
            for name in stage:
                layer, statistics = layers[name], seen.pop(name)
                if method == "wanda":
                    score = _matrix(layer).abs() * statistics.sqrt()
                    masks[name] = _write(layer, None, pattern.keep(score, by_row=True))
                else:
                    weight, kept = sparsegpt(_matrix(layer), statistics, pattern, damping=damping, block=block)
                    masks[name] = _write(layer, weight, kept)
                bar.update()
    return {name: masks[name] for name in layers}


def sparsegpt(
    weight: Tensor, gram: Tensor, pattern: Pattern, *, damping: float = 0.01, block: int = 128
) -> tuple[Tensor, Tensor]:
    """Prune `weight` [O, K] so that X W^T changes little, given gram = X^T X [K, K]; returns weight and mask.

    Columns are treated from left to right. A pruned entry's error, divided by U_jj, is taken over by the columns to its
    right along row j of U; the mask of a group is chosen when its first column is reached, from the weights as they
    stand then. In float64, because the inverse squares the condition of X.

    Raises ValueError where the Hessian is not positive definite even with its damping.
    """
    work, hessian = weight.detach().double().clone(), gram.detach().double().clone()
    columns, diagonal = work.shape[1], hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    diagonal += damping * diagonal[~dead].mean() if (~dead).any() else 0.0
    inverse = _inverse_factor(hessian)
    price = torch.where(dead, 0.0, 1 / inverse.diagonal())  # what meets no input is pruned first, but keeps its value
    mask = torch.ones_like(work, dtype=torch.bool)
    step = pattern.m or 1
    for begin, end in itertools.pairwise([*range(0, columns, -(-block // step) * step), columns]):
        if pattern.m is None:
            mask[:, begin:end] = pattern.keep((work * price)[:, begin:end].square())
        errors = torch.zeros_like(work[:, begin:end])
        for j in range(begin, end):
            if pattern.m is not None and j % pattern.m == 0:
                group = slice(j, j + pattern.m)
                mask[:, group] = pattern.keep((work[:, group] * price[group]).square())
            error = torch.where(mask[:, j], 0.0, work[:, j]) / inverse[j, j]
            work[:, j:end] -= error[:, None] * inverse[j, j:end]
            errors[:, j - begin] = error
        work[:, end:] -= errors @ inverse[begin:end, end:]
    return torch.where(mask, work, 0.0).to(weight.dtype), mask


def inputs_as_matrix(layer: Layer, inputs: Tensor) -> Tensor:
    """What a layer's matrix is multiplied with: [T, K], a row for every token or pixel, columns as in the matrix."""
    if isinstance(layer, nn.Conv2d):
        padded = F.pad(inputs, _padding(layer), "constant" if layer.padding_mode == "zeros" else layer.padding_mode)
        patches = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)  # [B, I kh kw, L]
        return patches.unflatten(1, (inputs.shape[1], -1)).permute(0, 3, 2, 1).flatten(2).flatten(0, 1)
    return inputs.reshape(-1, inputs.shape[-1])


# ------------------------------------------------------------------------------------------------- layers as matrices


def _matrix(layer: Layer) -> Tensor:
    """The weight as [O, K], in float32 at least."""
    weight = layer.weight.detach()
    flat = weight.permute(0, 2, 3, 1).flatten(1) if isinstance(layer, nn.Conv2d) else weight
    return flat.to(torch.promote_types(flat.dtype, torch.float32))


@torch.no_grad()
def _write(layer: Layer, matrix: Tensor | None, kept: Tensor) -> Tensor:
    """Put a matrix (None: the weight as it is) with its mask into the layer; returns the mask in the weight's shape."""

    def shaped(flat: Tensor) -> Tensor:
        if not isinstance(layer, nn.Conv2d):
            return flat
        outputs, channels, height, width = layer.weight.shape
        return flat.view(outputs, height, width, channels).permute(0, 3, 1, 2).contiguous()

    mask = shaped(kept)
    value = layer.weight if matrix is None else shaped(matrix).to(layer.weight.dtype)
    layer.weight.copy_(value.where(mask, torch.zeros((), dtype=value.dtype, device=value.device)))
    return mask


def _padding(layer: nn.Conv2d) -> list[int]:
    """As F.pad wants it: left, right, top, bottom."""
    if layer.padding == "valid":
        return [0, 0, 0, 0]
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [side for extra in reversed(total) for side in (extra // 2, extra - extra // 2)]
    return [side for size in reversed([int(size) for size in layer.padding]) for side in (size, size)]


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular U with U^T U = H^-1."""
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if not failed:
        factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
    if failed:
        raise ValueError(
            "sparsegpt: the inputs' Gram matrix is not positive definite; expected more calibration tokens than "
            "inputs, or a larger damping (0.01 is usual)"
        )
    return factor


# ------------------------------------------------------------------------------------------------- which layers


def _chosen(model: nn.Module, where: Where | None, pattern: Pattern) -> dict[str, Layer]:
    named = {name: layer for name, layer in model.named_modules() if isinstance(layer, Layer)}
    divides = {name: pattern.m is None or layer.weight.shape[1] % pattern.m == 0 for name, layer in named.items()}
    if where is None:
        chosen = [name for name in list(named)[:-1] if divides[name]]
    elif callable(where):
        chosen = [name for name, layer in named.items() if where(name, layer)]
    else:
        patterns = [where] if isinstance(where, str) else where
        for glob in patterns:
            if not fnmatch.filter(named, glob):
                known = ", ".join(list(named)[:8]) + (", ..." if len(named) > 8 else "")
                raise ValueError(f"prune_: no Linear or Conv2d is named {glob!r}; expected patterns for {known}")
        chosen = [name for name in named if any(fnmatch.fnmatchcase(name, glob) for glob in patterns)]
    if not chosen:
        raise ValueError(
            "prune_: no layer is left to prune; expected a Linear or Conv2d whose inputs m divides; name the last one "
            "in where= if it is meant"
        )
    for name in chosen:
        _require_fit(name, named[name], divides[name], pattern)
    return {name: named[name] for name in chosen}


def _require_fit(name: str, layer: Layer, divides: bool, pattern: Pattern) -> None:
    weight = layer.weight
    if not divides:
        raise ValueError(
            f"prune_: {name} has {weight.shape[1]} inputs, which m = {pattern.m} does not divide; expected a multiple; "
            "leave it out with where="
        )
    if not weight.is_floating_point():
        raise ValueError(f"prune_: {name} has weights of {weight.dtype}; expected real floating point")
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"prune_: {name} has weights that are not finite; expected a trained model; look at them first"
        )


def _refuse_grouped(layers: Mapping[str, Layer], method: str) -> None:
    for name, layer in layers.items():
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            raise ValueError(
                f"prune_: {name} is a convolution in {layer.groups} groups, expected one for {method}; use "
                'method="magnitude" or leave it out with where='
            )


# ------------------------------------------------------------------------------------------------- calibration


class _Enough(Exception):
    """The forward pass has come as far as it is needed."""


def _stages(model: nn.Module, layers: Mapping[str, Layer], batches: list[Any]) -> list[list[str]]:
    """Names in the order of their first call; those that follow one another in one block belong together."""
    called: dict[str, None] = {}
    with ExitStack() as hooks:
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(lambda *_, name=name: called.setdefault(name))
            hooks.callback(handle.remove)
        for batch in batches:
            _run(model, batch)
            if len(called) == len(layers):
                break
    if missing := [name for name in layers if name not in called]:
        raise ValueError(
            f"prune_: the calibration never reaches {', '.join(missing[:4])}; expected batches that use every chosen "
            "layer; leave it out with where="
        )
    return [list(names) for _, names in itertools.groupby(called, key=lambda name: _block(model, name))]


def _block(model: nn.Module, name: str) -> str:
    """The innermost entry of a ModuleList, ModuleDict or Sequential that holds the layer; where none does, its name."""
    parts = name.split(".")
    for depth in range(len(parts), 0, -1):
        if isinstance(model.get_submodule(".".join(parts[: depth - 1])), nn.ModuleList | nn.ModuleDict | nn.Sequential):
            return ".".join(parts[:depth])
    return name


def _watch(
    model: nn.Module, stage: Mapping[str, Layer], later: Sequence[Layer], batches: list[Any], bar: tqdm, *, gram: bool
) -> dict[str, Tensor]:
    """X^T X [K, K] of each layer of the stage over all batches, or its diagonal [K] alone; float32 at least."""
    watcher = _Watcher(stage, gram=gram)
    with ExitStack() as hooks:
        for name, layer in stage.items():
            hooks.callback(layer.register_forward_pre_hook(partial(watcher.see, name), with_kwargs=True).remove)
        for layer in later:
            hooks.callback(layer.register_forward_pre_hook(watcher.stop).remove)
        for batch in batches:
            watcher.begin_batch()
            with suppress(_Enough):
                _run(model, batch)
            bar.update()
    return watcher.sums


class _Watcher:
    """Adds up what the layers of a stage are given, and ends a forward pass that has met all of them."""

    def __init__(self, stage: Mapping[str, Layer], *, gram: bool):
        self.stage, self.gram = stage, gram
        self.sums: dict[str, Tensor] = {}
        self.batch, self.met = -1, set[str]()

    def begin_batch(self) -> None:
        self.batch, self.met = self.batch + 1, set()

    def see(self, name: str, _: nn.Module, args: tuple, kwargs: dict) -> None:
        rows = inputs_as_matrix(self.stage[name], args[0] if args else kwargs["input"]).detach()
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if not torch.isfinite(rows).all():
            raise ValueError(
                f"prune_: the input of {name} is not finite in calibration batch {self.batch}; expected finite "
                "activations; look at that batch and at the weights before the layer"
            )
        found = rows.T @ rows if self.gram else rows.square().sum(dim=0)
        self.sums[name] = self.sums[name] + found if name in self.sums else found
        self.met.add(name)

    def stop(self, *_: Any) -> None:
        if self.met == set(self.stage):
            raise _Enough


def _run(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, list | tuple):
        model(*batch)
    else:
        model(batch)


@contextmanager
def _evaluating(model: nn.Module):
    """Evaluation mode without gradients; afterwards every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            yield model.eval()
    finally:
        for module, training in modes.items():
            module.training = training
