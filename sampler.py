"""Any-step sampling (Sec. 3.4, S.2 "Inference", S.3.1): from noise to data in N evaluations of the network.

    x = sampler.sample(V, noise, cond, null, steps=4, draw_noise=lambda k: torch.randn_like(noise))

One update serves every sampler of the paper, from (x_t, x0_hat) at time t to the next time of the grid, t':

    x_t' = alpha_t' x0_hat + sqrt(sigma_t'^2 - std^2) eps_hat + std * fresh noise
    eps_hat = (x_t - alpha_t x0_hat) / sigma_t

    choice            std                                                      what it is
    eta = 0           0                                                        Eq. 22, the deterministic (DDIM) step
    eta = 1           sigma_t' sqrt(1 - (alpha_t sigma_t' / (alpha_t' sigma_t))^2)  q(x_t' | x_t, x0_hat), the paper's
    0 < eta < 1       eta times that                                           in between
    eta = "renoise"   sigma_t'                                                 Eq. 8: discard eps_hat, noise x0_hat anew
    eta = "public"    sigma_t' sqrt(1 - (sigma_t' / sigma_t)^2)                eta = 1 in a co-author's code (SILENCES.md)
    at t' = 0         0                                                        every choice returns x0_hat itself

From t = 1 (alpha_t = 0), eta = 1 has std = sigma_t'. Then none of the old noise is kept: x_t' is x0_hat, noised anew.

s_k, the network's second time (S.3.1), lies the fraction s_rule of the way back from t_{k+1} to t_k:

    s_rule = 0         s_k = t_{k+1}    the paper's default: tie s to where this step leads
    s_rule = 1         s_k = t_k        as in flow matching; the only choice for a flow matching model
    s_rule = 0.5       half-way, good for one step without guidance (Fig. S.4)

t_max: the network is asked at min(t, t_max), which is also the t of Eq. 6; the step keeps the grid's t. Sampling begins
at t = 1, where training (s.11, s.12) hardly ever is: t > 0.99 comes once in 70,000 pictures of the laptop model. Its
answer there is a guess, and little in training holds that in place. At t_max = 0.94, which one picture in a hundred
exceeds, it has learned what to say of noise. The default, 1, is the paper's, whose 2B run sees some 13,000 pictures
above 0.99.

"N steps" means N evaluations of the network (with guidance, of both branches), N + 1 grid points. (The paper's
{t_1 .. t_N} makes N - 1 moves.)
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from losses import G, alpha, one_step_estimate, renormalise, sigma, warp


# ------------------------------------------------------------------------------------------------------------
# Eq. s.12   the time grid: linear from 1 to 0, then warped as in training
# ------------------------------------------------------------------------------------------------------------
def time_grid(steps: int, mu: float) -> list[float]:
    """steps + 1 falling times from exactly 1 to exactly 0. steps >= 1; mu as in `losses.mu_of_length`."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    return warp(torch.linspace(1, 0, steps + 1, dtype=torch.float64), mu).tolist()


# ------------------------------------------------------------------------------------------------------------
# Eq. 12     as energy-preserving guidance (Sec. 3.4): V_null + w (V_c - V_null), brought back to the norm of V_c
# ------------------------------------------------------------------------------------------------------------
def energy_preserving(guided: Tensor, conditional: Tensor) -> Tensor:
    """`guided` [B, ...] scaled, sample by sample, to the norm of `conditional`; zero stays zero."""
    return renormalise(guided, conditional)  # Eq. 19's line


def branches(
    V: Callable, x_t: Tensor, t: Tensor, s: Tensor, cond: tuple, null: tuple
) -> tuple[Tensor, Tensor]:
    """(V_c, V_null) [B, ...]: the network's output for the prompt and for the null prompt, in one batch of 2B."""
    both = tuple(torch.cat([c, n]) for c, n in zip(cond, null, strict=True))
    return V(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([s, s]), *both).chunk(2)


def extrapolate(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Guidance, plain: from the unconditional through the conditional and on; 1 is the conditional."""
    return unconditional + guidance * (conditional - unconditional)


def predict(
    V: Callable,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    cond: tuple,
    null: tuple | None,
    guidance: float,
    space: str = "v",
) -> Tensor:
    """x0_hat [B, ...] at x_t (Eq. 6), guided. Both branches are evaluated at the same (t, s).

    guidance 1 evaluates the conditional branch only (null may then be None). `space` is where the norm is kept: "v",
    the velocity, or "x0", the prediction. Guidance extrapolates, so a guided velocity grows longer with its scale; a
    longer velocity oversteps and over-saturates colours. Keeping the norm of V_c leaves guidance the direction alone.
    """
    if space not in ("v", "x0"):
        raise ValueError(f'space must be "v" or "x0", not {space!r}')
    if guidance == 1:
        return G(V, x_t, t, s, cond)
    v_c, v_null = branches(V, x_t, t, s, cond, null)
    if space == "v":
        return one_step_estimate(x_t, t, energy_preserving(extrapolate(v_c, v_null, guidance), v_c))
    x0_c, x0_null = one_step_estimate(x_t, t, v_c), one_step_estimate(x_t, t, v_null)
    return energy_preserving(extrapolate(x0_c, x0_null, guidance), x0_c)


# ------------------------------------------------------------------------------------------------------------
# Eq. 22     x_{t_{k+1}} = x_{t_k} - (t_k - t_{k+1}) V(x_{t_k}, t_k, s_k, c)       (eta = 0; others in the table above)
#            With std = 0 the lines below are that: x0_hat = x_t - t V and eps_hat = x_t + (1 - t) V, so
#            alpha_t' x0_hat + sigma_t' eps_hat = x_t - (t - t') V.
# ------------------------------------------------------------------------------------------------------------
def update(
    x_t: Tensor, x0_hat: Tensor, t: float, t_next: float, eta: float | str, noise: Tensor | None
) -> Tensor:
    """One step from time t in (0, 1] to t_next in [0, t). noise [B, ...] is read unless eta = 0 or t_next = 0."""
    eps_hat = (x_t - alpha(t) * x0_hat) / sigma(t)
    if eta == "renoise":
        std = sigma(t_next)
    elif eta == "public":
        std = sigma(t_next) * (1 - (sigma(t_next) / sigma(t)) ** 2) ** 0.5
    else:
        ratio = alpha(t) * sigma(t_next) / (alpha(t_next) * sigma(t))
        variance = sigma(t_next) ** 2 * (1 - ratio**2)  # of q(x_t' | x_t, x0)
        std = eta * variance**0.5
    x_next = alpha(t_next) * x0_hat + max(sigma(t_next) ** 2 - std**2, 0.0) ** 0.5 * eps_hat
    return x_next + std * noise if std > 0 else x_next


def check_choices(s_rule: float, eta: float | str, guidance: float, t_max: float) -> None:
    """Raise ValueError unless s_rule is in [0, 1], eta in [0, 1], "renoise" or "public", guidance >= 0, t_max in (0, 1]."""
    if not (eta in ("renoise", "public") or 0 <= eta <= 1) or not 0 <= s_rule <= 1:
        raise ValueError(
            f'eta must be "renoise", "public" or in [0, 1], s_rule in [0, 1]; they are {eta!r} and {s_rule!r}'
        )
    if not guidance >= 0 or not 0 < t_max <= 1:
        raise ValueError(f"guidance must be at least 0, t_max in (0, 1]; they are {guidance!r} and {t_max!r}")


@torch.no_grad()
def trajectory(
    V: Callable,
    x: Tensor,
    cond: tuple,
    null: tuple | None = None,
    *,
    steps: int,
    mu: float = 0.0,
    s_rule: float = 0.0,
    eta: float | str = 1.0,
    guidance: float = 1.0,
    space: str = "v",
    t_max: float = 1.0,
    draw_noise: Callable[[int], Tensor] | None = None,
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Yield (t', x at t', x0_hat) after each step, t' being its end, from x at time 1; the last x is the sample.

    V(x_t, t, s, *cond) is the network; x [B, ...] standard normal, fp32 or fp64; cond and null tuples of tensors with
    leading dimension B. draw_noise(k), k = 0 .. steps - 2, gives the fresh noise of each step but the last, like x;
    None draws it from torch's global generator.
    s_rule, eta, guidance and t_max are as in `check_choices`.
    """
    check_choices(s_rule, eta, guidance, t_max)
    grid = time_grid(steps, mu)
    for k, (t, t_next) in enumerate(zip(grid[:-1], grid[1:])):
        s_k = t_next + s_rule * (t - t_next)
        asked = [torch.full((len(x),), min(time, t_max), dtype=x.dtype, device=x.device) for time in (t, s_k)]
        x0_hat = predict(V, x, *asked, cond, null, guidance, space)
        fresh = eta != 0 and t_next > 0
        noise = (draw_noise(k) if draw_noise else torch.randn_like(x)) if fresh else None
        x = update(x, x0_hat, t, t_next, eta, noise)
        yield t_next, x, x0_hat


def sample(V: Callable, x: Tensor, cond: tuple, null: tuple | None = None, **choices) -> Tensor:
    """The end of `trajectory`, whose arguments it takes: samples [B, ...] from the noise x."""
    for _, x, _ in trajectory(V, x, cond, null, **choices):
        pass
    return x
