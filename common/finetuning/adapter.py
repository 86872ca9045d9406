"""A model with a sparse adapter, in peft's manner: train, scale, merge, take off, save, load.

    model = get_peft_model(unet, SaraConfig(fraction=0.02))
    optimizer = SaraAdamW(model)
    ...
    model.save_pretrained("barbie")
    SaraModel.from_pretrained(unet, "barbie").set_scale(0.8)

It has peft's names but is no tuner of peft: these choose layer by layer and put a wrapper with weights of its own
around each, which renames the state dict and builds the composed weight in every forward; and the list of peft's
methods is closed. Here entries are chosen over all layers at once and live in the weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.finetuning.adapter_file import WEIGHTS, Adapter, AdapterFileError, Part, base_hash
from common.finetuning.config import SaraConfig
from common.finetuning.selecting import Sparse, Target, attach, select, targets
from kernels.masked_grad import Selection

__all__ = ["SaraModel", "add_weighted", "get_peft_model"]


def get_peft_model(model: nn.Module, config: SaraConfig) -> SaraModel:
    """Choose entries of the model by the config and make them an adapter: the model is changed in place.

    The values they have now are kept (on the CPU, in the weight's dtype) as the base. Raises as `select` does.
    """
    return SaraModel(model, config, select(model, config))


class SaraModel(nn.Module):
    """A model and its sparse adapter; calls and attributes go through to the model.

    model        with chosen entries of its weights trained
    peft_config  as they were chosen
    sparse       the chosen entries
    scale        by which the difference to the base is in the weights now
    """

    def __init__(self, model: nn.Module, config: SaraConfig, sparse: Sparse) -> None:
        super().__init__()
        self.model, self.peft_config, self.sparse, self.scale = model, config, sparse, 1.0
        for entries in sparse.entries:
            entries.keep_base()

    @classmethod
    def from_pretrained(cls, model: nn.Module, folder: str | Path, *, is_trainable: bool = False) -> SaraModel:
        """Put a saved adapter on its base, in place; the trained weights are what they were, bit for bit.

        is_trainable  False: for inference alone, nothing requires a gradient

        Raises AdapterFileError for a folder without a readable adapter, or a model that is not its base. The model is
        then untouched.
        """
        made = add_weighted(model, [folder], [1.0])
        if not is_trainable:
            made.requires_grad_(False)
        return made

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def print_trainable_parameters(self) -> None:
        """As peft does it; entries that are trained count, leaves that stand for them do not."""
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Trained entries, and all parameters of the model."""
        leaves = {e.leaf for e in self.sparse.entries if e.leaf is not e.parameter}
        return self.sparse.count, sum(p.numel() for p in self.model.parameters() if p not in leaves)

    def set_scale(self, scale: float) -> None:
        """Use base + scale (trained - base) from now on: 0 is the base and 1 what was trained, both bit for bit.

        Raises ValueError for a scale that is not finite. A training goes on at scale 1 only.
        """
        if not abs(scale) < float("inf"):
            raise ValueError(f"set_scale: got {scale}; expected a finite number, such as 0.8")
        for entries in self.sparse.entries:
            entries.set_scale(scale)
        self.scale = float(scale)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the model is its base; afterwards what it was. Not between a forward and its backward pass."""
        scale = self.scale
        self.set_scale(0)
        try:
            yield
        finally:
            self.set_scale(scale)

    def merge(self) -> nn.Module:
        """The plain model with the adapter at its present scale in the weights; this object is then of no use."""
        self.sparse.release()
        return self.model

    def unload(self) -> nn.Module:
        """The plain model as it was before, bit for bit; this object is then of no use."""
        self.set_scale(0)
        return self.merge()

    def adapter(self, dtype: torch.dtype | None = None) -> Adapter:
        """What was trained, apart from the model; at whatever scale it is used now.

        dtype  None: new values in the weight's own; torch.float16 or bfloat16: differences to the base, rounded to it

        Raises ValueError for another dtype, or differences that it cannot hold.
        """
        if dtype not in (None, torch.float16, torch.bfloat16):
            raise ValueError(f"SaraModel: got dtype {dtype}; expected None, torch.float16 or torch.bfloat16")
        parts = {}
        for entries in self.sparse.entries:
            if not entries.chosen.count:
                continue
            assert entries.base is not None
            base = entries.weight.cpu().clone(memory_format=torch.contiguous_format)
            selection = entries.chosen.to("cpu")
            selection.scatter_(base, entries.base)
            part = Part(selection, entries.values(), entries.parameter.dtype, base_hash(base))
            if dtype is not None and dtype.itemsize < part.dtype.itemsize:
                part = _rounded(entries.name, part, entries.base, dtype)
            parts[entries.name] = part
        return Adapter(self.peft_config, parts, self.sparse.theta)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write the adapter into a folder: see adapter_file.py; `dtype` as in `adapter`.

        Raises OSError with one line where it cannot be written; model and folder are then what they were.
        """
        self.adapter(dtype).save(Path(folder))


def add_weighted(model: nn.Module, folders: Sequence[str | Path], weights: Sequence[float]) -> SaraModel:
    """Put several adapters of one base on it: base + sum of weight x difference, as an adapter of the first's config.

    The result can be trained, scaled and saved like any other. One adapter with weight 1 comes back bit for bit.

    Raises ValueError where numbers do not match, AdapterFileError as `SaraModel.from_pretrained`; the model is then
    untouched.
    """
    if not folders or len(folders) != len(weights):
        raise ValueError(f"add_weighted: got {len(folders)} adapters and {len(weights)} weights; expected one each")
    adapters = [Adapter.load(Path(folder)) for folder in folders]
    found = {target.name: target for target in targets(model)}
    for folder, adapter in zip(folders, adapters, strict=True):
        _require_base(Path(folder), adapter, found)
    names = list(dict.fromkeys(name for adapter in adapters for name in adapter.parts))
    parts = {
        name: [(a.parts[name], w) for a, w in zip(adapters, weights, strict=True) if name in a.parts] for name in names
    }
    united = {name: _united([part.selection for part, _ in held]) for name, held in parts.items()}
    placed = {name: selection.to(found[name].parameter.device) for name, selection in united.items()}
    config = adapters[0].config
    wanted = {target.name for target in targets(model, config.target_modules, vectors=config.vectors)}.union(names)
    chosen = [target for name, target in found.items() if name in wanted]
    made = SaraModel(model, config, attach(model, chosen, placed, adapters[0].theta))
    for entries in made.sparse.entries:
        if entries.name in parts:
            assert entries.base is not None
            entries.write(_sum(united[entries.name], entries.base, parts[entries.name]))
    return made


def _require_base(folder: Path, adapter: Adapter, found: dict[str, Target]) -> None:
    for name, part in adapter.parts.items():
        if name not in found:
            raise AdapterFileError(
                f"{folder / WEIGHTS} changes {name!r}, which this model lacks; expected the one it was trained on"
            )
        weight = found[name].weight
        shape = tuple(weight.shape)
        if shape != part.selection.shape or weight.dtype != part.dtype:
            raise AdapterFileError(
                f"{folder / WEIGHTS}: {name!r} is {part.dtype} {list(part.selection.shape)} in the adapter's base and "
                f"{weight.dtype} {list(shape)} in this model; expected the same: load the base in {part.dtype}, and "
                "convert the model after merge()"
            )
        if base_hash(weight) != part.base:
            raise AdapterFileError(
                f"{folder / WEIGHTS} was trained on another base: {name!r} differs from this model's; expected the "
                "same weights, untouched: load the base as it was published, before any other adapter is merged"
            )


def _rounded(name: str, part: Part, base: Tensor, dtype: torch.dtype) -> Part:
    """The part with differences in a narrower dtype."""
    stored = part.change(base).to(dtype)
    if not bool(stored.isfinite().all()):
        raise ValueError(
            f"SaraModel: a difference of {name!r} is too large for {dtype}; expected dtype=None or bfloat16"
        )
    return Part(part.selection, stored, part.dtype, part.base, differences=True)


def _united(selections: list[Selection]) -> Selection:
    if len(selections) == 1:
        return selections[0]
    places = torch.cat([selection.positions() for selection in selections]).unique()
    return Selection.from_positions(places, selections[0].shape)


def _sum(united: Selection, base: Tensor, parts: list[tuple[Part, float]]) -> Tensor:
    """[k] values of the united entries whose base is [k]."""
    if len(parts) == 1 and parts[0][1] == 1 and parts[0][0].selection.count == united.count:
        return parts[0][0].values(base)
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    dense = torch.zeros(united.shape, dtype=wide)
    bases = united.scatter_(torch.zeros(united.shape, dtype=base.dtype), base)
    total = base.to(wide)
    for part, weight in parts:
        change = part.change(part.selection.gather(bases))
        total = total + weight * united.gather(part.selection.scatter_(dense.zero_(), change))
    return total.to(base.dtype)
