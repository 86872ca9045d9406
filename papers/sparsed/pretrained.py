"""LLaDA, Dream and their like from transformers, and long prompts in RULER's layout, for the paper profile.

A folder holds `<task>.jsonl` for each task, a JSON object a line as RULER writes them: `input`, the prompt, and
`outputs`, the texts that the answer has to contain; and `text.txt`, a text whose loss is taken.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.models.stable_diffusion import MissingWeights
from papers.sparsed.settings import Params

__all__ = ["DiffusionLM", "contained", "prompts", "text_tokens"]


class DiffusionLM(nn.Module):
    """tokens int64 [B, L] -> logits [B, L, V] of the tokens at their own places, float32.

    network    the model of transformers, which takes tokens and gives `logits`
    tokenizer  its tokenizer, or None
    mask       the number of its MASK
    shifted    whether its logits are those of the token after each place, as Dream's are: then they are moved
    """

    def __init__(self, network: Any, tokenizer: Any, mask: int, *, shifted: bool):
        super().__init__()
        self.network, self.tokenizer, self.mask, self.shifted = network, tokenizer, mask, shifted

    @classmethod
    def from_pretrained(cls, name: str, *, mask: int | None = None, device: str = "cpu") -> DiffusionLM:
        """Load a model by name or folder; its own code is run (trust_remote_code), as LLaDA and Dream need it.

        mask: the number of MASK where neither configuration nor tokenizer tells.

        Raises MissingWeights where the model is neither here nor to be downloaded, ValueError where MASK is unknown.
        """
        from transformers import AutoModel, AutoTokenizer

        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        try:
            network = AutoModel.from_pretrained(name, dtype=dtype, trust_remote_code=True)
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
        except (OSError, ValueError, ImportError) as error:
            raise MissingWeights(
                f"{name} cannot be loaded ({str(error).splitlines()[0]}). Download it once on a machine with a "
                "connection, or name a folder that holds it in the layout of transformers, with its tokenizer and code."
            ) from error
        found = [mask, getattr(network.config, "mask_token_id", None), getattr(tokenizer, "mask_token_id", None)]
        known = next((number for number in found if number is not None), None)
        if known is None:
            raise ValueError(
                f"{name}: neither its configuration nor its tokenizer has a mask_token_id; expected a masked diffusion "
                "model such as LLaDA or Dream"
            )
        kind = str(getattr(network.config, "model_type", "")).lower()
        return cls(network, tokenizer, int(known), shifted=kind == "dream").to(device).eval()

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.network(input_ids=tokens).logits.float()
        return torch.cat([logits[:, :1], logits[:, :-1]], 1) if self.shifted else logits

    def encode(self, text: str) -> Tensor:
        """Text as token numbers [T] int64, nothing added at its ends."""
        return torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.int64)

    def chat(self, text: str) -> Tensor:
        """A user's message as the model expects it, up to where its answer begins; plain text without a template."""
        if not getattr(self.tokenizer, "chat_template", None):
            return self.encode(text)
        message = [{"role": "user", "content": text}]
        told = self.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        return self.encode(told)

    def decode(self, tokens: Tensor) -> str:
        """Token numbers [T] as text, without special tokens."""
        return self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)

    def identity(self) -> tuple[str, str]:
        """A name for the record, such as llada_1_5, and the sha256 of the weights."""
        content = hashlib.sha256()
        for parameter in self.network.parameters():
            content.update(parameter.detach().cpu().view(torch.uint8).numpy().tobytes())
        return re.sub(r"\W+", "_", Path(self.network.name_or_path).name).lower(), content.hexdigest()


def prompts(params: Params, task: str, seed: int) -> list[tuple[str, list[str]]]:
    """Prompts of a task, each with the texts that its answer has to contain: `params.prompts` lines from number
    `seed * params.prompts` on, so that seeds share none.

    Raises FileNotFoundError, or ValueError for a line that is no such object, or too few of them.
    """
    path, first = _file(params, f"{task}.jsonl"), seed * params.prompts
    lines = path.read_text(encoding="utf-8").splitlines()[first : first + params.prompts]
    if len(lines) < params.prompts:
        raise ValueError(
            f"{path.name}: got {first + len(lines)} lines; seed {seed} expects {first + params.prompts}. Make more of "
            "them, or lower prompts"
        )
    found = []
    for number, line in enumerate(lines, first + 1):
        try:
            entry = json.loads(line)
            found.append((str(entry["input"]), [str(output) for output in entry["outputs"]]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path.name}, line {number}: got {line[:60]!r}; expected a JSON object with input and outputs, as "
                "RULER writes them"
            ) from error
    return found


def text_tokens(params: Params, model: DiffusionLM) -> Tensor:
    """The text of the folder as tokens [T]. Raises FileNotFoundError."""
    return model.encode(_file(params, "text.txt").read_text(encoding="utf-8"))


def contained(answer: str, outputs: list[str]) -> float:
    """Share of the outputs that the answer contains, without regard to case: RULER's score."""
    return sum(output.lower() in answer.lower() for output in outputs) / len(outputs)


def _file(params: Params, name: str) -> Path:
    if not params.data_dir:
        raise FileNotFoundError("data_dir is empty; expected a folder with RULER's prompts: --set data_dir=FOLDER")
    path = Path(params.data_dir).expanduser() / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; expected RULER's prompts in <task>.jsonl for each task of {params.tasks}, and a "
            "text in text.txt"
        )
    return path
