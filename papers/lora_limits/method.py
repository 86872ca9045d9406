"""Computational limits of LoRA (Hu et al., arXiv 2406.03136): gradients of adapters by chained low-rank products.

One attention over a sequence X [L, d], every projection with a LoRA adapter of rank r:

    W = W* + (alpha / r) B A        Q = X W_Q,  K = X W_K,  V = X W_V          P = softmax(Q K^T / d),  O = P V

and the loss |O - Y|^2 / 2. Its gradients need P, an L x L matrix, so they take time quadratic in L. The paper asks when
less will do. If no entry of Q and K is larger than Gamma, the scores lie in [-Gamma^2, Gamma^2], where a polynomial of
a degree g that depends on Gamma alone is as good as exp; and a polynomial of a product of rank d has rank C(d + g, g):

    exp(Q K^T / d) ~ U_Q U_K^T        U [L, C(d + g, g)]                                         `features`

What the gradients are made of are sums, products and Hadamard products with matrices of rank d, so each is again a
product of thin matrices [chained low-rank approximation], and no L x L matrix is ever formed: `chained`.

The threshold is Gamma = o(sqrt(log L)): below it g grows so slowly that the rank is L^o(1) and the time almost linear;
above it no algorithm is subquadratic, unless the strong exponential time hypothesis is wrong. That half is a statement
about all algorithms, which no measurement can show. What can be measured is how the rank that is needed grows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

__all__ = [
    "Adapter",
    "Problem",
    "adapter_gradients",
    "attention_gradients",
    "chained",
    "dense",
    "features",
    "numerical_rank",
    "polynomial",
    "taylor",
    "threshold",
]

Gradients = tuple[Tensor, Tensor, Tensor]  # to Q, K and V, [L, d] each


def threshold(length: int) -> float:
    """sqrt(log L), the order of the norms below which almost linear algorithms exist."""
    return math.sqrt(math.log(length))


# ---------------------------------------------------------------------------------------------------------- the problem


@dataclass(frozen=True)
class Adapter:
    """A projection X W with W = frozen + scale B A: frozen [d, d], B [d, r], A [r, d]; scale is alpha / r."""

    frozen: Tensor
    b: Tensor
    a: Tensor
    scale: float

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.frozen + self.scale * (x @ self.b) @ self.a

    def norms(self, x: Tensor) -> tuple[float, float]:
        """The largest entries of X W* and X (alpha B A / r), which the threshold is about."""
        return (x @ self.frozen).abs().max().item(), (self.scale * (x @ self.b) @ self.a).abs().max().item()


@dataclass(frozen=True)
class Problem:
    """x [L, d], the adapters of query, key and value, and the target y [L, d]."""

    x: Tensor
    query: Adapter
    key: Adapter
    value: Adapter
    y: Tensor

    def projected(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query(self.x), self.key(self.x), self.value(self.x)


def adapter_gradients(problem: Problem, backward: Callable[..., Gradients]) -> dict[str, Tensor]:
    """Gradients of |O - Y|^2 / 2 to B and A of every adapter; `backward` is `dense` or `chained`.

    All are linear in those to Q, K and V: with G = X^T dQ, dB = (alpha / r) G A^T and dA = (alpha / r) B^T G.
    """
    found = {}
    for name, grad in zip(("query", "key", "value"), backward(*problem.projected(), y=problem.y), strict=True):
        adapter: Adapter = getattr(problem, name)
        weight = problem.x.T @ grad
        found[f"{name}.b"] = adapter.scale * weight @ adapter.a.T
        found[f"{name}.a"] = adapter.scale * adapter.b.T @ weight
    return found


# -------------------------------------------------------------------------------------------------- with L x L matrices


def dense(
    query: Tensor, key: Tensor, value: Tensor, *, y: Tensor, kernel: Callable[[Tensor], Tensor] = torch.exp
) -> Gradients:
    """The gradients with P = kernel(Q K^T / d), its rows divided by their sums; exact for torch.exp."""
    weights = kernel(query @ key.T / query.shape[-1])
    p = weights / weights.sum(-1, keepdim=True)
    return attention_gradients(query, key, value, p, p @ value - y, 1 / query.shape[-1])


def attention_gradients(
    query: Tensor, key: Tensor, value: Tensor, p: Tensor, upstream: Tensor, scale: float
) -> Gradients:
    """From the weights p [..., L, L] and the gradient to the output [..., L, d], those to query, key and value.

    dP = dO V^T and dS = P * (dP - rowsum(P * dP)), where the row sums are those of dO * O.
    """
    change = upstream @ value.mT
    change = p * (change - (p * change).sum(-1, keepdim=True))
    return scale * change @ key, scale * change.mT @ query, p.mT @ upstream


def taylor(scores: Tensor, degree: int) -> Tensor:
    """1 + s + s^2 / 2! + ... + s^degree / degree!"""
    total = term = torch.ones_like(scores)
    for power in range(1, degree + 1):
        term = term * scores / power
        total = total + term
    return total


# ----------------------------------------------------------------------------------------------- chained thin products


def features(x: Tensor, degree: int) -> Tensor:
    """U [L, C(d + g, g)] of x [L, d], such that U_Q U_K^T is `taylor`(Q K^T / d, degree).

    One column for each monomial: (q . k)^m / m! is the sum over |a| = m of prod q_i^a_i k_i^a_i / a_i!
    """
    powers = [torch.ones_like(x)]
    for power in range(1, degree + 1):
        powers.append(powers[-1] * x / math.sqrt(x.shape[-1] * power))  # x^p / sqrt(p! d^p)
    table = torch.stack(powers)  # [g + 1, L, d]
    found = x.new_ones(())
    for axis, exponents in enumerate(_monomials(x.shape[-1], degree).T):
        found = found * table[exponents, :, axis]  # [C(d + g, g), L]
    return found.T


def chained(query: Tensor, key: Tensor, value: Tensor, *, y: Tensor, degree: int) -> Gradients:
    """The gradients in time and memory linear in L; the same as `dense` with `taylor` of that degree.

    A Hadamard product of P ~ U1 U2^T and dO V^T is the product of (U1 * dO) and (U2 * V), all pairs of columns: what it
    is multiplied with comes first, and is as thin as they are.
    """
    size = query.shape[-1]
    left, right = features(query, degree), features(key, degree)
    left = left / (left @ right.sum(0))[:, None]  # its product with `right` has rows that add up to 1
    out = left @ (right.T @ value)
    upstream = out - y
    kept = (upstream * out).sum(-1, keepdim=True)  # the row sums of P * dP
    to_query = _paired(left, upstream, right, value, key) - kept * (left @ (right.T @ key))
    to_key = _paired(right, value, left, upstream, query) - right @ (left.T @ (kept * query))
    return to_query / size, to_key / size, right @ (left.T @ upstream)


def _paired(a: Tensor, b: Tensor, c: Tensor, d: Tensor, x: Tensor) -> Tensor:
    """((a c^T) * (b d^T)) x for a, c [L, k] and b, d, x [L, d], one column of b and d after the other."""
    return sum((b[:, i, None] * (a @ (c.T @ (d[:, i, None] * x))) for i in range(b.shape[-1])), torch.zeros_like(x))


# ----------------------------------------------------------------------------------------------------- what is needed


def numerical_rank(matrix: Tensor, tolerance: float) -> int:
    """The least rank of any matrix within `tolerance` of this one, relative in Frobenius norm (Eckart and Young)."""
    energy = torch.linalg.svdvals(matrix).square()
    left_over = energy.flip(0).cumsum(0).flip(0)  # what is lost when all from here on are dropped
    return int((left_over > tolerance**2 * energy.sum()).sum())


def polynomial(degree: int) -> Callable[..., Gradients]:
    """`dense` with the polynomial in the place of exp."""
    return partial(dense, kernel=partial(taylor, degree=degree))


@lru_cache(maxsize=32)
def _monomials(size: int, degree: int) -> Tensor:
    """Exponents [C(size + degree, degree), size] of all monomials of at most this degree."""
    rows = []
    for total in range(degree + 1):
        for chosen in itertools.combinations_with_replacement(range(size), total):
            rows.append([chosen.count(axis) for axis in range(size)])
    return torch.tensor(rows)
