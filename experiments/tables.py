"""The paper's ablations in miniature: one command trains every row of Table 2, scores it and writes results/.

    python experiments/tables.py                         # all rows, three seeds; started again, it goes on where it was
    python experiments/tables.py --rows self_e control   # some rows; another process may train others beside it
    python experiments/tables.py --rows gallery          # the other any-step objectives (peers/), at the same budget
    python experiments/tables.py --rows gallery --equal-cost --out results/equal-cost --runs runs/equal-cost
    python experiments/tables.py --quick                 # the whole path in minutes; budgets too small to mean much
    python experiments/tables.py --report                # tables and figures again, from what has been measured

Per row and seed: a run of train.py under one budget (runs/tables/ROW-SEED), then scores on test prompts at 1, 2, 4, 8
and 50 steps. Guidance, eta and the rule for s_k are searched for each row and step count (at 50 steps guidance alone)
on validation prompts, on the run of the first seed, in one grid for all rows. Flow matching stays at s_k = t_k, and an
objective with a sampler of its own has guidance alone to choose. Everything measured is one JSON file per row and seed,
beside one of the search per row and one for Fig. 5, written in one piece. What has been measured stays, whatever code
made it: after a change that matters, choose another --out and --runs. --equal-cost gives every row the forward passes
of Self-E in place of its iterations: cheaper steps are more of them.
"""

import argparse
import itertools
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

if (
    __name__ == "__main__"
):  # started as a file: modules are found from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import data
import model
import objectives
import recipe
import sample
from engine import arguments, checkpoint, errors, machine
from experiments import evaluate, report, scorer
from experiments.rows import BUDGET, GRID, GROUPS, PROGRESS, ROWS, SEEDS

# What this program or a row says: in a budget it would make another row of every row, or train elsewhere.
NOT_IN_A_BUDGET = (
    "-h",
    "--help",
    "--out",
    "--seed",
    "--resume",
    "--dry-run",
    "--device",
    "--milestone-every",
    "--objective",
    *(f"--{name.replace('_', '-')}" for name in arguments.OWN),
)


def settings_of(row: str) -> list[dict]:
    """The settings that the search tries for a row: the grid, less what the row's model has not learned."""
    objective = objectives.OBJECTIVES[arguments.parse(ROWS[row][1]).objective]
    grid = GRID | {"s_rule": sorted(objective.s_rules)}
    if objective.trajectory:
        grid = {"guidance": GRID["guidance"]}
    return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]


def overall(asked: list[dict], right: list[int], images: int) -> float:
    return evaluate.summary(asked, right, images)["overall"]["score"]


# ------------------------------------------------------------------------------------------------------------
# One row, one seed
# ------------------------------------------------------------------------------------------------------------
def train_row(row: str, seed: int, run: Path, budget: list[str], device: str, milestone_every: int) -> None:
    """Train unless it is done; go on where a stopped run was. The budget is the same for every row.

    A run of Fig. 5 keeps a state at every multiple of milestone_every; 0 keeps none.
    """
    if (run / "done.json").exists():
        return
    command = [
        sys.executable,
        str(Path(__file__).parents[1] / "train.py"),
        "--out",
        str(run),
        "--device",
        device,
    ]
    if checkpoint.complete_states(run):
        command += ["--resume"]
    else:
        command += ["--seed", str(seed), *budget, *ROWS[row][1]]
        command += ["--milestone-every", str(milestone_every)] if milestone_every else []
    process, code = subprocess.Popen(command), None
    before = signal.signal(
        signal.SIGTERM, lambda *_: process.terminate()
    )  # to us alone: train.py is to save, too
    while code is None:
        try:
            code = process.wait()
        except KeyboardInterrupt:  # Ctrl-C reaches train.py too, which saves before it ends
            continue
    signal.signal(signal.SIGTERM, before)
    if code:
        raise errors.UserError(
            f"training {row}, seed {seed}, ended with exit code {code}; what it said stands above"
        )
    state = checkpoint.read_json(checkpoint.complete_states(run)[-1] / "state.json")
    if state["step"] < checkpoint.read_json(run / "config.json")["steps"]:
        raise KeyboardInterrupt  # train.py was stopped and has saved itself; so are we
    checkpoint.write_json(run / "done.json", {"seconds": round(state["elapsed"], 1)})


def search(loaded: sample.Loaded, row: str, images: int, per_tag: int | None, steps: tuple[int, ...]) -> dict:
    """The best settings per step count on validation prompts. At 50 steps only guidance is searched again, with the eta
    and the s-rule that won at the largest smaller count: it costs as much as all the others together."""
    asked = evaluate.prompts("validation", per_tag, evaluate.world_of(loaded.config))
    chosen = {}
    for n in steps:
        tries = settings_of(row)
        if n >= 50 and chosen:
            last = chosen[max(chosen)]["settings"]
            tries = [t for t in tries if all(t[k] == last[k] for k in t if k != "guidance")]
        scores = []
        for settings in tqdm(tries, desc=f"{row}: search at {n} steps", leave=False, disable=None):
            right = evaluate.measure(
                loaded, asked, images, n, stream=evaluate.SPLITS.index("validation"), **settings
            )
            scores.append(overall(asked, right, images))
        best = int(np.argmax(scores))
        chosen[n] = {"settings": tries[best], "validation_score": scores[best], "tried": len(tries)}
    return chosen


def measure_row(row: str, seed: int, run: Path, args: argparse.Namespace, device: torch.device) -> None:
    """Scores on test prompts and held-out pairs at the chosen settings, written to results/rows/ROW-SEED.json."""
    path = args.out / "rows" / f"{row}-{seed}.json"
    if path.exists():
        return
    began = time.perf_counter()
    loaded = sample.load(run, device)
    search_path = args.out / "rows" / f"{row}-search.json"
    if not search_path.exists():
        checkpoint.write_json(
            search_path,
            {
                "row": row,
                "run_of_seed": seed,
                "split": "validation",
                "images": args.search_images,
                "per_tag": args.per_tag,
                "chosen": search(loaded, row, args.search_images, args.per_tag, args.sample_steps),
                "seconds": round(time.perf_counter() - began, 1),
            }
            | machine.provenance(device),
        )
    chosen = report.measured(search_path, "chosen")["chosen"]
    names, wanted = set(settings_of(row)[0]), set(map(str, args.sample_steps))
    if not isinstance(chosen, dict) or any(
        set(chosen.get(n, {}).get("settings", {})) != names for n in wanted
    ):
        raise errors.UserError(
            f"{search_path} does not tell the settings of {', '.join(sorted(wanted))} steps: it is "
            "damaged; delete it to search again"
        )
    result = machine.provenance(device) | {
        "row": row,
        "seed": seed,
        "train": loaded.config["command"],
        "training": loaded.config,
        "images": args.images,
        "training_seconds": report.measured(run / "done.json", "seconds")["seconds"],
        "splits": {},
    }
    for split in ("test", "pairs"):
        asked = evaluate.prompts(split, args.per_tag, evaluate.world_of(loaded.config))
        result["splits"][split] = {}
        for n in args.sample_steps:
            settings = chosen[str(n)]["settings"]
            right = evaluate.measure(
                loaded, asked, args.images, n, seed=seed, stream=10 + evaluate.SPLITS.index(split), **settings
            )
            result["splits"][split][str(n)] = evaluate.summary(asked, right, args.images) | {
                "settings": settings
            }
    result["seconds"] = round(time.perf_counter() - began, 1)
    checkpoint.write_json(path, result)


def measure_progress(row: str, seed: int, run: Path, args: argparse.Namespace, device: torch.device) -> None:
    """Fig. 5: scores on test prompts of every milestone of a run, at the settings chosen for its end."""
    path = args.out / "rows" / f"{row}-progress-{seed}.json"
    if path.exists():
        return
    began = time.perf_counter()
    config = checkpoint.read_json(run / "config.json")
    every = config["arguments"]["milestone_every"]
    chosen = report.measured(args.out / "rows" / f"{row}-search.json", "chosen")["chosen"]
    asked, points = evaluate.prompts("test", args.per_tag, evaluate.world_of(config)), []
    states = [
        state for state in checkpoint.complete_states(run) if every and checkpoint.step_of(state) % every == 0
    ]
    if not states:
        return  # a run of train.py's own, without milestones
    for state in tqdm(states, desc=f"{row}: along the training", leave=False, disable=None):
        loaded, scores = sample.load(state, device), {}
        for n in args.sample_steps:
            right = evaluate.measure(loaded, asked, 1, n, seed=seed, stream=30, **chosen[str(n)]["settings"])
            scores[str(n)] = overall(asked, right, 1)
        points.append({"step": checkpoint.step_of(state), "overall": scores})
    checkpoint.write_json(
        path,
        machine.provenance(device)
        | {
            "row": row,
            "seed": seed,
            "split": "test",
            "images": 1,
            "per_tag": args.per_tag,
            "points": points,
            "seconds": round(time.perf_counter() - began, 1),
        },
    )


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = errors.Parser("experiments/tables.py", "Train and score every row of Table 2 in miniature.")
    a = parser.add_argument
    a("--out", metavar="DIR", type=Path, default=Path("results"), help="where results go (default: results)")
    a(
        "--runs",
        metavar="DIR",
        type=Path,
        default=Path("runs/tables"),
        help="where runs go (default: runs/tables)",
    )
    a(
        "--rows",
        metavar="ROW",
        nargs="+",
        choices=[*ROWS, *GROUPS],
        default=["table2"],
        help=f"{', '.join(GROUPS)}, or of {', '.join(ROWS)} (default: table2)",
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
        help=f'flags of train.py for every row (default: "{BUDGET}")',
    )
    a("--images", metavar="N", type=int, default=8, help="pictures per test prompt (default: 8)")
    a("--search-images", metavar="N", type=int, default=2, help="pictures per validation prompt (default: 2)")
    a("--per-tag", metavar="N", type=int, default=36, help="prompts per tag (default: 36)")
    a(
        "--sample-steps",
        metavar="N",
        type=int,
        nargs="+",
        default=list(sample.STEP_COUNTS),
        help="step counts (default: 1 2 4 8 50)",
    )
    a("--device", metavar="NAME", default="auto", help="cuda, mps, cpu (default: the best there is)")
    a(
        "--milestones",
        metavar="N",
        type=int,
        default=6,
        help="points along the training; 0 is none (default: 6)",
    )
    a(
        "--equal-cost",
        action="store_true",
        help="equal forward passes (Self-E's) in place of equal iterations",
    )
    a("--quick", action="store_true", help="tiny budgets, in OUT-quick and RUNS-quick: checks the path only")
    a("--report", action="store_true", help="only the tables and figures, from what has been measured")
    args = parser.parse_args(argv)
    if args.quick:
        if not (args.out.name and args.runs.name):
            parser.error("--quick writes beside --out and --runs: give folders with a name of their own")
        args.budget = "--steps 4 --batch-size 8 --grid-every 0 --no-compile"
        args.seeds, args.images, args.per_tag, args.sample_steps, args.milestones = (
            args.seeds[:2],
            1,
            1,
            [1, 2],
            2,
        )
        for name in ("out", "runs"):
            setattr(args, name, getattr(args, name).with_name(getattr(args, name).name + "-quick"))
    parser.check_ranges(
        args,
        images=(1, 10**4),
        search_images=(1, 10**4),
        per_tag=(1, 10**6),
        milestones=(0, 10**6),
        sample_steps=(1, 10**6),
        seeds=(0, 2**63 - 1),
    )
    args.sample_steps = sorted(args.sample_steps)
    args.rows = [row for name in args.rows for row in GROUPS.get(name, (name,))]
    return args


def budget_of(row: str, budget: list[str], equal_cost: bool) -> list[str]:
    """The flags of a row's training: the budget, its iterations scaled to the cost of Self-E's if asked for."""
    if not equal_cost:
        return budget
    plans = {name: arguments.plan_of(arguments.parse([*budget, *ROWS[name][1]])) for name in ("self_e", row)}
    cost = {
        name: recipe.run_flops(
            model.SIZES[arguments.parse(budget).size],
            plan,
            arguments.parse(ROWS[name][1]).objective,
            plan.factor(),
        )
        for name, plan in plans.items()
    }
    return [*budget, "--steps", str(round(plans[row].steps * cost["self_e"] / cost[row]))]


def check_budget(args: argparse.Namespace, budget: list[str]) -> recipe.Recipe:
    """The recipe of a budget. UserError where train.py would refuse it in some row, or nothing scores its pictures."""
    arguments.refuse(budget, NOT_IN_A_BUDGET)
    for row in args.rows:
        flags = arguments.parse([*budget, *ROWS[row][1]])
        plan = arguments.plan_of(flags)
        plan.check_division(1, flags.micro_batch)
    (least, most), side = scorer.SIDES, plan.stages[-1].sides[-1]
    if plan.data[0] not in data.SETS or not least <= side <= most:
        raise errors.UserError(
            f"only the built-in shapes have exact scores, at {least} to {most} pixels: "
            f"not {plan.data[0]} at {side}"
        )
    return plan


def keep_settings(args: argparse.Namespace) -> None:
    """Write what all rows share beside the runs and the results.

    Precision is not part of it: train.py takes the faster one of the machine, and each row's file says which.
    Raises UserError when runs or results were begun with other settings.
    """
    training = {"shapes": data.VERSION, "budget": args.budget} | (
        {"equal_cost": True} if args.equal_cost else {}
    )
    measuring = {name: getattr(args, name) for name in ("images", "search_images", "per_tag", "sample_steps")}
    for folder, settings in ((args.runs, training), (args.out, training | measuring)):
        checkpoint.keep_settings(folder, settings, "choose another --out and --runs")


def measure_all(args: argparse.Namespace, device: torch.device) -> None:
    """Train and score every row and seed that has not been measured yet."""
    budget = args.budget.split()
    plan = check_budget(args, budget)
    keep_settings(args)
    (args.out / "rows").mkdir(parents=True, exist_ok=True)
    for seed, row in itertools.product(args.seeds, args.rows):
        run = args.runs / f"{row}-{seed}"
        along = (
            args.milestones and row in PROGRESS and seed == min(args.seeds)
        )  # Fig. 5 shows one run of each
        wanted = [f"{row}-{seed}.json", *([f"{row}-progress-{seed}.json"] if along else [])]
        if all((args.out / "rows" / name).exists() for name in wanted):
            continue  # measured, perhaps on another machine
        own = budget_of(row, budget, args.equal_cost)
        train_row(row, seed, run, own, args.device, max(1, plan.steps // args.milestones) if along else 0)
        measure_row(row, seed, run, args, device)
        if along:
            measure_progress(row, seed, run, args, device)


def main() -> None:
    args = parse_arguments()
    machine.keep_freed_memory()
    device = machine.pick_device(args.device)
    if not args.report:
        measure_all(args, device)
    report.report(args.out, args.runs)


if __name__ == "__main__":
    errors.run(main, "stopped; the same command goes on")
