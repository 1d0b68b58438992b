"""Sec. 3.4 and S.2: inference."""

import itertools

import numpy as np
import torch
from torch import Tensor

import sampler
from toy.checks.stage import check, points, q, random, worst
from toy.checks.step import SmallNet
from toy.mixture import Mixture

ETAS = (0.0, 0.5, 1.0, "renoise")
BUDGETS = (1, 2, 4, 8, 50)
PAIRS = ((1.0, 0.5), (0.8, 0.3), (0.5, 0.45), (0.3, 0.0))  # t and the next time


@check("Eq. s.12", "the grid runs from 1 to 0, falls, and is warped as in training", below=1e-12)
def time_grid():
    differences = [torch.zeros(1)]
    for n, mu in ((1, 0.0), (2, 0.0), (8, 0.9), (50, 1.15)):
        times, plain = np.array(sampler.time_grid(n, mu)), np.linspace(1, 0, n + 1)
        if len(times) != n + 1 or times[0] != 1 or times[-1] != 0 or (np.diff(times) >= 0).any():
            return torch.inf
        log_odds, before = (torch.logit(torch.from_numpy(grid[1:-1])) for grid in (times, plain))
        differences.append(log_odds - before - mu)
    return worst(torch.cat(differences))


@check("Eq. 22", "eta = 0: x_t - (t - s) V, whatever V", below=1e-13)
def deterministic_step():
    x_t, V = points()[0], points(seed=1)[0]
    return worst(*(sampler.update(x_t, x_t - t * V, t, s, 0.0, None) - (x_t - (t - s) * V) for t, s in PAIRS))


@check("S.2, eta = 1", "mean and variance of q(x_s | x_t, x0) by Gaussian conditioning", below=1e-12)
def exact_posterior_step():
    x_t, x0, noise = (points(seed=i)[0] for i in range(3))
    differences = []
    for t, s in PAIRS[:3]:
        # Given x0: x_s = (1-s) x0 + s eps, x_t = r x_s + fresh noise, r = (1-t)/(1-s), so that Var x_t = t^2.
        gain = (1 - t) / (1 - s) * s**2 / t**2  # Cov(x_s, x_t) / Var(x_t)
        mean = (1 - s) * x0 + gain * (x_t - (1 - t) * x0)
        std = (s**2 - gain**2 * t**2) ** 0.5
        differences.append(sampler.update(x_t, x0, t, s, 1.0, noise) - mean - std * noise)
    return worst(*differences)


def coefficients(t: float, s: float, eta) -> tuple[float, float, float]:
    """x_s = a x0 + b eps + c noise when x_t = (1-t) x0 + t eps and x0_hat = x0: read off by feeding unit vectors."""
    unit, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    a = sampler.update((1 - t) * unit, unit, t, s, eta, zero)
    b = sampler.update(t * unit, zero, t, s, eta, zero)
    return float(a), float(b), float(sampler.update(zero, zero, t, s, eta, unit))


@check("Eq. 8, S.2", "x0_hat ~ q(x0|x_t): every eta gives x_s = alpha_s x0 + sigma_s N(0,1)", below=1e-13)
def every_rule_keeps_the_marginals():
    errors = []
    for (t, s), eta in itertools.product(PAIRS, ETAS):
        a, b, c = coefficients(t, s, eta)
        errors += [abs(a - (1 - s)), abs(b**2 + c**2 - s**2)]
    return max(errors)


@check("Eq. 8, S.2", "eta's own share: 0 at eta = 0, all of sigma_s for re-noising", below=1e-13)
def share_of_fresh_noise():
    none, half, posterior, everything = (coefficients(0.8, 0.3, eta)[2] for eta in ETAS)
    return max(abs(none), abs(half - posterior / 2), abs(everything - 0.3))


@check("Eq. 22, S.2", "posterior samples, N = 1 to 50, 4 rules: the end's distribution (sigmas)", below=4.5)
def any_step_is_exact():
    rng, n = random(11), 1500
    u = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.5, -1.0], [-0.7, 2.0]], dtype=torch.float64)
    normal = lambda *_: torch.from_numpy(rng.standard_normal((n, 2)))  # noqa: E731
    perfect = lambda x, t, s, c: (x - q.posterior_sample(x, t, c, rng)) / t[:, None]  # noqa: E731
    sigmas = []
    for steps, (i, eta) in itertools.product(BUDGETS, enumerate(ETAS)):
        c = (i + steps) % q.C
        x = sampler.sample(perfect, normal(), (c,), steps=steps, eta=eta, draw_noise=normal)
        # E exp(i u.x) of a Gaussian mixture is a closed form; the sample mean has a known error bar.
        phase = (q.means[c] @ u.T) * 1j - 0.5 * q.std[c][:, None] ** 2 * u.square().sum(1)
        excess = torch.exp(1j * (x @ u.T)) - (q.weights[c][:, None] * phase.exp()).sum(0)
        sigmas += [part.mean(0) / (part.std(0) / n**0.5) for part in (excess.real, excess.imag)]
    return worst(*sigmas)


# With one mode all about the samplers can be solved
GAUSSIAN = Mixture([[[0.7, -0.7]]], 0.5, dtype=torch.float64)


def end_of(x: Tensor, steps: int, eta, noise=None) -> Tensor:
    """The sampler's end from x with the perfect network of GAUSSIAN; noise(k) is the fresh noise of step k."""
    return sampler.sample(GAUSSIAN.V, x, (0,), steps=steps, eta=eta, draw_noise=noise)


@check("Eq. 22", "posterior mean, eta = 0: the error falls with order 1 in 1/N (|order - 1|)", below=0.03)
def order_of_convergence():
    x = points(32)[0]
    # The flow of a Gaussian is affine: x_t = alpha m + sqrt(alpha^2 v + t^2) x_1
    exact = GAUSSIAN.m[0] + GAUSSIAN.std[0, 0] * x
    errors = [worst(end_of(x, steps, 0.0) - exact) for steps in (256, 512)]
    return abs(np.log2(errors[0] / errors[1]) - 1)


def std_of_the_sampler(steps: int, eta) -> float:
    """Standard deviation of the end for Gaussian data and the posterior mean, read off the sampler: it is affine.

    Row 0 starts at zero without noise, row 1 at one, and row k + 2 at zero with fresh noise one at step k alone.
    """
    rows = torch.eye(steps + 2, dtype=torch.float64)[..., None].expand(-1, -1, 2)
    end = end_of(rows[1], steps, eta, lambda k: rows[k + 2])
    return float((end[1:] - end[0]).square().sum(0)[0].sqrt())


def std_in_theory(steps: int, eta) -> float:
    """The same from what is lost: each step replaces x0 by its posterior mean, hence drops A^2 Var[x0 | x_t].

    With the true x0 the step would be x_s = A x0 + B x_t + noise and keep the marginals (above), where
    A = alpha_s - alpha_t r / sigma_t and B = r / sigma_t, r the share of the old noise. The posterior mean g x_t +
    const leaves the gain A g + B on what was missing already, and adds its own loss.
    """
    v, missing = 0.25, 0.0  # Var q(x_t) - Var of the sampler at t
    times = np.linspace(1, 0, steps + 1)
    for t, s in zip(times[:-1], times[1:]):
        fresh = 0.0 if s == 0 or eta == 0 else s
        if s > 0 and eta not in (0, "renoise"):
            r2 = ((1 - t) / (1 - s)) ** 2
            fresh = eta * (1 / s**2 + r2 / (t**2 - r2 * s**2)) ** -0.5  # precision of x_s given x0 and x_t
        r = max(s**2 - fresh**2, 0.0) ** 0.5
        A, B = (1 - s) - (1 - t) * r / t, r / t
        total = (1 - t) ** 2 * v + t**2
        g = (1 - t) * v / total
        missing = (A * g + B) ** 2 * missing + A**2 * v * t**2 / total
    return max(v - missing, 0.0) ** 0.5


@check("Eq. 22, S.2", "posterior mean: std of the end at N = 1 to 50, 4 rules = theory", below=1e-7)
def bias_of_each_rule():
    return max(abs(std_of_the_sampler(n, eta) - std_in_theory(n, eta)) for n in BUDGETS for eta in ETAS)


@check("Eq. 22, S.2", "... and too narrow for every rule and N (least share of std lost)", above=1e-4)
def posterior_means_are_too_narrow():
    return min(1 - std_of_the_sampler(n, eta) / 0.5 for n in BUDGETS for eta in ETAS)


@check("S.3.1", "s_k lies the fraction s_rule of the way back from t_(k+1) to t_k", below=1e-14)
def second_time_at_inference():
    seen = []

    def V(x, t, s):
        seen.append((float(t[0]), float(s[0])))
        return torch.zeros_like(x)

    meant = []
    for rule in (0.0, 0.3, 1.0):
        sampler.sample(V, points(4)[0], (), steps=4, s_rule=rule, eta=0.0)
        meant += [(t, (1 - rule) * (t - 0.25) + rule * t) for t in (1.0, 0.75, 0.5, 0.25)]
    return worst(torch.tensor(seen, dtype=torch.float64) - torch.tensor(meant, dtype=torch.float64))


@check("Sec. 3.4", "guidance: V_null + w (V_c - V_null) at the norm of V_c (of G_c in x0 space)", below=1e-12)
def energy_preserving_guidance():
    x, t, c = points(64)
    s, null, net, w = 0.5 * t, torch.full_like(c, 7), SmallNet(4), 5.0
    v_c, v_null = net(x, t, s, c).detach(), net(x, t, s, null).detach()
    g_c, g_null = x - t[:, None] * v_c, x - t[:, None] * v_null

    def guided(a, a_null):
        sum_of_both = a_null + w * (a - a_null)
        return sum_of_both / sum_of_both.norm(dim=1, keepdim=True) * a.norm(dim=1, keepdim=True)

    by_v, by_x0 = (sampler.predict(net, x, t, s, (c,), (null,), w, space) for space in ("v", "x0"))
    plain = sampler.predict(net, x, t, s, (c,), None, 1.0)
    zero = sampler.energy_preserving(torch.zeros_like(x), 0.1 * x)
    return worst(by_v - x + t[:, None] * guided(v_c, v_null), by_x0 - guided(g_c, g_null), plain - g_c, zero)


@check("Eq. 22", "fresh noise k goes to step k, none to the last; paths end where samples do", below=1e-14)
def noise_of_each_step():
    asked = []

    def draw_noise(k):
        asked.append(k)
        return points(8, seed=20 + k)[0]

    x = by_hand = points(8)[0]
    path = list(sampler.trajectory(GAUSSIAN.V, x, (0,), steps=4, eta=1.0, draw_noise=draw_noise))
    for k, t in enumerate((1.0, 0.75, 0.5, 0.25)):
        x0_hat = GAUSSIAN.posterior_mean(by_hand, t, 0)
        by_hand = sampler.update(by_hand, x0_hat, t, t - 0.25, 1.0, points(8, seed=20 + k)[0])
    last_time, last, last_x0 = path[-1]
    return worst(last - by_hand, last - last_x0) + float(asked != [0, 1, 2]) + abs(last_time)
