"""The arms that are compared, and how one of them is fitted. The idea itself is in `method.py`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from common import seeds
from common.splatting.extensions import Extension
from common.splatting.model import Gaussians
from common.splatting.settings import TrainSettings
from common.splatting.training import fit
from papers.sparse3d import evaluation, method, priors
from papers.sparse3d.data import Album, Case
from papers.sparse3d.settings import Params

Knows = Literal["photographs", "others", "nothing", "truth"]
Run = tuple[str, int, int]  # arm, photographs, seed


@dataclass(frozen=True)
class Arm:
    """What a scene is fitted to beside its photographs.

    bootstrap  the transformer's pictures: not at all, for the first steps, or for all
    rule       how the prior is asked after the first steps; None: not at all
    knows      what the prior is shown: features of the photographs, of another object's, nothing, or the true picture
    stream     the random numbers of times, noises and cameras
    """

    label: str
    bootstrap: Literal["never", "first", "always"] = "first"
    rule: method.Rule | None = None
    knows: Knows = "photographs"
    stream: str = "distillation"


ARMS = {
    "photo": Arm("photographs alone", bootstrap="never"),
    "eft": Arm("+ transformer", bootstrap="always"),
    "sds": Arm("+ SDS", rule="sds"),
    "csds": Arm("+ C-SDS", rule="csds"),
    # controls
    "no_control": Arm("SDS, no control", rule="sds", knows="nothing"),
    "no_bootstrap": Arm("C-SDS, no bootstrap", bootstrap="never", rule="csds"),
    "shuffled": Arm("C-SDS, other object's", rule="csds", knows="others"),
    "again": Arm("C-SDS, other noise", rule="csds", stream="again"),
    "oracle": Arm("SDS by the truth", rule="sds", knows="truth"),
}


class Networks(NamedTuple):
    """Results of `priors`: states by name, and the losses of the trainings."""

    transformer: dict[str, Any]
    base: dict[str, Any] | None
    controller: dict[str, Any]

    def prior(self, params: Params) -> method.NetworkPrior:
        """The diffusion model with its controller, ready to be asked."""
        return priors.trained_prior(params, self.base and self.base["state"], self.controller["state"])


class Looks(NamedTuple):
    """What the transformer makes of the photographs at the cameras of a case's circle.

    pictures [N, h, w, 3];  maps [N, F, h, w];  others [N, F, h, w], maps of another object at its own circle
    """

    pictures: Tensor
    maps: Tensor
    others: Tensor


def first_networks(params: Params, album: Album, name: str) -> dict[str, Any]:
    """The transformer or the base, by name: neither needs the other."""
    return (priors.train_transformer if name == "transformer" else priors.train_base)(params, album)


@seeds.one_thread()
def looks(params: Params, case: Case, other: Case, transformer: Mapping[str, Any]) -> Looks:
    """The transformer at work on a case, and on another for control by the wrong features."""
    network = priors.transformer(params, transformer["state"])
    pixels = params.ray_pixels
    pictures, maps = priors.look_around(network, case.scene.train, case.circle, pixels)
    _, others = priors.look_around(network, other.scene.train, other.circle, pixels)
    return Looks(pictures, maps, others)


@seeds.one_thread()
def fitted(
    params: Params, case: Case, seen: Looks, networks: Networks, name: str, seed: int, *, progress: bool = False
) -> dict[str, Any]:
    """Fit a scene.

    Returns `model` (parameters by name), `loss` by step, `seconds`, and `scores` of the test views.
    """
    arm, began = ARMS[name], time.perf_counter()
    assert case.scene.points is not None
    model = Gaussians.from_points(case.scene.points, sh_degree=0, initial_opacity=0.1)
    added = extensions(params, case, seen, networks, arm)
    result = fit(case.scene, settings(params, seed), model=model, extensions=added, progress=progress)
    return {
        "model": {key: value.cpu() for key, value in result.model.values().items()},
        "loss": result.losses,
        "seconds": time.perf_counter() - began,
        "scores": evaluation.scores(params, case, result.model),
    }


def extensions(params: Params, case: Case, seen: Looks, networks: Networks, arm: Arm) -> list[Extension]:
    """The losses of an arm beside the photometric one."""
    found: list[Extension] = [method.Silhouette(params.w_silhouette)]
    if arm.bootstrap != "never":
        until = params.steps if arm.bootstrap == "always" else params.bootstrap_steps
        found.append(method.Bootstrap(case.circle, seen.pictures, params.w_bootstrap, until))
    if arm.rule is not None:
        prior, conditions = asked(params, case, seen, networks, arm.knows)
        after = params.bootstrap_steps
        found.append(method.Distillation(prior, case.circle, conditions, arm.rule, params.w_prior, after, arm.stream))
    return found


def asked(
    params: Params, case: Case, seen: Looks, networks: Networks, knows: Knows
) -> tuple[method.NetworkPrior, Tensor]:
    """A prior, and what it is shown at each camera of the circle [N, F, h, w]."""
    prior = networks.prior(params)
    if knows == "truth":
        return method.OraclePrior(prior.network, prior.schedule), evaluation.known(case.truth).movedim(-1, 1)
    if knows == "nothing":
        prior.control = False
    return prior, seen.others if knows == "others" else seen.maps


def settings(params: Params, seed: int) -> TrainSettings:
    """3DGS's training with a fixed number of Gaussians of one colour each."""
    return TrainSettings(
        iterations=params.steps,
        seed=seed,
        lr_means=params.lr_means,
        lr_means_final=params.lr_means_final,
        lr_scales=params.lr_scales,
        lr_quats=params.lr_quats,
        lr_opacities=params.lr_opacities,
        lr_sh0=params.lr_colors,
        sh_degree=0,
        opacity_penalty=params.w_opacity,
        strategy=None,
    )
