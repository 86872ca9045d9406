"""The Gaussians in training together with everything that must follow them when some come and go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from common.splatting.model import FIELDS, Gaussians

__all__ = ["ADAM_EPS", "Population"]

ADAM_EPS = 1e-15  # 3DGS: gradients of a mean over pixels are small, 1e-8 would slow them down


class Population:
    """A model, the Adam moments of its parameters, and running statistics of its Gaussians.

    model       replaced parameter by parameter when Gaussians come and go
    optimizer   Adam with one parameter group a field, `group(name)`; learning rates are 0 until somebody sets them
    extent      the scene's unit of length: thresholds on scales are shares of it
    statistics  tensors [N, ...] by name that follow the Gaussians; new ones take over those of their source
    """

    def __init__(self, model: Gaussians, extent: float):
        if not extent > 0:
            raise ValueError(
                f"Population: extent is {extent}, expected a length > 0. A scene with a single training view has none: "
                "set TrainSettings.extent."
            )
        self.model, self.extent = model, extent
        groups = [{"params": [getattr(model, name)], "name": name, "lr": 0.0} for name in FIELDS]
        self.optimizer = torch.optim.Adam(groups, eps=ADAM_EPS, fused=True)
        self.statistics: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.model)

    def group(self, name: str) -> dict[str, Any]:
        """The optimizer's group of a field, for its "lr"."""
        return self.optimizer.param_groups[FIELDS.index(name)]

    def statistic(self, name: str, *shape: int) -> Tensor:
        """The running statistic [N, *shape] of that name, made of zeros on first use."""
        if name not in self.statistics:
            self.statistics[name] = self.model.means.new_zeros(len(self), *shape)
        return self.statistics[name]

    @torch.no_grad()
    def change(self, source: Tensor, fresh: Tensor | None = None, **values: Tensor) -> None:
        """Let Gaussian i of the new population be a copy of Gaussian `source[i]` of the old one.

        source  [M] indices, or a bool mask [N] of those that stay
        fresh   [M] bool: these are new, so their Adam moments start at zero; None: no one is
        values  parameters of the fresh ones by field, [F, ...] in their order; others are copied from the source

        A parameter that is replaced has no gradient any more.
        """
        if source.dtype == torch.bool:
            source = source.nonzero()[:, 0]
        new = None if fresh is None or not bool(fresh.any()) else fresh

        def follow(old: Tensor, fill: Tensor | float) -> Tensor:
            following = old[source]
            if new is not None:
                following[new] = fill
            return following

        for name in FIELDS:
            old = getattr(self.model, name)
            value = follow(old.detach(), values[name]) if name in values else old.detach()[source]
            self._replace(name, nn.Parameter(value), lambda moment: follow(moment, 0.0))
        self.statistics = {name: value[source] for name, value in self.statistics.items()}

    @torch.no_grad()
    def assign(self, name: str, value: Tensor) -> None:
        """Set a field for all Gaussians and forget its Adam moments, as 3DGS resets opacities."""
        self._replace(name, nn.Parameter(value.clone()), torch.zeros_like)

    def state(self) -> dict[str, Any]:
        """Everything, as tensors and plain values: `restore` brings it back bit for bit."""
        return {
            "extent": self.extent,
            "parameters": self.model.values(),
            "optimizer": self.optimizer.state_dict(),
            "statistics": self.statistics,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned, in another process perhaps."""
        device = self.model.means.device
        self.extent = state["extent"]
        for name in FIELDS:
            self._replace(name, nn.Parameter(state["parameters"][name].to(device)), None)
        self.optimizer.load_state_dict(state["optimizer"])
        self.statistics = {name: value.to(device) for name, value in state["statistics"].items()}

    def _replace(self, name: str, parameter: nn.Parameter, moments: Any) -> None:
        """Swap a parameter in model and optimizer; `moments` makes its new Adam moments from the old ones."""
        old = getattr(self.model, name)
        setattr(self.model, name, parameter)
        self.group(name)["params"] = [parameter]
        state = self.optimizer.state.pop(old, None)
        if state and moments is not None:
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = moments(state[key])
            self.optimizer.state[parameter] = state
