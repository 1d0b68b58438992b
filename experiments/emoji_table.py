"""Emoji by kind of prompt: rows of the table and a peer, beside what perfect evaluators predict.

    taskset -c 0 python -m experiments.emoji_table --rows flow_matching self_e   # one core; others beside it
    python -m experiments.emoji_table --quick                                    # checks the path
    python -m experiments.emoji_table --report                                   # the page, from what is measured

A row and seed (rows.py) are a run of train.py under one budget, RUNS/ROW-SEED, and its scores
(emoji_judge.summary) on test prompts of each kind and on the pairs that training never shows,
OUT/ROW-SEED.json. Sampler settings are searched on validation prompts, on the run of the first seed, for each
kind and step count: OUT/ROW-search.json. Every row tries equally many, as in tables.py. A sheet of samples
shows prompts fixed by their hashes. Stopped at any time, the same command goes on.
"""

import argparse
import functools
import itertools
import math
import time
from pathlib import Path

from tqdm import tqdm

import emoji
import sample
from engine import checkpoint, errors, machine
from experiments import emoji_judge, report, tables
from experiments.rows import DIFFERENCES, ROWS, SEEDS

KINDS = emoji_judge.KINDS
# By the rules of results/emoji/README.md. The longest of these captions has seven words.
BUDGET = "--data emoji-few --side 24 --txt-len 10 --optimizer muon --precision bf16 --grid-every 0"
BUDGET += " --steps 18000"
QUICK = "--data emoji-few --side 24 --txt-len 10 --steps 4 --batch-size 8 --grid-every 0 --no-compile"
PREDICTED = {  # row -> the perfect evaluator that it is compared with
    "flow_matching": "flow matching",
    "control": "control, Delta = 0",
    "self_e": "classifier only",
}


def draw(
    loaded: sample.Loaded, texts: list[str], pictures: int, stream: tuple[int, ...], **choices
) -> tuple[list, int]:
    """At least so many pictures, as many of each prompt in turn, and how many of each. Their noise follows from (stream,
    prompt, image)."""
    images = math.ceil(pictures / len(texts))
    jobs = list(itertools.product(range(len(texts)), range(images)))
    keys = [(*stream, *job) for job in jobs]
    return sample.generate(loaded, [texts[i] for i, _ in jobs], keys, **choices), images


class Scores:
    """The prompts of a source by kind, at most `most` of one; what a model's pictures of them are worth."""

    def __init__(self, source: emoji.Emoji, most: int):
        self.source, self.judge, self.most = source, emoji_judge.Judge(source), most

    def __call__(self, loaded: sample.Loaded, kind: str, split: str, pictures: int, **choices) -> dict:
        """emoji_judge.summary of at least so many pictures, as many of each prompt.

        Their noise follows from (seed, split, kind, prompt, image).
        """
        texts = emoji_judge.asked(self.source, kind, split, self.most)
        stream = 40 + (split == "test"), KINDS.index(kind)
        drawn, images = draw(loaded, texts, pictures, stream, **choices)
        verdicts = [self.judge(drawn[i : i + images]) for i in range(0, len(drawn), images)]
        return emoji_judge.summary(self.source, texts, verdicts)


def search(loaded: sample.Loaded, scores: Scores, eta: float | str, out: Path, args, device) -> dict:
    """kind -> step count -> the best settings on validation prompts; kept in `out` with every score."""
    result = machine.provenance(device) | {
        "train": loaded.config["command"],
        "pictures": args.search_pictures,
    }
    result = checkpoint.read_json(out) if out.exists() else result | {"kinds": {kind: {} for kind in KINDS}}

    def measure(kind: str, n: int, settings: dict) -> dict:
        found = scores(loaded, kind, "validation", args.search_pictures, steps=n, **settings)
        return {"score": found["score"]}

    for kind, n in itertools.product(KINDS, args.steps):
        if str(n) not in result["kinds"][kind]:
            here = functools.partial(measure, kind, n)
            tables.tune(result["kinds"][kind], n, here, "score", loaded.config["objective"], eta)
            checkpoint.write_json(out, result)
    return {kind: tables.best(searched, args.steps) for kind, searched in result["kinds"].items()}


def score(row: str, seed: int, run: Path, args: argparse.Namespace, device) -> None:
    """Write OUT/ROW-SEED.json."""
    searched = args.out / f"{row}-search.json"
    began = time.perf_counter()
    loaded = tables.load(run, device, "--no-compile" not in args.budget)
    scores = Scores(source_of(loaded.config), args.prompts)
    chosen = search(loaded, scores, ROWS[row].eta, searched, args, device)
    head, training = tables.about(loaded, run, row, seed, device)
    result = head | training | {"pictures": args.pictures, "kinds": {}}
    for kind, settings in chosen.items():
        result["kinds"][kind] = {
            str(n): scores(loaded, kind, "test", args.pictures, steps=n, seed=seed, **s) | {"settings": s}
            for n, s in tqdm(settings.items(), desc=f"{row}: {kind}", leave=False, disable=None)
        }
    result["seconds"] = round(time.perf_counter() - began, 1)
    checkpoint.write_json(args.out / f"{row}-{seed}.json", result)


def source_of(config: dict) -> emoji.Emoji:
    """The pictures that a model was trained on, from its config.json."""
    return emoji.Emoji(config["side"], config["data"][0])


HEAD = """# Emoji by kind of prompt

Made by `python -m experiments.emoji_table --report` from the files beside it, each with its command, commit, hardware
and time. Test prompts; the share of right pictures, and the variety of the right ones (`experiments/emoji_judge.py`);
means over seeds, ± half the 95% interval over seeds (Student's t). "predicted" is what perfect evaluators have
(`toy/emoji_world.py`), who know no held-out pairs. Settings were chosen on validation prompts: w, the scale of
guidance, and what keeps its norm; eta; s = 0, where s_k = t_(k+1), to s = 1, where s_k = t_k; t, the latest time at
which the network is asked, where it is not 1."""


def predictions(name: str) -> dict:
    """What toy/emoji_world.py has for one of emoji.SETS: kind of prompt -> its records. Nothing where it was not run."""
    path = emoji_judge.predicted_in(name)
    return checkpoint.read_json(path)["kinds"] if path.exists() else {}


def cell(scores: list[dict], show=report.cell) -> str:
    """Right; variety, where there is one. `show` writes the values of all seeds."""
    parts = [[s["right"] for s in scores], [s["variety"] for s in scores if s["variety"] is not None]]
    return "; ".join(show(values) for values in parts if values)


def mean(values: list[float]) -> str:
    return f"{sum(values) / len(values):.3f}"


def differences(measured: report.Rows, a: str, b: str, steps: list[int]) -> list[list[str]]:
    """Lines of a table: kinds down, step counts across."""

    def right(kind: str, n: int):
        return lambda result: result["kinds"][kind][str(n)]["right"]

    return [
        [kind, *(report.cell(report.paired(measured, a, b, right(kind, n)), "+") for n in steps)]
        for kind in KINDS
    ]


def write_page(out: Path) -> None:
    """OUT/table.md. Raises UserError where nothing has been measured."""
    measured, lines = report.read_rows(out), [HEAD]
    if not measured:
        raise errors.UserError(f"nothing has been measured in {out}")
    first = next(iter(next(iter(measured.values())).values()))
    steps, predicted = list(map(int, first["kinds"]["exact"])), predictions(first["training"]["data"][0])
    for kind in KINDS:
        lines += ["", f"## {kind}"]
        records, cells = predicted.get(kind, {}).get("records", []), []
        for row, seeds in measured.items():
            found = [[result["kinds"][kind][str(n)] for result in seeds.values()] for n in steps]
            cells.append([row, len(seeds), *map(cell, found)])
            asked = [(PREDICTED.get(row), n) for n in steps]
            same = [[r for r in records if (r["objective"], r["steps"]) == one] for one in asked]
            if any(same):
                cells.append(["predicted", "", *(cell(scores, mean) for scores in same)])
        lines += report.table(["row", "seeds", *steps], cells)
    chosen = []
    for (row, seeds), kind in itertools.product(measured.items(), KINDS):
        found = next(iter(seeds.values()))["kinds"][kind]
        chosen.append([row, kind, *(report.words(found[str(n)]["settings"]) for n in steps)])
    lines += ["", "## Settings", *report.table(["row", "kind", *steps], chosen)]
    lines += ["", "## Differences of right, paired by seed"]
    for a, b in DIFFERENCES:
        if set(measured.get(a, ())) & set(measured.get(b, ())):
            lines += report.table([f"{a} minus {b}", *steps], differences(measured, a, b, steps))
    report.write(lines, out / "table.md")


SHOWN = {"exact": 1, "label": 2, "tag": 2, "group": 1}  # how many prompts of a kind, the first of the test


def draw_samples(args: argparse.Namespace) -> None:
    """OUT/samples.png: flow matching beside Self-E, the same prompts and noise, each at its searched settings."""
    runs = {row: args.runs / f"{row}-{SEEDS[0]}" for row in ("flow_matching", "self_e")}
    if not runs.keys() <= report.read_rows(args.out).keys() or not report.all_here(runs):
        return
    source = source_of(checkpoint.read_json(runs["self_e"] / "config.json"))
    asked = [
        (kind, text) for kind, most in SHOWN.items() for text in emoji_judge.asked(source, kind, "test", most)
    ]
    kinds, captions = zip(*asked)
    searched = {row: checkpoint.read_json(args.out / f"{row}-search.json")["kinds"] for row in runs}

    def settings(row: str, i: int, n: int) -> dict:
        return searched[row][kinds[i]][str(n)]["best"]["settings"]

    steps = [n for n in args.steps if n < 10]
    report.draw_runs(runs, captions, steps, settings, args.out / "samples.png")


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = errors.Parser("-m experiments.emoji_table", "Train, search and score rows on emoji.")
    a = parser.add_argument
    rows = ["flow_matching", "flow_matching_16", "control", "self_e", "meanflow"]
    a("--rows", metavar="ROW", nargs="+", choices=ROWS, default=rows, help="of rows.py")
    a("--seeds", metavar="N", type=int, nargs="+", default=list(SEEDS[:2]), help="of the runs")
    a("--budget", metavar="FLAGS", default=BUDGET, help="flags of train.py for every row")
    a("--steps", metavar="N", type=int, nargs="+", default=list(sample.STEP_COUNTS), help="step counts")
    a("--out", metavar="DIR", type=Path, help="(results/emoji-few)")
    a("--runs", metavar="DIR", type=Path, help="(runs/emoji-few)")
    a("--report", action="store_true", help="only the page, from what has been measured")
    a("--quick", action="store_true", help="tiny budgets, to check the path (runs/quick)")
    args = parser.parse_args(argv)
    tables.choose_folders(args, "emoji-few")
    # Of each kind; as many prompts as in toy/emoji_world.py
    args.prompts, args.pictures, args.search_pictures = 35, 280, 70
    if args.quick:
        args.budget, args.prompts, args.pictures, args.search_pictures = QUICK, 2, 2, 2
    parser.check_ranges(args, steps=(1, 10**6), seeds=(0, 2**63 - 1))
    args.steps = sorted(args.steps)
    return args


def main() -> None:
    args = parse_arguments()
    machine.keep_freed_memory()
    device = machine.pick_device()
    if not args.report:
        names = ("budget", "steps", "prompts", "pictures", "search_pictures")
        settings = {"emoji": emoji.VERSION} | {name: getattr(args, name) for name in names}
        checkpoint.keep_settings(args.out, settings, "choose another --out")
        for seed, row in itertools.product(args.seeds, args.rows):
            if (args.out / f"{row}-{seed}.json").exists():
                continue  # measured, perhaps on another machine
            tables.check_order(args.out / f"{row}-search.json", row, seed, args.steps)
            run = tables.run_of(row, seed, args.runs)
            tables.train(row, 0.0, seed, run, args.budget)
            score(row, seed, run, args, device)
    write_page(args.out)
    draw_samples(args)


if __name__ == "__main__":
    errors.run(main, "stopped; the same command goes on")
