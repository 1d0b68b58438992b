"""Four figures that explain the method, drawn by calling losses.py and sampler.py, so that they follow the code.

python toy/explain.py                     # a few seconds; four PNGs in toy/results

explain_step.png      one training step: tensors, networks, stop-gradients under their names in losses.SelfE
explain_times.png     the distribution of (t, s) as tau rises from 0 to 1 (s.11-s.13)
explain_mix.png       the share of x_self in the target, lambda / (1 + lambda), over (t, s) (Eq. 17-18)
explain_grids.png     the times that a sampler of 1, 2 and 4 steps tells the network (Eq. 22, s.12)
"""

import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]

if (
    __name__ == "__main__"
):  # started as a file: modules are found from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

import losses
import model
import sampler
from engine import errors
from engine.randomness import rng
from toy.figures import COLOURS, GREY, save

BLUE, ORANGE, GREEN, RED = COLOURS[:4]
MU = losses.mu_of_length(16)  # the shift of s.12 for the 16 tokens of a laptop picture

# The passes of one training step, in the order of losses.SelfE: (network, its arguments, whether it learns).
PASSES = (
    ("network", ("x_t", "t", "s", "c"), True),
    ("ema", ("x_s_hat", "s", "s", "c"), False),
    ("network", ("x_s_hat", "s", "s", "null"), False),
)


# ------------------------------------------------------------------------------------------------------------
# One training step
# ------------------------------------------------------------------------------------------------------------
class Diagram:
    """Boxes and arrows. Orange is what the gradient runs through, a red double bar is a stop-gradient."""

    def __init__(self, axis):
        self.axis = axis

    def box(self, x: float, y: float, text: str, size: tuple, colour: str, style: str = "square") -> None:
        """A box of (width, height) around (x, y); "square" has sharp corners, "round" has round ones."""
        corner = (x - size[0] / 2, y - size[1] / 2)
        look = {"facecolor": "none", "edgecolor": colour, "linewidth": 1.6}
        self.axis.add_patch(FancyBboxPatch(corner, *size, boxstyle=f"{style},pad=0.04", **look))
        self.axis.text(x, y, text, ha="center", va="center", fontsize=11, color=colour)

    def tensor(self, x: float, y: float, name: str, learns: bool = False) -> None:
        self.box(x, y, name, (0.13 * len(name) + 0.16, 0.46), ORANGE if learns else GREY, "round")

    def network(self, x: float, y: float, which: tuple) -> None:
        """One of PASSES, as a square-cornered box: blue the trained network, green its moving average."""
        name, arguments, learns = which
        colour = ORANGE if learns else GREEN if name == "ema" else BLUE
        self.box(x, y, f"{name}\nV({', '.join(arguments)})", (2.15, 0.62), colour)

    def arrow(self, start: tuple, end: tuple, learns: bool = False, stop: bool = False) -> None:
        colour = ORANGE if learns else GREY
        look = {
            "arrowstyle": "-|>",
            "color": colour,
            "linewidth": 2.4 if learns else 1.3,
            "shrinkA": 0,
            "shrinkB": 0,
        }
        self.axis.annotate("", end, start, arrowprops=look)
        if stop:
            along = (np.array(end) - start) / np.linalg.norm(np.array(end) - start)
            across = 0.16 * np.array([along[1], -along[0]])
            for distance in (0.3, 0.4):  # from the start of the arrow
                at = start + distance * along
                self.axis.plot(*np.stack([at - across, at + across]).T, color=RED, linewidth=2.2)

    def function(self, x: float, y: float, function, equation: str, above: bool = False) -> None:
        """The name of a function of ours over an arrow at height y, and its equation below it or `above` the name."""
        self.axis.text(x, y + 0.10, function.__name__, ha="center", va="bottom", fontsize=9.5, style="italic")
        place, side = (y + 0.33, "bottom") if above else (y - 0.12, "top")
        self.axis.text(x, place, equation, ha="center", va=side, fontsize=9)

    def band(self, y: float, title: str, note: str) -> None:
        self.axis.text(0.05, y, title, fontsize=12, weight="bold", va="center")
        self.axis.text(1.55, y, note, fontsize=10, va="center")
        self.axis.plot([0.05, 13.4], [y + 0.27] * 2, color=GREY, linewidth=0.6, alpha=0.5)


def draw_legend(d: Diagram, x: float, y: float) -> None:
    """What the colours mean, one line each, downwards from y."""
    meanings = {
        ORANGE: "carries the gradient,\nfrom the loss to the weights",
        BLUE: "the same network, no gradient",
        GREEN: "its moving average (EMA)",
    }
    for line, (colour, meaning) in enumerate(meanings.items()):
        d.box(x, y - 0.38 * line, "", (0.3, 0.12), colour)
        d.axis.text(x + 0.4, y - 0.38 * line, meaning, va="center", fontsize=9.5)
    for shift in (-0.05, 0.05):
        d.axis.plot([x + shift] * 2, [y - 1.28, y - 1.0], color=RED, linewidth=2.2)
    d.axis.text(x + 0.4, y - 1.14, "stop-gradient", va="center", fontsize=9.5)


def draw_prediction(d: Diagram, y: float) -> None:
    """The first band: data, noise, the network's prediction."""
    d.tensor(0.5, y, "x0")
    d.tensor(0.5, y - 0.75, "eps")
    d.arrow((0.8, y), (3.0, y))
    d.arrow((0.82, y - 0.7), (1.5, y - 0.02))
    d.function(2.25, y, losses.add_noise, "Eq. 1, to t")
    d.tensor(3.3, y, "x_t")
    d.arrow((3.62, y), (4.75, y))
    d.network(5.9, y, PASSES[0])
    d.arrow((7.05, y), (8.75, y), learns=True)
    d.function(7.9, y, model.G, "x_t - t V, Eq. 6")
    d.tensor(9.35, y, "x0_hat", learns=True)


def draw_evaluation(d: Diagram, y: float) -> None:
    """The second band: the prediction, noised again, judged with the prompt and without it."""
    up, down = y + 0.5, y - 0.5
    d.tensor(0.6, y, "x0_hat", learns=True)
    d.arrow((1.15, y), (3.4, y), stop=True)
    d.function(2.5, y, losses.add_noise, "Eq. 8, to s, with eps_s")
    d.tensor(4.0, y, "x_s_hat")
    d.arrow((4.6, y + 0.05), (5.55, up))
    d.arrow((4.6, y - 0.05), (5.55, down))
    d.network(6.7, up, PASSES[1])
    d.network(6.7, down, PASSES[2])
    for level in (up, down):
        d.arrow((7.85, level), (8.6, level))
        d.function(8.2, level, model.G, "Eq. 6")
    d.tensor(8.95, up, "G_c")
    d.tensor(9.12, down, "G_null")
    d.arrow((9.27, up), (10.1, y + 0.03))
    d.arrow((9.65, down + 0.1), (10.1, y - 0.03))
    d.arrow((10.1, y), (11.75, y))
    d.function(10.95, y, losses.self_evaluation, "Eq. 14, s.6")
    d.tensor(12.2, y, "Delta")
    meaning = "= G_null - G_c:\n-Delta points to\nthe prompt's pictures"
    d.axis.text(12.2, y - 0.38, meaning, ha="center", va="top", fontsize=9.5)


def draw_learning(d: Diagram, y: float) -> None:
    """The third band: what the prediction is pulled to, above for s < t, below for s = t."""
    middle, low = y - 0.85, y - 1.6
    d.tensor(0.55, y, "Delta")
    d.tensor(0.6, middle, "x0_hat", learns=True)
    d.arrow((1.0, y), (2.85, y))
    d.arrow((1.15, middle + 0.05), (1.65, y - 0.03), stop=True)
    d.function(2.0, y, losses.pseudo_target, "Eq. 14", above=True)
    d.tensor(3.35, y, "x_self")
    d.arrow((3.9, y), (5.65, y))
    d.function(4.77, y, losses.implicit_target, "Eq. 18", above=True)
    d.tensor(4.3, middle, "mix")
    d.axis.text(
        4.3,
        middle - 0.36,
        f"{losses.mix_weight.__name__}(t, s)",
        ha="center",
        va="top",
        fontsize=9.5,
        style="italic",
    )
    d.arrow((4.4, middle + 0.27), (4.6, y - 0.03))
    d.tensor(6.1, middle, "x0")
    d.arrow((5.85, middle + 0.27), (5.2, y - 0.03))
    d.tensor(6.1, y, "x_tar")
    d.arrow((6.35, middle + 0.27), (6.95, y - 0.03))
    d.arrow((6.55, y), (7.95, y))
    d.function(7.25, y, losses.renormalise, "Eq. 19", above=True)
    d.tensor(8.6, y, "x_renorm")
    d.arrow((9.25, y - 0.05), (10.95, middle + 0.2))
    d.function(10.35, y - 0.25, losses.target_loss, "Eq. 20", above=True)
    d.tensor(8.6, middle, "x0_hat", learns=True)
    d.arrow((9.15, middle), (10.9, middle), learns=True)
    d.tensor(8.6, low, "x0")
    d.axis.text(8.1, low, "s = t: the data alone", ha="right", va="center", fontsize=9.5)
    d.arrow((8.9, low + 0.05), (10.95, middle - 0.2))
    d.axis.text(
        10.35, low + 0.15, losses.data_loss.__name__, ha="center", va="top", fontsize=9.5, style="italic"
    )
    d.axis.text(10.35, low - 0.08, "Eq. 7", ha="center", va="top", fontsize=9)
    d.tensor(11.3, middle, "loss", learns=True)
    weight = f"\u00d7 {losses.time_weight.__name__}(t)\n= 1 / t^2, Eq. 21"
    d.axis.text(11.8, middle, weight, ha="left", va="center", fontsize=9.5)


def training_step(path: Path) -> None:
    """Sec. 3, Fig. 2, as losses.SelfE does it, without the auxiliary term."""
    figure, axis = plt.subplots(figsize=(12.6, 7.0), layout="constrained")
    axis.set(xlim=(0, 13.5), ylim=(0.2, 8.08), aspect="equal")
    axis.axis("off")
    d = Diagram(axis)
    d.band(7.75, "1 Predict", "every sample: noise a picture, predict it back")
    draw_prediction(d, 7.0)
    draw_legend(d, 10.45, 7.32)
    judge = (
        "only samples with s < t: noise the prediction to level s, ask again with the prompt and without it"
    )
    d.band(5.6, "2 Judge", judge)
    draw_evaluation(d, 4.45)
    d.band(
        3.08,
        "3 Learn",
        "s < t: the target is the corrected prediction, mixed with the data, at the data's norm",
    )
    draw_learning(d, 2.2)
    save(figure, path)


# ------------------------------------------------------------------------------------------------------------
# Eq. s.11-s.13: where (t, s) is drawn
# ------------------------------------------------------------------------------------------------------------
def time_pairs(path: Path, taus=(0.0, 0.5, 1.0), n: int = 3000) -> None:
    """Draws of losses.sample_times: half of the samples on the diagonal, the others below it, deeper as tau rises."""
    random, positions = rng(0, "toy explain"), losses.below_positions(list(range(n)))
    z, u = (
        torch.from_numpy(numbers.astype(np.float32))
        for numbers in (random.standard_normal(n), random.random(n))
    )
    below = torch.zeros(n, dtype=torch.bool).index_fill(0, positions, True)
    meanings = {0.0: ": the first iteration,\nall points lie on the diagonal", 1.0: ": after its rise"}
    figure, axes = plt.subplots(1, len(taus), figsize=(10.5, 3.9), sharey=True, layout="constrained")
    for axis, tau in zip(axes, taus):
        t, s = losses.sample_times(z, u, positions, MU, tau)
        axis.plot(
            [0, 1],
            [0, 1 - tau],
            color=RED,
            linewidth=1.2,
            linestyle="--",
            label="lower limit of s, (1 - tau) t",
        )
        axis.scatter(
            t[below], s[below], s=3, c=ORANGE, linewidths=0, label="half: s uniform below t, self-evaluation"
        )
        axis.scatter(t[~below], s[~below], s=3, c=BLUE, linewidths=0, label="half: s = t, the data alone")
        axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="t: how noisy the network's input is")
        axis.set_title(f"tau = {tau:g}{meanings.get(tau, '')}")
    axes[0].set_ylabel("s: at which noise level\nx0_hat is judged")
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=3, frameon=False, markerscale=4)
    save(figure, path)


# ------------------------------------------------------------------------------------------------------------
# Eq. 17-18: how much of the target is self-evaluation
# ------------------------------------------------------------------------------------------------------------
def mixing_weight(path: Path, n: int = 201) -> None:
    """losses.mix_weight over the triangle s <= t, and along four lines of constant s."""
    grid = torch.linspace(0, 1, n, dtype=torch.float64)
    t, s = torch.meshgrid(grid, grid, indexing="xy")
    mix = torch.where(s <= t, losses.mix_weight(t.flatten(), s.flatten()).view(n, n), torch.nan)
    figure, (plane, lines) = plt.subplots(1, 2, figsize=(10, 4.3), layout="constrained")
    shades = plane.contourf(t, s, mix, levels=np.linspace(0, 1, 11), cmap="viridis")
    plane.plot([0, 1], [0, 1], color=GREY, linewidth=1.5)
    slanted = {"ha": "center", "va": "bottom", "rotation": 45, "rotation_mode": "anchor"}
    plane.text(0.33, 0.43, "s = t: mix = 0, the target is the data x0", **slanted)
    plane.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="t", ylabel="s")
    plane.set_title("mix = lambda / (1 + lambda): share of x_self in x_tar")
    figure.colorbar(shades, ax=plane, ticks=[0, 0.2, 0.4, 0.6, 0.8, 1.0], label="mix")
    for value, colour in zip((0.0, 0.25, 0.5, 0.75), COLOURS):
        times = torch.linspace(value, 1, n, dtype=torch.float64)
        mix = losses.mix_weight(times, torch.full_like(times, value))
        lines.plot(times, mix, color=colour, linewidth=1.8, label=f"s = {value:g}")
    lines.plot([1], [1], "o", color=RED)
    notes = (
        (
            "t = 1: lambda is infinite, mix = 1;\nx0 sets nothing but the norm (Eq. 19)",
            (1, 1),
            (0.05, 0.9),
            RED,
        ),
        ("s = 0: mix = t, but here Delta = 0", (0.45, 0.45), (0.03, 0.66), COLOURS[0]),
    )
    for text, at, place, colour in notes:
        lines.annotate(
            text, at, place, color=colour, va="center", arrowprops={"arrowstyle": "->", "color": colour}
        )
    lines.set(
        xlim=(0, 1.03), ylim=(0, 1.05), xlabel="t", ylabel="mix", title="the same along lines of constant s"
    )
    lines.legend(frameon=False, loc="lower right")
    save(figure, path)


# ------------------------------------------------------------------------------------------------------------
# Eq. 22, s.12: what a sampler tells the network
# ------------------------------------------------------------------------------------------------------------
def told(steps: int, s_rule: float = 0.0) -> list[tuple[float, float]]:
    """(t_k, s_k) of each evaluation that sampler.trajectory makes."""
    seen = []

    def V(x, t, s):
        seen.append((float(t[0]), float(s[0])))
        return x

    for _ in sampler.trajectory(V, torch.zeros(1, 2), (), steps=steps, mu=MU, s_rule=s_rule, eta=0.0):
        pass
    return seen


def time_grids(path: Path, budgets=(1, 2, 4)) -> None:
    """One line per number of steps, from noise at the left to data at the right, with (t_k, s_k) of each evaluation."""
    figure, axis = plt.subplots(figsize=(10.5, 4.8), layout="constrained")
    axis.set(xlim=(1.03, -0.03), ylim=(-1.75, len(budgets) - 0.2), yticks=[], xlabel="time")
    ends = {1.0: "\nnoise", 0.0: "\ndata"}
    axis.set_xticks(
        ticks := np.linspace(1, 0, 11).round(1), [f"{tick:g}{ends.get(tick, '')}" for tick in ticks]
    )
    for side in ("left", "right", "top"):
        axis.spines[side].set_visible(False)
    for row, steps in zip(reversed(range(len(budgets))), budgets):
        axis.plot([1, 0], [row, row], color=GREY, linewidth=0.8)
        axis.plot(sampler.time_grid(steps, MU), [row] * (steps + 1), "|", color=GREY, markersize=9)
        axis.text(1.0, row + 0.52, f"N = {steps}", va="center", fontsize=12, weight="bold")
        for k, (t, s) in enumerate(told(steps)):  # pairs, not moves: no arrows
            height = row + (0.32 if k % 2 else 0.16)  # or s_k would hide behind t_(k+1)
            axis.plot([t, s], [height] * 2, color=GREY, linewidth=1, linestyle=":", zorder=1)
            axis.scatter([t], [height], s=36, color=BLUE, zorder=3, label="t_k: noise level of the input")
            axis.scatter(
                [s],
                [height],
                s=36,
                facecolors="white",
                edgecolors=GREEN,
                linewidths=1.6,
                zorder=3,
                label="s_k: the second time",
            )
            axis.text((t + s) / 2, row - 0.09, f"t = {t:.2f}\ns = {s:.2f}", ha="center", va="top", fontsize=9)
    axis.legend(
        *(part[:2] for part in axis.get_legend_handles_labels()), loc="upper center", ncol=2, frameon=False
    )
    (t, low), (_, middle), (_, high) = (told(2, rule)[0] for rule in (0.0, 0.5, 1.0))
    axis.plot([high, low], [-1, -1], color=GREEN, linewidth=3)
    names = (
        "s_rule 1: s = t_k,\nthe flow-matching head",
        "s_rule 0.5",
        "s_rule 0, the default:\ns = the next time",
    )
    for s, name in zip((high, middle, low), names):
        axis.scatter([s], [-1], s=36, c=GREEN, zorder=3)
        axis.text(s, -1.1, name, ha="left" if s == 1 else "center", va="top", fontsize=9, color=GREEN)
    note = f"where s may lie in the first of two steps (t = {t:.2f}):\nonly the sampler ties s to a time of its grid"
    axis.text(0.5, -1, note, va="center", fontsize=9, color=GREEN)
    save(figure, path)


FIGURES = {
    "explain_step": training_step,
    "explain_times": time_pairs,
    "explain_mix": mixing_weight,
    "explain_grids": time_grids,
}


def main() -> None:
    parser = errors.Parser("toy/explain.py", __doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=ROOT / "toy/results", help="folder of the PNGs (toy/results)"
    )
    args = parser.parse_args()
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out must be a folder; {args.out} is a file")
    for name, draw in FIGURES.items():
        draw(args.out / f"{name}.png")
    print(f"{', '.join(name + '.png' for name in FIGURES)} in {args.out}")


if __name__ == "__main__":
    errors.run(main)
