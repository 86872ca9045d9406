"""Catches torch's scaled_dot_product_attention while some code runs, for models that call it directly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Attend", "Intercept"]

Attend = Callable[..., Tensor]


class Intercept(TorchFunctionMode):
    """`with Intercept(attend) as caught:` gives every scaled_dot_product_attention in this thread to `attend`, which
    takes (query, key, value) and as keywords attn_mask, dropout_p, is_causal and scale; `caught.calls` counts them.

    It is off while `attend` runs: attention may be computed by torch there.
    """

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.calls = 0
        self._attend = attend

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self._attend(**_named(*args, **(kwargs or {})))


def _named(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,  # shapes tell
) -> dict[str, Any]:
    """The arguments by torch's names."""
    return {
        "query": query,
        "key": key,
        "value": value,
        "attn_mask": attn_mask,
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
    }
