"""The equations of the paper, checked in numbers: losses.py and sampler.py as they are, closed forms for the network.

    python -m toy.identities                 # half a minute; a table, and exit code 1 if a line fails
    python -m toy.identities --only 19       # the lines whose equation contains "19"

Each line of the table is a check, a function in toy/checks/, one file for each part of the paper. It computes something
with the project's code and the same thing by another route: automatic differentiation of a log density, quadrature on a
grid, Gauss-Hermite quadrature, or sampling with its error bar. It returns one number: the largest error (or, for "is
not zero" lines, the smallest size), which the table compares with the bound. Everything runs in float64, so "equal"
means equal to a dozen digits.

The stage (toy/checks/stage.py) is the mixture "between" of mixture.py with wider modes: three conditions, three modes
each. q is the data. p is the distribution of the one-line model x0_hat = a x_t + b; it is a mixture too, and so has
closed forms of its own.
"""

import sys
import time

import torch

from engine import checkpoint, errors, machine

from toy.checks.stage import CHECKS, SEED  # isort: skip  the list; the files below fill it, in the order of the table
from toy.checks import flow_matching, scores, self_evaluation, objective, step, peers  # noqa: F401  # isort: skip
from toy.checks.inference import BUDGETS, ETAS, std_of_the_sampler  # isort: skip


def main() -> int:
    """The exit code: 1 where a line fails. Raises UserError."""
    parser = errors.Parser("-m toy.identities", __doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="only the lines whose equation contains this text")
    parser.add_argument("--seed", type=int, default=0, help="other points and samples for every line")
    parser.add_argument("--out", type=errors.file_to_write, help="write the table as JSON, too")
    args = parser.parse_args()
    parser.check_ranges(args, seed=(0, 2**53))
    SEED[0] = 1000 * args.seed
    chosen = [line for line in CHECKS if args.only in line.equation]
    if not chosen:
        parser.error(f"no line has {args.only!r} in its equation; run without --only to see them all")

    start, table = time.perf_counter(), []
    print(f"{'equation':22s} {'what equals what':82s} {'error':>9s}   {'bound':>8s}  verdict")
    for line in chosen:
        number = line.function()
        row = {"equation": line.equation, "claim": line.claim, "number": float(number), "bound": line.bound}
        row["holds"] = bool(line.holds(number))
        table.append(row)
        sign = ">" if line.is_above else "<"
        verdict = "holds" if row["holds"] else f"FAILS ({line.function.__name__})"
        error = f"{number:9.1e} {sign} {line.bound:8.1e}"
        print(f"{line.equation:22s} {line.claim:82s} {error}  {verdict}", flush=True)

    if not args.only:
        print("\nStandard deviation that the posterior mean leaves, data 0.500 (N evaluations):")
        print(f"  {'rule':10s}" + "".join(f"{f'N = {n}':>9s}" for n in BUDGETS))
        for eta in ETAS:
            name = eta if isinstance(eta, str) else f"eta = {eta:g}"
            print(f"  {name:10s}" + "".join(f"{std_of_the_sampler(n, eta):9.3f}" for n in BUDGETS))
    seconds, held = time.perf_counter() - start, sum(row["holds"] for row in table)
    print(f"\n{held} of {len(table)} lines hold, {seconds:.1f} s")
    if args.out:
        head = machine.provenance(torch.device("cpu")) | {"seed": args.seed, "seconds": round(seconds, 1)}
        checkpoint.write_json(args.out, head | {"lines": table})
    return int(held < len(table))


if __name__ == "__main__":
    errors.run(lambda: sys.exit(main()))
