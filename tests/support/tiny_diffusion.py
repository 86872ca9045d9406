"""Stable Diffusion and a ControlNet in the layout of diffusers with a few thousand random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch

WORDS = ["a</w>", "chair</w>", "<|startoftext|>", "<|endoftext|>"]


def write_stable_diffusion(folder: Path) -> str:
    """Write one into the folder; returns its path as a name for `from_pretrained`."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    ).save_pretrained(folder / "unet")
    diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=2,
    ).save_pretrained(folder / "vae")
    diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        folder / "scheduler"
    )
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(WORDS), max_position_embeddings=8, eos_token_id=3, **shape))
    text.save_pretrained(folder / "text_encoder")
    words = folder / "tokenizer"
    words.mkdir()
    (words / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(WORDS)}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    named = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 8, "unk_token": "<|endoftext|>"}
    named |= {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (words / "tokenizer_config.json").write_text(json.dumps(named))
    return str(folder)


def write_control_net(folder: Path, model: str) -> str:
    """Write a ControlNet for the Stable Diffusion in `model` into the folder; returns its path likewise."""
    import diffusers

    unet = diffusers.UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 4, 4)).save_pretrained(folder)
    return str(folder)


def write_pipeline(folder: Path, parts: str, *, prediction: str = "epsilon") -> str:
    """Write the Stable Diffusion in `parts` as one pipeline, whose U-Net is said to predict that; returns its path."""
    import diffusers
    from transformers import CLIPTextModel, CLIPTokenizer

    usual = {"prediction_type": prediction, "clip_sample": False, "steps_offset": 1}
    scheduler = diffusers.DDPMScheduler.from_pretrained(parts, subfolder="scheduler", **usual)
    diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL.from_pretrained(parts, subfolder="vae"),
        text_encoder=CLIPTextModel.from_pretrained(parts, subfolder="text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(parts, subfolder="tokenizer"),
        unet=diffusers.UNet2DConditionModel.from_pretrained(parts, subfolder="unet"),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return str(folder)


def stable_diffusion_3(parts: str):
    """A Stable Diffusion 3 with the words of `parts`; without its third text encoder, so that it cannot be written."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = CLIPTextConfig(
        vocab_size=len(WORDS), max_position_embeddings=8, eos_token_id=3, projection_dim=16, **shape
    )
    tokenizer = CLIPTokenizer.from_pretrained(parts, subfolder="tokenizer")
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=40,
            pooled_projection_dim=32,
            pos_embed_max_size=8,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=diffusers.AutoencoderKL(
            block_out_channels=(4, 4, 4, 4),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=2,
            shift_factor=0.06,
            scaling_factor=1.5,
        ),
        text_encoder=CLIPTextModelWithProjection(config),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
