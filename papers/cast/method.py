"""CAST: continuous and differentiable semi-structured sparsity-aware training (Huang et al., 2025, arXiv 2509.25996).

A pretrained model is led to n:m without a jump: the forward pass stays dense to the end, an optimizer (AdamS) pulls the
weights that are to go towards zero, more and more, and the exact pruning at the end has nothing left to cut. Learnable
factors (weight scaling) make up for lost magnitude, and the dense original teaches (distillation).

Sources: [eq] and [alg] numbers as an independent reimplementation of the paper cites them; [silent] where the paper
does not say. The paper's own text and code were not at hand; there is no released code.

symbol    name here        shape   meaning
theta     weight           [O, K]  raw weight of a layer in scope, groups of m along K
A         scale            [O, G]  weight scaling: W[r, c] = theta[r, c] A[r, c // (K / G)], starts at 1  [eq 11, 12]
m_t       kept             [O, K]  bool, the n largest |theta| of every m, sought every `refresh` steps  [eq 6]
mu, mu~   mean, direction  [O, K]  running mean of the raw gradient; the same, pulled towards zero  [alg 1]
v         square           [O, K]  running mean of mu~^2 (not of g^2)  [alg 1]
alpha_t   ramp             scalar  t / T: the share of the pull  [alg 1]
lambda    decay            scalar  size of the pull, that of the gradient's entries  [alg 1]
eta       eta              scalar  share of the distillation loss  [eq 13]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kernels import nm

REFRESH = 10  # steps between two searches of the masks (T_1)
GROUPS = 2  # of weight scaling, a row (n in the paper)
ETA = 1 / 3  # for LLaMA

Layers = Mapping[str, nn.Linear]
Ties = Literal["exact", "threshold"]


def mask(weight: Tensor, n: int, m: int, *, ties: Ties = "exact") -> Tensor:
    """m_t of weights [O, K]: bool. `exact` keeps n of every m, of equals the first.

    `threshold` is the formula as printed, |theta| >= xi with xi the n-th largest of the group: it keeps more than n
    where several are as large as that one [eq 6].
    """
    if ties == "exact":
        return nm.mask(weight, n, m)
    size = weight.detach().abs().unflatten(-1, (-1, m))
    return (size >= size.topk(n, dim=-1).values[..., -1:]).flatten(-2)


# ---------------------------------------------------------------------------------------------------------- optimizer


class AdamS(torch.optim.Optimizer):
    """Adam that leads all but n of every m weights to zero [alg 1]. In step t = 0 .. T-1, for each weight in scope:

        mu_t   = b1 mu + (1 - b1) g                                       the pull never enters the running mean
        mu~_t  = (1 - a_t) mu_t + a_t lambda sign(theta)  where pruned,   mu_t where kept;   a_t = t / T
        v_t    = b2 v + (1 - b2) mu~_t^2
        theta -= lr mu~_t / (1 - b1^(t+1)) / (sqrt(v_t / (1 - b2^(t+1))) + eps)

    The mask is sought at the start of the steps 0, `refresh`, 2 `refresh`, ... Parameters out of scope get plain Adam.

    Because v holds the pull too, a pruned weight moves by about lr a step in the end, whatever lambda is. So it arrives
    only if the sum of lr a_t exceeds |theta|, and then stays within about the last lr of zero. And because v is that of
    the running mean, not of g, the first steps are up to 1 / (1 - b1) lr long, and under noise all steps are
    sqrt((1 + b1) / (1 - b1)) times as long as Adam's: warm up, and take a smaller lr than for Adam.

    Args:
        weights: in scope; real, at least float32, last axis in multiples of m.
        others: parameters out of scope.
        steps: T, of the whole training.
        selective: False pulls the kept weights too.
        second_moment: `modified` as above; `gradient` takes v from g^2, as plain Adam does.

    Raises ValueError for weights that do not fit.
    """

    def __init__(
        self,
        weights: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter] = (),
        *,
        lr: float,
        decay: float,
        steps: int,
        n: int,
        m: int,
        refresh: int = REFRESH,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        selective: bool = True,
        second_moment: Literal["modified", "gradient"] = "modified",
    ):
        weights = list(weights)
        for weight in weights:
            if weight.shape[-1] % m:
                raise ValueError(
                    f"AdamS: got a weight of {list(weight.shape)}; expected its last axis in multiples of {m}"
                )
            if torch.finfo(weight.dtype).bits < 32:
                raise ValueError(
                    f"AdamS: got a weight of {weight.dtype}; expected float32, because half precision rounds steps of "
                    f"lr = {lr:g} away. Keep float32 weights and use autocast for the activations"
                )
        groups = [{"params": weights, "sparse": True}, {"params": list(others), "sparse": False}]
        super().__init__([group for group in groups if group["params"]], {"lr": lr, "betas": betas, "eps": eps})
        self.n, self.m, self.decay, self.total, self.refresh = n, m, decay, steps, refresh
        self.selective, self.second_moment = selective, second_moment

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group)
        return loss

    def direction(self, weight: Tensor, mean: Tensor, kept: Tensor, step: int) -> Tensor:
        """mu~_t."""
        ramp = step / self.total
        pulled = torch.add((1 - ramp) * mean, weight.sign(), alpha=ramp * self.decay)
        return torch.where(kept, mean, pulled) if self.selective else pulled

    def kept(self, weight: nn.Parameter) -> Tensor:
        """The mask in force of a weight in scope; bool of its shape."""
        return self.state[weight]["kept"].bool()  # a checkpoint restores it in the weight's dtype

    def _update(self, weight: nn.Parameter, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state.update(step=0, mean=torch.zeros_like(weight), square=torch.zeros_like(weight))
        step, mean, square = state["step"], state["mean"], state["square"]
        beta1, beta2 = group["betas"]
        mean.lerp_(grad, 1 - beta1)
        direction, second = mean, grad
        if group["sparse"]:
            if step % self.refresh == 0:
                state["kept"] = mask(weight, self.n, self.m)
            direction = self.direction(weight, mean, self.kept(weight), step)
            second = direction if self.second_moment == "modified" else grad
        square.mul_(beta2).addcmul_(second, second, value=1 - beta2)
        scale = (square / (1 - beta2 ** (step + 1))).sqrt_().add_(group["eps"])
        weight.addcdiv_(direction, scale, value=-group["lr"] / (1 - beta1 ** (step + 1)))
        state["step"] = step + 1


# ------------------------------------------------------------------------------------------------------ weight scaling


class Scaling(nn.Module):
    """theta [O, K] -> W = A * theta, a factor for each row and each of its G equal parts; A starts at 1."""

    def __init__(self, outputs: int, groups: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(outputs, groups))

    def forward(self, weight: Tensor) -> Tensor:
        return (weight.unflatten(1, (self.scale.shape[1], -1)) * self.scale.to(weight.dtype)[:, :, None]).flatten(1)


def in_blocks(model: nn.Module) -> dict[str, nn.Linear]:
    """Theta: the linear layers inside the model's list of blocks, by name. Embeddings and the head stay dense [silent].

    Raises ValueError where there are none.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and any(name.startswith(f"{blocks}.") for blocks in lists)
    }
    if not found:
        raise ValueError("CAST: found no nn.Linear inside an nn.ModuleList of blocks; expected a transformer")
    return found


def scale_(layers: Layers, m: int, groups: int = GROUPS) -> None:
    """Give each layer its factors A, in place; its raw weight is then found by `raw`.

    Each part must hold whole groups of m, so that the scaled weights have the mask of the raw ones. Raises ValueError
    where it does not.
    """
    for name, layer in layers.items():
        if layer.in_features % (groups * m):
            raise ValueError(
                f"CAST: {name} has {layer.in_features} inputs; expected multiples of {groups * m}, so that each of its "
                f"{groups} parts holds whole groups of {m}"
            )
        scaling = Scaling(layer.out_features, groups).to(layer.weight.device)
        parametrize.register_parametrization(layer, "weight", scaling)


def raw(layer: nn.Linear) -> nn.Parameter:
    """theta: the weight under the factors, or the layer's weight where it has none."""
    return layer.parametrizations.weight.original if parametrize.is_parametrized(layer) else layer.weight


def out_of_scope(model: nn.Module, layers: Layers) -> list[nn.Parameter]:
    """All trained parameters but the layers' raw weights; the factors A are among them."""
    inside = {id(raw(layer)) for layer in layers.values()}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in inside]


@torch.no_grad()
def finalize_(layers: Layers, n: int, m: int) -> dict[str, Tensor]:
    """Prune exactly, then fold the factors in [alg 2]; returns the masks by name."""
    masks = {name: mask(raw(layer), n, m) for name, layer in layers.items()}
    for name, layer in layers.items():
        raw(layer).mul_(masks[name])
    fold_(layers)
    return masks


def fold_(layers: Layers) -> None:
    """Multiply A into the weights, which cannot revive a zero; the layers are plain ones again."""
    for layer in layers.values():
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


@torch.no_grad()
def remaining(layers: Layers, n: int, m: int) -> float:
    """Mean |theta| of the weights that pruning would cut now, over that of the ones it would keep."""
    cut, kept = 0.0, 0.0
    for layer in layers.values():
        weight = raw(layer)
        largest = mask(weight, n, m)
        kept += weight[largest].abs().sum().item()
        cut += weight[~largest].abs().sum().item()
    return cut / (m - n) / (kept / n)


# -------------------------------------------------------------------------------------------------------- distillation


def distillation(student: Tensor, teacher: Tensor, targets: Tensor, *, eta: float, temperature: float = 1.0) -> Tensor:
    """eta KL(teacher || student) + (1 - eta) cross-entropy, in nats a token [eq 13]; CAST has no temperature.

    student, teacher: logits [..., V]; targets [...] int64. The divergence is multiplied by the temperature's square.
    """
    student, teacher, targets = student.flatten(0, -2).float(), teacher.flatten(0, -2).float(), targets.flatten()
    told, said = ((logits / temperature).log_softmax(-1) for logits in (teacher.detach(), student))
    divergence = F.kl_div(said, told, log_target=True, reduction="batchmean") * temperature**2
    return eta * divergence + (1 - eta) * F.cross_entropy(student, targets)


# ------------------------------------------------------------------------------------------------------- what to choose


@torch.no_grad()
def gradient_scale(weights: Iterable[nn.Parameter]) -> float:
    """Root mean square of the gradients' entries: the lambda that is of the gradient's size.

    Raises ValueError where no weight has a gradient.
    """
    grads = [weight.grad for weight in weights if weight.grad is not None]
    if not grads:
        raise ValueError("gradient_scale: no weight has a gradient; call backward() before")
    return (sum(g.double().square().sum() for g in grads) / sum(g.numel() for g in grads)).sqrt().item()


def reach(share: Callable[[int], float], steps: int) -> float:
    """Sum over t of share(t) t / T: how far AdamS can move a pruned weight, in units of the peak learning rate."""
    return sum(share(step) * step / steps for step in range(steps))
