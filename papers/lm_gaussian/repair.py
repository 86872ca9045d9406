"""The Gaussian repair model: a conditional diffusion model, adapted to the scene, that turns bad renders into views.

Two of them share a method each: `SmallRepair` (a denoiser with a control branch, in pixels, trained here on other
generated scenes) and, at the paper profile, Stable Diffusion with ControlNet (`common.models.stable_diffusion`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common import seeds
from common.models import lora
from common.models.denoiser import ControlBranch, Controlled, Denoiser
from common.models.diffusion import Schedule, epsilon_loss, sdedit, train
from common.models.pairs import Pairs, crop
from common.models.pairs import held_out_error as common_error
from common.splatting import Scene, View
from common.splatting.settings import TrainSettings
from common.splatting.training import fit
from papers.lm_gaussian.settings import Params

CONTROL_LAYERS = "control."  # of `Controlled`, whose other half is the frozen denoiser
AVERAGE = 0.995  # decay of the weights' running mean
TIMES = 1000  # steps of the noise schedule
PIXELS = 1.0  # images are -1..1
FITTED = (10, 500)  # steps that the bad pictures' Gaussians are fitted for
TOGETHER = 8  # views repaired at once


# ------------------------------------------------------------------------------------------ the small diffusion model


@seeds.one_thread()
def bad_pictures(scenes: Sequence[Scene], seed: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs [3, H, W] of a bad and a good picture: views of scenes that Gaussians were fitted to for a short while.

    Half of the views were not fitted to, so the pairs show blur as well as holes and floaters.
    """
    draw, pairs = seeds.generator(seed, "bad pictures"), []
    for scene in scenes:
        steps = int(torch.randint(*FITTED, (1,), generator=draw))
        settings = TrainSettings(iterations=steps, seed=seed, lr_means=1e-3, sh_degree=0, strategy=None)
        result = fit(scene, settings, progress=False)
        for view in (*scene.train, *scene.test):
            with torch.no_grad():
                drawn = result.model.render(view.camera, background=result.background).image.clamp(0, 1)
            pairs.append((drawn.movedim(-1, 0), view.image.movedim(-1, 0)))
    return pairs


@seeds.one_thread()
def train_prior(params: Params, pairs: Pairs, seed: int, *, progress: Callable[..., Any] | None = None) -> dict:
    """The small diffusion model: first the denoiser on good pictures alone, then its control branch on the pairs.

    Returns the `state` of a `Controlled` on the CPU and the `losses` of both trainings. The denoiser is frozen while
    the control learns, as in ControlNet.
    """
    torch.manual_seed(seed)
    schedule = Schedule.cosine(TIMES).to(params.device)
    denoiser = Denoiser(width=params.prior_width).to(params.device)
    options = {"learning_rate": params.prior_rate, "ema": AVERAGE, "progress": progress}
    crops = partial(crop, pairs, count=params.prior_batch, size=params.prior_crop, device=params.device)

    def unconditional(network: nn.Module, draw: torch.Generator) -> Tensor:
        return epsilon_loss(network, crops(draw)[1], schedule, draw, latest=latest(params))

    first = train(denoiser, unconditional, steps=params.prior_steps, seed=seed, **options)
    assert isinstance(first.network, Denoiser)
    both = Controlled(first.network.requires_grad_(False), ControlBranch(first.network)).to(params.device)
    both.control.requires_grad_(True)

    def conditional(network: nn.Module, draw: torch.Generator) -> Tensor:
        bad, good = crops(draw)
        return epsilon_loss(lambda x, t: network(x, t, bad), good, schedule, draw, latest=latest(params))

    second = train(both, conditional, steps=params.control_steps, seed=seed + 1, **options)
    state = {name: value.cpu() for name, value in second.network.state_dict().items()}
    return {"state": state, "losses": {"denoiser": first.losses, "control": second.losses}}


def small_network(params: Params, state: Mapping[str, Tensor]) -> Controlled:
    """The network of `train_prior`'s result."""
    denoiser = Denoiser(width=params.prior_width)
    both = Controlled(denoiser, ControlBranch(denoiser))
    both.load_state_dict(state)
    return both.to(params.device).eval()


def latest(params: Params) -> int:
    """The last time that SDEdit starts from, with a margin; there is no use in learning later ones."""
    return min(TIMES, round(1.5 * params.strength * TIMES))


# -------------------------------------------------------------------------------------------------- repairing a scene


def repairer(
    params: Params, prior: Mapping[str, Any] | None, pairs: Pairs | None, seed: int
) -> Callable[[Tensor, int], Tensor]:
    """The repair model of a scene: (renders [V, H, W, 3] in 0..1, round) -> their repaired versions.

    prior  a result of `train_prior` where the priors are stand-ins
    pairs  (early render, photograph) of the scene to adapt to; None: no adaptation
    """
    if params.priors == "pretrained":
        from papers.lm_gaussian import pretrained

        return pretrained.repairer(params, pairs, seed)
    assert prior is not None, "train_prior comes first"
    network = small_network(params, prior["state"])
    return SmallRepair(params, network, seed) if pairs is None else SmallRepair.adapted(params, network, pairs, seed)


class SmallRepair:
    """SDEdit with the small model, controlled by the render that is to be repaired."""

    def __init__(self, params: Params, network: Controlled, seed: int):
        self.params, self.network, self.seed = params, network, seed
        self.schedule = Schedule.cosine(TIMES).to(params.device)
        self.losses: list[float] = []

    @classmethod
    def adapted(cls, params: Params, prior: Controlled, pairs: Pairs, seed: int) -> SmallRepair:
        """Fine-tuned on (early render, photograph) pairs of this scene: rank-r changes of every block, nothing else."""
        torch.manual_seed(seeds.derived(seed, "lora"))
        found = cls(params, copy.deepcopy(prior), seed)
        trained = lora.add(found.network, adapted_layer, rank=params.lora_rank)

        def loss(network: nn.Module, draw: torch.Generator) -> Tensor:
            bad, good = crop(pairs, draw, count=params.lora_batch, size=params.lora_crop, device=params.device)
            return epsilon_loss(lambda x, t: network(x, t, bad), good, found.schedule, draw, latest=latest(params))

        settings = {"steps": params.lora_steps, "learning_rate": params.lora_rate}
        found.losses = train(found.network, loss, seed=seed, parameters=trained, **settings).losses
        found.network.eval()
        return found

    @torch.no_grad()
    def __call__(self, renders: Tensor, turn: int) -> Tensor:
        params = self.params
        draw = seeds.generator(self.seed, "repair", turn, device=params.device)
        repaired = []
        for part in renders.movedim(-1, 1).split(TOGETHER):
            bad = 2 * part - 1
            image = sdedit(
                lambda x, t, bad=bad: self.network(x, t, bad, params.control),
                bad,
                self.schedule,
                strength=params.strength,
                steps=params.ddim_steps,
                eta=params.eta,
                generator=draw,
                limit=PIXELS,
            )
            repaired.append((image + 1) / 2)
        return torch.cat(repaired).clamp(0, 1).movedim(1, -1).contiguous()


def early_pairs(renders: Mapping[str, Sequence[Tensor]], views: Sequence[View]) -> list[tuple[Tensor, Tensor]]:
    """(early render, photograph) [3, H, W] of every training view."""
    return [(drawn.movedim(-1, 0), view.image.movedim(-1, 0)) for view in views for drawn in renders.get(view.name, [])]


def held_out_error(network: Controlled, pairs: Pairs, params: Params) -> dict[str, float]:
    """Mean squared error of pictures nobody trained on, before and after SDEdit: how much the model repairs."""
    repair = SmallRepair(params, network, 0)
    return common_error(lambda bad: repair(bad.to(params.device), 0), pairs)


def adapted_layer(name: str) -> bool:
    """The convolutions and attention of both halves; not the layers of the time and the zero convolutions."""
    return any(part in name for part in (".first.", ".second", ".query", ".key", ".value", ".out"))
