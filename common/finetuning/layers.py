"""Linear, Conv2d and transformers' Conv1D of whose weight chosen entries are trained, and nothing else.

A layer changes its class in place and keeps its weight under its own name. A leaf `chosen` appears beside it among the
parameters: it receives the gradient of the chosen entries, so `clip_grad_norm_(model.parameters(), 1.0)` and
`accelerate` find it, but it holds one number only and stays out of `state_dict`. Of biases and norms, chosen entries
are trained through the parameter itself, whose gradient is then zero elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import masked_grad
from kernels.masked_grad import Selection

__all__ = ["Entries", "kind_of"]

LEAF = "chosen"  # the name of the leaf among the layer's parameters
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class Entries:
    """The chosen entries of one parameter, and the leaf that stands for them in an optimizer.

    name        the parameter's dotted name
    parameter   which holds the values
    chosen      all that was chosen: what an adapter stores
    leaf        its `.grad` is what the training fills
    base        [k] on the CPU, the values of `chosen` before the training, where an adapter keeps them
    tuned       [k] on the CPU, the trained values of `chosen` while the parameter holds others (see `set_scale`)
    """

    def __init__(self, name: str, parameter: nn.Parameter, owners: list[nn.Module], selection: Selection) -> None:
        self.name, self.parameter, self.owners = name, parameter, owners
        self.base: Tensor | None = None
        self.tuned: Tensor | None = None
        self.chosen = self._trained = selection
        self._hook = None
        self._was = parameter.requires_grad
        if parameter.ndim > 1:
            parameter.requires_grad_(False)
            self.leaf = nn.Parameter(masked_grad.handle(selection, self.wide).detach())
            for owner in owners:
                ChosenLayer.put(owner, self)
        else:
            self.leaf = parameter
            parameter.requires_grad_(selection.count > 0)
            self._hook = parameter.register_hook(self._masked) if selection.count else None

    @property
    def weight(self) -> Tensor:
        """The parameter's data as the selection sees it: Conv1D's [I, O] as [O, I]."""
        data = self.parameter.detach()
        return data.t() if self.transposed else data

    @property
    def transposed(self) -> bool:
        """Whether the parameter is stored the other way round."""
        return self.parameter.ndim == 2 and any(isinstance(owner, ChosenConv1D) for owner in self.owners)

    @property
    def selection(self) -> Selection:
        """What is trained now: part of `chosen`, on the parameter's device."""
        if self._trained.device != self.parameter.device:
            same = self._trained is self.chosen
            self._trained = self._trained.to(self.parameter.device)
            self.chosen = self._trained if same else self.chosen.to(self.parameter.device)
        return self._trained

    @property
    def wide(self) -> torch.dtype:
        """Of gradient and moments."""
        return torch.float64 if self.parameter.dtype == torch.float64 else torch.float32

    def gradient(self) -> Tensor | None:
        """[k] of what is trained now, or None where no training reached it."""
        if self.leaf.grad is None or not self.selection.count:
            return None
        return self.leaf.grad if self.leaf is not self.parameter else self.selection.gather(self.leaf.grad)

    def train_only(self, selection: Selection, chosen: Selection | None = None) -> None:
        """From now on these; `chosen`: and that is all that was ever chosen. A gradient there is goes."""
        self._trained = selection.to(self.parameter.device)
        if chosen is not None:
            same = chosen is selection or chosen == selection
            self.chosen = self._trained if same else chosen.to(self.parameter.device)
        self.leaf.grad = None
        if self.leaf is not self.parameter:
            self.follow()
        else:
            self.leaf.requires_grad_(selection.count > 0)
            if selection.count and self._hook is None:
                self._hook = self.leaf.register_hook(self._masked)

    def follow(self) -> None:
        """Bring the leaf where the weight went, with its one number and in its own precision."""
        grad, self.leaf.grad = self.leaf.grad, None
        self.leaf.data = masked_grad.handle(self.selection, self.wide).detach()
        if grad is not None:
            self.leaf.grad = grad.to(self.leaf.data)

    def keep_base(self) -> None:
        """Remember the present values of `chosen`."""
        self.base = self._gather()

    def values(self) -> Tensor:
        """[k] on the CPU: the trained values of `chosen`, whatever the parameter holds now."""
        return self._gather() if self.tuned is None else self.tuned

    def set_scale(self, scale: float) -> None:
        """Put base + scale (trained - base) into the weight; with 0 and 1 bit for bit. Needs `keep_base`."""
        assert self.base is not None
        tuned = self.values()
        wide = self.wide
        change = (tuned.to(wide) - self.base.to(wide)) * scale
        values = tuned if scale == 1 else self.base if scale == 0 else self.base.to(wide) + change
        self.write(values)
        self.tuned = None if scale == 1 else tuned

    def write(self, values: Tensor) -> None:
        """Put values [k] into `chosen`."""
        self._placed().scatter_(self.weight, values.to(self.parameter.device))

    def release(self) -> None:
        """The plain layer back, its weight as it is."""
        for owner in self.owners:
            if isinstance(owner, ChosenLayer):
                owner.take()
        if self._hook is not None:
            self._hook.remove()
        self.parameter.requires_grad_(self._was)
        self.leaf.grad = None

    def _gather(self) -> Tensor:
        return self._placed().gather(self.weight).cpu()

    def _placed(self) -> Selection:
        """`chosen` on the parameter's device."""
        _ = self.selection  # brings both
        return self.chosen

    def _masked(self, grad: Tensor) -> Tensor:
        return grad * self.selection.mask()


class ChosenLayer(nn.Module):
    """What the three kinds share."""

    weight: Tensor
    bias: Tensor | None
    chosen: nn.Parameter
    entries: Entries
    plain: type[nn.Module]

    @staticmethod
    def put(layer: nn.Module, entries: Entries) -> None:
        """Change the layer's class in place."""
        layer.plain = type(layer)  # pyright: ignore[reportArgumentType]  # a class is no module and no tensor
        kind = kind_of(layer)
        assert kind is not None
        layer.__class__ = kind
        layer.entries = entries  # pyright: ignore[reportArgumentType]
        layer.register_parameter(LEAF, entries.leaf)

    def take(self) -> None:
        """Change it back."""
        plain = self.plain
        delattr(self, LEAF)
        del self.entries, self.plain
        self.__class__ = plain  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def trains(self) -> bool:
        """Whether this pass has to bring a gradient of chosen entries."""
        return torch.is_grad_enabled() and self.chosen.requires_grad and self.entries.selection.count > 0

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.entries.follow()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + LEAF, None)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if prefix + LEAF in missing_keys:
            missing_keys.remove(prefix + LEAF)

    def extra_repr(self) -> str:
        entries = self.entries.selection
        return f"{super().extra_repr()}, trains {entries.count} of {self.weight.numel()} entries"


class ChosenLinear(ChosenLayer, nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        if not self.trains:
            return F.linear(input, self.weight, self.bias)
        return masked_grad.linear(input, self.weight, self.chosen, self.entries.selection, self.bias)


class ChosenConv2d(ChosenLayer, nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        if not self.trains:
            return self._conv_forward(input, self.weight, self.bias)
        padding = self.padding
        if isinstance(padding, str) or self.padding_mode != "zeros":
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, mode=mode), (0, 0)
        single = input.ndim == 3
        moves = (self.stride, padding, self.dilation, self.groups)
        out = masked_grad.conv2d(
            input[None] if single else input,
            self.weight,
            self.chosen,
            self.entries.selection,
            self.bias,
            *moves,  # pyright: ignore[reportArgumentType]  # pairs in a Conv2d
        )
        return out[0] if single else out


class ChosenConv1D(ChosenLayer):
    """Of transformers' GPT-2: a Linear whose weight is stored as [I, O]."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.t()
        if not self.trains:
            return F.linear(x, weight, self.bias)
        return masked_grad.linear(x, weight, self.chosen, self.entries.selection, self.bias)


def kind_of(module: nn.Module) -> type[ChosenLayer] | None:
    """The class that trains chosen entries of such a layer, or None. Subclasses may compute something else: none."""
    if type(module) in _KINDS:
        return _KINDS[type(module)]
    named = f"{type(module).__module__}.{type(module).__qualname__}"
    return ChosenConv1D if named == "transformers.pytorch_utils.Conv1D" else None


_KINDS: dict[type[nn.Module], type[ChosenLayer]] = {nn.Linear: ChosenLinear, nn.Conv2d: ChosenConv2d}
