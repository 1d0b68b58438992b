"""S.1: the loss whose gradient is the self-evaluation."""

import torch
from torch import Tensor
from torch.autograd.functional import hessian

import losses
from toy.checks.flow_matching import bumps
from toy.checks.scores import three_means, three_scores
from toy.checks.stage import bayes, check, full, hermite, p, points, q, random, score, worst


def gradient_at_x_s(x_s: Tensor, s: Tensor, Delta: Tensor) -> Tensor:
    """d L_self / d x_s by autograd, with Eq. 8 solved for x0_hat = (x_s - sigma_s eps) / alpha_s."""
    x_s, eps = x_s.clone().requires_grad_(), points(seed=1)[0]
    x0_hat = (x_s - s[:, None] * eps) / (1 - s)[:, None]
    loss = losses.self_evaluation_loss(x0_hat, losses.pseudo_target(x0_hat, Delta))
    return torch.autograd.grad(loss.sum(), x_s)[0]


def difference_from(ideal: Tensor, **k) -> float:
    """That gradient beside 2 sigma^2/alpha^2 times an ideal one, with exact means in Delta; without k no auxiliary term."""
    x, s, c = points()
    means = three_means(x, s, c)
    gradient = gradient_at_x_s(x, s, losses.self_evaluation(*(means if k else means[:2]), **k))
    return worst(gradient - (2 * s**2 / (1 - s) ** 2)[:, None] * ideal)


@check("Eq. 14-15, s.4-s.5", "Result 1: grad of L_self = 2 sigma^2/alpha^2 * classifier score", below=1e-8)
def result_1():
    null, data, _ = three_scores(*points())
    return difference_from(null - data)


@check("Eq. s.6-s.7", "Result 2: the same with the auxiliary term, k = 0.9 and 0.3", below=1e-8)
def result_2():
    null, data, fake = three_scores(*points())
    return max(difference_from(k * (null - data) + (1 - k) * (fake - data), k=k) for k in (0.9, 0.3))


def delta_at_the_data(k: float) -> Tensor:
    """Delta at points of q, where the model is the data (p = q) and the fake branch knows its samples (a grid)."""
    x, s, c = points(60, least=0.2)
    G_null, G_c, _ = three_means(x, s, c)
    return losses.self_evaluation(G_null, G_c, bayes(q, x, s, c), k)


@check("Sec. 3.2, k = 0", "p = q is stationary: Delta is zero at every point", below=1e-9)
def exact_matching_rests():
    return worst(delta_at_the_data(0.0))


@check("Sec. 3.2, k = 0.9", "p = q is NOT stationary: rms Delta, in units of a mode's std", above=0.3)
def paper_k_does_not_rest():
    return float(delta_at_the_data(0.9).square().sum(1).mean().sqrt()) / 0.35


@check("Sec. 3.2, k = 1", "... nor under the classifier term alone: rms Delta / std", above=0.3)
def classifier_alone_does_not_rest():
    return float(delta_at_the_data(1.0).square().sum(1).mean().sqrt()) / 0.35


@check("Eq. s.2, s -> 0", "Delta falls as sigma_s^2 times the score gap of clean data (relative)", below=0.01)
def delta_vanishes_near_the_data():
    c = torch.arange(256) % q.C
    x, s = q.sample(c, random(6)), 1e-4
    Delta = losses.self_evaluation(q.posterior_mean(x, s, q.C), q.posterior_mean(x, s, c))
    gap = score(q, x, 0.0, q.C) - score(q, x, 0.0, c)
    return worst(Delta / s**2 - gap) / worst(gap)


@check("Eq. 14", "the pseudo-target carries no gradient, so dL_self/dx0_hat = 2 Delta", below=1e-14)
def stop_gradient():
    x0_hat, Delta = points(seed=1)[0].requires_grad_(), points(seed=2)[0]
    x_self = losses.pseudo_target(x0_hat, Delta)
    gradient = torch.autograd.grad(losses.self_evaluation_loss(x0_hat, x_self).sum(), x0_hat)[0]
    return worst(gradient - 2 * Delta, x_self - (x0_hat - Delta)) + float(x_self.requires_grad)


@check("Eq. s.8", "an affine fake branch, fitted with the loss, is the mean of a Gaussian p", below=1e-9)
def fake_branch_learns_the_posterior():
    # Samples of a Gaussian x0_hat as quadrature nodes, so that the least-squares fit is the population's.
    z, w = hermite(6, 4)
    m, std, s = torch.tensor([0.8, -0.5], dtype=torch.float64), 0.7, full(0.4, z)
    x0_hat, eps = m + std * z[:, :2], z[:, 2:]
    x_s = losses.add_noise(x0_hat, s, eps)

    def V(theta):  # x_s M + v, theta = (M, v)
        return x_s @ theta[:4].view(2, 2) + theta[4:]

    def loss(theta):
        return (w * losses.fake_loss(V(theta), x0_hat, eps)).sum()

    zero = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(loss(zero), zero)[0]
    theta = -torch.linalg.solve(hessian(loss, zero.detach()), slope)  # one Newton step: the loss is quadratic
    gain = ((1 - s) * std**2 / ((1 - s) ** 2 * std**2 + s**2))[:, None]
    return worst(losses.one_step_estimate(x_s, s, V(theta)) - (m + gain * (x_s - (1 - s)[:, None] * m)))


@check("Eq. s.8", "the mixture p: its gradient is zero at the posterior mean (8 directions)", below=1e-6)
def fake_loss_is_flat_at_the_posterior():
    slope = torch.zeros(8, dtype=torch.float64)
    z, w = hermite(12, 4)
    s = full(0.6, z)
    for m, std, share in p.modes(0):
        x0_hat, eps = m + std * z[:, :2], z[:, 2:]
        x_s = losses.add_noise(x0_hat, s, eps)
        V = p.V(x_s, s, s, 0).requires_grad_()
        gradient = torch.autograd.grad((w * losses.fake_loss(V, x0_hat, eps)).sum(), V)[0]
        slope += share * torch.einsum("nNk,Nk->n", bumps(x_s), gradient)
    return worst(slope)


@check("Eq. s.8", "it teaches the fake branch, never the sample", below=1e-14)
def fake_loss_spares_the_sample():
    x0_hat, V = points(seed=1)[0].requires_grad_(), points(seed=2)[0].requires_grad_()
    losses.fake_loss(V, x0_hat, points()[0]).sum().backward()
    return 0.0 if x0_hat.grad is None and bool((V.grad != 0).any()) else torch.inf
