"""Can the identities fail? Each mutant is losses.py, sampler.py or a file of peers/ with one token changed.

    python -m pytest -q -s tests/test_mutations.py      # prints which identity killed which mutant

A mutant is a substitution in the source text. The changed source is executed as a fresh module in this process, with a
fresh copy of toy/checks/ on top of it; nothing on disk and no module of the other tests is touched. The checks
run from the quickest to the slowest and stop at the first that fails or raises.
"""

import functools
import importlib
import sys
import time
import types
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# what is wrong | the text | its replacement
TABLE = r"""
losses:
    Eq. 1: sign of alpha | return like(alpha(t), x0) * x0 + | return -like(alpha(t), x0) * x0 +
    Eq. 1: eps subtracted | * x0 + like(sigma(t), x0) * eps | * x0 - like(sigma(t), x0) * eps
    Eq. 2: sign | return eps - x0 | return x0 - eps
    Eq. 3: sign of the target | squared_norm(V - velocity( | squared_norm(V + velocity(
    Eq. 4: sign of V | return x_t - like(t, x_t) * V | return x_t + like(t, x_t) * V
    Eq. 7: sign | return squared_norm(x0_hat - x0) | return squared_norm(x0_hat + x0)
    Eq. 10: real minus fake | return score_p - score_q | return score_q - score_p
    Eq. 11: sigma for sigma^2 | * mean - x_s) / like(sigma(s), x_s) ** 2 | * mean - x_s) / like(sigma(s), x_s) ** 1
    Eq. s.1: sign of the score | (x_s + like(sigma(s), x_s) ** 2 * score) | (x_s - like(sigma(s), x_s) ** 2 * score)
    Eq. s.2: alpha forgotten | sigma(s) ** 2 / alpha(s) | sigma(s) ** 2
    Eq. 12: w for w - 1 | score_c + (w - 1) | score_c + (w - 0)
    Eq. 13: classifier term reversed | (w - 1) * (score_null - score_c) | (w - 1) * (score_c - score_null)
    Eq. 14: evaluation reversed | return G_null - G_c | return G_c - G_null
    Eq. s.6: k for 1 - k | + (1 - k) * (G_fake - G_c) | + k * (G_fake - G_c)
    Eq. s.6: fake against null | (1 - k) * (G_fake - G_c) | (1 - k) * (G_fake - G_null)
    Eq. 14: Delta added | return (x0_hat - Delta).detach() | return (x0_hat + Delta).detach()
    Eq. 14: no stop-gradient | return (x0_hat - Delta).detach() | return (x0_hat - Delta)
    Eq. s.8: the sample learns too | cfm_loss(V_fake, x0_hat.detach(), eps) | cfm_loss(V_fake, x0_hat, eps)
    Eq. 17: t for t - s | return (t - s) / (alpha(t) | return t / (alpha(t)
    Eq. 17: 1 - s forgotten in mix | (alpha(t) * alpha(s)).clamp_min | alpha(t).clamp_min
    Eq. 16: self-evaluation subtracted | data_loss(x0_hat, x0) + lam * | data_loss(x0_hat, x0) - lam *
    Eq. 16: lambda squared | + lam * self_evaluation_loss | + lam**2 * self_evaluation_loss
    Eq. 18: data left at full weight | return like(1 - mix, x0) * x0 + | return x0 +
    Eq. 19: squared norm for norm | goal / square, 0.0).sqrt() | goal / square, 0.0)
    Eq. 20: sign | return squared_norm(x0_hat - target) | return squared_norm(x0_hat + target)
    Eq. 21: 1/t | return 1 / t**2 | return 1 / t**1
    Eq. s.12: FLUX's anchor | (L - 512) | (L - 256)
    Eq. s.12: mu's sign | odds = t_raw * torch.exp( | odds = t_raw / torch.exp(
    Eq. s.13: tau ignored | ((1 - tau * u) * t) | ((1 - 1 * u) * t)
    Eq. s.13: s around 1 instead of t | ((1 - tau * u) * t) | ((1 - tau * u) * 1)
    p(s = t): every sample has s < t | if int((g + 1) * share) > int(g | if int((g + 1) * share) >= int(g
    Eq. 8 reuses the noise of Eq. 1 | eps_s.append(random.standard_normal(shape, dtype=np.float32)) | eps_s.append(eps[-1])
    G told t twice | G(self.network, x_t, t, s, c) | G(self.network, x_t, t, t, c)
    prediction detached | x0_hat = G(self.network, x_t, t, s, c) | x0_hat = G(self.network, x_t, t, s, c).detach()
    noised to another level | add_noise(x0_hat, s, eps_s) | add_noise(x0_hat, s / 2, eps_s)
    evaluation lets gradient through | x_s_hat = add_noise(x0_hat, s, eps_s).detach() | x_s_hat = add_noise(x0_hat, s, eps_s)
    evaluates the data, not the sample | x0_hat[below], s[below], *prompts | x0[below], s[below], *prompts
    EMA for online: the null branch | G_null = G(self.unconditional, | G_null = G(self.ema,
    online for EMA: the conditional branch | G_c = G(self.ema, | G_c = G(self.network,
    conditional branch told another time | G_c = G(self.ema, x_s_hat, s, s, | G_c = G(self.ema, x_s_hat, s / 2, s,
    null branch sees the condition | x_s_hat, s, s, null) | x_s_hat, s, s, c)
    evaluated at t instead of s | x0_hat[below], s[below], *prompts | x0_hat[below], t[below], *prompts
    fake branch sees the real prompt | s, s, *fake) | s, s, *c)
    null prompts keep EMA - online | torch.where(like(is_null, G_c), G_null, G_c) | torch.where(like(is_null, G_c), G_c, G_c)
    Delta := 0 | Delta = self.delta_scale * self_evaluation( | Delta = 0 * self_evaluation(
    k ignored | self_evaluation(G_null, G_c, G_fake, self.k) | self_evaluation(G_null, G_c, G_fake, 1)
    mix for lambda in Eq. 16 | x_self, lam)  # Eq. 16 | x_self, lam / (1 + lam))
    x_renorm := x0 | x_renorm = renormalise(x_tar, x0) if | x_renorm = x0 if
    Eq. 18 normalised too | if self.target == "renorm" else x_tar | if self.target != "sum" else x_tar
    1/s^2 instead of 1/t^2 | loss = time_weight(t) * loss | loss = time_weight(s) * loss
    unweighted | loss = time_weight(t) * loss | loss = 1 * loss
    s.8 over half a batch | loss_fake.sum() / len(x0) | loss_fake.sum() / len(loss_fake)
sampler:
    grid upside down | torch.linspace(1, 0, steps + 1 | torch.linspace(0, 1, steps + 1
    one evaluation too few | torch.linspace(1, 0, steps + 1 | torch.linspace(1, 0, steps + 0
    grid not warped | dtype=torch.float64), mu).tolist() | dtype=torch.float64), 0).tolist()
    energy of the null branch | renormalise(guided, conditional) | renormalise(guided, guided)
    guidance from the conditional branch | return unconditional + guidance * | return conditional + guidance *
    guidance away from the condition | guidance * (conditional - unconditional) | guidance * (unconditional - conditional)
    energy of the null branch | extrapolate(v_c, v_null, guidance), v_c) | extrapolate(v_c, v_null, guidance), v_null)
    x0 space: energy of the null branch | (x0_c, x0_null, guidance), x0_c) | (x0_c, x0_null, guidance), x0_null)
    guided branches told t twice | torch.cat([s, s]) | torch.cat([t, t])
    eps_hat with alpha_s | x_t - alpha(t) * x0_hat | x_t - alpha(t_next) * x0_hat
    eps_hat over s | * x0_hat) / sigma(t) | * x0_hat) / sigma(t_next)
    posterior variance not squared | (1 - ratio**2) | (1 - ratio)
    posterior variance: alphas swapped | ratio = alpha(t) * sigma(t_next) / (alpha(t_next) * | ratio = alpha(t_next) * sigma(t_next) / (alpha(t) *
    re-noising to t | std = sigma(t_next)\n | std = sigma(t)\n
    eta ignored | std = eta * variance**0.5 | std = 1 * variance**0.5
    eta scales the variance | std = eta * variance**0.5 | std = eta**0.5 * variance**0.5
    old noise kept in full | ** 2 - std**2, 0.0) | ** 2 - 0 * std**2, 0.0)
    fresh noise at the scale of its variance | return x_next + std * noise | return x_next + std**2 * noise
    s_rule reversed | s_k = t_next + s_rule * (t - t_next) | s_k = t - s_rule * (t - t_next)
    s_k ignored | for time in (t, s_k)] | for time in (t, t)]
    noise at the last step | fresh = eta != 0 and t_next > 0 | fresh = eta != 0 and t_next >= 0
    the same fresh noise at every step | (draw_noise(k) if | (draw_noise(0) if
    next step starts from x0_hat | x = update(x, x0_hat, t, t_next, eta, noise) | x = update(x0_hat, x0_hat, t, t_next, eta, noise)
peers.tim:
    told t in the difference | ahead = V(x_t + EPSILON * v, t + EPSILON, r, *c) | ahead = V(x_t + EPSILON * v, t + EPSILON, t, *c)
    difference at fixed x | behind = V(x_t - EPSILON * v, t | behind = V(x_t + EPSILON * v, t
    half the slope | return (ahead - behind) / (2 * EPSILON) | return (ahead - behind) / (4 * EPSILON)
    sign of the slope | (v_w - like(t - r, v_w) * dF_dt).detach() | (v_w + like(t - r, v_w) * dF_dt).detach()
    t for t - r | like(t - r, v_w) * dF_dt | like(t, v_w) * dF_dt
    guidance towards the null prompt | v + (1 - 1 / w) * (F_c - F_null) | v + (1 - 1 / w) * (F_null - F_c)
    w for 1 - 1/w | v + (1 - 1 / w) * (F_c - F_null) | v + (w - 1) * (F_c - F_null)
    the trained network guides | self.ema(x_t, t, t, *c), self.ema(x_t, t, t, *null) | self.network(x_t, t, t, *c), self.network(x_t, t, t, *null)
    guided at every t | (t >= GUIDED[0]) & (t <= GUIDED[1]) | (t >= 0) & (t <= 1)
    r = 0 never | torch.where(to_data, 0.0, earlier)[below] | earlier[below]
    times not sorted | return torch.maximum(a, b), torch.minimum | return a, torch.minimum
    no weight of time | loss = time_weight(t, r) * error | loss = error
    not divided by itself | error / (error.detach() + FLOOR) ** self.power | error
    told t twice | F = self.network(x_t, t, r, *c) | F = self.network(x_t, t, t, *c)
    derivative along another path | x_t[below], v[below], t[below] | x_t[below], v_w[below], t[below]
peers.meanflow:
    derivative at fixed x | (v, torch.ones_like(t)))[1] | (torch.zeros_like(v), torch.ones_like(t)))[1]
    derivative at fixed t | (v, torch.ones_like(t)))[1] | (v, torch.zeros_like(t)))[1]
    unguided path | x_t[below], v_w[below], t[below] | x_t[below], v[below], t[below]
    always improved | if self.improved else v_j | if not self.improved else v_j
    velocity at r | self.network(x_j, t_j, t_j, *c_j) | self.network(x_j, t_j, r_j, *c_j)
    other times | P_MEAN, P_STD = -0.4, 1.0 | P_MEAN, P_STD = 0.0, 1.0
    power ignored | + FLOOR) ** self.power | + FLOOR) ** 0
    told t twice | u = self.network(x_t, t, r, *c) | u = self.network(x_t, t, t, *c)
peers.shortcut:
    first half twice | return ((v_1 + v_2) / 2) | return ((v_1 + v_1) / 2)
    whole step to the middle | x_t - like(half, x_t) * v_1 | x_t - like(d, x_t) * v_1
    second half from the start | self.small_step(x_mid, t - half, | self.small_step(x_t, t - half,
    second half at t | self.small_step(x_mid, t - half, | self.small_step(x_mid, t,
    told d, not d/2 | v_1 = self.small_step(x_t, t, half, | v_1 = self.small_step(x_t, t, d,
    the trained network evaluates | v = self.ema(x_t, t, t - d, *c) | v = self.network(x_t, t, t - d, *c)
    guided at every d | d * M < 1.5 | d * M < 1e9
    guided at no d | d * M < 1.5 | d * M < 0.5
    larger steps only | (math.log2(M) * u).floor() | (3 * u).floor()
    times off the grid | 1 - place / sections | 1 - (place + 0.5) / sections
    told s = t | self.network(x_t, t, t - d, *c) - goal | self.network(x_t, t, t, *c) - goal
peers.variants:
    lam_scale ignored | self.lam_scale * losses | losses
    lam_time ignored | (t + s) / 2 if self.lam_time == "middle" else s | s
    null target inverted | if self.null_target == "data" and | if self.null_target != "data" and
    never literal | if self.null_target == "literal" | if False
"""


def mutants() -> list[tuple[str, str, str, str]]:
    """(module, what is wrong, the text, its replacement) of each line of the table."""
    found, module = [], ""
    for line in TABLE.strip().splitlines():
        if not line.startswith(" "):
            module = line.removesuffix(":")
        else:
            found.append((module, *(part.replace("\\n", "\n") for part in line.strip().split(" | "))))
    return found


MUTANTS = mutants()
PEERS = list(dict.fromkeys(module for module, *_ in MUTANTS if module.startswith("peers.")))


@functools.cache  # what is not mutated is compiled once
def compiled(text: str, name: str):
    return compile(text, f"<{name}>", "exec")


@contextmanager
def modules_of(sources: dict):
    """Execute the sources, in order, as fresh modules that see one another; the real ones come back afterwards."""
    saved = {name: importlib.import_module(name) for name in sources}

    def put(name: str, module: types.ModuleType) -> None:
        sys.modules[name] = module
        folder, _, last = name.rpartition(".")
        if folder:
            setattr(sys.modules[folder], last, module)  # where `from peers import tim` finds it

    try:
        fresh = {}
        for name, text in sources.items():
            fresh[name] = types.ModuleType(name)
            put(name, fresh[name])
            exec(compiled(text, name), fresh[name].__dict__)
        yield fresh
    finally:
        for name, module in saved.items():
            put(name, module)


def read(*parts: str) -> str:
    return ROOT.joinpath(*parts).read_text(encoding="utf-8")


CHECKS = ("stage", "flow_matching", "scores", "self_evaluation", "objective", "step", "inference", "peers")
ORIGINAL = {"losses": read("losses.py"), "sampler": read("sampler.py")}
ORIGINAL |= {name: read(f"{name.replace('.', '/')}.py") for name in PEERS}
ORIGINAL |= {f"toy.checks.{name}": read("toy", "checks", f"{name}.py") for name in CHECKS}


def first_failure(stage, order: list[str]) -> str | None:
    """The name of the first check that fails, with what it said; None if all hold."""
    checks = {line[-1].__name__: line for line in stage.CHECKS}
    for name in order:
        equation, _, bound, is_above, function = checks[name]
        try:
            number = function()
        except Exception as error:  # a mutant may well crash; that is a death too, and its cause is printed
            return f"{equation}: {name} raised {type(error).__name__}"
        if not (number >= bound if is_above else number <= bound):
            return f"{equation}: {name} ({number:.1e} against {bound:.0e})"
    return None


@pytest.fixture(scope="module")
def quickest_first() -> list[str]:
    """The checks by their time on the unchanged code, where each of them must hold."""
    with modules_of(ORIGINAL) as fresh:
        took = {}
        for *_, function in fresh["toy.checks.stage"].CHECKS:
            start = time.perf_counter()
            failure = first_failure(fresh["toy.checks.stage"], [function.__name__])
            took[function.__name__] = time.perf_counter() - start
            assert failure is None, failure
    return sorted(took, key=took.get)


@pytest.mark.parametrize("mutant", MUTANTS, ids=[f"{m[0]}: {m[1]}" for m in MUTANTS])
def test_mutant_is_killed(mutant, quickest_first):
    name, what, old, new = mutant
    assert ORIGINAL[name].count(old) == 1, f"{old!r} must occur exactly once in {name}"
    with modules_of(ORIGINAL | {name: ORIGINAL[name].replace(old, new)}) as fresh:
        killer = first_failure(fresh["toy.checks.stage"], quickest_first)
    assert killer, f"{name}.py with {old!r} -> {new!r} passes every identity"
    print(f"{name + '.py':11s} {what:42s} killed by {killer}")
