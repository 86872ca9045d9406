"""Tiny models in the layouts of transformers and torchvision, with random weights, and data for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = "abcdefghijklmnopqrstuvwxyz .,\n"


def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    numbers = {character: index for index, character in enumerate(["?", *VOCABULARY])}
    made = Tokenizer(models.WordLevel(numbers, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")


def write_language_models(root: Path) -> Path:
    """llama/ (float32, a head of its own), gpt2/ (bfloat16, tied head, Conv1D), and text.txt of their letters."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    common = {"vocab_size": len(VOCABULARY) + 1, "bos_token_id": None, "eos_token_id": None}
    llama = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        **common,
    )
    gpt2 = GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **common)
    for name, network in (("llama", LlamaForCausalLM(llama)), ("gpt2", GPT2LMHeadModel(gpt2).bfloat16())):
        network.save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
    draw = torch.Generator().manual_seed(0)
    (root / "text.txt").write_text("".join(VOCABULARY[i] for i in torch.randint(30, (4000,), generator=draw).tolist()))
    return root


def write_images(root: Path) -> Path:
    """photos/<class>/*.png in three colours, and shuffle.pt: shufflenet_v2_x0_5 for three classes."""
    import numpy as np
    from PIL import Image
    from torchvision.models import get_model

    draw = np.random.default_rng(0)
    for label, colour in enumerate(("red", "green", "blue")):
        (root / "photos" / colour).mkdir(parents=True)
        for index in range(6):
            pixels = draw.integers(0, 100, (40, 40, 3), dtype=np.uint8)
            pixels[..., label] += 150
            Image.fromarray(pixels).save(root / "photos" / colour / f"{index}.png")
    torch.manual_seed(0)
    torch.save(get_model("shufflenet_v2_x0_5", weights=None, num_classes=3).state_dict(), root / "shuffle.pt")
    return root
