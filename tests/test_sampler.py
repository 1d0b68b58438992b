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


@pytest.mark.parametrize(
    "choices",
    [
        dict(steps=0),
        dict(eta=1.01),
        dict(eta=math.nan),
        dict(s_rule=1.5),
        dict(space="eps"),
        dict(space="eps", guidance=2.0),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_before_the_network_is_asked(choices):
    """Above 1 the fresh noise alone would be more than sigma_s allows; an s_k off the step is no level of it."""
    V, message = Spy(), "at least 1|eta must be .* s_rule in|space must be"
    with pytest.raises(ValueError, match=message):
        sampler.sample(V, normal(2, 3), *prompts(2, 3), **{"steps": 2} | choices)
    assert not V.calls or "space" in choices


# ============================================================================================================
# One step
# ============================================================================================================
@pytest.mark.parametrize("t, s", [(0.9, 0.4), (0.5, 0.49), (1.0, 0.6)])
def test_minfms_rule_keeps_the_marginals_and_its_share_of_the_old_noise(t, s):
    """Of the old noise s - (t - s) s / t. The other rules are identities."""
    probe = torch.eye(3, dtype=F64)
    x_t, x0_hat, noise = probe[:, 0:1], probe[:, 1:2], probe[:, 2:3]
    by_x_t, by_x0, by_noise = sampler.update(x_t, x0_hat, t, s, "public", noise)[:, 0].tolist()
    old = s - (t - s) * s / t
    assert [by_x0 + by_x_t * (1 - t), by_x_t * t] == pytest.approx([1 - s, old], abs=1e-12)
    assert by_noise == pytest.approx((s**2 - old**2) ** 0.5, abs=1e-12)


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
    how = dict(steps=steps, guidance=guidance, draw_noise=noise.__getitem__)
    states = list(sampler.trajectory(V, normal(B, 2, 2), cond, null if guidance != 1 else None, **how))
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
        how = dict(steps=8, mu=1.15, eta=eta, guidance=guidance, draw_noise=lambda k: noise[k].to(dtype))
        out = sampler.sample(Spy(), normal(3, 2, 4).to(dtype), c, n, **how)
        assert out.dtype == dtype and out.isfinite().all()
        results.append(out.double())
    close(*results, 1e-4)
