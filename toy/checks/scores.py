"""Sec. 3.2: scores, posterior means and the reverse KL divergence."""

import torch
from torch import Tensor

import losses
from toy.checks.stage import (
    B_SHIFT,
    A,
    S,
    T,
    check,
    full,
    grid,
    hermite,
    mean_by_quadrature,
    p,
    points,
    q,
    score,
    three_distributions,
    worst,
)


@check("Eq. 8", "x0_hat noised to s has the density p_theta(x_s | c) (Fourier, quadrature)", below=1e-9)
def renoised_distribution():
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


@check("Eq. 11", "score from the posterior mean = autograd of the log density, 3 distributions", below=1e-9)
def tweedie():
    x, s, c = points()
    return worst(
        *(
            losses.score_from_mean(each.posterior_mean(x, s, k), x, s) - score(each, x, s, k)
            for each, k in three_distributions(c)
        )
    )


@check("Eq. s.1", "mean from the autograd score = Bayes' rule on a grid, 3 distributions", below=1e-9)
def tweedie_backwards():
    x, s, c = points(60)
    s = s.clamp_min(0.2)
    return worst(
        *(
            losses.mean_from_score(score(each, x, s, k), x, s) - mean_by_quadrature(each, x, s, k)
            for each, k in three_distributions(c)
        )
    )


@check("Eq. s.2-s.3", "gap of two posterior means (grid) = gap of two scores (autograd)", below=1e-9)
def gaps():
    x, s, c = points(60)
    s = s.clamp_min(0.2)
    pairs = ((score(each, x, s, k), mean_by_quadrature(each, x, s, k)) for each, k in three_distributions(c))
    data, null, fake = pairs
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
            delta = losses.reverse_kl_direction(
                score(p, x_s, full(S, x_s), k), score(q, x_s, full(S, x_s), k)
            )
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
    return worst(
        classifier + auxiliary - torch.autograd.grad(log_ratio.sum(), y)[0], classifier + (w - 1) * bayes
    )


@check("Eq. s.6, 13", "Delta with k = (w-1)/w is Eq. 13 times sigma^2 / (alpha w), w = 1, 2, 10", below=1e-11)
def k_is_a_guidance_scale():
    x, s, c = points()
    error = 0.0
    for w in (1.0, 2.0, 10.0):  # k = 0, 0.5, 0.9
        Delta = losses.self_evaluation(*three_means(x, s, c), k=(w - 1) / w)
        ideal = sum(losses.self_evaluation_scores(*three_scores(x, s, c), w))
        error = max(error, worst(Delta - (s**2 / (1 - s) / w)[:, None] * ideal))
    return error


# ------------------------------------------------------------------------------------------------------------
# Delta's budget: by I-MMSE (Guo, Shamai and Verdu 2005) the captions' information bounds Delta
# ------------------------------------------------------------------------------------------------------------
def information(n: int = 240) -> float:
    """I(c; x0) of the mixture in nats: sum over c of the integral of q(x0, c) log [ q(x0 | c) / q(x0) ], on a grid."""
    x, cell = grid(5.0, n)
    zero = torch.zeros(len(x), dtype=torch.float64)
    log_q = [q.log_density(x, zero, torch.full((len(x),), c)) for c in range(q.C + 1)]
    return sum(float((own.exp() * (own - log_q[-1])).sum()) * cell for own in log_q[:-1]) / q.C


@check("S.1, I-MMSE", "integral of E||G_null - G_c||^2 over snr = twice the labels' information", below=1e-4)
def delta_has_a_budget():
    log_snr, height = torch.linspace(-12, 9, 43, dtype=torch.float64), []
    for snr in log_snr.exp().tolist():
        sigma = snr**-0.5  # x_s / alpha_s = x0 + sigma eps
        s = sigma / (1 + sigma)
        x, cell = grid(4.2 + 5.5 * sigma, 56)
        x_s, cell, times = (1 - s) * x, (1 - s) ** 2 * cell, full(s, x)
        total = 0.0
        for label in range(q.C):
            c = torch.full((len(x),), label)
            gap = losses.self_evaluation(
                q.posterior_mean(x_s, times, q.null(c)), q.posterior_mean(x_s, times, c)
            )
            total += float((q.log_density(x_s, times, c).exp() * losses.squared_norm(gap)).sum()) * cell / q.C
        height.append(total * snr)  # d snr = snr d log snr
    # Beyond the last point the gap dies out as sigma^2 (Eq. s.2), and the integrand as 1 / snr: its height is the rest.
    body = torch.trapezoid(torch.tensor(height), log_snr) + height[-1]
    return worst(body - 2 * information())
