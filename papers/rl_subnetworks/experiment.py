"""The arms: how each is trained, in which precision, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm

from common import seeds
from common.models.rotary_lm import RotaryLM
from common.training.checkpoints import Checkpoint, checkpoint, rounded
from common.training.supervised import NonFiniteError, Schedule, fit
from papers.rl_subnetworks import data, method
from papers.rl_subnetworks.data import answer_log_probabilities
from papers.rl_subnetworks.method import Precision, State, Weights
from papers.rl_subnetworks.settings import Params

__all__ = ["ARMS", "PRECISIONS", "Arm", "Run", "again", "arms", "base", "build", "make", "start", "train"]

NO_BAR = partial(tqdm, disable=True)
BETAS, RATIO = (0.9, 0.98), 2  # of the base model's training, and of its feed-forward
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "master")
ARMS = {
    "rl": "RL",
    "rl_kl": "RL with KL",
    "rl_unclipped": "RL without clipping",
    "sft": "SFT",
    "sft_near": "SFT on own answers",
    "sft_far": "SFT off policy",
}


@dataclass(frozen=True)
class Arm:
    """A way to fine-tune: `name` of ARMS, the precision of the weights, and the learning rate."""

    name: str
    precision: Precision
    rate: float

    def label(self, params: Params) -> str:
        """Its variant of a metric: the rate only where it is not that of all arms."""
        return f"{self.name}/{self.precision}" + (f"/{self.rate:g}" if self.rate != params.rate else "")


@dataclass(frozen=True)
class Run:
    """A finished training: the weights as the network has them, steps, accuracy by steps, and whether it was reached.

    `surprise`: nats a token of what it learned from, under the base model, in the first step.
    """

    state: dict[str, Tensor]
    steps: int
    accuracy: dict[int, float]
    reached: bool
    surprise: float


def arms(params: Params) -> list[Arm]:
    """All that a seed trains."""
    found = [
        Arm(name, precision, params.rate)
        for name in params.arms
        for precision in (PRECISIONS if name in ("rl", "sft") else ("master",))
    ]
    return found + [Arm("rl", "master", rate) for rate in params.other_rates]


# ------------------------------------------------------------------------------------------------------ the base model


def build(params: Params, state: State | None = None) -> RotaryLM:
    """The model, with `state` or fresh from torch's global generator."""
    sizes = {"width": params.width, "depth": params.depth, "heads": params.heads}
    network = RotaryLM(vocabulary=data.VOCABULARY, causal=True, ratio=RATIO, **sizes)
    if state is not None:
        network.load_state_dict(state)
    return network.to(params.device)


@seeds.one_thread()
def make(params: Params, keep: Path | None = None, *, progress: Callable = NO_BAR) -> dict[str, Tensor]:
    """Train the base model; for `keep` see `fit`."""
    seeds.everything(0, deterministic=False)
    network = build(params)
    draw = seeds.generator(0, "base")

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            asked = data.prompts(params.base_batch, params.digits, draw)
            yield asked, data.written(asked, draw)

    def loss(lm: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return -answer_log_probabilities(lm, *(part.to(params.device) for part in batch)).mean()

    optimizer = torch.optim.AdamW(network.parameters(), lr=params.base_rate, betas=BETAS)
    schedule = Schedule(params.base_steps, params.base_steps // 10)
    fit(network, batches(), loss, optimizer, schedule, clip=1.0, progress=progress, keep=keep)
    return network.state_dict()


def base(params: Params, *, progress: Callable = NO_BAR) -> Checkpoint:
    """The base model of the laptop profile, read or trained."""
    names = ("dataset", "digits", "width", "depth", "heads", "base_steps", "base_rate", "base_batch")
    settings = {name: getattr(params, name) for name in names} | {"ratio": RATIO, "rare": data.RARE}
    return checkpoint("rl-sorting", settings, partial(make, params, progress=progress), retrain=params.retrain)


def start(state: State) -> dict[str, Tensor]:
    """Where every arm starts: the base model's weights in bfloat16, so that no precision begins with a change."""
    return {name: method.rounded(value.cpu()) for name, value in rounded(state).items()}


# --------------------------------------------------------------------------------------------------------- fine-tuning


@seeds.one_thread()
def train(params: Params, state: State, arm: Arm, seed: int, *, mask: State | None = None, steps: int = 0) -> Run:
    """Fine-tune from `start(state)` until the accuracy is reached, or for exactly `steps` where given.

    Prompts and samples are the same for all arms of a seed, as long as the models are. mask: trained weights.

    Raises NonFiniteError where the loss is no number any more.
    """
    network = build(params, start(state))
    reference = build(params, start(state)).requires_grad_(False)
    weights = Weights(network, arm.precision, mask)
    optimizer = torch.optim.AdamW(weights.trained, lr=arm.rate, weight_decay=0.0)
    losses = _losses(params, arm, network, reference, seed)
    found, surprise, done = {0: accuracy(params, network, seed)}, 0.0, 0
    most = steps or params.steps
    while done < most and (steps or found[max(found)] < params.target):
        loss, told = next(losses)
        if not loss.isfinite():
            raise NonFiniteError(
                f"{arm.label(params)}: the loss is {loss.item()} in step {done}", step=done, good_step=0, losses=[]
            )
        surprise = told if done == 0 else surprise
        loss.backward()
        weights.collect()
        if arm.name != "rl_unclipped":
            nn.utils.clip_grad_norm_(weights.trained, params.gradient_clip)
        optimizer.step()
        weights.store()
        done += 1
        if done % params.check == 0 or done == most:
            found[done] = accuracy(params, network, seed)
    final = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}
    return Run(final, done, found, found[max(found)] >= params.target, surprise)


def again(params: Params, state: State, arm: Arm, seed: int, full: Run, *, random: bool = False) -> Run:
    """The arm trained once more, as long as the full run, on the weights alone that changed there.

    random: on as many of each tensor, chosen at random: what any subnetwork of that size gives.
    """
    mask = method.changed(start(state), full.state)
    if random:
        mask = method.shuffled(mask, seeds.generator(seed, "random subnetwork"))
    moved = {name: part.to(params.device) for name, part in mask.items()}
    return train(params, state, arm, seed, mask=moved, steps=max(1, full.steps))


@torch.no_grad()
def accuracy(params: Params, network: nn.Module, seed: int) -> float:
    """Share of right answers among those drawn to `questions` prompts, 0..1; always the same prompts for a seed."""
    draw = _generator(params, seed, "accuracy")
    asked = data.prompts(params.questions, params.digits, seeds.generator(seed, "questions")).to(params.device)
    return data.rewards(asked, data.sample(network, asked, draw)).mean().item()


def _losses(
    params: Params, arm: Arm, network: nn.Module, reference: nn.Module, seed: int
) -> Iterator[tuple[Tensor, float]]:
    """The loss of each step, and how surprising what it learns from was to the base model."""
    asking, drawing = seeds.generator(seed, "prompts"), _generator(params, seed, "samples")
    while True:
        if arm.name.startswith("rl"):
            yield from _rl(params, arm, network, reference, asking, drawing)
        else:
            asked, answers = _demonstrated(params, arm, reference, asking, drawing)
            with torch.no_grad():
                surprise = -answer_log_probabilities(reference, asked, answers).mean().item()
            yield -answer_log_probabilities(network, asked, answers).mean(), surprise


def _rl(
    params: Params, arm: Arm, network: nn.Module, reference: nn.Module, asking: Generator, drawing: Generator
) -> Iterator[tuple[Tensor, float]]:
    """`updates` losses on the same answers of the network as it was before them."""
    asked = data.prompts(params.prompts, params.digits, asking).to(params.device)
    asked = asked.repeat_interleave(params.answers, dim=0)
    answers = data.sample(network, asked, drawing)
    advantage = method.advantages(data.rewards(asked, answers).view(params.prompts, params.answers)).flatten()
    with torch.no_grad():
        old, known = (answer_log_probabilities(lm, asked, answers) for lm in (network, reference))
    kl = {"reference": known, "kl": params.kl} if arm.name == "rl_kl" else {}
    clip = None if arm.name == "rl_unclipped" else params.clip
    for _ in range(params.updates):
        new = answer_log_probabilities(network, asked, answers)
        yield method.policy_loss(new, old, advantage, clip=clip, **kl), -known.mean().item()


def _demonstrated(
    params: Params, arm: Arm, reference: nn.Module, asking: Generator, drawing: Generator
) -> tuple[Tensor, Tensor]:
    """Prompts and right answers: as the base model mostly writes them, its own, or in the alphabet it hardly uses.

    As many sequences as RL looks at. Of its own answers those that are wrong are left out.
    """
    count = params.prompts * params.answers
    asked = data.prompts(count, params.digits, asking).to(params.device)
    if arm.name != "sft_near":
        return asked, data.demonstrations(asked, float(arm.name == "sft_far"))
    answers = data.sample(reference, asked, drawing)
    right = data.rewards(asked, answers) > 0
    if not right.any():
        raise ValueError(
            f"sft_near: got no right answer of {count} by the base model; expected some; give a larger base_steps"
        )
    return asked[right], answers[right]


def _generator(params: Params, seed: int, label: str) -> Generator:
    return seeds.generator(seed, label, device=params.device)
