"""The authors' scale: a pretrained video pipeline of diffusers, its prompts, and the time it takes."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch
from torch import Tensor

from common.attention import Dense, Policy, video_attention
from common.models.video import pretrained_pipeline
from papers.adaspa.settings import Params

__all__ = ["generate"]


def generate(params: Params, policy: Policy | None, seed: int) -> dict[str, Any]:
    """As `experiment.generate`, with `wall`: seconds a video, all of the pipeline included."""
    pipe = _pipeline(params.model, params.device)
    videos, wall = [], []
    with video_attention(pipe, policy or Dense()) as run:
        for text in params.texts:
            began = time.perf_counter()
            videos.append(_sampled(pipe, params, text, seed))
            wall.append(time.perf_counter() - began)
            run.restart()
        report = run.report()
    return {
        "videos": torch.stack(videos),
        "trajectory": None,
        "density": 1.0 if report.density is None else report.density,
        "recall": float(torch.cat([x.recall.flatten() for x in report.recalls]).mean()) if report.recalls else None,
        "calls": dict(report.calls),
        "seconds": dict(report.seconds),
        "wall": wall,
    }


@cache
def _pipeline(name: str, device: str) -> Any:
    return pretrained_pipeline(name, device=device)


def _sampled(pipe: Any, params: Params, text: str, seed: int) -> Tensor:
    """[3, F, H, W] in -1..1."""
    made = pipe(
        prompt=text,
        height=params.side,
        width=16 * round(params.side / 9),  # 16:9, in multiples of 16
        num_frames=params.frames,
        num_inference_steps=params.steps,
        generator=torch.Generator(params.device).manual_seed(seed),
        output_type="pt",
    )
    return made.frames[0].float().cpu().movedim(1, 0) * 2 - 1
