"""The paper's ablations in miniature: one command trains every row of Table 2, scores it and writes results/.

    python experiments/tables.py                          # all rows, three seeds; stopped and started again, it goes on where it was
    python experiments/tables.py --rows self_e control    # some of them, perhaps while another process trains the others into the same folders
    python experiments/tables.py --quick                  # the whole path in minutes, with budgets too small to mean anything
    python experiments/tables.py --report                 # the tables and figures again, from what has been measured

Per row and seed: a run of train.py under one budget (runs/tables/ROW-SEED), then scores of evaluate.py on test prompts at
1, 2, 4, 8 and 50 steps. Guidance, eta and the rule for s_k are searched for each row and step count (guidance alone at 50
steps) on validation prompts, on the run of the first seed, in one grid for all rows; flow matching stays at s_k = t_k and IMM
has its own sampler, so fewer of the settings are open to them. Everything measured is one JSON file per row and seed, beside
one of the search per row and one for Fig. 5, written in one piece. What has been measured stays, whatever code made it: after
a change that matters, choose another --out and --runs.
"""

import itertools
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

if __name__ == "__main__":  # started as a file: modules are found from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import data
import objectives
import recipe
import sample
from engine import arguments, checkpoint, errors, machine
from experiments import evaluate, scorer

# The rows: what train.py is told, and the paper's GenEval scores at 2, 4, 8 and 50 steps (Table 2; none where it has none).
ROWS = {
    "flow_matching": ("Flow Matching", ["--objective", "flow_matching"], (0.2523, 0.6075, 0.7155, 0.7311)),
    "imm": ("IMM", ["--objective", "imm"], (0.2617, 0.5994, 0.7112, 0.7472)),
    "self_e": ("Self-E, classifier score only (\"Ours\")", ["--aux-from", "1"], (0.6097, 0.7121, 0.7490, 0.7543)),
    "eq16": ("w/o target norm. (Eq. 16 to the letter)", ["--aux-from", "1", "--target", "sum"], (0.5555, 0.6156, 0.6521, 0.7018)),
    "eq18": ("Eq. 18 as target", ["--aux-from", "1", "--target", "tar"], None),
    "control": ("control: Eq. 19 with Delta = 0", ["--aux-from", "1", "--delta-scale", "0"], None),
    "self_e_ema": ("Self-E, both branches by the average", ["--aux-from", "1", "--null-branch", "ema"], None),
    "aux_throughout": ("w/ aux. term throughout", ["--aux-from", "0"], (0.3307, 0.4304, 0.5153, 0.6166)),
    "aux_late": ("Self-E, aux. term late", ["--aux-from", f"{recipe.AUX_FROM:.4f}"], None),
}
DIFFERENCES = (("self_e", "flow_matching"), ("aux_late", "flow_matching"), ("control", "flow_matching"), ("self_e", "control"), ("aux_late", "control"),
               ("self_e", "self_e_ema"), ("self_e_ema", "control"), ("self_e", "eq16"), ("self_e", "eq18"), ("self_e", "aux_throughout"),
               ("aux_late", "self_e"), ("self_e", "imm"))  # of the table, those that decide claims
PROGRESS = ("flow_matching", "self_e")  # the rows of Fig. 5, scored along their training
PAPER_NOTE = ("paper: GenEval of 0.5B models after 300k iterations; w/o target norm. and w/ aux. term after 100k, when its Ours has "
              "0.544, 0.638, 0.682 and 0.716")  # fmt: skip
# Single shapes, two captions in five of another picture; the seeds are not those on which this setting was chosen (0 and 1).
# The longest of these prompts has six words.
BUDGET = "--data one-shape --wrong-captions 0.4 --txt-len 8 --steps 9000 --grid-every 0"
SEEDS = (2, 3, 4)
GRID = {"guidance": (1.0, 1.5, 2.0, 3.0, 5.0), "eta": (0.0, 1.0)}


def settings_of(row: str) -> list[dict]:
    """The settings that the search tries for a row: the grid, less what the row's model has not learned."""
    objective = objectives.OBJECTIVES[arguments.parse(ROWS[row][1]).objective]
    grid = GRID | {"s_rule": sorted(objective.s_rules)}
    if objective.trajectory:
        grid = {"guidance": GRID["guidance"]}
    return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]


def overall(asked: list[dict], right: list[int], images: int) -> float:
    return evaluate.summary(asked, right, images)["overall"]["score"]


# ---------------------------------------------------------------------------------------------------------------------
# One row, one seed
# ---------------------------------------------------------------------------------------------------------------------
def train_row(row: str, seed: int, run: Path, budget: list[str], device: str, milestone_every: int) -> None:
    """Train unless it is done; go on where a stopped run was. The budget, precision included, is the same for every row.

    A run of Fig. 5 keeps a state at every multiple of milestone_every; 0 keeps none.
    """
    if (run / "done.json").exists():
        return
    command = [sys.executable, str(Path(__file__).parents[1] / "train.py"), "--out", str(run), "--device", device]
    if checkpoint.complete_states(run):
        command += ["--resume"]
    else:
        command += ["--seed", str(seed), *budget, *ROWS[row][1]]
        command += ["--milestone-every", str(milestone_every)] if milestone_every else []
    process, code = subprocess.Popen(command), None
    while code is None:
        try:
            code = process.wait()
        except KeyboardInterrupt:  # Ctrl-C reaches train.py too, which saves before it ends
            continue
    if code:
        raise errors.UserError(f"training {row}, seed {seed}, ended with exit code {code}; what it said stands above")
    state = checkpoint.read_json(checkpoint.complete_states(run)[-1] / "state.json")
    if state["step"] < checkpoint.read_json(run / "config.json")["steps"]:
        raise KeyboardInterrupt  # train.py was stopped and has saved itself; so are we
    checkpoint.write_json(run / "done.json", {"seconds": round(state["elapsed"], 1)})


def search(loaded: sample.Loaded, row: str, images: int, per_tag: int | None, steps: tuple[int, ...]) -> dict:
    """The best settings per step count on validation prompts. At 50 steps only guidance is searched again, with the eta and
    the s-rule that won at the largest smaller count: it costs as much as all the others together."""
    asked = evaluate.prompts("validation", per_tag, evaluate.tags_of(loaded.config))
    chosen = {}
    for n in steps:
        tries = settings_of(row)
        if n >= 50 and chosen:
            last = chosen[max(chosen)]["settings"]
            tries = [t for t in tries if all(t[k] == last[k] for k in t if k != "guidance")]
        scores = []
        for settings in tqdm(tries, desc=f"{row}: search at {n} steps", leave=False, disable=None):
            right = evaluate.measure(loaded, asked, images, n, stream=evaluate.SPLITS.index("validation"), **settings)
            scores.append(overall(asked, right, images))
        best = int(np.argmax(scores))
        chosen[n] = {"settings": tries[best], "validation_score": scores[best], "tried": len(tries)}
    return chosen


def measure_row(row: str, seed: int, run: Path, out: Path, args, device: torch.device) -> None:
    """Scores on test prompts and held-out pairs at the chosen settings, written to results/rows/ROW-SEED.json."""
    path = out / "rows" / f"{row}-{seed}.json"
    if path.exists():
        return
    began = time.perf_counter()
    loaded = sample.load(run, device)
    search_path = out / "rows" / f"{row}-search.json"
    if not search_path.exists():
        checkpoint.write_json(search_path, {
            "row": row, "run_of_seed": seed, "split": "validation", "images": args.search_images, "per_tag": args.per_tag,
            "chosen": search(loaded, row, args.search_images, args.per_tag, args.sample_steps),
            "seconds": round(time.perf_counter() - began, 1)} | machine.provenance(device))  # fmt: skip
    chosen = checkpoint.read_json(search_path)["chosen"]
    result = machine.provenance(device) | {
        "row": row, "seed": seed, "train": loaded.config["command"], "training": loaded.config, "images": args.images,
        "training_seconds": checkpoint.read_json(run / "done.json")["seconds"], "splits": {}}  # fmt: skip
    for split in ("test", "pairs"):
        asked = evaluate.prompts(split, args.per_tag, evaluate.tags_of(loaded.config))
        result["splits"][split] = {}
        for n in args.sample_steps:
            settings = chosen[str(n)]["settings"]
            right = evaluate.measure(loaded, asked, args.images, n, seed=seed, stream=10 + evaluate.SPLITS.index(split), **settings)
            result["splits"][split][str(n)] = evaluate.summary(asked, right, args.images) | {"settings": settings}
    result["seconds"] = round(time.perf_counter() - began, 1)
    checkpoint.write_json(path, result)


def measure_progress(row: str, seed: int, run: Path, out: Path, args, device: torch.device) -> None:
    """Fig. 5: scores on test prompts of every milestone of a run, at the settings chosen for its end."""
    path = out / "rows" / f"{row}-progress-{seed}.json"
    if path.exists():
        return
    began = time.perf_counter()
    config = checkpoint.read_json(run / "config.json")
    every = config["arguments"]["milestone_every"]
    chosen = checkpoint.read_json(out / "rows" / f"{row}-search.json")["chosen"]
    asked, points = evaluate.prompts("test", args.per_tag, evaluate.tags_of(config)), []
    states = [state for state in checkpoint.complete_states(run) if every and checkpoint.step_of(state) % every == 0]
    if not states:
        return  # a run of train.py's own, without milestones
    for state in tqdm(states, desc=f"{row}: along the training", leave=False, disable=None):
        loaded, scores = sample.load(state, device), {}
        for n in args.sample_steps:
            right = evaluate.measure(loaded, asked, 1, n, seed=seed, stream=30, **chosen[str(n)]["settings"])
            scores[str(n)] = overall(asked, right, 1)
        points.append({"step": checkpoint.step_of(state), "overall": scores})
    checkpoint.write_json(path, machine.provenance(device) | {
        "row": row, "seed": seed, "split": "test", "images": 1, "per_tag": args.per_tag, "points": points,
        "seconds": round(time.perf_counter() - began, 1)})  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------
def read_rows(out: Path) -> dict[str, dict[int, dict]]:
    """row -> seed -> what measure_row wrote, in the order of ROWS."""
    found = {}
    for row in ROWS:
        files = sorted((out / "rows").glob(f"{row}-[0-9]*.json"))
        if files:
            found[row] = {r["seed"]: r for r in map(checkpoint.read_json, files)}
    return found


def t_interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of the 95% interval over seeds (Student's t; infinite for one seed)."""
    quantile = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
    n = len(values)
    return float(np.mean(values)), quantile.get(n, 1.96 + 2.6 / n) * float(np.std(values, ddof=1)) / n**0.5 if n > 1 else float("inf")


def score_of(result: dict, n: int, split: str = "test") -> float:
    return result["splits"][split][str(n)]["overall"]["score"]


def write_table(rows: dict, out: Path, steps: tuple[int, ...]) -> None:
    """results/table2.md: our scores beside the paper's, cost, settings, and the paired differences that decide the claims."""
    lines = ["# Table 2 in miniature", "", "Overall score on test prompts, mean over seeds +- half-width of the 95% interval; "
             f"in brackets the paper's ({PAPER_NOTE}). Prompts of one shape are too few to spare: those tags ask training's own, with "
             "other noise than the search; `pairs` in `rows/` are held-out ones. Made by `python experiments/tables.py`; settings and per-tag scores in `rows/`.", "",
             "| row | seeds | " + " | ".join(f"{n} step{'s' * (n > 1)}" for n in steps) + " | training time | x flow matching |",
             "|---" * (len(steps) + 4) + "|"]  # fmt: skip
    base = np.mean([r["training_seconds"] for r in rows["flow_matching"].values()]) if "flow_matching" in rows else None
    for row, seeds in rows.items():
        title, _, paper = ROWS[row]
        cells = []
        for n in steps:
            mean, half = t_interval([score_of(r, n) for r in seeds.values()])
            told = f" ({paper[(2, 4, 8, 50).index(n)]:.3f})" if paper and n in (2, 4, 8, 50) else ""
            cells.append(f"{mean:.3f}" + (f" +- {half:.3f}" if np.isfinite(half) else "") + told)
        seconds = np.mean([r["training_seconds"] for r in seeds.values()])
        ratio = f"{seconds / base:.2f}" if base else ""
        lines.append(f"| {title} | {len(seeds)} | " + " | ".join(cells) + f" | {seconds / 60:.0f} min | {ratio} |")
    lines += ["", "Paired differences over seeds (mean, 95% interval):", "", "| difference | "
              + " | ".join(f"{n} step{'s' * (n > 1)}" for n in steps) + " |", "|---" * (len(steps) + 1) + "|"]  # fmt: skip
    for a, b in DIFFERENCES:
        if a in rows and b in rows:
            common = sorted(set(rows[a]) & set(rows[b]))
            cells = []
            for n in steps:
                mean, half = t_interval([score_of(rows[a][s], n) - score_of(rows[b][s], n) for s in common])
                cells.append(f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]" if np.isfinite(half) else f"{mean:+.3f}")
            lines.append(f"| {ROWS[a][0]} minus {ROWS[b][0]} | " + " | ".join(cells) + " |")
    with checkpoint.in_one_piece(out / "table2.md") as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw_figures(rows: dict, out: Path, runs: Path, steps: tuple[int, ...]) -> None:
    """scores.png: score against steps, a line per row. progress.png: Fig. 5. samples_TAG.png (Fig. 3, 4, 6), one per kind of
    prompt: objectives in rows, steps in columns."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(9.5, 4.5))
    for row, seeds in rows.items():
        values = np.array([[score_of(r, n) for n in steps] for r in seeds.values()])
        color = f"C{list(ROWS).index(row)}"
        panel.plot(range(len(steps)), values.mean(0), marker="o", color=color, label=ROWS[row][0])
        panel.fill_between(range(len(steps)), values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
    panel.set(xticks=range(len(steps)), xticklabels=steps, xlabel="network evaluations", ylabel="overall score, test prompts")
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))  # outside: there are nine lines
    figure.tight_layout()
    with checkpoint.in_one_piece(out / "scores.png") as partial:
        figure.savefig(partial, format="png", dpi=110)
    plt.close(figure)

    progress = {row: [checkpoint.read_json(f)["points"] for f in sorted((out / "rows").glob(f"{row}-progress-*.json"))] for row in PROGRESS}
    if all(progress.values()):  # Fig. 5
        figure, panels = plt.subplots(1, len(steps), figsize=(2.4 * len(steps), 2.8), sharey=True, squeeze=False)
        for panel, n in zip(panels[0], steps):
            for row, runs_of in progress.items():
                for i, points in enumerate(runs_of):
                    panel.plot([p["step"] for p in points], [p["overall"][str(n)] for p in points], marker=".",
                               color=f"C{list(ROWS).index(row)}", alpha=0.8, label=ROWS[row][0] if i == 0 else None)  # fmt: skip
            panel.set(title=f"{n} step{'s' * (n > 1)}", xlabel="iteration")
            panel.grid(alpha=0.3)
        panels[0][0].set_ylim(bottom=0)  # of all panels: they share it
        panels[0][0].set_ylabel("overall score, test prompts")
        panels[0][0].legend(fontsize=6)
        figure.tight_layout()
        with checkpoint.in_one_piece(out / "progress.png") as partial:
            figure.savefig(partial, format="png", dpi=110)
        plt.close(figure)

    missing = [run for run in (runs / f"{row}-{min(seeds)}" for row, seeds in rows.items()) if not (run / "model.safetensors").exists()]
    if missing:
        print(f"no sheets of samples: {', '.join(map(str, missing))} not here", file=sys.stderr)
        return
    asked = evaluate.prompts("test", 1, evaluate.tags_of(next(r["training"] for seeds in rows.values() for r in seeds.values())))
    for metadata in asked:
        sheet_rows, captions = [], []
        for row, seeds in rows.items():
            seed = min(seeds)
            loaded = sample.load(runs / f"{row}-{seed}", torch.device("cpu"))
            chosen = seeds[seed]["splits"]["test"]
            sheet_rows.append([sample.generate(loaded, [metadata["prompt"]], [(0,)], steps=n, **chosen[str(n)]["settings"])[0]
                               for n in steps])  # fmt: skip
            captions.append(ROWS[row][0])
        sheet = sample.sheet(sheet_rows, steps, captions)
        with checkpoint.in_one_piece(out / f"samples_{metadata['tag']}.png") as partial:
            sheet.save(partial, format="png")


def parse_arguments():
    parser = errors.Parser("experiments/tables.py", "Train and score every row of Table 2 in miniature.")
    a = parser.add_argument
    a("--out", metavar="DIR", type=Path, default=Path("results"), help="where results go (default: results)")
    a("--runs", metavar="DIR", type=Path, default=Path("runs/tables"), help="where runs go (default: runs/tables)")
    a("--rows", metavar="ROW", nargs="+", choices=list(ROWS), default=list(ROWS), help=f"of {', '.join(ROWS)} (default: all)")
    a("--seeds", metavar="N", type=int, nargs="+", default=list(SEEDS), help="training seeds (default: 2 3 4)")
    a("--budget", metavar="FLAGS", default=BUDGET, help=f'flags of train.py for every row (default: "{BUDGET}")')
    a("--images", metavar="N", type=int, default=8, help="pictures per test prompt (default: 8)")
    a("--search-images", metavar="N", type=int, default=2, help="pictures per validation prompt (default: 2)")
    a("--per-tag", metavar="N", type=int, default=36, help="prompts per tag (default: 36)")
    a("--sample-steps", metavar="N", type=int, nargs="+", default=list(sample.STEP_COUNTS), help="step counts (default: 1 2 4 8 50)")
    a("--device", metavar="NAME", default="auto", help="cuda, mps, cpu (default: the best there is)")
    a("--milestones", metavar="N", type=int, default=6, help="points along the training for Fig. 5 (default: 6)")
    a("--quick", action="store_true", help="tiny budgets, in OUT-quick and RUNS-quick: checks the path, measures nothing")
    a("--report", action="store_true", help="only the tables and figures, from what has been measured")
    args = parser.parse_args()
    if args.quick:
        args.budget = "--steps 4 --batch-size 8 --grid-every 0 --no-compile"
        args.seeds, args.images, args.per_tag, args.sample_steps, args.milestones = args.seeds[:2], 1, 1, [1, 2], 2
        for name in ("out", "runs"):
            setattr(args, name, getattr(args, name).with_name(getattr(args, name).name + "-quick"))
    if min(args.images, args.search_images, args.per_tag, args.milestones, *args.sample_steps) < 1 or min(args.seeds) < 0:
        parser.error("counts must be at least 1 and seeds not negative")
    args.sample_steps = sorted(args.sample_steps)
    return args


def check_budget(args, budget: list[str]) -> recipe.Recipe:
    """The recipe of a budget; UserError for one that train.py would refuse in some row, or whose pictures have no exact scores."""
    for row in args.rows:
        flags = arguments.parse([*budget, *ROWS[row][1]])
        plan = arguments.plan_of(flags)
        plan.check_division(1, flags.micro_batch)
    if plan.data[0] not in data.SETS or not scorer.SIDES[0] <= plan.stages[-1].sides[-1] <= scorer.SIDES[1]:
        raise errors.UserError(f"only the built-in shapes have exact scores, at {scorer.SIDES[0]} to {scorer.SIDES[1]} pixels: "
                               f"not {plan.data[0]} at {plan.stages[-1].sides[-1]}")  # fmt: skip
    return plan


def keep_settings(args, budget: list[str], device: torch.device) -> str:
    """Write what all rows share beside the runs and beside the results; returns the precision of the trainings, chosen once.

    Raises UserError when runs or results were begun with other settings.
    """
    path = args.runs / "settings.json"
    precision = arguments.parse(budget).precision
    for begun in (path, args.out / "settings.json"):  # on another machine there may be results and no runs
        if precision == "auto" and begun.exists():
            precision = checkpoint.read_json(begun)["precision"]
    if precision == "auto":
        precision = "bf16" if machine.pick_precision(device) == torch.bfloat16 else "fp32"
    training = {"shapes": data.VERSION, "budget": args.budget, "precision": precision}
    measuring = {name: getattr(args, name) for name in ("images", "search_images", "per_tag", "sample_steps")}
    for path, settings in ((path, training), (args.out / "settings.json", training | measuring)):
        if path.exists() and checkpoint.read_json(path) != settings:
            raise errors.UserError(f"{path.parent} was begun with other settings ({path}); repeat them, or choose another --out and --runs")
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(path, settings)
    return precision


def main() -> None:
    args = parse_arguments()
    machine.keep_freed_memory()
    device = machine.pick_device(args.device)
    (args.out / "rows").mkdir(parents=True, exist_ok=True)
    if not args.report:
        budget = args.budget.split()
        milestone_every = max(1, check_budget(args, budget).steps // args.milestones)
        budget += ["--precision", keep_settings(args, budget, device)]
        for seed, row in itertools.product(args.seeds, args.rows):
            run = args.runs / f"{row}-{seed}"
            along = row in PROGRESS and seed == min(args.seeds)  # Fig. 5 shows one run of each
            wanted = [f"{row}-{seed}.json", *([f"{row}-progress-{seed}.json"] if along else [])]
            if all((args.out / "rows" / name).exists() for name in wanted):
                continue  # measured, perhaps on another machine
            train_row(row, seed, run, budget, args.device, milestone_every if along else 0)
            measure_row(row, seed, run, args.out, args, device)
            if along:
                measure_progress(row, seed, run, args.out, args, device)
    rows = read_rows(args.out)
    if not rows:
        raise errors.UserError(f"nothing has been measured in {args.out}")
    steps = tuple(int(n) for n in next(r["splits"]["test"] for seeds in rows.values() for r in seeds.values()))  # those measured
    write_table(rows, args.out, steps)
    print((args.out / "table2.md").read_text(encoding="utf-8"))
    draw_figures(rows, args.out, args.runs, steps)


if __name__ == "__main__":
    errors.run(main, "stopped; the same command goes on")
