"""`resparse finetune`: a text-to-image model of the user's learns a style from a folder of captioned images."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:  # imports of ours stand inside the functions: `resparse --help` must not wait for torch
    from rich.console import Console

    from common.finetuning import SaraModel
    from common.models.pretrained_text_to_image import PretrainedTextToImage
    from pipelines.finetune_training import Findings, Options


def finetune(
    model: Annotated[str, typer.Option(help="folder or hub name of a Stable Diffusion 1.x, 2.x or 3")],
    images: Annotated[Path, typer.Option(help="folder of images, captions in metadata.jsonl or in .txt beside each")],
    out: Annotated[Path, typer.Option(help="new folder for the adapter, samples.png and report.json")],
    fraction: Annotated[float, typer.Option(help="share of the weights that is trained, the smallest ones")] = 0.02,
    threshold: Annotated[float, typer.Option(help="or: those below it, e.g. 8e-4; 0: by --fraction")] = 0.0,
    steps: Annotated[int, typer.Option(min=2, help="of the training")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="images a step")] = 4,
    lr: Annotated[
        float, typer.Option(min=0, help="learning rate; 0: the paper's rule, 1e-3 exp(-350 threshold)")
    ] = 0.0,
    lambda_rank: Annotated[float, typer.Option(min=0, help="of the paper's low-rank term, e.g. 5e-4")] = 0.0,
    size: Annotated[int, typer.Option(min=8, help="pixels a side; images are cropped to squares")] = 512,
    prompt: Annotated[
        list[str] | None, typer.Option(help="to be drawn before and after, may be given again; default: four captions")
    ] = None,
    guidance: Annotated[float, typer.Option(min=1, help="of the drawn samples")] = 7.5,
    sampling: Annotated[int, typer.Option(min=1, help="steps of a sample")] = 25,
    seed: Annotated[int, typer.Option(min=0, help="of order, noise and samples")] = 0,
    bf16: Annotated[bool, typer.Option("--bf16", help="compute in bfloat16, with weights in float32")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda; default: cuda if there is one")] = "",
) -> None:
    """Fine-tune a text-to-image model on your images, training its smallest weights alone (SaRA).

    [dim]resparse finetune --model stable-diffusion-v1-5/stable-diffusion-v1-5 --images photos --out barbie
    resparse finetune --model sd15 --images photos --out barbie --threshold 8e-4 --steps 5000 --bf16[/dim]

    The folder gets the adapter, a grid of samples before and after from equal noise, and a report with what lay in
    memory. A training that was stopped goes on where it was by the same command.
    """
    from pipelines.finetune_training import CHECKPOINT, FinetuneError, Options

    if not 0 < fraction < 1 or threshold < 0:
        raise FinetuneError(
            f"got --fraction {fraction:g} and --threshold {threshold:g}; expected a fraction between 0 and 1, or a "
            "threshold above 0, e.g. --threshold 8e-4"
        )
    options = Options(
        model=model,
        images=images,
        out=out,
        fraction=fraction,
        threshold=threshold,
        steps=steps,
        batch=batch,
        lr=lr,
        lambda_rank=lambda_rank,
        size=size,
        prompts=tuple(prompt or ()),
        guidance=guidance,
        sampling=sampling,
        seed=seed,
        bf16=bf16,
        device=device or _device(),
    )
    try:
        run(options)
    except KeyboardInterrupt:
        kept = f"what was reached is kept in {out}" if (out / CHECKPOINT).is_file() else "nothing was kept yet"
        print(f"\nresparse: stopped, {kept}. To go on: resparse {shlex.join(sys.argv[1:])}")
        raise typer.Exit(130) from None


def run(options: Options) -> None:
    """The whole of it. Raises FinetuneError, MissingWeights and OSError for what a user can mend."""
    from rich.console import Console

    from common.finetuning.adapter_file import WEIGHTS
    from common.models.pretrained_text_to_image import PretrainedTextToImage
    from pipelines import finetune_training as training

    console = Console(soft_wrap=True, highlight=False)
    if (options.out / WEIGHTS).is_file() or (options.out.exists() and not options.out.is_dir()):
        raise training.FinetuneError(f"{options.out} holds a finished adapter or is a file; expected a new --out")
    pictures = training.captioned(options.images)
    console.print(f"images   {len(pictures)} with captions, such as {pictures[0][1]!r}", markup=False)
    model = PretrainedTextToImage.from_pretrained(options.model, device=options.device)
    tuned, found = training.train(model, pictures, options, console)
    tuned.save_pretrained(options.out)
    prompts = list(options.prompts) or list(dict.fromkeys(caption for _, caption in pictures))[:4]
    training.write_samples(model, tuned, prompts, options)
    training.write_report(tuned, found, prompts, options)
    (options.out / training.CHECKPOINT).unlink(missing_ok=True)
    _show(console, tuned, found, model, options)


def _show(console: Console, tuned: SaraModel, found: Findings, model: PretrainedTextToImage, options: Options) -> None:
    from common.finetuning.adapter_file import WEIGHTS

    size = (options.out / WEIGHTS).stat().st_size
    trained, total = tuned.get_nb_trainable_parameters()
    part = max(1, len(found.losses) // 10)
    first, last = (sum(some) / part for some in (found.losses[:part], found.losses[-part:]))
    console.print(f"loss     {first:.4g} in the first tenth of the training, {last:.4g} in the last one")
    console.print(f"adapter  {size / 1e6:.1f} MB for {trained:,} of {total:,} weights at the end")
    console.print("memory   " + ", ".join(f"{name} {size / 1e6:.1f}" for name, size in found.memory.items()) + " MB")
    console.print(f"\n{options.out} holds the adapter, samples.png and report.json. Next, in Python:\n")
    console.print(_usage(model, options), markup=False)


def _usage(model: Any, options: Options) -> str:
    part = "transformer" if model.predicts == "flow" else "unet"
    return "\n".join(
        [
            "from diffusers import DiffusionPipeline",
            "from common.finetuning import SaraModel",
            f"pipe = DiffusionPipeline.from_pretrained({options.model!r})",
            f"SaraModel.from_pretrained(pipe.{part}, {str(options.out)!r}).set_scale(1.0)",
        ]
    )


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
