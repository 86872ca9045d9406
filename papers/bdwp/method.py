"""BDWP: bidirectional weight pruning for N:M sparse training (Fang, Sun, Zhou and Wang, 2023, arXiv 2309.13015).

A training step multiplies three times: forward, gradient of the input, gradient of the weights. Hardware can skip the
zeros of an N:M weight only where its groups lie along the axis that the product sums over. The forward pass sums over
the input channels, the input gradient over the output channels: a weight that is N:M for the one is not for the other.
SR-STE therefore saves in one product of three. BDWP takes two views of the same dense weight, one for each direction.

Sources: the abstract and what others quote. There is no released code and the full text was not at hand, so equations
are numbered here and not as there. Whether the pull of SR-STE is kept was not to be seen: here it is, and `bdwp_ste` is
the arm without it. Of the relatives 2302.06058 and 2102.08124 the released code was read (no licence, not copied).

symbol    name here   shape      meaning
W         weight      [O, I]     dense weights, all of them trained ([O, I, kh, kw]: each kernel position by itself)
E_F       kept        as W       1 for the n largest |W| of every m along the input channels I
E_B       back        as W       1 for the n largest |W| of every m along the output channels O
W_FF      .forward    as W       E_F * W, the forward view
W_BP      .backward   as W       E_B * W, the backward view
x, y      x           [B, I]     input; y [B, O] output
lambda_W  decay                  pull on what the forward view leaves out (SR-STE); 0: none
f, b, w                          share of the multiply-accumulates that each of the three products still takes

    W_FF = E_F(W) * W,   W_BP = E_B(W) * W                      (1) two views
    y  = W_FF x                                                 (2) forward, N:M
    dx = W_BP^T dy                                              (3) input gradient, N:M, and not exactly that of (2)
    dW = dy x^T                                                 (4) weight gradient, dense
    W <- W - gamma (dW + lambda_W (1 - E_F) * W)                (5) update of the dense weight
    both views of the next step follow at once from the new W   (6) pre-generation
    cost = (f + b + w) / 3                                      (7) of a step, in those of a dense one
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.sparsity import BDWP, SRSTE, BiMask, Dense, Passes, Recipe, Transposable
from kernels import nm

# ------------------------------------------------------------------------------------------------ one step of a layer


@dataclass(frozen=True)
class Views:
    """(1) The two masks of a dense weight, and what they leave of it."""

    weight: Tensor
    kept: Tensor
    back: Tensor

    @property
    def forward(self) -> Tensor:
        """W_FF."""
        return self.weight * self.kept

    @property
    def backward(self) -> Tensor:
        """W_BP."""
        return self.weight * self.back


def views(weight: Tensor, n: int, m: int) -> Views:
    """(1) Both views of W [O, I, ...]; m divides O and I."""
    return Views(weight, nm.mask(weight, n, m, dim=1), nm.mask(weight, n, m, dim=0))


def forward(x: Tensor, seen: Views) -> Tensor:
    """(2) y [B, O]."""
    return x @ seen.forward.T


def input_gradient(dy: Tensor, seen: Views) -> Tensor:
    """(3) dx [B, I], by the backward view: a product that sums over O, along which W_BP is N:M."""
    return dy @ seen.backward


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """(4) dW [O, I] of all weights, so that those left out go on learning."""
    return dy.T @ x


def update(seen: Views, gradient: Tensor, *, rate: float, decay: float) -> Tensor:
    """(5) The next dense W. The pull works on what the *forward* view leaves out: that is the network one keeps."""
    return seen.weight - rate * (gradient + decay * (~seen.kept * seen.weight))


def fit_perceptron(
    first: Tensor,
    second: Tensor,
    batches: Iterable[tuple[Tensor, Tensor]],
    n: int,
    m: int,
    *,
    rate: float,
    decay: float,
) -> tuple[Tensor, Tensor]:
    """Least squares by two layers with a ReLU between, y = W2 relu(W1 x), with (1) to (6) and nothing in between.

    first [H, I], second [O, H]: the start; batches of inputs [B, I] and targets [B, O]. The loss is half the squared
    error a sample. Returns both dense weights.
    """
    one, two = views(first, n, m), views(second, n, m)
    for x, target in batches:
        hidden = forward(x, one).relu()
        dy = (forward(hidden, two) - target) / len(x)
        dhidden = input_gradient(dy, two) * (hidden > 0)
        first = update(one, weight_gradient(dhidden, x), rate=rate, decay=decay)
        second = update(two, weight_gradient(dy, hidden), rate=rate, decay=decay)
        one, two = views(first, n, m), views(second, n, m)  # (6): the next step finds them ready
    return first, second


# ------------------------------------------------------------------------------------------------------------ (7) cost


def shares(recipe: str, n: int, m: int) -> Passes:
    """f, b and w of a recipe: what N:M products leave of the three, 1 where a product stays dense.

    Raises ValueError for an unknown recipe.
    """
    density = n / m
    if recipe == "dense":
        return Passes(1.0, 1.0, 1.0)
    if recipe == "sr_ste":
        return Passes(density, 1.0, 1.0)
    _require(recipe)
    return Passes(density, density, 1.0)


def cost(recipe: str, n: int, m: int) -> float:
    """(7) A training step in those of a dense one: (rho + 2)/3 for SR-STE, (2 rho + 1)/3 in both directions."""
    return shares(recipe, n, m).total / 3


# ------------------------------------------------------------------------------------------------ recipes for networks
# In networks autograd carries the gradients. `common.sparsity` has (1) to (6) as layers, because several papers build
# on them; that those are the equations above is a claim of this paper (`layers-follow-the-equations`).


def recipe(name: str, decay: float) -> Recipe:
    """How an arm is trained; all with the same pull `decay` on what the forward pass leaves out.

    dense          no mask
    sr_ste         one view: forward N:M, the input gradient with the same weight (arXiv 2102.04010)
    bdwp           two views
    bdwp_ste       two views and no pull, whatever `decay` is
    bi_mask        the backward view is a part of the forward one, found after the output channels were put in the best
                   of a hundred random orders (arXiv 2302.06058)
    transposable   one mask for both directions, the best that is N:M along both axes (arXiv 2102.08124)

    Raises ValueError for another name.
    """
    _require(name)
    known = {
        "dense": Dense(),
        "sr_ste": SRSTE(decay),
        "bdwp": BDWP(decay),
        "bdwp_ste": BDWP(0.0),
        "bi_mask": BiMask(decay),
        "transposable": Transposable(decay),
    }
    return known[name]


RECIPES = ("dense", "sr_ste", "bdwp", "bdwp_ste", "bi_mask", "transposable")


def _require(name: str) -> None:
    if name not in RECIPES:
        raise ValueError(f"recipe: got {name!r}, expected one of {', '.join(RECIPES)}.")


# ------------------------------------------------------------------------------------------ what the released code does


def released_transposable(weight: Tensor, n: int, m: int) -> Tensor:
    """The tiles that the released code of 2102.08124 makes transposable masks in: bool of the weight's shape.

    It takes m * m neighbours *of the flattened weight* for a tile of m x m. The columns of such a tile then run along
    the input channels as its rows do, never along the output channels. (Its greedy search is replaced by the best mask
    of the same tiles.) m * m divides the number of weights.
    """
    tiles = weight.detach().reshape(-1, m, m)
    return nm.mask(tiles, n, m, transposable=True).view_as(weight)


def illegal_groups(kept: Tensor, n: int, m: int, *, dim: int) -> float:
    """The share of groups of m along an axis that keep more than n: what a product over that axis cannot use."""
    groups = kept.movedim(dim, -1).unflatten(-1, (-1, m))
    return (groups.sum(dim=-1) > n).to(torch.float64).mean().item()
