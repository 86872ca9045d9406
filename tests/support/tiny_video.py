"""Tiny video transformers of diffusers' real classes, randomly initialised, and a pipeline that samples with one."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

HEADS, DIM, TEXT = 2, 32, 24
GRID = (4, 8, 8)  # frames, rows, columns of tokens
WORDS = (24, 10)  # text tokens that are no padding, by batch entry
NAMES = ("HunyuanVideo", "CogVideoX", "Wan", "LTXVideo")
LAYERS = {
    "HunyuanVideo": ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"],
    "CogVideoX": ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"],
    "Wan": ["blocks.0.attn1", "blocks.1.attn1"],
    "LTXVideo": ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "HunyuanVideo": {
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "patch_size": 1,
        "text_embed_dim": 16,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (8, 12, 12),
    },
    "CogVideoX": {
        "time_embed_dim": 16,
        "text_embed_dim": 16,
        "num_layers": 2,
        "sample_width": GRID[2],
        "sample_height": GRID[1],
        "sample_frames": 13,
        "patch_size": 1,
        "max_text_seq_length": TEXT,
    },
    "Wan": {"text_dim": 16, "freq_dim": 16, "ffn_dim": 64, "num_layers": 2, "patch_size": (1, 1, 1)},
    "LTXVideo": {"cross_attention_dim": HEADS * DIM, "num_layers": 2, "caption_channels": 16},
}


def transformer(name: str) -> Any:
    """One of NAMES, without dropout. Queries are enlarged so that attention is not all but uniform."""
    diffusers: Any = importlib.import_module("diffusers")
    torch.manual_seed(0)
    options = {"num_attention_heads": HEADS, "attention_head_dim": DIM, "in_channels": 4, "out_channels": 4}
    made = getattr(diffusers, f"{name}Transformer3DModel")(**options, **OPTIONS[name]).eval()
    with torch.no_grad():
        for path in LAYERS[name]:
            layer = made.get_submodule(path)
            layer.norm_q.weight.mul_(4.0)
    return made


def inputs(name: str, batch: int = 2, seed: int = 0) -> dict[str, Tensor | int]:
    """What the transformer is called with but for the timestep."""
    draw = torch.Generator().manual_seed(seed)
    text = torch.randn(batch, TEXT, 16, generator=draw)
    latents = torch.randn(batch, 4, *GRID, generator=draw)
    present = (torch.arange(TEXT) < torch.tensor(WORDS[:batch])[:, None]).long()
    if name == "HunyuanVideo":
        return {
            "hidden_states": latents,
            "encoder_hidden_states": text,
            "encoder_attention_mask": present,
            "pooled_projections": torch.randn(batch, 8, generator=draw),
            "guidance": torch.full((batch,), 6000.0),
        }
    if name == "CogVideoX":
        return {"hidden_states": latents.transpose(1, 2).contiguous(), "encoder_hidden_states": text}
    if name == "Wan":
        return {"hidden_states": latents, "encoder_hidden_states": text}
    return {
        "hidden_states": latents.flatten(2).transpose(1, 2).contiguous(),
        "encoder_hidden_states": text,
        "encoder_attention_mask": present,
        "num_frames": GRID[0],
        "height": GRID[1],
        "width": GRID[2],
    }


class Pipeline:
    """Samples as diffusers' pipelines do: a loop over timesteps, a call for each guidance pass, named for caches."""

    def __init__(self, name: str, part: Any) -> None:
        self.name, self.transformer = name, part

    @torch.no_grad()
    def __call__(
        self,
        steps: int,
        passes: Sequence[str | None] = ("cond",),
        *,
        seed: int = 0,
        batch: int = 2,
        last: float = 20.0,
        dtype: torch.dtype = torch.float32,
    ) -> list[Tensor]:
        """Every output of the transformer, at timesteps from 1000 to `last` of that dtype."""
        given = [inputs(self.name, batch, seed + place) for place in range(len(passes))]
        latents, outputs = given[0]["hidden_states"], []
        for time in torch.linspace(1000, last, steps):
            for name, arguments in zip(passes, given, strict=True):
                with self.transformer.cache_context(name) if name else nullcontext():
                    arguments = arguments | {"hidden_states": latents, "timestep": time.expand(batch).to(dtype)}
                    outputs.append(self.transformer(**arguments, return_dict=False)[0])
            latents = latents - 0.1 * outputs[-1]
        return outputs
