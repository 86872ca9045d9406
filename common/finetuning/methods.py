"""Ways to fine-tune, under one interface, at equal numbers of trained parameters.

attached = attach(model, "lora", budget=20_000, lr=1e-3)
for batch in data:
    loss(model, batch).backward(); attached.optimizer.step(); attached.optimizer.zero_grad()
attached = attached.advance() if attached.advance else attached     # lt-sft: the second of its two trainings

full          every parameter
sara          the entries of least magnitude of all weights together (arXiv 2409.06633)
largest, random       the same of greatest magnitude, or drawn: the paper's ablations
super-tuning  of each weight by itself those of greatest magnitude (arXiv 2607.09287)
shira         of each weight by itself random ones (arXiv 2406.13175)
lt-sft        those that full fine-tuning moved most, then rewound and trained alone (arXiv 2110.07560)
lora          arXiv 2106.09685, convolutions too; dora: arXiv 2402.09353, through peft
difffit       biases, norms and a scale behind every layer (arXiv 2304.06648); it has no budget
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common import seeds
from common.finetuning.config import Select
from common.finetuning.optimizer import SaraAdamW
from common.finetuning.selecting import Sparse, Target, choose, targets
from common.finetuning.selecting import attach as train_entries
from common.models import lora

__all__ = ["METHODS", "Attached", "attach", "ranks"]

WITHOUT_BUDGET = ("full", "difffit")


@dataclass
class Attached:
    """A model made ready to be fine-tuned by one method, in place.

    trainable  numbers that are trained: entries, or parameters
    advance    None; or to be called after the training: it makes the model ready for the method's next one
    """

    method: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    trainable: int
    advance: Callable[[], Attached] | None = None


@dataclass(frozen=True)
class _Wish:
    """What `attach` was asked for."""

    model: nn.Module
    budget: int
    modules: Sequence[str] | str | None
    lr: float
    weight_decay: float
    seed: int
    options: Mapping[str, Any]

    def adamw(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay, **self.options)

    def entries(self, sparse: Sparse) -> torch.optim.Optimizer:
        return SaraAdamW(sparse, lr=self.lr, weight_decay=self.weight_decay, **self.options)


def attach(
    model: nn.Module,
    method: str,
    *,
    lr: float,
    budget: int | None = None,
    target_modules: Sequence[str] | str | None = None,
    weight_decay: float = 0.01,
    seed: int = 0,
    **options: Any,
) -> Attached:
    """Make a plain model ready for a method, in place.

    budget          numbers to train. Methods of entries meet it exactly; those of ranks stay below it by less than
                    the cheapest layer's next rank; `full` and `difffit` take none
    target_modules  as in SaraConfig
    seed            of what is drawn
    options         more of the optimizer's arguments: of SaraAdamW for methods of entries, else of torch.optim.AdamW

    Raises ValueError for an unknown method, a budget that is missing, too small or too large, and as `targets`.
    """
    if method not in METHODS:
        raise ValueError(f"finetuning.attach: unknown method {method!r}; expected one of {', '.join(METHODS)}")
    if (budget is None) != (method in WITHOUT_BUDGET):
        raise ValueError(
            f"finetuning.attach: got budget={budget} for {method!r}; expected "
            f"{'None: it trains what it trains' if budget is not None else 'a number of parameters, e.g. 20_000'}"
        )
    made, trainable, *advance = METHODS[method](
        _Wish(model, budget or 0, target_modules, lr, weight_decay, seed, options)
    )
    return Attached(method, model, made, trainable, *advance)


def ranks(layers: Mapping[str, nn.Linear | nn.Conv2d], budget: int, *, magnitude: bool = False) -> dict[str, int]:
    """Ranks whose low-rank parts together come to `budget` or a little less; layers without one are left out.

    A rank of a layer costs its inputs (times the window) plus its outputs; magnitude: and once its outputs, as in DoRA.
    All layers get the same rank; what is left goes where one rank stands for the most weights.

    Raises ValueError where the budget buys no rank at all.
    """
    sizes = {name: (layer.weight.shape[0], layer.weight[0].numel()) for name, layer in layers.items()}
    order = sorted(sizes, key=lambda name: -math.prod(sizes[name]) / sum(sizes[name]))
    found, left, grown = dict.fromkeys(order, 0), budget, True
    while grown:
        grown = False
        for name in order:
            cost = sum(sizes[name]) + (sizes[name][0] if magnitude and not found[name] else 0)
            if cost <= left and found[name] < min(sizes[name]):
                found[name], left, grown = found[name] + 1, left - cost, True
    if left == budget:
        cheapest = min(sum(size) for size in sizes.values())
        raise ValueError(f"finetuning: a budget of {budget} buys no rank; expected {cheapest} or more")
    return {name: found[name] for name in layers if found[name]}


def _full(wish: _Wish) -> tuple[torch.optim.Optimizer, int]:
    """All parameters; of the modules that are meant, where they are named."""
    if wish.modules is None:
        trained = list(wish.model.parameters())
    else:
        trained = [target.parameter for target in targets(wish.model, wish.modules)]
    _train_only(wish.model, trained)
    return wish.adamw(trained), _count(trained)


def _by_magnitude(how: Select) -> Callable[[_Wish], tuple[torch.optim.Optimizer, int]]:
    """Entries chosen over all weights together."""

    def attached(wish: _Wish) -> tuple[torch.optim.Optimizer, int]:
        found = targets(wish.model, wish.modules)
        chosen, theta = choose({target.name: target.weight for target in found}, wish.budget, how, wish.seed)
        sparse = train_entries(wish.model, found, chosen, theta if how == "smallest" else math.nan)
        return wish.entries(sparse), sparse.count

    return attached


def _by_matrix(how: Select) -> Callable[[_Wish], tuple[torch.optim.Optimizer, int]]:
    """Entries chosen of each matrix by itself, as many as its size has a share in."""

    def attached(wish: _Wish) -> tuple[torch.optim.Optimizer, int]:
        found = targets(wish.model, wish.modules, vectors=False)
        total, done, seen = sum(target.parameter.numel() for target in found), 0, 0
        if not 0 < wish.budget < total:
            raise ValueError(f"finetuning.attach: got budget={wish.budget} of {total} weights; expected some, not all")
        chosen = {}
        for target in found:
            seen += target.parameter.numel()
            count = wish.budget * seen // total - done  # rounded so that the sum is the budget
            done += count
            if count:
                weights = {target.name: target.weight}
                chosen |= choose(weights, count, how, seeds.derived(wish.seed, target.name))[0]
        sparse = train_entries(wish.model, found, chosen)
        return wish.entries(sparse), sparse.count

    return attached


def _lt_sft(wish: _Wish) -> tuple[torch.optim.Optimizer, int, Callable[[], Attached]]:
    """Ansell et al. 2022: train all, keep the places that moved most, go back, train these."""
    found = targets(wish.model, wish.modules)
    before = {target.name: target.parameter.detach().cpu().clone() for target in found}
    was = {parameter: parameter.requires_grad for parameter in wish.model.parameters()}
    trained = [target.parameter for target in found]
    _train_only(wish.model, trained)

    def advance() -> Attached:
        moved = {t.name: (t.weight.cpu() - _seen(t, before[t.name])).abs() for t in found}
        with torch.no_grad():
            for target in found:
                target.parameter.copy_(before[target.name])
                target.parameter.grad = None
        chosen, _ = choose({t.name: t.weight.cpu() for t in found}, wish.budget, "largest", scores=moved)
        for parameter, wanted in was.items():
            parameter.requires_grad_(wanted)
        placed = {name: selection.to(trained[0].device) for name, selection in chosen.items()}
        sparse = train_entries(wish.model, found, placed)
        return Attached("lt-sft", wish.model, wish.entries(sparse), sparse.count)

    return torch.optim.AdamW(trained, lr=wish.lr, weight_decay=wish.weight_decay), _count(trained), advance


def _lora(wish: _Wish) -> tuple[torch.optim.Optimizer, int]:
    found = ranks(_plain_layers(wish), wish.budget)
    trained = []
    with seeds.isolated(f"lora {wish.seed}"):
        for rank in sorted(set(found.values())):
            trained += lora.add(wish.model, lambda name, rank=rank: found.get(name) == rank, rank=rank)
    _train_only(wish.model, trained)
    return wish.adamw(trained), _count(trained)


def _dora(wish: _Wish) -> tuple[torch.optim.Optimizer, int]:
    from peft import LoraConfig, inject_adapter_in_model

    found = ranks(_plain_layers(wish), wish.budget, magnitude=True)
    names = {re.escape(name): rank for name, rank in found.items()}
    config = LoraConfig(use_dora=True, target_modules="|".join(names), rank_pattern=names)
    config.alpha_pattern = dict(names)  # alpha = rank: the change has factor 1
    with seeds.isolated(f"dora {wish.seed}"):
        inject_adapter_in_model(config, wish.model)
    trained = [parameter for name, parameter in wish.model.named_parameters() if "lora_" in name]
    _train_only(wish.model, trained)
    return wish.adamw(trained), _count(trained)


def _difffit(wish: _Wish) -> tuple[torch.optim.Optimizer, int]:
    """The paper has scales behind attention and MLP of a DiT's blocks; for any network they are behind each layer."""
    trained = [target.parameter for target in targets(wish.model, wish.modules) if target.parameter.ndim == 1]
    for layer in _plain_layers(wish, grouped=True).values():
        scale = nn.Parameter(torch.ones((), dtype=layer.weight.dtype, device=layer.weight.device))
        layer.register_parameter("scale", scale)
        layer.register_forward_hook(_scaled)
        trained.append(scale)
    _train_only(wish.model, trained)
    return wish.adamw(trained), _count(trained)


def _scaled(layer: nn.Module, _: Any, out: Tensor) -> Tensor:
    return out * layer.get_parameter("scale")


METHODS: dict[str, Callable[[_Wish], tuple]] = {
    "full": _full,
    "sara": _by_magnitude("smallest"),
    "largest": _by_magnitude("largest"),
    "random": _by_magnitude("random"),
    "super-tuning": _by_matrix("largest"),
    "shira": _by_matrix("random"),
    "lt-sft": _lt_sft,
    "lora": _lora,
    "dora": _dora,
    "difffit": _difffit,
}


def _plain_layers(wish: _Wish, *, grouped: bool = False) -> dict[str, nn.Linear | nn.Conv2d]:
    """Linear and Conv2d layers that are meant, by name; convolutions in groups only where they can be served."""
    names = [target.name.rpartition(".")[0] for target in targets(wish.model, wish.modules, vectors=False)]
    layers = {name: wish.model.get_submodule(name) for name in names}
    kept = {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, nn.Linear | nn.Conv2d) and (grouped or getattr(layer, "groups", 1) == 1)
    }
    if not kept:
        raise ValueError("finetuning.attach: got no Linear or ungrouped Conv2d layer; expected one for this method")
    return kept


def _train_only(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)


def _count(parameters: Sequence[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _seen(target: Target, values: Tensor) -> Tensor:
    """Values of a parameter as its selection sees it."""
    return values.t() if target.transposed else values
