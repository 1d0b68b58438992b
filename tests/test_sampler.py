"""sampler.py on Gaussian data, where every mean and variance is known in closed form and can be followed exactly."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import sampler

F64 = torch.float64
ETAS = [0.0, 0.3, 0.5, 1.0, "renoise", "public"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def close(actual: Tensor, expected: Tensor, tol: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


# ============================================================================================================
# The grid
# ============================================================================================================
@pytest.mark.parametrize("mu", [0.0, 0.5, 1.15])
@pytest.mark.parametrize("steps", [1, 2, 5, 50])
def test_the_grid_is_s12_of_a_line_from_1_to_0(steps, mu):
    grid = sampler.time_grid(steps, mu)
    assert len(grid) == steps + 1 and grid[0] == 1 and grid[-1] == 0
    assert all(a > b for a, b in zip(grid, grid[1:]))
    for k in range(steps):
        t_raw = 1 - k / steps
        assert grid[k] == pytest.approx(math.exp(mu) / (math.exp(mu) + 1 / t_raw - 1), abs=1e-14)


@pytest.mark.parametrize("steps", [0, -1])
def test_fewer_than_one_step_is_refused(steps):
    with pytest.raises(ValueError, match="at least 1"):
        sampler.time_grid(steps, 0.0)
    with pytest.raises(ValueError, match="at least 1"):
        sampler.sample(lambda x, *_: x, torch.zeros(1, 1), (), steps=steps)


@pytest.mark.parametrize(
    "choices",
    [dict(eta=1.01), dict(eta=-0.1), dict(eta=math.nan), dict(s_rule=1.5), dict(s_rule=-0.5)],
    ids=str,
)
def test_eta_and_s_rule_outside_of_0_to_1_are_refused(choices):
    """Above 1 the fresh noise alone would be more than sigma_s allows; an s_k off the step is no level of it. The
    network is not asked first."""
    V = Spy()
    with pytest.raises(ValueError, match="eta must be .* s_rule in"):
        sampler.sample(V, normal(2, 3), prompts(2, 3)[0], steps=2, **choices)
    assert not V.calls


# ============================================================================================================
# One step
# ============================================================================================================
PAIRS = [(0.9, 0.4), (0.5, 0.49), (0.99, 0.01), (0.2, 0.1), (1.0, 0.6), (0.3, 0.0), (1.0, 0.0)]


def coefficients(t: float, s: float, eta) -> tuple[float, float, float]:
    """What `update` multiplies x_t, x0_hat and the noise with, probed with unit vectors."""
    probe = torch.eye(3, dtype=F64)
    return tuple(sampler.update(probe[:, 0:1], probe[:, 1:2], t, s, eta, probe[:, 2:3])[:, 0].tolist())


@pytest.mark.parametrize("t, s", PAIRS)
def test_eta_1_is_the_posterior_of_the_joint_gaussian(t, s):
    """Mean and variance of x_s given (x_t, x0), from the covariance of (x_s, x_t) given x0 of the forward process."""
    x_t, x0 = 1.7, -0.6
    a = (1 - t) / (1 - s)  # x_t = a x_s + independent noise that brings the variance to t^2
    mean = torch.tensor([(1 - s) * x0, (1 - t) * x0], dtype=F64)
    covariance = torch.tensor([[s**2, a * s**2], [a * s**2, t**2]], dtype=F64)
    gain = covariance[0, 1] / covariance[1, 1]
    posterior_mean = mean[0] + gain * (x_t - mean[1])
    posterior_variance = covariance[0, 0] - gain * covariance[1, 0]

    by_x_t, by_x0, by_noise = coefficients(t, s, 1.0)
    assert by_x_t * x_t + by_x0 * x0 == pytest.approx(posterior_mean.item(), abs=1e-12)
    assert by_noise**2 == pytest.approx(posterior_variance.item(), abs=1e-12)
    if t == 1 and s > 0:
        assert by_x_t == pytest.approx(0, abs=1e-7)  # all noise is fresh


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("t, s", PAIRS)
def test_every_choice_has_the_right_amount_of_noise(t, s, eta):
    """Given the true x0, x_s is N(alpha_s x0, sigma_s^2) again; eta scales the fresh part, re-noising is all fresh, and
    of the old noise minFM keeps s - eta (t - s) s / t, here at eta = 1."""
    by_x_t, by_x0, by_noise = coefficients(t, s, eta)
    assert by_x0 + by_x_t * (1 - t) == pytest.approx(1 - s, abs=1e-12)
    assert by_x_t**2 * t**2 + by_noise**2 == pytest.approx(s**2, abs=1e-12)
    exact = coefficients(t, s, 1.0)[2]
    fresh = {"renoise": s, "public": (s**2 - (s - (t - s) * s / t) ** 2) ** 0.5}
    assert by_noise == pytest.approx(fresh[eta] if eta in fresh else eta * exact, abs=1e-12)
    assert eta != "renoise" or by_x_t == 0


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("t", [1.0, 0.6, 1e-3])
def test_the_last_step_returns_the_prediction_itself(t, eta):
    x_t, x0_hat = normal(3, 2, 4), normal(3, 2, 4, seed=1)
    assert torch.equal(sampler.update(x_t, x0_hat, t, 0.0, eta, None), x0_hat)


@pytest.mark.parametrize("shape", [(2,), (3, 4, 5)])
@pytest.mark.parametrize("s_rule", [0.0, 0.5, 1.0])
def test_eta_0_is_eq_22(shape, s_rule):
    """x_{t_{k+1}} = x_{t_k} - (t_k - t_{k+1}) V(x_{t_k}, t_k, s_k, c), for any V, and no noise is asked for."""
    c = normal(4, *shape, seed=3)

    def V(x, t, s, c):
        t, s = (time.reshape([-1] + [1] * len(shape)) for time in (t, s))
        return torch.sin(x + c) * t - s * x

    def forbidden(k):
        raise AssertionError("eta = 0 needs no noise")

    x = start = normal(4, *shape)
    grid = sampler.time_grid(6, 0.5)
    for t, t_next in zip(grid, grid[1:]):
        s_k = (1 - s_rule) * t_next + s_rule * t
        x = x - (t - t_next) * V(x, torch.full((4,), t, dtype=F64), torch.full((4,), s_k, dtype=F64), c)
    out = sampler.sample(V, start, (c,), steps=6, mu=0.5, s_rule=s_rule, eta=0.0, draw_noise=forbidden)
    close(out, x)


# ============================================================================================================
# Whole trajectories on N(m, v), exactly
# ============================================================================================================
class Follow:
    """Gaussian data N(m, v), and a sampler followed without a single random number.

    The sampler is linear in its noises, so x is kept as its coefficients: row 0 is the mean, row i what multiplies the
    i-th independent standard normal. Rows are the batch, hence the code under test runs unchanged, and the exact
    variance is the sum of squares of the rows from 1 on.
    """

    def __init__(self, mean: float, variance: float, steps: int, draw: bool):
        self.m, self.v, self.draw, self.steps, self.calls = mean, variance, draw, steps, 0
        self.rows = torch.eye(2 + 2 * steps, dtype=F64)[
            :, :, None
        ]  # mean, first noise, the draws, the fresh noises

    def V(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The velocity of x0_hat = E[x0 | x_t], or of a draw from q(x0 | x_t)."""
        t = t[0].item()
        a, total = 1 - t, (1 - t) ** 2 * self.v + t**2
        gain = a * self.v / total
        x0_hat = gain * x + (self.m - gain * a * self.m) * self.rows[0]
        if self.draw:
            x0_hat = x0_hat + math.sqrt(self.v - gain * a * self.v) * self.rows[2 + self.calls]
        self.calls += 1
        return (x - x0_hat) / t

    def moments(self, **choices) -> list[tuple[float, float, float]]:
        """(t, mean, variance) after each step."""
        fresh = self.rows[2 + self.steps :]
        out = sampler.trajectory(
            self.V, self.rows[1], (), steps=self.steps, draw_noise=lambda k: fresh[k], **choices
        )
        return [(t, x[0].item(), x[1:].square().sum().item()) for t, x, _ in out]


DATA = [(0.0, 0.25), (1.5, 0.6), (-0.7, 4.0)]


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("mean, variance", DATA)
def test_with_exact_draws_every_choice_keeps_the_marginals(mean, variance, steps, eta):
    """x0_hat ~ q(x0 | x_t): after each step x is N(alpha m, alpha^2 v + sigma^2), the sample N(m, v), at any N."""
    moments = Follow(mean, variance, steps, draw=True).moments(eta=eta, mu=0.5)
    assert len(moments) == steps
    for t, m, v in moments:
        assert m == pytest.approx((1 - t) * mean, abs=1e-12)
        assert v == pytest.approx((1 - t) ** 2 * variance + t**2, rel=1e-12)
    assert moments[-1][0] == 0


@pytest.mark.parametrize("mean, variance", DATA)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_with_the_posterior_mean_the_variance_tends_to_the_data(mean, variance, eta):
    """s_k = t_k, x0_hat = E[x0 | x_t], N growing: the error of the variance falls like 1/N, the mean is exact."""
    errors = []
    for steps in (25, 100, 400):
        _, m, v = Follow(mean, variance, steps, draw=False).moments(eta=eta, s_rule=1.0)[-1]
        assert m == pytest.approx(mean, abs=1e-10)
        errors.append(abs(v / variance - 1))
    assert errors[0] > 0.01  # at few steps the posterior mean is a blend
    assert errors[2] < 0.02
    for coarse, fine in zip(errors, errors[1:]):
        assert 3 < coarse / fine < 5.5


@pytest.mark.parametrize("mean, variance", DATA)
def test_with_the_posterior_mean_re_noising_does_not_get_there(mean, variance):
    """Re-noising tends to half the variance of the data.

    A step takes the variance u of x0_hat to g^2 (alpha^2 u + sigma^2), with gain g = alpha v / (alpha^2 v + sigma^2).
    At a time s that hardly moves, u settles at g^2 s^2 / (1 - g^2 alpha^2), which tends to v / 2 as s -> 0.
    """
    errors = []
    for steps in (25, 100, 400):
        _, m, v = Follow(mean, variance, steps, draw=False).moments(eta="renoise", s_rule=1.0)[-1]
        assert m == pytest.approx(mean, abs=1e-10)
        errors.append(0.5 - v / variance)
    assert 0 < errors[2] < errors[1] / 2 < errors[0] / 4 < 0.02


@pytest.mark.parametrize("mu", [0.0, 0.5])
@pytest.mark.parametrize("mean, variance", DATA)
def test_at_eta_0_the_error_halves_when_steps_double(mean, variance, mu):
    """The exact flow carries x_1 to m + sqrt(v) x_1; Eq. 22 is its Euler scheme, of first order."""
    x_1 = torch.tensor([[-1.3], [0.4], [2.0]], dtype=F64)
    exact = mean + math.sqrt(variance) * x_1

    def V(x, t, s):
        t = t[:, None]
        a, total = 1 - t, (1 - t) ** 2 * variance + t**2
        return (x - (mean + a * variance / total * (x - a * mean))) / t

    errors = []
    for steps in (64, 128, 256):
        out = sampler.sample(V, x_1, (), steps=steps, mu=mu, eta=0.0, s_rule=1.0)
        errors.append((out - exact).abs().max().item())
    for coarse, fine in zip(errors, errors[1:]):
        assert coarse / fine == pytest.approx(2, abs=0.15)
    assert errors[-1] < 0.02 * math.sqrt(max(variance, 1.0))


# ============================================================================================================
# Guidance, and what the network is asked
# ============================================================================================================
class Call(NamedTuple):
    x: Tensor
    t: Tensor
    s: Tensor
    c: tuple


class Spy:
    """A network that remembers its calls. Its output depends on all that it is given."""

    def __init__(self):
        self.calls: list[Call] = []

    def __call__(self, x: Tensor, t: Tensor, s: Tensor, *c: Tensor) -> Tensor:
        self.calls.append(Call(x, t, s, c))
        t, s = (time.reshape([-1] + [1] * (x.dim() - 1)) for time in (t, s))
        return torch.tanh(x + c[0]) * (1 + t) - s * x + c[1]


def prompts(B: int, *shape: int) -> tuple[tuple, tuple]:
    return tuple(normal(B, *shape, seed=i) for i in (3, 4)), tuple(normal(B, *shape, seed=i) for i in (5, 6))


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_n_steps_cost_n_evaluations(steps, guidance):
    """Each is one batch: the samples once without guidance, twice with it, both branches at the same x, t, s."""
    V, B = Spy(), 3
    cond, null = prompts(B, 2, 2)
    noise = [normal(B, 2, 2, seed=50 + k) for k in range(steps)]
    states = list(
        sampler.trajectory(
            V,
            normal(B, 2, 2),
            cond,
            null if guidance != 1 else None,
            steps=steps,
            guidance=guidance,
            draw_noise=noise.__getitem__,
        )
    )
    assert len(V.calls) == len(states) == steps
    x, copies = normal(B, 2, 2), 1 if guidance == 1 else 2
    for call, (_, x_next, _) in zip(V.calls, states):
        assert torch.equal(call.x, torch.cat([x] * copies))
        assert call.t.shape == call.s.shape == (copies * B,)
        for both, c, n in zip(call.c, cond, null):
            assert torch.equal(both, c if copies == 1 else torch.cat([c, n]))
        x = x_next


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("s_rule", [0.0, 0.25, 1.0])
def test_the_second_time_lies_a_fraction_between_the_grid_points(s_rule, guidance):
    V = Spy()
    cond, null = prompts(2, 3)
    sampler.sample(V, normal(2, 3), cond, null, steps=4, mu=0.5, s_rule=s_rule, guidance=guidance)
    grid = sampler.time_grid(4, 0.5)
    for call, t, t_next in zip(V.calls, grid, grid[1:]):
        assert call.t.unique().item() == t
        assert call.s.unique().item() == pytest.approx(t_next + s_rule * (t - t_next), abs=1e-14)


def test_the_default_s_is_the_next_time_and_the_default_eta_is_1():
    V, W = Spy(), Spy()
    cond, _ = prompts(2, 3)
    noise = [normal(2, 3, seed=9 + k) for k in range(3)]
    out = sampler.sample(V, normal(2, 3), cond, steps=3, draw_noise=noise.__getitem__)
    again = sampler.sample(W, normal(2, 3), cond, steps=3, s_rule=0.0, eta=1.0, draw_noise=noise.__getitem__)
    assert torch.equal(out, again)
    assert [call.s[0].item() for call in V.calls] == pytest.approx([2 / 3, 1 / 3, 0])


@pytest.mark.parametrize("space", ["v", "x0"])
@pytest.mark.parametrize("guidance", [0.0, 0.5, 2.0, 5.0])
@pytest.mark.parametrize("shape", [(2,), (3, 4, 5)])
def test_ep_cfg_keeps_the_norm_and_the_direction(shape, guidance, space):
    """Sample by sample: parallel to V_null + w (V_c - V_null) and as long as V_c; the same with x0_hat for V."""
    B, V = 4, Spy()
    cond, null = prompts(B, *shape)
    x_t, (t, s) = normal(B, *shape), torch.tensor([[1.0, 0.8, 0.5, 0.1], [0.9, 0.8, 0.0, 0.05]], dtype=F64)
    x0_hat = sampler.predict(V, x_t, t, s, cond, null, guidance, space)
    t_ = t.reshape([-1] + [1] * len(shape))
    c, n = V(x_t, t, s, *cond), V(x_t, t, s, *null)
    kept = (x_t - x0_hat) / t_
    if space == "x0":
        c, n, kept = x_t - t_ * c, x_t - t_ * n, x0_hat
    guided = (1 - guidance) * n + guidance * c
    for i in range(B):
        assert kept[i].norm().item() == pytest.approx(c[i].norm().item(), rel=1e-10)
        assert ((kept[i] * guided[i]).sum() / (kept[i].norm() * guided[i].norm())).item() == pytest.approx(
            1, abs=1e-10
        )
    assert (kept - c).norm() > 0.1


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_an_unknown_space_is_refused_with_guidance_and_without(guidance):
    V, t = lambda x_t, *_: x_t, torch.tensor([0.5])
    with pytest.raises(ValueError, match='space must be "v" or "x0"'):
        sampler.predict(V, torch.ones(1, 2), t, t, (), (), guidance, "eps")


@pytest.mark.parametrize("space", ["v", "x0"])
def test_guidance_near_1_is_no_guidance(space):
    V, (cond, null) = Spy(), prompts(3, 4)
    args = normal(3, 4), torch.full((3,), 0.7, dtype=F64), torch.full((3,), 0.2, dtype=F64)
    plain = sampler.predict(V, *args, cond, None, 1.0, space)
    close(sampler.predict(V, *args, cond, null, 1 + 1e-9, space), plain, 1e-7)


@pytest.mark.parametrize("space", ["v", "x0"])
def test_guidance_with_equal_branches_changes_nothing(space):
    V, (cond, _) = Spy(), prompts(3, 4)
    args = normal(3, 4), torch.full((3,), 0.7, dtype=F64), torch.full((3,), 0.2, dtype=F64)
    close(
        sampler.predict(V, *args, cond, cond, 5.0, space), sampler.predict(V, *args, cond, None, 1.0, space)
    )


@pytest.mark.parametrize("norm", [0.0, 1.0, 50.0])
def test_a_guided_prediction_of_zero_stays_zero(norm):
    conditional = torch.full((2, 4), norm / 2)
    assert torch.equal(sampler.energy_preserving(torch.zeros(2, 4), conditional), torch.zeros(2, 4))


# ============================================================================================================
# Noise, gradients, types
# ============================================================================================================
@pytest.mark.parametrize(
    "eta, asked", [(0.0, []), (0.5, [0, 1, 2]), (1.0, [0, 1, 2]), ("renoise", [0, 1, 2])]
)
def test_noise_is_asked_for_by_step_and_never_for_the_last(eta, asked):
    seen, (cond, _) = [], prompts(2, 3)

    def draw_noise(k):
        seen.append(k)
        return normal(2, 3, seed=k)

    sampler.sample(Spy(), normal(2, 3), cond, steps=4, eta=eta, draw_noise=draw_noise)
    assert seen == asked


def test_without_draw_noise_torch_draws_it():
    cond, _ = prompts(2, 3)
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(sampler.sample(Spy(), normal(2, 3), cond, steps=4))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_sampling_takes_no_gradient_and_leaves_the_callers_mode_alone():
    weight = torch.ones((), dtype=F64, requires_grad=True)
    for _, x, x0_hat in sampler.trajectory(lambda x, t, s: weight * x, normal(2, 3), (), steps=3):
        assert torch.is_grad_enabled() and not x.requires_grad and not x0_hat.requires_grad


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_fp32_stays_fp32_and_agrees_with_fp64(eta, guidance):
    cond, null = prompts(3, 2, 4)
    noise = [normal(3, 2, 4, seed=20 + k) for k in range(8)]
    results = []
    for dtype in (torch.float32, F64):
        c, n = (tuple(x.to(dtype) for x in p) for p in (cond, null))
        out = sampler.sample(
            Spy(),
            normal(3, 2, 4).to(dtype),
            c,
            n,
            steps=8,
            mu=1.15,
            eta=eta,
            guidance=guidance,
            draw_noise=lambda k: noise[k].to(dtype),
        )
        assert out.dtype == dtype and out.isfinite().all()
        results.append(out.double())
    close(*results, 1e-4)
