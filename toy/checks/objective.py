"""Sec. 3.3: the objective; and S.2: the distribution of (t, s)."""

import torch
from torch import Tensor

import losses
from toy.checks.stage import check, points, random, worst


def pairs(n: int = 256) -> tuple[Tensor, ...]:
    """x0, x0_hat, Delta [n, 2], times s < t < 1 [n], and lambda as Eq. 17 has it: sigma_t/alpha_t - sigma_s/alpha_s."""
    rng = random(5)
    t = torch.from_numpy(rng.uniform(0.1, 0.95, n))
    s = t * torch.from_numpy(rng.uniform(0.0, 0.98, n))
    return points(n)[0], points(n, 1)[0], points(n, 2)[0], t, s, t / (1 - t) - s / (1 - s)


@check("Eq. 17", "lambda = sigma_t/alpha_t - sigma_s/alpha_s, and 0 at s = t", below=1e-12)
def weight_of_self_evaluation():
    *_, t, s, lam = pairs()
    return worst((losses.lam(t, s) - lam) / (1 + lam), losses.lam(t, t))


@check("Eq. 17-18", "at t = 1 the target is x_self, and at s = t = 1 it is x0", below=1e-12)
def target_at_the_noise_end():
    x0, x0_hat, Delta, _, s, _ = pairs()
    x_self, one = x0_hat - Delta, torch.ones_like(s)
    at_s = losses.implicit_target(x0, x_self, losses.lam(one, s))
    return worst(at_s - x_self, losses.implicit_target(x0, x_self, losses.lam(one, one)) - x0)


@check("Eq. 5, 16", "the hybrid loss is its two squared distances, written out", below=1e-11)
def hybrid():
    x0, x0_hat, Delta, t, s, lam = pairs()
    value = losses.hybrid_loss(x0_hat, x0, x0_hat - Delta, lam)
    return worst((value - (x0_hat - x0).pow(2).sum(1) - lam * Delta.pow(2).sum(1)) / (1 + lam))


@check("Eq. 16, 18", "d Eq. 16 / d x0_hat = (1 + lambda) times d || x0_hat - x_tar ||^2", below=1e-11)
def implicit_target_gradient():
    x0, x0_hat, Delta, t, s, lam = pairs()
    x0_hat.requires_grad_()
    x_self = losses.pseudo_target(x0_hat, Delta)
    x_tar = losses.implicit_target(x0, x_self, losses.lam(t, s))
    hybrid = torch.autograd.grad(losses.hybrid_loss(x0_hat, x0, x_self, lam).sum(), x0_hat)[0]
    short = torch.autograd.grad(losses.target_loss(x0_hat, x_tar).sum(), x0_hat)[0]
    return worst(hybrid / (1 + lam)[:, None] - short)


@check("Eq. 18", "x_tar is where the gradient of Eq. 16 vanishes", below=1e-11)
def implicit_target_is_the_minimum():
    x0, x0_hat, Delta, t, s, lam = pairs()
    x_tar = losses.implicit_target(x0, x0_hat - Delta, losses.lam(t, s)).requires_grad_()
    gradient = torch.autograd.grad(losses.hybrid_loss(x_tar, x0, x0_hat - Delta, lam).sum(), x_tar)[0]
    return worst(gradient / (1 + lam)[:, None])


@check("Eq. 19", "renormalised x_tar = (x0 + lam x_self) / ||x0 + lam x_self|| * ||x0||", below=1e-12)
def renormalised_target():
    x0, x0_hat, Delta, t, s, lam = pairs()
    sum_of_both = x0 + lam[:, None] * (x0_hat - Delta)
    letter = sum_of_both / sum_of_both.norm(dim=1, keepdim=True) * x0.norm(dim=1, keepdim=True)
    x_tar = losses.implicit_target(x0, x0_hat - Delta, losses.lam(t, s))
    return worst(losses.renormalise(x_tar, x0) - letter)


@check("Eq. 19", "its norm is that of x0; a zero target stays zero", below=1e-13)
def norm_is_kept():
    x0, x0_hat, *_ = pairs()
    renormalised, zero = losses.renormalise(x0_hat, x0), losses.renormalise(torch.zeros_like(x0), x0)
    return worst(renormalised.norm(dim=1) - x0.norm(dim=1), zero)


@check("Eq. 19, t -> 1", "the limit of Eq. 19 at lambda = 1e13 is the convex mix at t = 1", below=1e-10)
def noise_end():
    x0, x0_hat, Delta, _, s, _ = pairs()
    x_self, one = x0_hat - Delta, torch.ones_like(s)
    near = losses.renormalise(x0 + 1e13 * x_self, x0)
    return worst(near - losses.renormalise(losses.implicit_target(x0, x_self, losses.lam(one, s)), x0))


# ------------------------------------------------------------------------------------------------------------
# S.2: the distribution of (t, s)
# ------------------------------------------------------------------------------------------------------------
@check("Eq. s.11-s.12", "the warp adds mu to t_raw's log-odds; anchors (512, .5), (4096, 1.15)", below=1e-12)
def primary_time():
    z, u = torch.linspace(-4, 4, 101, dtype=torch.float64), torch.zeros(101, dtype=torch.float64)
    t, _ = losses.sample_times(z, u, torch.arange(0), 0.7, 1.0)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    anchors = torch.tensor([losses.mu_of_length(512) - 0.5, losses.mu_of_length(4096) - 1.15])
    return worst(torch.logit(t) - z - 0.7, losses.warp(ends, 0.7) - ends, anchors)


@check("Eq. s.13", "s = t for one half; for the other (t - s)/t is uniform on (0, tau)", below=1e-12)
def secondary_time():
    n = 1000
    z = torch.from_numpy(random(7).standard_normal(n))
    u, below = torch.arange(n, dtype=torch.float64) / n, torch.arange(1, n, 2)
    t, s = losses.sample_times(z, u, below, 0.3, 0.4)
    gap = ((t - s) / t)[below]  # sorted, since u is: its quantiles are those of U(0, 0.4)
    return worst((t - s)[::2], gap - 0.4 * u[below], (s > t).double())


@check("S.2", "p = 0.5 splits every batch in half, p = 1 leaves no s < t; micro-batches agree", below=1e-14)
def the_split():
    batch = losses.below_positions(list(range(64))).tolist()
    starts = range(0, 64, 8)
    parts = [i + j for i in starts for j in losses.below_positions(list(range(i, i + 8))).tolist()]
    counts = {p: len(losses.below_positions(list(range(100)), p)) for p in (0.0, 0.25, 0.5, 0.75, 1.0)}
    wrong = [n - 100 * (1 - p) for p, n in counts.items()]
    return worst(torch.tensor([*wrong, float(batch != parts)], dtype=torch.float64))


@check("S.2", "draws belong to (seed, step, sample): halves = whole, and no two share numbers", below=0.15)
def random_numbers():
    batch, other = (losses.draw(3, step, list(range(1024)), (2,)) for step in (5, 6))
    half = losses.draw(3, 5, list(range(512, 1024)), (2,))
    if any(bool((a[512:] != b).any()) for a, b in zip(batch[:4], half[:4])):
        return torch.inf
    columns = [batch.z, batch.u, *batch.eps.T, *batch.eps_s.T, other.z, other.eps[:, 0], other.eps_s[:, 0]]
    correlation = torch.corrcoef(torch.stack(columns).double()) - torch.eye(len(columns))
    return worst(correlation)  # one standard error is 1 / sqrt(1024) = 0.03
