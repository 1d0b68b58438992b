"""sampler.py where the identities of toy/checks do not reach: what is asked of the network, refused, defaults, fp32.

Grid, Eq. 22, every rule for the noise, whole trajectories and guidance are identities (toy/checks/inference.py), and
tests/test_mutations.py shows that one changed token of sampler.py fails them.
"""

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


def test_the_default_s_is_the_next_time_and_the_default_eta_is_1():
    V, W = Spy(), Spy()
    cond, _ = prompts(2, 3)
    noise = [normal(2, 3, seed=9 + k) for k in range(3)]
    out = sampler.sample(V, normal(2, 3), cond, steps=3, draw_noise=noise.__getitem__)
    again = sampler.sample(W, normal(2, 3), cond, steps=3, s_rule=0.0, eta=1.0, draw_noise=noise.__getitem__)
    assert torch.equal(out, again)
    assert [call.s[0].item() for call in V.calls] == pytest.approx([2 / 3, 1 / 3, 0])


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_an_unknown_space_is_refused_with_guidance_and_without(guidance):
    V, t = lambda x_t, *_: x_t, torch.tensor([0.5])
    with pytest.raises(ValueError, match='space must be "v" or "x0"'):
        sampler.predict(V, torch.ones(1, 2), t, t, (), (), guidance, "eps")


@pytest.mark.parametrize("norm", [0.0, 1.0, 50.0])
def test_a_guided_prediction_of_zero_stays_zero(norm):
    conditional = torch.full((2, 4), norm / 2)
    assert torch.equal(sampler.energy_preserving(torch.zeros(2, 4), conditional), torch.zeros(2, 4))


# ============================================================================================================
# Noise, gradients, types
# ============================================================================================================


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
