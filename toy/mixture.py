"""Data with known densities and scores: Gaussian mixtures in 2-D, one mixture for each condition.

    q = Mixture(**LAYOUTS["between"])
    x0 = q.sample(c, rng)                      # c [B] in 0 .. C-1; c = C is the null prompt: all conditions
    q.posterior_mean(x_t, t, c)                # E[x0 | x_t, c], what a perfect network would predict (Eq. 4)
    q.log_density(x_t, t, c)                   # log q(x_t | c), whose gradient is the score

Noise turns a Gaussian into a Gaussian. A component N(m, v I) of q(x0 | c) becomes N((1-t) m, ((1-t)^2 v + t^2) I) in
q(x_t | c), so densities, scores and posterior means are closed forms at every t. That is why this folder can check
equations to the last digit, and can tell how far a trained network is from the truth.

    x0, x_t  [B, 2]      t  [B] in [0, 1]      c  [B] int64, C means the null prompt      K = C * M components

One number will do for t or c where all rows have the same.
"""

import math

import numpy as np
import torch
from torch import Tensor

from losses import like


class Mixture:
    """q(x0 | c) for C equally likely conditions with M round Gaussian modes each."""

    def __init__(self, means, std=0.12, weights=None, dtype=torch.float32):
        """means [C, M, 2]; std a number or [C, M]; weights [C, M], whose rows sum to one, or None for equal modes."""
        self.means = torch.as_tensor(means, dtype=dtype)
        self.C, self.M = self.means.shape[:2]
        self.std = torch.as_tensor(std, dtype=dtype).expand(self.C, self.M)
        self.weights = torch.full((self.C, self.M), 1 / self.M, dtype=dtype)
        if weights is not None:
            self.weights = torch.as_tensor(weights, dtype=dtype)
        if not torch.allclose(self.weights.sum(1), torch.ones(self.C, dtype=dtype)):
            raise ValueError("the weights of each condition must sum to 1")
        self.m, self.v = self.means.flatten(0, 1), self.std.flatten() ** 2  # [K, 2], [K]
        # Row c holds the weights of all K components in q(x0 | c); the last row is q(x0), the null prompt's.
        self.table = torch.block_diag(*self.weights)  # [C, K]
        self.table = torch.cat([self.table, self.table.mean(0, keepdim=True)])  # [C + 1, K]

    def null(self, c: Tensor) -> Tensor:
        """The null prompt, shaped like the conditions c."""
        return torch.full_like(c, self.C)

    def modes(self, c: int):
        """(mean [2], standard deviation, share) of each mode of condition c."""
        return zip(self.means[c], self.std[c], self.weights[c])

    def sample(self, c: Tensor, rng: np.random.Generator) -> Tensor:
        """x0 ~ q(x0 | c), one for each c: [B, 2]."""
        return self._draw(self.table[c], self.m.expand(len(c), -1, -1), self.v.expand(len(c), -1), rng)

    def _draw(self, shares: Tensor, mean: Tensor, var: Tensor, rng: np.random.Generator) -> Tensor:
        """Pick a component by `shares` [B, K], then a point of it: mean [B, K, 2], var [B, K] -> [B, 2]."""
        u = torch.from_numpy(rng.random(len(shares))).to(shares)
        passed = u[:, None] > shares.cumsum(1) / shares.sum(1, keepdim=True)
        k = passed.sum(1).clamp_max(shares.shape[1] - 1)  # u may round to 1
        row = torch.arange(len(k))
        z = torch.from_numpy(rng.standard_normal((len(k), 2))).to(shares)
        return mean[row, k] + var[row, k].sqrt()[:, None] * z

    def _log_shares(self, x_t: Tensor, t: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log of (weight times density of each component) at x_t [B, K], the components' variances there, and t [B, 1]."""
        t = torch.as_tensor(t, dtype=x_t.dtype).reshape(-1, 1)
        var = (1 - t) ** 2 * self.v + t**2
        distance2 = (x_t[:, None] - (1 - t)[..., None] * self.m).square().sum(-1)
        return self.table.log()[c] - distance2 / (2 * var) - (2 * math.pi * var).log(), var, t

    def log_density(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """log q(x_t | c), [B]."""
        return self._log_shares(x_t, t, c)[0].logsumexp(1)

    def posterior(self, x_t: Tensor, t: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q(x0 | x_t, c), again a mixture: shares [B, K], means [B, K, 2], variances [B, K]."""
        log_shares, var, t = self._log_shares(x_t, t, c)
        gain = (1 - t) * self.v / var  # how much of the deviation in x_t is signal
        deviation = x_t[:, None] - (1 - t)[..., None] * self.m
        means, var = self.m + gain[..., None] * deviation, self.v * t**2 / var
        return log_shares.softmax(1), means, var.expand(len(x_t), -1)

    def posterior_mean(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """E[x0 | x_t, c], [B, 2]: the minimiser of the data loss (Eq. 4, 7)."""
        shares, means, _ = self.posterior(x_t, t, c)
        return (shares[..., None] * means).sum(1)

    def posterior_sample(self, x_t: Tensor, t: Tensor, c: Tensor, rng: np.random.Generator) -> Tensor:
        """x0 ~ q(x0 | x_t, c), [B, 2]: what x0_hat would be if the model were perfect at every distance."""
        return self._draw(*self.posterior(x_t, t, c), rng)

    def V(self, x_t: Tensor, t: Tensor, s: Tensor, c: Tensor) -> Tensor:
        """The perfect flow-matching network: the velocity whose Eq. 6 is the posterior mean. It has no use for s."""
        return (x_t - self.posterior_mean(x_t, t, c)) / like(t, x_t)

    def pushforward(self, a: float, b: Tensor, t: float) -> "Mixture":
        """The distribution of x0_hat = a x_t + b, x_t ~ q(x_t | c): a model simple enough to be solved."""
        std = (a**2 * ((1 - t) ** 2 * self.std**2 + t**2)) ** 0.5
        return Mixture(a * (1 - t) * self.means + b, std, self.weights, self.means.dtype)


# Three layouts. What self-evaluation can do is decided by where the other conditions are.
def ring(radius: float = 1.5, modes: int = 9, conditions: int = 3) -> list:
    """Modes on one circle around the origin, dealt out to the conditions in turn: [C, M, 2]."""
    angle = [2 * math.pi * i / modes for i in range(modes)]
    points = [(radius * math.cos(a), radius * math.sin(a)) for a in angle]
    return [points[c::conditions] for c in range(conditions)]


LAYOUTS = {
    # Every mode has the same norm. Eq. 19 gives each target the norm of its x0, so this layout hands the radius over.
    "ring": dict(means=ring()),
    # Unlike radii, no centre, unlike masses; between two modes of one condition stands another condition.
    "between": dict(
        means=[
            [(-0.9, -0.7), (0.6, -0.1), (1.9, 1.2)],
            [(-0.2, -1.2), (0.9, 0.9), (2.3, 0.1)],
            [(-0.3, 0.5), (1.4, -0.9), (0.3, 1.8)],
        ],
        weights=[[0.5, 0.3, 0.2], [0.3, 0.2, 0.5], [0.2, 0.5, 0.3]],
    ),
    # The same kind of modes, but each condition keeps to its own corner: between its modes there is no one else.
    "far": dict(
        means=[
            [(-1.9, -0.4), (-1.1, 0.3), (-1.5, 1.1)],
            [(1.7, 1.3), (2.5, 1.9), (2.6, 0.9)],
            [(0.6, -2.2), (1.5, -1.5), (1.9, -2.5)],
        ],
        weights=[[0.5, 0.3, 0.2], [0.3, 0.2, 0.5], [0.2, 0.5, 0.3]],
    ),
}
