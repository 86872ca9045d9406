"""Sparse attention in whole models: what replaces it is a policy, and models are reached from outside, unchanged.

    with adaspa(pipe, keep_ratio=0.2, search_steps=(10, 30)) as run:
        video = pipe("a red square falls")
    print(run.report())

A method of one's own is a `Policy`: `with video_attention(pipe, MyPolicy()) as run: ...`. Diffusion language models are
reached by `language_attention`. Causal ones, whose prompt and decoding are thinned out in ways of their own, are served
by `common.attention.causal`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from common.attention.adaspa import AdaSpa
from common.attention.language import language_attention
from common.attention.meter import Meter, Recall, Report
from common.attention.policy import Dense, Policy, Site, dense
from common.attention.run import AttentionNotReached, Run
from common.attention.video import known_transformers, video_attention

__all__ = [
    "AdaSpa",
    "AttentionNotReached",
    "Dense",
    "Meter",
    "Policy",
    "Recall",
    "Report",
    "Run",
    "Site",
    "adaspa",
    "dense",
    "known_transformers",
    "language_attention",
    "video_attention",
]


def adaspa(
    model: Any, keep_ratio: float = 0.2, search_steps: tuple[int, ...] = (10, 30), **options: Any
) -> AbstractContextManager[Run]:
    """Run a diffusers video pipeline or transformer with AdaSpa inside the block.

    Args:
        model: as for `video_attention`.
        keep_ratio: share of attention tiles kept, in (0, 1].
        search_steps: denoising steps, from 1, at which tiles are searched; up to the first all is dense.
        options: the others of `AdaSpa`.
    """
    return video_attention(model, AdaSpa(keep_ratio=keep_ratio, search_steps=search_steps, **options))
