"""The paper's tables in miniature: train a row, search its sampler's settings, score it; every result is one JSON file.

    taskset -c 0 python -m experiments.tables --rows flow_matching self_e --seeds 2     # one core; others beside it
    python -m experiments.tables --rows main --wrong-captions 0.15 0.3                  # a dose of wrong captions
    python -m experiments.tables --report                                               # the page and its figures

A row and seed (rows.py) are a run of train.py under one budget, RUNS/SHARE/ROW-SEED, and its scores on test prompts,
OUT/SHARE/ROW-SEED.json. SHARE is that of wrong captions. Sampler settings are searched on validation prompts, on the
run of the first seed, for each step count: OUT/SHARE/ROW-search.json. Every row tries equally many. Stopped at any
time, by Ctrl-C or SIGTERM, the same command goes on; what is measured stays.
"""

import argparse
import contextlib
import functools
import itertools
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

import data
import recipe
import sample
from engine import checkpoint, errors, machine
from experiments import diversity, evaluate, report
from experiments.rows import BUDGET, GROUPS, ROWS, SEEDS, guidances, ways

LONG = 50  # from so many steps on only guidance is searched; the rest stays as at the step count before
QUICK = "--data scenes --side 24 --txt-len 12 --steps 4 --batch-size 8 --grid-every 0 --no-compile"


def run_of(row: str, seed: int, runs: Path) -> Path:
    """The folder of a row's run in `runs`; rows that train alike share it."""

    def training(name: str) -> tuple:
        return ROWS[name].flags, ROWS[name].iterations

    owner = next(name for name in ROWS if training(name) == training(row))
    return runs / f"{owner}-{seed}"


def train(row: str, share: float, seed: int, run: Path, budget: str) -> None:
    """A run of train.py, or the rest of one that was stopped. Raises KeyboardInterrupt when it is stopped again."""
    flags = ["--resume"]
    if not checkpoint.complete_states(run):
        words = budget.split()
        if "--steps" not in words:
            raise errors.UserError("--budget must have --steps, of which rows take a share")
        at = words.index("--steps") + 1
        words[at] = str(round(ROWS[row].iterations * int(words[at])))
        flags = [*words, "--wrong-captions", f"{share:g}", "--seed", str(seed), *ROWS[row].flags.split()]
    elif finished(run):
        return
    process = subprocess.Popen([sys.executable, "train.py", *flags, "--out", str(run)])
    code = None
    # A signal to this program alone is handed on. Both save and end.
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while code is None:
        with contextlib.suppress(KeyboardInterrupt):  # has reached train.py too
            code = process.wait()
    signal.signal(signal.SIGTERM, before)
    if code not in (0, 128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise errors.UserError(f"training {run} ended with exit code {code}; its reason stands above")
    if code or not finished(run):
        raise KeyboardInterrupt


def finished(run: Path) -> bool:
    state = checkpoint.complete_states(run)[-1]
    return checkpoint.step_of(state) == checkpoint.read_json(run / "config.json")["steps"]


def load(run: Path, device: torch.device, compiled: bool) -> sample.Loaded:
    """A run's model, sampled in the precision that it was trained in."""
    config = checkpoint.read_json(run / "config.json")
    loaded = sample.load(run, device, getattr(torch, config["precision"]))
    if compiled and machine.compile_works(device)[0]:
        machine.allow_shapes(8)
        loaded.network.compile_blocks()
    return loaded


def search(loaded: sample.Loaded, eta: float | str, out: Path, args: argparse.Namespace, device) -> dict:
    """Step count -> the best settings on validation prompts; every setting tried and its score are kept in `out`."""
    asked = evaluate.prompts("validation", args.per_tag, evaluate.world_of(loaded.config))
    result = machine.provenance(device) | {"train": loaded.config["command"], "training": loaded.config}
    result |= {"split": "validation", "per_tag": args.per_tag, "images": args.search_images, "steps": {}}
    if out.exists():
        result = checkpoint.read_json(out)

    def measure(n: int, settings: dict) -> dict:
        stream = evaluate.SPLITS.index("validation")
        found = evaluate.measure(loaded, asked, args.search_images, n, stream=stream, **settings)
        scores = evaluate.summary(asked, found, args.search_images)
        tags = {tag: entry["score"] for tag, entry in scores["tags"].items()}
        return {"overall": scores["overall"]["score"], "tags": tags}

    steps, objective = result["steps"], loaded.config["objective"]
    for n in args.steps:
        if str(n) not in steps:
            tune(steps, n, functools.partial(measure, n), "overall", objective, eta)
            checkpoint.write_json(out, result)
    return best(steps, args.steps)


def best(searched: dict, steps: list[int]) -> dict[int, dict]:
    """Of what `tune` has kept: step count -> the best settings."""
    return {n: searched[str(n)]["best"]["settings"] for n in steps}


def check_order(searched: Path, row: str, seed: int, steps: list[int]) -> None:
    """Raise UserError where a row's settings, which the run of the first seed decides, are still to be searched."""
    if seed == SEEDS[0]:
        return
    found = checkpoint.read_json(searched) if searched.exists() else {"steps": {}}
    parts = found["kinds"].values() if "kinds" in found else [found["steps"]]  # emoji_table.py has kinds
    if any(set(map(str, steps)) - part.keys() for part in parts):
        raise errors.UserError(f"{searched} is not complete: run seed {SEEDS[0]} of {row} first")


def tune(chosen: dict, n: int, measure: Callable[[dict], dict], key: str, objective: str, eta=1.0) -> None:
    """Put into chosen[str(n)] the settings tried at n steps, the best of them, and the seconds that it took.

    measure(settings) gives a record, and record[key] says which is best. First guidance and its space are tried, then
    at the best of them eta and the rule for s_k, then the recipe's t_max. At 50 steps, which cost as much as all the
    others, eta and the rule are those chosen for the last step count before.
    """
    began, before, tried = time.perf_counter(), {}, []

    def try_all(settings: list[dict]) -> dict:
        for choice in tqdm(settings, desc=f"search at {n} steps", leave=False, disable=None):
            tried.append({"settings": choice} | measure(choice))
        return max(tried, key=lambda record: record[key])

    if n >= LONG and chosen:
        last = chosen[max(chosen, key=int)]["best"]["settings"]
        before = {name: last[name] for name in ("eta", "s_rule") if name in last}
    first = try_all([choice | before for choice in guidances(objective, eta)])
    if n < LONG:
        more = [first["settings"] | way for way in ways(objective, eta)]
        first = try_all([choice for choice in more if choice != first["settings"]])
    if "t_max" in first["settings"]:
        first = try_all([first["settings"] | {"t_max": recipe.RECIPES["laptop"].t_max}])
    chosen[str(n)] = {"best": first, "tried": tried, "seconds": round(time.perf_counter() - began, 1)}


def about(loaded: sample.Loaded, run: Path, row: str, seed: int, device) -> tuple[dict, dict]:
    """What made a row's results: the head of their file, and what the run's training was."""
    elapsed = checkpoint.read_json(checkpoint.complete_states(run)[-1] / "state.json")["elapsed"]
    training = {"train": loaded.config["command"], "training": loaded.config}
    head = machine.provenance(device) | {"row": row, "seed": seed}
    return head, training | {"training_seconds": round(elapsed, 1)}


def score(row: str, share: float, seed: int, run: Path, args: argparse.Namespace, device) -> None:
    """Scores and diversity on test prompts at the best settings, written to OUT/SHARE/ROW-SEED.json."""
    folder = args.out / f"{share:g}"
    searched = folder / f"{row}-search.json"
    began = time.perf_counter()
    loaded = load(run, device, "--no-compile" not in args.budget)
    chosen = search(loaded, ROWS[row].eta, searched, args, device)
    world, stream = evaluate.world_of(loaded.config), 10 + evaluate.SPLITS.index("test")
    asked = evaluate.prompts("test", args.per_tag, world)
    head, training = about(loaded, run, row, seed, device)
    result = head | {"wrong_captions": share, "split": "test"} | training
    result |= {"per_tag": args.per_tag, "images": args.images, "steps": {}}
    for n, settings in chosen.items():
        found = evaluate.measure(loaded, asked, args.images, n, seed=seed, stream=stream, **settings)
        varied = diversity.measure(asked, found, loaded.config["side"], world)
        scores = evaluate.summary(asked, found, args.images)
        result["steps"][str(n)] = scores | {"settings": settings, "diversity": varied}
    result["seconds"] = round(time.perf_counter() - began, 1)
    checkpoint.write_json(folder / f"{row}-{seed}.json", result)


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = errors.Parser("-m experiments.tables", "Train, search and score the rows of the table.")
    a = parser.add_argument
    names = f"{', '.join(GROUPS)}, or of {', '.join(ROWS)}"
    a("--rows", metavar="ROW", nargs="+", choices=[*ROWS, *GROUPS], default=["main"], help=names)
    a("--seeds", metavar="N", type=int, nargs="+", default=list(SEEDS), help="of the runs")
    a("--wrong-captions", metavar="X", type=float, nargs="+", default=[0.0], help="shares of them")
    a("--budget", metavar="FLAGS", default=BUDGET, help="flags of train.py for every row")
    a("--steps", metavar="N", type=int, nargs="+", default=list(sample.STEP_COUNTS), help="step counts")
    a("--out", metavar="DIR", type=Path, help="(results/scenes)")
    a("--runs", metavar="DIR", type=Path, help="(runs/scenes)")
    a("--report", action="store_true", help="only the page and its figures, from what has been measured")
    a("--quick", action="store_true", help="tiny budgets, to check the path (runs/quick)")
    args = parser.parse_args(argv)
    choose_folders(args, "scenes")
    args.per_tag, args.images, args.search_images = 36, 8, 2  # prompts of each tag, pictures of each prompt
    if args.quick:
        args.budget, args.per_tag, args.images, args.search_images = QUICK, 1, 1, 1
    parser.check_ranges(args, steps=(1, 10**6), seeds=(0, 2**63 - 1), wrong_captions=(0, 1))
    args.steps = sorted(args.steps)
    args.rows = list(itertools.chain(*(GROUPS.get(name, [name]) for name in args.rows)))
    return args


def choose_folders(args: argparse.Namespace, world: str) -> None:
    """Where results and runs go, if the user does not say. Those of --quick are kept apart."""
    args.out = args.out or Path("runs/quick/results" if args.quick else "results", world)
    args.runs = args.runs or Path("runs/quick" if args.quick else "runs", world)


def main() -> None:
    args = parse_arguments()
    machine.keep_freed_memory()
    device = machine.pick_device()
    if not args.report:
        settings = {name: getattr(args, name) for name in ("budget", "steps", "per_tag", "images")}
        checkpoint.keep_settings(args.out, {"shapes": data.VERSION} | settings, "choose another --out")
        for seed, share, row in itertools.product(args.seeds, args.wrong_captions, args.rows):
            folder = args.out / f"{share:g}"
            folder.mkdir(exist_ok=True)
            if (folder / f"{row}-{seed}.json").exists():
                continue  # measured, perhaps on another machine
            check_order(folder / f"{row}-search.json", row, seed, args.steps)
            run = run_of(row, seed, args.runs / f"{share:g}")
            train(row, share, seed, run, args.budget)
            score(row, share, seed, run, args, device)
    report.report(args.out, args.runs)


if __name__ == "__main__":
    errors.run(main, "stopped; the same command goes on")
