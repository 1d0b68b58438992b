"""Sec. 2 and 3.1: flow matching, and learning from data."""

import torch
from torch import Tensor
from torch.autograd.functional import hessian

import losses
from toy.checks.stage import bayes, check, full, hermite, points, q, random, three, worst


@check("Eq. 1-2", "velocity = d x_t / dt, by automatic differentiation", below=1e-14)
def path_velocity():
    x0, t, c = points()
    eps = points(seed=1)[0]
    t.requires_grad_()
    x_t = losses.add_noise(x0, t, eps)
    derivative = torch.stack([torch.autograd.grad(x.sum(), t, retain_graph=True)[0] for x in x_t.T], dim=1)
    ends = [losses.add_noise(x0, full(end, x0), eps) - x for end, x in ((0.0, x0), (1.0, eps))]
    return worst(derivative - losses.velocity(x0, eps), *ends)


@check("Eq. 3, 6, 7, 21", "1/t^2 times the data loss = the velocity loss", below=1e-10)
def weight_makes_velocity_loss():
    x0, t, _ = points()
    eps, V = points(seed=1)[0], points(seed=2)[0]
    x_t = losses.add_noise(x0, t, eps)
    x0_hat = losses.G(lambda *_: V, x_t, t, t, ())
    weighted = losses.time_weight(t) * losses.data_loss(x0_hat, x0)
    return worst(weighted - losses.cfm_loss(V, x0, eps), x0_hat - losses.one_step_estimate(x_t, t, V))


@check("Eq. 4", "closed posterior mean = Bayes' rule on a grid, 3 distributions", below=1e-9)
def posterior_mean():
    x, s, c = points(60, least=0.2)
    return worst(*(each.posterior_mean(x, s, k) - bayes(each, x, s, k) for each, k in three(c)))


def bumps(x_t: Tensor, n: int = 8) -> Tensor:
    """n smooth directions in the space of predictors, evaluated at x_t [N, 2]: [n, N, 2]."""
    rng = random(3)
    W = torch.from_numpy(rng.standard_normal((n, 2, 2)))
    phase = torch.from_numpy(rng.uniform(0, 6, (n, 1, 2)))
    return torch.cos(torch.einsum("Nj,njk->nNk", x_t, W) + phase)


def data_loss_along_bumps(h: Tensor) -> Tensor:
    """E || G* + sum_i h_i bump_i - x0 ||^2 with the closed form G*, by 4-D quadrature over x0 and eps."""
    z, w = hermite(13, 4)
    t, total = full(0.6, z), 0.0
    for c in range(q.C):
        for m, std, share in q.modes(c):
            x0 = m + std * z[:, :2]
            x_t = losses.add_noise(x0, t, z[:, 2:])
            x0_hat = q.posterior_mean(x_t, t, c) + torch.einsum("n,nNk->Nk", h, bumps(x_t))
            total = total + share * (w * losses.data_loss(x0_hat, x0)).sum() / q.C
    return total


@check("Eq. 7", "at the posterior mean the data loss is flat in 8 directions (slope)", below=1e-5)
def data_loss_is_flat():
    h = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    return worst(torch.autograd.grad(data_loss_along_bumps(h), h)[0])


@check("Eq. 7", "... and rises in every one of them, and their mixtures (curvature)", above=0.01)
def data_loss_rises():
    H = hessian(data_loss_along_bumps, torch.zeros(8, dtype=torch.float64))
    return float(torch.linalg.eigvalsh(H).min())
