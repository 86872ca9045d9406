"""What `resparse finetune` does: read captioned images, train, and draw samples before and after."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from common import files, seeds
from common.finetuning import SaraAdamW, SaraConfig, SaraModel, get_peft_model
from common.finetuning.ledger import measure
from common.models.pretrained_text_to_image import PretrainedTextToImage
from common.models.text_to_image import noise_loss, sample
from common.training import NonFiniteError, Schedule

__all__ = ["CHECKPOINT", "Findings", "FinetuneError", "Options", "captioned", "train", "write_report", "write_samples"]

CHECKPOINT = "unfinished.pt"  # in the out folder while it is worked on
CHECKPOINT_S = 300  # seconds between two of them
CHECKPOINTS = 10  # at least so many in a training
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
CLIP = 1.0  # the paper's largest norm of a gradient
SHOWN = 3  # names in a line
MAY_CHANGE = ("out", "lr", "device", "prompts", "guidance", "sampling")  # between two runs of one training


class FinetuneError(ValueError):
    """What was typed, or what it names, does not go together."""


@dataclass(frozen=True)
class Options:
    """What was typed; see `resparse finetune --help`."""

    model: str
    images: Path
    out: Path
    fraction: float
    threshold: float
    steps: int
    batch: int
    lr: float
    lambda_rank: float
    size: int
    prompts: tuple[str, ...]
    guidance: float
    sampling: int
    seed: int
    bf16: bool
    device: str

    def config(self) -> SaraConfig:
        """Of the adapter: with the paper's adjustment halfway."""
        chosen: dict[str, Any] = {"threshold": self.threshold} if self.threshold else {"fraction": self.fraction}
        return SaraConfig(**chosen, seed=self.seed, lambda_rank=self.lambda_rank, progressive_at=0.5)


@dataclass
class Findings:
    """What a training brought: the loss of each step, and bytes in memory at the peak of one of them."""

    losses: list[float] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    chosen: int = 0


def captioned(folder: Path) -> list[tuple[Path, str]]:
    """Images and captions: of metadata.jsonl (file_name, text), or of a .txt with the image's name.

    Raises FinetuneError where there are none, or an image has no caption.
    """
    if not folder.is_dir():
        raise FinetuneError(f"--images {folder} is no folder; expected one with images and their captions")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise FinetuneError(f"{folder} holds no image; expected {', '.join(sorted(SUFFIXES))}")
    listed = _listed(folder / "metadata.jsonl")
    texts = [(path, listed.get(path.relative_to(folder).as_posix(), _beside(path))) for path in found]
    if missing := [path.name for path, text in texts if not text]:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise FinetuneError(
            f"{len(missing)} of {len(found)} images have no caption: {', '.join(missing[:SHOWN])}{more}; expected "
            f'{{"file_name": ..., "text": ...}} in {folder / "metadata.jsonl"}, or a .txt of the same name beside each'
        )
    return texts


def train(
    model: PretrainedTextToImage, pictures: list[tuple[Path, str]], options: Options, console: Console
) -> tuple[SaraModel, Findings]:
    """Train the core's smallest weights in place.

    Goes on from a checkpoint in the out folder. Raises FinetuneError, with the last good state kept there, where loss
    or gradient is not finite.
    """
    try:
        tuned = get_peft_model(model.core, options.config())
        optimizer = SaraAdamW(tuned, lr=options.lr or None, total_steps=options.steps)
    except (TypeError, ValueError) as error:
        raise FinetuneError(str(error)) from error
    found = Findings(chosen=tuned.sparse.count)
    rate = optimizer.param_groups[0]["lr"]
    console.print(f"trained  {found.chosen:,} of {tuned.sparse.total:,} weights, at learning rate {rate:.3g}")
    latents, text = _encoded(model, pictures, options)
    nothing = model.encode_text([""])
    _resume(tuned, optimizer, found, options)
    schedule = Schedule(options.steps)

    def step() -> None:
        number = len(found.losses)
        draw = seeds.generator(options.seed, "step", number, device=options.device)
        some = torch.randperm(len(latents), generator=draw, device=options.device)[: options.batch]
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule.share(number)
        with torch.autocast(torch.device(options.device).type, torch.bfloat16, enabled=options.bf16):
            loss = noise_loss(model, latents[some], text[some], nothing, draw)
        if not math.isfinite(loss.item()):
            raise NonFiniteError(f"the loss is {loss.item()}", step=number, good_step=number, losses=found.losses)
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.core.parameters() if p.requires_grad], CLIP)
        optimizer.step()
        optimizer.zero_grad()
        found.losses.append(loss.item())

    try:
        _loop(step, tuned, optimizer, found, options)
    except NonFiniteError as error:
        done = len(found.losses)
        _keep(tuned, optimizer, found, options)
        raise FinetuneError(
            f"loss or gradient is not finite in step {done + 1} of {options.steps} at learning rate {rate:g}; the "
            f"state after step {done} is kept in {options.out / CHECKPOINT}; give the same command with a smaller --lr "
            "to go on"
        ) from error
    return tuned, found


def write_samples(model: PretrainedTextToImage, tuned: SaraModel, prompts: list[str], options: Options) -> None:
    """samples.png: a column for each prompt, above the base's and below the tuned model's, from equal noise."""
    import numpy as np
    from PIL import Image

    text, nothing = model.encode_text(prompts), model.encode_text([""])
    blank = torch.zeros(1, 3, options.size, options.size, device=options.device)
    shape: Any = tuple(model.encode(blank).shape[1:])

    def drawn() -> Tensor:
        draw = seeds.generator(options.seed, "samples", device=options.device)
        more: dict[str, Any] = {"steps": options.sampling, "guidance": options.guidance, "limit": None, "batch": 1}
        return sample(model, text, nothing, generator=draw, shape=shape, **more)

    model.eval()
    with tuned.disable_adapter():
        before = drawn()
    grid = torch.cat([torch.cat(list(row), dim=2) for row in (before, drawn())], dim=1)
    pixels = ((grid.float().cpu() + 1) * 127.5).round().clamp(0, 255).permute(1, 2, 0).numpy().astype(np.uint8)
    files.write(options.out / "samples.png", lambda stream: Image.fromarray(pixels).save(stream, "PNG"))


def write_report(tuned: SaraModel, found: Findings, prompts: list[str], options: Options) -> None:
    """report.json: what was typed, the losses, the ledger of a step, and what the samples show."""
    typed = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}
    content = {
        "options": typed,
        "chosen": found.chosen,
        "trained_at_the_end": tuned.sparse.count,
        "of": tuned.sparse.total,
        "theta": tuned.sparse.theta,
        "bytes_at_peak": found.memory,
        "losses": found.losses,
        "samples": {"columns": prompts, "rows": ["before", "after"]},
    }
    files.write_json(options.out / "report.json", content)


def _loop(step: Any, tuned: SaraModel, optimizer: SaraAdamW, found: Findings, options: Options) -> None:
    from tqdm import tqdm

    tuned.model.train()
    every, looked = max(1, options.steps // CHECKPOINTS), time.monotonic()
    done = len(found.losses)
    with tqdm(total=options.steps, desc="sara", initial=done, unit="step", file=sys.stdout, ascii=True) as bar:
        while len(found.losses) < options.steps:
            if not found.memory and options.steps - len(found.losses) >= 2:
                found.memory = {str(name): size for name, size in measure(step, tuned, optimizer).at_peak.items()}
            else:
                step()
            bar.update(len(found.losses) - bar.n)
            bar.set_postfix(loss=f"{found.losses[-1]:.3g}")
            if len(found.losses) % every == 0 or time.monotonic() - looked > CHECKPOINT_S:
                looked = time.monotonic()
                try:
                    _keep(tuned, optimizer, found, options)
                except OSError as error:
                    why = error.strerror or error
                    bar.write(f"resparse: {options.out / CHECKPOINT} was not written ({why}); the training goes on")


def _encoded(model: PretrainedTextToImage, pictures: list[tuple[Path, str]], options: Options) -> tuple[Tensor, Tensor]:
    """Latents [N, C, h, w] and texts [N, L, D] of all images, made once."""
    from PIL import Image, ImageOps, UnidentifiedImageError
    from torchvision.transforms.functional import pil_to_tensor

    latents, texts = [], []
    for path, caption in pictures:
        try:
            with Image.open(path) as opened:
                upright = ImageOps.exif_transpose(opened).convert("RGB")
                square = ImageOps.fit(upright, (options.size, options.size), Image.Resampling.LANCZOS)
        except (UnidentifiedImageError, OSError) as error:
            raise FinetuneError(f"{path} cannot be read as an image ({error}); mend it or take it out") from error
        pixels = pil_to_tensor(square)[None].to(options.device).float() / 127.5 - 1
        latents.append(model.encode(pixels))
        texts.append(model.encode_text([caption]))
    return torch.cat(latents), torch.cat(texts)


def _listed(path: Path) -> dict[str, str]:
    """Captions by file name."""
    if not path.is_file():
        return {}
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            found[str(entry["file_name"])] = str(entry["text"]).strip()
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise FinetuneError(
                f'{path}, line {number}: got {line[:60]!r}; expected {{"file_name": ..., "text": ...}}'
            ) from error
    return found


def _beside(path: Path) -> str:
    text = path.with_suffix(".txt")
    return text.read_text(encoding="utf-8").strip() if text.is_file() else ""


def _settings(options: Options) -> dict[str, str]:
    return {name: str(value) for name, value in asdict(options).items() if name not in MAY_CHANGE}


def _keep(tuned: SaraModel, optimizer: SaraAdamW, found: Findings, options: Options) -> None:
    content = {
        "settings": _settings(options),
        "values": {entries.name: entries.values() for entries in tuned.sparse.entries},
        "optimizer": optimizer.state_dict(),
        "losses": found.losses,
        "memory": found.memory,
    }
    files.write(options.out / CHECKPOINT, lambda stream: torch.save(content, stream))


def _resume(tuned: SaraModel, optimizer: SaraAdamW, found: Findings, options: Options) -> None:
    """Go on from a checkpoint of the same settings, if there is one."""
    path = options.out / CHECKPOINT
    if not path.is_file():
        return
    try:
        kept = torch.load(path, weights_only=True, map_location=options.device)
    except Exception as error:  # torch raises many kinds for a file that is cut
        raise FinetuneError(f"{path} cannot be read ({error}); remove {options.out} to begin anew") from error
    if other := [
        f"{name} {kept['settings'].get(name)}, now {value}"
        for name, value in _settings(options).items()
        if kept["settings"].get(name) != value
    ]:
        raise FinetuneError(
            f"{options.out} holds an unfinished training with {'; '.join(other)}; give the same as then, another "
            "--out, or remove the folder"
        )
    optimizer.load_state_dict(kept["optimizer"])
    for entries in tuned.sparse.entries:
        entries.write(kept["values"][entries.name])
    found.losses, found.memory = kept["losses"], kept["memory"]
    print(f"resparse: the training goes on after {len(found.losses)} steps")
