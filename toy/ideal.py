"""What does the objective ask for? The targets of Eq. 18 and 19, iterated until they converge, without a network.

    python -m toy.ideal      # three seeds, 5 to 42 minutes of one core: a table, toy/results/ideal.json and ideal.png

What a trained network generates depends on the objective and on its own errors. Here there are no such errors:

    every x_t has its own free prediction x0_hat   no network to blend neighbours
    G_null, G_c are exact posterior means          no error in the evaluation (Eq. 4, s.1)
    G_fake is the exact mean of the predictions    s.8 learned to perfection
    t and s are fixed                              no sharing between times (trained, G_fake blends all t of an s)

The predictions move towards their target until they converge: x0_hat <- x0_hat + rate (target - x0_hat), each time with
a new x0 from q(x0 | x_t, c) and new noise in Eq. 8. Where they converge depends on the objective alone. They start from
that of flow matching, E[x0 | x_t, c]. The distance is measured between p(x_s | c) and q(x_s | c), which the paper wants
to be equal (Sec. 3.2), and at s = 0.
"""

import itertools
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import losses
from engine import checkpoint, errors, machine
from rng import rng
from toy import figures, kept
from toy.measures import energy_distance
from toy.mixture import LAYOUTS, Mixture

SEEDS, T, TIMES = (0, 1, 2), 0.9, (0.05, 0.3, 0.6)
ANSWERS, ROUNDS = 300, 300  # answers per condition; rounds of following the target

GOALS = {  # label -> (k, whether Eq. 19 follows Eq. 18, factor on Delta); None stays at the start
    "flow matching": None,
    "Eq. 19, Delta = 0": (1.0, True, 0.0),
    "Eq. 19, classifier only": (1.0, True, 1.0),
    "Eq. 19, k = 0.9": (0.9, True, 1.0),
    "Eq. 19, k = 0": (0.0, True, 1.0),
    "Eq. 18, classifier only": (1.0, False, 1.0),
    "Eq. 18, k = 0": (0.0, False, 1.0),
}


def mean_of_answers(x_s: Tensor, s: float, x0_hat: Tensor, others: Tensor | None = None) -> Tensor:
    """E_p[x0 | x_s, c] when p(x0 | c) is the answers themselves: [..., n, D] each; others [n, n], answers to skip."""
    log_shares = -torch.cdist(x_s, (1 - s) * x0_hat).square() / (2 * s**2)
    if others is not None:
        log_shares = log_shares.masked_fill(others, -torch.inf)
    return log_shares.softmax(-1) @ x0_hat


def follow(x0_hat: Tensor, t: Tensor, s: Tensor, goal: tuple, rounds: int, data, noise, evaluate) -> Tensor:
    """Predictions x0_hat [B, ...] at times t, s [B] after some rounds towards their target: SelfE's step, no network.

    goal is one of GOALS, not None. data() draws x0 ~ q(x0 | x_t, c), because training meets every x0 that an x_t could
    have come from; noise() is standard normal like x0_hat; evaluate(x_s, x0_hat) gives G_null, G_c and G_fake. The
    falling rate averages out what the draws add.
    """
    k, normalised, scale = goal
    lam = losses.lam(t, s)
    for i in range(rounds):
        x0 = data()
        x_s = losses.add_noise(x0_hat, s, noise())
        Delta = scale * losses.self_evaluation(*evaluate(x_s, x0_hat), k)
        target = losses.implicit_target(x0, losses.pseudo_target(x0_hat, Delta), lam)
        if normalised:
            target = losses.renormalise(target, x0)
        x0_hat = x0_hat + 0.3 * (1 - i / rounds) * (target - x0_hat)
    return x0_hat


def settle(q, x0_hat: Tensor, t: float, s: float, c: Tensor, goal: tuple, rounds: int, data, g) -> Tensor:
    """`follow` with perfect evaluators: predictions [B, D] for the prompts c [B], which start at x0_hat.

    q is a Mixture, or a World of toy/pictures.py: it knows posterior means. The answers of one prompt are all that the
    model draws for it. g draws the noise.
    """
    others = c[:, None] != c

    def noise() -> Tensor:
        return torch.from_numpy(g.standard_normal(x0_hat.shape, dtype=np.float32))

    def evaluate(x_s: Tensor, x0_hat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if s == 0:  # Eq. 6 at s = 0 is x itself for every prompt: there is nothing to evaluate
            return x_s, x_s, x_s
        G_null, G_c = q.posterior_mean(x_s, s, q.null(c)), q.posterior_mean(x_s, s, c)
        return G_null, G_c, mean_of_answers(x_s, s, x0_hat, others)

    times = (torch.full((len(c),), value) for value in (t, s))
    return follow(x0_hat, *times, goal, rounds, data, noise, evaluate)


def answers(q: Mixture, s: float, goal: tuple | None, seed: int) -> tuple[Tensor, Tensor]:
    """Answers [C, n, 2] at time T that have followed their target to the end, and fresh data [C, n, 2]."""
    g, c = rng(seed, "toy ideal"), torch.arange(q.C).repeat_interleave(ANSWERS)
    x0 = q.sample(c, g)
    x_t = (1 - T) * x0 + T * torch.from_numpy(g.standard_normal(x0.shape, dtype=np.float32))
    fresh = q.sample(c, g)
    x0_hat = q.posterior_mean(x_t, T, c)
    if goal is not None:
        x0_hat = settle(q, x0_hat, T, s, c, goal, ROUNDS, lambda: q.posterior_sample(x_t, T, c, g), g)
    return x0_hat.view(q.C, ANSWERS, 2), fresh.view(q.C, ANSWERS, 2)


def distance(x: Tensor, y: Tensor, s: float, seed: int) -> float:
    """Energy distance after both [C, n, 2] are noised to s, averaged over conditions."""
    g = rng(seed, "toy ideal distance")
    noises = (torch.from_numpy(g.standard_normal(a.shape, dtype=np.float32)) for a in (x, y))
    x_s, y_s = ((1 - s) * a + s * noise for a, noise in zip((x, y), noises))
    return float(np.mean([energy_distance(a, b) for a, b in zip(x_s, y_s)]))


def main() -> None:
    parser = errors.Parser("-m toy.ideal", __doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder (toy/results)")
    out = kept.folder(parser.parse_args().out)
    torch.set_num_threads(1)
    start, records, first = time.perf_counter(), [], {}
    for layout in LAYOUTS:
        q, rows = Mixture(**LAYOUTS[layout]), {label: [] for label in GOALS}
        for (label, goal), s in itertools.product(GOALS.items(), TIMES):
            for seed in SEEDS:
                x0_hat, fresh = answers(q, s, goal, seed)
                first.setdefault((layout, label, s), x0_hat)
                at_0, at_s = (distance(x0_hat, fresh, each, seed) for each in (0.0, s))
                record = {"layout": layout, "label": label, "s": s, "seed": seed}
                records.append(record | {"energy_at_0": at_0, "energy_at_s": at_s})
            last = records[-len(SEEDS) :]
            rows[label] += [[record[key] for record in last] for key in ("energy_at_s", "energy_at_0")]
        columns = [f"{what} {s:g}" for s in TIMES for what in ("x_s, s =", "x0_hat,")]
        print(kept.table(f"{layout}: energy distance", columns, rows), flush=True)
    settings = {"seeds": SEEDS, "t": T, "answers": ANSWERS, "rounds": ROUNDS}
    settings |= {"seconds": round(time.perf_counter() - start, 1)}
    made_by = machine.provenance(torch.device("cpu"))
    checkpoint.write_json(out / "ideal.json", made_by | settings | {"records": records})
    note = f"answers x0_hat for condition 0 (grey) at t = {T}; blue: its data; other colours: the other conditions"
    figures.ideal({key: x for key, x in first.items() if key[0] != "ring"}, out / "ideal.png", note)
    print(f"\n{out / 'ideal.png'}; {settings['seconds']:.0f} s")


if __name__ == "__main__":
    errors.run(main)
