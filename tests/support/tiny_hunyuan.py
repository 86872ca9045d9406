"""HunyuanVideo in the layout of diffusers with a few thousand random weights, all its parts included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WIDTH = 32


def write_hunyuan_video(folder: Path) -> str:
    """Write one into the folder; returns its path as a name for `from_pretrained`. Its coder shrinks by 8 and 4."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_attention_heads": 2, "num_hidden_layers": 3}
    pipe = diffusers.HunyuanVideoPipeline(
        text_encoder=LlamaModel(LlamaConfig(vocab_size=3, **shape)),
        tokenizer=_tokenizer(400),
        transformer=diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=1,
            text_embed_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            rope_axes_dim=(4, 6, 6),
        ),
        vae=diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=CLIPTextModel(CLIPTextConfig(vocab_size=3, eos_token_id=2, projection_dim=WIDTH, **shape)),
        tokenizer_2=_tokenizer(77),
    )
    pipe.save_pretrained(folder)
    return str(folder)


def _tokenizer(longest: int) -> Any:
    """Every word is the same word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"?": 0, "[pad]": 1, "[end]": 2}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="?", pad_token="[pad]", eos_token="[end]", model_max_length=longest
    )
