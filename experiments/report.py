"""The page and the figures of what experiments/tables.py has measured, read from its files and nowhere else.

rows = report.read_rows(Path("results/scenes/0"))     # row -> seed -> what tables.score wrote
report.report(Path("results/scenes"), Path("runs/scenes"))   # table.md, scores.png, samples.png
"""

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch

import sample
from engine import checkpoint, errors
from experiments import evaluate
from experiments.diversity import KINDS
from experiments.rows import DIFFERENCES, GROUPS, ROWS, SEEDS

matplotlib.use("Agg")  # no window: figures go to files
import matplotlib.pyplot as plt  # noqa: E402

Rows = dict[str, dict[int, dict]]  # row -> seed -> what tables.score wrote
HEAD = """# The rows of the table

Made by `python -m experiments.tables --report` from the files beside it, each with its command, commit, hardware and
time. Test prompts; a score is the share of right pictures of a kind of prompt, "overall" the mean of the kinds. Means
over seeds, ± half the 95% interval over seeds (Student's t). After a score, where prompts leave colours or places open:
their effective number in right pictures, and in samples of the data as large (`experiments/diversity.py`); differences
are of their ratios. Settings were chosen on validation prompts: w, the scale of guidance, and what keeps its norm; eta;
s = 0, where s_k = t_(k+1), to s = 1, where s_k = t_k; t, the latest time at which the network is asked, where it is not
1. "_64" has twice the batch: at s = t it sees as many pictures as flow matching. "_16" has half of it: as many as
Self-E at s = t.
"""
PAPER = """## The paper

GenEval of 0.5B models after 300k iterations (w/o target norm. and w/ aux. term:
100k, when its Ours has 0.544, 0.638, 0.682 and 0.716)."""


def read_rows(folder: Path) -> Rows:
    """What is measured at one share of wrong captions, in the order of ROWS."""
    files = {row: sorted(folder.glob(f"{row}-[0-9]*.json")) for row in ROWS}
    read = {row: [checkpoint.read_json(file) for file in files[row]] for row in ROWS if files[row]}
    return {row: {result["seed"]: result for result in results} for row, results in read.items()}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of the 95% interval over seeds (Student's t; infinite for one seed).

    From eight seeds on the quantile is that of eight, which makes the interval a little too wide.
    """
    quantiles = (float("inf"), 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365)  # of 1, 2, ... seeds
    quantile = quantiles[min(len(values), len(quantiles)) - 1]
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 1.0
    return float(np.mean(values)), quantile * deviation / len(values) ** 0.5


def score(result: dict, n: int, tag: str) -> float:
    """Of one row and seed at n steps; tag may be "overall"."""
    scores = result["steps"][str(n)]
    return (scores["overall"] if tag == "overall" else scores["tags"][tag])["score"]


def effective(result: dict, n: int, tag: str, kind: str) -> tuple[float, float] | None:
    """The effective number of colours or places, and the data's; None where the tag leaves none open."""
    found = result["steps"][str(n)]["diversity"].get(tag, {}).get(kind)
    return found and (found["effective"], found["data"])


def diversity(result: dict, n: int, kind: str) -> float | None:
    """The effective number over all tags as a share of the data's."""
    found = effective(result, n, "overall", kind)
    return found and found[0] / found[1]


def paired(rows: Rows, a: str, b: str, value: Callable[[dict], float | None]) -> list[float]:
    """value(a) - value(b) of every seed that both rows have, where both have a value."""
    seeds = sorted(set(rows.get(a, ())) & set(rows.get(b, ())))
    pairs = [(value(rows[a][seed]), value(rows[b][seed])) for seed in seeds]
    return [x - y for x, y in pairs if x is not None and y is not None]


def cell(values: list[float], sign: str = "") -> str:
    """Mean and half-width; one value has no interval, none an empty cell."""
    if not values:
        return ""
    mean, half = interval(values)
    return f"{mean:{sign}.3f}" + (f" ± {half:.3f}" if np.isfinite(half) else "")


def table(head: list, lines: list[list]) -> list[str]:
    return ["", *(f"| {' | '.join(map(str, line))} |" for line in [head, ["---"] * len(head), *lines])]


def write(lines: list[str], path: Path) -> None:
    with checkpoint.in_one_piece(path, shared=True) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def save(figure: plt.Figure, path: Path, **look) -> None:
    with checkpoint.in_one_piece(path, shared=True) as partial:
        figure.savefig(partial, format="png", **look)
    plt.close(figure)
    print(f"wrote {path}")


def scores_of(rows: Rows, tag: str, steps: list[int]) -> list[str]:
    """A table of one tag: rows down, step counts across."""
    lines = []
    for row, seeds in rows.items():
        cells = []
        for n in steps:
            parts = [cell([score(result, n, tag) for result in seeds.values()])]
            for kind in KINDS:
                pairs = [effective(result, n, tag, kind) for result in seeds.values()]
                if pairs := [pair for pair in pairs if pair]:
                    parts.append("{:.1f} of {:.1f} {}".format(*np.mean(pairs, axis=0), kind))
            cells.append(", ".join(parts))
        lines.append([row, len(seeds), *cells])
    return table(["row", "seeds", *steps], lines)


def differences_of(rows: Rows, a: str, b: str, tags: list[str], steps: list[int]) -> list[str]:
    """A table of two rows: overall, every tag and diversity down, step counts across."""
    measures = {tag: [lambda r, n=n, tag=tag: score(r, n, tag) for n in steps] for tag in tags}
    for kind in KINDS:
        measures[f"effective {kind}"] = [lambda r, n=n, kind=kind: diversity(r, n, kind) for n in steps]
    lines = [[name, *(cell(paired(rows, a, b, v), "+") for v in values)] for name, values in measures.items()]
    return table([f"{a} minus {b}", *steps], lines)


def words(settings: dict) -> str:
    """The sampler's settings in a cell; one that has a guidance alone says no more."""
    names = {"guidance": "w", "space": "", "eta": "eta", "s_rule": "s", "t_max": "t"}
    settings = {name: value for name, value in settings.items() if (name, value) != ("t_max", 1.0)}
    return ", ".join(f"{names[key]} {value}".strip() for key, value in settings.items())


def settings_of(rows: Rows, steps: list[int]) -> list[str]:
    """A table of the sampler's settings, which all seeds of a row share: rows down, step counts across."""
    first = {row: next(iter(seeds.values()))["steps"] for row, seeds in rows.items()}
    lines = [[row, *(words(found[str(n)]["settings"]) for n in steps)] for row, found in first.items()]
    return table(["row", *steps], lines)


def write_page(doses: dict[str, Rows], out: Path, steps: list[int], tags: list[str]) -> None:
    lines = [HEAD]
    for share, rows in doses.items():
        lines += [f"## {float(share):.0%} of captions wrong"]
        for tag in tags:
            lines += ["", f"### {tag}", *scores_of(rows, tag, steps)]
        lines += ["", "### Settings", *settings_of(rows, steps)]
        lines += ["", "### Differences, paired by seed"]
        for a, b in DIFFERENCES:
            if set(rows.get(a, ())) & set(rows.get(b, ())):
                lines += differences_of(rows, a, b, tags, steps)
        lines += [""]
    papers = [[row.title, *(f"{x:.3f}" for x in row.paper)] for row in ROWS.values() if row.paper]
    lines += [PAPER, *table(["row", 2, 4, 8, 50], papers)]
    about = [[name, row.title, row.flags] for name, row in ROWS.items()]
    lines += ["", "## The rows", *table(["row", "what", "flags"], about)]
    write(lines, out / "table.md")


def draw_scores(doses: dict[str, Rows], path: Path, steps: list[int], tags: list[str]) -> None:
    """A panel per tag, for each share of wrong captions and each batch; bands from seed to seed."""
    lines = []
    for share, rows in doses.items():
        wrong = f"{float(share):.0%} wrong captions"
        for group, label in (("main", wrong), ("twice", f"{wrong},\ntwice the batch")):
            if found := [(i, row, rows[row]) for i, row in enumerate(GROUPS[group]) if row in rows]:
                lines.append((label, found))
    if not lines:
        return
    size = {"figsize": (1.6 * len(tags), 1.9 * len(lines) + 0.6), "squeeze": False}
    figure, panels = plt.subplots(len(lines), len(tags), sharex=True, sharey=True, **size)
    places = range(len(steps))
    for line, (label, found) in zip(panels, lines):
        line[0].set_ylabel(label)
        for panel, tag in zip(line, tags):
            for i, row, seeds in found:
                values = np.array([[score(r, n, tag) for n in steps] for r in seeds.values()])
                panel.plot(places, values.mean(0), ".-", color=f"C{i}", label=ROWS[row].title)
                panel.fill_between(places, values.min(0), values.max(0), color=f"C{i}", alpha=0.2)
            panel.set(xticks=places, xticklabels=steps, ylim=(0, 1))
            panel.set_title(tag.replace("_", " "), fontsize=10)
            panel.grid(alpha=0.3)
    panels[-1, len(tags) // 2].set_xlabel("steps")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="lower center", ncols=3)
    figure.tight_layout(rect=(0, 0.3 / figure.get_figheight(), 1, 1))
    save(figure, path, dpi=130)


def draw_pictures(blocks: dict[str, list], steps: list[int], captions: list[str], path: Path) -> None:
    """Prompts in rows, and for each model a block of columns, one for each step count (Fig. 3, 4, 6).

    blocks: title -> for each prompt its uint8 pictures. Grey letters on a transparent ground, for light and dark pages.
    """
    gap, letters, grey = 1.06, 2.6, {"color": "#808080", "fontsize": 8}
    wide, left_of, above = gap * (len(steps) + 0.4), {"ha": "right", "va": "center"}, {"ha": "center"}
    width, height = letters + wide * len(blocks), gap * len(captions) + 0.8
    figure, panel = plt.subplots(figsize=(0.6 * width, 0.6 * height))
    for r, caption in enumerate(captions):
        panel.text(-0.15, gap * r + 0.5, textwrap.fill(caption, 22), **left_of, **grey)
    for b, (title, rows) in enumerate(blocks.items()):
        panel.text(wide * b, -0.5, title, **grey, fontweight="bold")
        for c, n in enumerate(steps):
            x = wide * b + gap * c
            panel.text(x + 0.5, -0.1, f"{n} step{'s' * (n > 1)}", **above, **grey)
            for r, row in enumerate(rows):
                extent = (x, x + 1, gap * r + 1, gap * r)
                panel.imshow(row[c], interpolation="nearest", extent=extent)
    panel.set(xlim=(-letters, width - letters), ylim=(height - 0.8, -0.8), aspect="equal")
    panel.axis("off")
    save(figure, path, dpi=200, transparent=True, bbox_inches="tight", pad_inches=0.03)


def all_here(runs: dict[str, Path]) -> bool:
    """Whether the model of every run is here; says which are not."""
    missing = [str(run) for run in runs.values() if not (run / "model.safetensors").exists()]
    if missing:
        print(f"no samples: {', '.join(missing)} not here", file=sys.stderr)
    return not missing


def draw_runs(
    runs: dict[str, Path], captions: list[str], steps: list[int], settings: Callable, path: Path
) -> None:
    """draw_pictures of rows' runs, the noise of a prompt the same for all; settings(row, i, n) of caption i at n steps."""
    blocks = {}
    for row, run in runs.items():
        loaded = sample.load(run, torch.device("cpu"))

        def draw(i: int, n: int, row=row, loaded=loaded) -> np.ndarray:
            return sample.generate(loaded, [captions[i]], [(i,)], steps=n, **settings(row, i, n))[0]

        blocks[ROWS[row].title] = [[draw(i, n) for n in steps] for i in range(len(captions))]
    draw_pictures(blocks, steps, captions, path)


def draw_samples(rows: Rows, out: Path, runs: Path, steps: list[int]) -> None:
    """OUT/samples.png: the first test prompt of each kind, drawn by the main rows' first seeds at their settings."""
    shown = {row: runs / f"{row}-{SEEDS[0]}" for row in GROUPS["main"] if SEEDS[0] in rows.get(row, ())}
    if not shown or not all_here(shown):
        return
    measured = {row: rows[row][SEEDS[0]] for row in shown}
    world = evaluate.world_of(next(iter(measured.values()))["training"])
    captions = [metadata["prompt"] for metadata in evaluate.prompts("test", 1, world)]

    def settings(row: str, i: int, n: int) -> dict:
        return measured[row]["steps"][str(n)]["settings"]

    draw_runs(shown, captions, steps, settings, out / "samples.png")


def report(out: Path, runs: Path) -> None:
    """Write and draw all of it. Raises UserError where nothing has been measured."""
    folders = [path for path in out.glob("[0-9]*") if path.is_dir()]
    folders.sort(key=lambda path: float(path.name))
    doses = {path.name: rows for path in folders if (rows := read_rows(path))}
    if not doses:
        raise errors.UserError(f"nothing has been measured in {out}")
    share, rows = next(iter(doses.items()))
    first = next(iter(next(iter(rows.values())).values()))["steps"]
    steps, known = list(map(int, first)), next(iter(first.values()))["tags"]
    tags = ["overall", *(tag for tag in evaluate.COLUMNS if tag in known)]
    write_page(doses, out, steps, tags)
    draw_scores(doses, out / "scores.png", steps, tags)
    draw_samples(rows, out, runs / share, [n for n in steps if n < 10])
