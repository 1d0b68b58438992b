"""Transition Models (TiM; Wang et al., arXiv 2509.04394): one step from t to r, learned from a finite difference.

    loss = tim.TiM(network, ema, guidance=1.0)              # takes the place of losses.SelfE, same call, same return

Their network F(x_t, t, r, c) is our V(x_t, t, s, c): a step leads from x_t to x_r = x_t - (t - r) F. Along the exact
flow F must be the average velocity over [r, t], u = (x_t - x_r) / (t - r). Differentiate (t - r) u along the flow:

    u = v - (t - r) du/dt        their state transition identity (Sec. 3) on the straight path; MeanFlow's too

TiM regresses F on the right-hand side, with du/dt from two evaluations of the network itself on the straight path of
(x0, eps), 0.005 before and after t. That needs no forward-mode differentiation, so everything compiles.

Where the paper leaves a choice, this follows the authors' text-to-image configuration (WZDTHU/TiM): sigmoid(1.6 z) for
both times, half of the batch with r = t, a tenth with r = 0. That one has no guidance in its target. The guidance here
is that of one of their ImageNet configurations: at t from 0.3 to 0.8, by the moving average. As in their code, the
derivative follows the unguided path. So a guided step with r < t sums guided velocities along that path, and is not
quite where many small guided steps lead. (MeanFlow's derivative follows the guided one.) Their code also adds a
cosine loss over channels, a representation loss (REPA), and a distance-aware adapter in the network. None of them is
part of the objective, and all are left out here.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from losses import add_noise, like, rows, squared_norm, velocity

EPSILON = 0.005  # half the width of the finite difference, in time
P_MEAN, P_STD = 0.0, 1.6  # both times are logistic normals
TO_DATA = 0.2  # of the samples with r < t, the share with r = 0: a tenth of the batch
GUIDED = (0.3, 0.8)  # the times t at which the target is guided
FLOOR = 1e-5  # added to the error that a sample's error is divided by


# ------------------------------------------------------------------------------------------------------------
# Times     t = max(a, b),  r = min(a, b),  a and b = sigmoid(1.6 z);   r = t for half of the batch, 0 for a tenth
# ------------------------------------------------------------------------------------------------------------
def ordered_times(z: Tensor, u: Tensor, mean: float, std: float) -> tuple[Tensor, Tensor]:
    """z normal [B], u uniform in [0, 1) [B] -> the larger and the smaller of two logistic normals, [B] each."""
    a = torch.sigmoid(mean + std * z)
    here = u.cpu() if u.device.type == "mps" else u  # PyTorch has no ndtri for Apple GPUs
    # A uniform number made a normal one
    b = torch.sigmoid(mean + std * torch.special.ndtri(here).to(u.device))
    return torch.maximum(a, b), torch.minimum(a, b)


def times(z: Tensor, u: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """z normal [B], u uniform in [0, 1) [B], below [n]: the positions with r < t -> t, r [B] each."""
    to_data = u < TO_DATA
    u = torch.where(to_data, u / TO_DATA, (u - TO_DATA) / (1 - TO_DATA))  # uniform again
    t, earlier = ordered_times(z, u, P_MEAN, P_STD)
    return t, t.index_put((below,), torch.where(to_data, 0.0, earlier)[below])


# ------------------------------------------------------------------------------------------------------------
# dF/dt     [ F(x_{t+e}, t + e, r) - F(x_{t-e}, t - e, r) ] / 2e,     x_{t+-e} = x_t +- e v
# ------------------------------------------------------------------------------------------------------------
def path_difference(V: Callable, x_t: Tensor, v: Tensor, t: Tensor, r: Tensor, c: tuple) -> Tensor:
    """The derivative of V along (v, 1, 0) in (x, t, r), [n, ...], to second order in EPSILON.

    With v = eps - x0 the two points lie on the line through x0 and eps. Within EPSILON of t = 1, or of r, one of them
    is outside of what is trained; there are few such samples, and for the latter the factor t - r is small.
    The network must compute in fp32: bf16 keeps 8 bits of V, and this divides by 0.01 (tests/test_peers.py).
    """
    ahead = V(x_t + EPSILON * v, t + EPSILON, r, *c)
    behind = V(x_t - EPSILON * v, t - EPSILON, r, *c)
    return (ahead - behind) / (2 * EPSILON)


# ------------------------------------------------------------------------------------------------------------
# Guidance in training     v_w = v + (1 - 1 / w) (F(x_t, t, t, c) - F(x_t, t, t, null))
# ------------------------------------------------------------------------------------------------------------
def guided_velocity(v: Tensor, F_c: Tensor, F_null: Tensor, w: float) -> Tensor:
    """A velocity target under which F(x_t, t, t, c) becomes the guided velocity of scale w > 0.

    At the fixed point F_c is the mean of v_w given x_t. So F_c / w = v_c - (1 - 1 / w) F_null, that is,
    F_c = F_null + w (v_c - F_null).
    TiM has the factor 0.75 (w = 4) and lets the EMA evaluate; MeanFlow calls the factor kappa.
    """
    return v + (1 - 1 / w) * (F_c - F_null)


# ------------------------------------------------------------------------------------------------------------
# Target    F <- sg[ v_w - (t - r) dF/dt ]
# ------------------------------------------------------------------------------------------------------------
def target(v_w: Tensor, t: Tensor, r: Tensor, dF_dt: Tensor) -> Tensor:
    """The right-hand side of the transition identity; it carries no gradient."""
    return (v_w - like(t - r, v_w) * dF_dt).detach()


# ------------------------------------------------------------------------------------------------------------
# Weight    1 / sqrt(1 + tan t - tan r),   1 where r = t
# ------------------------------------------------------------------------------------------------------------
def time_weight(t: Tensor, r: Tensor) -> Tensor:
    """Long steps count less, because their targets scatter more. As in their code, tan takes t as radians."""
    return (1 + torch.tan(t) - torch.tan(r)).rsqrt()


class TiM(nn.Module):
    """One training step of TiM as one forward pass.

    network      V(x_t, t, s, *c), trained
    ema          its moving average, read for guidance alone
    guidance     the scale w of the target; 1 is off
    power        each sample's error is divided by this power of itself, without gradient; 0 is off. With the paper's 1
                 every sample pulls alike, however far off it is. So the network learns not quite the mean: in 2-D that
                 costs much (toy/README.md), in many dimensions little, because there all errors are of one size.
    """

    def __init__(self, network, ema, guidance: float = 1.0, power: float = 1.0):
        super().__init__()
        self.network, self.ema, self.guidance, self.power = network, ema, guidance, power

    def forward(self, x0, c, null, fake, is_null, draws, tau, mu, aux=False) -> tuple[Tensor, dict]:
        """The loss of one micro-batch and detached tensors to watch: t, s (their r) and loss, the plain one, [B].

        Arguments as in losses.SelfE; x0, c, null and draws are read.
        """
        t, r = times(draws.z, draws.u, draws.below)  # [B]
        v, x_t = velocity(x0, draws.eps), add_noise(x0, t, draws.eps)  # [B, ...]
        F = self.network(x_t, t, r, *c)  # the only pass with gradient
        with torch.no_grad():
            v_w = self.guided(x_t, v, t, c, null)
            below = draws.below  # where r = t the derivative has no weight
            dF_dt = path_difference(self.network, x_t[below], v[below], t[below], r[below], rows(c, below))
            F_target = v_w.index_put((below,), target(v_w[below], t[below], r[below], dF_dt))
        error = squared_norm(F - F_target) / x0[0].numel()  # [B]
        loss = time_weight(t, r) * error / (error.detach() + FLOOR) ** self.power
        return loss.mean(), {"t": t, "s": r, "loss": error.detach()}

    def guided(self, x_t: Tensor, v: Tensor, t: Tensor, c: tuple, null: tuple) -> Tensor:
        """v, guided by the EMA at the times GUIDED; a dropped prompt is the null prompt, and its v stays."""
        if self.guidance == 1:
            return v
        v_w = guided_velocity(v, self.ema(x_t, t, t, *c), self.ema(x_t, t, t, *null), self.guidance)
        return torch.where(like((t >= GUIDED[0]) & (t <= GUIDED[1]), v), v_w, v)
