"""Any-step sampling in 2-D: six objectives compared on one small network and one budget.

    python toy/any_step.py                        # 2 to 10 minutes on two cores: tables, and figures in toy/results
    python toy/any_step.py --layout far           # one layout only, in runs/any_step
    python toy/any_step.py --seed 1 --out runs/x  # another seed, another folder
    python toy/any_step.py --study list           # the paper's open questions (toy/studies.py)
    python toy/any_step.py --study s_rule         # one of them, three seeds, kept in toy/results/s_rule.json

For N = 1, 2, 4, 8, 50 evaluations of the network it prints the energy distance to fresh data, the sliced Wasserstein-2
distance and the share of samples between the modes, averaged over the conditions. "floor" is the distance between two
samples of the data. mixture.py holds the data, training.py the network, measures.py the distances.
"""

import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]

if (
    __name__ == "__main__"
):  # started as a file: modules are found from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from engine import checkpoint, errors, machine
from toy import figures, studies
from toy.measures import BUDGETS, evaluate
from toy.mixture import LAYOUTS
from toy.training import STEPS, Member, assemble, train

# The objectives side by side: label -> (departures from training.PAPER, choices of the sampler).
OBJECTIVES = {
    label: studies.STUDIES["objectives"].settings[label]
    for label in (
        "flow matching",  # s = t always, sampled at s_k = t_k
        "Self-E",  # the paper's first stage: Eq. 19-20, the classifier term alone
        "Eq. 16 to the letter",  # no normalisation of the target
        "control Delta = 0",  # Eq. 19 with nothing to say about x0_hat
        "auxiliary throughout",  # s.6 with k = 0.9 from the first step
        "auxiliary late",  # the same from 77% of the training, as in the paper
    )
}


def one_objective(label: str, members: list[Member], steps: int) -> tuple[str, list[dict], list[dict], float]:
    """Train and measure one row of the comparison; what comes back crosses a process boundary, hence plain dicts."""
    torch.set_num_threads(1)  # the matrices are too small to share
    start = time.perf_counter()
    changes, sampling = OBJECTIVES[label]
    net = train(members, steps, **changes)
    results = evaluate(net, members, **sampling)
    return label, results, [net.weights_of(e) for e in range(len(members))], time.perf_counter() - start


def at_the_same_time(jobs: int, function, calls: list[tuple]):
    """Yield function(*call) for each call, in order, computed by `jobs` processes."""
    if jobs == 1:
        yield from (function(*call) for call in calls)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:  # a forked torch may hang
        yield from (future.result() for future in [pool.submit(function, *call) for call in calls])


def compare(layouts: list[str], seed: int, steps: int, out: Path, jobs: int) -> None:
    """The main command: train all objectives, print the tables, write any_step.json and the figures."""
    start = time.perf_counter()
    out.mkdir(
        parents=True, exist_ok=True
    )  # now, so that a folder that cannot be written is found before the work
    members = [Member(layout, seed) for layout in layouts]
    results, nets = {"floor": evaluate(None, members)}, {}
    calls = [(label, members, steps) for label in OBJECTIVES]
    for label, row, weights, seconds in at_the_same_time(jobs, one_objective, calls):
        results[label], nets[label] = row, assemble(members, weights)
        print(f"trained and measured: {label}, {seconds:.0f} s", flush=True)

    for e, layout in enumerate(layouts):
        for measure in ("energy", "sliced_w2", "off_modes"):
            print(f"\n{layout + ': ' + measure:24s}" + "".join(f"{f'N = {n}':>10s}" for n in BUDGETS))
            for label, rows in results.items():
                print(f"{label:24s}" + "".join(f"{rows[e][str(n)][measure]:10.4f}" for n in BUDGETS))
        masses = {label: rows[e]["2"]["mass"][0] for label, rows in results.items()}
        truth = ", ".join(f"{weight:.3f}" for weight in members[e].q.weights[0].tolist())
        print(f"\n{layout}: share of each mode of condition 0 at N = 2 (truth {truth})")
        for label, mass in masses.items():
            print(f"{label:24s}" + "".join(f"{share:10.3f}" for share in mass))

    seconds = time.perf_counter() - start
    record = {
        **machine.provenance(torch.device("cpu")),
        "seed": seed,
        "steps": steps,
        "jobs": jobs,
        "seconds": round(seconds, 1),
        "settings": {label: {"training": a, "sampling": b} for label, (a, b) in OBJECTIVES.items()},
        "results": {
            layout: {label: rows[e] for label, rows in results.items()} for e, layout in enumerate(layouts)
        },
    }
    checkpoint.write_json(out / "any_step.json", record)
    sampling = {label: choices for label, (_, choices) in OBJECTIVES.items()}
    for e, member in enumerate(members):
        figures.samples(nets, sampling, members, e, out / f"samples_{member.layout}.png")
    shown = layouts.index("between") if "between" in layouts else 0
    figures.trajectories(nets, sampling, members, shown, out / "trajectories.png")
    figures.distances(record["results"], out / "distances.png")
    figures.fields(layouts, seed, out / "fields.png")
    print(
        f"\nfigures and any_step.json in {out}; {time.perf_counter() - start:.0f} s in all, {jobs} processes"
    )


def run_study(name: str, out: Path, steps: int) -> None:
    """Train and measure what a study lacks, print its tables, draw its figures."""
    start = time.perf_counter()
    kept = studies.run(name, out, steps=steps)
    print(studies.table(kept))
    if name == "wrong_labels":
        print(studies.table(kept, "off_modes"))  # what a scorer of single samples sees
        figures.along_shares(kept, out / f"{name}.png")
    else:
        figures.study(kept, out / f"{name}.png")
    if name == "peers":  # objectives in rows, steps in columns
        settings, member = studies.STUDIES[name].settings, Member("between", studies.SEEDS[0])
        nets = {label: studies.trained([member], steps, changes) for label, (changes, _) in settings.items()}
        sampling = {label: choices for label, (_, choices) in settings.items()}
        figures.samples(nets, sampling, [member], 0, out / f"{name}_samples.png")
    print(f"\n{name}.json and {name}.png in {out}; {time.perf_counter() - start:.0f} s")


def main() -> None:
    parser = errors.Parser("toy/any_step.py", __doc__.split("\n")[0])
    parser.add_argument(
        "--layout",
        default="all",
        choices=["all", *LAYOUTS],
        help="which data; all shows the three side by side",
    )
    parser.add_argument("--study", help="an open question instead of the comparison; list names them all")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="names every random number of the comparison (studies use 0, 1, 2)",
    )
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"training steps, {STEPS} unless told otherwise"
    )
    parser.add_argument(
        "--jobs", type=int, default=2, help="processes that train at the same time; 1 trains one by one"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the JSON file and the figures (default: toy/results; runs/any_step with other flags)",
    )
    args = parser.parse_args()
    if args.study not in (None, "list", *studies.STUDIES):
        parser.error(f"--study: no {args.study!r}; choose from {', '.join(studies.STUDIES)}")
    parser.check_ranges(args, steps=(1, 10**9), jobs=(1, 1024), seed=(0, 2**63 - 1))
    if args.out is None:  # what the README shows is replaced by its like only
        usual = args.steps == STEPS and (args.study or (args.layout == "all" and args.seed == 0))
        args.out = ROOT / ("toy/results" if usual else "runs/any_step")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out must be a folder; {args.out} is a file")

    torch.set_num_threads(1)
    if args.study == "list":
        for name, study in studies.STUDIES.items():
            print(f"{name:14s} {study.question}")
    elif args.study:
        run_study(args.study, args.out, args.steps)
    else:
        layouts = list(LAYOUTS) if args.layout == "all" else [args.layout]
        compare(layouts, args.seed, args.steps, args.out, args.jobs)


if __name__ == "__main__":
    errors.run(main)
