"""Any-step sampling in 2-D: seven objectives compared on one small network and one budget.

    python -m toy.any_step                        # the kept tables, and figures: 2 to 10 minutes
    python -m toy.any_step --seed 1 --out runs/x  # train and measure again, with another seed: 10 to 150 minutes
    python -m toy.any_step --layout far --seed 1 --out runs/far
    python -m toy.any_step --study list           # the paper's open questions (toy/studies.py)
    python -m toy.any_step --study s_rule         # one of them, three seeds, kept in toy/results/s_rule.json

For N = 1, 2, 4, 8, 50 evaluations of the network it prints the energy distance to fresh data, the share of samples
between the modes, and the distance of the mass per mode from the truth, averaged over the conditions. "floor" is the
distance between two samples of the data.
"""

from pathlib import Path

import torch

from engine import errors
from toy import figures, kept, measures, studies
from toy.mixture import LAYOUTS
from toy.training import STEPS, Member, trained


def main() -> None:
    parser = errors.Parser("-m toy.any_step", __doc__.split("\n")[0])
    parser.add_argument("--study", default="objectives", help="the question; list names them all")
    parser.add_argument("--layout", choices=list(LAYOUTS), help="one layout only (all of the study's)")
    parser.add_argument("--seed", type=int, help="one seed only (0, 1 and 2)")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps")
    parser.add_argument("--out", type=Path, help="folder (toy/results; runs/toy-results with other flags)")
    args = parser.parse_args()
    parser.check_ranges(args, steps=(1, 10**9), seed=(0, 2**63 - 1))
    if args.study == "list":
        print("\n".join(f"{name:14s} {study.question}" for name, study in studies.STUDIES.items()))
        return
    if args.study not in studies.STUDIES:
        parser.error(f"--study: no {args.study!r}; choose from {', '.join(studies.STUDIES)}")
    torch.set_num_threads(1)  # the matrices are too small to share
    study = studies.STUDIES[args.study]
    seeds = studies.SEEDS if args.seed is None else (args.seed,)
    layouts = study.layouts if args.layout is None else (args.layout,)
    out = kept.folder(args.out, usual=(args.seed, args.layout, args.steps) == (None, None, STEPS))
    results = studies.run(args.study, out, seeds, layouts, args.steps)
    for measure in ("energy", "off_modes", "mass_error"):
        for layout in layouts:
            rows = studies.cells(results, layout, measure)
            print(kept.table(f"{layout}: {measure}", [f"N = {n}" for n in measures.BUDGETS], rows))
    if args.study == "objectives":
        figures.fields(("between", "far"), out / "fields.png")
    if args.study in ("objectives", "peers"):
        member = Member(args.layout or "between", seeds[0])
        networks = {}
        for label, (training, sampling) in study.settings.items():
            networks[label] = trained(member, args.steps, training), sampling
        figures.samples(networks, member, out / f"{args.study}_{member.layout}.png")
    print(f"\n{args.study}.json in {out}")


if __name__ == "__main__":
    errors.run(main)
