"""Causal language models of transformers, as plain modules: tokens in, logits out, every weight matrix an nn.Linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from common.models.stable_diffusion import MissingWeights

__all__ = ["CausalLM"]


class CausalLM(nn.Module):
    """tokens [B, L] int64 -> logits [B, L, V] of the token after each.

    network    the model of transformers; the transposed Conv1D layers of GPT-2 are replaced by nn.Linear of the same
               weights, so that what is said of linear layers (a sparsity pattern along the inputs, say) holds for them
    tokenizer  its tokenizer, or None

    Use `from_pretrained`.
    """

    def __init__(self, network: Any, tokenizer: Any = None):
        super().__init__()
        self.network, self.tokenizer = network, tokenizer
        _replace_conv1d(network)

    @classmethod
    def from_pretrained(cls, name: str) -> CausalLM:
        """Load a model and its tokenizer by name or folder, in float32.

        Raises MissingWeights where it is neither here nor to be downloaded.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            network = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise MissingWeights(
                f"{name} cannot be loaded ({str(error).splitlines()[0]}). Download it once on a machine with a "
                "connection, or name a folder that holds it in the layout of transformers, with its tokenizer."
            ) from error
        return cls(network, tokenizer)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.network(input_ids=tokens, use_cache=False).logits

    def encode(self, text: str) -> Tensor:
        """Text as token numbers [T] int64, nothing added at its ends."""
        if self.tokenizer is None:
            raise ValueError("CausalLM: got no tokenizer, expected the one of the model; load it by from_pretrained")
        found = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return torch.tensor(found, dtype=torch.int64)


def _replace_conv1d(network: nn.Module) -> None:
    from transformers.pytorch_utils import Conv1D

    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Conv1D):
                inputs, outputs = layer.weight.shape
                linear = nn.Linear(inputs, outputs, device=layer.weight.device, dtype=layer.weight.dtype)
                with torch.no_grad():
                    linear.weight.copy_(layer.weight.T)
                    linear.bias.copy_(layer.bias)
                setattr(parent, name, linear)
