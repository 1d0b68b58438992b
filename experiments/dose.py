"""How much of Self-E's gain is the wrong captions'? The same rows at several shares of them, one figure.

    python experiments/dose.py               # shares 0, 0.2, 0.4, 0.6; three rows and seeds; started again, it goes on
    python experiments/dose.py --report      # the figure again, from what has been measured

Each share is a table of experiments/tables.py with a shorter budget, in OUT/SHARE. OUT/dose.png shows the differences
of rows at 2 and 4 steps against the share, and beside them what perfect evaluators give (toy/pictures.py).
"""

import sys
from pathlib import Path

if (
    __name__ == "__main__"
):  # started as a file: modules are found from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import matplotlib.pyplot as plt
import numpy as np

from engine import checkpoint, errors, machine
from experiments import report, tables
from experiments.rows import ROWS, SEEDS

SHARES = (0.0, 0.2, 0.4, 0.6)
COMPARED = ("flow_matching", "self_e", "control")
PAIRS = (("self_e", "flow_matching"), ("self_e", "control"))
STEPS = (1, 2, 4, 8)
EXACT = Path(__file__).resolve().parents[1] / "toy/results/pictures.json"  # what perfect evaluators give
NAMES = {
    "flow_matching": "flow matching",
    "self_e": "classifier only",
    "control": "control, Delta = 0",
}  # there
BUDGET = "--data one-shape --txt-len 8 --steps 3600 --grid-every 0"


def exact_difference(a: str, b: str, n: int) -> dict[float, float]:
    """share -> the difference of two rows at n steps with perfect evaluators, for prompts that tell the shape alone."""
    scores = {}
    for r in checkpoint.read_json(EXACT)["records"] if EXACT.exists() else []:
        if r["world"] == "single_object" and r["steps"] == n:
            scores.setdefault((r["objective"], r["wrong_captions"]), []).append(r["score"])
    shares = sorted({share for _, share in scores})
    return {
        share: float(np.mean(scores[NAMES[a], share]) - np.mean(scores[NAMES[b], share])) for share in shares
    }


def draw(out: Path, shares: list[float]) -> None:
    """OUT/dose.png: a panel per step count, a line per difference; dots are seeds, bars 95% intervals over them.

    Dashed: the same differences with perfect evaluators and no network (toy/pictures.py).
    """
    tables_of = {share: report.read_rows(out / f"{share:g}") for share in shares}
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for panel, n in zip(panels, (2, 4)):
        for i, (a, b) in enumerate(PAIRS):
            found = {share: rows for share, rows in tables_of.items() if a in rows and b in rows}
            points = {share: report.difference(rows, a, b, n) for share, rows in found.items()}
            halves = [half if half < float("inf") else 0 for _, half in points.values()]
            means = [mean for mean, _ in points.values()]
            label = f"{ROWS[a][0].split(',')[0]} minus {ROWS[b][0].split(':')[0]}"
            panel.errorbar(list(points), means, halves, color=f"C{i}", marker="o", capsize=3, label=label)
            exact = exact_difference(a, b, n)
            panel.plot(
                list(exact),
                list(exact.values()),
                "x--",
                color=f"C{i}",
                alpha=0.7,
                label=None if n > 2 or i else "the same, perfect evaluators",
            )
            for share, rows in found.items():
                common = set(rows[a]) & set(rows[b])
                own = [report.score_of(rows[a][s], n) - report.score_of(rows[b][s], n) for s in common]
                panel.plot([share + 0.012] * len(own), own, ".", color=f"C{i}", alpha=0.5)
        panel.axhline(0, color="grey", linewidth=0.8)
        panel.set(title=f"{n} steps", xlabel="share of wrong captions", xticks=shares)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("difference of the overall score")
    panels[1].legend(*panels[0].get_legend_handles_labels(), fontsize=8)  # where no line is
    figure.tight_layout()
    report.save(figure, out / "dose.png")


def parse_arguments():
    parser = errors.Parser(
        "experiments/dose.py", "The rows of the tables at several shares of wrong captions."
    )
    a = parser.add_argument
    a(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("results/dose"),
        help="where results go (default: results/dose)",
    )
    a(
        "--runs",
        metavar="DIR",
        type=Path,
        default=Path("runs/dose"),
        help="where runs go (default: runs/dose)",
    )
    a(
        "--shares",
        metavar="X",
        type=float,
        nargs="+",
        default=list(SHARES),
        help="of wrong captions (default: 0 0.2 0.4 0.6)",
    )
    a(
        "--seeds",
        metavar="N",
        type=int,
        nargs="+",
        default=list(SEEDS),
        help="training seeds (default: 2 3 4)",
    )
    a(
        "--budget",
        metavar="FLAGS",
        default=BUDGET,
        help=f'flags of train.py for every run (default: "{BUDGET}")',
    )
    a("--device", metavar="NAME", default="auto", help="cuda, mps, cpu (default: the best there is)")
    a("--quick", action="store_true", help="tiny budgets, in OUT-quick and RUNS-quick: checks the path only")
    a("--report", action="store_true", help="only the figure, from what has been measured")
    args = parser.parse_args()
    if not all(0 <= share <= 1 for share in args.shares) or min(args.seeds) < 0:
        parser.error("--shares must lie between 0 and 1, --seeds must not be negative")
    if args.quick:
        if not (args.out.name and args.runs.name):
            parser.error("--quick writes beside --out and --runs: give folders with a name of their own")
        args.budget = "--steps 4 --batch-size 8 --grid-every 0 --no-compile"
        args.shares, args.seeds = [0.0, 0.4], [2, 3]
        args.out, args.runs = (path.with_name(path.name + "-quick") for path in (args.out, args.runs))
    return args


def main() -> None:
    args = parse_arguments()
    machine.keep_freed_memory()
    small = ["--images", "1", "--per-tag", "1", "--search-images", "1"] if args.quick else []
    for share in [] if args.report else args.shares:
        table = tables.parse_arguments(
            [
                "--out",
                str(args.out / f"{share:g}"),
                "--runs",
                str(args.runs / f"{share:g}"),
                "--rows",
                *COMPARED,
                "--seeds",
                *map(str, args.seeds),
                "--sample-steps",
                *map(str, STEPS),
                "--milestones",
                "0",
                *small,
                "--budget",
                f"{args.budget} --wrong-captions {share:g}",
                "--device",
                args.device,
            ]
        )
        tables.measure_all(table, machine.pick_device(args.device))
    if not any(report.read_rows(args.out / f"{share:g}") for share in args.shares):
        raise errors.UserError(f"nothing has been measured in {args.out}")
    draw(args.out, args.shares)
    print(f"wrote {args.out / 'dose.png'}")


if __name__ == "__main__":
    errors.run(main, "stopped; the same command goes on")
