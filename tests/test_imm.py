"""imm.py against the IMM formulas written out: double loops, finite differences, and sets whose fate is known."""

import math

import numpy as np
import pytest
import torch

import sampler
from losses import add_noise
from peers import imm
from rng import rng


class Field(torch.nn.Module):
    """A small velocity field with two weights that reads all its arguments: V = a tanh(x) + b s - t c."""

    def __init__(self, a=0.7, b=-0.4, dtype=torch.float64):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([a, b], dtype=dtype))

    def forward(self, x, t, s, c):
        times = [u.view(-1, *[1] * (x.dim() - 1)) for u in (t, s)]
        return self.w[0] * torch.tanh(x) + self.w[1] * times[1] - times[0] * c


def batch(n=8, shape=(3, 2), seed=0):
    """x0, c and Draws in float64, with times of both kinds: r > s and r = s."""
    random = rng(seed, "batch")
    x0, c, eps = (torch.from_numpy(random.standard_normal((n, *shape))) for _ in range(3))
    u_t = torch.linspace(0.5, 0.97, n // 4, dtype=torch.float64)
    u_s = torch.tensor([0.999, 0.3] * n, dtype=torch.float64)[: n // 4]
    return x0, (c,), imm.Draws(u_t, u_s, eps)


def loss_of(network, x0, c, draws):
    return imm.IMM(network)(x0, c, c, None, torch.zeros(len(x0), dtype=torch.bool), draws, 1.0, 0.0)


# ------------------------------------------------------------------------------------------------------------
# The loss
# ------------------------------------------------------------------------------------------------------------
def loop(x0, c, eps, u_t, u_s, V):
    """The loss in numpy, pair by pair, as the paper writes it: DDIM for x_r, weight by log-SNR, eta(r) by bisection."""
    total = []
    for g in range(len(u_t)):
        t = 0.994 * u_t[g]
        s = u_s[g] * t
        low, high = 0.0, t
        for _ in range(200):  # eta(r) = eta(t) - 160 / 4096
            r = (low + high) / 2
            low, high = (r, high) if r / (1 - r) < t / (1 - t) - 160 / 4096 else (low, r)
        r = max(s, r)
        y_t, y_r = [], []
        for i in range(4 * g, 4 * g + 4):
            x_t = (1 - t) * x0[i] + t * eps[i]
            x_r = (1 - r) * x0[i] + r / t * (x_t - (1 - t) * x0[i])  # DDIM from t to r, towards x0
            y_t.append(x_t - (t - s) * V(x_t, t, s, c[i]))
            y_r.append(x_r - (r - s) * V(x_r, r, s, c[i]))

        def k(x, y, t=t, s=s):
            return math.exp(-max(np.sqrt(((x - y) ** 2).sum()), 1e-8) / (x.size * (t - s)))

        both = [(*one, *other) for one in zip(y_t, y_r) for other in zip(y_t, y_r)]
        mmd = sum(k(a, a2) + k(b, b2) - 2 * k(a, b2) for a, b, a2, b2 in both) / 16
        snr = 2 * math.log((1 - t) / t)
        slope = -2 / (t * (1 - t))
        total.append(0.5 / (1 + math.exp(snr - 4)) * -slope * (1 - t) ** 2 / ((1 - t) ** 2 + t**2) * mmd)
    return sum(total) / len(total) * x0[0].size ** 0.5  # the factor that IMM documents


def test_the_loss_is_the_double_loop():
    x0, c, draws = batch(16)
    value, stats = loss_of(Field(), x0, c, draws)
    arrays = [a.numpy() for a in (x0, c[0], draws.eps, draws.u_t, draws.u_s)]
    expected = loop(*arrays, lambda x, t, s, c: 0.7 * np.tanh(x) - 0.4 * s - t * c)
    assert value.item() == pytest.approx(expected, rel=1e-10) and expected > 1e-4
    assert (stats["r"] > stats["s"]).tolist() == [False, True, False, True]
    assert stats["loss"].mean().item() == pytest.approx(expected)


def test_only_y_t_carries_gradient():
    """Autograd against finite differences of the loss in which the other set stays where it is."""
    x0, c, draws = batch()
    network = Field()
    loss_of(network, x0, c, draws)[0].backward()
    t, s, r = (a.repeat_interleave(4) for a in imm.times(draws.u_t, draws.u_s))
    gap = (t - s)[::4]

    def value(w_t, w_r):
        with torch.no_grad():
            y_t = imm.jump(Field(*w_t), add_noise(x0, t, draws.eps), t, s, c).unflatten(0, (-1, 4))
            y_r = imm.jump(Field(*w_r), add_noise(x0, r, draws.eps), r, s, c).unflatten(0, (-1, 4))
            return (imm.weight(t[::4]) * imm.discrepancy(y_t, y_r, gap)).mean().item() * 6**0.5

    w, h = np.array([0.7, -0.4]), 1e-5
    sides = [(w + h * e, w - h * e) for e in np.eye(2)]
    through_t = [(value(up, w) - value(down, w)) / (2 * h) for up, down in sides]
    through_both = [(value(up, up) - value(down, down)) / (2 * h) for up, down in sides]
    assert network.w.grad.tolist() == pytest.approx(through_t, rel=1e-3)
    through_r = np.abs(np.subtract(through_both, through_t))
    assert through_r.max() > 1e-2 * np.abs(through_t).max()  # they can be told apart


# ------------------------------------------------------------------------------------------------------------
# What the loss does to a set of samples
# ------------------------------------------------------------------------------------------------------------
def settle(m):
    """Where m samples that start close together end, facing half a set at -1 and half at +1, under a wide kernel.

    In groups of one, each sample meets each one of the other set in turn; here the mean over all pairings.
    """
    n = max(m, 2)
    y = torch.linspace(-0.02, 0.02, n, dtype=torch.float64)[:, None]
    y_r = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat_interleave(n // 2)[:, None]
    for _ in range(400):
        y.requires_grad_()
        sets = (y[None], y_r[None])
        if m == 1:
            sets = y.repeat_interleave(n, 0)[:, None], y_r.repeat(n, 1)[:, None]
        loss = imm.discrepancy(*sets, torch.full((len(sets[0]),), 20.0, dtype=torch.float64)).mean()
        (gradient,) = torch.autograd.grad(loss, y)
        y = (y - 0.5 * gradient).detach()
    return sorted(y.flatten().tolist())


@pytest.mark.parametrize("m, ends", [(1, [0, 0]), (2, [-1, 1]), (4, [-1, -1, 1, 1])])
def test_groups_spread_over_the_set_they_face_and_single_samples_stay_between_its_points(m, ends):
    assert settle(m) == pytest.approx(ends, abs=0.1)


def test_coincident_points_give_no_nan():
    points = torch.zeros(2, 4, 6)
    points[0, 1] = 1e-30  # closer than any float can square
    y_t, y_r = points.clone().requires_grad_(), points.clone()
    for gap in (0.5, 0.0):  # 0: t = s, when the first uniform number is zero
        loss = imm.discrepancy(y_t, y_r, torch.full((2,), gap)).sum()
        (gradient,) = torch.autograd.grad(loss, y_t)
        assert loss.isfinite() and (gradient == 0).all()


# ------------------------------------------------------------------------------------------------------------
# Times and weights
# ------------------------------------------------------------------------------------------------------------


def test_draws_belong_to_the_global_index():
    together = imm.draw(3, 7, list(range(16, 32)), (2, 2))
    parts = [imm.draw(3, 7, list(range(a, a + 8)), (2, 2)) for a in (16, 24)]
    for a, b in zip(together, zip(*parts)):
        assert torch.equal(a, torch.cat(b))
    assert len(set(together.u_t.tolist())) == 4 and together.eps.shape == (16, 2, 2)
    assert not torch.equal(together.u_t, imm.draw(3, 8, list(range(16, 32)), (2, 2)).u_t)
    for cut in ([2, 3, 4, 5], [0, 1, 2], [0, 1, 2, 4]):
        with pytest.raises(ValueError, match="groups of 4"):
            imm.draw(3, 7, cut, (2,))


# ------------------------------------------------------------------------------------------------------------
# With the network, and sampling
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_sampler_pushes_forward_on_a_linear_grid(steps):
    calls = []

    def V(x, t, s, c):
        calls.append((t[0].item(), s[0].item()))
        return (x - c) / t[:, None]  # exact for data that is the point c

    x, c = torch.randn(3, 2), torch.tensor([[1.0, -2.0]]).repeat(3, 1)
    end = imm.sample(V, x, (c,), steps=steps)
    assert torch.allclose(end, c, atol=1e-5)
    grid = np.linspace(0.994, 0, steps + 1)
    assert np.allclose(calls, list(zip(grid[:-1], grid[1:])))


def test_guidance_is_linear_in_the_velocity():
    def V(x, t, s, c):
        return c

    c, null = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.2, 0.5]])
    end = imm.sample(V, torch.zeros(1, 2), (c,), (null,), steps=3, guidance=2.5)
    assert torch.allclose(end, -0.994 * (null + 2.5 * (c - null)))
    with pytest.raises(ValueError, match="at least 1"):
        imm.sample(V, c, (c,), steps=0)


def test_its_jump_is_the_deterministic_step_of_the_sampler():
    """f_{s,t}(x_t) is Eq. 22 with s_k = s, so one network serves both samplers."""
    x, c = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    network, (t, s) = Field(), torch.tensor([[0.8] * 2, [0.3] * 2], dtype=torch.float64)
    with torch.no_grad():
        expected = sampler.update(x, x - 0.8 * network(x, t, s, c), 0.8, 0.3, 0.0, None)
        assert torch.allclose(imm.jump(network, x, t, s, (c,)), expected)


@pytest.mark.parametrize("k", [12, 8, 6])
def test_k_sets_how_far_truth_spreads_in_one_step(k):
    """Walking from t to r again and again takes eta to 0 in ceil(eta / (160 / 2^k)) steps; r is never below s."""
    t, steps = torch.tensor([0.5], dtype=torch.float64), 0
    while t > 0:
        t, _, r = imm.times(t / imm.T_MAX, torch.zeros(1, dtype=torch.float64), k)
        assert r < t
        t, steps = r, steps + 1
    assert steps == math.ceil(round(1 / (160 / 2**k), 9))
    u = torch.rand(2, 4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, s, r = imm.times(*u, k)
    assert (r >= s).all() and (r <= t).all()
    least, most = {12: (0, 0.015), 8: (0.08, 0.15), 6: (0.5, 0.6)}[k]  # what the module's text says
    assert least <= (r == s)[t > 0.5].double().mean() <= most
