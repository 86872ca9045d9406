"""Every claim of BDWP can be turned by a one-line change of the method or the data.

What can be run exactly or in seconds is run: equations, masks, counts, gradients on given weights. Claims about long
trainings and about times go through the same judging with numbers of a known order; the sabotage gives an arm what it
would reach, or a step what it would take, without the part it is named for.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from common import claims
from common import params as parameters
from common.data import images
from common.data.images import ImageSet
from common.paths import root
from common.sparsity import BDWP, SRSTE, BiMask
from common.testing import assert_sabotage_turns
from kernels import nm
from papers.bdwp import data, experiment, fidelity, method
from papers.bdwp.settings import Params, parse

CLAIMS = {claim.id: claim for claim in claims.load(root() / "papers/bdwp/claims.yaml")}
SEEDS = range(5)
# Percent right of each arm; an order that suits the claims' honest side, not a measurement.
RIGHT = {
    "dense": 77.0,
    "sr_ste/2:8": 76.8,
    "bdwp/2:8": 76.44,
    "bi_mask/2:8": 75.8,
    "transposable/2:8": 74.8,
    "bdwp_ste/2:8": 76.3,
    "sr_ste/2:4": 77.0,
    "bdwp/2:4": 76.9,
    "transposable/2:4": 75.9,
    "resnet20/dense": 78.0,
    "resnet20/bdwp/2:8": 77.44,
    "resnet20/transposable/2:8": 75.0,
    "vit/dense": 60.0,
    "vit/bdwp/2:8": 59.44,
    "vit/transposable/2:8": 57.0,
} | {
    f"{network}/{arm}": 70.0 - 0.56 * (arm != "dense")
    for network in ("vgg19", "resnet18", "resnet50")
    for arm in ("dense", "bdwp/2:8")
}
# Relative times of one layer's products
TIMES = {"forward": 0.3, "input": 0.3, "scattered": 0.4, "generation": 0.1}


def seeded(values: list[float]) -> dict[str, float]:
    return {str(seed): value for seed, value in zip(SEEDS, values, strict=False)}


def alone(metric: str, **values: float) -> dict:
    return {metric: {name: {"all": value} for name, value in values.items()}}


# ------------------------------------------------------------------------------------------------- run as they are


def followed(decay: float) -> dict:
    difference = experiment.ten_steps("bdwp", 0.3) - experiment.ten_steps_written_out(decay)
    return alone("distance", bdwp=difference.abs().max().item())


def legal(arm: str, recipe: str) -> dict:
    """Both shares of an arm whose masks another recipe finds."""
    params = parameters.load(Params, "bdwp", "smoke")
    _, handle = experiment.build(params, experiment.Arm("resnet_cifar", recipe, "2:8"), noise())
    found = experiment.illegal(handle)
    return {"illegal": {f"{arm}/{name}": seeded([share] * 3) for name, share in found.items()}}


def tiles(name: str, *, true: bool) -> dict:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    kept = nm.mask(weight, 2, 4, transposable=True) if true else method.released_transposable(weight, 2, 4)
    return alone("tiles_illegal", **{name: method.illegal_groups(kept, 2, 4, dim=0)})


@cache
def counted(name: str) -> dict[str, experiment.Counted]:
    return experiment.count(parameters.load(Params, "bdwp", "smoke"), name, noise())


def gaps(**taken_for: str) -> dict:
    """Distances of ResNet-50's counts from the closed form; `bdwp="sr_ste"` takes that of another recipe."""
    found = {}
    for arm, count in counted("resnet50").items():
        recipe, pattern = arm.split("/")
        cost = method.cost(taken_for.get(recipe, recipe), *parse(pattern))
        found[f"resnet50/{arm}"] = {"all": abs(count.layers_share - cost)}
    return {"mac_gap": found}


def mac_shares(**counts_as: str) -> dict:
    """Counted shares of the whole networks; `bdwp="sr_ste"` makes one recipe as sparse as the other."""
    found = {}
    for name in ("resnet9", "vgg19", "resnet18", "resnet50"):
        rows = counted(name)
        for arm in rows:
            recipe, pattern = arm.split("/")
            found[f"{name}/{arm}"] = {"all": rows[f"{counts_as.get(recipe, recipe)}/{pattern}"].share}
    return {"mac_share": found}


@cache
def noise() -> data.InMemory:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (64, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(64) % 10
    found = ImageSet("noise", pixels, labels, tuple("0123456789"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "digits", lambda split: found)
        return data.load(parameters.load(Params, "bdwp", "smoke"), "resnet_cifar")


@cache
def state(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    params = parameters.load(Params, "bdwp", "smoke")
    network, _ = experiment.build(params, experiment.arms(params)["dense"], noise())
    return network.state_dict()


@cache
def gradients(swaps: tuple[tuple[str, str], ...], settled: float) -> dict:
    """Measures of `fidelity` on untrained weights, those of origin `bdwp` with all that the forward view leaves out
    shrunk to the share `settled`. A swap makes one recipe find the masks of another."""
    params = parameters.load(Params, "bdwp", "smoke")
    makers = {"bdwp": BDWP(0.0), "bi_mask": BiMask(0.0, candidates=20), "sr_ste": SRSTE(0.0)}
    honest = method.recipe
    found: dict[str, dict[str, dict[str, float]]] = {"energy": {}, "cosine_dense": {}, "cosine_network": {}}

    def recipe(name: str, decay: float):
        name = dict(swaps).get(name, name)
        return makers[name] if name in makers else honest(name, decay)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method, "recipe", recipe)
        for origin in ("dense", "bdwp"):
            for seed in SEEDS:
                weights = settle(state(seed), settled) if origin == "bdwp" else state(seed)
                for name, row in fidelity.compare(params, noise(), weights).items():
                    values = {"energy": row.energy, "cosine_dense": row.dense, "cosine_network": row.network}
                    for metric, value in values.items():
                        found[metric].setdefault(f"{origin}/{name}", {})[str(seed)] = value
    return found


def settle(weights: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """What the pull does in the long run: weights outside the forward view shrink."""
    found = dict(weights)
    for name, weight in weights.items():
        if weight.ndim == 4 and not weight.shape[1] % 8:
            found[name] = torch.where(nm.mask(weight, 2, 8, dim=1), weight, share * weight)
    return found


def compared(*, settled: float = 0.2, **swaps: str) -> dict:
    return gradients(tuple(swaps.items()), settled)


# ------------------------------------------------------------------------------------------- known accuracy and times


def graded(**changes: str) -> dict:
    """Top-1 of every arm; `sr_ste="ste"` gives the first what the second has.

    A seed moves every arm by the same amount and each by a little more, as seeds do.
    """
    right = RIGHT | {name: RIGHT[other] for name, other in changes.items()}
    return {
        "top1": {
            name: seeded([value + 0.2 * (seed - 2) + 0.02 * (seed * (1 + index % 4) % 5 - 2) for seed in SEEDS])
            for index, (name, value) in enumerate(right.items())
        }
    }


def spoilt(arm: str, like: str) -> tuple[dict, dict]:
    """Honest accuracies, and those where one arm is no better than another."""
    return graded(), graded(**{arm: like})


def timed(*, generation: float = TIMES["generation"], **times: float) -> dict:
    """Times of the passes at 2:8, a dense product taking 1; five repeats."""
    passes = TIMES | times
    step = passes["forward"] + passes["input"] + 1
    total = {"dense/forward": 1.0, "dense/input": 1.0, "dense/step": 3.0}
    total |= {f"2:8/{name}": value for name, value in passes.items()}
    total |= {"2:8/step": step, "2:8/step_generated": step + generation}
    found = {}
    for layer in ("1024x256", "1024x2048"):
        for index, (name, value) in enumerate(total.items()):
            found[f"{layer}/{name}"] = seeded([value * (1 + 0.0005 * ((3 * seed + index) % 5)) for seed in SEEDS])
    return {"kernel_seconds": found}


# time of the generation with which a step is 1.75 times as fast as a dense one
FPGA = 3 / 1.75 - 1 - TIMES["forward"] - TIMES["input"]

# the arms of the published networks, left dense
UNPRUNED = {f"{prefix}bdwp/2:8": f"{prefix}dense" for prefix in ("", "vit/", "vgg19/", "resnet18/", "resnet50/")}

SABOTAGE = {
    # run as they are
    "layers-follow-the-equations": lambda: (followed(0.3), followed(0.31)),
    "both-directions-are-legal": lambda: (legal("bdwp/2:8", "bdwp"), legal("bdwp/2:8", "sr_ste")),
    "one-direction-is-not-enough": lambda: (legal("sr_ste/2:8", "sr_ste"), legal("sr_ste/2:8", "transposable")),
    "released-tiles-are-not-transposable": lambda: (tiles("released", true=False), tiles("released", true=True)),
    "true-tiles-are-transposable": lambda: (tiles("true", true=True), tiles("true", true=False)),
    "counts-match-the-closed-form": lambda: (gaps(), gaps(bdwp="sr_ste")),
    "two-eight-halves-the-work": lambda: (mac_shares(), mac_shares(bdwp="sr_ste")),
    "one-direction-stops-at-two-thirds": lambda: (mac_shares(), mac_shares(sr_ste="bdwp")),
    "two-directions-at-2-8-beat-one-at-1-16": lambda: (mac_shares(), mac_shares(bdwp="sr_ste")),
    "backward-view-keeps-the-most": lambda: (compared(), compared(bdwp="bi_mask")),
    "transposable-gradient-is-exact": lambda: (compared(), compared(transposable="bdwp")),
    "closest-to-the-dense-gradient": lambda: (compared(), compared(bdwp="bi_mask")),
    "bi-mask-is-closer-to-its-own-network": lambda: (compared(), compared(bi_mask="bdwp")),
    "training-closes-the-gap": lambda: (compared(), compared(settled=1.0)),
    # at a known accuracy
    "two-eight-loses-half-a-point": lambda: (graded(), graded(**UNPRUNED)),
    "two-eight-loses-half-a-point-small": lambda: spoilt("bdwp/2:8", "transposable/2:8"),
    "two-eight-loses-half-a-point-resnet20": lambda: spoilt("resnet20/bdwp/2:8", "resnet20/transposable/2:8"),
    "two-eight-loses-half-a-point-vit": lambda: spoilt("vit/bdwp/2:8", "vit/transposable/2:8"),
    "sr-ste-is-as-good-as-dense": lambda: spoilt("sr_ste/2:8", "transposable/2:8"),
    "second-direction-costs-little": lambda: spoilt("bdwp/2:8", "transposable/2:8"),
    "sr-ste-over-bdwp": lambda: spoilt("sr_ste/2:8", "bdwp/2:8"),
    "bdwp-over-transposable-2-8": lambda: spoilt("bdwp/2:8", "transposable/2:8"),
    "bdwp-over-transposable-2-4": lambda: spoilt("bdwp/2:4", "transposable/2:4"),
    "bdwp-over-transposable-resnet20": lambda: spoilt("resnet20/bdwp/2:8", "resnet20/transposable/2:8"),
    "bdwp-over-transposable-vit": lambda: spoilt("vit/bdwp/2:8", "vit/transposable/2:8"),
    "bi-mask-over-transposable": lambda: spoilt("bi_mask/2:8", "transposable/2:8"),
    "bdwp-over-bi-mask": lambda: spoilt("bdwp/2:8", "bi_mask/2:8"),
    "less-sparse-is-better": lambda: spoilt("bdwp/2:4", "bdwp/2:8"),
    "the-pull-matters-little": lambda: spoilt("bdwp_ste/2:8", "transposable/2:8"),
    # at known times
    "fpga-speedup": lambda: (timed(generation=FPGA), timed(generation=0.0, input=1.0)),
    "step-is-faster-with-generation": lambda: (timed(), timed(generation=2.0)),
    "step-is-faster-with-generation-few-tokens": lambda: (timed(), timed(generation=2.0)),
    "forward-is-faster": lambda: (timed(), timed(forward=1.0)),
    "input-gradient-is-faster": lambda: (timed(), timed(input=1.0)),
    "the-second-view-pays": lambda: (timed(), timed(scattered=TIMES["input"])),
    "one-view-would-do-on-a-cpu": lambda: (timed(), timed(scattered=1.0)),
}


def test_every_claim_has_a_sabotage():
    assert set(SABOTAGE) == set(CLAIMS)


@pytest.mark.parametrize("name", SABOTAGE)
def test_sabotage_turns_the_verdict(name):
    assert_sabotage_turns(CLAIMS[name], *SABOTAGE[name]())
