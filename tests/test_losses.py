"""losses.py against the formulas as printed in the paper, autograd, differences, closed-form Gaussians, quadrature."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import losses
import model
from peers import variants

SHAPES = [(2,), (1,), (3, 4, 5), (2, 3, 1, 2)]
F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1, ..., 1]."""
    return values.reshape([-1] + [1] * (x.dim() - 1))


def close(actual: Tensor, expected: Tensor, tol: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


# ============================================================================================================
# Sec. 2, 3.1: flow matching
# ============================================================================================================
TIMES = torch.tensor([1.0, 0.93, 0.5, 0.07], dtype=F64)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_velocity_is_the_time_derivative_of_the_path(shape):
    """Eq. 1-2, by differences (the path is a line), which runs from x0 at t = 0 to eps at t = 1."""
    x0, eps, h = normal(4, *shape), normal(4, *shape, seed=1), 0.01
    difference = losses.add_noise(x0, TIMES + h, eps) - losses.add_noise(x0, TIMES - h, eps)
    close(losses.velocity(x0, eps), difference / (2 * h))
    close(losses.add_noise(x0, torch.zeros(4, dtype=F64), eps), x0)
    close(losses.add_noise(x0, torch.ones(4, dtype=F64), eps), eps)


@pytest.mark.parametrize("shape", SHAPES)
def test_data_loss_over_t_squared_is_the_flow_matching_loss(shape):
    """Eq. 7 with w = 1/t^2 equals Eq. 3, for any output of the network."""
    x0, eps, V = (normal(4, *shape, seed=i) for i in range(3))
    x_t = losses.add_noise(x0, TIMES, eps)
    x0_hat = losses.G(lambda *_: V, x_t, TIMES, TIMES, ())
    literal = torch.tensor([float((V[i] - (eps[i] - x0[i])).pow(2).sum()) for i in range(4)], dtype=F64)
    close(losses.cfm_loss(V, x0, eps), literal)
    close(losses.time_weight(TIMES) * losses.data_loss(x0_hat, x0), literal, 1e-10)
    close(losses.one_step_estimate(x_t, TIMES, V), x0_hat)


@pytest.mark.parametrize("t", [0.2, 0.04, 1e-2, 1e-3, 1e-5])
def test_the_weight_is_not_clamped(t):
    """1 / t^2 down to times that s.11 draws once in 10^30, where it still makes Eq. 7 the flow matching loss."""
    t, (x0, eps, V) = torch.full((4,), t, dtype=F64), (normal(4, 3, seed=i) for i in range(3))
    close(losses.time_weight(t), t.reciprocal() * t.reciprocal())
    x0_hat = losses.one_step_estimate(losses.add_noise(x0, t, eps), t, V)
    close(losses.time_weight(t) * losses.data_loss(x0_hat, x0), (V - eps + x0).pow(2).sum(1), 1e-9)


def test_the_minimiser_of_eq_3_gives_the_posterior_mean():
    """Eq. 4 for Gaussian data: the best linear V at x_t, fitted by least squares, yields E[x0 | x_t]."""
    mean, variance, t = 0.7, 2.3, 0.6
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    a, b = (torch.tensor(g.flatten()) for g in np.meshgrid(nodes, nodes, indexing="ij"))
    w = torch.tensor(np.outer(weights, weights).flatten() / weights.sum() ** 2)
    x0, eps = mean + math.sqrt(variance) * a, b
    x_t = (1 - t) * x0 + t * eps
    parameters = torch.zeros(2, dtype=F64)

    def loss(p):
        return (w * losses.cfm_loss((p[0] * x_t + p[1])[:, None], x0[:, None], eps[:, None])).sum()

    gradient = torch.autograd.functional.jacobian(loss, parameters)
    hessian = torch.autograd.functional.hessian(loss, parameters)
    slope, offset = -torch.linalg.solve(hessian, gradient)  # the loss is quadratic: one Newton step
    x = torch.tensor([[-1.0], [0.3], [2.0]], dtype=F64)
    estimate = losses.one_step_estimate(x, torch.full((3,), t, dtype=F64), slope * x + offset)
    gain = (1 - t) * variance / ((1 - t) ** 2 * variance + t**2)
    close(estimate, mean + gain * (x - (1 - t) * mean), 1e-9)


# ============================================================================================================
# Sec. 3.2 and S.1: scores and posterior means of Gaussians
# ============================================================================================================
class Gaussian(NamedTuple):
    """Data N(mean, variance I); its noisy score by autograd, its posterior mean by conditioning."""

    mean: float
    variance: float

    def log_density(self, x: Tensor, s: Tensor) -> Tensor:
        a, v = per_sample(1 - s, x), per_sample((1 - s) ** 2 * self.variance + s**2, x)
        return (-0.5 * (x - a * self.mean) ** 2 / v - 0.5 * torch.log(2 * math.pi * v)).flatten(1).sum(1)

    def score(self, x: Tensor, s: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(self.log_density(x, s).sum(), x)[0]

    def posterior_mean(self, x: Tensor, s: Tensor) -> Tensor:
        a, v = per_sample(1 - s, x), per_sample((1 - s) ** 2 * self.variance + s**2, x)
        return self.mean + a * self.variance / v * (x - a * self.mean)


Q_C, Q_NULL, P_C = Gaussian(0.8, 0.5), Gaussian(-0.3, 2.0), Gaussian(0.2, 0.9)
S = torch.tensor([0.9, 0.6, 0.3, 0.05], dtype=F64)


@pytest.mark.parametrize("shape", SHAPES)
def test_tweedie(shape):
    """Eq. 11, s.1, s.2, s.3."""
    x = normal(4, *shape)
    close(losses.score_from_mean(Q_C.posterior_mean(x, S), x, S), Q_C.score(x, S), 1e-9)
    close(losses.mean_from_score(Q_C.score(x, S), x, S), Q_C.posterior_mean(x, S), 1e-9)
    for a, b in [(Q_NULL, Q_C), (P_C, Q_C)]:
        gap = losses.mean_gap(a.score(x, S), b.score(x, S), S)
        close(gap, a.posterior_mean(x, S) - b.posterior_mean(x, S), 1e-9)


@pytest.mark.parametrize("w", [1.0, 2.5, 5.0])
def test_guided_score_is_that_of_the_sharpened_density(w):
    """Eq. 12-13: q_w ~ q(x|c) (q(x|c) / q(x))^(w-1), and Eq. 13 is grad log p - grad log q_w in two terms."""
    x = normal(4, 3).requires_grad_()
    log_c, log_null = Q_C.log_density(x, S), Q_NULL.log_density(x, S)
    sharpened = torch.autograd.grad((log_c + (w - 1) * (log_c - log_null)).sum(), x)[0]
    x = x.detach()
    c, null, p = (g.score(x, S) for g in (Q_C, Q_NULL, P_C))
    close(losses.guided_score(c, null, w), sharpened)
    classifier, auxiliary = losses.self_evaluation_scores(null, c, p, w)
    close(classifier, c - sharpened)
    close(classifier + auxiliary, p - sharpened)


def test_reverse_kl_direction_is_the_gradient_of_the_divergence():
    """Eq. 9-10: E_p[delta dx/dtheta] over a quadrature equals the derivative of the closed-form KL(p || q)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(12)
    e, weights = torch.tensor(nodes)[:, None], torch.tensor(weights / weights.sum())
    theta = torch.tensor([0.4, 0.3], dtype=F64, requires_grad=True)  # p = N(theta_0, exp(theta_1)^2)
    m, scale = theta[0], theta[1].exp()
    kl = -theta[1] + (scale**2 + (m - Q_C.mean) ** 2) / (2 * Q_C.variance)
    expected = torch.autograd.grad(kl, theta, retain_graph=True)[0]
    x = m + scale * e
    score_p, score_q = -(x - m) / scale**2, -(x - Q_C.mean) / Q_C.variance
    delta = losses.reverse_kl_direction(score_p, score_q).detach()
    close(torch.autograd.grad((weights[:, None] * delta * x).sum(), theta)[0], expected)


@pytest.mark.parametrize("w", [None, 2.0, 10.0], ids=["classifier term alone", "w = 2", "w = 10"])
def test_gradient_of_the_self_evaluation_loss_is_the_score_direction(w):
    """Eq. s.5 and s.7: with exact posterior means, grad by x_s_hat is 2 sigma^2 / alpha^2 times Eq. 13 over w."""
    x0_hat, eps = normal(4, 3), normal(4, 3, seed=1)
    x_s = losses.add_noise(x0_hat, S, eps).requires_grad_()
    alpha, sigma = per_sample(1 - S, x_s), per_sample(S, x_s)
    G_null, G_c, G_p = (g.posterior_mean(x_s.detach(), S) for g in (Q_NULL, Q_C, P_C))
    c, null, p = (g.score(x_s, S) for g in (Q_C, Q_NULL, P_C))
    if w is None:
        Delta, direction = losses.self_evaluation(G_null, G_c), null - c
    else:
        Delta = losses.self_evaluation(G_null, G_c, G_p, k=(w - 1) / w)
        direction = ((w - 1) * (null - c) + (p - c)) / w
    x0_hat = (x_s - sigma * eps) / alpha  # the sample, as a function of its noisy version
    loss = losses.self_evaluation_loss(x0_hat, losses.pseudo_target(x0_hat, Delta))
    gradient = torch.autograd.grad(loss.sum(), x_s)[0]
    close(gradient, 2 / alpha * Delta, 1e-9)
    close(gradient, 2 * sigma**2 / alpha**2 * direction, 1e-9)


# ============================================================================================================
# Sec. 3.3: the target
# ============================================================================================================
T_S = torch.tensor([[0.9, 0.2], [0.5, 0.4], [0.3, 0.0], [0.7, 0.7], [0.999, 0.5], [0.05, 0.01]], dtype=F64)


def paper_lam(t, s):
    """Eq. 17 as printed: sigma_t / alpha_t - sigma_s / alpha_s."""
    return t / (1 - t) - s / (1 - s)


def test_lambda():
    t, s = T_S.unbind(1)
    close(losses.lam(t, s), paper_lam(t, s))
    assert losses.lam(t, s)[3] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lambda_at_the_end_of_time(dtype):
    """As t -> 1 the share of x_self goes to 1 for s < t and is 0 wherever s = t, s = t = 1 included; lambda is finite."""
    one = torch.ones((), dtype=dtype)
    below = torch.nextafter(one, torch.zeros((), dtype=dtype))
    t = torch.stack([one, one, one, below, one])
    s = torch.stack([one, 0 * one, below, below, 0.9 * one])
    lam = losses.lam(t, s)
    assert lam.isfinite().all()
    close(lam / (1 + lam), torch.tensor([0, 1, 1, 0, 1], dtype=dtype), 1e-6)
    t, s = (g.flatten().to(dtype) for g in torch.meshgrid(*[torch.linspace(0, 1, 65)] * 2, indexing="ij"))
    t, s = t[(s < t) & (t < 1)], s[(s < t) & (t < 1)]
    torch.testing.assert_close(
        losses.lam(t, s).double(), paper_lam(t.double(), s.double()), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_eq_16_is_one_plus_lambda_times_that_of_the_target_form(shape):
    x0_hat = normal(6, *shape).requires_grad_()
    x0, x_self = normal(6, *shape, seed=1), normal(6, *shape, seed=2)
    t, s = T_S.unbind(1)
    lam = paper_lam(t, s)
    hybrid = torch.autograd.grad(losses.hybrid_loss(x0_hat, x0, x_self, lam).sum(), x0_hat)[0]
    x_tar = losses.implicit_target(x0, x_self, losses.lam(t, s))
    target_form = torch.autograd.grad(losses.target_loss(x0_hat, x_tar).sum(), x0_hat)[0]
    close(hybrid, per_sample(1 + lam, x0) * target_form, 1e-9)
    assert target_form.flatten(1).norm(dim=1).min() > 1e-3
    at_target = x_tar.clone().requires_grad_()  # Eq. 18 is where the gradient of Eq. 16 vanishes
    zero = torch.autograd.grad(losses.hybrid_loss(at_target, x0, x_self, lam).sum(), at_target)[0]
    close(zero / per_sample(1 + lam, x0), torch.zeros_like(zero), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_renormalisation_keeps_norm_and_direction(shape, dtype):
    """Eq. 19, whatever positive multiple of the target it is given."""
    scales = torch.tensor([1e-3, 1.0, 3.0, 100.0], dtype=F64)
    x0 = (normal(4, *shape) * per_sample(scales, torch.empty(4, *shape))).to(dtype)
    target = normal(4, *shape, seed=1).to(dtype)
    tol = 1e-5 if dtype == torch.float32 else 1e-12
    out = losses.renormalise(target, x0)
    close(out.flatten(1).norm(dim=1), x0.flatten(1).norm(dim=1), tol)
    close(nn.functional.cosine_similarity(out.flatten(1), target.flatten(1)), torch.ones(4, dtype=dtype), tol)
    for factor in (1e-2, 7.0, 1e5):
        close(losses.renormalise(factor * target, x0), out, tol)
    close(losses.renormalise(3 * x0, x0), x0, tol)  # w = 0: the data itself


@pytest.mark.parametrize("norm", [0.0, 1.0, 50.0, 1e4])
def test_renormalising_a_zero_target_gives_zero(norm):
    x0 = torch.full((2, 4), norm / 2)  # two samples of this norm, in fp32
    assert torch.equal(losses.renormalise(torch.zeros(2, 4), x0), torch.zeros(2, 4))
    noise = 1e-7 * x0 * torch.tensor([1, -1, 1, 1])  # what is left of two opposite points
    assert torch.equal(losses.renormalise(noise, x0), torch.zeros(2, 4))


# ============================================================================================================
# The whole step
# ============================================================================================================
class Call(NamedTuple):
    x: Tensor
    t: Tensor
    s: Tensor
    c: Tensor
    out: Tensor  # keeps its gradient where the pass has one
    grad_mode: bool


class Net(nn.Module):
    """A velocity with four parameters, smooth in all its arguments, that remembers how it was called."""

    def __init__(self, *theta: float):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=F64))
        self.calls: list[Call] = []

    def velocity(self, x: Tensor, t: Tensor, s: Tensor, c: Tensor, theta: Tensor | None = None) -> Tensor:
        a, b, g, h = self.theta if theta is None else theta
        return a * torch.tanh(b * x + c) + g * per_sample(t, x) + h * per_sample(t - s, x) * x

    def forward(self, x: Tensor, t: Tensor, s: Tensor, c: Tensor) -> Tensor:
        out = self.velocity(x, t, s, c)
        if out.requires_grad:
            out.retain_grad()
        self.calls.append(Call(x, t, s, c, out, torch.is_grad_enabled()))
        return out


ONLINE, EMA = (0.7, -0.6, 0.4, 0.3), (0.9, 0.5, -0.2, -0.4)
B, K, MU = 8, 0.9, 0.5
IS_NULL = torch.tensor([False, False, True, True, False, False, False, True])
BELOW = [1, 3, 5, 7]


class Batch(NamedTuple):
    x0: Tensor
    c: Tensor
    null: Tensor
    fake: Tensor
    is_null: Tensor
    draws: losses.Draws

    def step(self, module: losses.SelfE, tau: float = 1.0, aux: bool = False) -> tuple[Tensor, dict]:
        return module(self.x0, (self.c,), (self.null,), (self.fake,), self.is_null, self.draws, tau, MU, aux)

    def times(self, tau: float = 1.0) -> tuple[Tensor, Tensor]:
        """s.11-s.13 as printed."""
        t_raw = 1 / (1 + torch.exp(-self.draws.z))
        t = math.exp(MU) / (math.exp(MU) + (1 / t_raw - 1))
        s = t.clone()
        for i in self.draws.below.tolist():
            s[i] = t[i] - self.draws.u[i] * tau * t[i]
        return t, s


def batch(shape: tuple = (3,), p_equal: float = 0.5, seed: int = 3, index=range(B)) -> Batch:
    """One batch in float64 whose samples differ in norm, with null prompts in both halves."""
    n = len(index)
    draws = losses.draw(seed, 11, list(index), shape, p_equal)
    draws = losses.Draws(*(d.double() if d.is_floating_point() else d for d in draws))
    x0 = normal(n, *shape, seed=seed) * per_sample(
        torch.linspace(0.3, 3, n, dtype=F64), torch.empty(n, *shape)
    )
    c, null, fake = (normal(n, *shape, seed=seed + i) for i in (1, 2, 3))
    is_null = IS_NULL[:n]
    c = torch.where(per_sample(is_null, c), null, c)
    return Batch(x0, c, null, fake, is_null, draws)


def networks() -> tuple[Net, Net]:
    return Net(*ONLINE), Net(*EMA)


def paper_step(
    b: Batch, online: Net, ema: Net, *, tau=1.0, aux=False, target="renorm", null_target="data"
) -> dict:
    """Fig. 2 and Sec. 3.3 sample by sample, each line as printed. Everything here is a constant for the gradient."""
    t, s = b.times(tau)
    out = {
        "t": t,
        "s": s,
        "target": b.x0.clone(),
        "x_self": b.x0.clone(),
        "lam": torch.zeros(len(t), dtype=F64),
    }
    out["x_t"] = torch.stack([(1 - t[i]) * b.x0[i] + t[i] * b.draws.eps[i] for i in range(len(t))])
    out["x_s_hat"], out["x0_hat"] = torch.empty_like(b.x0), torch.empty_like(b.x0)

    def G(network, x, t, s, c):
        return (x - t * network.velocity(x[None], t[None], s[None], c[None])[0]).detach()

    for i in range(len(t)):
        x0_hat = out["x0_hat"][i] = G(online, out["x_t"][i], t[i], s[i], b.c[i])
        if i not in b.draws.below:
            continue
        x_s = out["x_s_hat"][i] = (1 - s[i]) * x0_hat + s[i] * b.draws.eps_s[i]
        G_null = G(online, x_s, s[i], s[i], b.null[i])
        G_c = G_null if b.is_null[i] else G(ema, x_s, s[i], s[i], b.c[i])
        Delta = G_null - G_c
        if aux:
            Delta = K * Delta + (1 - K) * (G(online, x_s, s[i], s[i], b.fake[i]) - G_c)
        lam = paper_lam(t[i], s[i])
        if b.is_null[i] and null_target == "data" and not aux:
            lam = 0 * lam
        x_self = x0_hat - Delta
        mixed = b.x0[i] + lam * x_self
        renormed = mixed / mixed.pow(2).sum().sqrt() * b.x0[i].pow(2).sum().sqrt()
        out["target"][i] = renormed if target == "renorm" else mixed / (1 + lam)
        out["x_self"][i], out["lam"][i] = x_self, lam
    return out


def paper_loss(b: Batch, online: Net, constants: dict, theta: Tensor, aux: bool, target: str) -> Tensor:
    """Eq. 20, 21 (or 16) and s.8 over s^2, as a function of theta, with the targets, x_s_hat and sg[x0_hat] frozen."""
    t, s, total = constants["t"], constants["s"], 0.0
    for i in range(len(t)):
        args = constants["x_t"][i][None], t[i, None], s[i, None], b.c[i][None]
        x0_hat = constants["x_t"][i] - t[i] * online.velocity(*args, theta)[0]
        if target == "sum":
            loss = (x0_hat - b.x0[i]).pow(2).sum()
            loss = loss + constants["lam"][i] * (x0_hat - constants["x_self"][i]).pow(2).sum()
        else:
            loss = (x0_hat - constants["target"][i]).pow(2).sum()
        total = total + loss / t[i] ** 2
        if aux and i in b.draws.below:
            x_s = constants["x_s_hat"][i]
            G_fake = (
                x_s - s[i] * online.velocity(x_s[None], s[i, None], s[i, None], b.fake[i][None], theta)[0]
            )
            total = total + (G_fake - constants["x0_hat"][i]).pow(2).sum() / s[i] ** 2
    return total / len(t) / b.x0[0].numel()


def regression_target(call: Call, x_t: Tensor, t: Tensor) -> Tensor:
    """The y that x0_hat is pulled towards, solved from dL/dV of the main pass for L = mean ||x0_hat - y||^2 / t^2."""
    x0_hat = x_t - per_sample(t, x_t) * call.out.detach()
    by_x0_hat = -call.out.grad / per_sample(t, x_t)
    return x0_hat - by_x0_hat * per_sample(t**2, x_t) / 2 * len(t) * x_t[0].numel()


# --- flow matching ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", SHAPES)
def test_without_s_below_t_the_step_is_flow_matching(shape):
    """p_equal = 1: the value and the gradient of Eq. 3, one pass, no evaluation."""
    b, (online, ema) = batch(shape, p_equal=1.0), networks()
    loss, stats = b.step(losses.SelfE(online, ema))
    loss.backward()
    t, s = b.times()
    x_t = torch.stack([(1 - t[i]) * b.x0[i] + t[i] * b.draws.eps[i] for i in range(B)])
    theta = online.theta.detach().clone().requires_grad_()
    expected = (online.velocity(x_t, t, t, b.c, theta) - (b.draws.eps - b.x0)).pow(2).mean()
    close(loss, expected)
    close(online.theta.grad, torch.autograd.grad(expected, theta)[0])
    assert torch.equal(stats["t"], stats["s"]) and stats["loss"].shape == (B,)
    close(stats["loss"].mean(), loss)
    assert len(online.calls) == 1 and not ema.calls


def test_at_small_times_the_step_is_still_flow_matching():
    """The error of x0_hat shrinks like t, its square like t^2: where t is 0.02 to 0.001, a sample counts in full."""
    b, (online, ema) = batch(p_equal=1.0), networks()
    b = b._replace(draws=b.draws._replace(z=torch.linspace(-4.5, -7.5, B, dtype=F64)))
    loss, stats = b.step(losses.SelfE(online, ema))
    t, _ = b.times()
    assert 0.015 < t.max() < 0.02 and t.min() < 0.001
    x_t = torch.stack([(1 - t[i]) * b.x0[i] + t[i] * b.draws.eps[i] for i in range(B)])
    errors = (online.velocity(x_t, t, t, b.c) - (b.draws.eps - b.x0)).pow(2).mean(1)
    close(stats["loss"], errors, 1e-9)
    close(loss, errors.mean(), 1e-9)


@pytest.mark.parametrize("target", ["renorm", "tar", "sum"])
def test_self_e_with_s_equal_t_is_flow_matching(target):
    """tau = 0 puts s = t in the other half as well: same value, same gradient as flow matching."""
    results = []
    for p_equal in (0.5, 1.0):
        b, (online, ema) = batch(p_equal=p_equal), networks()
        loss, _ = b.step(losses.SelfE(online, ema, target=target), tau=0.0)
        loss.backward()
        results.append((loss.detach(), online.theta.grad))
    close(results[0][0], results[1][0])
    close(results[0][1], results[1][1])


# --- value and gradient ----------------------------------------------------------------------------------------------
OPTIONS = [
    dict(),
    dict(tau=0.4),
    dict(target="tar"),
    dict(target="sum"),
    dict(null_target="renorm"),
    dict(aux=True),
    dict(aux=True, target="sum"),
    dict(aux=True, target="tar", tau=0.4),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(2,), (2, 3, 1)])
def test_value_and_gradient_equal_the_paper_with_frozen_targets(shape, options):
    """The value equals the printed formulas; dL/dtheta equals central differences in which x_renorm stays frozen.

    So the target leaks no gradient (below: differences with a moving target are something else), the prediction is not
    detached (the gradient is not zero), and s.8 reaches theta through the fake branch alone.
    """
    options = dict(options)
    tau, aux = options.pop("tau", 1.0), options.pop("aux", False)
    b, (online, ema) = batch(shape), networks()
    loss, _ = b.step(variants.Variant(online, ema, k=K, **options), tau, aux)
    loss.backward()

    constants = paper_step(b, online, ema, tau=tau, aux=aux, **options)
    target, h = options.get("target", "renorm"), 1e-6
    theta = online.theta.detach().clone()
    close(loss.detach(), paper_loss(b, online, constants, theta, aux, target), 1e-10)

    frozen, moving = torch.empty(4, dtype=F64), torch.empty(4, dtype=F64)
    for i, unit in enumerate(torch.eye(4, dtype=F64)):
        values, moved = [], []
        for sign in (1, -1):
            at = theta + sign * h * unit
            values.append(paper_loss(b, online, constants, at, aux, target))
            with torch.no_grad():
                shifted = Net(*at.tolist())
                again = paper_step(b, shifted, ema, tau=tau, aux=aux, **options)
                moved.append(paper_loss(b, shifted, again, at, aux, target))
        frozen[i], moving[i] = (values[0] - values[1]) / (2 * h), (moved[0] - moved[1]) / (2 * h)
    torch.testing.assert_close(online.theta.grad, frozen, rtol=1e-6, atol=1e-8)
    assert online.theta.grad.abs().min() > 1e-5  # far above the error of the differences
    assert (moving - frozen).abs().max() > 1e-3
    assert ema.theta.grad is None


def test_gradient_reaches_x0_hat_in_both_halves():
    b, (online, ema) = batch(), networks()
    b.step(losses.SelfE(online, ema))[0].backward()
    assert (online.calls[0].out.grad.norm(dim=1) > 1e-3).all()


# --- who evaluates ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("aux", [False, True])
def test_who_is_asked_what(aux):
    """One pass with gradient on the batch; on the half with s < t, at (x_s_hat, s, s): c to the EMA and null to the
    online network, both without gradient; and with the auxiliary term the fake prompt to the online network."""
    b, (online, ema) = batch(), networks()
    b.step(losses.SelfE(online, ema), aux=aux)[0].backward()
    expected = paper_step(b, online, ema)
    t, s, j = expected["t"], expected["s"], BELOW

    main, null, *fake = online.calls
    assert main.grad_mode and main.out.requires_grad
    for actual, wanted in zip(main[:4], (expected["x_t"], t, s, b.c)):
        close(actual, wanted)
    for call, prompt in [(ema.calls[0], b.c), (null, b.null)] + [(call, b.fake) for call in fake]:
        for actual, wanted in zip(call[:4], (expected["x_s_hat"][j], s[j], s[j], prompt[j])):
            close(actual, wanted)
        assert not call.x.requires_grad  # sg[x_s_hat]
    assert [c.grad_mode for c in ema.calls + [null] + fake] == [False, False] + [True] * aux
    assert (len(online.calls), len(ema.calls)) == (2 + aux, 1)
    assert ema.theta.grad is None


def test_the_ema_serves_the_prompt_and_the_online_network_the_null_branch():
    """The direction of x_self, read off the gradient, is the formula's with these roles and no others."""
    b, (online, ema) = batch(), networks()
    b.step(losses.SelfE(online, ema))[0].backward()
    expected = paper_step(b, online, ema)
    actual = regression_target(online.calls[0], expected["x_t"], expected["t"])
    close(actual, expected["target"], 1e-9)
    for conditional, unconditional in [(online, online), (ema, ema), (online, ema)]:
        other = paper_step(b, online, ema)
        for i in (1, 5):
            x_s, s, x0 = other["x_s_hat"][i][None], other["s"][i, None], b.x0[i]
            V_null = unconditional.velocity(x_s, s, s, b.null[i][None])
            V_c = conditional.velocity(x_s, s, s, b.c[i][None])
            mixed = x0 + other["lam"][i] * (other["x0_hat"][i] + s * (V_null - V_c)[0])
            assert (
                mixed / mixed.norm() * x0.norm() - actual[i]
            ).norm() > 1e-4  # the roles above agree to 1e-9


def test_another_network_may_serve_the_null_branch():
    b, (online, ema), third = batch(), networks(), Net(0.1, 0.2, 0.3, 0.4)
    b.step(losses.SelfE(online, ema, unconditional=third))[0].backward()
    assert (len(online.calls), len(ema.calls), len(third.calls)) == (1, 1, 1)
    close(third.calls[0].c, b.null[BELOW])
    assert third.theta.grad is None and not third.calls[0].grad_mode


# --- null prompts ----------------------------------------------------------------------------------------------------
def test_a_null_prompt_learns_from_the_data_alone():
    b, (online, ema) = batch(), networks()
    b.step(losses.SelfE(online, ema))[0].backward()
    target = regression_target(online.calls[0], *(paper_step(b, online, ema)[n] for n in ("x_t", "t")))
    close(target[IS_NULL], b.x0[IS_NULL], 1e-9)
    assert (target - b.x0)[[1, 5]].norm(dim=1).min() > 1e-2  # with a prompt, self-evaluation speaks


def test_a_null_prompt_may_keep_the_renormalised_target():
    """null_target = "renorm": Delta = 0, the target is x0 + lam x0_hat at the norm of x0, whatever the EMA says."""
    b, (online, ema) = batch(), networks()
    b.step(variants.Variant(online, ema, null_target="renorm"))[0].backward()
    p = paper_step(b, online, ema)
    target = regression_target(online.calls[0], p["x_t"], p["t"])
    for i in (3, 7):
        mixed = b.x0[i] + paper_lam(p["t"][i], p["s"][i]) * p["x0_hat"][i]
        close(target[i], mixed / mixed.norm() * b.x0[i].norm(), 1e-9)
    close(target[2], b.x0[2], 1e-9)  # s = t


def test_a_null_prompt_with_the_auxiliary_term_keeps_the_fake_score_only():
    """Delta = (1 - k)(fake - null), both from the online network: another EMA changes nothing."""
    targets = []
    for ema in (Net(*EMA), Net(2.0, 1.0, 1.0, -1.0)):
        b, online = batch(), Net(*ONLINE)
        b.step(losses.SelfE(online, ema, target="tar", k=0.75), aux=True)[0].backward()
        p = paper_step(b, online, ema)
        targets.append(regression_target(online.calls[0], p["x_t"], p["t"]))
    close(targets[0][IS_NULL], targets[1][IS_NULL], 1e-12)
    for i in (3, 7):
        x_s, s = p["x_s_hat"][i][None], p["s"][i, None]
        V_fake, V_null = (online.velocity(x_s, s, s, c[i][None])[0] for c in (b.fake, b.null))
        x_self = p["x0_hat"][i] - 0.25 * s * (V_null - V_fake)
        lam = paper_lam(p["t"][i], p["s"][i])
        close(targets[0][i], (b.x0[i] + lam * x_self) / (1 + lam), 1e-9)


# --- the auxiliary stage ---------------------------------------------------------------------------------------------
def test_the_fake_loss_reaches_the_network_through_the_fake_branch_alone():
    """dL/dV is the same with and without s.8; at the fake branch it is 2 (V_fake - (eps - x0_hat)) over the batch."""
    b, (online, ema) = batch(), networks()
    b.step(losses.SelfE(online, ema, target="sum", k=1.0), aux=True)[0].backward()
    quiet, ema_2 = networks()
    plain = variants.Variant(quiet, ema_2, target="sum", null_target="renorm")
    b.step(plain, aux=False)[0].backward()  # k = 1: the same Delta, and no s.8
    close(online.calls[0].out.grad, quiet.calls[0].out.grad, 1e-12)
    p, fake = paper_step(b, online, ema), online.calls[2]
    x0_hat, eps_s = p["x0_hat"][BELOW], b.draws.eps_s[BELOW]
    close(fake.out.grad, 2 * (fake.out.detach() - (eps_s - x0_hat)) / (B * b.x0[0].numel()))


@pytest.mark.parametrize("k", [0.0, 0.5, 0.9, 1.0])
def test_k_mixes_the_classifier_and_the_auxiliary_term(k):
    """Eq. s.6, through the target: linear in k between the fake and the null branch. The default is 0.9."""
    b, (online, ema) = batch(), networks()
    options = {} if k == 0.9 else {"k": k}
    b.step(variants.Variant(online, ema, target="tar", **options), aux=True)[0].backward()
    p = paper_step(b, online, ema)
    target = regression_target(online.calls[0], p["x_t"], p["t"])
    for i in (1, 5):
        x_s, s, lam = p["x_s_hat"][i][None], p["s"][i, None], paper_lam(p["t"][i], p["s"][i])
        V_c = ema.velocity(x_s, s, s, b.c[i][None])[0]
        V_other = sum(
            share * online.velocity(x_s, s, s, c[i][None])[0] for share, c in [(k, b.null), (1 - k, b.fake)]
        )
        x_self = p["x0_hat"][i] + s * (V_other - V_c)  # x0_hat - Delta, G = x_s - s V
        close(target[i], (b.x0[i] + lam * x_self) / (1 + lam), 1e-9)


# --- choices of the target -------------------------------------------------------------------------------------------
def test_sum_is_one_plus_lambda_times_tar_and_renorm_has_the_norm_of_the_data():
    gradients, p = {}, None
    for target in ("renorm", "tar", "sum"):
        b, (online, ema) = batch((2, 3)), networks()
        b.step(losses.SelfE(online, ema, target=target))[0].backward()
        p = paper_step(b, online, ema)
        gradients[target] = online.calls[0].out.grad
        if target == "renorm":
            norm = regression_target(online.calls[0], p["x_t"], p["t"]).flatten(1).norm(dim=1)
            close(norm, b.x0.flatten(1).norm(dim=1), 1e-9)
    close(gradients["sum"], per_sample(1 + p["lam"], gradients["tar"]) * gradients["tar"], 1e-9)
    assert p["lam"][[1, 5]].min() > 0.05
    assert (gradients["tar"] - gradients["renorm"])[[1, 5]].flatten(1).norm(dim=1).min() > 1e-4


@pytest.mark.parametrize("aux", [False, True])
def test_delta_scale_zero_is_the_control_that_says_nothing_about_x0_hat(aux):
    """Delta = 0: x_self is x0_hat itself, and only Eq. 19 remains; other evaluators change nothing."""
    targets = []
    for ema in (Net(*EMA), Net(2.0, 1.0, 1.0, -1.0)):
        b, online = batch(), Net(*ONLINE)
        loss, stats = b.step(variants.Variant(online, ema, delta_scale=0.0, null_target="renorm"), aux=aux)
        loss.backward()
        p = paper_step(b, online, ema)
        targets.append(regression_target(online.calls[0], p["x_t"], p["t"]))
        assert not stats["delta_norm"].any()
    close(targets[0], targets[1], 1e-12)
    for i in BELOW:
        mixed = b.x0[i] + paper_lam(p["t"][i], p["s"][i]) * p["x0_hat"][i]
        close(targets[0][i], mixed / mixed.norm() * b.x0[i].norm(), 1e-9)


@pytest.mark.parametrize("options", [dict(lam_scale=0.3), dict(lam_time="middle"), dict(delta_scale=2.0)])
def test_the_other_choices(options):
    """lam_scale multiplies lambda, lam_time moves the time that lambda alone sees, delta_scale multiplies Delta."""
    b, (online, ema) = batch(), networks()
    b.step(variants.Variant(online, ema, target="tar", **options))[0].backward()
    p = paper_step(b, online, ema, target="tar")
    target = regression_target(online.calls[0], p["x_t"], p["t"])
    for i in (1, 5):
        t, s = p["t"][i], p["s"][i]
        lam = options.get("lam_scale", 1.0) * paper_lam(t, (t + s) / 2 if "lam_time" in options else s)
        x_self = p["x0_hat"][i] + options.get("delta_scale", 1.0) * (p["x_self"][i] - p["x0_hat"][i])
        close(target[i], (b.x0[i] + lam * x_self) / (1 + lam), 1e-9)


@pytest.mark.parametrize("options", [dict(target="Renorm"), dict(null_target="zero")])
def test_unknown_choices_are_refused(options):
    with pytest.raises(ValueError, match="unknown"):
        variants.Variant(*networks(), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("aux", [False, True])
@pytest.mark.parametrize("null_target", ["data", "renorm"])
def test_the_step_is_finite_at_the_end_of_time(dtype, aux, null_target):
    """t = 1 with s < t: the target is x_self at the norm of x0, the limit of Eq. 19. s = t = 1: it is x0."""
    b, (online, ema) = batch((2, 3)), networks()
    u = torch.tensor(
        [0.0, 0.0, 0.5, 0.0, 0.5, 0.5, 1e-7, 0.9], dtype=F64
    )  # s = t = 1 at 1 and 3; s < t at 5, 7
    draws = b.draws._replace(z=torch.full((B,), math.inf, dtype=F64), u=u)
    b = Batch(*(x.to(dtype) if x.is_floating_point() else x for x in b[:5]), draws)
    b = b._replace(draws=losses.Draws(*(x.to(dtype) if x.is_floating_point() else x for x in draws)))
    online, ema = online.to(dtype), ema.to(dtype)
    loss, stats = b.step(variants.Variant(online, ema, null_target=null_target), aux=aux)
    loss.backward()
    assert loss.isfinite() and online.theta.grad.isfinite().all() and online.theta.grad.any()
    assert (stats["t"] == 1).all() and all(value.isfinite().all() for value in stats.values())

    tol = 1e-4 if dtype == torch.float32 else 1e-10
    target = regression_target(online.calls[0], b.draws.eps, stats["t"])
    close(target[[0, 1, 2, 3, 4, 6]], b.x0[[0, 1, 2, 3, 4, 6]], tol)  # s = t
    close(target.flatten(1).norm(dim=1), b.x0.flatten(1).norm(dim=1), tol)
    if not aux:
        s, x0_hat = 0.5, b.draws.eps[5] - online.calls[0].out.detach()[5]
        x_s, times = (1 - s) * x0_hat + s * b.draws.eps_s[5], torch.tensor([s], dtype=dtype)
        V_null, V_c = (
            n.velocity(x_s[None], times, times, c[5][None])[0] for n, c in [(online, b.null), (ema, b.c)]
        )
        x_self = (x0_hat + s * (V_null - V_c)).detach()
        close(target[5], x_self / x_self.norm() * b.x0[5].norm(), tol)


def test_the_statistics_are_those_of_the_step():
    b, (online, ema) = batch((2, 3)), networks()
    loss, stats = b.step(losses.SelfE(online, ema), aux=True)
    p = paper_step(b, online, ema, aux=True)
    close(stats["t"], p["t"])
    close(stats["s"], p["s"])
    close(stats["lam"], p["lam"][BELOW])
    close(stats["delta_norm"], (p["x0_hat"] - p["x_self"])[BELOW].pow(2).mean(dim=(1, 2)).sqrt(), 1e-9)
    close(loss, stats["loss"].mean() + stats["fake_loss"].sum() / B)
    assert not any(value.requires_grad for value in stats.values())


def test_the_step_runs_the_denoiser_itself():
    """Pictures through model.Denoiser in fp32 with the auxiliary term: a finite loss, a gradient for every weight."""
    config = dict(
        width=32, heads=2, double=1, single=1, axes=(4, 6, 6), channels=3, patch=2, txt_dim=6, vec_dim=5
    )
    torch.manual_seed(0)
    network, ema = model.Denoiser(**config), model.Denoiser(**config).requires_grad_(False)
    for p in (*network.parameters(), *ema.parameters()):
        nn.init.normal_(p, std=0.2)
    prompts = [(torch.randn(4, 5, 6), torch.randn(4, 5)) for _ in range(3)]
    draws = losses.draw(0, 0, [0, 1, 2, 3], (3, 4, 8))
    loss, _ = losses.SelfE(network, ema)(
        torch.randn(4, 3, 4, 8), *prompts, torch.zeros(4).bool(), draws, 1.0, 0.0, True
    )
    loss.backward()
    assert loss.isfinite() and loss.dim() == 0
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())
    assert all(p.grad is None for p in ema.parameters())


# ============================================================================================================
# S.2: the distribution of (t, s), and the numbers behind it
# ============================================================================================================
def normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def t_cdf(x: Tensor, mu: float) -> Tensor:
    """P(t <= x): s.12 shifts the logit of t_raw by mu, and that logit is standard normal."""
    return normal_cdf(torch.logit(x.double()) - mu)


def s_cdf(y: Tensor, mu: float, tau: float) -> Tensor:
    """P(s <= y | s < t) by quadrature over t: the density of t times the share of U((1 - tau) t, t) below y."""
    if tau == 0:
        return t_cdf(y, mu)
    t = torch.linspace(0, 1, 8001, dtype=F64)[1:-1]
    density = torch.exp(-((torch.logit(t) - mu) ** 2) / 2) / math.sqrt(2 * math.pi) / (t * (1 - t))
    share = ((y.double()[:, None] - (1 - tau) * t) / (tau * t)).clamp(0, 1)
    return torch.trapezoid(density * share, t, dim=1)


def ks(sample: Tensor, cdf) -> float:
    """The Kolmogorov-Smirnov distance between a sample and a distribution function."""
    x = sample.double().sort().values
    F, n = cdf(x), len(x)
    above, below = torch.arange(1, n + 1) / n - F, F - torch.arange(n) / n
    return max(above.max().item(), below.max().item())


@pytest.mark.parametrize("L, mu", [(512, 0.5), (4096, 1.15), (2304, 0.825), (64, 0.41875)])
def test_mu_passes_through_the_papers_anchors(L, mu):
    assert losses.mu_of_length(L) == pytest.approx(mu, abs=1e-4 if L == 64 else 1e-12)


@pytest.mark.parametrize("mu", [-0.7, 0.0, 0.5, 1.15])
def test_warp(mu):
    """s.12 as printed; 0 and 1 stay; -mu undoes mu."""
    t_raw = torch.linspace(0, 1, 101, dtype=F64)
    t = losses.warp(t_raw, mu)
    assert t[0] == 0 and t[-1] == 1 and (t.diff() > 0).all()
    close(t[1:], math.exp(mu) / (math.exp(mu) + (1 / t_raw[1:] - 1)))
    close(losses.warp(t, -mu), t_raw)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("mu", [0.0, 0.83])
def test_the_law_of_t_and_s_against_quadrature(mu, tau):
    """Fed with an even grid of quantiles in place of random numbers,
    sample_times reproduces the distribution up to the grid."""
    n = 150
    middle = (torch.arange(n, dtype=F64) + 0.5) / n
    quantile, u = (g.flatten() for g in torch.meshgrid(middle, middle, indexing="ij"))
    z = math.sqrt(2) * torch.erfinv(2 * quantile - 1)
    positions = torch.arange(n * n)
    t, s = losses.sample_times(z, u, positions, mu, tau)
    assert ks(t, lambda x: t_cdf(x, mu)) < 1.01 / n
    x = torch.linspace(0.02, 0.98, 97, dtype=F64)
    empirical = (s[:, None] <= x).double().mean(dim=0)
    assert (empirical - s_cdf(x, mu, tau)).abs().max() < 1.5 / n
    # given t, s is uniform on ((1 - tau) t, t]
    t_grid, s_grid = t.view(n, n), s.view(n, n)
    assert ((s_grid > (1 - tau) * t_grid) | (tau == 0)).all() and (s_grid <= t_grid).all()
    close(s_grid.mean(dim=1), (1 - tau / 2) * t_grid[:, 0])
    close(s_grid.var(dim=1, correction=0), (tau * t_grid[:, 0]) ** 2 / 12 * (1 - 1 / n**2))
    # where the sample is not among the positions, s is t itself
    t_again, s_again = losses.sample_times(z, u, positions[::2], mu, tau)
    assert (
        torch.equal(t_again, t) and torch.equal(s_again[::2], s[::2]) and torch.equal(s_again[1::2], t[1::2])
    )


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_the_law_of_t_and_s_as_drawn(drawn, tau):
    """KS tests at the 0.1% level on the numbers that training uses; t and s / t are independent on a 6 x 6 table."""
    mu = 0.5
    t, s = losses.sample_times(drawn.z, drawn.u, drawn.below, mu, tau)
    below = torch.zeros(len(t), dtype=torch.bool)
    below[drawn.below] = True
    assert below.sum() == len(t) / 2 and torch.equal(s[~below], t[~below])
    critical = 1.95
    assert ks(t, lambda x: t_cdf(x, mu)) < critical / len(t) ** 0.5
    for half in (below, ~below):
        assert ks(t[half], lambda x: t_cdf(x, mu)) < critical / half.sum() ** 0.5
    n = int(below.sum())
    assert ks(s[below], lambda x: s_cdf(x, mu, tau)) < critical / n**0.5
    if tau > 0:
        first = t_cdf(t[below], mu)
        second = (1 - s[below].double() / t[below].double()) / tau
        cell = (first * 6).long().clamp(max=5) * 6 + (second * 6).long().clamp(max=5)
        counts = torch.bincount(cell, minlength=36).double()
        assert ((counts - n / 36) ** 2 / (n / 36)).sum() < 66.6  # chi-square, 35 degrees of freedom, 0.1%


@pytest.fixture(scope="module")
def drawn() -> losses.Draws:
    return losses.draw(seed=5, step=70, index=list(range(3000, 7000)), shape=(2,))


def test_the_noises_are_normal_and_independent(drawn):
    for x in (drawn.z, drawn.eps.flatten(), drawn.eps_s.flatten()):
        assert x.dtype == torch.float32
        assert ks(x, normal_cdf) < 1.95 / len(x) ** 0.5
    assert 0 <= drawn.u.min() and drawn.u.max() < 1
    assert ks(drawn.u, lambda x: x) < 1.95 / len(drawn.u) ** 0.5
    columns = torch.stack([drawn.z, drawn.u, *drawn.eps.T, *drawn.eps_s.T])
    neighbours = torch.cat([columns[:, :-1], columns[:, 1:]])  # each sample beside the next one
    correlation = torch.corrcoef(neighbours) - torch.eye(12)
    assert correlation.abs().max() < 4.5 / len(drawn.z) ** 0.5


def test_draws_depend_on_seed_and_step():
    first = losses.draw(1, 2, [4, 5], (3,))
    for other in (
        losses.draw(2, 2, [4, 5], (3,)),
        losses.draw(1, 3, [4, 5], (3,)),
        losses.draw(1, 2, [6, 7], (3,)),
    ):
        for a, b in zip(first[:4], other[:4]):
            assert not torch.isclose(a, b).any()


@pytest.mark.parametrize("size", [2, 4, 6, 10, 64])
@pytest.mark.parametrize("start", [0, 1, 2, 7, 1000003])
def test_exactly_half_of_any_even_micro_batch_has_s_below_t(start, size):
    positions = losses.below_positions(list(range(start, start + size)))
    assert len(positions) == size // 2 and positions.dtype == torch.int64
    assert len(set(positions.tolist())) == size // 2 and set(positions.tolist()) < set(range(size))


@pytest.mark.parametrize("p_equal, share", [(0.0, 1.0), (0.25, 0.75), (0.5, 0.5), (0.9, 0.1), (1.0, 0.0)])
def test_the_share_of_s_below_t_is_one_minus_p_equal(p_equal, share):
    assert len(losses.below_positions(list(range(2000)), p_equal)) == pytest.approx(2000 * share, abs=1)


@pytest.mark.parametrize(
    "p_equal, n, places",
    [
        (0.9, 10, [9]),
        (0.8, 5, [4]),
        (0.7, 10, [3, 6, 9]),
        (0.6, 5, [2, 4]),
        (7 / 8, 8, [7]),
        (0.75, 4, [3]),
        (0.5, 2, [1]),
        (0.1, 10, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
    ],
)
def test_every_n_samples_have_their_share_at_the_same_places(p_equal, n, places):
    """The places are those of whole numbers in (1 - p) g, counted by hand. In floating point 10 (1 - 0.9) is less than
    1: rounded down as it is, the first ten samples would have no place and the next ten two."""
    for start in (0, n, 70 * n, 710_000 * 1024 // n * n):
        assert losses.below_positions(list(range(start, start + n)), p_equal).tolist() == places


@pytest.mark.parametrize("cuts", [[12], [2, 10], [4, 4, 4], [6, 2, 4], [1] * 12], ids=str)
def test_draws_do_not_depend_on_how_the_batch_is_cut(cuts):
    """Global samples 8..19 in one piece or in pieces (ranks, micro-batches): the same numbers, the same positions."""
    whole = losses.draw(9, 4, list(range(8, 20)), (2, 3))
    pieces, start, positions = [], 8, []
    for n in cuts:
        pieces.append(losses.draw(9, 4, list(range(start, start + n)), (2, 3)))
        positions += (pieces[-1].below + start - 8).tolist()
        start += n
    for i in range(4):
        assert torch.equal(torch.cat([p[i] for p in pieces]), whole[i])
    assert positions == whole.below.tolist()


@pytest.mark.parametrize("aux", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_micro_batches_add_up_to_the_batch(size, aux):
    """Loss and gradient of the whole batch are the means over equal micro-batches of it."""
    b, (online, ema) = batch(), networks()
    loss, _ = b.step(losses.SelfE(online, ema), aux=aux)
    loss.backward()
    values, accumulated = [], Net(*ONLINE)
    for start in range(0, B, size):
        piece = slice(start, start + size)
        draws = losses.draw(3, 11, list(range(start, start + size)), (3,))
        draws = losses.Draws(*(d.double() if d.is_floating_point() else d for d in draws))
        part, _ = Batch(*(x[piece] for x in b[:5]), draws).step(losses.SelfE(accumulated, ema), aux=aux)
        (part * size / B).backward()
        values.append(part.detach())
    close(torch.stack(values).mean(), loss.detach())
    close(accumulated.theta.grad, online.theta.grad)
