"""The stage of the identities: a mixture q, a model p that is a mixture too, and the other routes to the same numbers.

Each file of this folder puts its checks on the list CHECKS with `@check(equation, claim, bound)`; toy/identities.py
prints them as a table.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from toy.mixture import LAYOUTS, Mixture

CHECKS = []
SEED = [0]  # added to the seed of everything that is drawn; --seed N makes it 1000 N


class Check(NamedTuple):
    """A function that returns one number, and the bound that it must keep below, or above."""

    equation: str
    claim: str
    bound: float
    is_above: bool
    function: Callable[[], float]

    def holds(self, number: float) -> bool:
        return number >= self.bound if self.is_above else number <= self.bound


def check(equation: str, claim: str, below: float | None = None, above: float | None = None):
    """Put a function on the list."""

    def register(function):
        bound = below if above is None else above
        CHECKS.append(Check(equation, claim, bound, above is not None, function))
        return function

    return register


q = Mixture(**LAYOUTS["between"] | {"std": 0.35}, dtype=torch.float64)
A, B, T, S = 0.6, torch.tensor([0.3, -0.2], dtype=torch.float64), 0.7, 0.45  # the model p and its two times
p = q.pushforward(A, B, T)


def random(seed: int) -> np.random.Generator:
    """The generator of one check's random numbers."""
    return np.random.default_rng(SEED[0] + seed)


def points(n: int = 256, seed: int = 0, least: float = 0.05) -> tuple[Tensor, Tensor, Tensor]:
    """x [n, 2] where q(x_s) has mass, times s [n] in (0.05, 0.95), at least `least`, conditions c [n]."""
    rng = random(seed)
    c = torch.from_numpy(rng.integers(0, q.C, n))
    s = torch.from_numpy(rng.uniform(0.05, 0.95, n))
    x = (1 - s)[:, None] * q.sample(c, rng) + s[:, None] * torch.from_numpy(rng.standard_normal((n, 2)))
    return x, s.clamp_min(least), c


def three(c: Tensor) -> list:
    """The unconditional data, the conditional data and the model: what s.1-s.3 and Eq. 13 compare."""
    return [(q, q.null(c)), (q, c), (p, c)]


def score(distribution: Mixture, x: Tensor, s: Tensor, c: Tensor) -> Tensor:
    """grad log density, by automatic differentiation of the density (posterior means play no part)."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(distribution.log_density(x, s, c).sum(), x)[0]


def grid(half_width: float, n: int) -> tuple[Tensor, float]:
    """[n * n, 2] points of a square around the origin and the area of a cell. Trapezoidal sums converge fast here."""
    axis = torch.linspace(-half_width, half_width, n, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis), float(axis[1] - axis[0]) ** 2


def bayes(distribution: Mixture, x: Tensor, s: Tensor, c: Tensor) -> Tensor:
    """E[x0 | x_s, c] from Bayes' rule: integrate x0 q(x0 | c) q(x_s | x0) over a grid of x0, normalise.

    The grid must resolve the kernel, whose width is s / (1 - s): s >= 0.2 suffices.
    """
    x0, _ = grid(5.0, 120)
    result = torch.empty_like(x)
    for label in c.unique().tolist():
        pick = c == label
        prior = distribution.log_density(x0, 0.0, label)
        distance2 = (x[pick, None] - (1 - s[pick])[:, None, None] * x0).square().sum(-1)
        result[pick] = (prior - distance2 / (2 * s[pick, None] ** 2)).softmax(1) @ x0
    return result


def hermite(n: int, dims: int) -> tuple[Tensor, Tensor]:
    """Nodes [n^dims, dims] and weights of Gauss-Hermite quadrature: E f(z), z ~ N(0, I), is the weighted sum of f."""
    z, w = np.polynomial.hermite_e.hermegauss(n)
    nodes = torch.cartesian_prod(*[torch.from_numpy(z)] * dims)
    weights = torch.cartesian_prod(*[torch.from_numpy(w / w.sum())] * dims).prod(1)
    return nodes, weights


def full(value: float, like: Tensor) -> Tensor:
    return torch.full((len(like),), value, dtype=torch.float64)


def worst(*differences: Tensor) -> float:
    """The largest absolute value; NaN counts as infinite, so that it cannot pass."""
    return max(float(torch.nan_to_num(d.detach().abs(), nan=torch.inf).max()) for d in differences)
