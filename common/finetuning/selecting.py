"""Which parameters take part, and which of their entries are chosen: one rule over all of them together."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common import seeds
from common.finetuning.config import SaraConfig, Select
from common.finetuning.layers import DTYPES, ChosenConv1D, ChosenLayer, Entries, kind_of
from kernels.masked_grad import Selection

__all__ = ["Sparse", "Target", "attach", "choose", "select", "targets"]

BITS = 16  # of a key that are looked at in one pass


@dataclass(frozen=True)
class Target:
    """A parameter of which entries can be trained, with the modules that hold it."""

    name: str
    parameter: nn.Parameter
    owners: tuple[nn.Module, ...]

    @property
    def weight(self) -> Tensor:
        """As a selection sees it, [O, ...]: see `Entries.weight`."""
        data = self.parameter.detach()
        return data.t() if self.transposed else data

    @property
    def transposed(self) -> bool:
        """Whether the parameter is stored the other way round."""
        return self.parameter.ndim == 2 and any(kind_of(owner) is ChosenConv1D for owner in self.owners)


class Sparse:
    """A model of which chosen entries are trained and all else is frozen.

    entries  of every target, those without a chosen entry included
    theta    largest magnitude that was chosen by `smallest` (as an open bound), smallest one by `largest`, else nan
    """

    def __init__(self, model: nn.Module, entries: list[Entries], theta: float, was: dict[nn.Parameter, bool]) -> None:
        self.model, self.entries, self.theta, self._was = model, entries, theta, was

    @property
    def count(self) -> int:
        """Entries that are trained now."""
        return sum(entries.selection.count for entries in self.entries)

    @property
    def total(self) -> int:
        """Entries of all targets."""
        return sum(entries.parameter.numel() for entries in self.entries)

    def release(self) -> None:
        """Give the model its plain layers back, with the values they have; what was frozen before stays frozen."""
        for entries in self.entries:
            entries.release()
        for parameter, wanted in self._was.items():
            parameter.requires_grad_(wanted)
        self.entries = []


def select(model: nn.Module, config: SaraConfig) -> Sparse:
    """Choose entries by the config and make the model train these alone, in place.

    Raises ValueError where the config matches no parameter, chooses nothing or everything, or the model is such a one
    already; TypeError for weights of another dtype than float32, bfloat16 and float64. The model is then untouched.
    """
    found = targets(model, config.target_modules, vectors=config.vectors)
    weights = {target.name: target.weight for target in found}
    if config.threshold is not None:
        chosen, theta = below(weights, config.threshold, config.select), config.threshold
    else:
        assert config.fraction is not None
        count = round(config.fraction * sum(weight.numel() for weight in weights.values()))
        chosen, theta = choose(weights, count, config.select, config.seed)
    return attach(model, found, chosen, theta)


def attach(
    model: nn.Module, found: Sequence[Target], chosen: Mapping[str, Selection], theta: float = math.nan
) -> Sparse:
    """Make the model train these entries alone, in place; targets that are not named train none."""
    was = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    nothing = torch.zeros(0, dtype=torch.int64)
    entries = []
    for target in found:
        shape = tuple(target.weight.shape)
        selection = chosen.get(target.name) or Selection.from_positions(nothing.to(target.parameter.device), shape)
        entries.append(Entries(target.name, target.parameter, list(target.owners), selection))
    return Sparse(model, entries, theta, was)


def targets(model: nn.Module, modules: Sequence[str] | str | None = None, *, vectors: bool = True) -> list[Target]:
    """The parameters of which entries can be trained, in the model's order.

    Matrices are weights of Linear, Conv2d and transformers' Conv1D. One that another kind of module shares, such as an
    embedding tied to the head, is none. `modules`, `vectors` as in SaraConfig.

    Raises ValueError for a name or expression that matches none of them, or where there are none; TypeError for dtypes.
    """
    if any(isinstance(module, ChosenLayer) for module in model.modules()):
        raise ValueError(
            "finetuning: this model trains chosen entries already; expected a plain one: go on with it, or unload() it"
        )
    owners: dict[nn.Parameter, list[tuple[str, str, nn.Module]]] = {}
    for module_name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            owners.setdefault(parameter, []).append((module_name, own, module))
    served = {parameter: held for parameter, held in owners.items() if _served(parameter, held, vectors)}
    wanted = _wanted({name for held in served.values() for name, *_ in held}, modules, model)
    found = []
    for parameter, held in served.items():
        if any(name in wanted for name, *_ in held):
            name, own, _ = held[0]
            full = f"{name}.{own}" if name else own
            if parameter.dtype not in DTYPES:
                raise TypeError(
                    f"finetuning: {full!r} is of {parameter.dtype}; expected float32, bfloat16 or float64: load the "
                    "model with torch_dtype=torch.bfloat16, or convert it"
                )
            found.append(Target(full, parameter, tuple(module for *_, module in held)))
    if not found:
        raise ValueError("finetuning: got a model without Linear, Conv2d or Conv1D layers; expected at least one")
    return found


def choose(
    weights: Mapping[str, Tensor], count: int, how: Select, seed: int = 0, scores: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Selection], float]:
    """Exactly `count` entries of all weights together; among equals the first ones.

    scores  by what is chosen instead of the magnitude, of the weights' shapes, >= 0

    Returns the selections by name (those that are not empty) and theta (see `Sparse`). It never holds more than one
    weight's keys at a time. Raises ValueError for a count that selects nothing or everything, or weights that are not
    finite.
    """
    total = sum(weight.numel() for weight in weights.values())
    if not 0 < count < total:
        raise ValueError(f"finetuning: {count} of {total} entries would be chosen; expected some and not all of them")
    source = weights if scores is None else scores
    for name, values in source.items():
        if not bool(values.isfinite().all()):
            raise ValueError(f"finetuning: {name!r} is not finite everywhere; expected a sound model; load it again")

    def keys() -> Iterator[tuple[str, Tensor]]:
        for index, (name, values) in enumerate(source.items()):
            yield name, _keys(values, how, wide, seeds.generator(seed, "entries", index))

    wide = any(values.dtype == torch.float64 for values in source.values())
    bound, short = _smallest(keys, count, 64 if wide else 32)
    chosen, extreme = {}, []
    for name, key in keys():
        mask = key < bound
        equal = (key == bound).nonzero()[:, 0][:short]
        short -= len(equal)
        mask[equal] = True
        if bool(mask.any()):
            chosen[name] = Selection.from_mask(mask.view(source[name].shape))
            magnitude = source[name].abs().reshape(-1)[mask]
            extreme.append(float(magnitude.max() if how == "smallest" else magnitude.min()))
    if how == "random":
        return chosen, math.nan
    return chosen, math.nextafter(max(extreme), math.inf) if how == "smallest" else min(extreme)


def below(weights: Mapping[str, Tensor], theta: float, how: Select) -> dict[str, Selection]:
    """The entries with |p| < theta (`smallest`) or > theta (`largest`).

    Raises ValueError where these are none or all, and says which theta takes a hundredth.
    """
    masks = {name: w.abs() < theta if how == "smallest" else w.abs() > theta for name, w in weights.items()}
    chosen = {name: Selection.from_mask(mask) for name, mask in masks.items() if bool(mask.any())}
    count, total = sum(selection.count for selection in chosen.values()), sum(w.numel() for w in weights.values())
    if count in (0, total):
        sound = {name: weight.nan_to_num(0, 0, 0) for name, weight in weights.items()}
        _, usual = choose(sound, max(1, total // 100), how)
        raise ValueError(
            f"finetuning: threshold={theta:g} selects {'nothing' if not count else 'everything'} of {total} entries by "
            f"select={how!r}; expected some of them: {usual:.3g} takes 1%, or give fraction=0.01"
        )
    return chosen


def _served(parameter: nn.Parameter, held: Sequence[tuple[str, str, nn.Module]], vectors: bool) -> bool:
    if not parameter.is_floating_point() or not parameter.numel():
        return False
    if parameter.ndim < 2:
        return vectors and parameter.ndim == 1
    return all(own == "weight" and kind_of(module) is not None for _, own, module in held)


def _wanted(served: set[str], modules: Sequence[str] | str | None, model: nn.Module) -> set[str]:
    """Names of the modules that are meant."""
    if modules is None:
        return served
    if isinstance(modules, str):
        try:
            chosen = {name for name in served if re.fullmatch(modules, name)}
        except re.error as error:
            raise ValueError(f"finetuning: target_modules={modules!r} is no regular expression: {error}") from None
        if not chosen:
            raise ValueError(
                f"finetuning: target_modules={modules!r} matches none of {len(served)} modules, such as "
                f"{sorted(served)[0]!r}; expected an expression of the whole name, e.g. '.*to_q'"
            )
        return chosen
    chosen = set()
    for key in modules:
        ending = {name for name in served if name == key or name.endswith(f".{key}")}
        if not ending:
            endings = sorted({name.rpartition(".")[2] for name in served} | served)
            near = difflib.get_close_matches(key, endings, 1, cutoff=0)
            there = any(name == key or name.endswith(f".{key}") for name, _ in model.named_modules())
            what = "is of another kind than Linear, Conv2d and Conv1D" if there else "matches no module"
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"finetuning: target_modules key {key!r} {what}{hint}")
        chosen |= ending
    return chosen


def _keys(values: Tensor, how: Select, wide: bool, draw: torch.Generator) -> Tensor:
    """int32 (wide: int64) [all entries], >= 0: the smaller, the sooner chosen."""
    if how == "random":
        return torch.randint(2**31 - 1, (values.numel(),), generator=draw, dtype=torch.int32).to(values.device)
    # bits of a non-negative float are ordered as it is
    bits = values.abs().to(torch.float64 if wide else torch.float32).reshape(-1).contiguous()
    bits = bits.view(torch.int64 if wide else torch.int32)
    return torch.iinfo(bits.dtype).max - bits if how == "largest" else bits


def _smallest(keys: Callable[[], Iterator[tuple[str, Tensor]]], count: int, bits: int) -> tuple[int, int]:
    """The count-th smallest key, and how many of those equal to it belong to the count: 16 bits of it in each pass."""
    bound, below = 0, 0  # the leading bits found so far; keys smaller than these
    for shift in range(bits - BITS, -1, -BITS):
        bins = torch.zeros(2**BITS, dtype=torch.int64)
        for _, key in keys():
            there = key.long()
            there = there[(there >> (shift + BITS)) == (bound >> (shift + BITS))] if shift + BITS < bits else there
            bins += torch.bincount((there >> shift) & (2**BITS - 1), minlength=2**BITS).cpu()
        reached = bins.cumsum(0) + below
        place = int((reached >= count).nonzero()[0, 0])
        below = int(reached[place - 1]) if place else below
        bound |= place << shift
    return bound, count - below
