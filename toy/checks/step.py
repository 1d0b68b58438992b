"""The whole step: losses.SelfE against the paper read aloud, one sample at a time."""

import numpy as np
import torch
from torch import Tensor

import losses
from peers import variants
from toy.checks.stage import SEED, check, points, random, worst

PHI = 3  # the null prompt of the small network; "fake image " + prompt c is c + 4


class SmallNet(torch.nn.Module):
    """A velocity with a few parameters and no meaning; what is checked is how a step uses it."""

    def __init__(self, seed: int):
        super().__init__()
        g = torch.Generator().manual_seed(SEED[0] + seed)
        self.inner = torch.nn.Parameter(torch.randn(4 + 8, 6, dtype=torch.float64, generator=g))
        self.outer = torch.nn.Parameter(torch.randn(6, 2, dtype=torch.float64, generator=g))

    def forward(self, x_t: Tensor, t: Tensor, s: Tensor, c: Tensor) -> Tensor:
        code = torch.nn.functional.one_hot(c, 8)
        return torch.tanh(torch.cat([x_t, t[:, None], s[:, None], code], dim=1) @ self.inner) @ self.outer

    def at(self, x: Tensor, t: float, s: float, c: int) -> Tensor:
        """V at one point [2]."""
        t, s = (torch.tensor([float(value)], dtype=torch.float64) for value in (t, s))
        return self(x[None], t, s, torch.tensor([int(c)]))[0]


MU = 0.5
OPTIONS = dict(target="renorm", k=0.9, delta_scale=1.0, lam_scale=1.0, lam_time="s", null_target="data")
SETTINGS = [  # what the paper does, and each choice of the constructor once
    dict(),
    dict(aux=True),
    dict(target="tar"),
    dict(target="sum", aux=True, k=0.5),
    dict(delta_scale=0.0, lam_scale=0.5),
    dict(delta_scale=2.0, null_target="renorm"),
    dict(null_target="renorm", aux=True),
    dict(lam_time="middle"),
    dict(null_target="literal"),
    dict(third_unconditional=True, tau=0.5),
]


def paper_step(networks: tuple, batch: tuple, tau: float, aux: bool, options: dict) -> Tensor:
    """Fig. 2 and Eq. 1-21, s.8-s.13 with scalars t and s: the sum over the batch of the loss per value of x0.

    networks: trained, moving average, that of the null branch; batch: x0, c, is_null, draws; options like OPTIONS.
    """
    net, ema, uncond = networks
    x0, c, is_null, d = batch
    target, k, delta_scale, lam_scale, lam_time, null_target = options.values()
    total = 0.0
    for i in range(len(x0)):
        odds = np.exp(MU + float(d.z[i]))
        t = odds / (1 + odds)
        evaluated = i in d.below.tolist()
        s = t - tau * float(d.u[i]) * t if evaluated else t

        def G(network, x, t, s, prompt):
            return x - t * network.at(x, t, s, prompt)

        x_t = (1 - t) * x0[i] + t * d.eps[i]
        x0_hat = G(net, x_t, t, s, c[i])
        if not evaluated:
            total = total + ((x0_hat - x0[i]) ** 2).sum() / t**2
            continue
        x_s = ((1 - s) * x0_hat + s * d.eps_s[i]).detach()
        G_null = G(uncond, x_s, s, s, PHI)
        G_c = G_null if is_null[i] and null_target != "literal" else G(ema, x_s, s, s, c[i])
        Delta = G_null - G_c
        if aux:
            G_fake = G(net, x_s, s, s, c[i] + 4)
            Delta = k * (G_null - G_c) + (1 - k) * (G_fake - G_c)
            total = total + ((G_fake - x0_hat.detach()) ** 2).sum() / s**2  # s.8 as a velocity loss
        x_self = (x0_hat - delta_scale * Delta).detach()
        other = (t + s) / 2 if lam_time == "middle" else s
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
    return total / len(x0) / 2


def step_against_paper(setting: dict) -> tuple[float, float]:
    """Largest relative error of the loss and of its gradient with respect to the network, for one row of SETTINGS."""
    aux, tau = setting.get("aux", False), setting.get("tau", 1.0)
    options = OPTIONS | {name: setting[name] for name in setting.keys() & OPTIONS.keys()}
    net, ema, third = SmallNet(1), SmallNet(2), SmallNet(3)
    unconditional = third if "third_unconditional" in setting else net
    n, rng = 12, random(9)
    normal = lambda *shape: torch.from_numpy(rng.standard_normal(shape))  # noqa: E731
    is_null = torch.arange(n) % 5 == 3  # one of them has s < t, one has not
    c = torch.where(is_null, PHI, torch.arange(n) % 3)
    x0, z, u = normal(n, 2) + 0.5, normal(n), torch.from_numpy(rng.random(n))
    draws = losses.Draws(z, u, normal(n, 2), normal(n, 2), torch.arange(1, n, 2))

    step = variants.Variant(net, ema, unconditional=unconditional, **options)
    value, _ = step(x0, (c,), (torch.full_like(c, PHI),), (c + 4,), is_null, draws, tau, MU, aux)
    letter = paper_step((net, ema, unconditional), (x0, c, is_null, draws), tau, aux, options)
    others = [*ema.parameters(), *third.parameters()]
    if any(g is not None for g in torch.autograd.grad(value, others, allow_unused=True, retain_graph=True)):
        return torch.inf, torch.inf  # the evaluating networks must not be trained
    ours, theirs = (torch.autograd.grad(v, list(net.parameters())) for v in (value, letter))
    error = worst(*(a - b for a, b in zip(ours, theirs))) / worst(*theirs)
    return worst(value - letter) / float(letter.detach()), error


@check("Fig. 2, Eq. 5-21", "SelfE's loss = the paper per sample, 10 settings (relative)", below=1e-10)
def whole_step_value():
    return max(step_against_paper(setting)[0] for setting in SETTINGS)


@check("Fig. 2, Eq. 14", "... and its gradient: only x0_hat and the fake branch learn", below=1e-10)
def whole_step_gradient():
    return max(step_against_paper(setting)[1] for setting in SETTINGS)


@check("Sec. 3.1", "no s < t at all: SelfE is flow matching, Eq. 3 by autograd (loss, gradient)", below=1e-12)
def flow_matching_is_the_same_module():
    net, n = SmallNet(1), 16
    x0, eps, z = points(n)[0], points(n, 1)[0], torch.linspace(-2, 2, n, dtype=torch.float64)
    c, is_null = torch.arange(n) % 3, torch.zeros(n, dtype=torch.bool)
    draws = losses.Draws(z, z.abs() / 3, eps, eps, losses.below_positions(list(range(n)), 1.0))
    value, _ = losses.SelfE(net, SmallNet(2))(x0, (c,), (c,), None, is_null, draws, 1.0, 0.0)
    t = torch.sigmoid(z)
    letter = ((net((1 - t)[:, None] * x0 + t[:, None] * eps, t, t, c) - (eps - x0)) ** 2).mean()
    pair = zip(*(torch.autograd.grad(loss, list(net.parameters())) for loss in (value, letter)))
    return worst(value - letter, *(a - b for a, b in pair))
