"""The figures of toy/README.md: mid-tone colours on a transparent background, readable on white and on dark pages.

Two kinds are enough: `table` has a drawing in each cell, `curves` has panels of lines with error bars.
"""

import textwrap
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window: figures go to files

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

import losses
from rng import rng
from toy.measures import BUDGETS, generate
from toy.mixture import LAYOUTS, Mixture
from toy.training import Member

COLOURS = ["#3a86c8", "#e08a1e", "#3fa45b", "#cc4f5f", "#8f6bc2", "#1fa3a3", "#b0813f"]
GREY = "#85898f"  # text, axes, data contours: the same contrast on white and on black
plt.rcParams |= {key: GREY for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor")}
plt.rcParams |= {"xtick.color": GREY, "ytick.color": GREY, "axes.prop_cycle": plt.cycler(color=COLOURS)}
plt.rcParams |= {"figure.dpi": 80, "savefig.dpi": 80, "savefig.transparent": True, "font.size": 9}
plt.rcParams |= {"axes.titlesize": 10, "legend.frameon": False, "figure.constrained_layout.use": True}


def save(figure, path: Path) -> None:
    """Write a PNG with a palette of 64 colours, a third of the size of one with full colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = BytesIO()
    figure.savefig(drawn, format="png", bbox_inches="tight")
    plt.close(figure)
    Image.open(drawn).quantize(64, method=Image.Quantize.FASTOCTREE).save(path, optimize=True)


def table(draw: Callable, rows: list, columns: list, path: Path, note: str, size: float = 1.75) -> None:
    """draw(axis, row, column) fills a cell; rows and columns are written at the edges, the note below."""
    shape = {"figsize": (size * len(columns), size * len(rows)), "squeeze": False}
    figure, axes = plt.subplots(len(rows), len(columns), **shape)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            draw(axes[i, j], row, column)
            axes[i, j].set(aspect="equal", xticks=[], yticks=[])
        axes[i, 0].set_ylabel(textwrap.fill(row, 14), fontsize=8)
    for axis, column in zip(axes[0], columns):
        axis.set_title(f"{column}\n{axis.get_title()}".rstrip(), fontsize=8)
    figure.supxlabel(note, fontsize=9)
    save(figure, path)


def frame(modes: torch.Tensor, margin: float = 0.9) -> tuple[float, float, float, float]:
    """A square that holds the modes [K, 2]: x from, x to, y from, y to."""
    low, high = modes.min(0).values, modes.max(0).values
    x, y = ((low + high) / 2).tolist()
    half = float((high - low).max()) / 2 + margin
    return x - half, x + half, y - half, y + half


def contours(axis, q: Mixture, box: tuple, s: float = 0.0, colours: list[str] = COLOURS) -> None:
    """Lines of equal density of q(x_s | c), one colour for each condition; and the window of the axis."""
    xs, ys = torch.linspace(*box[:2], 120), torch.linspace(*box[2:], 120)
    look = {"linewidths": 0.7, "alpha": 0.8, "linestyles": "solid"}
    for c in reversed(range(q.C)):
        log_q = q.log_density(torch.cartesian_prod(xs, ys), s, c).view(120, 120).T
        levels = [log_q.max() - 4.5, log_q.max() - 2.0]
        axis.contour(xs, ys, log_q, levels=levels, colors=[colours[c]], **look)
    axis.set(xlim=box[:2], ylim=box[2:])


def samples(networks: dict, member: Member, path: Path) -> None:
    """The columns of Fig. 3, in 2-D. networks: label -> (network, choices of the sampler)."""
    q = member.q
    c = torch.arange(q.C).repeat_interleave(250)

    def draw(axis, label: str, title: str):
        net, choices = networks[label]
        contours(axis, q, frame(q.m))
        x = generate(net, member, c, int(title[4:]), **choices)
        axis.scatter(*x.T, s=2.5, c=[COLOURS[k] for k in c], linewidths=0)

    note = f"samples of the layout '{member.layout}': contours are the data, colours the three conditions"
    table(draw, list(networks), [f"N = {n}" for n in BUDGETS], path, note)


def fields(layouts: list[str], path: Path, times: tuple = (0.05, 0.2, 0.5, 0.8)) -> None:
    """Eq. 13 as a field: where -Delta of s.6 moves a sample of condition 0, for its two terms apart.

    The samples are the blends that flow matching predicts from t = 0.8. As modes of almost no width they make a mixture
    p, so that G_fake is a closed form, too. Arrows stand where samples or data are, and the longest are cut. The number
    is the root mean square of Delta at the samples.
    """
    terms = {"classifier term": 1.0, "auxiliary term": 0.0}  # as k of s.6

    def draw(axis, row: str, title: str):
        layout, term = row.split(": ")
        q, g, s = Mixture(**LAYOUTS[layout]), rng(0, "toy fields"), float(title[4:])
        x0 = q.sample(torch.zeros(400, dtype=torch.int64), g)
        eps, *eps_s = (torch.from_numpy(g.standard_normal((400, 2), dtype=np.float32)) for _ in (0, *times))
        x0_hat = q.posterior_mean(0.2 * x0 + 0.8 * eps, 0.8, 0)
        p = Mixture(x0_hat[None], 0.02)

        def Delta(x_s: torch.Tensor) -> torch.Tensor:
            G_null, G_c = q.posterior_mean(x_s, s, q.C), q.posterior_mean(x_s, s, 0)
            return losses.self_evaluation(G_null, G_c, p.posterior_mean(x_s, s, 0), terms[term])

        low, high = float(q.m[:3].min()) - 1.2, float(q.m[:3].max()) + 1.2
        box = ((1 - s) * low - 0.7 * s, (1 - s) * high + 0.7 * s)
        contours(axis, q, box * 2, s, [COLOURS[0], GREY, GREY])
        axis.scatter(*((1 - s) * x0_hat[:120]).T, s=2, c=COLOURS[3], linewidths=0, zorder=3)
        x_s = torch.cartesian_prod(*[torch.linspace(*box, 17)] * 2)
        log_densities = [each.log_density(x_s, s, 0) for each in (p, q)]
        x_s = x_s[torch.stack([log > log.max() - 7 for log in log_densities]).any(0)]
        move = -(1 - s) * Delta(x_s)  # x_s moves by alpha_s times what x0_hat moves
        longest = (box[1] - box[0]) / 17
        move = move * (longest / move.norm(dim=1, keepdim=True)).clamp(max=1)
        look = {"color": COLOURS[1], "angles": "xy", "scale_units": "xy", "scale": 0.8, "width": 0.008}
        axis.quiver(*x_s.T, *move.T, **look)
        at_samples = Delta((1 - s) * x0_hat + s * eps_s[times.index(s)])
        axis.set_title(f"rms {at_samples.square().sum(1).mean().sqrt():.2f}", fontsize=8)

    rows = [f"{layout}: {term}" for layout in layouts for term in terms]
    note = "arrows: -Delta for condition 0 (blue; grey: the others); red: blended predictions at t = 0.8"
    table(draw, rows, [f"s = {s:g}" for s in times], path, note, 2.2)


def curves(panels: dict, steps: tuple, path: Path, columns: int, ylabel: str) -> None:
    """panels: title -> {label: values [steps, seeds]}; one colour for each label, bars of one standard deviation."""
    rows = -(-len(panels) // columns)
    shape = {"figsize": (3.4 * columns, 2.8 * rows + 0.5), "squeeze": False}
    figure, axes = plt.subplots(rows, columns, sharex=True, sharey=True, **shape)
    for axis, (title, lines) in zip(axes.flat, panels.items()):
        for i, (label, values) in enumerate(lines.items()):
            mean, bars = np.mean(values, 1), np.std(values, 1, ddof=1) if len(values[0]) > 1 else None
            aside = 1 + 0.02 * (i - len(lines) / 2)  # so that bars do not hide one another
            look = {"label": label, "linewidth": 1.2, "marker": "o", "markersize": 3}
            axis.errorbar(np.array(steps) * aside, mean, yerr=bars, **look)
        axis.set(title=title, xlabel="network evaluations", ylabel=ylabel, xscale="log")
        axis.set_xticks(steps, steps)
        axis.minorticks_off()
        axis.label_outer()
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, fontsize=8)
    save(figure, path)


def ideal(predictions: dict, path: Path, note: str) -> None:
    """predictions[layout, goal, s] = x0_hat [C, n, 2]; condition 0 is drawn. Rows: goals. Columns: layout and s."""

    def draw(axis, goal: str, title: str):
        layout, s = title.split(", s = ")
        q, x0_hat = Mixture(**LAYOUTS[layout]), predictions[layout, goal, float(s)][0]
        box = torch.tensor(frame(q.means[0]))
        contours(axis, q, box.tolist())
        axis.scatter(*x0_hat.T, s=2.5, c=GREY, linewidths=0)
        outside = 1 - float(((x0_hat > box[::2]) & (x0_hat < box[1::2])).all(1).float().mean())
        if outside > 0.01:
            axis.text(0.03, 0.03, f"{outside:.0%} ran out", transform=axis.transAxes, fontsize=7)

    goals = list(dict.fromkeys(goal for _, goal, _ in predictions))
    columns = list(dict.fromkeys(f"{layout}, s = {s:g}" for layout, _, s in predictions))
    table(draw, goals, columns, path, note, 1.6)
