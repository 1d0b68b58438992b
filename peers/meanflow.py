"""MeanFlow (Geng et al., arXiv 2505.13447) and improved MeanFlow (arXiv 2512.02012): the average velocity.

    loss = meanflow.MeanFlow(network, guidance=1.0)         # takes the place of losses.SelfE, same call, same return
    loss = meanflow.MeanFlow(network, improved=True)

Their network u(z_t, r, t, c) is our V(x_t, t, s, c) with s for r: the average of the velocity over [r, t] along the
flow. It obeys the MeanFlow identity (their Sec. 4.1), and training regresses u on its right-hand side:

    u = v - (t - r) du/dt,       du/dt = the derivative of u along (v, 0, 1) in (x, r, t)

MeanFlow takes v = eps - x0, the velocity of this one pair, for both. That is right in the mean over pairs, because the
right-hand side is linear in v. Improved MeanFlow moves along the network's own velocity u(x_t, t, t, c) instead, and
keeps eps - x0 as the first term alone. So u + (t - r) sg[du/dt] is regressed on v, a target that contains no
network. (Their network also has a head for v, and inputs for the guidance scale and its interval. Both are left out.)

The derivative is exact by forward-mode differentiation, or TiM's finite difference (peers/tim.py). The paper uses the
exact one. The difference is the default here: it compiles, runs on every attention kernel, and costs two evaluations
of the samples with r < t. `tests/test_peers.py` measures how far the two are apart.

Choices of the paper's ImageNet setting: both times sigmoid(z - 0.4), a quarter of the batch with r < t (half of it for
improved MeanFlow), the squared error divided by itself plus 1e-3.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from losses import add_noise, rows, squared_norm, velocity
from peers.tim import guided_velocity, ordered_times, path_difference, target

P_MEAN, P_STD = -0.4, 1.0  # both times are logistic normals
FLOOR = 1e-3  # added to the squared error that a sample's squared error is divided by


# ------------------------------------------------------------------------------------------------------------
# Times     t = max(a, b),  r = min(a, b),  a and b = sigmoid(z - 0.4);   r = t for most of the batch
# ------------------------------------------------------------------------------------------------------------
def times(z: Tensor, u: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """z normal [B], u uniform in [0, 1) [B], below [n]: the positions with r < t -> t, r [B] each."""
    t, earlier = ordered_times(z, u, P_MEAN, P_STD)
    return t, t.index_put((below,), earlier[below])


# ------------------------------------------------------------------------------------------------------------
# du/dt     = v du/dx + du/dt at fixed r      (a Jacobian-vector product)
# ------------------------------------------------------------------------------------------------------------
def path_derivative(V: Callable, x_t: Tensor, v: Tensor, t: Tensor, r: Tensor, c: tuple) -> Tensor:
    """The derivative of V along (v, 1, 0) in (x, t, r) by forward-mode differentiation, [n, ...].

    Only the plain kernel of attention has a forward derivative.
    """
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(lambda x, t: V(x, t, r, *c), (x_t, t), (v, torch.ones_like(t)))[1]


DERIVATIVES = {"difference": path_difference, "forward": path_derivative}


class MeanFlow(nn.Module):
    """One training step of MeanFlow as one forward pass. `network` is V(x_t, t, s, *c), trained.

    guidance     the scale w of the target (tim.guided_velocity, evaluated by the trained network itself); 1 is off
    improved     move along the network's own velocity, as improved MeanFlow does
    derivative   "difference" or "forward"
    power        as in tim.TiM; the paper has 1 for ImageNet and 0.75 for CIFAR-10
    """

    def __init__(self, network, guidance=1.0, improved=False, derivative="difference", power=1.0):
        super().__init__()
        self.network, self.guidance, self.improved, self.power = network, guidance, improved, power
        self.derivative = DERIVATIVES[derivative]

    def forward(self, x0, c, null, fake, is_null, draws, tau, mu, aux=False) -> tuple[Tensor, dict]:
        """The loss of one micro-batch and detached tensors to watch: t, s (their r) and loss, the plain one, [B].

        Arguments as in losses.SelfE; x0, c, null and draws are read.
        """
        t, r = times(draws.z, draws.u, draws.below)  # [B]
        v, x_t = velocity(x0, draws.eps), add_noise(x0, t, draws.eps)  # [B, ...]
        u = self.network(x_t, t, r, *c)  # the only pass with gradient
        with torch.no_grad():
            v_w = v
            if self.guidance != 1:  # a dropped prompt is the null prompt, and its v stays
                u_c, u_null = self.network(x_t, t, t, *c), self.network(x_t, t, t, *null)
                v_w = guided_velocity(v, u_c, u_null, self.guidance)
            below = draws.below  # where r = t the derivative has no weight
            x_j, v_j, t_j, r_j, c_j = x_t[below], v_w[below], t[below], r[below], rows(c, below)
            along = self.network(x_j, t_j, t_j, *c_j) if self.improved else v_j
            du_dt = self.derivative(self.network, x_j, along, t_j, r_j, c_j)
            u_target = v_w.index_put((below,), target(v_j, t_j, r_j, du_dt))
        error = squared_norm(u - u_target)  # [B]
        loss = error / (error.detach() + FLOOR) ** self.power
        return loss.mean(), {"t": t, "s": r, "loss": error.detach() / x0[0].numel()}
