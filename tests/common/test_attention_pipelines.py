"""Attention policies under diffusers' own pipelines and schedulers: one line around the call is all."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tiny_video import GRID, LAYERS, NAMES, TEXT, transformer
from torch import Tensor

from common.attention import Meter, Policy, Site, adaspa, dense, video_attention

pytestmark = pytest.mark.filterwarnings("default")  # other people's packages warn about themselves

STEPS = 5
PASSES = {"HunyuanVideo": ("cond", "uncond"), "Wan": ("cond", "uncond")}  # the others guide in one batch


class Recorder(Policy):
    """Dense, and remembers its sites."""

    def __init__(self) -> None:
        self.sites: list[Site] = []
        self.restarts = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor, site: Site, meter: Meter) -> Tensor:
        self.sites.append(site)
        return dense(query, key, value, site)

    def restart(self) -> None:
        self.restarts += 1


def pipeline(name: str) -> tuple[Any, Any]:
    """A pipeline without coders, and the call that samples latents from given embeddings with guidance."""
    import diffusers

    empty = {"text_encoder": None, "tokenizer": None, "vae": None, "transformer": transformer(name)}
    embeddings = torch.randn(2, 1, TEXT, 16, generator=torch.Generator().manual_seed(0))
    arguments: dict[str, Any] = dict(zip(("prompt_embeds", "negative_prompt_embeds"), embeddings, strict=True))
    masks = {f"{kind}prompt_attention_mask": (torch.arange(TEXT) < 10)[None].long() for kind in ("", "negative_")}
    side, frames = 64, 13  # pixels: the coders are taken to shrink by 8 and 4
    if name == "HunyuanVideo":
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        pipe = diffusers.HunyuanVideoPipeline(scheduler=scheduler, text_encoder_2=None, tokenizer_2=None, **empty)
        pooled = {f"{kind}pooled_prompt_embeds": torch.zeros(1, 8) for kind in ("", "negative_")}
        arguments |= masks | pooled | {"true_cfg_scale": 2.0}
    elif name == "CogVideoX":
        pipe = diffusers.CogVideoXPipeline(scheduler=diffusers.CogVideoXDDIMScheduler(), **empty)
    elif name == "Wan":
        scheduler = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
        pipe = diffusers.WanPipeline(scheduler=scheduler, **empty)
    else:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        pipe, side, frames = diffusers.LTXPipeline(scheduler=scheduler, **empty), 256, 25  # by 32 and 8
        arguments |= masks
    pipe.set_progress_bar_config(disable=True)
    size = {"height": side, "width": side, "num_frames": frames}
    return pipe, partial(pipe, **arguments, **size, num_inference_steps=STEPS, output_type="latent")


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_samples_with_adaspa(name):
    pipe, call = pipeline(name)

    def sample() -> Tensor:
        return call(generator=torch.Generator().manual_seed(0)).frames

    plain, policy = sample(), Recorder()
    with video_attention(pipe, policy):
        assert torch.equal(sample(), plain) and torch.equal(sample(), plain)
    passes = PASSES.get(name, ("cond_uncond",))
    layers = [f"transformer.{layer}" for layer in LAYERS[name]]
    once = [(step, cfg, layer) for step in range(1, STEPS + 1) for cfg in passes for layer in layers]
    assert [(site.step, site.cfg, site.layer) for site in policy.sites] == once * 2
    assert policy.restarts == 1 and {site.grid for site in policy.sites} == {GRID}

    with adaspa(pipe, keep_ratio=1.0, search_steps=(2, 4), block_size=32):
        full = sample()
    with adaspa(pipe, keep_ratio=0.15, search_steps=(2, 4), block_size=32) as run:
        sparse = sample()
    assert torch.allclose(full, plain, atol=1e-4)  # of float32 sums in another order, over five steps
    assert (sparse - plain).norm() > 1e-3 * plain.norm()
    assert run.report().calls["sparse"] == 3 * len(layers) * len(passes)
    assert torch.equal(sample(), plain)
