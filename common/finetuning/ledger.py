"""What a training step keeps in memory, by what it is for: exact bytes of every tensor alive, on any device.

    ledger = measure(lambda: train_step(model, optimizer, batch), model, optimizer)
    ledger.peak, ledger.at_peak["transient"]

Counted as in common.metrics.memory. What a library takes inside one operation and gives back is not seen: on CUDA
`allocated` has it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from common.finetuning.layers import ChosenLayer
from common.metrics.memory import StorageTracker

__all__ = ["Category", "Ledger", "Tracker", "measure"]

Category = Literal["weights", "indices", "base", "gradients", "moments", "activations", "transient", "update"]
CATEGORIES: tuple[Category, ...] = get_args(Category)


@dataclass(frozen=True)
class Ledger:
    """Bytes of one training step.

    weights      the model's parameters and buffers
    indices      which entries are trained, of sparse methods
    base         values before the training, where an adapter keeps them; always on the CPU
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
    tracker.enter("base", [layer.entries.base for layer in _layers(model)])
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
    return Ledger(tracker.peak, tracker.at_peak, tracker.peaks, kept, allocated)


class Tracker(StorageTracker):
    """Books of the memory that is alive: storages by category, with peaks.

    What is made in a backward pass is `transient`, else it is what `phase` last said: `activations` at first.
    """

    def __init__(self) -> None:
        super().__init__()
        self._books: dict[int, Category] = {}  # by storage
        self._bytes: dict[Category, int] = dict.fromkeys(CATEGORIES, 0)
        self._phase: Category = "activations"
        self.peaks, self.at_peak = self.now(), self.now()

    def now(self) -> dict[Category, int]:
        """Bytes alive by category."""
        return dict(self._bytes)

    def phase(self, category: Category) -> None:
        """What is made outside of backward passes from now on."""
        self._phase = category

    def enter(self, category: Category, tensors: Iterable[Tensor | None]) -> None:
        """Book the memory of these tensors (None is passed over) in this category, wherever it was before."""
        for storage in (tensor.untyped_storage() for tensor in tensors if tensor is not None):
            before = self._books.get(storage._cdata)
            if before is None:
                self._book(storage, category)
            elif before != category:
                self._bytes[before] -= storage.nbytes()
                self._bytes[category] += storage.nbytes()
                self._books[storage._cdata] = category
        self._look()

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._books:
            self._book(storage, "transient" if torch._C._current_graph_task_id() != -1 else self._phase)
            self._look()

    def _book(self, storage: torch.UntypedStorage, category: Category) -> None:
        key, size = storage._cdata, storage.nbytes()

        def freed(_: Any) -> None:
            self._bytes[self._books.pop(key)] -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
        self._books[key] = category
        self._bytes[category] += size

    def _look(self) -> None:
        for category, size in self._bytes.items():
            self.peaks[category] = max(self.peaks[category], size)
        self.live = sum(self._bytes.values())
        if self.live > self.peak:
            self.peak, self.at_peak = self.live, self.now()


def _layers(model: nn.Module) -> list[ChosenLayer]:
    return [module for module in model.modules() if isinstance(module, ChosenLayer)]


def _indices(model: nn.Module) -> list[Tensor]:
    """Of the layers that train chosen entries."""
    chosen = [s for layer in _layers(model) for s in (layer.entries.selection, layer.entries.chosen)]
    return [tensor for selection in chosen for tensor in (selection.offsets, selection.starts)]


def _moments(optimizer: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, Tensor)]
