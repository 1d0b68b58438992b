"""imm.py against the IMM formulas written out: double loops, finite differences, and sets whose fate is known."""

import math

import pytest
import torch

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


def loop(x0, c, eps, u_t, u_s, V):
    """The loss pair by pair, as the paper writes it: DDIM for x_r, weight by log-SNR, eta(r) by bisection."""
    total = []
    for g in range(len(u_t)):
        t = 0.994 * u_t[g].item()
        s = u_s[g].item() * t
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
            y_r.append((x_r - (r - s) * V(x_r, r, s, c[i])).detach())

        def k(x, y, t=t, s=s):
            squared = (x - y).square().sum()
            return torch.exp(-squared.clamp_min(1e-16).sqrt() / (x.numel() * (t - s)))

        both = [(*one, *other) for one in zip(y_t, y_r) for other in zip(y_t, y_r)]
        mmd = sum(k(a, a2) + k(b, b2) - 2 * k(a, b2) for a, b, a2, b2 in both) / 16
        snr = 2 * math.log((1 - t) / t)
        slope = -2 / (t * (1 - t))
        total.append(0.5 / (1 + math.exp(snr - 4)) * -slope * (1 - t) ** 2 / ((1 - t) ** 2 + t**2) * mmd)
    return sum(total) / len(total) * x0[0].numel() ** 0.5  # the factor that IMM documents


def test_the_loss_and_its_gradient_are_those_of_the_double_loop():
    """Only y_t carries gradient."""
    x0, c, draws = batch(16)
    network = Field()
    value, stats = loss_of(network, x0, c, draws)
    a, b = network.w
    expected = loop(x0, c[0], draws.eps, *draws[:2], lambda x, t, s, c: a * torch.tanh(x) + b * s - t * c)
    assert value.item() == pytest.approx(expected.item(), rel=1e-10) and expected > 1e-4
    ours, theirs = (torch.autograd.grad(loss, network.w)[0].tolist() for loss in (value, expected))
    assert ours == pytest.approx(theirs, rel=1e-8)
    assert (stats["r"] > stats["s"]).tolist() == [False, True, False, True]
    assert stats["loss"].mean().item() == pytest.approx(expected.item())


def test_coincident_points_give_no_nan():
    points = torch.zeros(2, 4, 6)
    points[0, 1] = 1e-30  # closer than any float can square
    y_t, y_r = points.clone().requires_grad_(), points.clone()
    for gap in (0.5, 0.0):  # 0: t = s, when the first uniform number is zero
        loss = imm.discrepancy(y_t, y_r, torch.full((2,), gap)).sum()
        (gradient,) = torch.autograd.grad(loss, y_t)
        assert loss.isfinite() and (gradient == 0).all()


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


def test_guidance_is_linear_in_the_velocity():
    def V(x, t, s, c):
        return c

    c, null = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.2, 0.5]])
    *_, (_, end) = imm.trajectory(V, torch.zeros(1, 2), (c,), (null,), steps=3, guidance=2.5)
    assert torch.allclose(end, -0.994 * (null + 2.5 * (c - null)))
    with pytest.raises(ValueError, match="at least 1"):
        next(imm.trajectory(V, c, (c,), steps=0))


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
