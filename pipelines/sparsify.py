"""`resparse sparsify`: a user's own model made N:M, packed, loaded back and measured."""

from __future__ import annotations

import difflib
import json
import shlex
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:  # imports of ours stand inside the functions: `resparse --help` must not wait for torch
    from rich.console import Console

    from common.sparsity.pretrained import Opened
    from pipelines.sparsify_tasks import Options, Task

METHODS = ("magnitude", "wanda", "sparsegpt", "srste", "cast")
UNFINISHED = "unfinished.json"  # in the out folder while it is worked on: what a run must share to go on with it
MAY_CHANGE = ("out", "lr", "held_out", "device")  # between two of its runs
SHOWN = 6  # names of layers in a line


def sparsify(
    model: Annotated[str, typer.Option(help="folder or hub name of a causal LM, torchvision:NAME or timm:NAME")],
    data: Annotated[
        str, typer.Option(help="a text, a folder of .txt, text_wikitext2, text_tinyshakespeare; or images")
    ],
    n: Annotated[int, typer.Option("--n", help="weights that are kept")] = 2,
    m: Annotated[int, typer.Option("--m", help="of so many neighbours")] = 8,
    method: Annotated[str, typer.Option(help=f"one of {', '.join(METHODS)}; the last two train")] = "wanda",
    out: Annotated[Path | None, typer.Option(help="new folder for the result; default: <model>_2of8")] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="layers by name or pattern, may be given again; default: all but the head"),
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="a classifier's state dict; default: the published one")] = None,
    steps: Annotated[int, typer.Option(min=1, help="of a training")] = 500,
    batch: Annotated[int, typer.Option(min=1, help="windows of text, or images, at once")] = 8,
    length: Annotated[int, typer.Option(min=0, help="tokens of context; 0: what the model sees, 512 at most")] = 0,
    size: Annotated[int, typer.Option(min=0, help="pixels a side of images; 0: what the model expects")] = 0,
    lr: Annotated[float, typer.Option(min=0, help="peak learning rate; 0: the method's own")] = 0.0,
    calibration: Annotated[int, typer.Option(min=1, help="windows or images that wanda, sparsegpt look at")] = 128,
    held_out: Annotated[
        int, typer.Option(min=0, help="held-out tokens or images that are scored, at most; 0: 32768 or 2000")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="of the order, the windows and the split of images")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda; default: cuda if there is one")] = "",
) -> None:
    """Make your own model N:M sparse: prune or train it, save it packed, load it back, and measure it.

    [dim]resparse sparsify --model gpt2 --data text_wikitext2 --n 2 --m 8 --method srste --steps 2000
    resparse sparsify --model torchvision:resnet18 --weights flowers.pt --data photos/flowers --m 4[/dim]

    A text is split by position, the last tenth is held out; a folder's test.txt is held out as a whole. Images lie in
    train/<class>/ and val/<class>/, or in <class>/ alone, of which a tenth is held out. A training that was stopped
    goes on where it was by the same command. One that ends worse than pruning alone is a result with a warning, in the
    report too, and no failure: the exit code is 0, for the model is saved and is what was measured.
    """
    from pipelines.sparsify_tasks import Options

    _refuse(model, data, n, m, method)
    base = Path(model.rpartition(":")[2]).absolute().name
    folder = out or Path(f"{base}_{n}of{m}")
    options = Options(
        model=model,
        data=data,
        n=n,
        m=m,
        method=method,
        out=folder,
        where=tuple(where or ()),
        weights=weights,
        steps=steps,
        batch=batch,
        length=length,
        size=size,
        lr=lr,
        calibration=calibration,
        held_out=held_out,
        seed=seed,
        device=_device(device),
    )
    try:
        run(options)
    except KeyboardInterrupt:
        from pipelines.sparsify_methods import CHECKPOINT

        kept = f"what was reached is kept in {folder}" if (folder / CHECKPOINT).is_file() else "nothing was kept yet"
        print(f"\nresparse: stopped, {kept}. To go on: resparse {shlex.join(sys.argv[1:])}")
        raise typer.Exit(130) from None


def run(options: Options) -> None:
    """The whole of it. Raises SparsifyError, MissingWeights and OSError for what a user can mend."""
    import torch
    from rich.console import Console

    from common import seeds
    from common.sparsity.pretrained import load, open_model, save
    from pipelines import sparsify_methods as methods
    from pipelines import sparsify_report as report
    from pipelines.sparsify_tasks import image_classes, open_task

    console = Console(soft_wrap=True, highlight=False)
    _look_at(options.out)
    classes = image_classes(options.data) if options.model.startswith(("torchvision:", "timm:")) else None
    opened = open_model(options.model, weights=options.weights, classes=classes)
    task = open_task(opened, options)
    layers, skipped = methods.choose(opened, options)
    _claim(options, task)
    _introduce(console, opened, task, options, layers, skipped)

    seeds.everything(options.seed, deterministic=False)
    network = opened.network.to(options.device)
    found = report.Findings(before=task.score(network, "before"))
    console.print(f"before   {task.metric} {found.before:.4g}{task.unit}")
    if options.method in methods.TRAINED:
        found.untrained = methods.untrained(task, network, layers, options)
        console.print(f"pruned   {task.metric} {found.untrained:.4g}{task.unit}, by magnitude and not trained")
    masks = methods.prune(task, network, layers, options)
    network.cpu().eval()
    sizes = save(opened, {name: mask.cpu() for name, mask in masks.items()}, options.n, options.m, options.out)
    loaded, _ = load(options.out)
    dense, loaded = network.to(options.device), loaded.to(options.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "kernels.nm.linear: on this machine a dense")  # the table says where
        report.compare(task, dense, loaded, opened.dtype, found)
        console.print(f"after    {task.metric} {found.loaded:.4g}{task.unit}")
        found.speeds = report.measure(task, dense, loaded, opened.dtype)
    report.write(task, opened, found, sizes, options, skipped)
    for name in (methods.CHECKPOINT, UNFINISHED):
        (options.out / name).unlink(missing_ok=True)
    console.print(f"threads  {torch.get_num_threads()}, on {options.device}")
    report.show(console, task, found, sizes, options)
    console.print(f"\n{options.out} holds the model, its report.json and REPORT.md. Next, in Python:\n")
    console.print(report.usage(options), markup=False)


def _introduce(
    console: Console, opened: Opened, task: Task, options: Options, layers: list[str], skipped: dict[str, str]
) -> None:
    weights = sum(parameter.numel() for parameter in opened.network.parameters())
    dtype = str(opened.dtype).removeprefix("torch.")
    console.print(f"model    {type(opened.network).__name__}, {weights:,} parameters, stored in {dtype}")
    console.print(f"data     {task.describe}", markup=False)
    console.print(f"layers   {len(layers)} become {options.n}:{options.m} by {options.method}")
    reasons: dict[str, list[str]] = {}
    for name, why in skipped.items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        console.print(f"         {', '.join(names[:SHOWN])}{more}: dense, {why}", markup=False)


def _refuse(model: str, data: str, n: int, m: int, method: str) -> None:
    """What is wrong at sight, before anything is loaded."""
    from pipelines.sparsify_tasks import SparsifyError

    if method not in METHODS:
        near = difflib.get_close_matches(method, METHODS, 1, cutoff=0)[0]
        raise SparsifyError(f"--method {method}: expected one of {', '.join(METHODS)}; did you mean {near}?")
    if not 1 <= n < m <= 256:
        raise SparsifyError(f"got {n}:{m}; expected 1 <= n < m <= 256, for instance --n 2 --m 8")
    for name, typed in (("model", model), ("data", data)):
        if not typed:
            raise SparsifyError(f"--{name} is empty; expected a name or a path; see resparse sparsify --help")


def _look_at(folder: Path) -> None:
    """Refuse a folder that holds something else before anything is loaded."""
    from common.sparsity.pretrained import ABOUT
    from pipelines.sparsify_tasks import SparsifyError

    if folder.exists() and not folder.is_dir():
        raise SparsifyError(f"{folder} is a file; expected a new folder: --out FOLDER")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / UNFINISHED).is_file():
        what = "a finished model" if (folder / ABOUT).is_file() else "something else"
        raise SparsifyError(f"{folder} holds {what} already; expected a new folder: --out FOLDER, or remove it")


def _claim(options: Options, task: Task) -> None:
    """Mark the folder as worked on, or go on with it. Raises SparsifyError where its training is another one."""
    from common import files
    from pipelines.sparsify_methods import CHECKPOINT
    from pipelines.sparsify_tasks import SparsifyError

    typed = asdict(options) | {"text or images": task.fingerprint}
    wanted = {name: str(value) for name, value in typed.items() if name not in MAY_CHANGE}
    mark = options.out / UNFINISHED
    if mark.is_file() and (options.out / CHECKPOINT).is_file():
        before: dict[str, Any] = json.loads(mark.read_text(encoding="utf-8"))
        other = [
            f"{name} {before.get(name)}, now {value}" for name, value in wanted.items() if before.get(name) != value
        ]
        if other:
            raise SparsifyError(
                f"{options.out} holds an unfinished training with {'; '.join(other)}; give the same as then, another "
                "--out, or remove the folder"
            )
        return
    files.write_json(mark, wanted)


def _device(name: str) -> str:
    import torch

    from pipelines.sparsify_tasks import SparsifyError

    known = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if name and name not in known:
        raise SparsifyError(f"--device {name}: expected {' or '.join(known)}, which is what torch can use here")
    return name or known[-1]
