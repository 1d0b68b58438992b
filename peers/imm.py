"""Inductive Moment Matching (IMM; Zhou, Ermon and Song, arXiv 2503.07565), the baseline of Table 2.

    loss = imm.IMM(network)                       # takes the place of losses.SelfE, same call, same return
    value, stats = loss(x0, c, null, fake, is_null, imm.draw(seed, step, index, x0.shape[1:]), tau, mu)
    for _, x in imm.trajectory(V, noise, cond, null, steps=4, guidance=1.5): ...

In IMM a jump to time s should lead to the same distribution wherever it starts, from time t or from an earlier time r,
s <= r < t. IMM compares two sets of samples, groups of M that share (s, r, t), by the maximum mean discrepancy with a
Laplace kernel k:

    y_t = f_{s,t}(x_t)   y_r = sg[ f_{s,r}(x_r) ]   f_{s,t}(x) = x - (t - s) V(x, t, s, c)
    L = E w(t) mean over the M x M pairs of [ k(y_t, y_t') + k(y_r, y_r') - 2 k(y_t, y_r') ]

The first kernel pushes the samples of a group apart, the last pulls them to the other set. At r = s the second set is
the data. From there the right distribution spreads to larger t by induction. Free choices have the values of the IMM
paper's largest experiments: M = 4, a = 2, b = 4, k = 12, uniform times. sigma_d, the scale of the data, is 1, because
our noise has unit variance and V has no preconditioning. A group holds samples of different prompts, in any order.

What k means for a short run. Data enter only where r = s. From there the right distribution spreads to larger t, one
step of 160 / 2^k in eta = t / (1 - t) at a time. With k = 12 these are 26 steps to t = 0.5 and 4,241 to the largest t.
Of the groups with t > 0.5, one in 200 sees data. So a run of some thousand iterations learns only small t: colours, but
no shapes. A smaller k makes fewer and coarser steps: with k = 6 every second group beyond t = 0.5 sees data.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from losses import add_noise, like
from rng import normal, rng
from sampler import branches, extrapolate

M = 4  # samples in a group
T_MAX = 0.994  # the largest time: training draws t below it, sampling starts there
ETA_MAX, K = 160, 12  # from t to r in eta = t / (1 - t): its range, which ends near 160, in 2^K steps
A, B = 2, 4  # of the weight w(t)
NEAREST = 1e-8  # distances below it count as it


# ------------------------------------------------------------------------------------------------------------
# Times     t ~ U(0, 0.994),   s ~ U(0, t),   r = max(s, eta^-1(eta(t) - 160 / 2^k)),   eta(t) = t / (1 - t)
# ------------------------------------------------------------------------------------------------------------
def times(u_t: Tensor, u_s: Tensor, k: int = K) -> tuple[Tensor, Tensor, Tensor]:
    """Uniform numbers in [0, 1) -> t, s, r of the same shape, 0 <= s <= r <= t < 0.994."""
    t = T_MAX * u_t
    s = u_s * t
    eta_r = (t / (1 - t) - ETA_MAX / 2**k).clamp_min(0)
    return t, s, torch.maximum(s, eta_r / (1 + eta_r))


# ------------------------------------------------------------------------------------------------------------
# The jump  f_{s,t}(x) = x - (t - s) V(x, t, s, c)
# ------------------------------------------------------------------------------------------------------------
def jump(V: Callable, x: Tensor, t: Tensor, s: Tensor, cond: tuple) -> Tensor:
    """From x [B, ...] at times t [B] to times s [B]; where s = t it returns x itself."""
    return x - like(t - s, x) * V(x, t, s, *cond)


# ------------------------------------------------------------------------------------------------------------
# Weight    w(t) = 1/2 sigmoid(b - l) (-dl/dt) alpha^a / (alpha^2 + sigma^2),   l = log(alpha^2 / sigma^2)
# ------------------------------------------------------------------------------------------------------------
def weight(t: Tensor) -> Tensor:
    """w(t) for t in [0, 1), any shape.

    With sigmoid(b - l) = t^2 / (t^2 + e^-b (1-t)^2) and -dl/dt = 2 / (t (1-t)) the poles at t = 0 cancel; this is the
    product with nothing left to divide by zero.
    """
    alpha2, sigma2 = (1 - t) ** 2, t**2
    e_b = torch.exp(torch.tensor(-float(B), dtype=t.dtype))
    return t * (1 - t) ** (A - 1) / ((sigma2 + e_b * alpha2) * (alpha2 + sigma2))


# ------------------------------------------------------------------------------------------------------------
# Kernel    k(x, y) = exp( -max(||x - y||, 1e-8) / (D (t - s) sigma_d) ),   D values in a sample
# ------------------------------------------------------------------------------------------------------------
def kernel(x: Tensor, y: Tensor, gap: Tensor) -> Tensor:
    """All pairs within each group: x, y [G, M, ...], gap = t - s [G] -> [G, M, M].

    The floor stands under the root, so that two equal points have the gradient 0 and not 0 / 0.
    """
    x, y = x.flatten(2), y.flatten(2)
    squared = (x[:, :, None] - y[:, None, :]).square().sum(dim=-1)  # [G, M, M]
    distance = squared.clamp_min(NEAREST**2).sqrt()
    return torch.exp(-distance / (x.shape[-1] * gap.clamp_min(torch.finfo(gap.dtype).eps)[:, None, None]))


def discrepancy(y_t: Tensor, y_r: Tensor, gap: Tensor) -> Tensor:
    """The squared maximum mean discrepancy of each group: y_t, y_r [G, M, ...], gap [G] -> [G]."""
    pairs = kernel(y_t, y_t, gap) + kernel(y_r, y_r, gap) - 2 * kernel(y_t, y_r, gap)
    return pairs.mean(dim=(1, 2))


# ------------------------------------------------------------------------------------------------------------
# Random numbers and the whole step
# ------------------------------------------------------------------------------------------------------------
class Draws(NamedTuple):
    """The random numbers of one micro-batch; every group of M consecutive samples shares its two times."""

    u_t: Tensor  # [G] uniform in [0, 1), for t
    u_s: Tensor  # [G] uniform in [0, 1), for s
    eps: Tensor  # [B, ...] normal, makes x_t and x_r


def draw(seed: int, step: int, index: list[int], shape: tuple, device="cpu") -> Draws:
    """The Draws of the samples with the given global indices at one step; shape is that of one sample.

    Group g holds the samples 4 g .. 4 g + 3. Raises ValueError when a micro-batch cuts a group.
    """
    groups = [g // M for g in index[::M]]
    if index != [M * g + i for g in groups for i in range(M)]:
        raise ValueError(f"IMM compares groups of {M}: batch and micro-batch must be multiples of {M}")
    u = [rng(seed, "group times", step, g).random(2, dtype="float32") for g in groups]
    u_t, u_s = torch.tensor([[float(a), float(b)] for a, b in u]).unbind(1)
    eps = normal(seed, "noise", [(step, i) for i in index], shape)
    return Draws(*(x.to(device, non_blocking=True) for x in (u_t, u_s, eps)))


class IMM(nn.Module):
    """One training step of IMM as one forward pass, called like losses.SelfE. `network` is V(x_t, t, s, *c), trained;
    2^k steps divide the range of eta.

    y_r comes from the same weights without gradient, not from their moving average.

    The loss is the paper's times sqrt(D), D values in a sample. Adam minds a constant only through its eps (1e-8) and
    the clipping of gradients: IMM's gradient with respect to a sample has a length near 1 / D, that of a mean squared
    error 1 / sqrt(D), and without the factor a picture's gradients fall to 1e-7 a weight.
    """

    def __init__(self, network, k: int = K):
        super().__init__()
        self.network, self.k = network, k

    def forward(self, x0, c, null, fake, is_null, draws, tau, mu, aux=False) -> tuple[Tensor, dict]:
        """The loss of one micro-batch and detached tensors to watch: t, s, r, loss, one value per group.

        x0 [B, ...] fp32, B a multiple of 4; c a tuple of tensors with leading dimension B. A dropped prompt is one more
        prompt; only x0, c and draws are read.
        """
        t, s, r = times(draws.u_t, draws.u_s, self.k)  # [G]
        t_i, s_i, r_i = (a.repeat_interleave(M) for a in (t, s, r))  # [B]
        x_t = add_noise(x0, t_i, draws.eps)
        x_r = add_noise(x0, r_i, draws.eps)  # the DDIM step from x_t to x0
        y_t = jump(self.network, x_t, t_i, s_i, c)
        with torch.no_grad():
            y_r = jump(self.network, x_r, r_i, s_i, c)
        loss = weight(t) * discrepancy(y_t.unflatten(0, (-1, M)), y_r.unflatten(0, (-1, M)), t - s)
        loss = loss * x0[0].numel() ** 0.5
        return loss.mean(), {"t": t, "s": s, "r": r, "loss": loss.detach()}


# ------------------------------------------------------------------------------------------------------------
# Sampling  x_{t_{k+1}} = f_{t_{k+1}, t_k}(x_{t_k}),   t_k linear from 0.994 to 0   (the paper's pushforward sampler;
#           it serves the objectives of peers/ too, from t = 1)
# ------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def trajectory(
    V: Callable, x: Tensor, cond: tuple, null=None, *, steps: int, guidance=1.0, draw_noise=None, start=T_MAX
) -> Iterator[tuple[float, Tensor]]:
    """Yield (t_{k+1}, x at that time) for k = 1 .. steps, from standard normal x [B, ...] at time `start`.

    The last x is the sample. guidance is plain, V_null + guidance (V_c - V_null); 1 evaluates the conditional branch
    only, null may be None. Nothing random is added on the way, so draw_noise is not read; the network is told where the
    jump ends, so there is no eta and no rule for s_k.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    grid = torch.linspace(start, 0, steps + 1, dtype=torch.float64).tolist()

    def guided(x, t, s, *cond):
        if guidance == 1:
            return V(x, t, s, *cond)
        return extrapolate(*branches(V, x, t, s, cond, null), guidance)

    for t, s in zip(grid[:-1], grid[1:]):
        times = (torch.full((len(x),), time, dtype=x.dtype, device=x.device) for time in (t, s))
        x = jump(guided, x, *times, cond)
        yield s, x
