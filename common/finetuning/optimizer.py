"""SaraAdamW: fine-tune the weights of least magnitude by changing the optimizer's line."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from common import seeds
from common.finetuning.config import SaraConfig
from common.finetuning.layers import Entries
from common.finetuning.nuclear import subgradient
from common.finetuning.selecting import Sparse, select
from common.training import NonFiniteError
from kernels import masked_grad
from kernels.masked_grad import Moments, Selection

if TYPE_CHECKING:
    from common.finetuning.adapter import SaraModel

__all__ = ["SaraAdamW", "learning_rate"]


def learning_rate(theta: float) -> float:
    """1e-3 exp(-350 theta), the paper's fit for Stable Diffusion 1.5, whose weights have a deviation near 0.03."""
    return 1e-3 * math.exp(-350 * theta)


class SaraAdamW(torch.optim.Optimizer):
    """AdamW of the chosen entries of a model's weights; the model itself is given, not its parameters.

        optimizer = SaraAdamW(model, threshold=8e-4)          # instead of AdamW(model.parameters())
        loss.backward(); clip_grad_norm_(model.parameters(), 1.0); optimizer.step(); optimizer.zero_grad()

    model        any torch model: its Linear, Conv2d and Conv1D layers are changed in place, all else is frozen; or what
                 `get_peft_model` made, with a config of its own; or a `Sparse`, whose entries are chosen already
    threshold    theta; or `fraction=`, `select=`, `target_modules=`, `lambda_rank=` and what else SaraConfig has
    lr           None: `learning_rate(theta)`; for entries chosen otherwise than `smallest` it has to be given
    betas, eps, weight_decay   as in torch.optim.AdamW; only chosen entries decay
    total_steps  steps of the whole training, for `progressive_at`; which is 0.5 where this alone is said

    Gradients, moments and indices exist for the chosen entries alone. lambda_rank times the subgradient of the nuclear
    norm is added in `step`, once a step and after any clipping of the loss's gradient. bfloat16 weights get a float32
    master of their chosen entries. At the progressive adjustment entries at theta or above stay as they are; the others
    keep their moments.

    Raises ValueError and TypeError as SaraConfig and `select` do, before the model is touched.
    """

    def __init__(
        self,
        model: nn.Module | SaraModel | Sparse,
        threshold: float | None = None,
        *,
        lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        total_steps: int | None = None,
        **config: Any,
    ) -> None:
        from common.finetuning.adapter import SaraModel

        if isinstance(model, SaraModel):
            if threshold is not None or config:
                raise ValueError(
                    "SaraAdamW: got a model with a SaraConfig and a choice beside it; expected one of them: give the "
                    "choice to SaraConfig"
                )
            self.config, sparse = model.peft_config, model.sparse
        else:
            sparse = model if isinstance(model, Sparse) else None
            by_size = config.get("select", "smallest") == "smallest" if sparse is None else not math.isnan(sparse.theta)
            if total_steps is not None and by_size:
                config.setdefault("progressive_at", 0.5)
            if sparse is not None:
                config["fraction"] = sparse.count / sparse.total
            self.config = SaraConfig(threshold, **config)
        unknown = self.config.select != "smallest" or (sparse is not None and math.isnan(sparse.theta))
        if unknown and (lr is None or self.config.progressive_at is not None):
            raise ValueError(
                f"SaraAdamW: got lr={lr} and progressive_at={self.config.progressive_at} for entries that were not "
                "chosen by select='smallest'; expected an lr, such as 1e-4, and progressive_at=None: both go by theta"
            )
        self.adjust_at = _adjust_at(self.config, total_steps)
        self.sparse = sparse if sparse is not None else select(model, self.config)  # pyright: ignore[reportArgumentType]
        self.steps = 0
        self._of = {entries.leaf: entries for entries in self.sparse.entries}
        lr = learning_rate(self.sparse.theta) if lr is None else lr
        named = [(entries.name, entries.leaf) for entries in self.sparse.entries]
        super().__init__(named, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step; a leaf without a gradient is passed over.

        Raises NonFiniteError where a gradient is not finite, RuntimeError where the adapter is scaled or disabled;
        weights and moments are then those of the step before.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._require_sound()
        drawn = self._low_rank()
        for group in self.param_groups:
            for leaf in group["params"]:
                self._update(self._of[leaf], group, self._of[leaf] in drawn)
        self.steps += 1
        if self.steps == self.adjust_at:
            self._adjust()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Moments, the step, and which entries are trained: a training goes on from it bit for bit."""
        state = super().state_dict()
        state["steps"], state["theta"] = self.steps, self.sparse.theta
        state["selections"] = {
            entries.name: {"chosen": _packed(entries.chosen), "trained": _packed(entries.selection)}
            for entries in self.sparse.entries
        }
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Go on from such a state, with the entries it chose; the model's weights are loaded by the model.

        Raises ValueError where the state is of another model's parameters or another optimizer.
        """
        names = [name for group in state_dict["param_groups"] for name in group.get("param_names", ())]
        mine = [name for group in self.param_groups for name in group["param_names"]]
        if names != mine or "selections" not in state_dict:
            differing = sorted(set(names) ^ set(mine))[:3] or "the same in another order"
            raise ValueError(
                f"SaraAdamW.load_state_dict: got a state of {len(names)} parameters, the model has {len(mine)}; "
                f"expected those of one model, config and optimizer; only in one of them: {differing}"
            )
        self.state.clear()
        self.steps, self.sparse.theta = state_dict["steps"], state_dict["theta"]
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            group.update({key: copy.deepcopy(value) for key, value in saved.items() if key != "params"})
            for index, leaf in zip(saved["params"], group["params"], strict=True):
                entries, about = self._of[leaf], state_dict["selections"][self._of[leaf].name]
                entries.train_only(_unpacked(about["trained"]), _unpacked(about["chosen"]))
                if index in state_dict["state"]:
                    place = entries.parameter.device
                    self.state[leaf] = {
                        key: value.to(place, copy=True) if isinstance(value, Tensor) else value
                        for key, value in state_dict["state"][index].items()
                    }

    def _require_sound(self) -> None:
        scaled = [entries.name for entries in self.sparse.entries if entries.tuned is not None]
        if scaled:
            raise RuntimeError(
                f"SaraAdamW.step: the adapter is scaled or disabled, so {scaled[0]!r} does not hold what is trained; "
                "expected scale 1; call set_scale(1)"
            )
        grads = {entries.name: entries.leaf.grad for entries in self.sparse.entries if entries.leaf.grad is not None}
        if grads and not bool(nn.utils.get_total_norm(list(grads.values())).isfinite()):
            bad = next((name for name, grad in grads.items() if not bool(grad.isfinite().all())), "their common norm")
            raise NonFiniteError(
                f"SaraAdamW.step: the gradient of {bad!r} is not finite in step {self.steps + 1}",
                step=self.steps,
                good_step=self.steps,
                losses=[],
            )

    def _update(self, entries: Entries, group: dict[str, Any], low_rank: bool) -> None:
        grad = entries.gradient()
        if grad is None:
            return
        state = self.state[entries.leaf]
        if not state:
            moments = Moments.zeros(entries.selection, entries.wide)
            state.update(step=0, first=moments.first, second=moments.second)
            if entries.parameter.dtype == torch.bfloat16:
                state["master"] = entries.selection.gather(entries.weight).float()
        if low_rank:
            grad = grad + self.config.lambda_rank * subgradient(entries.weight, entries.selection)
        moments = Moments(state["first"], state["second"], state["step"])
        masked_grad.adamw_(
            entries.weight,
            grad,
            entries.selection,
            moments,
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            master=state.get("master"),
        )
        state["step"] = moments.step

    def _low_rank(self) -> list[Entries]:
        """The matrices whose nuclear norm counts in this step."""
        if not self.config.lambda_rank:
            return []
        trained = [e for e in self.sparse.entries if e.parameter.ndim > 1 and e.gradient() is not None]
        if self.config.rank_matrices == "all" or not trained:
            return trained
        # from the step alone, so that a training that goes on draws the same
        return [trained[seeds.derived(self.config.seed, "matrix", self.steps) % len(trained)]]

    def _adjust(self) -> None:
        """From now on only the entries that are still below theta."""
        kept = {e: e.selection.gather(e.weight).abs() < self.sparse.theta for e in self.sparse.entries}
        if not any(bool(mask.any()) for mask in kept.values()):
            warnings.warn(
                f"SaraAdamW: after {self.steps} steps no chosen entry is below {self.sparse.theta:g} any more, so "
                "that all of them are trained on; a smaller lr or a larger threshold leaves some",
                stacklevel=3,
            )
            return
        for entries, mask in kept.items():
            places = entries.selection.positions()[mask]
            state = self.state.get(entries.leaf, {})
            for key in {"first", "second", "master"} & state.keys():
                state[key] = state[key][mask]
            entries.train_only(Selection.from_positions(places, entries.selection.shape))


def _adjust_at(config: SaraConfig, total_steps: int | None) -> int | None:
    """After how many steps the adjustment is due."""
    if config.progressive_at is None:
        return None
    if total_steps is None:
        raise ValueError(
            f"SaraAdamW: got progressive_at={config.progressive_at} and no total_steps; expected those of the training"
        )
    step = round(config.progressive_at * total_steps)
    if not 0 < step < total_steps:
        raise ValueError(
            f"SaraAdamW: got total_steps={total_steps} with progressive_at={config.progressive_at}; expected a step "
            "inside the training, so 2 steps or more; or progressive_at=None"
        )
    return step


def _packed(selection: Selection) -> dict[str, Any]:
    return {"shape": list(selection.shape), "offsets": selection.offsets, "starts": selection.starts}


def _unpacked(about: Mapping[str, Any]) -> Selection:
    return Selection(tuple(about["shape"]), about["offsets"].clone(), about["starts"].clone())
