"""peers/: the fixed points of the other any-step objectives, and their whole steps computed by hand.

The other route to a fixed point is the flow itself: the exact velocity of the mixture, integrated by Runge-Kutta. The
other route to a whole step is a loop over samples, with full Jacobians, the standard library's inverse normal
distribution, and points of the straight path mixed from x0 and eps.
"""

import math
from statistics import NormalDist

import torch
from torch import Tensor

from losses import Draws
from peers import imm
from peers.meanflow import MeanFlow, path_derivative
from peers.shortcut import Shortcut
from peers.tim import EPSILON, TiM, guided_velocity, path_difference, target
from toy.checks.stage import check, hermite, points, q, random, worst
from toy.checks.step import PHI, SmallNet

N = 8  # points of a check


def flow(x: Tensor, t: Tensor, r: Tensor, c: Tensor, steps: int = 24) -> Tensor:
    """x at time t carried to time r > 0 along dx/dt = V(x, t), by the classical Runge-Kutta rule."""
    h = (r - t) / steps
    for _ in range(steps):
        k1 = q.V(x, t, t, c)
        k2 = q.V(x + h[:, None] / 2 * k1, t + h / 2, t, c)
        k3 = q.V(x + h[:, None] / 2 * k2, t + h / 2, t, c)
        k4 = q.V(x + h[:, None] * k3, t + h, t, c)
        x, t = x + h[:, None] / 6 * (k1 + 2 * k2 + 2 * k3 + k4), t + h
    return x


def average_velocity(x: Tensor, t: Tensor, r: Tensor, c: Tensor) -> Tensor:
    """u(x, t, r) = (x - flow to r) / (t - r), and V itself where r = t: what every objective of peers/ asks for."""
    gap = torch.where(t > r, t - r, 1.0)[:, None]
    return torch.where((t > r)[:, None], (x - flow(x, t, r, c)) / gap, q.V(x, t, t, c))


def two_times(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_t where q(x_t) has mass, t in (0.3, 0.95), r in (0.05, t), conditions: [N] each."""
    x, t, c = points(N, seed)
    t = 0.3 + 0.65 * (t - t.min()) / (t.max() - t.min())
    r = 0.05 + (t - 0.05) * torch.from_numpy(random(seed + 1).uniform(0, 1, N))
    return x, t, r, c


def pairs(x: Tensor, t: Tensor, c: Tensor, n: int = 6) -> tuple[Tensor, Tensor]:
    """v = eps - x0 of the pairs that meet in x_t, [P, N, 2], and their weights [P, N], by Gauss-Hermite quadrature."""
    z, w = hermite(n, 2)
    shares, means, var = q.posterior(x, t, c)  # [N, K], [N, K, 2], [N, K]
    x0 = means[None] + var.sqrt()[None, :, :, None] * z[:, None, None]  # [n^2, N, K, 2]
    v = (x[:, None] - x0) / t[:, None, None]
    return v.transpose(1, 2).flatten(0, 1), (w[:, None, None] * shares).transpose(1, 2).flatten(0, 1)


def mean_over(values: Tensor, weights: Tensor) -> Tensor:
    """Of values [P, N, 2] under weights [P, N]: [N, 2]."""
    return (weights[..., None] * values).sum(0)


def meanflow_targets(x, t, r, c, improved: bool = False) -> tuple[Tensor, Tensor]:
    """MeanFlow's targets for all pairs where the network is the exact average velocity, and the pairs' weights.

    The derivative is linear in the direction, so three Jacobian-vector products serve all pairs.
    """
    v, weights = pairs(x, t, c)
    directions = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    slopes = [path_derivative(average_velocity, x, e.expand_as(x), t, r, (c,)) for e in directions]
    at_rest, along_1, along_2 = slopes
    w = q.V(x, t, t, c).expand_as(v) if improved else v
    du_dt = at_rest + w[..., :1] * (along_1 - at_rest) + w[..., 1:] * (along_2 - at_rest)
    return torch.stack([target(v_i, t, r, d) for v_i, d in zip(v, du_dt)]), weights


@check("MeanFlow", "the mean of its target over all pairs is the exact average velocity", below=1e-5)
def meanflow_rests():
    x, t, r, c = two_times(200)
    return worst(mean_over(*meanflow_targets(x, t, r, c)) - average_velocity(x, t, r, c))


@check("improved MeanFlow", "the same, moving along the network's own velocity", below=1e-5)
def improved_meanflow_rests():
    x, t, r, c = two_times(202)
    return worst(mean_over(*meanflow_targets(x, t, r, c, True)) - average_velocity(x, t, r, c))


@check("TiM", "the mean of its target is the average velocity, but for the finite difference", below=2e-3)
def tim_rests():
    x, t, r, c = two_times(206)
    r = torch.minimum(r, t - 2 * EPSILON)
    v, weights = pairs(x, t, c)
    rows = [a.repeat(len(v), *[1] * (a.dim() - 1)) for a in (x, t, r, c)]  # every pair a row of its own
    dF_dt = path_difference(average_velocity, rows[0], v.flatten(0, 1), rows[1], rows[2], (rows[3],))
    targets = target(v.flatten(0, 1), rows[1], rows[2], dF_dt).view_as(v)
    return worst(mean_over(targets, weights) - average_velocity(x, t, r, c))


@check("shortcut", "two half steps of the exact flow are one: the target is the average velocity", below=1e-6)
def shortcut_rests():
    x, t, _, c = two_times(208)
    two_halves = Shortcut(None, average_velocity).two_halves(x, t, t / 2, (c,), (q.null(c),))
    return worst(two_halves - average_velocity(x, t, t / 2, c))


@check("guided training", "at F_c = F_null + w (v_c - F_null) the guided target's mean is F_c", below=1e-9)
def guided_velocity_rests():
    x, t, _, c = two_times(210)
    v_c, F_null, w = q.V(x, t, t, c), q.V(x, t, t, q.null(c)), 2.5
    F_c = F_null + w * (v_c - F_null)
    v, weights = pairs(x, t, c)
    return worst(mean_over(guided_velocity(v, F_c, F_null, w), weights) - F_c)


@check("the sampler of peers/", "with the exact average velocity 1, 2, 3 steps end at one point", below=1e-5)
def any_number_of_steps_agrees():
    x, _, _, c = two_times(212)

    def V(x, t, s, c):  # the flow ends at 0.05, where the mixture is smooth; times are stretched accordingly
        return 0.95 * average_velocity(x, 0.05 + 0.95 * t, 0.05 + 0.95 * s, c)

    ends = [list(imm.trajectory(V, x, (c,), steps=n, start=1.0))[-1][1] for n in (1, 2, 3)]
    return worst(ends[1] - ends[0], ends[2] - ends[0])


def same_step(module, seed: int, below: list[int], by_hand, n: int = 16) -> float:
    """The largest difference of loss and gradient from those of `by_hand`, a function of one sample's numbers."""
    g = random(seed)
    x0, eps = (torch.from_numpy(g.standard_normal((n, 2))) for _ in range(2))
    c, z, u = (torch.from_numpy(a) for a in (g.integers(0, PHI, n), g.standard_normal(n), g.random(n)))
    is_null, null = torch.from_numpy(g.random(n) < 0.2), torch.full((n,), PHI)
    c = torch.where(is_null, PHI, c)
    draws = Draws(z, u, eps, eps, torch.tensor(below))
    loss, stats = module(x0, (c,), (null,), None, is_null, draws, 1.0, 0.0)
    rows = zip(x0, c.tolist(), z.tolist(), u.tolist(), eps)
    losses, plain = zip(*(by_hand(*row, i in below) for i, row in enumerate(rows)))
    other, weights = torch.stack(losses).mean(), list(module.network.parameters())
    gradients = zip(*(torch.autograd.grad(value, weights) for value in (loss, other)))
    return worst(loss - other, stats["loss"] - torch.stack(plain), *(a - b for a, b in gradients))


def sigmoid(a: float) -> float:
    return 1 / (1 + math.exp(-a))


def guided_by_hand(network: SmallNet, v: Tensor, x: Tensor, t: float, c: int, w: float) -> Tensor:
    return v + (1 - 1 / w) * (network.at(x, t, t, c) - network.at(x, t, t, PHI)).detach()


@check("TiM", "the whole step, guided by the EMA at 0.3 <= t <= 0.8: loss and gradient by hand", below=1e-9)
def tim_step():
    network, ema, w = SmallNet(220), SmallNet(221), 3.0

    def by_hand(x0, c, z, u, eps, is_below):
        to_data, u = u < 0.2, u / 0.2 if u < 0.2 else (u - 0.2) / 0.8
        a, b = sigmoid(1.6 * z), sigmoid(1.6 * NormalDist().inv_cdf(u))
        t = max(a, b)
        r = (0.0 if to_data else min(a, b)) if is_below else t
        x, v = (1 - t) * x0 + t * eps, eps - x0
        goal = guided_by_hand(ema, v, x, t, c, w) if 0.3 <= t <= 0.8 else v
        if is_below:
            later, earlier = ((1 - i) * x0 + i * eps for i in (t + 0.005, t - 0.005))
            rise = network.at(later, t + 0.005, r, c) - network.at(earlier, t - 0.005, r, c)
            goal = goal - (t - r) * rise.detach() / 0.01
        error = (network.at(x, t, r, c) - goal).square().mean()
        weight = (1 + math.tan(t) - math.tan(r)) ** -0.5
        return weight * error / (error.detach() + 1e-5), error.detach()

    return same_step(TiM(network, ema, w), 224, list(range(1, 16, 2)), by_hand)


def meanflow_by_hand(network: SmallNet, w: float, improved: bool):
    def by_hand(x0, c, z, u, eps, is_below):
        a, b = sigmoid(z - 0.4), sigmoid(NormalDist().inv_cdf(u) - 0.4)
        t, r = max(a, b), min(a, b) if is_below else max(a, b)
        x = (1 - t) * x0 + t * eps
        goal = v = guided_by_hand(network, eps - x0, x, t, c, w)
        if is_below:
            along = network.at(x, t, t, c).detach() if improved else v

            def u_of(x, t):
                one = torch.ones(1, dtype=torch.float64)
                return network(x[None], t * one, r * one, torch.tensor([c]))[0]

            here = (x, torch.tensor(t, dtype=torch.float64))
            by_x, by_t = torch.autograd.functional.jacobian(u_of, here)
            goal = v - (t - r) * (by_x @ along + by_t)
        error = (network.at(x, t, r, c) - goal).square().sum()
        return error / (error.detach() + 1e-3), error.detach() / 2

    return by_hand


def meanflow_step_against(seed: int, below: list[int], improved: bool) -> float:
    network, w = SmallNet(seed), 2.0
    module = MeanFlow(network, w, improved, "forward")
    return same_step(module, seed + 1, below, meanflow_by_hand(network, w, improved))


@check("MeanFlow", "the whole step, guided: loss and gradient by hand, with a full Jacobian", below=1e-9)
def meanflow_step():
    return meanflow_step_against(230, [3, 7, 11, 15], False)


@check("improved MeanFlow", "the whole step, guided: loss and gradient, with a full Jacobian", below=1e-9)
def improved_meanflow_step():
    return meanflow_step_against(240, list(range(1, 16, 2)), True)


@check("shortcut", "the whole step, guided where d/2 = 1/128: loss and gradient by hand", below=1e-9)
def shortcut_step():
    network, ema, w = SmallNet(250), SmallNet(251), 2.0

    def half_step(x, t, h, c):
        v, v_null = (ema.at(x, t, t - h, prompt).detach() for prompt in (c, PHI))
        return v_null + w * (v - v_null) if h == 1 / 128 else v

    def by_hand(x0, c, z, u, eps, is_below):
        d = 2.0 ** -int(7 * u) if is_below else 1 / 128
        t = 1 - d * min(int(NormalDist().cdf(z) / d), round(1 / d) - 1)
        x, goal = (1 - t) * x0 + t * eps, eps - x0
        if is_below:
            v_1 = half_step(x, t, d / 2, c)
            middle = (x - d / 2 * v_1).clamp(-4, 4)
            goal = ((v_1 + half_step(middle, t - d / 2, d / 2, c)) / 2).clamp(-4, 4)
        error = (network.at(x, t, t - d, c) - goal).square().mean()
        return error, error.detach()

    return same_step(Shortcut(network, ema, w), 252, list(range(16)), by_hand)
