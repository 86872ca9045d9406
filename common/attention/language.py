"""Reaches the attention of masked diffusion language models: LLaDA, Dream, and every model that attends through torch.

Their public code calls torch's scaled_dot_product_attention, and so does transformers' "sdpa" implementation. It is
caught there, whatever the class.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from common.attention.intercept import Intercept
from common.attention.policy import Policy
from common.attention.run import Run

__all__ = ["language_attention"]


@contextmanager
def language_attention(model: nn.Module, policy: Policy, *, passes: int = 1) -> Iterator[Run]:
    """Inside the block the attention of a language model is computed by the policy.

    Every forward pass is a denoising step, counted from 1. Between two texts call `run.restart()`. Layers are named by
    their order in a forward pass, "0" first.

    Args:
        model: one that attends in both directions through torch's scaled_dot_product_attention (in transformers:
            attn_implementation="sdpa"), over the whole sequence (use_cache=False).
        passes: forward passes a step, where guidance is made of several; they are named "0", "1", ...

    Raises:
        ValueError: during the run for causal attention, masks of pairs of tokens, or a cache of keys.
        AttentionNotReached: at the end, if nothing was replaced.
    """
    if passes < 1:
        raise ValueError(f"language_attention: got passes {passes}; expected 1 or more forward passes a step")
    if hasattr(model.forward, IN_USE):
        raise RuntimeError(
            f"{type(model).__name__}: its attention is replaced already; leave the other with block first"
        )
    run, before = Run(policy), vars(model).get("forward")
    model.forward = _caught(model, run, passes)
    try:
        yield run
    finally:
        run.stop()
        del model.forward
        if before is not None:
            model.forward = before
    run.close()


IN_USE = "_resparse_attention"


def _caught(model: nn.Module, run: Run, passes: int) -> Any:
    """The model's forward pass with its attention caught."""
    original, calls = model.forward, 0

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls

        def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
            return run.attend(query, key, value, layer=str(caught.calls - 1), **options)

        run.begin(-float(calls // passes), None)  # falls like the timesteps of diffusion
        calls += 1
        with Intercept(attend) as caught:
            out = original(*args, **kwargs)
        run.end()
        return out

    setattr(forward, IN_USE, True)
    return forward
