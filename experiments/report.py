"""Results as tables and figures: what experiments/tables.py has measured, read from its files and nowhere else.

rows = report.read_rows(Path("results"))                  # row -> seed -> what measure_row wrote
report.write_table(rows, Path("results"), steps)          # table2.md
report.draw_scores(rows, Path("results/scores.png"), steps)   # draw_progress and draw_samples likewise
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch

import sample
from engine import checkpoint, errors
from experiments import evaluate
from experiments.rows import DIFFERENCES, GALLERY, GROUPS, PAPER_NOTE, PROGRESS, ROWS

matplotlib.use("Agg")  # no window: figures go to files
import matplotlib.pyplot as plt  # noqa: E402

PAPER_STEPS = (2, 4, 8, 50)  # those that the paper scores
SHORT = {"float32": "fp32", "bfloat16": "bf16"}


def measured(path: Path, *names: str) -> dict:
    """What experiments/tables.py has written, an object with entries of these names. Raises UserError."""
    found = checkpoint.read_json(path)
    if not isinstance(found, dict) or any(name not in found for name in names):
        raise errors.UserError(
            f"{path} has no {' or no '.join(names)}: it is damaged; delete it to measure again"
        )
    return found


def read_row(path: Path) -> dict:
    """What measure_row wrote. Raises UserError where it lacks what tables and figures are made of."""
    found = measured(path, "seed", "training", "splits")
    try:
        told = [score_of(found, int(n)) for n in found["splits"]["test"]]
        sound = told and all(isinstance(x, (int, float)) for x in (found["seed"], *told))
        sound = sound and found["training"]["precision"] in SHORT
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise errors.UserError(f"{path} does not tell its scores: it is damaged; delete it to measure again")
    return found


def read_rows(out: Path) -> dict[str, dict[int, dict]]:
    """row -> seed -> what measure_row wrote, in the order of ROWS."""
    found = {}
    for row in ROWS:
        files = sorted((out / "rows").glob(f"{row}-[0-9]*.json"))
        if files:
            found[row] = {r["seed"]: r for r in map(read_row, files)}
    return found


def t_interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of the 95% interval over seeds (Student's t; infinite for one seed)."""
    quantile = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
    n, mean = len(values), float(np.mean(values))
    if n == 1:
        return mean, float("inf")
    return mean, quantile.get(n, 1.96 + 2.6 / n) * float(np.std(values, ddof=1)) / n**0.5


def score_of(result: dict, n: int, split: str = "test") -> float:
    return result["splits"][split][str(n)]["overall"]["score"]


def difference(rows: dict, a: str, b: str, n: int) -> tuple[float, float]:
    """Mean and half-width of row a minus row b at n steps, paired over the seeds that both have."""
    common = sorted(set(rows[a]) & set(rows[b]))
    return t_interval([score_of(rows[a][s], n) - score_of(rows[b][s], n) for s in common])


def columns(steps: tuple[int, ...]) -> str:
    return " | ".join(f"{n} step{'s' * (n > 1)}" for n in steps)


def save(figure, path: Path) -> None:
    with checkpoint.in_one_piece(path, shared=True) as partial:
        figure.savefig(partial, format="png", dpi=110)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------------------
# The table
# ------------------------------------------------------------------------------------------------------------
def cell(values: list[float], sign: str = "") -> str:
    """Mean and half-width of the 95% interval over seeds; one seed has no interval."""
    mean, half = t_interval(values)
    return f"{mean:{sign}.3f}" + (f" ± {half:.3f}" if np.isfinite(half) else "")


def write_table(rows: dict, out: Path, steps: tuple[int, ...]) -> None:
    """OUT/table2.md: our scores, the paper's, and the differences that decide claims."""
    lines = [
        "# Table 2 in miniature",
        "",
        "Overall score on test prompts: mean over seeds ± half-width of the 95% interval. There are too few "
        "prompts of one shape to hold any out. Those tags are tested on the prompts of training, with other noise "
        "than the search; `pairs` in `rows/` are held out. Settings and scores by tag are in `rows/`. Precision "
        "is what `--precision auto` took on the machine that trained. Made by `python experiments/tables.py`.",
        "",
        f"| row | seeds | {columns(steps)} | iterations | precision |",
        "|---" * (len(steps) + 4) + "|",
    ]
    for row, seeds in rows.items():
        cells = [cell([score_of(r, n) for r in seeds.values()]) for n in steps]
        precision = sorted({SHORT[r["training"]["precision"]] for r in seeds.values()})
        iterations = ", ".join(f"{n:,}" for n in sorted({r["training"]["steps"] for r in seeds.values()}))
        lines.append(
            f"| {ROWS[row][0]} | {len(seeds)} | {' | '.join(cells)} | {iterations} | {', '.join(precision)} |"
        )
    lines += [
        "",
        "Paired differences over seeds:",
        "",
        f"| difference | seeds | {columns(steps)} |",
        "|---" * (len(steps) + 2) + "|",
    ]
    for a, b in DIFFERENCES:
        common = sorted(set(rows.get(a, ())) & set(rows.get(b, ())))
        if common:
            cells = [
                cell([score_of(rows[a][s], n) - score_of(rows[b][s], n) for s in common], "+") for n in steps
            ]
            lines.append(f"| {ROWS[a][0]} minus {ROWS[b][0]} | {len(common)} | {' | '.join(cells)} |")
    lines += ["", f"The paper's ({PAPER_NOTE}):", "", f"| row | {columns(PAPER_STEPS)} |", "|---" * 5 + "|"]
    lines += [
        f"| {ROWS[row][0]} | {' | '.join(f'{score:.3f}' for score in ROWS[row][2])} |"
        for row in rows
        if ROWS[row][2]
    ]
    with checkpoint.in_one_piece(out / "table2.md", shared=True) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------
# The figures
# ------------------------------------------------------------------------------------------------------------
def style_of(row: str) -> dict:
    """Colour and line of a row, the same in all figures. Guided targets and IMM at k = 3 are dashed, in the colour of
    the row that they vary."""
    families = (
        "",
        "matching",
        "shortcut",
        "",
        "meanflow",
        "improved_meanflow",
        "tim",
    )  # C0, C3 are in both figures
    family = {"imm_coarsest": "imm_coarse"}.get(row, row.removesuffix("_guided"))
    number = families.index(family) if row in GALLERY else GROUPS["table2"].index(family)
    return {"color": f"C{number}", "linestyle": "-" if row == family else "--"}


def draw_scores(rows: dict, path: Path, steps: tuple[int, ...]) -> None:
    """Score against steps, a line per row; the band goes from the lowest to the highest seed."""
    figure, panel = plt.subplots(figsize=(9.5, 4.5))
    for row, seeds in rows.items():
        values = np.array([[score_of(r, n) for n in steps] for r in seeds.values()])
        style = style_of(row)
        panel.plot(range(len(steps)), values.mean(0), marker="o", label=ROWS[row][0], **style)
        low, high = values.min(0), values.max(0)
        panel.fill_between(range(len(steps)), low, high, color=style["color"], alpha=0.15, linewidth=0)
    panel.set(
        xticks=range(len(steps)),
        xticklabels=steps,
        xlabel="steps (bands: lowest to highest seed)",
        ylabel="overall score, test prompts",
    )
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))  # outside: there are many lines
    figure.tight_layout()
    save(figure, path)


def draw_progress(out: Path, steps: tuple[int, ...]) -> None:
    """OUT/progress.png, the counterpart of Fig. 5: scores along the training, where both of its rows are measured."""
    files = {row: sorted((out / "rows").glob(f"{row}-progress-*.json")) for row in PROGRESS}
    if not all(files.values()):
        return
    figure, panels = plt.subplots(1, len(steps), figsize=(2.4 * len(steps), 2.8), sharey=True, squeeze=False)
    for panel, n in zip(panels[0], steps):
        for row in PROGRESS:
            for i, points in enumerate(measured(file, "points")["points"] for file in files[row]):
                panel.plot(
                    [p["step"] for p in points],
                    [p["overall"][str(n)] for p in points],
                    marker=".",
                    alpha=0.8,
                    label=None if i else ROWS[row][0],
                    **style_of(row),
                )
        panel.set(title=f"{n} step{'s' * (n > 1)}", xlabel="iteration")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylim(bottom=0)  # of all panels: they share it
    panels[0][0].set_ylabel("overall score, test prompts")
    panels[0][0].legend(fontsize=6)
    figure.tight_layout()
    save(figure, out / "progress.png")


def draw_samples(rows: dict, out: Path, runs: Path, steps: tuple[int, ...]) -> None:
    """OUT/samples_TAG.png (Fig. 3, 4, 6), a kind of prompt each: rows of objectives, columns of steps. Needs runs."""
    first = {row: runs / f"{row}-{min(seeds)}" for row, seeds in rows.items()}
    missing = [str(run) for run in first.values() if not (run / "model.safetensors").exists()]
    if missing:
        print(f"no sheets of samples: {', '.join(missing)} not here", file=sys.stderr)
        return
    config = next(r["training"] for seeds in rows.values() for r in seeds.values())
    for metadata in evaluate.prompts("test", 1, evaluate.world_of(config)):
        sheet_rows = []
        for row, seeds in rows.items():
            loaded, chosen = sample.load(first[row], torch.device("cpu")), seeds[min(seeds)]["splits"]["test"]
            sheet_rows.append(
                [
                    sample.generate(
                        loaded, [metadata["prompt"]], [(0,)], steps=n, **chosen[str(n)]["settings"]
                    )[0]
                    for n in steps
                ]
            )
        sheet = sample.sheet(sheet_rows, steps, [ROWS[row][0] for row in rows])
        with checkpoint.in_one_piece(out / f"samples_{metadata['tag']}.png", shared=True) as partial:
            sheet.save(partial, format="png")


def report(out: Path, runs: Path) -> None:
    """Write and draw all of it, and print the table. Raises UserError where nothing has been measured."""
    rows = read_rows(out)
    if not rows:
        raise errors.UserError(f"nothing has been measured in {out}")
    steps = tuple(
        int(n) for n in next(r["splits"]["test"] for seeds in rows.values() for r in seeds.values())
    )
    write_table(rows, out, steps)
    print((out / "table2.md").read_text(encoding="utf-8"))
    gallery = [row for row in GALLERY if row in rows]
    draw_scores({row: seeds for row, seeds in rows.items() if row not in gallery}, out / "scores.png", steps)
    if gallery:
        shown = [row for row in ("flow_matching", "self_e", *gallery) if row in rows]
        draw_scores({row: rows[row] for row in shown}, out / "gallery.png", steps)
    draw_progress(out, steps)
    draw_samples(rows, out, runs, steps)
