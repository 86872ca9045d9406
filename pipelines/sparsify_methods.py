"""How `resparse sparsify` makes a model N:M: in one shot, or by a training that goes on where it was interrupted.

magnitude, wanda, sparsegpt   common.sparsity.criteria; nothing is trained
srste                         SR-STE of common.sparsity, with AdamW; with SGD where there is batch normalisation
cast                          CAST of papers.cast: AdamS, weight scaling, the dense model as teacher
"""

from __future__ import annotations

import contextlib
import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import files
from common.sparsity import SRSTE, Dense, NMConfig, sparsify_
from common.sparsity.criteria import prune_
from common.sparsity.pretrained import Opened
from common.training import NonFiniteError, Schedule, fit
from papers.cast import method as cast
from pipelines.sparsify_tasks import Options, SparsifyError, Task, loss

ONE_SHOT = ("magnitude", "wanda", "sparsegpt")
TRAINED = ("srste", "cast")
CHECKPOINT = "training.pt"
CHECKPOINTS, CHECKPOINT_S = 20, 300.0  # a checkpoint after each twentieth of the steps, and after five minutes
WARMUP, CLIP = 0.05, 1.0  # share of the steps; norm of the gradient
ADAM_LR, SGD_LR, SGD_MOMENTUM, SGD_DECAY = 2e-4, 1e-2, 0.9, 1e-4
CAST_HEADROOM = 4.0  # mean magnitudes that a pruned weight can be moved by
LOST = 100.0  # nats a token or an image: to guess among a million takes 14
MEASURED = 8  # batches of the gradient's scale


@contextlib.contextmanager
def as_one_line() -> Iterator[None]:
    """Tell what a library finds wrong with the input as a mistake of the user's: without a traceback."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise SparsifyError(str(error)) from error


def choose(opened: Opened, options: Options) -> tuple[list[str], dict[str, str]]:
    """The names of the layers to prune, and why the other Linear and Conv2d layers stay dense.

    By default all but the head that m divides; CAST prunes Linear layers alone. Raises SparsifyError where `--where`
    names something that cannot be pruned, or nothing is left.
    """
    network, n, m = opened.network, options.n, options.m
    with as_one_line():
        handle = sparsify_(network, NMConfig(n, m, where=list(options.where) or None, recipe=Dense()))
    names, skipped = list(handle.layers), handle.skipped
    handle.remove()
    if not options.where and opened.kind == "causal_lm":
        head = network.get_output_embeddings()  # type: ignore[operator]
        skipped |= {name: "the head" for name in names if network.get_submodule(name) is head}
    if options.method == "cast":
        convolutions = [name for name in names if isinstance(network.get_submodule(name), nn.Conv2d)]
        if convolutions and options.where:
            raise SparsifyError(f"--where: {convolutions[0]} is a convolution, and cast is for Linear; use srste")
        skipped |= dict.fromkeys(convolutions, "a convolution, and cast is for Linear")
    names = [name for name in names if name not in skipped]
    if not names:
        raise SparsifyError(
            f"no layer of {opened.name} is left for {options.method}; expected Linear layers; use --method srste, or "
            "name layers by --where"
        )
    _refuse_shared(network, names)
    return names, skipped


def prune(task: Task, network: nn.Module, layers: list[str], options: Options) -> dict[str, Tensor]:
    """Make a network N:M, in place; returns its masks. `options.out` is where a training keeps its checkpoint.

    Raises SparsifyError for input that does not fit, and where a training breaks.
    """
    if options.method in ONE_SHOT:
        calibration = None if options.method == "magnitude" else task.calibration()
        with as_one_line():
            return prune_(network, options.n, options.m, method=options.method, calibration=calibration, where=layers)  # type: ignore[arg-type]
    with as_one_line():
        training = {"srste": _srste, "cast": _cast}[options.method](task, network, layers, options)
    _train(task, network, training, options)
    network.eval()
    return training.finish()


def untrained(task: Task, network: nn.Module, layers: list[str], options: Options) -> float:
    """The score of a copy that is pruned by magnitude and not trained: what a training has to be better than."""
    bare = copy.deepcopy(network)
    with as_one_line():
        prune_(bare, options.n, options.m, method="magnitude", where=layers)
    return task.score(bare, "pruned, not trained")


@dataclass
class _Training:
    """What a method brings to the loop: optimizer and peak learning rate, the loss, what follows each step, what ends
    it, and its own state for a checkpoint."""

    optimizer: torch.optim.Optimizer
    lr: float
    loss: Callable[[nn.Module, Any], Tensor]
    finish: Callable[[], dict[str, Tensor]]
    after_step: Callable[[], None] = lambda: None
    state: Callable[[], dict[str, Any]] = dict
    load: Callable[[Mapping[str, Any]], object] = lambda state: None


def _srste(task: Task, network: nn.Module, layers: list[str], options: Options) -> _Training:
    handle = sparsify_(network, NMConfig(options.n, options.m, where=layers, recipe=SRSTE()))
    normalised = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
    lr = options.lr or (SGD_LR if normalised else ADAM_LR)
    if normalised:
        optimizer = torch.optim.SGD(network.parameters(), lr, momentum=SGD_MOMENTUM, weight_decay=SGD_DECAY)
    else:
        optimizer = torch.optim.AdamW(network.parameters(), lr)

    def finish() -> dict[str, Tensor]:
        handle.finalize_()
        masks = handle.masks()
        handle.remove(keep="zeros")
        return masks

    return _Training(optimizer, lr, partial(loss, task), finish, handle.step, handle.state_dict, handle.load_state_dict)


def _cast(task: Task, network: nn.Module, layers: list[str], options: Options) -> _Training:
    n, m, steps = options.n, options.m, options.steps
    teacher = copy.deepcopy(network).eval().requires_grad_(False)
    scope = {name: layer for name, layer in network.named_modules() if name in layers and isinstance(layer, nn.Linear)}
    weights = [cast.raw(layer) for layer in scope.values()]
    size = sum(w.detach().abs().sum().item() for w in weights) / sum(w.numel() for w in weights)
    lr = options.lr or CAST_HEADROOM * size / cast.reach(_schedule(steps).share, steps)
    decay = 0.0
    for batch in task.batches(MEASURED, 0):
        network.zero_grad()
        loss(task, network, batch).backward()
        decay += cast.gradient_scale(weights) / MEASURED
    network.zero_grad()
    halves = all(layer.in_features % (cast.GROUPS * m) == 0 for layer in scope.values())
    cast.scale_(scope, m, cast.GROUPS if halves else 1)
    optimizer = cast.AdamS(
        [cast.raw(layer) for layer in scope.values()],
        cast.out_of_scope(network, scope),
        lr=lr,
        decay=decay,
        steps=steps,
        n=n,
        m=m,
    )

    def distilled(student: nn.Module, batch: Any) -> Tensor:
        logits, targets = task.predict(student, batch)
        with torch.no_grad():
            told, _ = task.predict(teacher, batch)
        return cast.distillation(logits, told, targets, eta=cast.ETA)

    return _Training(optimizer, lr, distilled, lambda: cast.finalize_(scope, n, m))


# ------------------------------------------------------------------------------------------------------------ the loop


@dataclass(frozen=True)
class _Rest(Schedule):
    """What is left of a schedule of `steps + done` steps after the first `done`."""

    done: int = 0

    def __post_init__(self) -> None:
        pass

    def share(self, step: int) -> float:
        return _schedule(self.steps + self.done).share(step + self.done)


def _schedule(steps: int) -> Schedule:
    return Schedule(steps, int(WARMUP * steps))


def _train(task: Task, network: nn.Module, training: _Training, options: Options) -> None:
    kept = options.out / CHECKPOINT
    done = good = _resume(kept, network, training)
    every, looked = max(1, options.steps // CHECKPOINTS), time.monotonic()

    def after_step(count: int) -> None:
        nonlocal good, looked
        training.after_step()
        step = done + count
        if step % every == 0 or time.monotonic() - looked > CHECKPOINT_S:
            looked = time.monotonic()
            if not _fault(task, network):
                _keep(kept, network, training, step)
                good = step

    def bar(iterable: Any, title: str, *, total: int) -> Any:
        title = f"{options.method} {options.n}:{options.m}"
        return tqdm(iterable, title, options.steps, initial=done, unit="step", file=sys.stdout, ascii=True)

    def broken(what: str, step: int) -> SparsifyError:
        if good:
            left = f"the last good state, after step {good}, is kept in {kept}; give the same command with a smaller "
            left += f"--lr to go on from there, or remove {options.out} to begin anew"
        else:
            left = "no step was good yet; give the same command with a smaller --lr"
        return SparsifyError(f"{what} in step {step} of {options.steps} at learning rate {training.lr:g}; {left}")

    if done == options.steps:
        return
    try:
        fit(
            network,
            task.batches(options.steps, done),
            training.loss,
            training.optimizer,
            _Rest(options.steps - done, done=done),
            clip=CLIP,
            after_step=after_step,
            progress=bar,
        )
    except NonFiniteError as error:
        raise broken("loss or gradient is not finite", done + error.step + 1) from error
    except ValueError as error:
        raise SparsifyError(str(error)) from error
    if fault := _fault(task, network):
        raise broken(fault, options.steps)


def _fault(task: Task, network: nn.Module) -> str:
    """What is wrong with the weights by their loss and gradient on held-out data, or nothing.

    Those after an update have not been tried yet, and a normalisation can hide from the loss that they run away.
    """
    network.eval()  # nothing is drawn, and no statistics are kept
    found = loss(task, network, task.probe())
    slopes = torch.autograd.grad(found, [p for p in network.parameters() if p.requires_grad], allow_unused=True)
    network.train()
    norm = nn.utils.get_total_norm([slope for slope in slopes if slope is not None])
    if not (math.isfinite(found.item()) and math.isfinite(norm.item())):
        return "loss or gradient is not finite"
    return f"the weights have run away (a held-out loss of {found.item():.3g} nats)" if found.item() > LOST else ""


def _keep(path: Path, network: nn.Module, training: _Training, step: int) -> None:
    content = {
        "step": step,
        "network": network.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "method": training.state(),
        "random": torch.get_rng_state(),
    }
    files.write(path, partial(torch.save, content))


def _resume(path: Path, network: nn.Module, training: _Training) -> int:
    """Go back to the checkpoint, if there is one; returns the steps it has seen. The learning rate may be another."""
    if not path.is_file():
        return 0
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip and pickle each have their own
        reason = str(error).splitlines()[0]
        raise SparsifyError(f"{path} cannot be read ({reason}); remove it to begin the training anew") from error
    network.load_state_dict(content["network"])
    training.optimizer.load_state_dict(content["optimizer"])
    training.load(content["method"])
    torch.set_rng_state(content["random"])
    for group in training.optimizer.param_groups:
        group["lr"] = group["initial_lr"] = training.lr
    return content["step"]


def _refuse_shared(network: nn.Module, names: list[str]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name in names:
        weight: Any = network.get_submodule(name).weight
        others = [other for other in owners[id(weight)] if other != f"{name}.weight"]
        if others:
            raise SparsifyError(f"--where: {name} shares its weight with {others[0]}; leave it out")
