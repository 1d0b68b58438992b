"""Shortcut models (Frans et al., arXiv 2410.12557, Sec. 3): a step of d does what two steps of d/2 do.

    loss = shortcut.Shortcut(network, ema, guidance=1.0)    # takes the place of losses.SelfE, same call, same return
    for _, x in shortcut.trajectory(V, noise, cond, null, steps=4): ...

Their network s(x_t, t, d) is our V(x_t, t, s, c) with s = t - d, and their time runs the other way (their 1 is data).
Seven eighths of a batch learn flow matching at the smallest d, 1/128. The rest learns self-consistency:

    x' = x_t - d/2 s(x_t, t, d/2)
    s(x_t, t, d) <- sg[ (s(x_t, t, d/2) + s(x', t - d/2, d/2)) / 2 ]

for d = 1, 1/2, .., 1/64 in equal shares and t on the grid of d. So what data teaches the smallest step spreads to
larger ones. The EMA evaluates. x' and the target are clipped to [-4, 4], as in the authors' code
(kvfrans/shortcut-models). Guidance enters only the targets built from steps of 1/128; larger steps learn guided paths
from them. The steps of 1/128 themselves stay unguided: more than 64 steps need guidance at sampling (`--guidance W`),
as the authors give it to their 128 steps.

Learned steps are powers of 1/2. For other numbers of steps the sampler tells the largest learned step that is not
longer than the one made. (The authors sample at powers of two alone.)
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from losses import add_noise, like, rows, squared_norm, velocity
from peers import imm

M = 128  # base steps: the smallest d is 1 / M
CLIP = 4.0  # of x' and of targets


# ------------------------------------------------------------------------------------------------------------
# Times     d = 1 / 128, t on its grid;   self-consistency: d = 2^-k, k = 0 .. 6 in equal shares, t on the grid of d
# ------------------------------------------------------------------------------------------------------------
def times(z: Tensor, u: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """z normal [B], u uniform in [0, 1) [B], below [n]: the positions that learn self-consistency -> t, d [B] each."""
    k = torch.full_like(u, math.log2(M)).index_put((below,), (math.log2(M) * u).floor()[below])
    sections = 2**k
    # Ndtr makes a normal number uniform
    place = (torch.special.ndtr(z) * sections).floor().clamp_max(sections - 1)
    return 1 - place / sections, 1 / sections


class Shortcut(nn.Module):
    """One training step as one forward pass. `network` is V(x_t, t, s, *c), trained; `ema` its moving average, which
    evaluates; `guidance` the scale w in the targets made of the smallest steps, 1 is off."""

    def __init__(self, network, ema, guidance: float = 1.0):
        super().__init__()
        self.network, self.ema, self.guidance = network, ema, guidance

    def forward(self, x0, c, null, fake, is_null, draws, tau, mu, aux=False) -> tuple[Tensor, dict]:
        """The loss of one micro-batch and detached tensors to watch: t, s and loss, [B].

        Arguments as in losses.SelfE; x0, c, null and draws are read.
        """
        t, d = times(draws.z, draws.u, draws.below)  # [B]
        v, x_t = velocity(x0, draws.eps), add_noise(x0, t, draws.eps)  # [B, ...]
        part = draws.below  # learns self-consistency
        halves = self.two_halves(x_t[part], t[part], d[part], rows(c, part), rows(null, part))
        goal = v.index_put((part,), halves)
        loss = squared_norm(self.network(x_t, t, t - d, *c) - goal) / x0[0].numel()  # [B]
        return loss.mean(), {"t": t, "s": t - d, "loss": loss.detach()}

    @torch.no_grad()
    def two_halves(self, x_t: Tensor, t: Tensor, d: Tensor, c: tuple, null: tuple) -> Tensor:
        """The mean velocity of two steps of d/2, [n, ...]."""
        half = d / 2
        v_1 = self.small_step(x_t, t, half, c, null)
        x_mid = (x_t - like(half, x_t) * v_1).clamp(-CLIP, CLIP)
        v_2 = self.small_step(x_mid, t - half, half, c, null)
        return ((v_1 + v_2) / 2).clamp(-CLIP, CLIP)

    def small_step(self, x_t: Tensor, t: Tensor, d: Tensor, c: tuple, null: tuple) -> Tensor:
        """The EMA's velocity for a step of d, guided where d is the smallest."""
        v = self.ema(x_t, t, t - d, *c)
        if self.guidance == 1:
            return v
        v_null = self.ema(x_t, t, t - d, *null)
        return torch.where(like(d * M < 1.5, v), v_null + self.guidance * (v - v_null), v)


# ------------------------------------------------------------------------------------------------------------
# Sampling  x_{t - 1/N} = x_t - s(x_t, t, d) / N,    d the largest power of 1/2 that is at most 1/N
# ------------------------------------------------------------------------------------------------------------
def trajectory(V: Callable, x: Tensor, *prompts, steps: int, **choices) -> Iterator[tuple[float, Tensor]]:
    """Yield (t, x at that time) for the steps' ends, from standard normal x [B, ...]: imm.trajectory from t = 1.

    With more than M steps the network is told 1/M, the smallest step that it knows, or what is left of the way.
    """
    d = max(1 / M, 2.0 ** -(steps - 1).bit_length())

    def V_d(x, t, s, *c):
        return V(x, t, (t - d).clamp(min=0), *c)

    return imm.trajectory(V_d, x, *prompts, steps=steps, start=1.0, **choices)
