"""Sec. 3.2: scores, posterior means and the reverse KL divergence."""

import torch
from torch import Tensor

import losses
from toy.checks.stage import A, B, S, T, bayes, check, full, grid, hermite, p, points, q, score, three, worst
from toy.mixture import Mixture


def noised(c: int, nodes: Tensor):
    """x_t [N, 2] and its share for each mode of condition c: given the mode it is Gaussian."""
    for m, std, share in q.modes(c):
        yield (1 - T) * m + ((1 - T) ** 2 * std**2 + T**2) ** 0.5 * nodes, share


@check("Eq. 8", "x0_hat noised to s has the density p_theta(x_s | c) (Fourier, quadrature)", below=1e-9)
def renoised_distribution():
    u = torch.tensor([[0.5, 0.2], [-1.0, 0.7], [0.3, 1.5], [2.0, -1.0]], dtype=torch.float64)
    nodes, w = hermite(20, 2)
    x, area = grid(8.0, 160)
    waves, differences = torch.exp(1j * (x @ u.T)), []
    for c in range(q.C):
        left = 0
        for x_t, share in noised(c, nodes):
            for eps, w_eps in zip(nodes, w):  # every x0_hat meets every eps
                if w_eps > 1e-14:
                    x_s = losses.add_noise(A * x_t + B, full(S, x_t), eps.expand_as(x_t))
                    left = left + share * w_eps * (w.to(torch.complex128) @ torch.exp(1j * (x_s @ u.T)))
        density = p.log_density(x, S, c).exp().to(torch.complex128)
        differences.append((left - area * density @ waves).abs())
    return worst(*differences)


def three_scores(x: Tensor, s: Tensor, c: Tensor) -> list[Tensor]:
    """The scores that Eq. 13 needs: unconditional, conditional, model."""
    return [score(each, x, s, k) for each, k in three(c)]


def three_means(x: Tensor, s: Tensor, c: Tensor, mean=Mixture.posterior_mean) -> list[Tensor]:
    """What perfect networks would answer at (x_s, s, s), G_null, G_c, G_fake: the closed forms, or `bayes`."""
    return [mean(each, x, s, k) for each, k in three(c)]


@check("Eq. 11", "score from the posterior mean = autograd of the log density, 3 distributions", below=1e-9)
def tweedie():
    x, s, c = points()
    pairs = zip(three_means(x, s, c), three_scores(x, s, c))
    return worst(*(losses.score_from_mean(mean, x, s) - exact for mean, exact in pairs))


@check("Eq. s.1", "mean from the autograd score = Bayes' rule on a grid, 3 distributions", below=1e-9)
def tweedie_backwards():
    x, s, c = points(60, least=0.2)
    pairs = zip(three_scores(x, s, c), three_means(x, s, c, bayes))
    return worst(*(losses.mean_from_score(exact, x, s) - mean for exact, mean in pairs))


@check("Eq. s.2-s.3", "gap of two posterior means (grid) = gap of two scores (autograd)", below=1e-9)
def gaps():
    x, s, c = points(60, least=0.2)
    null, data, fake = zip(three_scores(x, s, c), three_means(x, s, c, bayes))
    return worst(*(a[1] - data[1] - losses.mean_gap(a[0], data[0], s) for a in (null, fake)))


@check("Eq. 9-10", "E[delta dx_s/dtheta] = d KL(p||q) / dtheta (density on a grid)", below=1e-5)
def reverse_kl():
    z, w = hermite(14, 4)
    x, area = grid(7.0, 140)
    a, b = torch.tensor(A, dtype=torch.float64, requires_grad=True), B.clone().requires_grad_()
    differences = []
    for c in range(q.C):
        # Samples: theta = (a, b) moves x_s = (1-s)(a x_t + b) + s eps; delta is the gradient of the KL at x_s.
        left = 0.0
        for x_t, share in noised(c, z[:, :2]):
            x_s = losses.add_noise(a * x_t + b, full(S, x_t), z[:, 2:])
            delta = losses.reverse_kl_direction(score(p, x_s, S, c), score(q, x_s, S, c))
            left = left + share * (w * (delta * x_s).sum(1)).sum()
        # Eq. 9 itself, with theta inside the density.
        log_p, log_q = (each.log_density(x, S, c) for each in (q.pushforward(a, b, T), q))
        right = area * (log_p.exp() * (log_p - log_q)).sum()
        pairs = zip(*(torch.autograd.grad(side, (a, b)) for side in (left, right)))
        differences += [one - two for one, two in pairs]
    return worst(*differences)


@check("Eq. 12", "guided score = autograd of log [ q(x|c)^w q(x)^(1-w) ], w = 0, 1, 5", below=1e-11)
def guidance_sharpens():
    x, s, c = points()
    null, data, _ = three_scores(x, s, c)
    y, differences = x.clone().requires_grad_(), []
    for w in (0.0, 1.0, 5.0):
        sharp = w * q.log_density(y, s, c) + (1 - w) * q.log_density(y, s, q.null(c))
        differences.append(losses.guided_score(data, null, w) - torch.autograd.grad(sharp.sum(), y)[0])
    return worst(*differences)


@check("Eq. 13", "its two terms add up to Eq. 10 against the guided score", below=1e-11)
def two_terms():
    x, s, c = points()
    w, y = 5.0, x.clone().requires_grad_()
    log_null, log_data, log_model = (each.log_density(y, s, k) for each, k in three(c))
    log_ratio = log_model - w * log_data + (w - 1) * log_null
    both = torch.autograd.grad(log_ratio.sum(), y, retain_graph=True)[0]
    # Alone, the classifier term is -(w - 1) times the gradient of the implicit classifier log q(c | x_s).
    certainty = torch.autograd.grad((log_data - log_null).sum(), y)[0]
    classifier, auxiliary = losses.self_evaluation_scores(*three_scores(x, s, c), w)
    return worst(classifier + auxiliary - both, classifier + (w - 1) * certainty)


@check("Eq. s.6, 13", "Delta with k = (w-1)/w is Eq. 13 times sigma^2 / (alpha w), w = 1, 2, 10", below=1e-11)
def k_is_a_guidance_scale():
    x, s, c = points()
    means, scores, differences = three_means(x, s, c), three_scores(x, s, c), []
    for w in (1.0, 2.0, 10.0):  # k = 0, 0.5, 0.9
        ideal = sum(losses.self_evaluation_scores(*scores, w))
        Delta = losses.self_evaluation(*means, k=(w - 1) / w)
        differences.append(Delta - (s**2 / (1 - s) / w)[:, None] * ideal)
    return worst(*differences)


# ------------------------------------------------------------------------------------------------------------
# Delta's budget: by I-MMSE (Guo, Shamai and Verdu 2005) the captions' information bounds Delta
# ------------------------------------------------------------------------------------------------------------
def information(n: int = 240) -> float:
    """I(c; x0) of the mixture in nats: sum over c of the integral of q(x0, c) log [ q(x0 | c) / q(x0) ], on a grid."""
    x, cell = grid(5.0, n)
    *log_q, log_null = [q.log_density(x, 0.0, c) for c in range(q.C + 1)]
    return sum(float((each.exp() * (each - log_null)).sum()) * cell for each in log_q) / q.C


@check("S.1, I-MMSE", "integral of E||G_null - G_c||^2 over snr = twice the labels' information", below=1e-4)
def delta_has_a_budget():
    log_snr, height = torch.linspace(-12, 9, 43, dtype=torch.float64), []
    for snr in log_snr.exp().tolist():
        sigma = snr**-0.5  # x_s / alpha_s = x0 + sigma eps
        s = sigma / (1 + sigma)
        x, cell = grid(4.2 + 5.5 * sigma, 56)
        x_s, cell, total = (1 - s) * x, (1 - s) ** 2 * cell, 0.0
        for c in range(q.C):
            Delta = losses.self_evaluation(*(q.posterior_mean(x_s, s, prompt) for prompt in (q.C, c)))
            shares = q.log_density(x_s, s, c).exp() * cell / q.C
            total += float((shares * losses.squared_norm(Delta)).sum())
        height.append(total * snr)  # d snr = snr d log snr
    # Beyond the last point Delta dies out as sigma^2 (Eq. s.2), and the integrand as 1 / snr: its height is the rest.
    body = torch.trapezoid(torch.tensor(height), log_snr) + height[-1]
    return worst(body - 2 * information())
