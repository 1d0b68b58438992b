"""The training objective of Self-E: the equations of Sec. 2, Sec. 3 and S.1-S.2, one function each. Only the network's
(s.9, s.10: model.py) and the sampler's (Eq. 22: sampler.py) are elsewhere.

    loss = losses.SelfE(network, ema)                       # one nn.Module, so DDP sees a single forward
    value, stats = loss(x0, c, null, fake, is_null, losses.draw(seed, step, index, x0.shape[1:]), tau=1.0, mu=0.41)

The functions work on tensors of any trailing shape: [B, ...] pictures, latents or points in 2-D, times [B].
The 2-D toy and the 2B model run these very lines.

Symbols, as in the paper                                                                            section
    x0, eps     [B, ...]  data and the noise it is mixed with                                       2
    t, s        [B]       times, s <= t; alpha_t = 1 - t, sigma_t = t                               2, 3
    x_t         [B, ...]  (1 - t) x0 + t eps                                                        2
    c, null     tuples    the condition and the null prompt phi: tensors with leading dimension B   3
    fake        tuple     c_fake, the prompt with "fake image" before it                            S.1.2
    V, G                  the network's output, and the prediction x_t - t V (Eq. 6)                2, 3
    x0_hat      [B, ...]  G(x_t, t, s, c), the model's prediction of x0                             3
    x_s_hat     [B, ...]  x0_hat, noised again to time s                                            3.2
    G_c, G_null, G_fake   G(x_s_hat, s, s, .) for the prompts c, null and fake                      S.1.2
    q, p_theta            the distribution of the data, and that of the model's predictions         3.2
    sg[.]                 stop-gradient: `.detach()`, or a pass under `no_grad`                     3.2
    Delta       [B, ...]  the self-evaluation: minus the change that x0_hat should make             S.1.2
    x_self      [B, ...]  x0_hat - Delta, the pseudo-target                                         3.2
    lam         [B]       lambda_{s,t}, the weight of self-evaluation                               3.3
    x_tar, x_renorm       the implicit target, and the same at the norm of x0                       3.3
    w                     two things, as in the paper: the guidance scale in Eq. 12-13 and s.7, and in Eq. 21 the weight
                          of the loss, w_{s,t}
    mix         [B]       ours: lam / (1 + lam), the share of x_self in x_tar                       3.3
    tau         scalar    annealed from 0 to 1: how far below t the second time may lie             S.2
    k           scalar    the share of the classifier term in Delta, 0.9                            S.1.2
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rng import rng


def like(t: Tensor, x: Tensor) -> Tensor:
    """Times [B] -> [B, 1, ..., 1], to multiply tensors shaped like x."""
    return t.view(-1, *[1] * (x.dim() - 1))


def rows(condition: tuple, positions: Tensor) -> tuple:
    """The rows at `positions` [n] of each tensor of a condition: [B, ...] -> [n, ...]."""
    return tuple(a[positions] for a in condition)


def squared_norm(x: Tensor) -> Tensor:
    """||x||^2 over all but the first dimension: [B, ...] -> [B]."""
    return x.reshape(len(x), -1).square().sum(dim=1)


# ============================================================================================================
# Sec. 2: flow matching
# ============================================================================================================


# ------------------------------------------------------------------------------------------------------------
# Eq. 1      x_t = alpha_t x0 + sigma_t eps,   (alpha_t, sigma_t) = (1 - t, t): the noise path. Another one changes
#            what holds for this path: Eq. 2, 4 and 6 (`velocity`, `one_step_estimate`), `lam` and `time_weight`
# Eq. 8      the same line makes x_s ~ p_theta(x_s | c) from a generated x0_hat: x_s_hat = alpha_s x0_hat + sigma_s eps
# ------------------------------------------------------------------------------------------------------------
def alpha(t):
    """The share of the data in x_t. t is a tensor or a number in [0, 1]."""
    return 1 - t


def sigma(t):
    """The standard deviation of the noise in x_t. t is a tensor or a number in [0, 1]."""
    return t


def add_noise(x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x0 and eps [B, ...], t [B] -> x_t [B, ...]."""
    return like(alpha(t), x0) * x0 + like(sigma(t), x0) * eps


# ------------------------------------------------------------------------------------------------------------
# Eq. 2      v = d x_t / dt = eps - x0
# ------------------------------------------------------------------------------------------------------------
def velocity(x0: Tensor, eps: Tensor) -> Tensor:
    """The velocity of the straight path from x0 (t = 0) to eps (t = 1); it does not depend on t."""
    return eps - x0


# ------------------------------------------------------------------------------------------------------------
# Eq. 3      L_CFM = || V(x_t, t, c) - v ||^2
# ------------------------------------------------------------------------------------------------------------
def cfm_loss(V: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    """The conditional flow matching loss of each sample, [B]. V is the network's output at x_t."""
    return squared_norm(V - velocity(x0, eps))


# ------------------------------------------------------------------------------------------------------------
# Eq. 4      x0_hat = x_t - t V(x_t, t, c)  ~  E[x0 | x_t, c] for the V that minimises Eq. 3
# ------------------------------------------------------------------------------------------------------------
def one_step_estimate(x_t: Tensor, t: Tensor, V: Tensor) -> Tensor:
    """The naive one-step estimate of x0: the posterior mean, a blend of all pictures that x_t could come from."""
    return x_t - like(t, x_t) * V


# ------------------------------------------------------------------------------------------------------------
# Eq. 6      x0_hat = G(x_t, t, s, c) = x_t - t V(x_t, t, s, c): the same line, for a network with s as an input too
# ------------------------------------------------------------------------------------------------------------
def G(V: Callable, x_t: Tensor, t: Tensor, s: Tensor, c: tuple) -> Tensor:
    """The sample head: the clean sample [B, ...] that the network V predicts from x_t (Sec. 3).

    V is any callable V(x_t, t, s, *c) -> tensor like x_t; x_t is [B, ...], t and s are [B], c is a tuple of tensors
    with leading dimension B. At t = 0 the prediction is x_t itself.
    """
    return one_step_estimate(x_t, t, V(x_t, t, s, *c))


# ============================================================================================================
# Sec. 3.1: learning from data
# ============================================================================================================


# ------------------------------------------------------------------------------------------------------------
# Eq. 7      L_data = || G(x_t, t, s, c) - x0 ||^2
# ------------------------------------------------------------------------------------------------------------
def data_loss(x0_hat: Tensor, x0: Tensor) -> Tensor:
    """The data loss of each sample, [B]. Weighted with 1/t^2 (Eq. 21) it is Eq. 3, since x0_hat - x0 = t (v - V)."""
    return squared_norm(x0_hat - x0)


# ============================================================================================================
# Sec. 3.2 and S.1: learning by self-evaluation. Scores first, then what the network has for them: posterior means.
# The functions of scores are the derivation, and only the identities (toy/) call them; training begins at Eq. s.6.
# ============================================================================================================


# ------------------------------------------------------------------------------------------------------------
# Eq. 10     delta(x_s) = grad log p_theta(x_s | c) - grad log q(x_s | c)
#            E[delta dx_s/dtheta] is the gradient of the reverse KL divergence of Eq. 9
# ------------------------------------------------------------------------------------------------------------
def reverse_kl_direction(score_p: Tensor, score_q: Tensor) -> Tensor:
    """The gradient of KL(p || q) with respect to a sample of p; samples move against it."""
    return score_p - score_q


# ------------------------------------------------------------------------------------------------------------
# Eq. 11     grad log q(x_s | c) = (alpha_s E[x0 | x_s, c] - x_s) / sigma_s^2                              (Tweedie)
# ------------------------------------------------------------------------------------------------------------
def score_from_mean(mean: Tensor, x_s: Tensor, s: Tensor) -> Tensor:
    """The score of the noisy distribution at time s > 0 from its posterior mean of x0."""
    return (like(alpha(s), x_s) * mean - x_s) / like(sigma(s), x_s) ** 2


# ------------------------------------------------------------------------------------------------------------
# Eq. s.1    E[x0 | x_s, c] = (x_s + sigma_s^2 grad log q(x_s | c)) / alpha_s                  (Eq. 11 read backwards)
# ------------------------------------------------------------------------------------------------------------
def mean_from_score(score: Tensor, x_s: Tensor, s: Tensor) -> Tensor:
    """The posterior mean of x0 from the score at time s < 1."""
    return (x_s + like(sigma(s), x_s) ** 2 * score) / like(alpha(s), x_s)


# ------------------------------------------------------------------------------------------------------------
# Eq. s.2    E_q[x0 | x_s] - E_q[x0 | x_s, c]   = sigma_s^2 / alpha_s (grad log q(x_s) - grad log q(x_s | c))
# Eq. s.3    E_p[x0 | x_s, c] - E_q[x0 | x_s, c] = sigma_s^2 / alpha_s (grad log p(x_s | c) - grad log q(x_s | c))
# ------------------------------------------------------------------------------------------------------------
def mean_gap(score_a: Tensor, score_b: Tensor, s: Tensor) -> Tensor:
    """The gap between two posterior means, from the gap between the two scores (s < 1)."""
    return like(sigma(s) ** 2 / alpha(s), score_a) * (score_a - score_b)


# ------------------------------------------------------------------------------------------------------------
# Eq. 12     grad log q_w = grad log q(x_s | c) + (w - 1) grad log [q(x_s | c) / q(x_s | phi)]
# ------------------------------------------------------------------------------------------------------------
def guided_score(score_c: Tensor, score_null: Tensor, w: float) -> Tensor:
    """The score of the conditionally sharpened distribution at guidance scale w (1 leaves it as it is)."""
    return score_c + (w - 1) * (score_c - score_null)


# ------------------------------------------------------------------------------------------------------------
# Eq. 13     delta(x_s) = (w - 1) (grad log q(x_s | phi) - grad log q(x_s | c))      classifier score term
#                         + (grad log p_theta(x_s | c) - grad log q(x_s | c))        auxiliary term (optional)
# ------------------------------------------------------------------------------------------------------------
def self_evaluation_scores(
    score_null: Tensor, score_c: Tensor, score_p: Tensor, w: float
) -> tuple[Tensor, Tensor]:
    """Eq. 10 against the guided score of Eq. 12, split into its two terms: (classifier score term, auxiliary term)."""
    return (w - 1) * (score_null - score_c), reverse_kl_direction(score_p, score_c)


# ------------------------------------------------------------------------------------------------------------
# Eq. s.6    Delta = k (G_null - G_c) + (1 - k) (G_fake - G_c),   each G evaluated at (x_s_hat, s, s)
#            k = (w - 1) / w makes it proportional to Eq. 13; k = 1 is the classifier term alone
# ------------------------------------------------------------------------------------------------------------
def self_evaluation(G_null: Tensor, G_c: Tensor, G_fake: Tensor | None = None, k: float = 1.0) -> Tensor:
    """The self-evaluation Delta, [B, ...]. Without G_fake the auxiliary term is off and k is 1."""
    if G_fake is None:
        return G_null - G_c
    return k * (G_null - G_c) + (1 - k) * (G_fake - G_c)


# ------------------------------------------------------------------------------------------------------------
# Eq. 14     x_self = sg[ x0_hat - Delta ]
# ------------------------------------------------------------------------------------------------------------
def pseudo_target(x0_hat: Tensor, Delta: Tensor) -> Tensor:
    """The model's prediction, corrected by its own evaluation. No gradient flows through it.

    With gradient, Eq. 15 would teach nothing: x0_hat - x_self is Delta, a constant. In Eq. 20, the loss that trains,
    the gradient would differ from 2 (x0_hat - target) in length and, through Eq. 19, in direction.
    """
    return (x0_hat - Delta).detach()


# ------------------------------------------------------------------------------------------------------------
# Eq. 15     L_self-evaluate = || x0_hat - x_self ||^2                                            (s.4 is the same line)
# Eq. s.5, s.7   its gradient with respect to x_s_hat is 2 Delta / alpha_s, with posterior means for G:
#                s.5 (k = 1)             2 sigma_s^2 / alpha_s^2 * (grad log q(x_s) - grad log q(x_s | c))
#                s.7 (k = (w - 1) / w)   2 sigma_s^2 / alpha_s^2 * Eq. 13 / w
#                Here the paper reads Eq. 8 backwards, x0_hat = (x_s_hat - sigma_s eps) / alpha_s. In training nothing
#                flows through x_s_hat; the gradient with respect to x0_hat is 2 Delta.
# ------------------------------------------------------------------------------------------------------------
def self_evaluation_loss(x0_hat: Tensor, x_self: Tensor) -> Tensor:
    """The self-evaluation loss of each sample, [B]. Its value is ||Delta||^2; what counts is its gradient, 2 Delta."""
    return squared_norm(x0_hat - x_self)


# ------------------------------------------------------------------------------------------------------------
# Eq. s.8    L_fake = || G(sg[x_s_hat], s, s, c_fake) - sg[x0_hat] ||^2
#            here times 1/s^2, the weight of Eq. 21 at time s, so that it is a velocity loss (Eq. 3) on generated data
# ------------------------------------------------------------------------------------------------------------
def fake_loss(V_fake: Tensor, x0_hat: Tensor, eps: Tensor) -> Tensor:
    """The loss of each sample, [B], that teaches the "fake image" prompt the posterior mean of the model's own samples.

    V_fake is the network's output at (x_s_hat, s, s, c_fake), x_s_hat was made without gradient from x0_hat and eps.
    s.8 tells this branch s alone. So it learns the mean over all t of training, where Eq. 10 asks for that of one t.
    Written with the velocity, because dividing by s^2 afterwards loses all digits as s -> 0. (Eq. 21 may divide by t^2:
    s.11 hardly draws t near 0, but s.13 does draw s near 0.)
    """
    return cfm_loss(V_fake, x0_hat.detach(), eps)


# ============================================================================================================
# Sec. 3.3: the final objective
# ============================================================================================================


# ------------------------------------------------------------------------------------------------------------
# Eq. 17     lam = sigma_t / alpha_t - sigma_s / alpha_s = (t - s) / (alpha_t alpha_s)
# ------------------------------------------------------------------------------------------------------------
def lam(t: Tensor, s: Tensor) -> Tensor:
    """lambda_{s,t} >= 0, [B]: 0 where s = t, and it grows without end as t -> 1.

    The paper leaves open what happens at t = 1. Here the denominator is at least the square of the rounding error, so
    lambda is huge but finite there, and 0 at s = t = 1.
    """
    return (t - s) / (alpha(t) * alpha(s)).clamp_min(torch.finfo(t.dtype).eps ** 2)


# ------------------------------------------------------------------------------------------------------------
# Eq. 5      L = L_data + lambda L_self-evaluate
# Eq. 16     L_{s,t} = || x0_hat - x0 ||^2 + lam || x0_hat - x_self ||^2
# ------------------------------------------------------------------------------------------------------------
def hybrid_loss(x0_hat: Tensor, x0: Tensor, x_self: Tensor, lam: Tensor) -> Tensor:
    """The two-term loss of each sample, [B]. Its gradient is (1 + lam) times that of || x0_hat - x_tar ||^2."""
    return data_loss(x0_hat, x0) + lam * self_evaluation_loss(x0_hat, x_self)


# ------------------------------------------------------------------------------------------------------------
# Eq. 18     x_tar = (x0 + lam x_self) / (1 + lam) = (1 - mix) x0 + mix x_self,   mix = lam / (1 + lam)
# ------------------------------------------------------------------------------------------------------------
def implicit_target(x0: Tensor, x_self: Tensor, lam: Tensor) -> Tensor:
    """The point at which the gradient of Eq. 16 vanishes; lam is [B].

    As a mix it stays finite for a huge lambda. Eq. 19 rescales it, so there it serves as well as x0 + lam x_self. The
    share of x0 is what keeps predictions from collapsing onto the prompt's likeliest pictures (Sec. 3.2).
    """
    mix = lam / (1 + lam)
    return like(1 - mix, x0) * x0 + like(mix, x0) * x_self


# ------------------------------------------------------------------------------------------------------------
# Eq. 19     x_renorm = (x0 + lam x_self) / || x0 + lam x_self || * || x0 ||
# ------------------------------------------------------------------------------------------------------------
def renormalise(x_tar: Tensor, x0: Tensor) -> Tensor:
    """x_tar brought to the norm of x0, sample by sample.

    Without it large lam overpowers the data term and colours drift (Sec. 3.3). A target that is zero but for rounding
    (x0 and x_self are opposite points, say) has no direction, and becomes zero.
    """
    square, goal = squared_norm(x_tar), squared_norm(x0)
    rounding = (8 * torch.finfo(x_tar.dtype).eps) ** 2 * goal
    ratio = torch.where(square > rounding, goal / square, 0.0).sqrt()
    return x_tar * like(ratio, x_tar)


# ------------------------------------------------------------------------------------------------------------
# Eq. 20     L_{s,t} = || x0_hat - x_renorm ||^2
#            The factor (1 + lam) between Eq. 16 and Eq. 18 is dropped here on purpose, as in the paper.
# ------------------------------------------------------------------------------------------------------------
def target_loss(x0_hat: Tensor, target: Tensor) -> Tensor:
    """The regression loss of each sample, [B]. The target carries no gradient."""
    return squared_norm(x0_hat - target)


# ------------------------------------------------------------------------------------------------------------
# Eq. 21     L = E_{s,t}[ w_{s,t} L_{s,t} ],   w_{s,t} = 1 / t^2   (S.2)
# ------------------------------------------------------------------------------------------------------------
def time_weight(t: Tensor) -> Tensor:
    """w_{s,t}, [B]: turns a loss on x0_hat into a loss on the velocity, because x0_hat = x_t - t V."""
    return 1 / t**2


# ============================================================================================================
# S.2: the distribution of (t, s)
# ============================================================================================================


# ------------------------------------------------------------------------------------------------------------
# Eq. s.11   t_raw = sigmoid(z),  z ~ N(0, 1)
# Eq. s.12   t = e^mu / (e^mu + (1 / t_raw - 1)),   mu(L) linear through (512, 0.5) and (4096, 1.15)
# ------------------------------------------------------------------------------------------------------------
def mu_of_length(L: int) -> float:
    """The shift of the noise schedule for pictures of L tokens: longer sequences hide less under the same noise.

    S.2 gives the line between 512 and 4096 tokens; below, it is continued.
    """
    return 0.5 + (1.15 - 0.5) * (L - 512) / (4096 - 512)


def warp(t_raw: Tensor, mu: float) -> Tensor:
    """Move times in [0, 1] towards 1 for mu > 0; 0 and 1 stay where they are. Written without dividing by t_raw."""
    odds = t_raw * torch.exp(torch.as_tensor(mu, dtype=t_raw.dtype))
    return odds / (odds + (1 - t_raw))


# ------------------------------------------------------------------------------------------------------------
# Eq. s.13   s = t for half of the samples,   s ~ U((1 - tau) t, t) for the others
# ------------------------------------------------------------------------------------------------------------
def sample_times(z: Tensor, u: Tensor, below: Tensor, mu: float, tau: float) -> tuple[Tensor, Tensor]:
    """z normal [B], u uniform in [0, 1) [B], below [n]: the positions with s < t -> t, s [B] each (s.11 to s.13)."""
    t = warp(torch.sigmoid(z), mu)
    s = t.index_put((below,), ((1 - tau * u) * t)[below])
    return t, s


def below_positions(index: list[int], p_equal: float = 0.5) -> Tensor:
    """Which positions of the micro-batch `index` (global sample indices) have s < t: int64 [n].

    The paper draws s = t with probability 0.5 per sample. Here it is exactly every second sample by global index, so
    the two extra passes run on a half of fixed size. `index` must be a run of consecutive integers (a rank that took
    every second one would get all of them or none). p_equal in [0, 1] is the share with s = t; 1 is flow matching.
    """
    share = 1 - p_equal + 1e-12  # 1 - 0.9 is a little less than 0.1
    below = [i for i, g in enumerate(index) if int((g + 1) * share) > int(g * share)]
    return torch.tensor(below, dtype=torch.int64)


class Draws(NamedTuple):
    """The random numbers of one micro-batch."""

    z: Tensor  # [B] normal, for t
    u: Tensor  # [B] uniform in [0, 1), for s
    eps: Tensor  # [B, ...] normal, makes x_t
    eps_s: Tensor  # [B, ...] normal, makes x_s_hat
    below: Tensor  # [n] int64, the positions with s < t


def draw(seed: int, step: int, index: list[int], shape: tuple, p_equal: float = 0.5, device="cpu") -> Draws:
    """The Draws of the samples with the given global indices at one step; shape is that of one sample."""
    z, u, eps, eps_s = [], [], [], []
    for g in index:
        random = rng(seed, "step", step, g)
        z.append(random.standard_normal(dtype=np.float32))
        u.append(random.random(dtype=np.float32))
        eps.append(random.standard_normal(shape, dtype=np.float32))
        eps_s.append(random.standard_normal(shape, dtype=np.float32))
    numbers = [torch.from_numpy(np.stack(x).astype(np.float32)) for x in (z, u, eps, eps_s)]
    return Draws(*(x.to(device) for x in (*numbers, below_positions(index, p_equal))))


# ============================================================================================================
# The whole step
# ============================================================================================================


class SelfE(nn.Module):
    """One training step of Self-E as one forward pass (Sec. 3.3, Fig. 2): data in, scalar loss out.

    network        V(x_t, t, s, *c), trained. It also gives the unconditional and the fake branch ("online").
    ema            its moving average, gives the conditional branch (S.2). Only evaluated, never trained here.
    target         "renorm" Eq. 20 | "tar" Eq. 18 as target, no normalisation | "sum" Eq. 16 to the letter
    k              weight of the classifier term once the auxiliary term is on (S.1.2)
    delta_scale    multiplies Delta; 1 is the paper, 0 the control: Eq. 19 without an evaluation
    unconditional  the network of the null branch; None is the paper: `network`

    `forward` is the paper's step and reads from top to bottom. What the ablations and the auxiliary term change is in
    the methods below it: Delta (`self_evaluate`, with the branches of `evaluate`), its weight (`weigh`),
    and what is regressed on (`regress`).

    At s = 0 there is nothing to evaluate: G(x, 0, 0, .) is x itself for every prompt (Eq. 6), so Delta is exactly 0;
    x0 keeps the share 1 - t of the target. The one-step prediction, evaluated at t = 1, s = 0, therefore depends on
    what the network learns at larger s (Delta falls as s^2).
    """

    def __init__(self, network, ema, *, target="renorm", k=0.9, delta_scale=1.0, unconditional=None):
        super().__init__()
        if target not in ("renorm", "tar", "sum"):
            raise ValueError(f"unknown target {target!r}")
        self.network, self.ema, self.unconditional = network, ema, unconditional or network
        self.target, self.k, self.delta_scale = target, k, delta_scale

    def forward(
        self,
        x0: Tensor,
        c: tuple,
        null: tuple,
        fake: tuple | None,
        is_null: Tensor,
        draws: Draws,
        tau: float,
        mu: float,
        aux: bool = False,
    ) -> tuple[Tensor, dict]:
        """The loss of one micro-batch, per value of x0, and statistics for the log.

        x0 [B, ...] fp32. c, null and fake are prompts as the network takes them, tuples of tensors with leading
        dimension B: the caption of each sample (for pictures its text tokens and pooled vector, encoders.py), the empty
        prompt, and the prompt of generated pictures (read only with aux). is_null [B] bool, where c is the null prompt.
        tau in [0, 1] (s.13) and mu (s.12) shape the distribution of (t, s); aux switches the auxiliary term on. Returns
        the scalar loss and a dict of detached tensors: t, s, loss [B]; where some s < t delta_norm and lam [n], with
        aux fake_loss [n]; n is the number of positions in draws.below.
        """
        t, s = sample_times(draws.z, draws.u, draws.below, mu, tau)  # [B] s.11-s.13
        x_t = add_noise(x0, t, draws.eps)  # [B, ...] Eq. 1
        x0_hat = G(self.network, x_t, t, s, c)  # [B, ...] Eq. 6: the only pass with gradient, but for s.8
        loss = data_loss(x0_hat, x0)  # [B] Eq. 7
        D = x0[0].numel()  # the paper sums over values; divided by D, losses read the same at every size
        stats = {"t": t, "s": s}

        below = draws.below  # [n] the positions with s < t; flow matching has none
        loss_fake = t.new_zeros(len(below))  # [n] s.8
        if len(below):
            prompts = rows(c, below), rows(null, below)
            fakes = rows(fake, below) if aux else None
            # Delta [n, ...] and the loss of the fake branch [n]: Eq. 8, s.6, s.8
            Delta, loss_fake = self.self_evaluate(
                x0_hat[below], s[below], *prompts, fakes, is_null[below], draws.eps_s[below]
            )
            x_self = pseudo_target(x0_hat[below], Delta)  # [n, ...] Eq. 14
            lam = self.weigh(t[below], s[below], is_null[below], aux)  # [n] Eq. 17
            regressed = self.regress(x0_hat[below], x0[below], x_self, lam)  # [n] Eq. 16, 18-20
            loss = loss.index_put((below,), regressed)
            stats |= {"lam": lam, "delta_norm": (squared_norm(Delta) / D).sqrt()}
            stats |= {"fake_loss": loss_fake.detach() / D} if aux else {}

        loss = time_weight(t) * loss  # [B] Eq. 21
        stats["loss"] = loss.detach() / D
        total = loss.mean() + loss_fake.sum() / len(x0)  # s.8 with coefficient 1, over the full batch too
        return total / D, stats

    def self_evaluate(
        self,
        x0_hat: Tensor,
        s: Tensor,
        c: tuple,
        null: tuple,
        fake: tuple | None,
        is_null: Tensor,
        eps_s: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Judge the predictions at noise level s: Delta [n, ...], detached, and the loss of the fake branch, [n].

        fake is None without the auxiliary term; the loss is then 0.
        """
        x_s_hat = add_noise(x0_hat, s, eps_s).detach()  # [n, ...] Eq. 8; judged without gradient
        G_c, G_null = self.evaluate(x_s_hat, s, c, null, is_null)  # [n, ...]
        G_fake, loss_fake = None, torch.zeros_like(s)
        if fake is not None:
            # One pass with gradient serves both Delta (s.6) and the loss of the fake branch (s.8)
            V_fake = self.network(x_s_hat, s, s, *fake)
            G_fake = one_step_estimate(x_s_hat, s, V_fake).detach()
            loss_fake = fake_loss(V_fake, x0_hat, eps_s)  # [n] s.8
        Delta = self.delta_scale * self_evaluation(G_null, G_c, G_fake, self.k)  # [n, ...] s.6
        return Delta, loss_fake

    @torch.no_grad()
    def evaluate(
        self, x_s_hat: Tensor, s: Tensor, c: tuple, null: tuple, is_null: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The branches of the classifier score at (x_s_hat, s, s), [n, ...] each: G_c by the EMA, G_null online."""
        G_c = G(self.ema, x_s_hat, s, s, c)
        G_null = G(self.unconditional, x_s_hat, s, s, null)
        # A null prompt has no classifier score: EMA minus online would be the difference of two networks, noise. For
        # other prompts S.2 asks for the two networks, and the same noise is a part of their Delta.
        return torch.where(like(is_null, G_c), G_null, G_c), G_null

    def weigh(self, t: Tensor, s: Tensor, is_null: Tensor, aux: bool) -> Tensor:
        """lambda, [n]: Eq. 17's, and 0 for the null prompt, a plain data target at every (t, s).

        The paper does not say what the null prompt learns at s < t. Guidance needs a null branch that follows the data.
        Once the auxiliary term is on, there is a Delta for the null prompt too, so it learns from that.
        """
        return lam(t, s) if aux else torch.where(is_null, 0.0, lam(t, s))

    def regress(self, x0_hat: Tensor, x0: Tensor, x_self: Tensor, lam: Tensor) -> Tensor:
        """The loss of the samples with s < t, [n]: Eq. 20, or one of Table 2's ablations of it."""
        if self.target == "sum":
            return hybrid_loss(x0_hat, x0, x_self, lam)  # Eq. 16
        x_tar = implicit_target(x0, x_self, lam)  # Eq. 18
        x_renorm = renormalise(x_tar, x0) if self.target == "renorm" else x_tar  # Eq. 19
        return target_loss(x0_hat, x_renorm)  # Eq. 20
