"""The paper's equations, checked in numbers: losses.py and sampler.py as they are, the network replaced by closed forms.

    python toy/identities.py                 # a few seconds; a table, and exit code 1 if a line fails
    python toy/identities.py --only 19       # the lines whose equation contains "19"

Each check below computes something with the project's code and the same thing by another route: automatic
differentiation of a log density, quadrature on a grid, Gauss-Hermite quadrature, or sampling with its error bar.
It returns one number: the largest error (or, for "is not zero" lines, the smallest size), which the table compares
with the bound. Everything runs in float64, so "equal" means equal to a dozen digits.

The stage is the mixture "between" of mixture.py with wider modes: three conditions, three modes each. q is the data,
p is the law of the one-line model x0_hat = a x_t + b, which is a mixture too and hence has closed forms of its own.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.autograd.functional import hessian

if __name__ == "__main__":  # started as a file: modules are found from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import losses
import model
import sampler
from engine import checkpoint, machine
from toy.mixture import LAYOUTS, Mixture

CHECKS = []  # (equation, claim, bound, whether the number must lie above it, the function)


def check(equation: str, claim: str, below: float | None = None, above: float | None = None):
    """Put a function that returns one number on the list."""

    def register(function):
        CHECKS.append((equation, claim, below if above is None else above, above is not None, function))
        return function

    return register


# =====================================================================================================================
# The stage and the tools
# =====================================================================================================================
q = Mixture(**LAYOUTS["between"] | {"std": 0.35}, dtype=torch.float64)
A, B_SHIFT, T, S = 0.6, torch.tensor([0.3, -0.2], dtype=torch.float64), 0.7, 0.45  # the model p and its two times
p = q.pushforward(A, B_SHIFT, T)


SEED = 0  # added to the seed of everything that is drawn below; --seed N sets it to 1000 N


def points(n: int = 256, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x [n, 2] where q(x_s) has mass, times s [n] in (0.05, 0.95), conditions c [n]."""
    rng = np.random.default_rng(SEED + seed)
    c = torch.from_numpy(rng.integers(0, q.C, n))
    s = torch.from_numpy(rng.uniform(0.05, 0.95, n))
    x = (1 - s)[:, None] * q.sample(c, rng) + s[:, None] * torch.from_numpy(rng.standard_normal((n, 2)))
    return x, s, c


def three_laws(c: Tensor) -> list:
    """The conditional data, the unconditional data and the model: the three distributions of s.1."""
    return [(q, c), (q, q.null(c)), (p, c)]


def score(law: Mixture, x: Tensor, s: Tensor, c: Tensor) -> Tensor:
    """grad log density, by automatic differentiation of the density (posterior means play no part)."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(law.log_density(x, s, c).sum(), x)[0]


def grid(half_width: float, n: int) -> tuple[Tensor, float]:
    """[n * n, 2] points of a square around the origin and the area of a cell. Trapezoidal sums converge fast here."""
    axis = torch.linspace(-half_width, half_width, n, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis), float(axis[1] - axis[0]) ** 2


def mean_by_quadrature(law: Mixture, x: Tensor, s: Tensor, c: Tensor) -> Tensor:
    """E[x0 | x_s, c] from Bayes' rule: integrate x0 q(x0 | c) q(x_s | x0) over a grid of x0, normalise."""
    x0, _ = grid(5.0, 120)
    zero = torch.zeros(len(x0), dtype=torch.float64)
    result = torch.empty_like(x)
    for label in c.unique().tolist():
        pick = c == label
        prior = law.log_density(x0, zero, torch.full((len(x0),), label))
        distance2 = (x[pick, None] - (1 - s[pick])[:, None, None] * x0).square().sum(-1)
        result[pick] = (prior - distance2 / (2 * s[pick, None] ** 2)).softmax(1) @ x0
    return result


def hermite(n: int, dims: int) -> tuple[Tensor, Tensor]:
    """Nodes [n^dims, dims] and weights of Gauss-Hermite quadrature: E f(z), z ~ N(0, I), is the weighted sum of f."""
    z, w = np.polynomial.hermite_e.hermegauss(n)
    nodes = torch.cartesian_prod(*[torch.from_numpy(z)] * dims)
    weights = torch.cartesian_prod(*[torch.from_numpy(w / w.sum())] * dims).prod(1)
    return nodes, weights


def data_by_quadrature(c: int, n: int = 13) -> tuple[Tensor, Tensor, Tensor]:
    """x0 [N, 2], eps [N, 2] and weights [N] such that weighted sums are expectations over q(x0 | c) and the noise."""
    z, w = hermite(n, 4)
    x0 = torch.cat([m + std * z[:, :2] for m, std in zip(q.means[c], q.std[c])])
    return x0, z[:, 2:].repeat(q.M, 1), torch.cat([share * w for share in q.weights[c]])


def full(value: float, like: Tensor) -> Tensor:
    return torch.full((len(like),), value, dtype=torch.float64)


def worst(*differences: Tensor) -> float:
    """The largest absolute value; NaN counts as infinite, so that it can not pass."""
    return max(float(torch.nan_to_num(d.detach().abs(), nan=torch.inf).max()) for d in differences)


# =====================================================================================================================
# Sec. 2 and 3.1: flow matching, and learning from data
# =====================================================================================================================
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
    x0_hat = model.G(lambda *_: V, x_t, t, t, ())
    weighted = losses.time_weight(t) * losses.data_loss(x0_hat, x0)
    return worst(weighted - losses.cfm_loss(V, x0, eps), x0_hat - losses.one_step_estimate(x_t, t, V))


@check("Eq. 4", "closed posterior mean = Bayes' rule on a grid, all three laws", below=1e-9)
def posterior_mean():
    x, s, c = points(60)
    s = s.clamp_min(0.2)  # the grid must resolve the kernel, whose width is s / (1 - s)
    return worst(
        *(law.posterior_mean(x, s, label) - mean_by_quadrature(law, x, s, label) for law, label in three_laws(c))
    )


def bumps(x_t: Tensor, n: int = 8) -> Tensor:
    """n smooth directions in the space of predictors, evaluated at x_t [N, 2]: [n, N, 2]."""
    rng = np.random.default_rng(SEED + 3)
    W, phase = torch.from_numpy(rng.standard_normal((n, 2, 2))), torch.from_numpy(rng.uniform(0, 6, (n, 1, 2)))
    return torch.cos(torch.einsum("Nj,njk->nNk", x_t, W) + phase)


def data_loss_along_bumps(h: Tensor) -> Tensor:
    """E || G* + sum_i h_i bump_i - x0 ||^2 with the closed form G*, by 4-D quadrature over x0 and eps."""
    total = 0.0
    for c in range(q.C):
        x0, eps, w = data_by_quadrature(c)
        t = full(0.6, x0)
        x_t = losses.add_noise(x0, t, eps)
        x0_hat = q.posterior_mean(x_t, t, torch.full((len(x0),), c)) + torch.einsum("n,nNk->Nk", h, bumps(x_t))
        total = total + (w * losses.data_loss(x0_hat, x0)).sum() / q.C
    return total


@check("Eq. 7", "at the posterior mean the data loss is flat in 8 directions (slope)", below=1e-5)
def data_loss_is_flat():
    h = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    return worst(torch.autograd.grad(data_loss_along_bumps(h), h)[0])


@check("Eq. 7", "... and rises in every one of them, and their mixtures (curvature)", above=0.01)
def data_loss_rises():
    H = hessian(data_loss_along_bumps, torch.zeros(8, dtype=torch.float64))
    return float(torch.linalg.eigvalsh(H).min())


# =====================================================================================================================
# Sec. 3.2: scores, posterior means and the reverse KL divergence
# =====================================================================================================================
@check("Eq. 8", "x0_hat noised to s has the density p_theta(x_s | c) (Fourier, quadrature)", below=1e-9)
def renoised_law():
    u = torch.tensor([[0.5, 0.2], [-1.0, 0.7], [0.3, 1.5], [2.0, -1.0]], dtype=torch.float64)
    nodes, w = hermite(20, 2)
    x, area = grid(8.0, 160)
    error = 0.0
    for c in range(q.C):
        # x0_hat - b is a times x_t; given the mode, x_t is Gaussian, and so is the eps of Eq. 8.
        left = 0
        for m, std, share in zip(q.means[c], q.std[c], q.weights[c]):
            spread = ((1 - T) ** 2 * std**2 + T**2) ** 0.5
            x0_hat = A * ((1 - T) * m + spread * nodes) + B_SHIFT  # [N, 2]
            for z, w_z in zip(nodes, w):  # every x0_hat meets every eps
                if w_z < 1e-14:
                    continue
                x_s = losses.add_noise(x0_hat, full(S, x0_hat), z.expand_as(x0_hat))
                left = left + share * w_z * (w.to(torch.complex128) @ torch.exp(1j * (x_s @ u.T)))
        density = p.log_density(x, full(S, x), torch.full((len(x),), c)).exp()
        right = area * torch.einsum("N,Nk->k", density.to(torch.complex128), torch.exp(1j * (x @ u.T)))
        error = max(error, worst((left - right).abs()))
    return error


@check("Eq. 11", "score from the posterior mean = autograd of the log density, 3 laws", below=1e-9)
def tweedie():
    x, s, c = points()
    return worst(
        *(losses.score_from_mean(law.posterior_mean(x, s, k), x, s) - score(law, x, s, k) for law, k in three_laws(c))
    )


@check("Eq. s.1", "mean from the autograd score = Bayes' rule on a grid, 3 laws", below=1e-9)
def tweedie_backwards():
    x, s, c = points(60)
    s = s.clamp_min(0.2)
    return worst(
        *(
            losses.mean_from_score(score(law, x, s, k), x, s) - mean_by_quadrature(law, x, s, k)
            for law, k in three_laws(c)
        )
    )


@check("Eq. s.2-s.3", "gap of two posterior means (grid) = gap of two scores (autograd)", below=1e-9)
def gaps():
    x, s, c = points(60)
    s = s.clamp_min(0.2)
    (data, null, fake) = ((score(law, x, s, k), mean_by_quadrature(law, x, s, k)) for law, k in three_laws(c))
    return worst(*(a[1] - data[1] - losses.mean_gap(a[0], data[0], s) for a in (null, fake)))


@check("Eq. 9-10", "E[delta dx_s/dtheta] = d KL(p||q) / dtheta (density on a grid)", below=1e-5)
def reverse_kl():
    error = 0.0
    for c in range(q.C):
        # Left: samples. theta = (a, b) moves x_s = (1-s)(a x_t + b) + s eps; delta is the gradient of the KL at x_s.
        a, b = torch.tensor(A, dtype=torch.float64, requires_grad=True), B_SHIFT.clone().requires_grad_()
        z, w = hermite(14, 4)
        left = 0.0
        for m, std, share in zip(q.means[c], q.std[c], q.weights[c]):
            x_t = (1 - T) * m + ((1 - T) ** 2 * std**2 + T**2) ** 0.5 * z[:, :2]
            x_s = losses.add_noise(a * x_t + b, full(S, x_t), z[:, 2:])
            k = torch.full((len(x_s),), c)
            delta = losses.reverse_kl_direction(score(p, x_s, full(S, x_s), k), score(q, x_s, full(S, x_s), k))
            left = left + share * (w * (delta * x_s).sum(1)).sum()
        left = torch.autograd.grad(left, (a, b))
        # Right: Eq. 9 itself, with theta inside the density.
        a, b = torch.tensor(A, dtype=torch.float64, requires_grad=True), B_SHIFT.clone().requires_grad_()
        x, area = grid(7.0, 140)
        k, s = torch.full((len(x),), c), full(S, x)
        log_p, log_q = q.pushforward(a, b, T).log_density(x, s, k), q.log_density(x, s, k)
        right = torch.autograd.grad(area * (log_p.exp() * (log_p - log_q)).sum(), (a, b))
        error = max(error, worst(*(one - two for one, two in zip(left, right))))
    return error


@check("Eq. 12", "guided score = autograd of log [ q(x|c)^w q(x)^(1-w) ], w = 0, 1, 5", below=1e-11)
def guidance_sharpens():
    x, s, c = points()
    error = 0.0
    for w in (0.0, 1.0, 5.0):
        y = x.clone().requires_grad_()
        sharp = w * q.log_density(y, s, c) + (1 - w) * q.log_density(y, s, q.null(c))
        guided = losses.guided_score(score(q, x, s, c), score(q, x, s, q.null(c)), w)
        error = max(error, worst(guided - torch.autograd.grad(sharp.sum(), y)[0]))
    return error


def three_scores(x: Tensor, s: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The scores that Eq. 13 needs: unconditional, conditional, model."""
    return score(q, x, s, q.null(c)), score(q, x, s, c), score(p, x, s, c)


def three_means(x: Tensor, s: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What perfect networks would answer at (x_s, s, s): G_null, G_c, G_fake."""
    return q.posterior_mean(x, s, q.null(c)), q.posterior_mean(x, s, c), p.posterior_mean(x, s, c)


@check("Eq. 13", "its two terms add up to Eq. 10 against the guided score", below=1e-11)
def two_terms():
    x, s, c = points()
    w, y = 5.0, x.clone().requires_grad_()
    log_ratio = p.log_density(y, s, c) - w * q.log_density(y, s, c) + (w - 1) * q.log_density(y, s, q.null(c))
    classifier, auxiliary = losses.self_evaluation_scores(*three_scores(x, s, c), w)
    # Alone, the classifier term is -(w - 1) times the gradient of the implicit classifier log q(c | x_s).
    z = x.clone().requires_grad_()
    bayes = torch.autograd.grad((q.log_density(z, s, c) - q.log_density(z, s, q.null(c))).sum(), z)[0]
    return worst(classifier + auxiliary - torch.autograd.grad(log_ratio.sum(), y)[0], classifier + (w - 1) * bayes)


@check("Eq. s.6, 13", "Delta with k = (w-1)/w is Eq. 13 times sigma^2 / (alpha w), w = 1, 2, 10", below=1e-11)
def k_is_a_guidance_scale():
    x, s, c = points()
    error = 0.0
    for w in (1.0, 2.0, 10.0):  # k = 0, 0.5, 0.9
        Delta = losses.self_evaluation(*three_means(x, s, c), k=(w - 1) / w)
        ideal = sum(losses.self_evaluation_scores(*three_scores(x, s, c), w))
        error = max(error, worst(Delta - (s**2 / (1 - s) / w)[:, None] * ideal))
    return error


# =====================================================================================================================
# S.1: the loss whose gradient is the self-evaluation
# =====================================================================================================================
def gradient_through_x0_hat(x_s: Tensor, s: Tensor, eps: Tensor, Delta: Tensor) -> Tensor:
    """d L_self / d x_s with x0_hat = (x_s - sigma_s eps) / alpha_s, Eq. 8 solved for x0_hat, by autograd."""
    x_s = x_s.clone().requires_grad_()
    x0_hat = (x_s - s[:, None] * eps) / (1 - s)[:, None]
    loss = losses.self_evaluation_loss(x0_hat, losses.pseudo_target(x0_hat, Delta))
    return torch.autograd.grad(loss.sum(), x_s)[0]


@check("Eq. 14-15, s.4-s.5", "Result 1: autograd of L_self = 2 sigma^2/alpha^2 * classifier score", below=1e-8)
def result_1():
    x, s, c = points()
    G_null, G_c, _ = three_means(x, s, c)
    gradient = gradient_through_x0_hat(x, s, points(seed=1)[0], losses.self_evaluation(G_null, G_c))
    null, data, _ = three_scores(x, s, c)
    return worst(gradient - (2 * s**2 / (1 - s) ** 2)[:, None] * (null - data))


@check("Eq. s.6-s.7", "Result 2: the same with the auxiliary term, k = 0.9 and 0.3", below=1e-8)
def result_2():
    x, s, c = points()
    null, data, fake = three_scores(x, s, c)
    error = 0.0
    for k in (0.9, 0.3):
        gradient = gradient_through_x0_hat(x, s, points(seed=1)[0], losses.self_evaluation(*three_means(x, s, c), k=k))
        ideal = k * (null - data) + (1 - k) * (fake - data)
        error = max(error, worst(gradient - (2 * s**2 / (1 - s) ** 2)[:, None] * ideal))
    return error


def delta_at_the_data(k: float) -> Tensor:
    """Delta at points of q, where the model is the data (p = q) and the fake branch knows its samples (a grid)."""
    x, s, c = points(60)
    s = s.clamp_min(0.2)
    G_null, G_c, _ = three_means(x, s, c)
    return losses.self_evaluation(G_null, G_c, mean_by_quadrature(q, x, s, c), k)


@check("Sec. 3.2, k = 0", "p = q is stationary: Delta is zero at every point", below=1e-9)
def exact_matching_rests():
    return worst(delta_at_the_data(0.0))


@check("Sec. 3.2, k = 0.9", "p = q is NOT stationary: rms Delta, in units of a mode's std", above=0.3)
def paper_k_does_not_rest():
    return float(delta_at_the_data(0.9).square().sum(1).mean().sqrt()) / 0.35


@check("Sec. 3.2, k = 1", "... nor under the classifier term alone: rms Delta / std", above=0.3)
def classifier_alone_does_not_rest():
    return float(delta_at_the_data(1.0).square().sum(1).mean().sqrt()) / 0.35


@check("Eq. s.2, s -> 0", "Delta dies out as sigma_s^2 times the score gap of clean data (relative)", below=0.01)
def evaluation_is_silent_near_the_data():
    rng, c = np.random.default_rng(SEED + 6), torch.arange(256) % q.C
    x, s, clean = q.sample(c, rng), full(1e-4, c), full(0.0, c)
    Delta = losses.self_evaluation(q.posterior_mean(x, s, q.null(c)), q.posterior_mean(x, s, c))
    gap = score(q, x, clean, q.null(c)) - score(q, x, clean, c)
    return worst(Delta / s[:, None] ** 2 - gap) / worst(gap)


@check("Eq. 14", "the pseudo-target carries no gradient, so dL_self/dx0_hat = 2 Delta", below=1e-14)
def stop_gradient():
    x, s, c = points()
    x0_hat, Delta = points(seed=1)[0].requires_grad_(), points(seed=2)[0]
    x_self = losses.pseudo_target(x0_hat, Delta)
    if x_self.requires_grad:
        return torch.inf
    gradient = torch.autograd.grad(losses.self_evaluation_loss(x0_hat, x_self).sum(), x0_hat)[0]
    return worst(gradient - 2 * Delta, x_self - (x0_hat - Delta))


@check("Eq. s.8", "an affine fake branch, fitted with the loss, is the posterior mean of a Gaussian p", below=1e-9)
def fake_branch_learns_the_posterior():
    # Samples of a Gaussian x0_hat as quadrature nodes, so that the least-squares fit is the population's.
    z, w = hermite(6, 4)
    m, std, s = torch.tensor([0.8, -0.5], dtype=torch.float64), 0.7, 0.4
    x0_hat, eps = m + std * z[:, :2], z[:, 2:]
    x_s = losses.add_noise(x0_hat, full(s, x0_hat), eps)

    def loss(theta):  # V_fake = x_s M + v, theta = (M, v)
        return (w * losses.fake_loss(x_s @ theta[:4].view(2, 2) + theta[4:], x0_hat, eps)).sum()

    zero = torch.zeros(6, dtype=torch.float64)  # the loss is quadratic: one Newton step from zero is its minimum
    slope = torch.autograd.grad(loss(zero.requires_grad_()), zero)[0]
    theta = -torch.linalg.solve(hessian(loss, zero.detach()), slope)
    fitted = losses.one_step_estimate(x_s, full(s, x_s), x_s @ theta[:4].view(2, 2) + theta[4:])
    gain = (1 - s) * std**2 / ((1 - s) ** 2 * std**2 + s**2)
    return worst(fitted - (m + gain * (x_s - (1 - s) * m)))


@check("Eq. s.8", "the mixture p: the exact posterior mean makes its gradient zero (8 directions)", below=1e-6)
def fake_loss_is_flat_at_the_posterior():
    slope = torch.zeros(8, dtype=torch.float64)
    z, w = hermite(12, 4)
    for m, std, share in zip(p.means[0], p.std[0], p.weights[0]):
        x0_hat, eps = m + std * z[:, :2], z[:, 2:]
        x_s, s = losses.add_noise(x0_hat, full(0.6, x0_hat), eps), full(0.6, x0_hat)
        V = p.V(x_s, s, s, torch.zeros(len(x_s), dtype=torch.int64)).requires_grad_()
        gradient = torch.autograd.grad((w * losses.fake_loss(V, x0_hat, eps)).sum(), V)[0]
        slope += share * torch.einsum("nNk,Nk->n", bumps(x_s), gradient)
    return worst(slope)


@check("Eq. s.8", "it teaches the fake branch, never the sample", below=1e-14)
def fake_loss_spares_the_sample():
    x0_hat = points(seed=1)[0].requires_grad_()
    V = points(seed=2)[0].requires_grad_()
    losses.fake_loss(V, x0_hat, points()[0]).sum().backward()
    return 0.0 if x0_hat.grad is None and bool((V.grad != 0).any()) else torch.inf


# =====================================================================================================================
# Sec. 3.3: the objective
# =====================================================================================================================
def pairs(n: int = 256) -> tuple[Tensor, ...]:
    """x0, x0_hat, Delta [n, 2] and times s < t < 1 [n]."""
    rng = np.random.default_rng(SEED + 5)
    t = torch.from_numpy(rng.uniform(0.1, 0.95, n))
    s = t * torch.from_numpy(rng.uniform(0.0, 0.98, n))
    return points(n)[0], points(n, 1)[0], points(n, 2)[0], t, s


def signal_to_noise_lambda(t: Tensor, s: Tensor) -> Tensor:
    """Eq. 17 to the letter: sigma_t / alpha_t - sigma_s / alpha_s."""
    return t / (1 - t) - s / (1 - s)


@check("Eq. 17", "lambda = sigma_t/alpha_t - sigma_s/alpha_s, and 0 at s = t", below=1e-12)
def weight_of_self_evaluation():
    *_, t, s = pairs()
    exact = signal_to_noise_lambda(t, s)
    return worst((losses.lam(t, s) - exact) / (1 + exact), losses.lam(t, t))


@check("Eq. 17-18", "w = lambda/(1+lambda), scaled too; at t = 1 it is 1, and 0 at s = t = 1", below=1e-12)
def weight_of_the_mix():
    *_, t, s = pairs()
    exact = signal_to_noise_lambda(t, s)
    one = torch.ones_like(s)
    errors = [losses.mix_weight(t, s, scale) - scale * exact / (1 + scale * exact) for scale in (1.0, 0.25, 3.0)]
    return worst(*errors, losses.mix_weight(one, s) - 1, losses.mix_weight(one, one), losses.mix_weight(t, t))


@check("Eq. 5, 16", "the hybrid loss is its two squared distances, written out", below=1e-11)
def hybrid():
    x0, x0_hat, Delta, t, s = pairs()
    lam = signal_to_noise_lambda(t, s)
    value = losses.hybrid_loss(x0_hat, x0, x0_hat - Delta, lam)
    letter = (x0_hat - x0).pow(2).sum(1) + lam * Delta.pow(2).sum(1)
    return worst((value - letter) / (1 + lam))


@check("Eq. 16, 18", "d Eq. 16 / d x0_hat = (1 + lambda) times d || x0_hat - x_tar ||^2", below=1e-11)
def implicit_target_gradient():
    x0, x0_hat, Delta, t, s = pairs()
    x0_hat.requires_grad_()
    x_self, lam = losses.pseudo_target(x0_hat, Delta), signal_to_noise_lambda(t, s)
    hybrid = torch.autograd.grad(losses.hybrid_loss(x0_hat, x0, x_self, lam).sum(), x0_hat)[0]
    x_tar = losses.implicit_target(x0, x_self, losses.mix_weight(t, s))
    short = torch.autograd.grad(losses.target_loss(x0_hat, x_tar).sum(), x0_hat)[0]
    return worst(hybrid / (1 + lam)[:, None] - short)


@check("Eq. 18", "x_tar is where the gradient of Eq. 16 vanishes", below=1e-11)
def implicit_target_is_the_minimum():
    x0, x0_hat, Delta, t, s = pairs()
    x_self, lam = x0_hat - Delta, signal_to_noise_lambda(t, s)
    x_tar = losses.implicit_target(x0, x_self, losses.mix_weight(t, s)).requires_grad_()
    gradient = torch.autograd.grad(losses.hybrid_loss(x_tar, x0, x_self, lam).sum(), x_tar)[0]
    return worst(gradient / (1 + lam)[:, None])


@check("Eq. 19", "renormalised x_tar = (x0 + lam x_self) / ||x0 + lam x_self|| * ||x0||", below=1e-12)
def renormalised_target():
    x0, x0_hat, Delta, t, s = pairs()
    x_self, lam = x0_hat - Delta, signal_to_noise_lambda(t, s)[:, None]
    letter = x0 + lam * x_self
    letter = letter / torch.linalg.norm(letter, dim=1, keepdim=True) * torch.linalg.norm(x0, dim=1, keepdim=True)
    return worst(losses.renormalise(losses.implicit_target(x0, x_self, losses.mix_weight(t, s)), x0) - letter)


@check("Eq. 19", "its norm is that of x0; a zero target stays zero", below=1e-13)
def energy_is_kept():
    x0, x0_hat, *_ = pairs()
    kept = losses.renormalise(x0_hat, x0)
    zero = losses.renormalise(torch.zeros_like(x0), x0)
    return worst(torch.linalg.norm(kept, dim=1) - torch.linalg.norm(x0, dim=1), zero)


@check("Eq. 19, t -> 1", "the limit of Eq. 19 at lambda = 1e13 is the convex mix at t = 1", below=1e-10)
def noise_end():
    x0, x0_hat, Delta, _, s = pairs()
    x_self, one = x0_hat - Delta, torch.ones_like(s)
    near = losses.renormalise(x0 + 1e13 * x_self, x0)
    return worst(near - losses.renormalise(losses.implicit_target(x0, x_self, losses.mix_weight(one, s)), x0))


# =====================================================================================================================
# S.2: the law of (t, s)
# =====================================================================================================================
@check("Eq. s.11-s.12", "the warp adds mu to the log-odds of t_raw; anchors (512, .5), (4096, 1.15)", below=1e-12)
def primary_time():
    z, u = torch.linspace(-4, 4, 101, dtype=torch.float64), torch.zeros(101, dtype=torch.float64)
    t, _ = losses.sample_times(z, u, torch.arange(0), 0.7, 1.0)
    ends = losses.warp(torch.tensor([0.0, 1.0], dtype=torch.float64), 0.7) - torch.tensor([0.0, 1.0])
    anchors = torch.tensor([losses.mu_of_length(512) - 0.5, losses.mu_of_length(4096) - 1.15])
    return worst(torch.logit(t) - z - 0.7, ends, anchors)


@check("Eq. s.13", "s = t off the jumps; on them (t - s)/t is uniform on (0, tau)", below=1e-12)
def secondary_time():
    n = 1000
    z = torch.from_numpy(np.random.default_rng(SEED + 7).standard_normal(n))
    u, jump = torch.arange(n, dtype=torch.float64) / n, torch.arange(1, n, 2)
    t, s = losses.sample_times(z, u, jump, 0.3, 0.4)
    keep = torch.arange(0, n, 2)
    gap = ((t - s) / t)[jump]  # sorted, since u is: its quantiles are those of U(0, 0.4)
    return worst((t - s)[keep], gap - 0.4 * u[jump], (s > t).double())


@check("S.2", "p = 0.5 splits every batch in half, p = 1 leaves no jump; micro-batches agree", below=1e-14)
def the_split():
    whole = losses.below_positions(list(range(64))).tolist()
    parts = [8 * i + j for i in range(8) for j in losses.below_positions(list(range(8 * i, 8 * i + 8))).tolist()]
    shares = [len(losses.below_positions(list(range(100)), p)) - 100 * (1 - p) for p in (0.0, 0.25, 0.5, 0.75, 1.0)]
    return worst(torch.tensor([*shares, float(whole != parts)], dtype=torch.float64))


@check("S.2", "draws belong to (seed, step, sample): halves = whole, and no two share numbers", below=0.15)
def random_numbers():
    whole = losses.draw(3, 5, list(range(1024)), (2,))
    part = losses.draw(3, 5, list(range(512, 1024)), (2,))
    if any(bool((a[512:] != b).any()) for a, b in zip(whole[:4], part[:4])):
        return torch.inf
    other = losses.draw(3, 6, list(range(1024)), (2,))
    columns = [whole.z, whole.u, *whole.eps.T, *whole.eps_s.T, other.z, other.eps[:, 0], other.eps_s[:, 0]]
    correlation = torch.corrcoef(torch.stack(columns).double()) - torch.eye(len(columns))
    return worst(correlation)  # one standard error is 1 / sqrt(1024) = 0.03


# =====================================================================================================================
# The whole step: losses.SelfE against the paper read aloud, one sample at a time
# =====================================================================================================================
class SmallNet(torch.nn.Module):
    """A velocity with a few parameters and no meaning; what is checked is how SelfE uses it."""

    def __init__(self, seed: int):
        super().__init__()
        g = torch.Generator().manual_seed(SEED + seed)
        self.inner = torch.nn.Parameter(torch.randn(4 + 8, 6, dtype=torch.float64, generator=g))
        self.outer = torch.nn.Parameter(torch.randn(6, 2, dtype=torch.float64, generator=g))

    def forward(self, x_t, t, s, c):
        code = torch.nn.functional.one_hot(c, 8)
        return torch.tanh(torch.cat([x_t, t[:, None], s[:, None], code], dim=1) @ self.inner) @ self.outer


def paper_step(
    net, ema, uncond, x0, c, is_null, d, tau, *, mu, target, k, delta_scale, lam_scale, lam_s, null_target, aux
):
    """Fig. 2 and Eq. 1-21, s.8-s.13 with scalars t and s: the sum over the batch of the loss per value of x0."""
    total, B = 0.0, len(x0)
    number = lambda value: torch.tensor([value], dtype=torch.float64)  # noqa: E731
    for i in range(B):
        odds = np.exp(mu + float(d.z[i]))
        t = odds / (1 + odds)
        jumps = i in d.below.tolist()
        s = t - tau * float(d.u[i]) * t if jumps else t

        def G(network, x, t, s, prompt):
            return x - t * network(x[None], number(t), number(s), torch.tensor([prompt]))[0]

        prompt, phi, fake = int(c[i]), 3, int(c[i]) + 4
        x_t = (1 - t) * x0[i] + t * d.eps[i]
        x0_hat = G(net, x_t, t, s, prompt)
        if not jumps:
            total = total + ((x0_hat - x0[i]) ** 2).sum() / t**2
            continue
        x_s = ((1 - s) * x0_hat + s * d.eps_s[i]).detach()
        G_null = G(uncond, x_s, s, s, phi)
        G_c = G_null if is_null[i] else G(ema, x_s, s, s, prompt)
        Delta = G_null - G_c
        if aux:
            G_fake = G(net, x_s, s, s, fake)
            Delta = k * (G_null - G_c) + (1 - k) * (G_fake - G_c)
            total = total + ((G_fake - x0_hat.detach()) ** 2).sum() / s**2  # s.8 as a velocity loss
        x_self = (x0_hat - delta_scale * Delta).detach()
        other = lam_s(t, s)
        lam = lam_scale * (t / (1 - t) - other / (1 - other))
        if is_null[i] and null_target == "data" and not aux:
            lam = 0.0
        if target == "sum":
            loss = ((x0_hat - x0[i]) ** 2).sum() + lam * ((x0_hat - x_self) ** 2).sum()
        else:
            goal = x0[i] + lam * x_self
            goal = goal / (1 + lam) if target == "tar" else goal / goal.norm() * x0[i].norm()
            loss = ((x0_hat - goal) ** 2).sum()
        total = total + loss / t**2
    return total / B / 2


SETTINGS = [  # what the paper does, and each choice of the constructor once
    dict(),
    dict(aux=True),
    dict(target="tar"),
    dict(target="sum", aux=True, k=0.5),
    dict(delta_scale=0.0, lam_scale=0.5),
    dict(delta_scale=2.0, null_target="renorm"),
    dict(null_target="renorm", aux=True),
    dict(lam_s=lambda t, s: 0.5 * (t + s), mu=0.0),
    dict(own_unconditional=True, tau=0.5),
]


def step_against_paper(choice: dict) -> tuple[float, float]:
    """Largest relative error of the loss and of its gradient with respect to the network, for one row of SETTINGS."""
    choice = dict(choice)
    aux, tau, own = choice.pop("aux", False), choice.pop("tau", 1.0), choice.pop("own_unconditional", False)
    net, ema, third = SmallNet(1), SmallNet(2), SmallNet(3)
    options = (
        dict(mu=0.5, target="renorm", k=0.9, delta_scale=1.0, lam_scale=1.0, lam_s=None, null_target="data") | choice
    )
    n = 12
    rng = np.random.default_rng(SEED + 9)
    normal = lambda *shape: torch.from_numpy(rng.standard_normal(shape))  # noqa: E731
    is_null = torch.arange(n) % 5 == 3  # one of them jumps, one does not
    c = torch.where(is_null, 3, torch.arange(n) % 3)
    draws = losses.Draws(normal(n), torch.from_numpy(rng.random(n)), normal(n, 2), normal(n, 2), torch.arange(1, n, 2))
    x0 = normal(n, 2) + 0.5
    step = losses.SelfE(net, ema, unconditional=third if own else None, **options)
    phi = torch.full_like(c, 3)
    value, _ = step(x0, (c,), (phi,), (c + 4,), is_null, draws, tau, aux)
    options["lam_s"] = options["lam_s"] or (lambda t, s: s)
    letter = paper_step(net, ema, third if own else net, x0, c, is_null, draws, tau, aux=aux, **options)
    parameters = list(net.parameters())
    others = [*ema.parameters(), *third.parameters()]
    if any(g is not None for g in torch.autograd.grad(value, others, allow_unused=True, retain_graph=True)):
        return torch.inf, torch.inf  # the evaluating networks must not be trained
    ours, theirs = (torch.autograd.grad(v, parameters) for v in (value, letter))
    scale = max(float(g.abs().max()) for g in theirs)
    return worst(value - letter) / float(letter.detach()), worst(*(a - b for a, b in zip(ours, theirs))) / scale


@check("Fig. 2, Eq. 5-21", "SelfE's loss = the paper per sample, 9 settings (relative)", below=1e-10)
def whole_step_value():
    return max(step_against_paper(choice)[0] for choice in SETTINGS)


@check("Fig. 2, Eq. 14", "... and its gradient: only x0_hat and the fake branch learn", below=1e-10)
def whole_step_gradient():
    return max(step_against_paper(choice)[1] for choice in SETTINGS)


@check("Sec. 3.1", "no jump at all: SelfE is flow matching, Eq. 3 by autograd (loss, gradient)", below=1e-12)
def flow_matching_is_the_same_module():
    net, n = SmallNet(1), 16
    x0, eps, z = points(n)[0], points(n, 1)[0], torch.linspace(-2, 2, n, dtype=torch.float64)
    c = torch.arange(n) % 3
    draws = losses.Draws(z, z.abs() / 3, eps, eps, losses.below_positions(list(range(n)), 1.0))
    value, _ = losses.SelfE(net, SmallNet(2))(x0, (c,), (c,), None, torch.zeros(n, dtype=torch.bool), draws, 1.0)
    t = torch.sigmoid(z)
    letter = ((net((1 - t)[:, None] * x0 + t[:, None] * eps, t, t, c) - (eps - x0)) ** 2).mean()
    pair = zip(torch.autograd.grad(value, net.parameters()), torch.autograd.grad(letter, net.parameters()))
    return worst(value - letter, *(a - b for a, b in pair))


# =====================================================================================================================
# Sec. 3.4 and S.2: inference
# =====================================================================================================================
ETAS = (0.0, 0.5, 1.0, "renoise")


@check("Eq. s.12", "the grid runs from 1 to 0, falls, and is warped as in training", below=1e-12)
def time_grid():
    error = 0.0
    for n, mu in ((1, 0.0), (2, 0.0), (8, 0.9), (50, 1.15)):
        times = np.array(sampler.time_grid(n, mu))
        if len(times) != n + 1 or times[0] != 1 or times[-1] != 0 or (np.diff(times) >= 0).any():
            return torch.inf
        inside, plain = times[1:-1], np.linspace(1, 0, n + 1)[1:-1]
        logit = lambda a: np.log(a / (1 - a))  # noqa: E731
        error = max(error, float(np.abs(logit(inside) - logit(plain) - mu).max(initial=0)))
    return error


@check("Eq. 22", "eta = 0: x_t - (t - s) V, whatever V", below=1e-13)
def deterministic_step():
    x_t, V = points()[0], points(seed=1)[0]
    pairs = [(1.0, 0.6), (0.7, 0.3), (0.4, 0.0)]
    return worst(*(sampler.update(x_t, x_t - t * V, t, s, 0.0, None) - (x_t - (t - s) * V) for t, s in pairs))


@check("S.2, eta = 1", "mean and variance of q(x_s | x_t, x0) by Gaussian conditioning", below=1e-12)
def exact_posterior_step():
    error = 0.0
    for t, s in ((1.0, 0.5), (0.8, 0.3), (0.5, 0.45)):
        # Given x0: x_s = (1-s) x0 + s eps, x_t = r x_s + fresh noise, r = (1-t)/(1-s), so that Var x_t = t^2.
        r = (1 - t) / (1 - s)
        gain = r * s**2 / t**2  # Cov(x_s, x_t) / Var(x_t)
        x_t, x0, noise = points()[0], points(seed=1)[0], points(seed=2)[0]
        mean = (1 - s) * x0 + gain * (x_t - (1 - t) * x0)
        std = (s**2 - gain**2 * t**2) ** 0.5
        error = max(error, worst(sampler.update(x_t, x0, t, s, 1.0, noise) - mean - std * noise))
    return error


def coefficients(t: float, s: float, eta) -> tuple[float, float, float]:
    """x_s = a x0 + b eps + c noise when x_t = (1-t) x0 + t eps and x0_hat = x0: read off by feeding unit vectors."""
    unit, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    a = sampler.update((1 - t) * unit, unit, t, s, eta, zero)
    b = sampler.update(t * unit, zero, t, s, eta, zero)
    return float(a), float(b), float(sampler.update(zero, zero, t, s, eta, unit))


@check("Eq. 8, S.2", "x0_hat ~ q(x0|x_t): every eta gives x_s = alpha_s x0 + sigma_s N(0,1)", below=1e-13)
def every_rule_keeps_the_marginals():
    error = 0.0
    for eta in ETAS:
        for t, s in ((1.0, 0.5), (0.8, 0.3), (0.5, 0.45), (0.3, 0.0)):
            a, b, c = coefficients(t, s, eta)
            error = max(error, abs(a - (1 - s)), abs(b**2 + c**2 - s**2))
    return error


@check("Eq. 8, S.2", "eta's own share: 0 at eta = 0, all of sigma_s for re-noising", below=1e-13)
def share_of_fresh_noise():
    t, s = 0.8, 0.3
    shares = [coefficients(t, s, eta)[2] for eta in ETAS]
    return max(abs(shares[0]), abs(shares[1] - shares[2] / 2), abs(shares[3] - s))


@check("Eq. 22, S.2", "posterior samples, N = 1, 2, 4, 8, 50, 4 rules: law of the end (sigmas)", below=4.5)
def any_step_is_exact():
    rng, n = np.random.default_rng(SEED + 11), 1500
    u = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.5, -1.0], [-0.7, 2.0]], dtype=torch.float64)
    normal = lambda *_: torch.from_numpy(rng.standard_normal((n, 2)))  # noqa: E731
    perfect = lambda x, t, s, c: (x - q.posterior_sample(x, t, c, rng)) / t[:, None]  # noqa: E731
    worst_z = 0.0
    for steps in (1, 2, 4, 8, 50):
        for i, eta in enumerate(ETAS):
            label = (i + steps) % q.C
            c = torch.full((n,), label)
            x = sampler.sample(perfect, normal(), (c,), steps=steps, eta=eta, draw_noise=normal)
            # E exp(i u.x) of a Gaussian mixture is a closed form; the sample mean has a known error bar.
            phase = (q.means[label] @ u.T) * 1j - 0.5 * q.std[label][:, None] ** 2 * u.square().sum(1)
            exact = (q.weights[label][:, None] * phase.exp()).sum(0)
            z = torch.exp(1j * (x @ u.T))
            for part in (z.real - exact.real, z.imag - exact.imag):
                worst_z = max(worst_z, worst(part.mean(0) / (part.std(0) / n**0.5)))
    return worst_z


def gaussian(m: float = 0.7, std: float = 0.5) -> Mixture:
    """One condition, one mode: everything about the samplers can be solved."""
    return Mixture([[[m, -m]]], std, dtype=torch.float64)


def end_of(law: Mixture, x: Tensor, steps: int, eta, noise=None) -> Tensor:
    """The sampler's end from x with the perfect network of `law`; noise(k) is the fresh noise of step k."""
    c = torch.zeros(len(x), dtype=torch.int64)
    return sampler.sample(law.V, x, (c,), steps=steps, eta=eta, draw_noise=noise)


@check("Eq. 22", "posterior mean, eta = 0: the error falls with order 1 in 1/N (|order - 1|)", below=0.03)
def order_of_convergence():
    law = gaussian()
    x = points(32)[0]
    exact = law.m[0] + law.std[0, 0] * x  # the flow of a Gaussian is affine: x_t = alpha m + sqrt(alpha^2 v + t^2) x_1
    errors = [worst(end_of(law, x, steps, 0.0) - exact) for steps in (256, 512)]
    return abs(np.log2(errors[0] / errors[1]) - 1)


def std_of_the_sampler(steps: int, eta) -> float:
    """Standard deviation of the end for Gaussian data and the posterior mean, read off the sampler: it is affine.

    Row 0 starts at zero without noise, row 1 at one, and row k + 2 at zero with fresh noise one at step k alone.
    """
    rows = torch.eye(steps + 2, dtype=torch.float64)[..., None].expand(-1, -1, 2)
    end = end_of(gaussian(), rows[1], steps, eta, lambda k: rows[k + 2])
    return float((end[1:] - end[0]).square().sum(0)[0].sqrt())


def std_in_theory(steps: int, eta) -> float:
    """The same from what is lost: each step replaces x0 by its posterior mean, hence drops A^2 Var[x0 | x_t].

    With the true x0 the step would be x_s = A x0 + B x_t + noise and keep the marginals (above), where
    A = alpha_s - alpha_t r / sigma_t and B = r / sigma_t, r the share of the old noise. The posterior mean g x_t + const
    leaves the gain A g + B on what was missing already, and adds its own loss.
    """
    v = 0.25
    t_grid = np.linspace(1, 0, steps + 1)
    missing = 0.0  # Var q(x_t) - Var of the sampler at t
    for t, s in zip(t_grid[:-1], t_grid[1:]):
        fresh = 0.0 if s == 0 or eta == 0 else s
        if s > 0 and eta not in (0, "renoise"):
            r2 = ((1 - t) / (1 - s)) ** 2
            fresh = eta * (1 / (1 / s**2 + r2 / (t**2 - r2 * s**2))) ** 0.5  # precision of x_s given x0 and x_t
        r = max(s**2 - fresh**2, 0.0) ** 0.5
        A, B = (1 - s) - (1 - t) * r / t, r / t
        total = (1 - t) ** 2 * v + t**2
        g = (1 - t) * v / total
        missing = (A * g + B) ** 2 * missing + A**2 * v * t**2 / total
    return (v - missing) ** 0.5 if v > missing else 0.0


BUDGETS = (1, 2, 4, 8, 50)


@check("Eq. 22, S.2", "posterior mean: std of the end at N = 1, 2, 4, 8, 50, 4 rules = theory", below=1e-7)
def bias_of_each_rule():
    return max(abs(std_of_the_sampler(n, eta) - std_in_theory(n, eta)) for n in BUDGETS for eta in ETAS)


@check("Eq. 22, S.2", "... and too narrow for every rule and N (least share of std lost)", above=1e-4)
def posterior_means_are_too_narrow():
    return min(1 - std_of_the_sampler(n, eta) / 0.5 for n in BUDGETS for eta in ETAS)


@check("S.3.1", "s_k lies the fraction s_rule of the way back from t_(k+1) to t_k", below=1e-14)
def second_time_at_inference():
    error = 0.0
    for rule in (0.0, 0.3, 1.0):
        seen = []

        def V(x, t, s, seen=seen):
            seen.append((float(t[0]), float(s[0])))
            return torch.zeros_like(x)

        sampler.sample(V, points(4)[0], (), steps=4, s_rule=rule, eta=0.0)
        error = max(error, *(abs(s - ((1 - rule) * (t - 0.25) + rule * t)) for t, s in seen), abs(seen[0][0] - 1))
    return error


@check("Sec. 3.4", "guidance: V_null + w (V_c - V_null) at the norm of V_c (of G_c in x0 space)", below=1e-12)
def energy_preserving_guidance():
    x, t, c = points(64)
    s, null = 0.5 * t, torch.full_like(c, 7)
    net, w = SmallNet(4), 5.0
    v_c, v_null = net(x, t, s, c).detach(), net(x, t, s, null).detach()
    row = lambda a: torch.linalg.norm(a, dim=1, keepdim=True)  # noqa: E731
    guided = v_null + w * (v_c - v_null)
    by_v = x - t[:, None] * guided / row(guided) * row(v_c)
    g_c, g_null = x - t[:, None] * v_c, x - t[:, None] * v_null
    guided = g_null + w * (g_c - g_null)
    answers = [sampler.predict(net, x, t, s, (c,), (null,), w, space) for space in ("v", "x0")]
    plain = sampler.predict(net, x, t, s, (c,), None, 1.0)
    zero = sampler.energy_preserving(torch.zeros_like(x), 0.1 * x)
    return worst(answers[0] - by_v, answers[1] - guided / row(guided) * row(g_c), plain - g_c, zero)


@check("Eq. 22", "fresh noise k goes to step k, none to the last; trajectories end where samples do", below=1e-14)
def noise_of_each_step():
    asked = []

    def draw_noise(k):
        asked.append(k)
        return points(8, seed=20 + k)[0]

    law, x = gaussian(), points(8)[0]
    c = torch.zeros(8, dtype=torch.int64)
    path = list(sampler.trajectory(law.V, x, (c,), steps=4, eta=1.0, draw_noise=draw_noise))
    by_hand, times = x, (1.0, 0.75, 0.5, 0.25, 0.0)
    for k, (t, s) in enumerate(zip(times[:-1], times[1:])):
        x0_hat = law.posterior_mean(by_hand, full(t, x), c)
        by_hand = sampler.update(by_hand, x0_hat, t, s, 1.0, points(8, seed=20 + k)[0])
    last_time, last, last_x0 = path[-1]
    return worst(last - by_hand, last - last_x0) + float(asked != [0, 1, 2]) + abs(last_time)


# =====================================================================================================================
# The table
# =====================================================================================================================
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="run the lines whose equation contains this text; empty runs all")
    parser.add_argument("--seed", type=int, default=0, help="other points and other samples for every line (default: 0)")
    parser.add_argument("--out", type=Path, help="write the table as JSON, too, with commit and hardware")
    args = parser.parse_args()
    if args.seed < 0 or (args.out and not args.out.parent.is_dir()):
        print("--seed must not be negative, and the folder of --out must exist", file=sys.stderr)
        return 2
    global SEED
    SEED = 1000 * args.seed
    chosen = [line for line in CHECKS if args.only in line[0]]
    if not chosen:
        print(f"no line has {args.only!r} in its equation; run without --only to see them all", file=sys.stderr)
        return 2

    start, failed, table = time.perf_counter(), 0, []
    print(f"{'equation':22s} {'what equals what':82s} {'error':>9s}   {'bound':>8s}  verdict")
    for equation, claim, bound, is_above, function in chosen:
        number = function()
        holds = number >= bound if is_above else number <= bound
        failed += not holds
        table.append({"equation": equation, "claim": claim, "number": float(number), "bound": bound, "holds": bool(holds)})
        sign = ">" if is_above else "<"
        print(
            f"{equation:22s} {claim:82s} {number:9.1e} {sign} {bound:8.1e}  {'holds' if holds else 'FAILS'}", flush=True
        )

    if not args.only:
        print("\nStandard deviation that the posterior mean leaves, data 0.500 (N network evaluations, Gaussian data):")
        print(f"  {'rule':10s}" + "".join(f"{f'N = {n}':>9s}" for n in BUDGETS))
        for eta in ETAS:
            name = eta if isinstance(eta, str) else f"eta = {eta:g}"
            print(f"  {name:10s}" + "".join(f"{std_of_the_sampler(n, eta):9.3f}" for n in BUDGETS))
    seconds = time.perf_counter() - start
    print(f"\n{len(chosen) - failed} of {len(chosen)} lines hold, {seconds:.1f} s")
    if args.out:
        result = {**machine.provenance(torch.device("cpu")), "seed": args.seed, "seconds": round(seconds, 1), "lines": table}  # fmt: skip
        checkpoint.write_json(args.out, result)
        print(f"wrote {args.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
