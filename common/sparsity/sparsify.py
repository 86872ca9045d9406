"""Make a model's layers N:M sparse in place, train it, and give the plain model back.

handle = sparsify_(model, NMConfig(2, 8, where=["blocks.*.mlp.*"], recipe=SRSTE()))
for batch in data:
    loss(model, batch).backward(); optimizer.step(); handle.step(); optimizer.zero_grad()
handle.remove(keep="zeros")
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from common.sparsity.layers import SPARSE, NMLayer, make_dense, make_sparse
from common.sparsity.recipes import SRSTE, Fixed
from common.sparsity.rules import DIMENSION, Axis, Masks, Recipe, Rule, other
from kernels.nm.tensor import VECTORS, is_shared

if TYPE_CHECKING:
    from common.sparsity.meters import Meter

Where = Callable[[str, nn.Module], bool] | Sequence[str]


@dataclass(frozen=True)
class NMConfig:
    """Which weights become N:M, and how they are trained.

    n, m      of every m weights n are kept, 1 <= n <= m
    axis      `in`: groups along the input channels, which the forward pass contracts; `out`: along the output
              channels, which the input gradient contracts. Convolutions: over channels, each kernel position by itself
    where     glob patterns of dotted names, or a predicate (name, module). None: every Linear and Conv2d that m
              divides, but the last one, which in the papers stays dense as the head
    recipe    see recipes.py and flows.py
    refresh   steps between two searches of the masks; a schedule that changes the pattern is always followed at once
    vector    16, 32, 64, 128 or 256 outputs keep the same inputs, those with the largest sums of magnitudes, so that
              the packed product is a dense one of n/m of the size (see kernels.nm.pack). For Linear layers along `in`

    Raises ValueError for numbers out of range, TypeError for a recipe that is none.
    """

    n: int
    m: int
    axis: Axis = "in"
    where: Where | None = None
    recipe: Recipe = SRSTE()  # noqa: RUF009  (frozen)
    refresh: int = 1
    vector: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise ValueError(f"NMConfig: got {self.n}:{self.m}; expected 1 <= n <= m, such as 2:4")
        if self.axis not in DIMENSION:
            raise ValueError(f"NMConfig: got axis {self.axis!r}; expected 'in' or 'out'")
        if self.refresh < 1:
            raise ValueError(f"NMConfig: got refresh {self.refresh}; expected 1 step or more between two searches")
        if not isinstance(self.recipe, Recipe):
            raise TypeError(f"NMConfig: got recipe {self.recipe!r}; expected one of common.sparsity, such as SRSTE()")
        if self.vector not in VECTORS:
            raise ValueError(f"NMConfig: got vector {self.vector}; expected one of {VECTORS}")
        if self.vector > 1 and (self.axis != "in" or self.recipe.both_axes):
            raise ValueError(
                f"NMConfig: got vector {self.vector} with axis {self.axis!r} and {type(self.recipe).__name__}; "
                "expected axis 'in' and a recipe of one mask, such as SRSTE(), STE() or Fixed(); or leave vector out"
            )


def sparsify_(model: nn.Module, config: NMConfig) -> Sparsity:
    """Make the chosen layers of a model sparse, in place; returns the handle that drives them.

    Raises ValueError for a pattern that fits no layer, a layer that cannot be N:M (its axis, its kind), or an empty
    choice; TypeError for weights that are not real floating point. The model is then untouched.
    """
    chosen, skipped = _choose(model, config)
    for name, layer in chosen.items():
        if not layer.weight.is_floating_point():
            raise TypeError(
                f"sparsify_: {name!r} has weights of dtype {layer.weight.dtype}; expected real floating point; convert "
                "the model, e.g. with .float(), or leave the layer out"
            )
    return Sparsity(model, config, chosen, skipped)


class Sparsity:
    """The handle of a sparse model.

    layers    the sparse layers by dotted name
    skipped   why the other Linear and Conv2d layers stayed dense, by name (filled where `where` is None)
    steps     how often `step` was called
    meters    what is measured along the way; a meter adds itself
    """

    def __init__(self, model: nn.Module, config: NMConfig, chosen: Mapping[str, nn.Module], skipped: dict[str, str]):
        self.config, self.skipped, self.steps, self.recipe = config, skipped, 0, config.recipe
        self.meters: list[Meter] = []
        self._hooks = _keep_off_the_fast_path(model, chosen)
        start = self._rule()
        self.layers: dict[str, NMLayer] = {
            name: make_sparse(layer, start, config.axis) for name, layer in chosen.items()
        }
        self._follow(start)

    def step(self) -> None:
        """To be called after each optimiser step: advances the schedule, seeks masks where due, feeds the meters."""
        for meter in self.meters:
            meter.before_step(self)
        self.steps += 1
        self._follow(self._rule())
        for meter in self.meters:
            meter.after_step(self)

    def masks(self) -> dict[str, Tensor]:
        """The forward mask of every layer that has one now: bool of the weight's shape, 1 where a weight is kept."""
        return {name: layer.kept for name, layer in self.layers.items() if layer.kept is not None}

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Use these masks (of a one-shot criterion, say) for good: the recipe must be `Fixed`.

        masks: bool by layer name, of the weight's shape, at most n kept of every m along the axis; layers that are not
            named keep what they have.

        Raises ValueError for an unknown layer, another shape or dtype, or a group that keeps more than n.
        """
        if not isinstance(self.recipe, Fixed):
            raise ValueError(f"set_masks: the recipe {self.recipe!r} seeks its own masks; expected Fixed()")
        for name, mask in masks.items():
            self._require_mask(name, mask)
        for name, mask in masks.items():
            layer = self.layers[name]
            layer.apply_rule(layer.rule, Masks(mask.to(layer.weight.device, copy=True)))

    def finalize_(self) -> None:
        """From now on every layer uses the hard mask n:m, wherever the schedule was; later steps keep it."""
        rule = self._rule()
        hard = replace(rule, n=self.config.n, m=self.config.m, beta=0.0, decay=0.0, grad_mode="scaled")
        if hard.dense:
            return
        for layer in self.layers.values():
            if rule.dense or rule.beta or (rule.n, rule.m) != (hard.n, hard.m):
                masks = self._seek(layer, hard)
            else:
                masks = layer.masks
            layer.apply_rule(hard, masks)
        self.recipe = Fixed()

    def remove(self, *, keep: Literal["dense", "zeros"] = "dense") -> None:
        """Give the plain Linear and Conv2d layers back, in place.

        keep: `dense`: with the dense weights, bit for bit; `zeros`: with zeros where the final n:m mask prunes.
        """
        if keep not in ("dense", "zeros"):
            raise ValueError(f"remove: got keep {keep!r}; expected 'dense' or 'zeros'")
        if keep == "zeros":
            self.finalize_()
        for layer in self.layers.values():
            if keep == "zeros" and layer.kept is not None:
                with torch.no_grad():
                    layer.weight.masked_fill_(~layer.kept, 0.0)
            make_dense(layer)
        for hook in self._hooks:
            hook.remove()
        self.layers = {}

    def state_dict(self) -> dict[str, Any]:
        """The step and the masks, for a checkpoint beside the model's own state (which holds the dense weights)."""
        masks = {name: layer.masks and layer.masks._asdict() for name, layer in self.layers.items()}
        return {"steps": self.steps, "masks": masks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from such a checkpoint. Raises ValueError where its layers are not these."""
        if set(state["masks"]) != set(self.layers):
            other_names = sorted(set(state["masks"]) ^ set(self.layers))
            raise ValueError(f"load_state_dict: these layers are only in one of checkpoint and model: {other_names}")
        self.steps = state["steps"]
        rule = self._rule()
        for name, layer in self.layers.items():
            stored = state["masks"][name] or {}
            masks = {key: mask.to(layer.weight.device) for key, mask in stored.items() if mask is not None}
            layer.apply_rule(rule, Masks(**masks) if masks else None)

    def _rule(self) -> Rule:
        rule = self.recipe.rule(self.steps, self.config.n, self.config.m)
        return replace(rule, vector=self.config.vector)

    def _follow(self, rule: Rule) -> None:
        due = self.steps % self.config.refresh == 0
        for layer in self.layers.values():
            same_pattern = (rule.n, rule.m) == (layer.rule.n, layer.rule.m)
            if rule.dense:
                masks = None
            elif due or not same_pattern or layer.masks is None:
                masks = self._seek(layer, rule)
            else:
                masks = layer.masks
            layer.apply_rule(rule, masks)

    def _seek(self, layer: NMLayer, rule: Rule) -> Masks:
        return self.recipe.masks(layer.weight, rule, self.config.axis, self.steps, layer.masks)

    def _require_mask(self, name: str, mask: Tensor) -> None:
        if name not in self.layers:
            raise ValueError(f"set_masks: no sparse layer {name!r}; {_nearest(name, list(self.layers))}")
        shape = self.layers[name].weight.shape
        if mask.shape != shape or mask.dtype != torch.bool:
            raise ValueError(
                f"set_masks: the mask of {name!r} is {mask.dtype} {list(mask.shape)}; expected bool {list(shape)}, the "
                "weight's shape"
            )
        n, m, dim = self.config.n, self.config.m, DIMENSION[self.config.axis]
        most = int(mask.movedim(dim, -1).unflatten(-1, (-1, m)).sum(-1).max())
        if most > n:
            raise ValueError(f"set_masks: the mask of {name!r} keeps {most} of {m} somewhere; expected at most {n}")
        if self.config.vector > 1 and not is_shared(mask, self.config.vector):
            raise ValueError(
                f"set_masks: the mask of {name!r} differs within {self.config.vector} rows; expected the same in every "
                "vector of them, e.g. kernels.nm.mask(weight, n, m, vector=...)"
            )


def _choose(model: nn.Module, config: NMConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """The layers to make sparse, by name, and why others are not."""
    modules = dict(model.named_modules())
    plain = {name: module for name, module in modules.items() if type(module) in SPARSE}
    if config.where is None:
        faults = {name: _misfit(layer, config) for name, layer in plain.items()}
        skipped = {name: fault for name, fault in faults.items() if fault}
        skipped.update({name: "the last layer" for name in list(plain)[-1:]})
        chosen = [name for name in plain if name not in skipped]
    else:
        skipped = {}
        if callable(config.where):
            chosen = [name for name, layer in plain.items() if config.where(name, layer)]
        else:
            patterns = [config.where] if isinstance(config.where, str) else config.where
            chosen = list(dict.fromkeys(name for pattern in patterns for name in _named(pattern, plain, modules)))
        for name in chosen:
            if fault := _misfit(plain[name], config):
                raise ValueError(f"sparsify_: {name!r} cannot be {config.n}:{config.m}: {fault}")
    if not chosen:
        first = {why: name for name, why in reversed(skipped.items())}  # a layer for each reason, in their order
        reasons = "; ".join(f"{name or 'the model itself'}: {why}" for why, name in [*reversed(first.items())][:4])
        raise ValueError(
            f"sparsify_: no layer is chosen, of {len(plain)} Linear and Conv2d layers"
            f"{f' ({reasons})' if reasons else ''}; expected at least one: look at `where` and m"
        )
    return {name: plain[name] for name in chosen}, skipped


def _named(pattern: str, plain: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]) -> list[str]:
    found = [name for name in plain if fnmatch.fnmatchcase(name, pattern)]
    if found:
        return found
    if pattern in modules:
        raise ValueError(
            f"sparsify_: {pattern!r} is of type {type(modules[pattern]).__name__}; expected a torch.nn.Linear or "
            "torch.nn.Conv2d that is not sparse yet"
        )
    raise ValueError(f"sparsify_: unknown layer {pattern!r}; {_nearest(pattern, list(plain))}")


def _misfit(layer: nn.Module, config: NMConfig) -> str:
    """Why the layer cannot be n:m, or nothing."""
    axes: list[Axis] = [config.axis, other(config.axis)] if config.recipe.both_axes else [config.axis]
    widest = config.recipe.widest(config.m)
    for axis in axes:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if config.vector > 1 and isinstance(layer, nn.Conv2d):
            return "a convolution, and vectors are for Linear; leave vector out, or the layer"
        channels = weight.shape[DIMENSION[axis]]
        if axis == "out" and isinstance(layer, nn.Conv2d):
            channels //= layer.groups  # a group of weights must not reach across groups of the convolution
        if channels % widest:
            return f"{widest} does not divide its {channels} {axis}put channels; choose another m, or leave it out"
    return ""


def _keep_off_the_fast_path(model: nn.Module, chosen: Mapping[str, nn.Module]) -> list[RemovableHandle]:
    """In evaluation torch's TransformerEncoderLayer reads weights past their layers' forward, unless hooks are on."""
    hooks = []
    for name, layer in chosen.items():
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.TransformerEncoderLayer):
            hooks.append(layer.register_forward_pre_hook(lambda module, inputs: None))
    return hooks


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 1, cutoff=0)
    return f"expected one of {len(known)} names, did you mean {near[0]!r}?" if near else "there is none at all"
