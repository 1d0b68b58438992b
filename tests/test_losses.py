"""losses.py where the identities of toy/checks do not reach: fp32, the end of time, what is told of a step, laws as drawn.

The closed forms and the whole step, loss and gradient sample by sample, are identities (toy/checks, run by test_toy.py),
and tests/test_mutations.py shows that one changed token of losses.py fails them.
"""

import math

import pytest
import torch
from torch import Tensor, nn

import losses

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1, ..., 1]."""
    return values.reshape([-1] + [1] * (x.dim() - 1))


def close(actual: Tensor, expected: Tensor, tol: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


# --- Single functions ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(2,), (3, 4, 5)])
def test_the_prediction_undoes_the_noising(shape):
    """With the true velocity eps - x0, G returns x0 from x_t = (1 - t) x0 + t eps, at every t; V gets what G is given."""
    x0, eps = normal(2, 4, *shape)
    t, s = torch.tensor([1.0, 0.7, 0.1, 0.0], dtype=F64), torch.tensor([0.2, 0.7, 0.0, 0.0], dtype=F64)
    x_t = torch.stack([(1 - ti) * a + ti * b for ti, a, b in zip(t, x0, eps)])

    def V(x, t_in, s_in, *c):
        assert x is x_t and t_in is t and s_in is s and c == ("c", "d")
        return eps - x0

    close(losses.G(V, x_t, t, s, ("c", "d")), x0)


@pytest.mark.parametrize("t", [0.2, 1e-2, 1e-5])
def test_the_weight_is_not_clamped(t):
    """1 / t^2 down to times that s.11 draws once in 10^30, where it still makes Eq. 7 the flow matching loss."""
    t, (x0, eps, V) = torch.full((4,), t, dtype=F64), (normal(4, 3, seed=i) for i in range(3))
    x0_hat = losses.one_step_estimate(losses.add_noise(x0, t, eps), t, V)
    close(losses.time_weight(t) * losses.data_loss(x0_hat, x0), (V - eps + x0).pow(2).sum(1), 1e-9)


def paper_lam(t, s):
    """Eq. 17 as printed: sigma_t / alpha_t - sigma_s / alpha_s."""
    return t / (1 - t) - s / (1 - s)


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
    t, s = torch.tril_indices(64, 64, -1).to(dtype) / 64  # all s < t < 1 of a grid
    expected = paper_lam(t.double(), s.double())
    torch.testing.assert_close(losses.lam(t, s).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("norm", [0.0, 1.0, 50.0, 1e4])
def test_renormalising_a_zero_target_gives_zero(norm):
    x0 = torch.full((2, 4), norm / 2)  # two samples of this norm, in fp32
    assert torch.equal(losses.renormalise(torch.zeros(2, 4), x0), torch.zeros(2, 4))
    noise = 1e-7 * x0 * torch.tensor([1, -1, 1, 1])  # what is left of two opposite points
    assert torch.equal(losses.renormalise(noise, x0), torch.zeros(2, 4))


# --- The whole step -----------------------------------------------------------------------------------------
class Net(nn.Module):
    """A velocity with four parameters, smooth in all its arguments, that remembers its outputs."""

    def __init__(self, *theta: float):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=F64))
        self.outputs: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, s: Tensor, c: Tensor) -> Tensor:
        a, b, g, h = self.theta
        out = a * torch.tanh(b * x + c) + g * per_sample(t, x) + h * per_sample(t - s, x) * x
        if out.requires_grad:
            out.retain_grad()
        self.outputs.append(out)
        return out


B, MU = 8, 0.5
IS_NULL = torch.tensor([False, False, True, True, False, False, False, True])
BELOW = [1, 3, 5, 7]


def networks(dtype=F64) -> tuple[Net, Net]:
    return Net(0.7, -0.6, 0.4, 0.3).to(dtype), Net(0.9, 0.5, -0.2, -0.4).to(dtype)


def batch(dtype=F64, **other_draws) -> tuple:
    """What a step takes: samples that differ in norm, with null prompts in both halves."""
    draws = losses.draw(3, 11, list(range(B)), (2, 3))._replace(**other_draws)
    x0, c, null, fake = (normal(B, 2, 3, seed=seed) for seed in range(4))
    x0 = x0 * per_sample(torch.linspace(0.3, 3, B, dtype=F64), x0)
    c = torch.where(per_sample(IS_NULL, c), null, c)
    x0, c, null, fake = (x.to(dtype) for x in (x0, c, null, fake))
    draws = losses.Draws(*(x.to(dtype) if x.is_floating_point() else x for x in draws))
    return x0, (c,), (null,), (fake,), IS_NULL, draws


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("aux", [False, True])
@pytest.mark.parametrize("target", ["renorm", "tar", "sum"])
def test_the_step_is_finite_at_the_end_of_time(dtype, aux, target):
    """Every t is 1. Where s = t the target is x0; where s < t it is as long as x0 (the limit of Eq. 19)."""
    u = torch.tensor([0.0, 0.0, 0.5, 0.0, 0.5, 0.5, 1e-7, 0.9])  # of those with s < t, 1 and 3 have s = t = 1
    (online, ema), step = networks(dtype), batch(dtype, z=torch.full((B,), math.inf), u=u)
    loss, stats = losses.SelfE(online, ema, target=target)(*step, 1.0, MU, aux)
    loss.backward()
    assert loss.isfinite() and online.theta.grad.isfinite().all() and online.theta.grad.any()
    assert (stats["t"] == 1).all() and all(value.isfinite().all() for value in stats.values())
    # At t = 1, x0_hat = eps - V, and dL/dV = -2 (x0_hat - target) over all values.
    V, x0, draws = online.outputs[0], step[0], step[-1]
    pulled_to = draws.eps - V.detach() + V.grad / 2 * V.numel()
    tol = 1e-4 if dtype == torch.float32 else 1e-10
    close(pulled_to[[0, 1, 2, 3, 4, 6]], x0[[0, 1, 2, 3, 4, 6]], tol)
    if target == "renorm":
        close(pulled_to.flatten(1).norm(dim=1), x0.flatten(1).norm(dim=1), tol)


@pytest.mark.parametrize("aux", [False, True])
def test_the_statistics_are_those_of_the_step(aux):
    online, ema = networks()
    loss, stats = losses.SelfE(online, ema, delta_scale=0.5)(*batch(), 1.0, MU, aux)
    s, t = stats["s"][BELOW], stats["t"][BELOW]
    close(stats["lam"], paper_lam(t, s) * (aux | ~IS_NULL[BELOW]))
    _, V_null, *V_fake = online.outputs
    V_c = torch.where(per_sample(IS_NULL[BELOW], V_null), V_null, ema.outputs[0])
    Delta = per_sample(s, V_c) * (0.9 * (V_c - V_null) + 0.1 * (V_c - V_fake[0]) if aux else V_c - V_null)
    close(stats["delta_norm"], 0.5 * Delta.pow(2).mean(dim=(1, 2)).sqrt().detach(), 1e-9)
    fake_loss = stats["fake_loss"].sum() / B if aux else 0
    if aux:  # s.8, which the weight of Delta leaves alone
        draws = batch()[-1]
        x_t = losses.add_noise(batch()[0], stats["t"], draws.eps)
        x0_hat = losses.one_step_estimate(x_t, stats["t"], online.outputs[0])
        error = V_fake[0] - (draws.eps_s - x0_hat)[BELOW]
        close(stats["fake_loss"], error.pow(2).mean(dim=(1, 2)).detach())
    close(loss.detach(), stats["loss"].mean() + fake_loss)
    assert stats["loss"].shape == (B,) and not any(value.requires_grad for value in stats.values())


# --- S.2: the numbers behind (t, s) -------------------------------------------------------------------------
def test_the_law_of_what_is_drawn():
    """z is normal and u uniform, by Kolmogorov and Smirnov at the 0.1% level. What s.11 to s.13 make of them, and that
    no two draws share numbers, are identities."""
    draws = losses.draw(seed=5, step=70, index=list(range(4000)), shape=(2,))
    laws = (draws.z.double(), torch.special.ndtr), (draws.u.double(), lambda u: u)
    for values, distribution in laws:
        for some in (values, values[draws.below]):
            F, n = distribution(some.sort().values), len(some)
            above, below = torch.arange(1, n + 1) / n - F, F - torch.arange(n) / n
            assert max(above.max(), below.max()) < 1.95 / n**0.5


@pytest.mark.parametrize(
    "p_equal, n, places",
    [(0.9, 10, [9]), (0.7, 10, [3, 6, 9]), (0.6, 5, [2, 4]), (7 / 8, 8, [7]), (0.5, 2, [1]), (0, 2, [0, 1])],
)
def test_every_n_samples_have_their_share_at_the_same_places(p_equal, n, places):
    """The places are those of whole numbers in (1 - p) g, counted by hand. In floating point 10 (1 - 0.9) is less than
    1: rounded down as it is, the first ten samples would have no place and the next ten two."""
    for start in (0, n, 70 * n, 710_000 * 1024 // n * n):
        assert losses.below_positions(list(range(start, start + n)), p_equal).tolist() == places
