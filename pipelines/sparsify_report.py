"""What `resparse sparsify` says at its end: that the saved model is the same, its size, and its speed here."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from common import files, provenance
from common.sparsity.packed import PackedLinear
from common.sparsity.pretrained import WEIGHTS, Opened, cast_
from common.sparsity.report import Report
from pipelines.sparsify_tasks import Options, SparsifyError, Task

ROUNDS, ENOUGH_S = (5, 50), 3.0  # of a timing: no fewer, no more, and between them until so long
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the largest output: sums in another order, layer on layer
LONG_TABLE = 40  # layers; longer ones go to the report alone


@dataclass(frozen=True)
class Speed:
    """One model on one input: seconds of a forward pass and how many times as fast as the dense one it is, each as
    lower quartile, median and upper quartile over the rounds."""

    inputs: str
    model: str
    seconds: tuple[float, float, float]
    ratio: tuple[float, float, float]


@dataclass
class Findings:
    """What is measured, in the order in which it comes to be known; `report.json` holds it. `untrained`, of a training
    alone: the model pruned by magnitude and not trained."""

    before: float
    untrained: float | None = None
    pruned: float = 0.0
    loaded: float = 0.0
    difference: float = 0.0
    largest: float = 0.0
    packed_layers: int = 0
    speeds: list[Speed] = field(default_factory=list)


def compare(task: Task, dense: nn.Module, loaded: nn.Module, dtype: torch.dtype, found: Findings) -> None:
    """Check that the loaded model computes what the pruned one does, on held-out data; fills `found`.

    Raises SparsifyError where it does not.
    """
    with torch.no_grad():
        batch = task.probe()
        expected, got = (task.predict(network, batch)[0].double() for network in (dense, loaded))
    found.difference = (got - expected).abs().max().item()
    found.largest = expected.abs().max().item()
    found.packed_layers = sum(isinstance(layer, PackedLinear) for layer in loaded.modules())
    if not found.difference <= ROUNDING[dtype] * found.largest:
        raise SparsifyError(
            f"the loaded model computes something else: outputs differ by up to {found.difference:.3g}, of up to "
            f"{found.largest:.3g}; the folder is kept for a look; please report this"
        )
    found.pruned, found.loaded = task.score(dense, "pruned"), task.score(loaded, "loaded")


def measure(task: Task, dense: nn.Module, loaded: nn.Module, dtype: torch.dtype) -> list[Speed]:
    """Time the dense and the packed model in turns, in this process. Dense bfloat16 is timed too: it is what a user
    would take first where the processor is good at it."""
    stored = str(dtype).removeprefix("torch.")
    networks = {f"dense {stored}": dense, f"packed {stored}": loaded}
    if dtype != torch.bfloat16:
        networks["dense bfloat16"] = cast_(copy.deepcopy(dense), torch.bfloat16)
    speeds = []
    for label, inputs in task.samples().items():
        runs = {}
        for name, network in networks.items():
            narrow = inputs.to(torch.bfloat16) if "bfloat16" in name and inputs.is_floating_point() else inputs
            runs[name] = _run(task, network, narrow)
        seconds = _rounds(runs)
        base = seconds[f"dense {stored}"]
        for name, times in seconds.items():
            ratio = [slow / fast for slow, fast in zip(base, times, strict=True)]
            speeds.append(Speed(label, name, _quartiles(times), _quartiles(ratio)))
    return speeds


def show(console: Console, task: Task, found: Findings, sizes: Report, options: Options) -> None:
    """Print what was found."""
    lines = str(sizes).splitlines()
    if len(sizes.layers) > LONG_TABLE:
        lines = [f"layer by layer: {options.out / 'REPORT.md'}", *lines[len(sizes.layers) + 1 :]]
    for line in ["", *lines, ""]:
        console.print(line, markup=False, highlight=False)
    table = Table("input", "model", "ms (quartiles)", "times as fast", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for row in _speed_rows(found):
        table.add_row(*row)
    console.print(table)
    for line in _summary(task, found, options):
        console.print(line, markup=False, highlight=False)


def write(
    task: Task, opened: Opened, found: Findings, sizes: Report, options: Options, skipped: dict[str, str]
) -> None:
    """REPORT.md and report.json in the folder."""
    machine = provenance.machine() | {"threads": torch.get_num_threads(), "device": options.device}
    typed = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}
    content = {
        "options": typed,
        "metric": task.metric,
        **asdict(found),
        "weights": sizes.weights,
        "kept": sizes.kept,
        "dense_bytes": sizes.dense_bytes,
        "packed_bytes": sizes.packed_bytes,
        "file_bytes": (options.out / WEIGHTS).stat().st_size,
        "dense_layers": skipped,
        "machine": machine,
        "environment": provenance.environment(),
    }
    files.write_json(options.out / "report.json", content)
    rows = "\n".join(f"| {' | '.join(row)} |" for row in _speed_rows(found))
    stay = "\n".join(f"- `{name}`: {why}" for name, why in skipped.items()) or "- none"
    files.write(
        options.out / "REPORT.md",
        f"# {opened.name}, {options.n}:{options.m} by {options.method}\n\n"
        + "\n".join(f"- {line}" for line in [task.describe, *_summary(task, found, options)])
        + f"\n\n## Size\n\n```\n{sizes}\n```\n\nDense layers:\n\n{stay}\n\n"
        f"## Speed\n\nForward passes in turns in one process, {machine['threads']} threads of {machine['cpu']}, on "
        f"{options.device}; median and quartiles.\n\n| input | model | ms (quartiles) | times as fast |\n"
        f"| --- | --- | --- | --- |\n{rows}\n\n## Use\n\n```python\n{usage(options)}\n```\n",
    )


def usage(options: Options) -> str:
    """How to load the result."""
    return f'from common.sparsity.pretrained import load\nmodel, tokenizer = load("{options.out}")'


def _summary(task: Task, found: Findings, options: Options) -> list[str]:
    unit = task.unit
    return [
        f"{task.metric} on held-out data: {found.before:.4g}{unit} before, {found.loaded:.4g}{unit} after",
        *_warning(task, found, options),
        f"loaded back: {task.metric} {found.loaded:.6g}{unit}, {found.pruned:.6g}{unit} before it was packed; outputs "
        f"differ by up to {found.difference:.2g}, of up to {found.largest:.3g}",
        f"file: {WEIGHTS}, {(options.out / WEIGHTS).stat().st_size / 2**20:.2f} MiB",
        *_verdict(found),
    ]


def _warning(task: Task, found: Findings, options: Options) -> list[str]:
    """Of a training that left the model worse than pruning alone would have."""
    if found.untrained is None:
        return []
    gain = found.loaded - found.untrained if task.larger_is_better else found.untrained - found.loaded
    if gain >= 0:  # not so with NaN
        return []
    lr = f"--lr {options.lr / 10:g} instead of {options.lr:g}" if options.lr else "a smaller --lr"
    return [
        f"warning: the trained model is worse than an untrained one: {task.metric} {found.loaded:.4g}{task.unit} after "
        f"{options.steps} steps, expected better than the {found.untrained:.4g}{task.unit} of pruning by magnitude "
        f"alone; next, with another --out: {lr}, more --steps, or --method wanda, which does not train"
    ]


def _verdict(found: Findings) -> list[str]:
    """What the times mean for a user; nothing is called a gain or a loss where the quartiles do not agree."""
    packed = [speed for speed in found.speeds if speed.model.startswith("packed")]
    if not packed:
        return []
    told = ", ".join(f"{speed.ratio[1]:.2f} times as fast as dense at {speed.inputs}" for speed in packed)
    if not found.packed_layers:
        return [f"speed here: {told}; no layer runs packed, so a difference is noise: what is saved is the file"]
    if all(speed.ratio[0] > 1 for speed in packed):
        return [f"speed here: {told}"]
    if all(speed.ratio[2] < 1 for speed in packed):
        return [f"speed here: {told}; no gain here, what is saved is the file"]
    return [f"speed here: {told}; a gain only where that is above 1"]


def _speed_rows(found: Findings) -> list[list[str]]:
    rows = []
    for speed in found.speeds:
        low, middle, high = (1000 * second for second in speed.seconds)
        slow, ratio, fast = speed.ratio
        times = f"{ratio:.2f} ({slow:.2f} to {fast:.2f})"
        rows.append([speed.inputs, speed.model, f"{middle:.3g} ({low:.3g} to {high:.3g})", times])
    return rows


def _run(task: Task, network: nn.Module, inputs: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        task.run(network, inputs)
        if inputs.is_cuda:
            torch.cuda.synchronize()

    return run


@torch.no_grad()
def _rounds(runs: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Seconds by name and round, after a warm-up; every other round in reverse order."""
    for run in [*runs.values(), *runs.values()]:
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    began, least = time.perf_counter(), ROUNDS[0]
    for done in range(ROUNDS[1]):
        if done >= least and time.perf_counter() - began > ENOUGH_S:
            break
        for name, run in list(runs.items())[:: 1 if done % 2 else -1]:
            before = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - before)
    return seconds


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
