"""Sparse fine-tuning of any torch model: chosen entries of its weights, at the memory of these entries alone.

optimizer = SaraAdamW(model, threshold=8e-4)            # instead of AdamW(model.parameters())

model = get_peft_model(unet, SaraConfig(fraction=0.02)) # or as an adapter
optimizer = SaraAdamW(model)
model.save_pretrained("barbie")
"""

from __future__ import annotations

from common.finetuning.adapter import SaraModel, add_weighted, get_peft_model
from common.finetuning.adapter_file import AdapterFileError
from common.finetuning.config import SaraConfig
from common.finetuning.nuclear import nuclear_norm, subgradient
from common.finetuning.optimizer import SaraAdamW, learning_rate

__all__ = [
    "AdapterFileError",
    "SaraAdamW",
    "SaraConfig",
    "SaraModel",
    "add_weighted",
    "get_peft_model",
    "learning_rate",
    "nuclear_norm",
    "subgradient",
]
