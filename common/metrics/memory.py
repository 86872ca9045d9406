"""How many bytes of tensors a piece of code holds at its peak, on any device, from inside torch.

CPUs have no counters of an allocator, and resident memory is blurred by caches. What torch's operators make is seen
here instead: each storage is counted from the operator that made it until nothing refers to it any more. What our own
operators (`kernels`) make inside themselves counts, too; the work space of torch's own (a BLAS, a convolution) is not
seen.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["StorageTracker"]


class StorageTracker(TorchDispatchMode):
    """Counts bytes of the storages that are made while it is active.

        with StorageTracker() as tracker:
            step()
        tracker.peak, tracker.live

    Attributes:
        live: bytes that were made inside and are still there.
        peak: the most of `live` so far; what existed before is not in it.

    Tensors that come from outside are no news, whatever is done to them; a storage that is resized keeps the size at
    which it was first seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def reset_peak(self) -> None:
        """Lets the peak start again at what is live now."""
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Runs the operator, then counts what it made."""
        given = {storage._cdata for storage in _storages((args, kwargs))}
        if func.namespace == "resparse":
            with (
                self
            ):  # one of our kernels in Python: called by its device's key, past this mode, so that it looks inside
                out = func.redispatch(torch._C.DispatchKeySet(_key(args)), *args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage._cdata not in given:
                self._count(storage)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata  # one for each storage, however many Python objects stand for it
        if key in self._known:
            return
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed(_: Any) -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)


def _key(args: tuple) -> torch._C.DispatchKey:
    device = next(leaf.device for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))
    return torch._C.DispatchKey.CUDA if device.type == "cuda" else torch._C.DispatchKey.CPU


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
