"""From finished trainings to the numbers that claims read: (metric, variant, value), one set a seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from common import seeds
from papers.rl_subnetworks import method
from papers.rl_subnetworks.experiment import Run
from papers.rl_subnetworks.method import State
from papers.rl_subnetworks.settings import Params

__all__ = ["checks", "of_overlaps", "of_run", "of_subnetworks"]

Rows = Iterator[tuple[str, str, float]]
SAME = 1e-4  # weights closer than this count as the same, as in the paper
MAIN = "rl/bfloat16"  # the run whose subnetwork is trained alone


def of_run(params: Params, before: State, label: str, run: Run) -> Rows:
    """What a training reached, and how sparse, dense and full of rank its update is."""
    yield "accuracy", label, run.accuracy[max(run.accuracy)]
    yield "steps", label, run.steps
    yield "reached", label, run.reached
    yield "surprise", label, run.surprise
    for tolerance in params.tolerances:
        yield "sparsity", f"{label}/{tolerance:g}", method.sparsity(method.changed(before, run.state, tolerance))
    in_bfloat16 = {name: method.rounded(weight) for name, weight in run.state.items()}
    yield "rounded_sparsity", label, method.sparsity(method.changed(before, in_bfloat16))
    yield "density", label, method.density(before, run.state)
    yield "rank", label, method.rank_share(before, run.state)
    by_matrix = list(of_matrices(before, run.state).values())
    yield "untouched", label, sum(share == 1 for share in by_matrix) / len(by_matrix)
    yield "spread", label, max(by_matrix) - min(by_matrix)


def of_matrices(before: State, after: State) -> dict[str, float]:
    """Sparsity of the update of every weight matrix."""
    marked = method.changed(before, after)
    return {name: method.sparsity({name: part}) for name, part in marked.items() if part.ndim == 2}


def of_subnetworks(before: State, full: Run, alone: Mapping[str, Run]) -> Rows:
    """`sub` and `random`, trained alone, beside the full run: accuracy, weights that are the same, weights that stayed.

    same_weights is the share of those that the full run changed; of the rest any frozen subnetwork has all.
    """
    mask = method.changed(before, full.state)
    count = max(1, sum(int(part.sum()) for part in mask.values()))
    for name, run in {**alone, "base": Run(dict(before), 0, {0: full.accuracy[0]}, False, 0.0)}.items():
        near = {key: ~part for key, part in method.changed(full.state, run.state, SAME).items()}
        yield "accuracy", name, run.accuracy[max(run.accuracy)]
        yield "same_weights", name, sum(int((near[key] & mask[key]).sum()) for key in near) / count
        yield "same_weights", f"{name}/all", sum(int(part.sum()) for part in near.values()) / _size(near)
    moved = method.changed(before, alone["sub"].state)
    yield "moved_outside", "sub", sum(int((moved[key] & ~mask[key]).sum()) for key in mask)


def of_overlaps(before: State, first: Mapping[str, Run], second: Mapping[str, Run]) -> Rows:
    """Share of the weights that one seed's RL changed which others change: another seed's, SFT's, the smallest ones."""
    for precision in ("bfloat16", "master"):
        own, other, tuned = (
            method.changed(before, run.state)
            for run in (first[f"rl/{precision}"], second[f"rl/{precision}"], first[f"sft/{precision}"])
        )
        yield "overlap", f"{precision}/seeds", method.overlap(own, other)
        yield "overlap", f"{precision}/chance", 1 - method.sparsity(other)
        yield "overlap", f"{precision}/sft", method.overlap(own, tuned)
        yield "overlap", f"{precision}/sft chance", 1 - method.sparsity(tuned)
        yield "overlap", f"{precision}/smallest", method.overlap(own, method.smallest(before, own))


def checks(seed: int) -> Rows:
    """What has to hold exactly, on random numbers: GRPO's first step is REINFORCE, and bfloat16 loses small steps."""
    draw = seeds.generator(seed, "checks")
    logits = torch.randn(8, 5, 7, generator=draw, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(7, (8, 5), generator=draw)
    advantage = method.advantages(torch.rand(2, 4, generator=draw, dtype=torch.float64)).flatten()
    new = method.log_probabilities(logits, tokens)
    losses = (method.policy_loss(new, new.detach(), advantage, clip=0.2), -(advantage[:, None] * new).mean())
    found, wanted = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in losses)
    yield "check", "reinforce", ((found - wanted).norm() / wanted.norm()).item()
    for precision in ("float32", "bfloat16", "master"):
        layer = torch.nn.Linear(1, 1, bias=False)
        layer.weight.data.fill_(1.0)
        weights = method.Weights(layer, precision)
        for _ in range(100):
            weights.trained[0].data.add_(1e-3)  # less than half of the distance to 1's neighbour, 1 / 128
            weights.store()
        yield "moved", precision, layer.weight.item() - 1


def _size(state: State) -> int:
    return sum(part.numel() for part in state.values())
