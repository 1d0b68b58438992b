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


def mean_of_answers(x_s: Tensor, s: float, x0_hat: Tensor) -> Tensor:
    """E_p[x0 | x_s, c] when p(x0 | c) is the answers themselves: [C, n, 2] each, one row of answers per condition."""
    distance2 = torch.cdist(x_s, (1 - s) * x0_hat).square()
    return (-distance2 / (2 * s**2)).softmax(-1) @ x0_hat


def follow(x0_hat: Tensor, t: Tensor, s: Tensor, goal: tuple, rounds: int, data, noise, evaluate) -> Tensor:
    """Predictions x0_hat [B, ...] at times t, s [B] after some rounds towards their target: SelfE's step, no network.

    goal is one of GOALS, not None. data() draws x0 ~ q(x0 | x_t, c), because training meets every x0 that an x_t could
    have come from; noise() is standard normal like x0_hat; evaluate(x_s, x0_hat) gives G_null, G_c and G_fake. The
    falling rate averages out what the draws add. toy/pictures.py runs the same rounds.
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


def settle(q: Mixture, s: float, goal: tuple | None, seed: int) -> tuple[Tensor, Tensor]:
    """Answers [C, n, 2] at time T that have followed their target to the end, and fresh data [C, n, 2]."""
    g, shape = rng(seed, "toy ideal"), (q.C, ANSWERS, 2)
    c = torch.arange(q.C).repeat_interleave(ANSWERS)
    t, now = torch.full((len(c),), T), torch.full((len(c),), s)

    def noise() -> Tensor:
        return torch.from_numpy(g.standard_normal((len(c), 2), dtype=np.float32))

    x_t = losses.add_noise(q.sample(c, g), t, noise())
    fresh = q.sample(c, g)
    x0_hat = q.posterior_mean(x_t, t, c)

    def data() -> Tensor:
        return q.posterior_sample(x_t, t, c, g)

    def evaluate(x_s: Tensor, x0_hat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        G_fake = mean_of_answers(x_s.view(shape), s, x0_hat.view(shape)).view_as(x_s)
        return q.posterior_mean(x_s, now, q.null(c)), q.posterior_mean(x_s, now, c), G_fake

    if goal is not None:
        x0_hat = follow(x0_hat, t, now, goal, ROUNDS, data, noise, evaluate)
    return x0_hat.view(shape), fresh.view(shape)


def distance(x: Tensor, y: Tensor, s: float, seed: int) -> float:
    """Energy distance after both are noised to s, averaged over conditions."""
    g = rng(seed, "toy ideal distance")
    x_s, y_s = (
        (1 - s) * a + s * torch.from_numpy(g.standard_normal(a.shape, dtype=np.float32)) for a in (x, y)
    )
    return float(np.mean([energy_distance(a, b) for a, b in zip(x_s, y_s)]))


def main() -> None:
    parser = errors.Parser("-m toy.ideal", __doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="the first of three seeds (0)")
    parser.add_argument("--out", type=Path, help="folder (toy/results; runs/toy-results with another --seed)")
    args = parser.parse_args()
    parser.check_ranges(args, seed=(0, 2**53))
    out = kept.folder(args.out, usual=args.seed == 0)
    seeds = [args.seed + i for i in SEEDS]
    torch.set_num_threads(1)
    start, records, first_seeds = time.perf_counter(), [], {}
    for layout in LAYOUTS:
        q, rows = Mixture(**LAYOUTS[layout]), {}
        for label, goal in GOALS.items():
            for s in TIMES:
                settled = [settle(q, s, goal, seed) for seed in seeds]
                at_0 = [distance(*pair, 0.0, seed) for pair, seed in zip(settled, seeds)]
                at_s = [distance(*pair, s, seed) for pair, seed in zip(settled, seeds)]
                for seed, of_x0_hat, of_x_s in zip(seeds, at_0, at_s):
                    record = {"layout": layout, "label": label, "s": s, "seed": seed}
                    records.append(record | {"energy_at_0": of_x0_hat, "energy_at_s": of_x_s})
                rows.setdefault(label, []).extend([at_s, at_0])
                first_seeds[layout, label, s] = settled[0][0]
        columns = [f"{what} {s:g}" for s in TIMES for what in ("x_s, s =", "x0_hat,")]
        print(kept.table(f"{layout}: energy distance", columns, rows), flush=True)
    seconds = round(time.perf_counter() - start, 1)
    settings = {"seeds": seeds, "t": T, "answers": ANSWERS, "rounds": ROUNDS, "seconds": seconds}
    made_by = machine.provenance(torch.device("cpu"))
    checkpoint.write_json(out / "ideal.json", made_by | settings | {"records": records})
    note = f"answers x0_hat for condition 0 (grey) at t = {T}; blue: its data; other colours: the other conditions"
    shown = {key: x0_hat for key, x0_hat in first_seeds.items() if key[0] != "ring"}
    figures.ideal(shown, out / "ideal.png", note)
    print(f"\n{out / 'ideal.png'}; {seconds:.0f} s")


if __name__ == "__main__":
    errors.run(main)
