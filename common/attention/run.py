"""One use of a policy: counts steps, checks every attention that arrives, and hands it to the policy."""

from __future__ import annotations

import torch
from torch import Tensor

from common.attention.meter import Meter, Report
from common.attention.policy import Policy, Site

__all__ = ["AttentionNotReached", "Run"]


class AttentionNotReached(RuntimeError):
    """The pipeline ran, and not one of its attentions went through the policy: nothing was replaced."""


class Run:
    """What `with adaspa(...) as run` gives.

    policy      as given
    step        of the generation at hand, from 1; 0 before the first forward pass
    generation  from 1; another begins where timesteps turn back, or by `restart`
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.generation, self.step = 1, 0
        self._meter = Meter()
        self._forwards = self._attentions = 0
        self._timestep: float | None = None
        self._direction = 0.0
        self._passes: list[str] = []

    def report(self) -> Report:
        """Time, density, recall and the Amdahl bound so far; may be asked for during and after the run."""
        return self._meter.report()

    def restart(self) -> None:
        """Begin another generation. Needed where timesteps do not tell: between texts of a language model."""
        self.generation += 1
        self.step, self._timestep, self._direction, self._passes = 0, None, 0.0, []
        self.policy.restart()

    def begin(self, timestep: float, cfg: str | None) -> None:
        """A forward pass begins: for the code that reaches into models, as is all below.

        Another timestep is another step, and so is a named pass that this step has seen: rounded to bfloat16, as
        HunyuanVideo's pipeline does, neighbouring timesteps are often equal. Calls of one step are its CFG passes.
        """
        if self._timestep is not None and self._turned(timestep):
            self.restart()
        if timestep != self._timestep or cfg in self._passes:
            self.step += 1
            self._passes = []
        self._timestep = timestep
        self._passes.append(str(len(self._passes)) if cfg is None else cfg)
        self._forwards += 1
        self._meter.begin()

    def end(self) -> None:
        """The forward pass ended."""
        self._meter.end()

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layer: str,
        text: range = range(0),
        grid: tuple[int, int, int] | None = None,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """One self-attention, [B, H, L, D] as torch has it. Raises for what no policy is asked to serve."""
        _check(layer, query, key, value, text, dropout_p, is_causal)
        if not self._passes:
            raise RuntimeError(
                f"attention at {layer!r}: it was called outside of the model's forward pass; expected calls from "
                "within, where the step is known"
            )
        mask = None if attn_mask is None else _key_mask(layer, attn_mask, len(query), key.shape[2])
        site = Site(layer, self.step, self._passes[-1], text, grid, mask, scale)
        self._attentions += 1
        self._meter.enter(site, self.generation)
        return self.policy.attend(query, key, value, site, self._meter)

    def stop(self) -> None:
        """Time stops here, whether the run ended well or not."""
        self._meter.stop()

    def close(self) -> None:
        """The run ended well. Raises AttentionNotReached if nothing was replaced in it."""
        if not self._forwards:
            raise AttentionNotReached(
                "the model was never called inside the with block, so nothing was replaced; call the pipeline there, "
                "and give the pipeline itself or the very transformer it uses"
            )
        if not self._attentions:
            raise AttentionNotReached(
                f"the model was called {self._forwards} times and none of its attentions came by: something else has "
                "taken their place; give a plain transformer without other attention processors or compiled parts. The "
                "output is that of the model as it was"
            )
        self.policy.close(self.step)

    def _turned(self, timestep: float) -> bool:
        """Whether timesteps turn back, against the way they went in this generation."""
        assert self._timestep is not None
        change = timestep - self._timestep
        if change and not self._direction:
            self._direction = change
        return change * self._direction < 0


def _check(
    layer: str, query: Tensor, key: Tensor, value: Tensor, text: range, dropout_p: float, is_causal: bool
) -> None:
    """Raises for what no policy is asked to serve."""
    length = query.shape[2]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
        raise RuntimeError(
            f"attention at {layer!r}: gradients are asked for, and searches have none; generate under "
            "torch.no_grad(), as pipelines do"
        )
    if dropout_p:
        raise ValueError(f"attention at {layer!r}: got dropout {dropout_p}; expected 0; call eval() on the model")
    if is_causal:
        raise ValueError(
            f"attention at {layer!r}: got causal attention; expected attention in both directions, as diffusion "
            "models have"
        )
    if key.shape[2] != length:
        raise ValueError(
            f"attention at {layer!r}: got {length} queries and {key.shape[2]} keys; expected self-attention over one "
            "sequence; a language model's cache of keys must be off (use_cache=False)"
        )
    if len(text) > length:
        raise ValueError(
            f"attention at {layer!r}: got {len(text)} text tokens in a sequence of {length}; expected text and video "
            "in one sequence, the text shorter than it"
        )


def _key_mask(layer: str, mask: Tensor, batch: int, keys: int) -> Tensor:
    """A mask over keys alone as bool [B, L]; raises for every other kind, for an ignored mask is a wrong image."""
    if mask.dtype == torch.bool and mask.ndim == 2 and mask.shape == (batch, keys):
        return mask
    fits = mask.ndim == 4 and mask.shape[0] in (1, batch) and mask.shape[1] == 1 and mask.shape[3] == keys
    # transformers writes the same row for every query
    if mask.dtype == torch.bool and fits and bool((mask == mask[:, :, :1]).all()):
        return mask[:, 0, 0].expand(batch, keys)
    raise ValueError(
        f"attention at {layer!r}: got a mask {mask.dtype} {list(mask.shape)}; expected none, or which keys are "
        f"there: bool {[batch, 1, 1, keys]} or {[batch, keys]}, True for those"
    )
