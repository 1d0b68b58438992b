"""The figures of toy/README.md: mid-tone colours on a transparent background, readable on white and on dark pages."""

import textwrap
from io import BytesIO
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window: figures go to files

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

import losses
import sampler
from engine.randomness import rng
from toy.measures import BUDGETS, generate
from toy.mixture import LAYOUTS, Mixture

COLOURS = [
    "#3a86c8",
    "#e08a1e",
    "#3fa45b",
    "#cc4f5f",
    "#8f6bc2",
    "#1fa3a3",
    "#b0813f",
]  # conditions, then objectives
GREY = "#85898f"  # text, axes, data contours: the same contrast on white and on black
plt.rcParams.update(
    {
        "figure.dpi": 80,
        "savefig.dpi": 80,
        "savefig.transparent": True,
        "font.size": 9,
        "axes.grid": False,
        "axes.prop_cycle": plt.cycler(color=COLOURS),
        **{key: GREY for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor")},
        "xtick.color": GREY,
        "ytick.color": GREY,
    }
)


def save(figure, path: Path) -> None:
    """Write a PNG with a palette of 64 colours, a third of the size of one with full colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = BytesIO()
    figure.savefig(drawn, format="png", bbox_inches="tight")
    plt.close(figure)
    Image.open(drawn).quantize(64, method=Image.Quantize.FASTOCTREE).save(path, optimize=True)


def frame(modes: torch.Tensor, margin: float = 0.9) -> tuple[float, float, float, float]:
    """A square that holds the modes [K, 2]: x from, x to, y from, y to."""
    low, high = modes.min(0).values, modes.max(0).values
    centre, half = (low + high) / 2, float((high - low).max()) / 2 + margin
    return float(centre[0]) - half, float(centre[0]) + half, float(centre[1]) - half, float(centre[1]) + half


def contours(axis, q: Mixture, box, c: int | None = None, s: float = 0.0, colours=None) -> None:
    """Lines of equal density of q(x_s | c), all conditions when c is None, each in its colour."""
    xs, ys = (torch.linspace(box[i], box[i + 1], 120) for i in (0, 2))
    points = torch.cartesian_prod(xs, ys)
    for k in range(q.C) if c is None else [c]:
        log_q = (
            q.log_density(points, torch.full((len(points),), s), torch.full((len(points),), k))
            .view(120, 120)
            .T
        )
        peak = float(log_q.max())
        axis.contour(
            xs,
            ys,
            log_q,
            levels=[peak - 4.5, peak - 2.0],
            colors=colours or [COLOURS[k]],
            linewidths=0.7,
            alpha=0.8,
            linestyles="solid",
        )


def bare(axis, box) -> None:
    axis.set(xlim=box[:2], ylim=box[2:], aspect="equal", xticks=[], yticks=[])


# ------------------------------------------------------------------------------------------------------------
# The columns of Fig. 3, in 2-D
# ------------------------------------------------------------------------------------------------------------
def samples(nets: dict, sampling: dict, members: list, e: int, path: Path, shown: int = 250) -> None:
    """Rows: objectives. Columns: number of steps. Colours: conditions. Behind: where the data are."""
    q, rows = members[e].q, list(nets)
    box = frame(q.m)
    c = torch.arange(q.C).repeat_interleave(shown)
    figure, axes = plt.subplots(
        len(rows), len(BUDGETS), figsize=(1.75 * len(BUDGETS), 1.75 * len(rows)), layout="constrained"
    )
    for line, label in zip(axes, rows):
        for axis, steps in zip(line, BUDGETS):
            contours(axis, q, box)
            x = generate(nets[label], members, c, steps, **sampling[label])[e]
            axis.scatter(*x.T, s=2.5, c=[COLOURS[k] for k in c], linewidths=0)
            bare(axis, box)
            if label == rows[0]:
                axis.set_title(f"N = {steps}")
        line[0].set_ylabel(textwrap.fill(label, 12), fontsize=8)
    figure.supxlabel(
        f"samples of the layout '{members[e].layout}': contours are the data, colours the three conditions",
        fontsize=9,
    )
    save(figure, path)


# ------------------------------------------------------------------------------------------------------------
# The way from noise to data
# ------------------------------------------------------------------------------------------------------------
def trajectories(nets: dict, sampling: dict, members: list, e: int, path: Path, shown: int = 40) -> None:
    """Paths x_{t_k} of condition 0 with the deterministic step (eta = 0), for two objectives and three budgets."""
    q, rows = members[e].q, ["flow matching", "Self-E", "auxiliary throughout"]
    box, budgets = (-2.7, 2.7, -2.7, 2.7), (2, 4, 50)
    figure, axes = plt.subplots(len(rows), len(budgets), figsize=(8, 8), layout="constrained")
    noise = torch.cat(
        [
            torch.from_numpy(rng(m.seed, "toy paths").standard_normal((shown, 2), dtype=np.float32))
            for m in members
        ]
    )
    c = torch.zeros(len(noise), dtype=torch.int64)
    for line, label in zip(axes, rows):
        for axis, steps in zip(line, budgets):
            choices = sampling[label] | {"eta": 0.0}
            path_of = [noise] + [
                x for _, x, _ in sampler.trajectory(nets[label], noise, (c,), steps=steps, **choices)
            ]
            way = torch.stack([x.view(len(members), shown, 2)[e] for x in path_of])  # [steps + 1, shown, 2]
            contours(axis, q, box)
            axis.plot(way[..., 0], way[..., 1], color=GREY, linewidth=0.5, alpha=0.7)
            axis.scatter(*way[0].T, s=4, c=GREY, linewidths=0)
            axis.scatter(*way[-1].T, s=9, c=COLOURS[0], linewidths=0)
            bare(axis, box)
            if label == rows[0]:
                axis.set_title(f"N = {steps}")
        line[0].set_ylabel(label)
    figure.supxlabel(
        f"from noise (grey dots) to samples of condition 0 (blue dots); layout '{members[e].layout}', eta = 0",
        fontsize=9,
    )
    save(figure, path)


# ------------------------------------------------------------------------------------------------------------
# Distance against steps
# ------------------------------------------------------------------------------------------------------------
def distance_axis(axis, title: str) -> None:
    """Distances over network evaluations, both logarithmic, with a tick per budget."""
    axis.set(
        xscale="log",
        yscale="log",
        xticks=BUDGETS,
        xticklabels=BUDGETS,
        xlabel="network evaluations N",
        title=title,
    )
    axis.minorticks_off()


def distances(results: dict, path: Path) -> None:
    """results[layout][objective][str(N)]["energy"]; one panel per layout."""
    figure, axes = plt.subplots(
        1, len(results), figsize=(3.4 * len(results), 3.4), sharey=True, layout="constrained", squeeze=False
    )
    for axis, (layout, rows) in zip(axes[0], results.items()):
        floor = np.mean([abs(rows["floor"][str(n)]["energy"]) for n in BUDGETS])
        axis.axhspan(1e-4, floor, color=GREY, alpha=0.3, linewidth=0, label="floor: data against data")
        for label, row in rows.items():
            if label != "floor":
                values = [max(row[str(n)]["energy"], 1e-4) for n in BUDGETS]
                axis.plot(BUDGETS, values, marker="o", markersize=4, linewidth=1.5, label=label)
        distance_axis(axis, layout)
    axes[0][0].set_ylabel("energy distance to the data")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=4, frameon=False)
    save(figure, path)


# ------------------------------------------------------------------------------------------------------------
# Eq. 13 as a field: how far x0_hat is asked to move, -Delta of s.6, for its two terms apart
# ------------------------------------------------------------------------------------------------------------
def fields(layouts: list, seed: int, path: Path, times=(0.05, 0.2, 0.5, 0.8)) -> None:
    """Exact fields of condition 0 over the density of q(x_s | c). p: the blended one-step predictions of flow matching.

    Rows: classifier term -(G_null - G_c) and auxiliary term -(G_fake - G_c), per layout. Columns: s. Arrows are drawn
    where the model's samples or the data are; the number is the root mean square of Delta at the model's samples.
    """
    chosen = [name for name in ("between", "far") if name in layouts] or layouts[:1]
    figure, axes = plt.subplots(
        2 * len(chosen), len(times), figsize=(2.2 * len(times), 4.4 * len(chosen)), layout="constrained"
    )
    for i, name in enumerate(chosen):
        q, g, n = Mixture(**LAYOUTS[name]), rng(seed, "toy fields"), 400
        c = torch.zeros(n, dtype=torch.int64)
        normal = lambda g=g: torch.from_numpy(g.standard_normal((400, 2), dtype=np.float32))  # noqa: E731
        t = torch.full((n,), 0.8)
        x0_hat = q.posterior_mean(
            losses.add_noise(q.sample(c, g), t, normal()), t, c
        )  # blends, as Eq. 4 makes them
        p = Mixture(
            x0_hat[None], 0.02
        )  # its samples as very narrow modes: then E_p[x0 | x_s] is a closed form
        low, high = float(q.m[:3].min()) - 1.2, float(q.m[:3].max()) + 1.2
        for j, value in enumerate(times):
            box = tuple(end * (1 - value) + sign * 0.7 * value for end, sign in 2 * ((low, -1), (high, 1)))
            points = torch.cartesian_prod(*(torch.linspace(box[k], box[k + 1], 17) for k in (0, 2)))

            def full(x):
                return torch.full((len(x),), value), torch.zeros(len(x), dtype=torch.int64)

            def two_terms(x):
                s, k = full(x)
                G_c = q.posterior_mean(x, s, k)
                return q.posterior_mean(x, s, q.null(k)) - G_c, p.posterior_mean(x, s, k) - G_c

            # Arrows only where samples or data are.
            reached = [each.log_density(points, *full(points)) for each in (p, q)]
            points = points[torch.stack([log > log.max() - 7 for log in reached]).any(0)]
            at_samples = two_terms(losses.add_noise(x0_hat, torch.full((n,), value), normal()))
            both = zip(two_terms(points), at_samples, ("classifier", "auxiliary"))
            for row, (Delta, lengths, what) in enumerate(both):
                axis = axes[2 * i + row, j]
                contours(axis, q, box, 0, value)
                for other in range(1, q.C):
                    contours(axis, q, box, other, value, colours=[GREY])
                axis.scatter(*((1 - value) * x0_hat[:120]).T, s=2, c=COLOURS[3], linewidths=0, zorder=3)
                move = -Delta * (1 - value)  # x_s moves by alpha_s times what x0_hat moves
                longest = (box[1] - box[0]) / 17  # longer arrows are cut to the distance of neighbours
                move = move * (longest / move.norm(dim=1, keepdim=True)).clamp(max=1)
                axis.quiver(
                    *points.T,
                    *move.T,
                    color=COLOURS[1],
                    angles="xy",
                    scale_units="xy",
                    scale=0.8,
                    width=0.008,
                )
                bare(axis, box)
                rms = float(lengths.square().sum(1).mean().sqrt())
                axis.set_title((f"s = {value:g}   " if row == 0 else "") + f"rms {rms:.2f}", fontsize=8)
                if j == 0:
                    axis.set_ylabel(f"'{name}'\n{what} term")
    figure.supxlabel(
        "arrows: -Delta for condition 0 (blue; grey: the others), cut to the grid; red: blended predictions at t = 0.8",
        fontsize=9,
    )
    save(figure, path)


# ------------------------------------------------------------------------------------------------------------
# A study: mean and spread over seeds
# ------------------------------------------------------------------------------------------------------------
def cells_of(kept: dict, label: str, layout: str, measure: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean, at least 1e-4 for logarithms, and standard deviation over the seeds of one setting: [budgets] each."""
    rows = [r["results"] for r in kept["records"] if (r["label"], r["layout"]) == (label, layout)]
    cells = np.array([[row[str(n)][measure] for n in BUDGETS] for row in rows])
    return cells.mean(0).clip(1e-4), cells.std(0, ddof=1) if len(cells) > 1 else 0 * cells[0]


def study(kept: dict, path: Path, measure: str = "energy") -> None:
    """One panel per layout, one line per setting against N; the bars are one standard deviation over the seeds.

    A study that crosses trainings with choices of the sampler (labels "training, choice") has panels for each training.
    """
    if kept["study"] == "s_rule":
        return along_s_rule(kept, path, measure)
    layouts = list(dict.fromkeys(r["layout"] for r in kept["records"]))
    labels = list(dict.fromkeys(r["label"] for r in kept["records"] if r["label"] != "floor"))
    crossed = len(labels) > len(COLOURS) and all(", " in label for label in labels)
    trainings = list(dict.fromkeys(label.split(", ")[0] for label in labels)) if crossed else [""]
    panels = [(training, layout) for training in trainings for layout in layouts]
    columns = len(layouts) if len(layouts) > 1 else len(panels)
    rows = len(panels) // columns
    size = (4.2 * columns, 3.2 * rows + 0.4)
    how = {"sharex": True, "sharey": True, "layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(rows, columns, figsize=size, **how)
    for i, (axis, (training, layout)) in enumerate(zip(axes.flat, panels)):
        shown = [label for label in labels if not crossed or label.split(", ")[0] == training]
        for j, label in enumerate(shown):
            mean, spread = cells_of(kept, label, layout, measure)
            shift = np.array(BUDGETS) * (
                1 + 0.02 * (j - len(shown) / 2)
            )  # so that bars do not hide one another
            name = label.split(", ", 1)[1] if crossed else label
            line = "--" if j >= len(COLOURS) else "-"  # where the colours begin anew
            axis.errorbar(
                shift, mean, yerr=spread, marker="o", markersize=3, linewidth=1.2, linestyle=line, label=name
            )
        distance_axis(axis, f"{layout}: {training}" if crossed else layout)
        axis.label_outer()
        if i % columns == 0:
            axis.set_ylabel(f"{measure} distance to the data" if measure == "energy" else measure)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncol=5 if crossed else 3, frameon=False, fontsize=8
    )
    save(figure, path)


def along_shares(kept: dict, path: Path, steps=(2, 4, 50)) -> None:
    """The study wrong_labels: share of samples off the modes of their own condition, against the share of wrong labels.

    A panel per layout and number of steps, a line per objective; bars are one standard deviation over the seeds.
    """
    layouts = list(dict.fromkeys(r["layout"] for r in kept["records"]))
    labels = [r["label"] for r in kept["records"] if r["label"] != "floor"]
    names = list(dict.fromkeys(label.rsplit(", ", 1)[0] for label in labels))
    shares = sorted({float(label.rsplit(", ", 1)[1].split()[0]) for label in labels})
    figure, axes = plt.subplots(
        len(layouts),
        len(steps),
        figsize=(3.2 * len(steps), 2.7 * len(layouts) + 0.5),
        sharex=True,
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for line, layout in zip(axes, layouts):
        for axis, n in zip(line, steps):
            for j, name in enumerate(names):
                cells = [cells_of(kept, f"{name}, {share:g} wrong", layout, "off_modes") for share in shares]
                mean, spread = (np.stack(part)[:, BUDGETS.index(n)] for part in zip(*cells))
                shift = np.array(shares) + 0.006 * (
                    j - len(names) / 2
                )  # so that bars do not hide one another
                axis.errorbar(shift, mean, yerr=spread, marker="o", markersize=3, linewidth=1.2, label=name)
            axis.set(title=f"{layout}, N = {n}", xticks=shares)
    for axis in axes[-1]:
        axis.set_xlabel("share of wrong labels in training", fontsize=9)
    figure.supylabel("share of samples off the modes of their condition", fontsize=9)
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncol=3, frameon=False, fontsize=8
    )
    save(figure, path)


def along_s_rule(kept: dict, path: Path, measure: str) -> None:
    """The study s_rule of Self-E: one panel per layout, one line per number of steps, against where s_k lies."""
    layouts = list(dict.fromkeys(r["layout"] for r in kept["records"]))
    rules = (0.0, 0.25, 0.5, 0.75, 1.0)
    figure, axes = plt.subplots(
        1, len(layouts), figsize=(4.6 * len(layouts), 3.9), sharey=True, layout="constrained", squeeze=False
    )
    for axis, layout in zip(axes[0], layouts):
        cells = [cells_of(kept, f"Self-E, s_rule {rule:g}", layout, measure) for rule in rules]
        mean, spread = (np.stack(part) for part in zip(*cells))  # [rules, budgets]
        for n, values, bars in zip(BUDGETS, mean.T, spread.T):
            low = np.minimum(bars, 0.7 * values)  # a bar that reaches zero would have no end on this axis
            axis.errorbar(
                rules, values, yerr=[low, bars], marker="o", markersize=4, linewidth=1.4, label=f"N = {n}"
            )
        axis.set(yscale="log", xticks=rules, title=f"Self-E, {layout}")
        axis.set_xlabel("s_k, from t_(k+1) (0, the paper's default) to t_k (1)")
    axes[0][0].set_ylabel(f"{measure} distance to the data" if measure == "energy" else measure)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncol=5, frameon=False)
    save(figure, path)


# ------------------------------------------------------------------------------------------------------------
# ideal.py: where the targets lead when nothing is left to the network
# ------------------------------------------------------------------------------------------------------------
def ideal(pictures: dict, layouts: list, labels: list, times: tuple, t: float, path: Path) -> None:
    """pictures[layout, label, s] = answers [C, n, 2]; condition 0 is drawn. Rows: goals. Columns: layout and s."""
    columns = [(layout, s) for layout in layouts for s in times]
    figure, axes = plt.subplots(
        len(labels), len(columns), figsize=(1.55 * len(columns), 1.6 * len(labels)), layout="constrained"
    )
    for line, label in zip(axes, labels):
        for axis, (layout, s) in zip(line, columns):
            q = Mixture(**LAYOUTS[layout])
            box, answers = frame(q.means[0]), pictures[layout, label, s][0]
            contours(axis, q, box)
            axis.scatter(*answers.T, s=2.5, c=GREY, linewidths=0)
            bare(axis, box)
            inside = (answers > torch.tensor(box[::2])) & (answers < torch.tensor(box[1::2]))
            outside = 1 - float(inside.all(1).float().mean())
            if outside > 0.01:
                axis.text(0.03, 0.03, f"{outside:.0%} ran out", transform=axis.transAxes, fontsize=7)
            if label == labels[0]:
                axis.set_title(f"{layout}, s = {s:g}", fontsize=8)
        line[0].set_ylabel(label.replace(", ", ",\n"), fontsize=8)
    figure.supxlabel(
        f"answers x0_hat for condition 0 (grey) at t = {t}; blue: its data; other colours: the other conditions",
        fontsize=9,
    )
    save(figure, path)
