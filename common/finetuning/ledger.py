"""What a training step keeps in memory, by what it is for: exact bytes of every tensor alive, on any device.

    ledger = measure(lambda: train_step(model, optimizer, batch), model, optimizer)
    ledger.peak, ledger.at_peak["transient"]

Every operation's results are seen and dropped from the books when the last tensor on their memory dies, wherever it is
held (by autograd, too). Our own ops are looked into. What a library takes inside one operation and gives back is not
seen: on CUDA `allocated` has it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.finetuning.layers import ChosenLayer

__all__ = ["Category", "Ledger", "Tracker", "measure"]

Category = Literal["weights", "indices", "gradients", "moments", "activations", "transient", "update"]
CATEGORIES: tuple[Category, ...] = get_args(Category)
OWN = "resparse"  # the namespace of our ops


@dataclass(frozen=True)
class Ledger:
    """Bytes of one training step.

    weights      the model's parameters and buffers
    indices      which entries are trained, of sparse methods
    gradients    persistent: in `.grad`, until the optimizer's step
    moments      the optimizer's state
    activations  made in the forward pass and alive, for the backward pass or the forward's own use
    transient    made in the backward pass and no `.grad`: gradients of activations, weight gradients on their way
    update       made in the optimizer's step

    peak       largest sum of all at one time
    at_peak    the parts of this sum
    peaks      each part's own largest
    kept       what is there between steps
    allocated  on CUDA: most bytes that the allocator gave out in the step, else None
    """

    peak: int
    at_peak: dict[Category, int]
    peaks: dict[Category, int]
    kept: dict[Category, int]
    allocated: int | None

    @property
    def extra(self) -> int:
        """Bytes at the peak beside weights and activations."""
        return self.peak - self.at_peak["weights"] - self.at_peak["activations"]


def measure(step: Callable[[], Any], model: nn.Module, optimizer: Any) -> Ledger:
    """The ledger of one training step.

    step       runs forward, backward, the optimizer's step and zero_grad. It is called twice: the second one is
               measured, so that moments are there. Tensors that it makes before the backward pass count as activations
    optimizer  any torch.optim.Optimizer

    Raises RuntimeError where the step makes no gradient: there is then nothing to tell apart.
    """
    step()
    device = next(model.parameters()).device
    tracker = Tracker()
    tracker.enter("weights", [*model.parameters(), *model.buffers()])
    tracker.enter("indices", _indices(model))
    tracker.enter("moments", _moments(optimizer))
    tracker.enter("gradients", [p.grad for p in model.parameters() if p.grad is not None])
    kept = tracker.now()
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda p: tracker.enter("gradients", [p.grad]))
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    hooks += [
        optimizer.register_step_pre_hook(lambda *_: tracker.phase("update")),
        optimizer.register_step_post_hook(lambda *_: tracker.phase("activations")),
    ]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    try:
        with tracker:
            step()
    finally:
        for hook in hooks:
            hook.remove()
    if not tracker.peaks["gradients"]:
        raise RuntimeError("ledger.measure: the step made no gradient; expected one that calls loss.backward()")
    allocated = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Ledger(sum(tracker.at_peak.values()), tracker.at_peak, tracker.peaks, kept, allocated)


class Tracker(TorchDispatchMode):
    """Books of the memory that is alive while it is entered: storages by category, with peaks.

    Results made in a backward pass are `transient`, others what `phase` last said: `activations` at first.
    """

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, tuple[int, Category, weakref.ref]] = {}
        self._bytes: dict[Category, int] = dict.fromkeys(CATEGORIES, 0)
        self._phase: Category = "activations"
        self.peaks = self.now()
        self.at_peak = self.now()

    def now(self) -> dict[Category, int]:
        """Bytes alive by category."""
        return dict(self._bytes)

    def phase(self, category: Category) -> None:
        """What results outside of backward passes are from now on."""
        self._phase = category

    def enter(self, category: Category, tensors: Iterable[Any]) -> None:
        """Book the memory of these tensors (None is passed over) in this category, wherever it was before."""
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._book(tensor, category, again=True)
        self._look()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == OWN:
            with self:  # what the op makes inside is of interest, too
                device = next(leaf.device.type for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
                key = torch._C.DispatchKey.CUDA if device == "cuda" else torch._C.DispatchKey.CPU
                out = func.redispatch(torch._C.DispatchKeySet(key), *args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        category: Category = "transient" if torch._C._current_graph_task_id() != -1 else self._phase
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._book(leaf, category)
        self._look()
        return out

    def _book(self, tensor: Tensor, category: Category, again: bool = False) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._live.get(key)
        if known is not None and known[2]() is not None:
            if not again or known[1] == category:
                return
            self._bytes[known[1]] -= known[0]
        elif known is not None:  # its memory died, and the callback has yet to come
            self._bytes[known[1]] -= known[0]
        size = storage.nbytes()
        self._live[key] = (size, category, weakref.ref(storage, lambda dead: self._drop(key, dead)))
        self._bytes[category] += size

    def _drop(self, key: int, dead: weakref.ref) -> None:
        known = self._live.get(key)
        if known is not None and known[2] is dead:
            del self._live[key]
            self._bytes[known[1]] -= known[0]

    def _look(self) -> None:
        for category, size in self._bytes.items():
            self.peaks[category] = max(self.peaks[category], size)
        if sum(self._bytes.values()) > sum(self.at_peak.values()):
            self.at_peak = self.now()


def _indices(model: nn.Module) -> list[Tensor]:
    """Of the layers that train chosen entries."""
    layers = [module for module in model.modules() if isinstance(module, ChosenLayer)]
    chosen = [s for layer in layers for s in (layer.entries.selection, layer.entries.chosen)]
    return [tensor for selection in chosen for tensor in (selection.offsets, selection.starts)]


def _moments(optimizer: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, Tensor)]
