r"""Sparse spectral training, SST (Zhao et al., ICML 2025, arXiv 2405.15481).

A network is trained from scratch with little memory for gradients and moments: every weight matrix is kept as its
singular value decomposition, all singular values are trained in every step, and a few of the singular vectors at a
time. Which few is drawn anew every so often, the large ones more often; now and then the whole is decomposed again.

symbol    name here      shape          meaning
W         weight         [O, I]         weight of a linear layer, y = x W^T
k                        min(O, I)      number of singular values (m in the paper)
U, Sigma, V  left, sigma, right  [O, k], [k], [I, k]   W = U diag(Sigma) V^T
S         chosen         [r]            indices whose vectors are trained now
G         grad           [O, I]         dL/dW
p         probability    [k]            chance of each index

    W = U diag(Sigma) V^T,   [U, Sigma, V] = svd(W) at the start and at each round           (1)
    Sigma <- max(Sigma - rate dL/dSigma, 0),   dL/dSigma_i = U_i^T G V_i        every step   (2)
    U_i <- unit(U_i - rate dU_i),  V_i <- unit(V_i - rate dV_i)   for i in S,   every step   (3)
    dU_i = G V_i,   dV_i = G^T U_i                 `enhanced`: without the factor Sigma_i    (4)
    p_i = (1/k + Sigma_i / sum Sigma) / 2          S: r of k without replacement             (5)

An *iteration* is a number of steps with one S, after which the moments of (3) start anew; a *round* is as many
iterations as it takes to train k vectors, after which (1) is done again [summaries: the paper's own text was not at
hand; the numbers of the equations are ours].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

Sampling = Literal["mixed", "proportional", "uniform", "top", "sequential"]
Start = Literal["svd", "random"]

# ------------------------------------------------------------------------------------------------------ the equations


def decompose(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(1) U [O, k], Sigma [k] falling, V [I, k] of weight [O, I]."""
    left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
    return left, sigma, right.mT.contiguous()


def compose(left: Tensor, sigma: Tensor, right: Tensor) -> Tensor:
    """(1) W = U diag(Sigma) V^T [O, I]."""
    return (left * sigma) @ right.mT


def probability(sigma: Tensor, sampling: Sampling = "mixed") -> Tensor:
    """(5) p [k]: half even, half by size. `proportional` and `uniform` are its two halves alone."""
    even = torch.full_like(sigma, 1 / len(sigma))
    by_size = sigma / sigma.sum() if sigma.sum() > 0 else even
    return {"uniform": even, "proportional": by_size}.get(sampling, (even + by_size) / 2)


def choose(sigma: Tensor, rank: int, sampling: Sampling, iteration: int, generator: Generator) -> Tensor:
    """S [r] of sigma [k]: drawn by (5); `top` takes the largest, `sequential` one block of r after another."""
    count = len(sigma)
    if sampling == "top":
        return sigma.topk(rank).indices
    if sampling == "sequential":
        return torch.arange(iteration * rank, (iteration + 1) * rank, device=sigma.device) % count
    chance = probability(sigma, sampling)
    if int((chance > 0).sum()) < rank:  # singular values that fell to zero leave too few to draw from
        chance = chance + 1e-12
    return torch.multinomial(chance.cpu(), rank, generator=generator).to(sigma.device)


class Compose(torch.autograd.Function):
    """(1) forward; backward (2) for Sigma and (4), or the true gradient, for the chosen vectors."""

    @staticmethod
    def forward(
        ctx: Any, left: Tensor, sigma: Tensor, right: Tensor, chosen_left: Tensor, chosen_right: Tensor, *rest: Any
    ) -> Tensor:
        chosen, ctx.enhanced, base = rest
        left, right = left.index_copy(1, chosen, chosen_left), right.index_copy(1, chosen, chosen_right)
        ctx.save_for_backward(left, sigma, right, chosen)
        weight = compose(left, sigma, right)
        return weight if base is None else weight + base

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        left, sigma, right, chosen = ctx.saved_tensors
        towards_left = grads[0] @ right  # [O, k]
        d_sigma = (left * towards_left).sum(dim=0)
        d_left, d_right = towards_left[:, chosen], grads[0].mT @ left[:, chosen]
        if not ctx.enhanced:
            d_left, d_right = d_left * sigma[chosen], d_right * sigma[chosen]
        return None, d_sigma, None, d_left, d_right, None, None, None


# ----------------------------------------------------------------------------------------------------------- the layer


class SpectralLinear(nn.Module):
    """y = x W^T + b with W as its decomposition; x [..., I] -> [..., O].

    `chosen_left` [O, r] and `chosen_right` [I, r] are the trained vectors, so that an optimizer holds moments of them
    alone; `left`, `right` hold all others. `sigma` [k] and the bias are trained whole.

    Args:
        layer: the dense layer; its weight is what the decomposition starts from.
        rank: r, at most min(O, I).
        enhanced: (4), or the true gradient.
        start: `svd`; or `random`, the method without decompositions: W stays as `base`, and each iteration learns r
            random unit pairs whose Sigma begins at 0 and which are then added to `base` (ours, after the authors'
            ablation of the initialisation).
        all_sigma: train every Sigma, or those of the chosen pairs only.

    Raises ValueError for a rank that does not fit.
    """

    def __init__(
        self, layer: nn.Linear, rank: int, *, enhanced: bool = True, start: Start = "svd", all_sigma: bool = True
    ):
        super().__init__()
        smallest = min(layer.weight.shape)
        if not 1 <= rank <= smallest:
            raise ValueError(
                f"SpectralLinear: got rank={rank} for a weight of {list(layer.weight.shape)}; expected 1..{smallest}"
            )
        self.rank, self.enhanced, self.start, self.all_sigma = rank, enhanced, start, all_sigma
        self.bias = layer.bias
        weight = layer.weight.detach()
        self.base: Tensor | None
        self.left: Tensor
        self.right: Tensor
        self.register_buffer("base", weight.clone() if start == "random" else None)
        left, sigma, right = decompose(weight) if start == "svd" else self._random(weight)
        self.register_buffer("left", left)
        self.register_buffer("right", right)
        self.register_buffer("chosen", torch.arange(rank, device=weight.device))
        self.chosen: Tensor
        self.sigma = nn.Parameter(sigma)
        self.chosen_left = nn.Parameter(left[:, :rank].clone())
        self.chosen_right = nn.Parameter(right[:, :rank].clone())
        if not all_sigma:
            self.sigma.register_hook(self._only_chosen)

    @property
    def weight(self) -> Tensor:
        """W [O, I], differentiable."""
        return Compose.apply(
            self.left,
            self.sigma,
            self.right,
            self.chosen_left,
            self.chosen_right,
            self.chosen,
            self.enhanced,
            self.base,
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    @torch.no_grad()
    def project_(self) -> None:
        """What follows each step: Sigma >= 0 (2), unit vectors (3)."""
        self.sigma.clamp_min_(0)
        for vectors in (self.chosen_left, self.chosen_right):
            vectors.div_(vectors.norm(dim=0, keepdim=True))

    @torch.no_grad()
    def swap_(self, sampling: Sampling, iteration: int, generator: Generator) -> None:
        """A new iteration: put the trained vectors back, choose others (5). The layer computes what it did."""
        if self.start == "random":
            self._restart(*self._random(self.weight))
            return
        self.left.index_copy_(1, self.chosen, self.chosen_left)
        self.right.index_copy_(1, self.chosen, self.chosen_right)
        self.chosen.copy_(choose(self.sigma, self.rank, sampling, iteration, generator))
        self.chosen_left.copy_(self.left[:, self.chosen])
        self.chosen_right.copy_(self.right[:, self.chosen])

    @torch.no_grad()
    def decompose_(self) -> None:
        """A new round (1); call `swap_` after it. The layer computes what it did."""
        if self.start == "svd":
            self._restart(*decompose(self.weight))

    @torch.no_grad()
    def orthogonality_error(self) -> float:
        """Largest entry of |U^T U - 1| and |V^T V - 1|."""
        errors = []
        for all_, some in ((self.left, self.chosen_left), (self.right, self.chosen_right)):
            vectors = all_.index_copy(1, self.chosen, some)
            gram = vectors.mT @ vectors
            errors.append((gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)).abs().max().item())
        return max(errors)

    def _random(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keep `weight` as the base; r random unit pairs without size."""
        assert self.base is not None
        self.base.copy_(weight)
        left, right = (F.normalize(weight.new_empty(side, self.rank).normal_(), dim=0) for side in weight.shape)
        return left, weight.new_zeros(self.rank), right

    def _restart(self, left: Tensor, sigma: Tensor, right: Tensor) -> None:
        self.left.copy_(left)
        self.right.copy_(right)
        self.sigma.copy_(sigma)
        self.chosen_left.copy_(left[:, self.chosen])
        self.chosen_right.copy_(right[:, self.chosen])

    def _only_chosen(self, grad: Tensor) -> Tensor:
        return torch.zeros_like(grad).index_copy(0, self.chosen, grad[self.chosen])


# -------------------------------------------------------------------------------------------------------- the training


def in_blocks(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers inside the model's list of blocks, by name; embeddings, norms and the head are trained whole.

    Raises ValueError where there are none.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and any(name.startswith(f"{blocks}.") for blocks in lists)
    }
    if not found:
        raise ValueError("SST: found no nn.Linear inside an nn.ModuleList of blocks; expected a transformer")
    return found


def spectral_(model: nn.Module, rank: int, **options: Any) -> dict[str, SpectralLinear]:
    """Replace the linear layers in blocks by `SpectralLinear` with these options, in place; they compute the same."""
    layers = {}
    for name, layer in in_blocks(model).items():
        parent, _, leaf = name.rpartition(".")
        layers[name] = SpectralLinear(layer, rank, **options)
        setattr(model.get_submodule(parent), leaf, layers[name])
    return layers


class Spectral:
    """Keeps the spectral layers of a training: call `after_step` after every update of `optimizer`.

    Args:
        interval: steps an iteration.
        redo: decompose again each round, of ceil(k / r) iterations for the largest k of the layers.

    `chosen` lists S of the layer `watched` (the first) at each iteration.
    """

    def __init__(
        self,
        layers: Mapping[str, SpectralLinear],
        optimizer: torch.optim.Optimizer,
        *,
        interval: int,
        sampling: Sampling,
        generator: Generator,
        redo: bool = True,
    ):
        self.layers, self.optimizer, self.interval = layers, optimizer, interval
        self.sampling, self.generator, self.redo = sampling, generator, redo
        self.round = max(-(-len(layer.sigma) // layer.rank) for layer in layers.values())
        self.iteration, self.chosen = 0, []
        self._swap()

    def after_step(self, done: int) -> None:
        """`done`: updates so far."""
        for layer in self.layers.values():
            layer.project_()
        if done % self.interval:
            return
        self.iteration = done // self.interval
        if self.redo and self.iteration % self.round == 0:
            for layer in self.layers.values():
                layer.decompose_()
                self.optimizer.state.pop(layer.sigma, None)
        self._swap()

    def _swap(self) -> None:
        for layer in self.layers.values():
            layer.swap_(self.sampling, self.iteration, self.generator)
            # moments of other vectors mean nothing for these
            begun_anew = [layer.chosen_left, layer.chosen_right, *([layer.sigma] if layer.start == "random" else [])]
            for parameter in begun_anew:
                self.optimizer.state.pop(parameter, None)
        self.chosen.append(next(iter(self.layers.values())).chosen.tolist())


# ------------------------------------------------------------------------------------------------------------ counting


def trained(outputs: int, inputs: int, rank: int, method: Literal["full", "lora", "sst"]) -> int:
    """Entries of an [O, I] weight that are trained at a time: O I, r (O + I), r (O + I) + k."""
    low = rank * (outputs + inputs)
    return {"full": outputs * inputs, "lora": low, "sst": low + min(outputs, inputs)}[method]


def kept(outputs: int, inputs: int, rank: int, method: Literal["full", "lora", "sst"]) -> int:
    """Entries that are kept to compute with: W; W, A and B; or all of U, Sigma and V."""
    smallest = min(outputs, inputs)
    low = rank * (outputs + inputs)
    spectral = smallest * (outputs + inputs) + smallest
    return {"full": outputs * inputs, "lora": outputs * inputs + low, "sst": spectral}[method]


@torch.no_grad()
def truncated(weight: Tensor, share: float) -> Tensor:
    """W [O, I] without the smaller `share` of its singular values."""
    left, sigma, right = decompose(weight)
    count = len(sigma) - round(share * len(sigma))
    return compose(left[:, :count], sigma[:count], right[:, :count])
