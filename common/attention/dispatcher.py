"""An attention backend of our own in diffusers' dispatcher, for as long as a run lasts.

diffusers has no public way to add one: its names are a closed enumeration. A name made outside of the enumeration
passes where a name is asked for, so nothing of diffusers' own is changed but one entry of its registry, which goes
when the run ends.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

__all__ = ["WORKING", "install"]

WORKING = ("0.42.1",)  # versions of diffusers that the tests were run with

_numbers = itertools.count(1)


def install(layers: Mapping[str, nn.Module], attend: Callable[..., Tensor], undo: ExitStack) -> None:
    """Send the attention of these modules to `attend`, which takes and gives [B, H, L, D]; `undo` ends it.

    Raises:
        ImportError: for a version of diffusers this was not tried with.
        RuntimeError: for modules whose processors do not ask the dispatcher, or compute on several devices.
    """
    _require_version()
    for path, layer in layers.items():
        processor = getattr(layer, "processor", None)
        if not hasattr(processor, "_attention_backend"):
            raise RuntimeError(
                f"attention at {path!r}: its processor {type(processor).__name__} does not ask diffusers' dispatcher; "
                "expected the model's own processor; restore it with set_attn_processor"
            )
        if getattr(processor, "_parallel_config", None) is not None:
            raise RuntimeError(
                f"attention at {path!r}: it is spread over several devices; expected one; leave enable_parallelism out"
            )
    name = _register(attend, undo)
    for processor in {id(layer.processor): layer.processor for layer in layers.values()}.values():
        undo.callback(_restore, processor, vars(processor).get("_attention_backend", _ABSENT))
        processor._attention_backend = name  # type: ignore[union-attr]


_ABSENT = object()


def _restore(processor: Any, before: Any) -> None:
    if before is _ABSENT:
        del processor._attention_backend
    else:
        processor._attention_backend = before


def _require_version() -> None:
    import diffusers

    if diffusers.__version__ not in WORKING:
        raise ImportError(
            f"got diffusers {diffusers.__version__}; its attention dispatcher is private and was tried with "
            f"{', '.join(WORKING)}: install one of these, e.g. pip install diffusers=={WORKING[-1]}"
        )


def _register(attend: Callable[..., Tensor], undo: ExitStack) -> Any:
    """A name of its own for every run: runs do not know of each other."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    number = next(_numbers)
    name = str.__new__(AttentionBackendName, f"resparse-{number}")
    name._name_, name._value_ = f"RESPARSE_{number}", f"resparse-{number}"
    _AttentionBackendRegistry.register(name)(_backend(attend))
    for table in ("_backends", "_constraints", "_supported_arg_names"):
        undo.callback(getattr(_AttentionBackendRegistry, table).pop, name, None)
    return name


def _backend(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # the dispatcher drops what this signature does not name; so all is named, and refused where it matters
    def backend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        _parallel_config: Any = None,
    ) -> Tensor:
        if return_lse or _parallel_config is not None:
            raise RuntimeError("attention over several devices was asked for; expected one device")
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        out = attend(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale)
        return out.transpose(1, 2)

    return backend
