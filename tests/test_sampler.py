"""sampler.py where the identities of toy/checks do not reach: what is asked of the network, what is refused, fp32.

Grid, Eq. 22, every rule for the noise, whole trajectories and guidance are identities (toy/checks/inference.py), and
tests/test_mutations.py shows that one changed token of sampler.py fails them.
"""

import math

import pytest
import torch
from torch import Tensor

import sampler

F64 = torch.float64
ETAS = [0.0, 0.3, 0.5, 1.0, "renoise", "public"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def prompts(B: int, *shape: int) -> tuple[tuple, tuple]:
    """A prompt and the null prompt, of two tensors each."""
    return tuple(normal(B, *shape, seed=i) for i in (3, 4)), tuple(normal(B, *shape, seed=i) for i in (5, 6))


class Spy:
    """A network that remembers how many rows it was asked for. Its output depends on all that it is given."""

    def __init__(self):
        self.calls: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, s: Tensor, *c: Tensor) -> Tensor:
        self.calls.append(len(x))
        t, s = (time.reshape([-1] + [1] * (x.dim() - 1)) for time in (t, s))
        return torch.tanh(x + c[0]) * (1 + t) - s * x + c[1]


SENSELESS = [dict(steps=0), dict(eta=1.01), dict(eta=math.nan), dict(s_rule=1.5), dict(t_max=0.0)]
SENSELESS += [dict(space="eps"), dict(space="eps", guidance=2.0)]


@pytest.mark.parametrize("choices", SENSELESS, ids=str)
def test_what_makes_no_sense_is_refused(choices):
    """Above 1 the fresh noise alone would be more than sigma_s allows; an s_k off the step is no level of it."""
    with pytest.raises(ValueError, match="at least 1|eta must be .* s_rule in|space must be|t_max in"):
        sampler.sample(Spy(), normal(2, 3), *prompts(2, 3), **{"steps": 2} | choices)


def test_the_network_is_asked_at_no_later_time_than_t_max():
    """From pure noise at t = 1 on, its prediction is Eq. 6 at t_max; the steps themselves are those of the whole grid."""
    noise, (c, null) = normal(2, 3), prompts(2, 3)
    seen = []

    def V(x, t, s, *c):
        seen.append((t[0].item(), s[0].item()))
        return Spy()(x, t, s, *c)

    choices = dict(steps=3, eta=0.0, s_rule=0.5)
    (first, x, x0_hat), *_ = sampler.trajectory(V, noise, c, null, t_max=0.7, **choices)
    grid = [1, 2 / 3, 1 / 3, 0]
    halves = [(a + b) / 2 for a, b in zip(grid, grid[1:])]
    assert seen == pytest.approx([pytest.approx(pair) for pair in ((0.7, 0.7), *zip(grid[1:3], halves[1:]))])
    at = torch.full((2,), 0.7, dtype=F64)
    assert torch.allclose(x0_hat, noise - 0.7 * Spy()(noise, at, at, *c)) and first == pytest.approx(2 / 3)
    assert torch.allclose(x, x0_hat / 3 + noise * 2 / 3)


@pytest.mark.parametrize("t, s", [(0.9, 0.4), (0.5, 0.49), (1.0, 0.6)])
def test_minfms_rule_keeps_the_marginals_and_its_share_of_the_old_noise(t, s):
    """Of the old noise s - (t - s) s / t. The other rules are identities."""
    probe = torch.eye(3, dtype=F64)
    x_t, x0_hat, noise = probe[:, 0:1], probe[:, 1:2], probe[:, 2:3]
    by_x_t, by_x0, by_noise = sampler.update(x_t, x0_hat, t, s, "public", noise)[:, 0].tolist()
    old = s - (t - s) * s / t
    assert [by_x0 + by_x_t * (1 - t), by_x_t * t] == pytest.approx([1 - s, old], abs=1e-12)
    assert by_noise == pytest.approx((s**2 - old**2) ** 0.5, abs=1e-12)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_n_steps_cost_n_evaluations(steps, guidance):
    """Each is one batch: the samples once without guidance, when no null prompt is needed, twice with it."""
    V, (cond, null) = Spy(), prompts(3, 2, 2)
    null = null if guidance != 1 else None
    list(sampler.trajectory(V, normal(3, 2, 2), cond, null, steps=steps, guidance=guidance))
    assert V.calls == [3 if guidance == 1 else 6] * steps


def test_without_draw_noise_torch_draws_it():
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(sampler.sample(Spy(), normal(2, 3), prompts(2, 3)[0], steps=4))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_sampling_takes_no_gradient_and_leaves_the_callers_mode_alone():
    weight = torch.ones((), dtype=F64, requires_grad=True)
    for _, x, x0_hat in sampler.trajectory(lambda x, t, s: weight * x, normal(2, 3), (), steps=3):
        assert torch.is_grad_enabled() and not x.requires_grad and not x0_hat.requires_grad


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_fp32_stays_fp32_and_agrees_with_fp64(eta, guidance):
    noise, results = [normal(3, 2, 4, seed=20 + k) for k in range(8)], []
    for dtype in (torch.float32, F64):
        c, null = (tuple(x.to(dtype) for x in prompt) for prompt in prompts(3, 2, 4))
        how = dict(steps=8, mu=1.15, eta=eta, guidance=guidance, draw_noise=lambda k: noise[k].to(dtype))
        out = sampler.sample(Spy(), normal(3, 2, 4).to(dtype), c, null, **how)
        assert out.dtype == dtype and out.isfinite().all()
        results.append(out.double())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
