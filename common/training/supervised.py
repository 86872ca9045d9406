"""A plain training loop: batches in, one optimizer step each, cosine schedule, and a stop where numbers break."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import files

__all__ = ["NonFiniteError", "Schedule", "accuracy", "fit"]

KEEP_EVERY = 100  # steps between two copies of the state that a broken training falls back to


class NonFiniteError(ArithmeticError):
    """A loss or gradient became NaN or infinite; the network is back in its last kept good state.

    `step` where it broke, `good_step` the updates that the restored state has seen, `losses` all before it.
    """

    def __init__(self, message: str, *, step: int, good_step: int, losses: list[float]):
        super().__init__(
            f"{message}; expected finite numbers. The network is back where it was after {good_step} steps. Lower the "
            "learning rate, warm up longer or clip the gradient."
        )
        self.step, self.good_step, self.losses = step, good_step, losses


def no_bar(iterable: Iterable[Any], title: str, *, total: int) -> Any:
    """A bar that is not drawn: the default of `fit`."""
    from tqdm import tqdm

    return tqdm(iterable, title, total, disable=True)


@dataclass(frozen=True)
class Schedule:
    """The share of the peak learning rate in step 0..steps-1: linear warm-up, then a cosine to zero.

    Raises ValueError unless 0 <= warmup < steps.
    """

    steps: int
    warmup: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"Schedule: got steps={self.steps}, warmup={self.warmup}; expected 0 <= warmup < steps.")

    def share(self, step: int) -> float:
        """(step + 1) / warmup at first, then (1 + cos(pi p)) / 2 for progress p from 0 to 1."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return (1 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup))) / 2


def fit(
    network: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    *,
    clip: float | None = None,
    after_step: Callable[[int], None] | None = None,
    progress: Callable = no_bar,
    keep: Path | None = None,
) -> list[float]:
    """Train in place for `schedule.steps` steps; returns the loss of each step.

    Args:
        batches: at least as many batches as steps; an endless generator will do.
        loss: (network, batch) -> scalar; it moves the batch to the network's device.
        optimizer: with the peak learning rate of each group; the schedule scales it.
        clip: largest norm of the gradient over all parameters; larger ones are scaled down to it.
        after_step: called with the number of steps done, after each of them.
        progress: (iterable, title, total=...) -> a bar with `set_postfix`, such as `record.progress`.
        keep: a file that gets the state of the training now and then; where it is there, the training goes on from it
            (batches before that place are drawn and passed over). Whoever gives it removes it.

    Deterministic for given batches, initial weights and thread count. Raises NonFiniteError, with the network put back,
    and ValueError where the batches end too early.
    """
    network.train()
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.share)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    losses = _resume(keep, network, optimizer, rates)
    done = len(losses)
    good, good_step = _copy(network), done
    bar = progress(zip(range(schedule.steps), batches, strict=False), "training", total=schedule.steps)
    for step, batch in bar:
        if step < done:
            continue
        optimizer.zero_grad()
        value = loss(network, batch)
        value.backward()
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        number = value.item()
        if not (math.isfinite(number) and bool(norm.isfinite())):
            network.load_state_dict(good)
            what = "the gradient is not finite" if math.isfinite(number) else f"the loss is {number}"
            where = f"in step {step} of {schedule.steps} at learning rate {rates.get_last_lr()[0]:g}"
            raise NonFiniteError(f"fit: {what} {where}", step=step, good_step=good_step, losses=losses)
        if step > done and step % KEEP_EVERY == 0:  # these weights gave a finite loss and gradient
            good, good_step = _copy(network), step
            if keep:
                _keep(keep, good, optimizer, rates, losses)
        if clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        optimizer.step()
        rates.step()
        losses.append(number)
        if after_step:
            after_step(step + 1)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{number:.3g}")
    if len(losses) < schedule.steps:
        raise ValueError(f"fit: the batches ended after {len(losses)} of {schedule.steps} steps; give as many.")
    return losses


@torch.no_grad()
def accuracy(network: nn.Module, batches: Iterable[Sequence[Tensor]]) -> float:
    """Top-1 accuracy in percent over batches of (inputs [B, ...], labels [B]), in evaluation mode.

    Raises ValueError where there is nothing to classify.
    """
    device, was_training = next(network.parameters()).device, network.training
    network.eval()
    right = total = 0
    for inputs, labels in batches:
        right += int((network(inputs.to(device)).argmax(dim=-1) == labels.to(device)).sum())
        total += len(labels)
    network.train(was_training)
    if not total:
        raise ValueError("accuracy: got no batch, expected at least one; see what the loader was given.")
    return 100 * right / total


def _keep(path: Path, network: dict[str, Any], optimizer: Any, rates: Any, losses: list[float]) -> None:
    state = {"network": network, "optimizer": optimizer.state_dict(), "rates": rates.state_dict(), "losses": losses}
    files.write(path, lambda stream: torch.save(state, stream))


def _resume(path: Path | None, network: nn.Module, optimizer: Any, rates: Any) -> list[float]:
    """Losses of the steps already done; network, optimizer and schedule are put where they were."""
    if path is None or not path.is_file():
        return []
    state = torch.load(path, weights_only=False)  # our own file
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    rates.load_state_dict(state["rates"])
    print(f"resparse: a training goes on after {len(state['losses'])} steps")
    return state["losses"]


def _copy(network: nn.Module) -> dict[str, Any]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}
